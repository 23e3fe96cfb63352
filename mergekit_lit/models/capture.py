"""This file is a module as plain functions of its parameters, which show its layers at work."""

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, conv2d, nn
from torch.func import functional_call
from torch.nn.functional import linear, pad, scaled_dot_product_attention, unfold
from torch.overrides import TorchFunctionMode

from mergekit_lit.core.calibration import Layer, Network
from mergekit_lit.core.params import Params
from mergekit_lit.core.tensorfiles import floats

_BatchNorm = nn.modules.batchnorm._BatchNorm


def network(module: nn.Module, *, batch_statistics: bool = False) -> Network:
    """Return a module in evaluation mode as functions of its parameters.

    Half-precision parameters are computed with in float32.

    Args:
        module: never changed.
        batch_statistics: whether BatchNorm normalises by the batch at hand, and not by the
            statistics among the parameters.
    """
    shell = copy.deepcopy(module).eval()
    for layer in shell.modules():
        if hasattr(layer, "inplace"):
            # It would overwrite what a layer before it returned.
            setattr(layer, "inplace", False)  # noqa: B010 (torch types attributes as modules)
        if type(layer) is nn.MultiheadAttention:
            layer.__class__ = _OpenAttention
        if batch_statistics and isinstance(layer, _BatchNorm):
            # Trained layers that track nothing normalise by the batch, and keep nothing of it.
            layer.training, layer.track_running_stats = True, False

    def features(params: Params, inputs: Tensor) -> Tensor:
        result: Tensor = functional_call(shell, floats(params), (inputs,))
        return result

    def capture(
        params: Params, inputs: Tensor, names: Collection[str]
    ) -> tuple[Tensor, dict[str, Layer]]:
        wide = floats(params)
        watch = _Watch({id(wide[name]): name for name in names})
        with watch:
            result: Tensor = functional_call(shell, wide, (inputs,))
        return result, watch.layers

    return Network(features, capture)


class _OpenAttention(nn.MultiheadAttention):
    """Attention whose two linear maps can be watched: torch's own is one call, or one kernel.

    Queries, keys and values are made by one weight (3 d, d) that reads what all of them read.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what torch's attention returns; plain self-attention in the open."""
        same = query is key is value and query.dim() == 3 and self.in_proj_weight is not None
        if args or options != {"need_weights": False} or not same or self._adds_to_keys():
            return super().forward(query, key, value, *args, **options)
        inputs = query if self.batch_first else query.transpose(0, 1)
        packed = linear(inputs, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = (
            part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for part in packed.chunk(3, dim=2)
        )
        answers = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        output = self.out_proj(answers)
        return output if self.batch_first else output.transpose(0, 1), None

    def _adds_to_keys(self) -> bool:
        return self.add_zero_attn or self.bias_k is not None


class _Watch(TorchFunctionMode):
    """Notes each linear map and convolution that is computed with one of some weights.

    Calls are watched, and not modules: attention applies its output map without calling it.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.layers: dict[str, Layer] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and note what it was given."""
        result = func(*args, **(kwargs or {}))
        if func in _MAPS:
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = {**dict(zip(order, args, strict=False)), **(kwargs or {})}
            name = self._names.get(id(given["weight"]))
            if name is not None:
                self.layers[name] = _MAPS[func](result, given)
        return result


def _linear_layer(output: Tensor, given: dict[str, Any]) -> Layer:
    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1, tensor.shape[-1])

    return Layer(output, lambda: rows(given["input"]), rows)


def _convolution_layer(output: Tensor, given: dict[str, Any]) -> Layer:
    groups = given.get("groups", 1)

    def rows(patches: Tensor) -> Tensor:
        """Return (g, b * places, c / g) of (b, c, places)."""
        images, channels, places = patches.shape
        split = patches.reshape(images, groups, channels // groups, places)
        return split.permute(1, 0, 3, 2).flatten(1, 2)

    def input_rows() -> Tensor:
        kernel, dilation = tuple(given["weight"].shape[2:]), _pair(given.get("dilation", 1))
        padded = pad(given["input"], _padding(given.get("padding", 0), kernel, dilation))
        stride = _pair(given.get("stride", 1))
        return rows(unfold(padded, kernel, dilation=dilation, stride=stride))

    return Layer(output, input_rows, lambda tensor: rows(tensor.flatten(2)))


_MAPS = {linear: _linear_layer, conv2d: _convolution_layer}


def _padding(
    padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """Return what `pad` takes for a convolution's padding: left, right, top, bottom."""
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        spare = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        ends = [(extra // 2, extra - extra // 2) for extra in spare]
    else:
        ends = [(side, side) for side in _pair(padding)]
    return [side for end in reversed(ends) for side in end]


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return a value for height and for width."""
    several = (value,) if isinstance(value, int) else tuple(value)
    return several * 2 if len(several) == 1 else several
