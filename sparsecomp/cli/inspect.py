"""``sparsecomp inspect``: what a file holds, after checking it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparsecomp.cli import pruned
from sparsecomp.cli.parser import UsageError
from sparsecomp.errors import PatternError

_EXAMPLE = """\
example: sparsecomp inspect packed.safetensors
         sparsecomp inspect model.onnx --pattern 8:16

An .onnx file is checked weight by weight against the pattern; the exit code is 1 if a weight does not fit, or if a
place of the file could not be judged.
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser(
        "inspect", help="check a saved model or an ONNX file and say what is in it", epilog=_EXAMPLE
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors file of this package, or an .onnx file")
    parser.add_argument("--pattern", help="for .onnx alone: the pattern to check against (default 2:4)")
    parser.add_argument("--all", action="store_true", help="for .safetensors: a row for each layer, equal ones too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    path = Path(arguments.file)
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        from sparsecomp.onnx import verify
        from sparsecomp.patterns import parse

        try:
            pattern = str(parse(arguments.pattern or "2:4"))
        except PatternError as error:
            raise UsageError(f"argument --pattern: {error}") from error
        verified = verify(path, pattern)
        print(_json(verified, fits=verified.fits) if arguments.json else verified)
        return 0 if verified.fits else 1
    from sparsecomp.files.storage import inspect

    if arguments.pattern is not None:
        raise UsageError(
            f'--pattern is what an .onnx file is checked against; "{path}" says itself which patterns its layers have, '
            "so leave it out"
        )
    pruned.require_packed(arguments.file)
    found = inspect(path)
    print(_json(found) if arguments.json else found.text(every=arguments.all))
    return 0


def _json(value: Any, **more: object) -> str:
    """A frozen dataclass as JSON: its fields, and what else is given."""
    from sparsecomp.reporting.codec import plain

    return json.dumps({**plain(value), **more}, indent=1, allow_nan=False)
