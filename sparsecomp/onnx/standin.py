"""Sparse layers as an exporter is to see them, in place, and as they were afterwards.

Takes a model and gives it back with every SparseLinear computing by one packed node or by one MatMul. The layer stays
the same object: its hooks, the forward of its class and its other attributes are traced with it. Knows SparseLinear and
the packed format. Must not know kernels or backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from sparsecomp.activations import activate
from sparsecomp.errors import ModelError
from sparsecomp.modules.carry import COMPILED_CALL
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx.function import DENSE_INTEGERS, DOMAIN, FLOATS, INTEGERS, OPERATOR_VERSION, operator
from sparsecomp.packing import PackedWeight
from sparsecomp.patterns import row_nm

_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}

Form = Literal["packed", "dense"]


@dataclass(frozen=True)
class ExportedLayer:
    """How one sparse layer was written. ``note`` says why, where it is not the form that was asked for."""

    name: str
    pattern: str
    shape: tuple[int, int]
    form: Form
    nbytes: int
    dense_nbytes: int
    note: str = ""


class _Node(SparseLinear):
    """What a SparseLinear is while it is exported. Its tensors are buffers, so that the file has them by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self._dispatched(x)

    def _dispatched(self, x: Tensor) -> Tensor:
        # also reached by a forward that was bound before the export, which a wrapper may have kept
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ModelError(
                f"input has shape {tuple(x.shape)}; this layer takes [..., {self.in_features}], "
                f"so reshape it or check the layer before"
            )
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != self.dtype and not autocast:
            raise ModelError(
                f"input has dtype {x.dtype}; this layer computes in {self.dtype}, so convert one with .to() "
                f"or use autocast"
            )
        if not autocast:
            return self._product(x)
        # as the layer itself: the weight's dtype inside, autocast's outside
        target = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x.to(self.dtype)).to(target)

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    # the canonical parts are plain buffers here
    _save_to_state_dict = nn.Module._save_to_state_dict


class _PackedNode(_Node):
    """One node of our domain on canonical tensors."""

    def _product(self, x: Tensor) -> Tensor:
        nm = row_nm(self.pattern)
        assert nm is not None
        attributes: dict[str, Any] = {
            "m": nm.m,
            "in_features": self.in_features,
            "weight_type": _ONNX_TYPES[self.dtype],
        }
        if "metadata" in self._buffers:
            attributes |= {"n": nm.n, "mask_rows": nm.mask_rows, "index_bits": nm.index_bits}
        # a function body has no optional inputs worth the name, so a layer without bias adds zeros
        bias = self._buffers["no_bias"] if self.bias is None else self.bias
        kind = FLOATS if "scales" not in self._buffers else INTEGERS if "metadata" in self._buffers else DENSE_INTEGERS
        parts = (self._buffers[name] for name in ("values", "metadata", "scales") if name in self._buffers)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{operator(kind, self.activation)}",
            (x, *parts, bias),
            attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=OPERATOR_VERSION,
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in] as a constant, for models that read it while they are traced."""
        with _disable_current_modes():
            return self.packed().unpack()


class _DenseNode(_Node):
    """A MatMul with a plain weight [in, out], zeros in place.

    nn.Linear would be written with a Transpose that an optimiser folds into a weight without its name, or not at all.
    """

    def _product(self, x: Tensor) -> Tensor:
        stored = self._buffers["weight"]
        assert stored is not None
        product = torch.matmul(x, stored)
        return activate(product if self.bias is None else product + self.bias, self.activation)

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], a view of what the file holds."""
        stored = self._buffers["weight"]
        assert stored is not None
        return stored.t()


@contextmanager
def exportable(model: nn.Module, form: Form) -> Iterator[list[ExportedLayer]]:
    """The model in eval mode with every SparseLinear written in ``form``; it is restored whatever happens.

    Within it any exporter of torch can take the model: with "dense" it meets plain products only, with "packed" nodes
    that ``export_onnx`` alone gives a body. Gives how each layer is written. Raises ModelError for an unknown form.
    """
    if form not in ("packed", "dense"):
        raise ModelError(f'form="{form}" is not known; use "packed" or "dense"')
    training = {module: module.training for module in model.modules()}
    compiled = [(module, call) for module in model.modules() if (call := vars(module).get(COMPILED_CALL))]
    changed: list[tuple[SparseLinear, type[SparseLinear], dict[str, Any]]] = []
    layers: list[ExportedLayer] = []
    try:
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                node, buffers, record = _written(name, module, form)
                kind = type(module)
                changed.append((module, kind, dict(vars(module))))
                kernel = {id(tensor) for tensor in module.kernel.tensors}
                kept = {key: value for key, value in module._buffers.items() if id(value) not in kernel}
                own = {key: value for key, value in module._parameters.items() if key != "weight"}
                vars(module).update(_parameters=own, _buffers=kept | buffers, _non_persistent_buffers_set=set())
                _become(module, node if kind is SparseLinear else type(kind.__name__, (kind, node), {}))
                layers.append(record)
        for each, _ in compiled:
            vars(each)[COMPILED_CALL] = None
        model.eval()
        yield layers
    finally:
        for module, kind, attributes in changed:
            vars(module).clear()
            vars(module).update(attributes)
            _become(module, kind)
        for each, mode in training.items():
            each.training = mode
        for each, call in compiled:
            vars(each)[COMPILED_CALL] = call


def _become(module: nn.Module, kind: type) -> None:
    # past nn.Module.__setattr__, which subclasses change
    object.__setattr__(module, "__class__", kind)


def _written(name: str, layer: SparseLinear, form: Form) -> tuple[type[_Node], dict[str, Tensor], ExportedLayer]:
    packed = layer.packed()
    note = _why_dense(packed) if form == "packed" else ""
    written: Form = "packed" if form == "packed" and not note else "dense"
    nbytes = packed.nbytes if written == "packed" else packed.dense_nbytes
    record = ExportedLayer(name, str(packed.pattern), packed.shape, written, nbytes, packed.dense_nbytes, note)
    if written == "dense":
        return _DenseNode, {"weight": packed.unpack().t().contiguous()}, record
    buffers = {name: part for name, part in packed.parts.items() if part.numel()}  # of dense groups without positions
    if layer.bias is None:
        buffers["no_bias"] = torch.zeros(packed.shape[0], dtype=packed.dtype, device=packed.device)
    return _PackedNode, buffers, record


def _why_dense(packed: PackedWeight) -> str:
    """Why this weight has no packed node, or nothing."""
    if row_nm(packed.pattern) is None:
        return f"{packed.pattern} has no packed node"
    if packed.numbers.has_scales and packed.numbers.activation_bits is None:
        return f"{packed.numbers} weights have no packed node"
    if packed.dtype not in _ONNX_TYPES:
        return f"{packed.dtype} has no packed node"
    return "the weight is empty" if 0 in packed.shape else ""
