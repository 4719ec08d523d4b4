"""The operators torch.compile, torch.export and autograd see: schemas, fake results, gradients. Registered only here.

Takes the tensors of a Kernel and the facts that describe it. Knows nothing of modules.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from sparsecomp.activations import activate, activation_gradient, require_activation
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.choice import unpacks
from sparsecomp.backends.registry import backends
from sparsecomp.errors import ModelError
from sparsecomp.patterns.numbers import INT8, parse_weights

_weights = lru_cache(maxsize=256)(parse_weights)
_LIBRARY: Any = torch.library.Library("sparsecomp", "DEF")  # type: ignore[no-untyped-call]
# the pattern with its numbers, such as "2:4+int8"
_FACTS = "str backend, str pattern, int out_features, int in_features, ScalarType dtype"
_LIBRARY.define(
    # no default: the dispatcher would leave out arguments that equal theirs, and their gradients would be missed
    f"linear(Tensor x, Tensor[] weight, Tensor? bias, {_FACTS}, int? dense_above, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(f"to_dense(Tensor[] weight, {_FACTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def rows(x: Tensor) -> Tensor:
    """x [..., in] as [product of the other sizes, in]; a view where torch can make one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def apply(kernel: Kernel, x: Tensor, bias: Tensor | None, dense_above: int | None, activation: str = "none") -> Tensor:
    """y [batch, out] = activation(x [batch, in] W^T + bias) in the kernel's dtype.

    From ``dense_above`` rows on, the product runs on a dense temporary instead: measured to be faster there.
    """
    backend = backends()[kernel.backend]
    if unpacks(dense_above, x.shape[0]):
        return activate(functional.linear(x, backend.dense(kernel), bias), activation)
    return backend.run_activated(kernel, x, bias, activation)


def linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    backend: str,
    pattern: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    dense_above: int | None,
    activation: str = "none",
) -> Tensor:
    """The operator: y [..., out] for x [..., in]; ModelError for an x, a bias or an activation of another kind."""
    facts = (backend, pattern, out_features, in_features, dtype, dense_above, activation)
    y: Tensor = torch.ops.sparsecomp.linear(x, weight, bias, *facts)
    return y


def to_dense(
    weight: list[Tensor], backend: str, pattern: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The operator: the dense weight [out, in] of the tensors of a kernel."""
    dense: Tensor = torch.ops.sparsecomp.to_dense(weight, backend, pattern, out_features, in_features, dtype)
    return dense


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, has one of them in hand.

    Neither knows a rule of the operators. Torch promises that what a transform wraps has no memory, while its type is
    plain, and that a dual number has a tangent.
    """
    return any(each is not None and (_wrapped(each) or _dual(each)) for each in tensors)


def _wrapped(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def _dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """The product for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kernel: Kernel, dense_above: int | None) -> Tensor:
        """y [batch, out]."""
        ctx.kernel = kernel
        return apply(kernel, x, bias, dense_above)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x [batch, in], by a dense temporary, and of the bias."""
        x_grad = grad @ backends()[ctx.kernel.backend].dense(ctx.kernel) if ctx.needs_input_grad[0] else None
        return x_grad, grad.sum(0) if ctx.needs_input_grad[1] else None, None, None


def differentiable(
    x: Tensor, bias: Tensor | None, kernel: Kernel, dense_above: int | None, activation: str = "none"
) -> Tensor:
    """``apply`` with gradients of x and bias, for eager calls outside torch.func; the operator's are 50 us slower.

    The activation is torch's own, on a product that is kept for the gradient.
    """
    y: Tensor = _Product.apply(x, bias, kernel, dense_above)  # type: ignore[no-untyped-call]
    return activate(y, activation)


def _adopt(weight: list[Tensor], backend: str, pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> Kernel:
    kept, numbers = _weights(pattern)
    # a program exported when the name was the pattern's alone; an fp8 layout has scales too, and stands for floats
    if not numbers.has_scales and len(weight) == len(INT8.part_names) and weight[0].dtype != torch.float8_e4m3fn:
        numbers = INT8
    return backends()[backend].adopt(tuple(weight), kept, shape, dtype, numbers)


def _require_one_device(x: Tensor, weight: list[Tensor], bias: Tensor | None) -> None:
    for name, other in (("weight", weight[0]), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ModelError(
                f"sparsecomp::linear got x on {x.device} and a {name} on {other.device}; both must be on one device, "
                f"so move one of them with .to()"
            )


def _linear(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    backend: str,
    pattern: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    dense_above: int | None,
    activation: str,
) -> Tensor:
    if x.dtype != dtype or x.shape[-1] != in_features:
        raise ModelError(
            f"sparsecomp::linear got x {tuple(x.shape)} of {x.dtype}; this weight takes [..., {in_features}] of {dtype}"
        )
    require_activation(activation)
    _require_one_device(x, weight, bias)
    kernel = _adopt(weight, backend, pattern, (out_features, in_features), dtype)
    if bias is not None:
        if bias.dtype != dtype or tuple(bias.shape) != (out_features,):
            raise ModelError(
                f"sparsecomp::linear got a bias {tuple(bias.shape)} of {bias.dtype}; "
                f"this weight takes ({out_features},) of {dtype}"
            )
        bias = bias.contiguous()
    # torch's linear inside a backend would otherwise round to the autocast dtype once more
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext():
        return apply(kernel, rows(x), bias, dense_above, activation).view(*x.shape[:-1], out_features)


def _linear_fake(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    backend: str,
    pattern: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    dense_above: int | None,
    activation: str,
) -> Tensor:
    _require_one_device(x, weight, bias)  # one tensor on the meta device among others leads here as well
    return x.new_empty((*x.shape[:-1], out_features))


def _to_dense(
    weight: list[Tensor], backend: str, pattern: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return backends()[backend].dense(_adopt(weight, backend, pattern, (out_features, in_features), dtype))


def _to_dense_fake(
    weight: list[Tensor], backend: str, pattern: str, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty((out_features, in_features), dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *facts = inputs
    if any(tensor.requires_grad for tensor in weight):
        raise ModelError(
            "packed weights have no gradient; train layer.to_linear() and pack it again with SparseLinear.from_linear()"
        )
    ctx.facts, (ctx.dense_above, ctx.activation) = facts[:5], facts[5:]
    ctx.bias = bias is not None
    ctx.save_for_backward(*weight, *((x, bias) if ctx.activation != "none" else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = list(ctx.saved_tensors)
    if ctx.activation != "none":
        # the fused operator never had the product in memory: it is computed again
        *weight, x, bias = weight
        before = torch.ops.sparsecomp.linear(x, weight, bias, *ctx.facts, ctx.dense_above, "none")
        grad = activation_gradient(grad, before, ctx.activation)
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = grad @ torch.ops.sparsecomp.to_dense(weight, *ctx.facts)
    if ctx.bias and ctx.needs_input_grad[2]:
        bias_grad = grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
    return x_grad, [None] * len(weight), bias_grad, None, None, None, None, None, None, None


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("to_dense", _to_dense, "CompositeExplicitAutograd")
torch.library.register_fake("sparsecomp::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("sparsecomp::to_dense", _to_dense_fake, lib=_LIBRARY)
torch.library.register_autograd("sparsecomp::linear", _backward, setup_context=_remember, lib=_LIBRARY)
