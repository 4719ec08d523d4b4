"""``sparsecomp export``: a saved packed model -> ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecomp.cli import hub, models, pruned
from sparsecomp.reporting.terminal import label, listed, numbered, table, wrap
from sparsecomp.reporting.writing import telling

if TYPE_CHECKING:
    from sparsecomp.onnx import ExportReport

_EXAMPLE = """\
example: sparsecomp export packed.safetensors --model shop.models:build \\
             --inputs shop.data:example --form packed -o model.onnx

A Hugging Face folder needs no --inputs: token ids, a mask and token types, or pixels, of any batch and length are
used. A factory gives a tuple of arguments, a dict of keyword arguments, or the only argument; their first axis may have
any size, and the others, lengths of sequences too, have the size that it gives.
packed keeps values and metadata apart: ONNX Runtime runs it anywhere through a function body, and fast with the
operators of this package. dense writes the zeros, for OpenVINO, TensorRT and others that know no function bodies.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("export", help="write a saved packed model as ONNX", epilog=_EXAMPLE)
    parser.add_argument("file", metavar="FILE", help="a file that compile wrote")
    models.add_model(parser, "--model", weights=False)
    parser.add_argument("--inputs", metavar="FACTORY", help="module:function giving the arguments of one call")
    parser.add_argument("--form", choices=("packed", "dense"), default="packed", help="default: packed")
    models.add_output(parser, "ONNX", ".onnx")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc

    pruned.require_packed(arguments.file)
    output = Path(arguments.output)
    model = models.load_model(arguments.model, auto_class=arguments.auto_class)
    model = sc.load(arguments.file, into=model)
    call = models.load_call(arguments.inputs, arguments.model, model)
    with hub.without_cache(model), telling(output):
        names = hub.output_names(model, call) if Path(arguments.model).is_dir() else None
        report = sc.export_onnx(
            model,
            call.args,
            output,
            form=arguments.form,
            output_names=names,
            dynamic_shapes=call.axes,
            kwargs=call.kwargs or None,
        )
    print(_text(report))
    print(wrap(_inputs(output, arguments.inputs is not None), indent=""))
    return 0


def _text(report: ExportReport) -> str:
    """What was written, layers that are equal in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for each in report.layers:
        facts = (each.pattern, f"{each.shape[0]}x{each.shape[1]}", each.form, each.dense_nbytes, each.nbytes, each.note)
        rows.setdefault(tuple(map(str, facts)), []).append(each.name)
    external = f" and {report.external_data.name}" if report.external_data else ""
    title = f"{report.path}{external}: {report.nbytes / 1e6:.1f} MB, opset {report.opset}"
    if not rows:
        return f"{wrap(title)}\n{wrap('no layer is sparse: the file holds the dense model')}"
    columns = ("layer", "pattern", ">out x in", "written", ">dense bytes", ">bytes", "note")
    drawn = table(columns, [(label(names), *facts) for facts, names in rows.items()], title)
    kinds = [wrap(f"{label(names)}: {listed(names)}") for names in rows.values() if len(numbered(names)) > 1]
    return "\n".join([drawn, *kinds, *(f"\n{wrap(note, indent='')}" for note in report.notes)])


def _inputs(path: Path, factory: bool) -> str:
    """The inputs of the written file with their sizes, and which of these are fixed."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    shapes, fixed = [], False
    for each in graph.input:
        sizes = [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
        fixed |= any(isinstance(size, int) for size in sizes)
        shapes.append(f"{each.name} [{', '.join(map(str, sizes))}]")
    said = f"inputs: {', '.join(shapes)}"
    if not (factory and fixed):
        return said
    return (
        f"{said}; an axis with a name may have any size, one with a number has this size alone, lengths of sequences "
        "too; to free others: sparsecomp.export_onnx(..., dynamic_shapes=...) in Python"
    )
