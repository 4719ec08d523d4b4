"""A model with SparseLinear layers -> one ONNX file, packed or dense, and a report of what was written.

Knows SparseLinear and the packed format. Must not know kernels or backends.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsecomp.activations import activate
from sparsecomp.display import table
from sparsecomp.errors import ModelError
from sparsecomp.files import require_folder
from sparsecomp.layers import replace_layer, require_module
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.function import DOMAIN, MIN_OPSET, OPERATOR_VERSION, OPERATORS, nm_linear_function
from sparsecomp.pack import PackedWeight
from sparsecomp.patterns import NM, row_nm

DEFAULT_OPSET = 20
PROTOBUF_LIMIT = 2**31 - 2**24  # one protobuf message holds less than 2 GiB; the graph itself needs room as well
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


@dataclass(frozen=True)
class ExportReport:
    """What ``export_onnx`` wrote; ``nbytes`` counts the file and its external data."""

    path: Path
    opset: int
    nbytes: int
    external_data: Path | None
    layers: tuple[ExportedLayer, ...]

    def __str__(self) -> str:
        """One line on the file and a table of its sparse layers."""
        rows = [
            (w.name, w.pattern, f"{w.shape[0]}x{w.shape[1]}", w.form, w.dense_nbytes, w.nbytes, w.note)
            for w in self.layers
        ]
        columns = ("layer", "pattern", ">shape", "written", ">dense bytes", ">bytes", "note")
        external = f" and {self.external_data.name}" if self.external_data else ""
        return table(columns, rows, title=f"{self.path}{external}: {self.nbytes} bytes, opset {self.opset}")


class _PackedNode(nn.Module):
    """Stands in for a SparseLinear while a model is exported: one node of our domain on canonical tensors."""

    values: Tensor
    metadata: Tensor
    bias: Tensor

    def __init__(self, packed: PackedWeight, bias: Tensor | None, activation: str, nm: NM) -> None:
        super().__init__()
        self.operator = OPERATORS[activation]
        self.out_features, self.in_features = packed.shape
        self.attributes: dict[str, Any] = {
            "n": nm.n,
            "m": nm.m,
            "mask_rows": nm.mask_rows,
            "index_bits": nm.index_bits,
            "in_features": self.in_features,
            "weight_type": _ONNX_TYPES[packed.dtype],
        }
        self.register_buffer("values", packed.values)
        self.register_buffer("metadata", packed.metadata)
        # a function body has no optional inputs worth the name, so a layer without bias adds zeros
        self.register_buffer("bias", packed.values.new_zeros(self.out_features) if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.operator}",
            (x, self.values, self.metadata, self.bias),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=OPERATOR_VERSION,
        )


class _DenseNode(nn.Module):
    """Stands in for a SparseLinear while a model is exported: a MatMul with a plain weight [in, out], zeros in place.

    nn.Linear would be written with a Transpose that an optimiser folds into a weight without its name, or not at all.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        product = torch.matmul(x, self.weight)
        return activate(product if self.bias is None else product + self.bias, self.activation)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    form: Form = "packed",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``model``, called as ``model(*args, **kwargs)``, to an ONNX file; the model is left as it was.

    ``form="packed"``: N:M layers stay compressed, as nodes ``sparsecomp::NMLinear`` (``NMLinearRelu`` and so on with an
    activation) with a function body of standard operators in the same file; block layers, which have no such node, are
    written dense. ``form="dense"``: plain MatMul weights [in, out] with the zeros in place, as TensorRT wants them.

    ``dynamic_batch`` makes dimension 0 of every tensor input an axis of any size, "batch". Other axes (a
    sequence, say) are named by ``dynamic_shapes``, as torch.onnx.export takes it, which then says everything.
    An example batch of 2 or more is the safest, as torch.export may take size 1 for a constant.

    Raises ModelError for an unknown form or opset, and where torch cannot export the model;
    FormatError for a folder that is not there; BackendError if the onnx extra is missing.
    """
    require_module(model)
    path = Path(path)
    require_folder(path)
    if form not in ("packed", "dense"):
        raise ModelError(f'form="{form}" is not known; use "packed" or "dense"')
    opset = DEFAULT_OPSET if opset is None else opset
    if opset < MIN_OPSET:
        raise ModelError(f"opset {opset} is too old for the function body; use {MIN_OPSET} or newer")
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package)
    if isinstance(args, Tensor):
        args = (args,)
    if dynamic_shapes is None and dynamic_batch:
        dynamic_shapes = _batch_axes(args, kwargs)
    with _swapped(model, form) as (exportable, layers):
        program = _torch_export(
            exportable,
            args,
            kwargs=dict(kwargs) if kwargs else None,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
        )
        ir_model = program.model
        _attach_functions(ir_model)
        external = _write(ir_model, path)
    nbytes = path.stat().st_size + (external.stat().st_size if external else 0)
    return ExportReport(path, opset, nbytes, external, tuple(layers))


def _batch_axes(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """``dynamic_shapes`` with dimension 0 of every tensor dynamic: positional, or by name where there are kwargs."""
    from torch.utils import _pytree as pytree

    batch = torch.export.Dim("batch")

    def axes(value: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(value, Tensor) and value.ndim > 0 else None

    positional = tuple(pytree.tree_map(axes, arg) for arg in args)
    if not kwargs:
        return positional
    if args:
        raise ModelError(
            "dynamic_batch cannot name the axes of positional and keyword inputs together; pass all inputs "
            "in kwargs, or name the axes with dynamic_shapes"
        )
    return {name: pytree.tree_map(axes, value) for name, value in kwargs.items()}


@contextmanager
def _swapped(model: nn.Module, form: Form) -> Iterator[tuple[nn.Module, list[ExportedLayer]]]:
    """The model in eval mode with every SparseLinear replaced for export; it is restored whatever happens."""
    training = {module: module.training for module in model.modules()}
    swapped: list[tuple[str, nn.Module]] = []
    layers: list[ExportedLayer] = []
    exportable = model
    try:
        for name, module in list(model.named_modules()):
            if not isinstance(module, SparseLinear):
                continue
            stand_in, layer = _stand_in(name, module, form)
            layers.append(layer)
            if name == "":
                exportable = stand_in
            else:
                replace_layer(model, name, stand_in)
                swapped.append((name, module))
        exportable.eval()
        model.eval()
        yield exportable, layers
    finally:
        for name, module in swapped:
            replace_layer(model, name, module)
        for module, mode in training.items():
            module.training = mode


def _stand_in(name: str, layer: SparseLinear, form: Form) -> tuple[nn.Module, ExportedLayer]:
    packed = layer.packed()
    nm = row_nm(packed.pattern)
    note = ""
    bias: Tensor | None = layer.bias
    if form == "packed":
        if nm is None:
            note = f"{packed.pattern} has no packed node"
        elif packed.scales is not None:
            note = "int8 weights have no packed node"
        elif packed.dtype not in _ONNX_TYPES:
            note = f"{packed.dtype} has no packed node"
        elif 0 in packed.shape:
            note = "the weight is empty"
    written: Form = "packed" if form == "packed" and not note else "dense"
    nbytes = packed.nbytes if written == "packed" else packed.dense_nbytes
    record = ExportedLayer(name, str(packed.pattern), packed.shape, written, nbytes, packed.dense_nbytes, note)
    if written == "packed" and nm is not None:
        return _PackedNode(packed, bias, layer.activation, nm), record
    return _DenseNode(packed.unpack(), bias, layer.activation), record


def _torch_export(model: nn.Module, args: tuple[Any, ...], **options: Any) -> Any:
    # the one warns of every torchvision operator that is not installed, the other of constants it does not fold
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message="# The axis name")  # inputs share an axis on purpose
            return torch.onnx.export(model, args, dynamo=True, verbose=False, **options)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:500]
        raise ModelError(
            f"torch cannot export this model to ONNX ({reason}); if an axis was specialised, trace with a batch "
            f"of 2 or more, or name the axes with dynamic_shapes, or pass dynamic_batch=False"
        ) from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _attach_functions(model: Any) -> None:
    ir = require("onnx_ir")
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for activation, operator in OPERATORS.items():
        if operator in used:
            function = ir.serde.deserialize_function(nm_linear_function(model.opset_imports[""], activation))
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = OPERATOR_VERSION


def _write(model: Any, path: Path) -> Path | None:
    """Write the model; weights beyond the limit of one protobuf go to PATH.data, which is returned."""
    ir = require("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        if size <= PROTOBUF_LIMIT:
            ir.save(model, temporary)
            temporary.replace(path)
            return None
        data = path.with_name(f"{path.name}.data")
        warnings.warn(
            f"{path.name}: {size} bytes of weights exceed the 2 GiB of one ONNX file; they are in {data.name}, "
            "keep both together",
            stacklevel=3,
        )
        ir.save(model, temporary, external_data=data.name)
        temporary.replace(path)
        return data
    finally:
        temporary.unlink(missing_ok=True)
