"""Entry point of the ``sparsecomp`` command: finds the verb, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import codecs
import io
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sparsecomp
from sparsecomp.cli import bench, compile, doctor, export, inspect, plan, prune
from sparsecomp.cli.packages import require_torch
from sparsecomp.cli.parser import Help, Parser, UsageError
from sparsecomp.cli.words import in_words_of_the_command_line
from sparsecomp.errors import SparsecompError

VERBS = (doctor, plan, prune, compile, export, inspect, bench)

_EPILOG = """\
exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage, 130 interrupted

example: sparsecomp compile shop.models:build --pattern 2:4 \\
             --method magnitude -o shop.safetensors
"""


# of the characters of tables and sentences, what stands for them where they cannot be written
_PLAIN = {"\u2500": "-", "\u2026": "~", "\u2019": "'", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00d7": "x"}


def parser() -> argparse.ArgumentParser:
    """The parser with every verb."""
    root = Parser(
        prog="sparsecomp",
        description="Prune, pack, run and export N:M sparse linear layers.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    root.add_argument("--version", action="version", version=f"sparsecomp {sparsecomp.__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        verb = module.add(verbs)
        verb.formatter_class = Help
        verb.set_defaults(run=module.run, parser=verb, without_torch=module is doctor)
        # after the verb as well; SUPPRESS keeps a --debug given before it
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and give its exit code."""
    _write_what_can_be_written()
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    arguments.command = ["sparsecomp", *(sys.argv[1:] if argv is None else argv)]
    try:
        if not arguments.without_torch:
            require_torch()
        with _plain_warnings():
            code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left: nothing to say, and nowhere to say it
        sys.stderr.close()
        return 1
    except UsageError as error:
        if arguments.debug:
            traceback.print_exc()
        try:
            arguments.parser.error(_one_line(error))
        except SystemExit:
            return 2
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return code


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within the block, warnings of this package are one line without a place in its code; others are as ever."""
    package, usual = Path(sparsecomp.__file__).parent, warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category in (UserWarning, RuntimeWarning) and package in Path(filename).parents:
            print(f"warning: {in_words_of_the_command_line(' '.join(str(message).split()))}", file=sys.stderr)
        else:
            usual(message, category, filename, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _write_what_can_be_written() -> None:
    """Replace, where the encoding of the output lacks a character, this one alone."""
    codecs.register_error("sparsecomp", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sparsecomp")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, SparsecompError | OSError):
        return in_words_of_the_command_line(text)
    return f"{type(error).__name__}: {text} (add --debug for the traceback)"


if __name__ == "__main__":
    sys.exit(main())
