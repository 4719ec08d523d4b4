"""SparseLinear: a drop-in for nn.Linear that holds its weight once, as the layout of one kernel.

Takes a PackedWeight and gives a module; the canonical form comes back exactly when it is saved, copied or moved.
Knows nothing of plans, masks or models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from sparsecomp import ops
from sparsecomp.activations import activate, require_activation
from sparsecomp.backends import registry
from sparsecomp.backends.registry import Kernel, Weight
from sparsecomp.eager import eager_product, plain_call, quick_call
from sparsecomp.errors import ModelError, SparsecompError
from sparsecomp.pack.format import PackedWeight, pack, part_names
from sparsecomp.pack.move import moved, zero_weight
from sparsecomp.pack.quantize import quantize
from sparsecomp.pack.state import STATE_VERSION, packed_of_state
from sparsecomp.patterns import Pattern, parse
from sparsecomp.readonly import NO_WEIGHT_GRADIENT, DenseCopy
from sparsecomp.watch import transformed

if TYPE_CHECKING:
    from sparsecomp.report import Explanation


Wish = tuple[str | None, str | None]  # the backend that is pinned, and the one that is preferred


class SparseLinear(nn.Module):
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

    With ``quantized`` the weight is int8 with one fp32 scale for each row (``sparsecomp.quantize``), ``scales`` in
    the state_dict, while x, y and the bias stay in ``dtype``; ``to`` then changes the latter only.

    Raises ModelError for a weight that no backend runs and PatternError for a pattern that cannot be packed.
    """

    _version = STATE_VERSION
    dense_above: int | None
    _preferred: str | None = None
    bias: nn.Parameter | None

    def __init_subclass__(cls, **named: Any) -> None:
        """A subclass with a ``__call__`` of its own costs all layers their quick call, so that it can be compiled."""
        super().__init_subclass__(**named)
        plain_call(SparseLinear, cls)

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
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        place = torch.device(device) if device is not None else torch.get_default_device()
        packed = zero_weight(parse(pattern), (out_features, in_features), place, dtype, quantized)
        parameter = nn.Parameter(torch.zeros(out_features, device=place, dtype=dtype)) if bias else None
        self._build(packed, packed.pattern, parameter, (backend, None), activation)

    def _build(self, weight: Weight, pattern: Pattern, bias: nn.Parameter | None, wish: Wish, activation: str) -> None:
        self.out_features, self.in_features = weight.shape
        self.pattern = pattern
        self._wanted, self._preferred = wish
        self._activation = require_activation(activation)
        self._layout: tuple[str, ...] = ()
        self.register_parameter("bias", bias)
        self._hold(self._prepared(weight))

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
        return cls._of(packed, packed.pattern, bias, (backend, None), activation)

    @classmethod
    def _of(cls, weight: Weight, pattern: Pattern, bias: Tensor | None, wish: Wish, activation: str) -> SparseLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        parameter = None
        if bias is not None:
            if tuple(bias.shape) != (weight.shape[0],):
                raise ModelError(f"bias has shape {tuple(bias.shape)}; this weight takes ({weight.shape[0]},)")
            copy = bias.detach().to(weight.device, weight.dtype, copy=True).contiguous()
            parameter = nn.Parameter(copy, requires_grad=bias.requires_grad or not isinstance(bias, nn.Parameter))
        layer._build(weight, pattern, parameter, wish, activation)
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
    ) -> SparseLinear:
        """A packed copy of ``linear``, which stays as it is.

        Without ``method`` the weight must fit ``pattern`` already (PatternError names the first group that does not).
        With one it is pruned first; ``gram`` [in, in] is X^T X of the layer's inputs for methods that need it.
        ``activation`` is what the layer applies after the product; the model must then no longer apply it.
        ``quantized`` rounds the packed weight to int8 with row scales. ``backend`` pins one backend by name, also when
        the layer is moved; ``preferred`` is taken wherever it runs the weight, and others elsewhere.
        Raises ModelError for another module, whose weight may be [in, out].
        """
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"from_linear takes an nn.Linear, got {type(linear).__name__}; sparsecomp.compile knows which other "
                f"layers of a model can be packed"
            )
        weight = linear.weight.detach()
        if method is not None:
            from sparsecomp.prune import prune_weight

            weight = prune_weight(weight, pattern, method=method, gram=gram).weight.to(weight.dtype)
        # on a GPU a backend may make its layout of the dense weight in one pass
        source: Weight = weight
        if quantized or not weight.is_cuda:
            source = quantize(pack(weight, pattern)) if quantized else pack(weight, pattern)
        return cls._of(source, parse(pattern), linear.bias, (backend, preferred), activation).train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as nn.Linear, zeros in place, exactly (int8 times scale rounded); the way back for training.

        Raises ModelError for a layer with an activation, which nn.Linear cannot hold.
        """
        if self._activation != "none":
            raise ModelError(
                f"this layer applies {self._activation}, which nn.Linear cannot; apply it after the layer and set "
                f'layer.activation = "none" first'
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(registry.backends()[self.kernel.backend].dense(self.kernel))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def packed(self) -> PackedWeight:
        """The canonical form of the weight, exactly; treat its tensors as read-only."""
        return registry.backends()[self.kernel.backend].restore(self.kernel)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of x and y, and of the weight unless it is quantised."""
        return self.kernel.dtype

    @property
    def quantized(self) -> bool:
        """Whether the weight is int8 with row scales."""
        return self.kernel.quantized

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.kernel.tensors[0].device

    @property
    def activation(self) -> str:
        """What is applied to x W^T + b; setting an unknown name raises ModelError."""
        return self._activation

    @activation.setter
    def activation(self, name: str) -> None:
        self._activation = require_activation(name)
        self._eager = eager_product(self.kernel, self._activation)

    @property
    def weight(self) -> Tensor:
        """A dense copy [out, in], built at every access and for reading only: training it raises ModelError."""
        if is_compiling():
            return ops.to_dense(self._tensors(), *self._facts())
        return registry.backends()[self.kernel.backend].dense(self.kernel).detach().as_subclass(DenseCopy)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new ``weight``, and a ``dense_above`` that counts no rows; ModelError says why."""
        if name == "dense_above":
            ops.require_dense_above(value)
        if name == "weight":
            raise ModelError(f"layer.weight cannot be set: {NO_WEIGHT_GRADIENT}")
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> SparseLinear:
        """Set requires_grad of the bias. The packed weight never has a gradient; to train it, train ``to_linear()``."""
        return super().requires_grad_(requires_grad)

    # --- the kernel -------------------------------------------------------------------------------------------------

    def _prepared(self, weight: Weight) -> Kernel:
        """The layout of ``weight``, packed or dense, for its device and dtype; nothing of the layer changes."""
        pattern = self.pattern if isinstance(weight, Tensor) else weight.pattern
        return registry.prepared(weight, pattern, self._wanted, self._preferred)

    def _hold(self, kernel: Kernel, shared: bool = False) -> None:
        """Make ``kernel`` the layer's only weight."""
        if shared:  # before anybody sees the kernel: its storages are replaced
            for tensor in kernel.tensors:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        for name in self._layout:
            del self._buffers[name]
        self.kernel = kernel
        self.dense_above = None
        self._layout = tuple(f"layout_{index}" for index in range(len(kernel.tensors)))
        self._name = str(kernel.pattern)
        self._eager = eager_product(kernel, self._activation)
        for name, tensor in zip(self._layout, kernel.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._layout]

    def _facts(self) -> tuple[str, str, int, int, torch.dtype]:
        return self.kernel.backend, self._name, self.out_features, self.in_features, self.kernel.dtype

    # --- the product ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] for x [..., in_features]; any number of dimensions, any strides, no row at all."""
        if not is_compiling():
            parameters = self._parameters
            # self.bias costs a failed lookup first; it is asked only where a parametrization took the parameter away
            bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
            y = self._eager(x, bias, self.dense_above)
            if y is not None:
                return y
        return self._dispatched(x)

    def _dispatched(self, x: Tensor) -> Tensor:
        """The product through the dispatcher: autograd, compilers, modes and subclasses see one operator."""
        if not isinstance(x, Tensor):
            raise ModelError(f"input is a {type(x).__name__}; this layer takes a tensor [..., {self.in_features}]")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ModelError(
                f"input has shape {tuple(x.shape)}; this layer takes [..., {self.in_features}], "
                f"so reshape it or check the layer before"
            )
        device, dtype, place = x.device.type, self.kernel.dtype, self._tensors()[0].device
        if x.device != place:  # a kernel on cuda:0 would follow a pointer into the memory of cuda:1
            raise ModelError(f"input is on {x.device} and the layer on {place}; move one of them with .to()")
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        target = torch.get_autocast_dtype(device) if autocast else None
        if not is_compiling() and transformed():
            # no rule of the operator is known to torch.func and dual numbers; those of torch's linear are
            return self._by_torch(x)
        if target is not None and x.is_floating_point() and x.dtype != torch.float64:
            if dtype not in (torch.float32, target):
                # neither 16-bit format holds the other, so the weight is cast as nn.Linear would cast it
                return self._by_torch(x)
            x = x.to(dtype)
        if x.dtype != dtype:
            raise ModelError(
                f"input has dtype {x.dtype}; this layer computes in {dtype}, so convert one with .to() or use autocast"
            )
        y = ops.linear(x, self._tensors(), self.bias, *self._facts(), self.dense_above, self._activation)
        return y if target is None else y.to(target)

    def _by_torch(self, x: Tensor) -> Tensor:
        dense = ops.to_dense(self._tensors(), *self._facts())
        return activate(functional.linear(x, dense, self.bias), self._activation)

    # --- saved, copied, moved ---------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move or convert through the canonical form; ``fn`` is asked on one element where it leads."""
        probe = fn(torch.empty(1, dtype=self.dtype, device=self.device))
        shared = probe.is_cpu and probe.is_shared()  # type: ignore[no-untyped-call]
        kernel = None
        if shared or probe.dtype != self.dtype or probe.device != self.device:
            kernel = self._prepared(moved(self.packed(), probe.device, probe.dtype))
        layout = {name: self._buffers.pop(name) for name in self._layout}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(layout)
        if kernel is not None:
            self._hold(kernel, shared)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The module with the canonical form in place of the layout."""
        state = dict(self.__dict__)
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in self._layout}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(self._layout)
        state["packed"] = self.packed()
        for name in ("kernel", "_eager", "_layout", "_name"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the layout anew for this machine."""
        state = dict(state)
        packed, dense_above = state.pop("packed"), state.pop("dense_above")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layout = ()
        self._hold(self._prepared(packed))
        self.dense_above = dense_above

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update((prefix + part, tensor) for part, tensor in self.packed().parts.items())
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # the shapes alone do not always tell two patterns apart
        notes = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if notes is not None:
            notes["pattern"] = str(self.pattern)
            notes["activation"] = self._activation

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the canonical form, checked; whatever is wrong is reported and the layer stays as it was."""
        names = [prefix + part for part in part_names(self.quantized)]
        rest = {key: value for key, value in state_dict.items() if key not in names}
        absent = [name for name in names if name not in state_dict]
        missing_keys.extend(absent)
        kernel = None
        if not absent:
            try:
                kernel = self._loaded([state_dict[name].detach() for name in names], local_metadata)
            except (SparsecompError, RuntimeError) as error:
                error_msgs.append(f'While loading "{prefix[:-1]}": {error}')
                return
        errors: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        error_msgs.extend(errors)
        if kernel is not None and not errors:
            self._hold(kernel)

    def _loaded(self, parts: list[Tensor], notes: dict[str, Any]) -> Kernel:
        shape = self.out_features, self.in_features
        packed = packed_of_state(parts, notes, self.pattern, shape, self.dtype, self._activation)
        if notes.get("assign_to_params_buffers", False):
            return self._prepared(packed)
        if self.device.type == "meta":
            warnings.warn("loading into a layer on the meta device does nothing; pass assign=True", stacklevel=4)
            return self.kernel
        return self._prepared(moved(packed, self.device, self.dtype))

    # --- the report -------------------------------------------------------------------------------------------------

    def explain(self, batch: int = 1) -> Explanation:
        """Which kernel runs a batch of that many rows, why, its bound, and what was rejected; printable."""
        from sparsecomp.report import explain_kernel

        return explain_kernel(self.kernel, batch, self.dense_above, self._wanted, self._activation, self._preferred)

    def extra_repr(self) -> str:
        """Sizes, pattern, dtype, kernel, and bytes beside those of the dense weight."""
        dense = self.out_features * self.in_features * self.dtype.itemsize
        activation = "" if self._activation == "none" else f"activation={self._activation}, "
        weights = "weights=int8, " if self.quantized else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, {activation}dtype={self.dtype}, {weights}kernel={self.kernel.backend}, "
            f"bytes={self.kernel.nbytes} of {dense} dense"
        )


quick_call(SparseLinear, "_eager", "dense_above")
