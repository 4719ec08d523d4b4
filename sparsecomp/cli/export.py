"""``sparsecomp export``: a saved packed model -> ONNX."""

from __future__ import annotations

import argparse

from sparsecomp.cli import models

_EXAMPLE = """\
example: sparsecomp export packed.safetensors --model shop.models:build --inputs shop.data:example \\
             --form packed -o model.onnx

A Hugging Face folder needs no --inputs: token ids and an attention mask are used.
packed keeps values and metadata apart and runs anywhere through a function body; dense writes zeros, for TensorRT.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("export", help="write a saved packed model as ONNX", epilog=_EXAMPLE)
    parser.add_argument("file", metavar="FILE", help="a file that compile wrote")
    models.add_model(parser, "--model")
    parser.add_argument("--inputs", metavar="FACTORY", help="module:function giving the arguments of one forward call")
    parser.add_argument("--form", choices=("packed", "dense"), default="packed", help="default: packed")
    models.add_output(parser, "ONNX")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import sparsecomp as sc

    model = models.load_model(arguments.model, arguments.weights)
    sc.load(arguments.file, into=model)
    inputs, axes = models.load_inputs(arguments.inputs, arguments.model)
    print(sc.export_onnx(model, inputs, arguments.output, form=arguments.form, dynamic_shapes=axes))
    return 0
