"""This file is what `merge_speed.py` runs in processes of their own: one merge by one tool.

It needs nothing but the tool that it runs, so that the interpreter of another tool will do.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"scale": 0.3},
    "ties": {"density": 0.2, "scale": 1.0},
    "dare": {"drop": 0.5, "scale": 0.3},
    "wudi": {"solver": "exact"},
}
DENSITIES = [round(0.1 * i, 1) for i in range(1, 11)]
# The same method and parameters under mergekit's names.
MERGEKIT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3, "normalize": False}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 0.3, "density": 0.5, "normalize": False}),
}
FUSION_BENCH = ("average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c")
SVD = ("tsv_m", "iso_c")


def run_here(job: Mapping[str, Any]) -> None:
    """Prepare a job (imports), do it, and print the seconds: of the work, and of the process."""
    if job["tool"] in ("mergekit", "fusion_bench"):
        limit = int(job["memory"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    do = TOOLS[job["tool"]](job)
    imported, wall = seconds(), time.perf_counter()
    print("started", flush=True)
    do()
    figures = {
        "cpu_s": round(seconds() - imported, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        "process_s": round(seconds(), 3),
        "version": version(job["tool"]),
    }
    print("ended", json.dumps(figures), flush=True)


def seconds() -> float:
    """Return the processor time of this process so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def version(tool: str) -> str:
    """Return the version of a tool."""
    from importlib import metadata

    names = {"fusion_bench": "fusion-bench", "floor": "numpy"}
    own = tool if tool.startswith("merge") else "torch"
    return metadata.version(names.get(tool, own))


def floor(job: Mapping[str, Any]) -> Callable[[], None]:
    """Read all inputs and write as many bytes as one of them has."""
    size = Path(job["files"][0]).stat().st_size

    def do() -> None:
        buffer = bytearray(1 << 22)
        for path in job["files"]:
            with Path(path).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        with Path(job["out"]).open("wb", buffering=0) as file:
            for _ in range(-(-size // len(buffer))):
                file.write(buffer)

    return do


def ours(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run `mergekit-lit merge`."""
    import torch

    import mergekit_lit.cli.merge  # noqa: F401 - what the command imports
    from mergekit_lit.cli import main as command

    del torch
    base, *experts = job["files"]
    words = ["merge", *experts, "--base", base, "--out", job["out"], "--method", job["method"]]
    words += [f"--{key}={value}" for key, value in CONFIGS.get(job["method"], {}).items()]

    def do() -> None:
        if command(words):
            raise SystemExit("mergekit-lit failed")

    return do


def grid(job: Mapping[str, Any]) -> Callable[[], None]:
    """Merge by TIES under ten densities in one pass; the models are not written."""
    from mergekit_lit.merging import merge_many
    from mergekit_lit.merging.raw import load_raw

    base, *experts = map(Path, job["files"])

    def do() -> None:
        configs = [{"density": density} for density in DENSITIES]
        for _ in merge_many(load_raw(experts, base=base), "ties", configs):
            pass

    return do


def mergekit(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run `mergekit-pytorch`."""
    import tempfile

    import yaml
    from mergekit.scripts.merge_raw_pytorch import main as command

    method, parameters = MERGEKIT[job["method"]]
    base, *experts = job["files"]
    config = {
        "merge_method": method,
        "models": [{"model": path} for path in experts],
        "parameters": parameters,
        **({} if method == "linear" else {"base_model": base}),
    }
    folder = Path(tempfile.mkdtemp(dir=Path(job["out"]).parent))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = [str(folder / "config.yaml"), str(folder / "out")]

    def do() -> None:
        command(args=words, standalone_mode=False)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()

    return do


def fusion_bench(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run FusionBench's algorithm on the experts as modules, and save the result."""
    import timm
    import torch
    from fusion_bench import BaseModelPool
    from fusion_bench import method as algorithms
    from safetensors.torch import load_file, save_file

    make: dict[str, Callable[[], Any]] = {
        "average": algorithms.SimpleAverageAlgorithm,
        "task_arithmetic": lambda: algorithms.TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties": lambda: algorithms.TiesMergingAlgorithm(
            scaling_factor=1.0, threshold=20, remove_keys=[], merge_func="mean"
        ),
        "dare": lambda: algorithms.DareTaskArithmetic(
            scaling_factor=0.3, sparsity_ratio=0.5, only_on_linear_weights=False
        ),
        "tsv_m": algorithms.TaskSingularVectorMerging,
        "iso_c": lambda: algorithms.ISO_C_Merge(scaling_factor=1.0, exclude_keys=None),
    }
    algorithm = make[job["method"]]()

    def loaded(path: str) -> Any:
        with torch.device("meta"):
            module = timm.create_model(job["model"], num_classes=0)
        module.load_state_dict(load_file(path), assign=True)
        return module

    def do() -> None:
        names = ("_pretrained_", *(f"task{t}" for t in range(len(job["files"]) - 1)))
        pool = {name: loaded(path) for name, path in zip(names, job["files"], strict=True)}
        # Its DARE takes no plain mapping; a pool copies each model, so the others are spared it.
        merged = algorithm.run(BaseModelPool(pool) if job["method"] == "dare" else pool)
        save_file({n: t.contiguous() for n, t in merged.state_dict().items()}, job["out"])

    return do


def plain_svd(dtype: str) -> Callable[[Mapping[str, Any]], Callable[[], None]]:
    """Return the tool that does TSV-M and Iso-C by `torch.linalg.svd`, as the papers write them."""

    def tool(job: Mapping[str, Any]) -> Callable[[], None]:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        merge = tsv_m if job["method"] == "tsv_m" else iso_c

        def step(deltas: Any) -> Any:
            mean = deltas.mean(dim=0)
            if deltas.ndim < 3 or min(deltas[0].flatten(1).shape) == 1:
                return mean
            matrices = deltas.flatten(2).to(getattr(torch, dtype))
            return merge(torch, matrices).reshape(mean.shape).float()

        def do() -> None:
            base, *experts = (safe_open(path, framework="pt") for path in job["files"])
            out = {}
            for name in base.keys():  # noqa: SIM118 - a file, no mapping
                start = base.get_tensor(name)
                deltas = torch.stack([expert.get_tensor(name) - start for expert in experts])
                out[name] = start + step(deltas)
            save_file(out, job["out"])

        return do

    return tool


def tsv_m(torch: Any, deltas: Any) -> Any:
    """Return polar(U) S polar(V)^T of the experts' leading singular vectors."""
    rank = min(deltas.shape[1:]) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts])
    p, _, q = torch.linalg.svd(left, full_matrices=False)
    a, _, b = torch.linalg.svd(right, full_matrices=False)
    return (p @ q * values) @ (a @ b)


def iso_c(torch: Any, deltas: Any) -> Any:
    """Return the sum of the deltas with its spectrum made flat."""
    u, s, v = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
    return s.mean() * u @ v


TOOLS: Mapping[str, Callable[[Mapping[str, Any]], Callable[[], None]]] = {
    "floor": floor,
    "mergekit-lit": ours,
    "ten densities": grid,
    "mergekit": mergekit,
    "fusion_bench": fusion_bench,
    "svd float32": plain_svd("float32"),
    "svd float64": plain_svd("float64"),
}


if __name__ == "__main__":
    run_here(json.loads(sys.argv[1]))
