"""This file is low-rank adaptation: factors that are trained in place of whole matrices."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_lit.core.params import Params
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.structure import Structure

_MATRICES = ("linear", "convolution")


class LowRank(nn.Module):
    """The factors of every matrix: its step is (alpha / r) B A, of rank r at most.

    A (r, in) is drawn Kaiming-uniform, B (out, r) is zero, so that training starts at the base. A
    convolution (out, in, h, w) is the matrix (out, in h w).

    Source: Hu et al. 2022, arXiv:2106.09685, sec. 4.1.
    Differs: adapts all linear layers and convolutions, not only those of attention.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], *, rank: int, alpha: float, seed: int
    ) -> None:
        """Draw the factors.

        Args:
            shapes: shapes of the matrices by name.
            rank: r, at least 1.
            alpha: positive; the step is scaled by alpha / r.
            seed: the factors are a function of it, the names and the shapes alone.
        """
        super().__init__()
        self.shapes = dict(shapes)
        self.scale = alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, shape in self.shapes.items():
            rows, columns = shape[0], math.prod(shape[1:])
            # The variance of torch's own linear layers.
            bound = 1 / math.sqrt(columns)
            drawn = torch.rand(rank, columns, generator=generator(seed, "lora", name))
            self.down[_key(name)] = nn.Parameter(bound * (2 * drawn - 1))
            self.up[_key(name)] = nn.Parameter(torch.zeros(rows, rank))

    @classmethod
    def of(
        cls, params: Params, structure: Structure, *, rank: int, alpha: float, seed: int
    ) -> "LowRank":
        """Return factors of all linear layers and convolutions among the tensors."""
        shapes = {
            name: tensor.shape
            for name, tensor in params.items()
            if structure[name].kind in _MATRICES and tensor.dim() > 1
        }
        return cls(shapes, rank=rank, alpha=alpha, seed=seed)

    def forward(self, params: Params) -> dict[str, Tensor]:
        """Return W + (alpha / r) B A of every adapted matrix; nothing given changes."""
        return {
            name: params[name] + self.scale * (self.up[key] @ self.down[key]).view(shape)
            for name, shape in self.shapes.items()
            for key in [_key(name)]
        }


def _key(name: str) -> str:
    """Return a name that torch takes for a parameter."""
    return name.replace(".", "/")
