"""``sparsecomp inspect``: what a file holds, after checking it."""

from __future__ import annotations

import argparse
from pathlib import Path

_EXAMPLE = """\
example: sparsecomp inspect packed.safetensors
         sparsecomp inspect model.onnx --pattern 8:16

An .onnx file is checked weight by weight against the pattern; the exit code is 1 if a weight does not fit.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser(
        "inspect", help="check a saved model or an ONNX file and say what is in it", epilog=_EXAMPLE
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors file of this package, or an .onnx file")
    parser.add_argument("--pattern", default="2:4", help="for .onnx: the pattern to check against (default 2:4)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    path = Path(arguments.file)
    if path.suffix == ".onnx":
        from sparsecomp.onnx import verify

        verified = verify(path, arguments.pattern)
        print(verified)
        return 0 if verified.fits else 1
    from sparsecomp.storage import inspect

    print(inspect(path))
    return 0
