"""``sparsecomp export``: a saved packed model -> ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsecomp.cli import hub, models, pruned

_EXAMPLE = """\
example: sparsecomp export packed.safetensors --model shop.models:build \\
             --inputs shop.data:example --form packed -o model.onnx

A Hugging Face folder needs no --inputs: token ids and a mask, or pixels, of any batch and length are used. A factory
gives a tuple of arguments, a dict of keyword arguments, or the only argument; their first axis may have any size.
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
    model = models.load_model(arguments.model, auto_class=arguments.auto_class)
    model = sc.load(arguments.file, into=model)
    call = models.load_call(arguments.inputs, arguments.model, model)
    with hub.without_cache(model):
        names = hub.output_names(model, call) if Path(arguments.model).is_dir() else None
        report = sc.export_onnx(
            model,
            call.args,
            arguments.output,
            form=arguments.form,
            output_names=names,
            dynamic_shapes=call.axes,
            kwargs=call.kwargs or None,
        )
    print(report)
    return 0
