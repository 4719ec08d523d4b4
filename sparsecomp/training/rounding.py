"""Integers in the loop: a model under training computes with the weights and the inputs that it is deployed with.

Takes layers and their numbers, gives rounded weights, and a hook that rounds inputs. Knows no rule and no optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsecomp.errors import PatternError
from sparsecomp.packing.format import dequantize
from sparsecomp.packing.quantize import largest_scales, pairs_matter, row_integers, row_scales
from sparsecomp.patterns import NM, row_nm
from sparsecomp.patterns.numbers import Numbers
from sparsecomp.patterns.rounding import round_rows
from sparsecomp.training.layers import TrainedLayer


class RoundedWeight:
    """What the kept weights of a layer are deployed as: integers times the scale of their row.

    The numbers are those that ``pack``, ``quantize`` and ``unpack`` give, without packing. Where scales depend on which
    weights are multiplied together, the columns of kept weights are noted once for each mask.
    """

    def __init__(self, numbers: Numbers) -> None:
        """``numbers`` have scales."""
        self._numbers = numbers
        self._noted: tuple[Tensor, NM, Tensor] | None = None

    def __call__(self, layer: TrainedLayer, kept: Tensor) -> Tensor:
        """The rounded weight of ``kept`` (zeros where the mask drops), both as stored."""
        matrix = layer.matrix(kept)
        wide = matrix.to(torch.float32)
        scales = self._scales(layer, wide)
        return layer.stored(dequantize(row_integers(wide, scales), scales, matrix.dtype))

    def _scales(self, layer: TrainedLayer, wide: Tensor) -> Tensor:
        nm = row_nm(layer.pattern)
        assert nm is not None  # no other pattern has scales
        if not pairs_matter(nm, self._numbers):
            return largest_scales(wide)
        if self._noted is None or self._noted[0] is not layer.mask:
            self._noted = (layer.mask, *kept_columns(layer.matrix(layer.mask), nm))
        _, now, columns = self._noted
        missing = now.groups(wide.shape[1]) * now.m - wide.shape[1]
        filled = functional.pad(wide, (0, missing)) if missing else wide
        return row_scales(filled.gather(1, columns.to(torch.int64)), now, self._numbers)


def kept_columns(mask: Tensor, goal: NM) -> tuple[NM, Tensor]:
    """The N:M that a mask [out, in] fits, and the columns that a row keeps: int32 [out, groups*N], N for each group.

    N is the goal's, or larger while a schedule still keeps more. A group that keeps fewer is filled with columns that
    it drops, those behind the last column included.
    """
    out, columns = mask.shape
    groups = goal.groups(columns)
    starts = torch.arange(0, groups * goal.m, goal.m, dtype=torch.int32, device=mask.device)
    kept = mask.nonzero(as_tuple=True)[1].to(torch.int32)
    if len(kept) == out * groups * goal.n:
        places = kept.view(out, groups, goal.n) - starts[:, None]
        if bool(((places >= 0) & (places < goal.m)).all()):
            return goal, kept.view(out, groups * goal.n)
    filled = functional.pad(mask, (0, groups * goal.m - columns)).view(out, groups, goal.m)
    most = int(filled.sum(dim=2).amax()) if filled.numel() else 0
    now = NM(max(most, goal.n), goal.m)
    places = filled.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[..., : now.n].to(torch.int32)
    return now, (places + starts[:, None]).flatten(1)


class _Straight(torch.autograd.Function):
    """Rounded rows whose gradient is that of the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_rows(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RoundedInput:
    """A forward pre-hook that rounds each row of a layer's input [..., in] to 8 bits, as the deployed product does.

    Has no state, so that models with it can be copied and pickled. The gradient passes as if nothing were rounded.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with its first tensor, by place or by name, rounded."""
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        return args, {name: self._rounded(each) for name, each in kwargs.items()}

    @staticmethod
    def _rounded(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        rounded: Tensor = _Straight.apply(x)  # type: ignore[no-untyped-call]
        return rounded


class RoundedInputs:
    """Layers of a model whose inputs are rounded until ``remove``, each once, also where a copied model has them so."""

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        """``layers`` are modules of ``model``."""
        self._layers = list(layers)
        for each in self._layers:
            _leave(each)
            each.register_forward_pre_hook(RoundedInput(), with_kwargs=True)
        inside = set(self._layers)
        # in evaluation these would hand nested tensors to their layers, which have no rows
        self._padding = [
            each
            for each in model.modules()
            if isinstance(each, nn.TransformerEncoder)
            and each.use_nested_tensor
            and not inside.isdisjoint(each.modules())
        ]
        for each in self._padding:
            each.use_nested_tensor = False

    def remove(self) -> None:
        """Inputs are as they come again."""
        for layer in self._layers:
            _leave(layer)
        for encoder in self._padding:
            encoder.use_nested_tensor = True
        self._layers, self._padding = [], []


def _leave(module: nn.Module) -> None:
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, RoundedInput)]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def require_linear(layers: Mapping[str, TrainedLayer]) -> None:
    """Raises PatternError for a convolution that is to be trained in integers."""
    for name, each in layers.items():
        if each.numbers.has_scales and each.ref.kind == "conv2d":
            raise PatternError(
                f'"{name}" is a convolution, and {each.numbers} is for linear layers; give it a pattern without '
                "numbers, or leave it out with skip="
            )
