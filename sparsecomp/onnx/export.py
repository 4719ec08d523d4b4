"""A model with SparseLinear layers -> one ONNX file, packed or dense, and a report of what was written.

Knows SparseLinear and the packed format. Must not know kernels or backends.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsecomp.errors import BackendError, FormatError, ModelError
from sparsecomp.models.layers import require_module
from sparsecomp.onnx import session
from sparsecomp.onnx.capture import FIXED_AXIS, torch_export, without_caches
from sparsecomp.onnx.extra import require
from sparsecomp.onnx.function import DOMAIN, MIN_OPSET, OPERATOR_VERSION, OPERATORS, linear_function
from sparsecomp.onnx.standin import ExportedLayer, Form, exportable
from sparsecomp.reporting.terminal import table, wrap
from sparsecomp.reporting.writing import require_folder, whole_file

DEFAULT_OPSET = 20
PROTOBUF_LIMIT = 2**31 - 2**24  # one protobuf message holds less than 2 GiB; the graph itself needs room as well
_BFLOAT16 = 16
_STOCK_NOTE = (
    "in bfloat16 this file runs on a CPU with sparsecomp.onnx_session, and not in ONNX Runtime as it comes, which has "
    "no kernel for it"
)
# torch.onnx.export's names -> what says the same here
_TORCH_NAMES = {
    "f": "path",
    "opset_version": "opset",
    "dynamic_axes": "dynamic_shapes",
    "dynamo": "",
    "verbose": "",
    "export_params": "",
    "training": "",
    "do_constant_folding": "",
    "optimize": "",
    "external_data": "",
    "report": "",
}


@dataclass(frozen=True)
class ExportReport:
    """What ``export_onnx`` wrote; ``nbytes`` counts the file and its external data.

    ``notes`` are sentences on what differs from the model as it runs in torch, and on runtimes that refuse the file.
    """

    path: Path
    opset: int
    nbytes: int
    external_data: Path | None
    layers: tuple[ExportedLayer, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line on the file, a table of its sparse layers, and the notes."""
        rows = [
            (w.name, w.pattern, f"{w.shape[0]}x{w.shape[1]}", w.form, w.dense_nbytes, w.nbytes, w.note)
            for w in self.layers
        ]
        columns = ("layer", "pattern", ">shape", "written", ">dense bytes", ">bytes", "note")
        external = f" and {self.external_data.name}" if self.external_data else ""
        shown = table(columns, rows, title=f"{self.path}{external}: {self.nbytes} bytes, opset {self.opset}")
        return "\n".join([shown, *(f"\n{wrap(note, indent='')}" for note in self.notes)])


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
    **unknown: Any,
) -> ExportReport:
    """Write ``model``, called as ``model(*args, **kwargs)``, to an ONNX file; the model is left as it was.

    ``form="packed"``: N:M layers stay compressed, as nodes ``sparsecomp::NMLinear`` (``NMLinearRelu`` and so on with an
    activation) with a function body of standard operators in the same file; those of "int8@a8" as ``NMLinearInt8`` and
    ``LinearInt8``, which round x as the layer does. Block layers and int8 weights alone, which have no such node, are
    written dense. ``form="dense"``: plain MatMul weights [in, out] with the zeros in place, as TensorRT wants them.

    ``dynamic_batch`` makes dimension 0 of every tensor input an axis of any size, "batch". Other axes (a
    sequence, say) are named by ``dynamic_shapes``, as torch.onnx.export takes it, which then says everything.
    An example batch of 2 or more is the safest, as torch.export may take size 1 for a constant.

    Hooks of the model and its layers are exported with them. Language models are exported with ``use_cache`` off,
    unless ``kwargs`` says otherwise. A file that the installed ONNX Runtime cannot run on a CPU, as happens with
    bfloat16, is written with a RuntimeWarning. The report's ``notes`` tell both.

    Raises ModelError for an unknown form, opset or argument, and where torch cannot export the model;
    FormatError for a folder that is not there; BackendError if the onnx extra is missing.
    """
    _require_known(unknown)
    require_module(model)
    # torch.compile(model) calls what is to be exported
    model = getattr(model, "_orig_mod", model)
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
    with exportable(model, form) as layers, without_caches(model, kwargs) as notes:
        program = torch_export(
            model,
            args,
            dict(kwargs or {}),
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
        )
        ir_model = program.model
        _require_places("input_names", input_names, ir_model.graph.inputs)
        _require_places("output_names", output_names, ir_model.graph.outputs)
        _require_free_axes(ir_model, dynamic_shapes)
        _attach_functions(ir_model)
        external = _write(ir_model, path)
    if any(value.dtype == _BFLOAT16 for value in _values(ir_model)):
        refusal = _refusal(path)
        if refusal:
            warnings.warn(f"{path.name}: {refusal}", RuntimeWarning, stacklevel=2)
            notes = (*notes, refusal)
        elif not session.runs_stock(path):
            notes = (*notes, _STOCK_NOTE)
    nbytes = path.stat().st_size + (external.stat().st_size if external else 0)
    return ExportReport(path, opset, nbytes, external, tuple(layers), notes)


def _require_known(unknown: Mapping[str, Any]) -> None:
    """Name what an argument of torch.onnx.export is called here, or what is near to an unknown one."""
    for name in unknown:
        ours = _TORCH_NAMES.get(name)
        if ours:
            raise ModelError(f'export_onnx has no argument "{name}", which is torch\'s; use {ours}')
        if ours is not None:
            raise ModelError(f'export_onnx has no argument "{name}", which is torch\'s; leave it out')
        known = [each for each in inspect.signature(export_onnx).parameters if each != "unknown"]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise ModelError(f'export_onnx has no argument "{name}"; did you mean one of {", ".join(near)}?')


def _require_places(argument: str, names: Sequence[str] | None, values: Sequence[Any]) -> None:
    """Raises ModelError for names without an input or output to bear them, which torch drops without a word."""
    if names is not None and len(names) > len(values):
        raise ModelError(f"{argument} has {len(names)} names, but the model has {len(values)}; leave the others out")


def _require_free_axes(model: Any, dynamic_shapes: Any) -> None:
    """Raises ModelError for an axis that was to take any size and that torch fixed, which it does without a word."""
    asked = pytree.tree_leaves(dynamic_shapes, is_leaf=_is_axes)
    inputs = list(model.graph.inputs)
    if isinstance(dynamic_shapes, Mapping) and {value.name for value in inputs} <= set(dynamic_shapes):
        asked = [dynamic_shapes[value.name] for value in inputs]
    if len(asked) != len(inputs):  # arguments that are no tensors are no inputs of the file
        return
    for value, axes in zip(inputs, asked, strict=True):
        for axis, size in axes.items() if isinstance(axes, Mapping) else ():
            # an int and Dim.STATIC ask for a fixed axis, Dim.AUTO takes what comes
            free = size is not None and not isinstance(size, int) and _hint(size) not in ("AUTO", "STATIC")
            if free and isinstance(value.shape[axis], int):
                raise ModelError(
                    f'axis {axis} of input "{value.name}" should take any size, but the model fixes it at '
                    f"{value.shape[axis]}; {FIXED_AXIS}"
                )


def _is_axes(node: Any) -> bool:
    return node is None or (isinstance(node, Mapping) and all(isinstance(key, int) for key in node))


def _hint(size: Any) -> str:
    return str(getattr(getattr(size, "type", None), "name", ""))


def _refusal(path: Path) -> str:
    """Why the installed ONNX Runtime cannot run a file on a CPU; nothing if it can or is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library that is not built
            session.onnx_session(path, log_severity_level=4)
    except BackendError:
        return ""
    except FormatError as error:
        return str(error)
    return ""


def _batch_axes(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """``dynamic_shapes`` with dimension 0 of every tensor dynamic: positional, or by name where there are kwargs."""
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


def _attach_functions(model: Any) -> None:
    ir = require("onnx_ir")
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for operator in OPERATORS:
        if operator in used:
            function = ir.serde.deserialize_function(linear_function(model.opset_imports[""], operator))
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = OPERATOR_VERSION


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.initializers.values()
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _write(model: Any, path: Path) -> Path | None:
    """Write the model; weights beyond the limit of one protobuf go to PATH.data, which is returned."""
    ir = require("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    with whole_file(path) as partial:
        if size <= PROTOBUF_LIMIT:
            ir.save(model, partial)
            return None
        data = path.with_name(f"{path.name}.data")
        warnings.warn(
            f"{path.name}: {size} bytes of weights exceed the 2 GiB of one ONNX file; they are in {data.name}, "
            "keep both together",
            stacklevel=3,
        )
        ir.save(model, partial, external_data=data.name)
        return data
