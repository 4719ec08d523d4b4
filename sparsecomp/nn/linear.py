"""SparseLinear: a drop-in for nn.Linear that holds its weight once, as the layout of one kernel.

Takes a PackedWeight and gives a module; the canonical form comes back exactly when it is saved, copied or moved.
Knows nothing of plans, masks or models.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn import functional

from sparsecomp.activations import activate, require_activation
from sparsecomp.backends import registry
from sparsecomp.backends.base import Weight
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError
from sparsecomp.modules.carry import carry_over, why_not_carried
from sparsecomp.modules.readonly import PackedParameter
from sparsecomp.nn import operators
from sparsecomp.nn.eager.calls import eager_product, why_dispatched
from sparsecomp.nn.packed_module import PackedModule
from sparsecomp.packing.format import PackedWeight, pack, require_packable
from sparsecomp.packing.move import zero_weight
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import Pattern, parse
from sparsecomp.patterns.numbers import FLOAT_DTYPES, INT8, parse_weights

if TYPE_CHECKING:
    from sparsecomp.backends.explain import Explanation


class SparseLinear(PackedModule):
    """y = activation(x W^T + b) with W [out_features, in_features] packed in ``pattern``.

    x is [..., in_features] of the layer's dtype, y [..., out_features]. Under autocast x may be fp32, fp16 or bf16 and
    y has the dtype nn.Linear's would have; the weight stays in its own dtype, so a float32 layer computes in float32
    there and rounds its result. Gradients reach x and the bias; the weight has none.

    A new layer is all zeros, ready for ``load_state_dict``. ``state_dict`` holds ``values`` and ``metadata`` of the
    canonical format, and ``bias``. The pattern and shape are facts of the constructor. ``dense_above`` is the batch
    from which a dense product of the unpacked weight was measured to be faster on this machine, or None; it is not
    part of the state_dict. ``backend`` pins one by name; a layer made by ``compile`` prefers the fastest of its plan.

    ``activation`` is "none", "relu", "gelu" (exact), "gelu_tanh" or "silu", as torch.nn.functional defines them; the
    CPU kernels apply it before they round and store y. Like the pattern it is no part of the weights; it can be set.

    With ``quantize="int8"``, or the pattern "2:4+int8", the weight is int8 with one fp32 scale for each row
    (``sparsecomp.quantize``), ``scales`` in the state_dict, while x, y and the bias stay in ``dtype``; ``to`` then
    changes the latter only. ``quantized=True`` says the same. With ``activations="int8"``, or "2:4+int8@a8", the
    product rounds each row of x to 255 steps between its extremes as well and sums integers; a row of x that holds NaN
    or Inf gives a row of NaN. The gradient of x is that of the product without the rounding of x (straight through).
    Where the dense weight is multiplied, by the backend "dense" or from ``dense_above`` rows on, x is not rounded.

    Raises ModelError for a weight that no backend runs and PatternError for a pattern that cannot be packed.
    """

    def __init__(  # noqa: D107  (the class says it)
        self,
        in_features: int,
        out_features: int,
        pattern: str | Pattern = "2:4",
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        activation: str = "none",
        quantized: bool = False,
        quantize: str | None = None,
        activations: str | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        place = torch.device(device) if device is not None else torch.get_default_device()
        kept, numbers = parse_weights(pattern, _asked(quantized, quantize), activations)
        packed = zero_weight(kept, (out_features, in_features), place, dtype, numbers)
        parameter = nn.Parameter(torch.zeros(out_features, device=place, dtype=dtype)) if bias else None
        self._build(packed, Choice.asked(packed.pattern, packed.numbers, backend), parameter, activation)

    def _build(self, weight: Weight, choice: Choice, bias: nn.Parameter | None, activation: str) -> None:
        self.out_features, self.in_features = weight.shape
        self.choice = choice
        self._activation = require_activation(activation)
        self._layout: tuple[str, ...] = ()
        self.register_parameter("bias", bias)
        self._hold(self._prepared(weight))
        self._follow(choice)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        activation: str = "none",
    ) -> SparseLinear:
        """A layer of that weight and bias [out]; the bias is copied to the weight's device and dtype.

        ``backend`` pins one backend by name; otherwise the first one that runs the weight on its device is taken.
        """
        return cls.of_choice(packed, Choice.asked(packed.pattern, packed.numbers, backend), bias, activation)

    @classmethod
    def of_choice(
        cls, weight: Weight, choice: Choice, bias: Tensor | None = None, activation: str = "none"
    ) -> SparseLinear:
        """A layer that follows ``choice``, of a weight [out, in], packed or dense, in its pattern and its numbers."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        parameter = None
        if bias is not None:
            if tuple(bias.shape) != (weight.shape[0],):
                raise ModelError(f"bias has shape {tuple(bias.shape)}; this weight takes ({weight.shape[0]},)")
            with torch.inference_mode(False):  # a bias made under it could never get a gradient
                copy = bias.detach().to(weight.device, weight.dtype, copy=True).contiguous()
                parameter = nn.Parameter(copy, requires_grad=bias.requires_grad or not isinstance(bias, nn.Parameter))
        layer._build(weight, choice, parameter, activation)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        pattern: str | Pattern = "2:4",
        method: str | None = None,
        gram: Tensor | None = None,
        *,
        backend: str | None = None,
        activation: str = "none",
        quantized: bool = False,
        preferred: str | None = None,
        quantize: str | None = None,
        activations: str | None = None,
    ) -> SparseLinear:
        """A packed copy of ``linear``, which stays as it is, with copies of its hooks, attributes and buffers.

        Without ``method`` the weight must fit ``pattern`` already (PatternError names the first group that does not).
        With one it is pruned first; ``gram`` [in, in] is X^T X of the layer's inputs for methods that need it.
        ``activation`` is what the layer applies after the product; the model must then no longer apply it.
        ``quantize="int8"`` rounds the packed weight to int8 with row scales, ``activations="int8"`` beside it the rows
        of x as well; the pattern "2:4+int8@a8" says both, ``quantized=True`` the first. ``backend`` pins one backend by
        name, also when the layer is moved; ``preferred`` is taken wherever it runs the weight, and others elsewhere.
        Raises ModelError for another module, whose weight may be [in, out], for one that does more than nn.Linear, and
        for float64, which no sparse kernel computes in.
        """
        weights = parse_weights(pattern, _asked(quantized, quantize), activations)
        choice = Choice.asked(*weights, backend, preferred)
        layer = cls.following(linear, choice, method, gram, activation)
        carry_over(linear, layer, cls.reserved_names(), shared=False)
        return layer

    @classmethod
    def following(
        cls,
        linear: nn.Linear,
        choice: Choice,
        method: str | None = None,
        gram: Tensor | None = None,
        activation: str = "none",
    ) -> SparseLinear:
        """As ``from_linear``, by what was decided: pattern, numbers, backend and when the product is dense.

        Nothing but weight and bias is taken over; who swaps layers carries the rest over.
        """
        check_linear(linear, choice.pattern)
        weight = linear.weight.detach()
        if method is not None:
            from sparsecomp.methods.weight import prune_weight

            weight = prune_weight(weight, choice.pattern, method=method, gram=gram).weight
        # a backend may make its layout of the dense weight in one pass
        source = in_numbers(pack(weight, choice.pattern), choice.numbers) if choice.numbers.has_scales else weight
        return cls.of_choice(source, choice, linear.bias, activation).train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as nn.Linear, zeros in place, exactly (int8 times scale rounded); the way back for training.

        Hooks, attributes and buffers that the layer has beside its weight are copied.
        Raises ModelError for a layer with an activation, which nn.Linear cannot hold.
        """
        if self._activation != "none":
            raise ModelError(
                f"this layer applies {self._activation}, which nn.Linear cannot; apply it after the layer and set "
                f'layer.activation = "none" first'
            )
        if type(self).forward is not SparseLinear.forward:
            raise ModelError(f"{type(self).__name__} has a forward of its own, which nn.Linear would not repeat")
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        with torch.inference_mode(False):
            linear.weight = nn.Parameter(registry.backends()[self.kernel.backend].dense(self.kernel))
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        carry_over(self, linear, dir(nn.Linear), shared=False)
        return linear.train(self.training)

    @classmethod
    def reserved_names(cls) -> frozenset[str]:
        """Names that a layer put in the place of another cannot take over from it, as they mean something here."""
        layout = (f"layout_{index}" for index in range(8))
        return frozenset([*dir(cls), *cls._annotated(), *layout]) - set(vars(nn.Module()))

    @property
    def own_names(self) -> frozenset[str]:
        """Attributes and buffers that are the packed weight's, and no user's."""
        return frozenset({*self._annotated(), *self._layout, "__module__"})

    @classmethod
    def _annotated(cls) -> set[str]:
        bases = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
        return {name for base in bases for name in vars(base).get("__annotations__", ())}

    @property
    def activation(self) -> str:
        """What is applied to x W^T + b; setting an unknown name raises ModelError."""
        return self._activation

    @activation.setter
    def activation(self, name: str) -> None:
        self._activation = require_activation(name)
        self._eager = eager_product(self.kernel, self._activation)

    # --- the product ------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """y [..., out_features] for input [..., in_features]; any number of dimensions, any strides, no row at all.

        A weight that ``torch.func.functional_call`` puts in the place of the packed one is multiplied dense.
        A nested input, and one of another layout than ``torch.strided``, is multiplied by the unpacked weight.
        """
        if not is_compiling():
            parameters = self._parameters
            weight: Tensor | None = parameters.get("weight")
            if weight is not self._packed_weight and weight is not None:
                return activate(functional.linear(input, weight, self.bias), self._activation)
            # self.bias costs a failed lookup first; it is asked only where a parametrization took the parameter away
            bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
            y = self._eager(input, bias, self.choice.dense_above)
            if y is not None:
                return y
        elif not torch.compiler.is_exporting():
            given: Tensor | None = self._parameters.get("weight")
            if given is not None and type(given) is not PackedParameter:
                return activate(functional.linear(input, given, self.bias), self._activation)
        return self._dispatched(input)

    def _dispatched(self, x: Tensor) -> Tensor:
        """The product through the dispatcher: autograd, compilers, modes and subclasses see one operator."""
        if torch.onnx.is_in_onnx_export():  # sparsecomp.onnx has a forward of its own there
            reason = (
                "torch.onnx.export has no form of a packed layer; use sparsecomp.export_onnx, or call it within "
                '"with sparsecomp.onnx.exportable(model, "dense"):"'
            )
            # torch swallows the error, tries other ways of tracing, and tells of the last
            warnings.warn(reason, stacklevel=2)
            raise ModelError(reason)
        if not isinstance(x, Tensor):
            if isinstance(x, fx.Proxy):
                raise ModelError(
                    "torch.fx cannot look into a packed layer, which is one operator; trace the model around it, where "
                    "the layer is a call_module node"
                )
            raise ModelError(f"input is a {type(x).__name__}; this layer takes a tensor [..., {self.in_features}]")
        if x.layout is not torch.strided or x.is_nested:  # the kernels read rows in memory
            return self._by_torch(x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ModelError(
                f"input has shape {tuple(x.shape)}; this layer takes [..., {self.in_features}], "
                f"so reshape it or check the layer before"
            )
        device, dtype, place = x.device.type, self.kernel.dtype, self._tensors()[0].device
        if x.device != place:  # a kernel on cuda:0 would follow a pointer into the memory of cuda:1
            raise ModelError(f"input is on {x.device} and the layer on {place}; move one of them with .to()")
        # autocast leaves float64 alone
        autocast = device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
        target = torch.get_autocast_dtype(device) if autocast else None
        if not is_compiling() and operators.transformed(x, self.bias):
            # no rule of the operator is known to torch.func and dual numbers; those of torch's linear are
            return self._by_torch(x)
        if target is not None and x.is_floating_point():
            if dtype not in (torch.float32, target):
                # neither 16-bit format holds the other, so the weight is cast as nn.Linear would cast it
                return self._by_torch(x)
            x = x.to(dtype)
        if x.dtype != dtype:
            raise ModelError(
                f"input has dtype {x.dtype}; this layer computes in {dtype}, so convert one with .to() or use autocast"
            )
        y = operators.linear(x, self._tensors(), self.bias, *self._facts(), self.dense_above, self._activation)
        return y if target is None else y.to(target)

    def _by_torch(self, x: Tensor) -> Tensor:
        dense = operators.to_dense(self._tensors(), *self._facts())
        return activate(functional.linear(x, dense, self.bias), self._activation)

    # --- the report -------------------------------------------------------------------------------------------------

    def explain(self, batch: int = 1) -> Explanation:
        """Which kernel runs a batch of that many rows, why, its bound, and what was rejected; printable."""
        from sparsecomp.backends.explain import explain_kernel

        found, reason = explain_kernel(self.kernel, batch, self.choice, self._activation), why_dispatched()
        return found if reason is None else replace(found, notes=(*found.notes, reason))

    def extra_repr(self) -> str:
        """Sizes, pattern, dtype, kernel, and bytes beside those of the dense weight."""
        dense = self.out_features * self.in_features * self.dtype.itemsize
        activation = "" if self._activation == "none" else f"activation={self._activation}, "
        weights = f"weights={self.numbers}, " if self.numbers.has_scales else ""
        kept = self._packed_weight.nbytes
        copy = f", and a dense copy of {kept}, for its values are read" if kept else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, {activation}dtype={self.dtype}, {weights}kernel={self.kernel.backend}, "
            f"bytes={self.kernel.nbytes} of {dense} dense{copy}"
        )


def _asked(quantized: bool, quantize: str | None) -> str | None:
    return str(INT8) if quantized and quantize is None else quantize


def check_linear(linear: nn.Linear, pattern: str | Pattern) -> None:
    """Raises ModelError or PatternError for a layer that ``from_linear`` refuses whatever its weights are."""
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"from_linear takes an nn.Linear, got {type(linear).__name__}; sparsecomp.compile knows which other "
            f"layers of a model can be packed"
        )
    if reason := why_not_carried(linear, nn.Linear):
        raise ModelError(f"from_linear cannot pack this layer: {reason}")
    if linear.weight.dtype == torch.float64:
        allowed = ", ".join(map(str, FLOAT_DTYPES))
        raise ModelError(f"the weight is torch.float64, which has no sparse kernel; convert it to one of {allowed}")
    require_packable(linear.weight, parse(pattern))
