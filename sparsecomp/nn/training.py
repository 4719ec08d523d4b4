"""A linear layer that trains under a fixed mask with sparse kernels: y and the gradient of x, on the CPU.

Takes an nn.Linear and turns it into this class, and back. Knows nothing of optimizers, schedules and models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from sparsecomp.backends.refill import why_not_refillable, why_not_transposed
from sparsecomp.errors import ModelError
from sparsecomp.modules.carry import why_not_carried
from sparsecomp.nn import operators
from sparsecomp.nn.eager.dense import dense_product
from sparsecomp.nn.eager.probe import probe
from sparsecomp.nn.following import Layouts, NoLayouts
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.patterns import Pattern, parse
from sparsecomp.patterns.check import check_mask

_OWN = ("_bits", "_pattern", "_was", "_layouts")


def _unwatched() -> bool:
    """Whether no mode, transform or trace wants to see what this thread computes."""
    found = probe()
    return not isinstance(found, str) and found.watch.nobody()


def _readable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels may read the memory of a tensor."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    return kind and tensor.is_cpu and tensor.dtype is dtype and not tensor.is_neg()


class _Product(torch.autograd.Function):
    """y = x W^T + b for autograd; x [batch, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layouts: Layouts) -> Tensor:
        """y [batch, out]."""
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.layouts = layouts
        return layouts.product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x by its kernel, of the weight [out, in] by a dense product, and of the bias.

        For gradients of gradients, and where transforms look on, all products are dense and torch's own.
        """
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if torch.is_grad_enabled() or not _unwatched() or not _readable(grad, ctx.layouts.dtype):
            x_grad = None if weight is None else grad @ weight
            weight_grad = None if x is None else grad.t() @ x
        else:
            if weight is not None:
                x_grad = ctx.layouts.gradient(grad, weight)
                x_grad = dense_product(grad, weight.t()) if x_grad is None else x_grad
            if x is not None:
                weight_grad = dense_product(grad.t(), x.t())
        return x_grad, weight_grad, grad.sum(0) if ctx.needs_input_grad[2] else None, None


class SparseTrainingLinear(nn.Linear):
    """An nn.Linear under a mask (bool [out, in]): y and the gradient of x come from the sparse CPU kernels.

    ``weight`` stays the dense Parameter that an optimizer trains, and is to be zero where the mask is False: y is then
    what nn.Linear gives. Its values are fetched into the layouts of the kernels when it was written; the positions are
    packed once. The gradient of the weight is the dense grad^T x, also outside the mask.

    The gradient of x has a kernel if the transposed mask fits a pattern, as that of "2:4@t" does; else it is dense.
    The layer is nn.Linear on other devices, in another dtype than the weight's, under autocast, torch.compile,
    torch.func and modes, and where the gradient is to have gradients.

    Writes to the whole weight through ``weight.data`` are noticed, writes to single entries in that way are not.
    ``deepcopy`` and ``pickle`` keep the mask, and the layouts are made anew at the next call.
    """

    _bits: Tensor
    _pattern: Pattern
    _was: type[nn.Linear]
    _layouts: Layouts | NoLayouts | None

    @classmethod
    def take(cls, linear: nn.Linear, mask: Tensor, pattern: str | Pattern) -> SparseTrainingLinear:
        """Turn ``linear`` itself into such a layer; one that is already takes the new mask.

        Parameters, hooks, buffers and whoever refers to the layer stay. Raises ModelError for a layer that does more
        than nn.Linear and for a mask of another shape or dtype, PatternError for a mask that breaks ``pattern``.
        """
        if isinstance(linear, cls):
            linear.set_mask(mask, pattern)
            return linear
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"got {type(linear).__name__}; allowed is an nn.Linear, so leave other layers as they are")
        if reason := why_not_carried(linear, nn.Linear):
            raise ModelError(f"this layer cannot train by sparse kernels: {reason}")
        kind, bits, parsed = type(linear), *_described(linear, mask, pattern)
        linear.__class__ = cls  # as torch.nn.utils.parametrize does
        assert isinstance(linear, cls)
        linear._was = kind
        linear._bits, linear._pattern, linear._layouts = bits, parsed, None
        return linear

    def give_back(self) -> nn.Linear:
        """Turn this layer back into what it was; Parameters and all else stay."""
        kind = self._was
        for name in _OWN:
            del self.__dict__[name]
        self.__class__ = kind  # type: ignore[assignment]
        return self

    @property
    def pattern(self) -> Pattern:
        """The pattern of the mask."""
        return self._pattern

    @property
    def mask(self) -> Tensor:
        """The mask, bool [out, in], on the CPU; a copy."""
        shape = self.out_features, self.in_features
        return unpack_positions(self._bits, self.in_features, 1).to(torch.bool).view(shape)

    def set_mask(self, mask: Tensor, pattern: str | Pattern | None = None) -> None:
        """Take another mask, of the same pattern unless one is given; positions are packed anew at the next call."""
        bits, parsed = _described(self, mask, self._pattern if pattern is None else pattern)
        if parsed != self._pattern or not torch.equal(bits, self._bits):
            self._bits, self._pattern, self._layouts = bits, parsed, None

    def why_dense(self) -> str | None:
        """None if y comes from a sparse kernel in ordinary calls, else the reason why the layer is nn.Linear."""
        found = probe()
        if isinstance(found, str):
            return f"modes of torch that look on would not be noticed ({found})"
        if not self.weight.is_cpu:
            return f"the weight is on {self.weight.device}; sparse training kernels run on the cpu"
        return why_not_refillable(self._pattern, (self.out_features, self.in_features), self.weight.dtype)

    def why_dense_gradient(self) -> str | None:
        """None if the gradient of x comes from a sparse kernel as well, else the reason why it is dense."""
        return self.why_dense() or why_not_transposed(self.mask, self._pattern, self.weight.dtype)

    def layouts(self) -> Layouts | NoLayouts:
        """The layouts of the kernels for the weight's dtype, made if there are none, or the reason why not."""
        dtype = self.weight.dtype
        if self._layouts is None or self._layouts.dtype is not dtype:
            shape = self.out_features, self.in_features
            reason = why_not_refillable(self._pattern, shape, dtype)
            with torch.inference_mode(False), torch.no_grad():
                self._layouts = NoLayouts(dtype, reason) if reason else Layouts(self.mask, self._pattern, dtype)
        return self._layouts

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out_features] for input [..., in_features]."""
        weight, bias = self.weight, self.bias
        if is_compiling() or not self._runs(input, weight, bias):
            return functional.linear(input, weight, bias)
        layouts = self.layouts()
        if isinstance(layouts, NoLayouts):
            return functional.linear(input, weight, bias)
        x = operators.rows(input)
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
            y: Tensor = _Product.apply(x, weight, bias, layouts)  # type: ignore[no-untyped-call]
        else:
            y = layouts.product(x, weight, bias)
        return y if input.ndim == 2 else y.view(*input.shape[:-1], self.out_features)

    def _runs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if not isinstance(x, Tensor) or not _unwatched():
            return False
        dtype, out = weight.dtype, self.out_features
        if not _readable(x, dtype) or not _readable(weight, dtype):
            return False
        fits = x.ndim > 0 and x.shape[-1] == self.in_features and weight.shape == (out, self.in_features)
        if bias is not None:
            fits = fits and _readable(bias, dtype) and bias.is_contiguous() and bias.shape == (out,)
        return fits and weight.is_contiguous() and weight.numel() > 0

    def __getstate__(self) -> dict[str, Any]:
        """The layer without its layouts."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_layouts": None}

    def extra_repr(self) -> str:
        """Sizes and the pattern."""
        return f"{super().extra_repr()}, pattern={self._pattern}"


def _described(linear: nn.Linear, mask: Tensor, pattern: str | Pattern) -> tuple[Tensor, Pattern]:
    """The mask as bits, and its pattern; ModelError or PatternError for those that do not fit the layer."""
    parsed = parse(pattern)
    shape = linear.out_features, linear.in_features
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(f"the mask is {got}; this layer takes torch.bool {shape}, one entry for each weight")
    mask = mask.detach().cpu()
    check_mask(mask, parsed)
    return pack_positions(mask.to(torch.uint8), 1), parsed
