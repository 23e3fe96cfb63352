"""Measure spectral methods layer by layer beside what they are in their papers: one SVD a matrix.

    python experiments/benchmarks/spectral.py

Layers of a ViT-B/32, of experts whose spectra fall by three decades; processor time, one thread,
ours and the SVDs' in turns. Errors are relative, against the SVDs in float64.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergekit_lit.core.merging import Slice
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.spectral import iso_c, tsv_m

SHAPES = ((768, 768), (2304, 768), (3072, 768), (768, 3072))
_DECADES = 3.0
_LENGTH = 1e-2


def tsv_m_by_svd(deltas: Tensor) -> Tensor:
    """Return TSV-M's step of deltas (T, m, n): an SVD a task, and one of each joined side."""
    rank = min(deltas.shape[1:]) // len(deltas)
    triplets = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = _orthogonal(torch.cat([u[:, :rank] for u, _, _ in triplets], dim=1))
    right = _orthogonal(torch.cat([v[:rank] for _, _, v in triplets], dim=0))
    values = torch.cat([s[:rank] for _, s, _ in triplets])
    return (left * values) @ right


def iso_c_by_svd(deltas: Tensor) -> Tensor:
    """Return Iso-C's step of deltas (T, m, n): one SVD of their sum."""
    left, values, right = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
    return values.mean() * left @ right


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return U V^T of U S V^T."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


METHODS: Mapping[str, tuple[Callable[[Slice], Tensor], Callable[[Tensor], Tensor]]] = {
    "tsv_m": (tsv_m, tsv_m_by_svd),
    "iso_c": (iso_c, iso_c_by_svd),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="ours and the SVDs', in turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | layer | ours, CPU s | by SVD | ours over it | error, ours | error, SVD |")
    print("|---|---|---|---|---|---|---|")
    for name in given.methods:
        totals = [0.0, 0.0]
        for shape in SHAPES:
            draw = torch.Generator().manual_seed(0)
            deltas = torch.stack([falling(*shape, draw) for _ in range(given.experts)])
            cells = row(name, deltas, given.rounds, totals)
            print(f"| {name} | {shape[0]} x {shape[1]} | {cells} |", flush=True)
        ours, theirs = totals
        print(f"| {name} | sum | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | | |", flush=True)


def row(name: str, deltas: Tensor, rounds: int, totals: list[float]) -> str:
    """Return the cells of one layer, and add its seconds to the totals."""
    ours, by_svd = METHODS[name]
    info = TensorInfo("linear", 0, "block", ("axis", None))
    tensor = Slice("weight", torch.zeros_like(deltas[0]), deltas, info, {}, 0)
    exact = by_svd(deltas.double())
    pairs = [(timed(lambda: ours(tensor)), timed(lambda: by_svd(deltas))) for _ in range(rounds)]
    seconds = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
    errors = [float((pairs[0][side][1] - exact).norm() / exact.norm()) for side in (0, 1)]
    for side in (0, 1):
        totals[side] += seconds[side]
    ratios = sorted(pair[0][0] / pair[1][0] for pair in pairs)
    told = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"{seconds[0]:.2f} | {seconds[1]:.2f} | {told} | {errors[0]:.0e} | {errors[1]:.0e}"


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the processor seconds that a function takes, and its result."""
    started = time.process_time()
    found = function()
    return time.process_time() - started, found


def falling(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Return a random matrix whose singular values fall from the largest by three decades."""
    rank = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=draw))[0] for size in (rows, columns)
    )
    return _LENGTH * (left * torch.logspace(0, -_DECADES, rank)) @ right.T


if __name__ == "__main__":
    main()
