"""Entry point of the ``sparsecomp`` command: finds the verb, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

import sparsecomp
from sparsecomp.cli import bench, compile, doctor, export, inspect, prune
from sparsecomp.errors import SparsecompError

VERBS = (doctor, prune, compile, export, inspect, bench)

_EPILOG = """\
exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage, 130 interrupted

example: sparsecomp compile shop.models:build --pattern 2:4 --method magnitude -o shop.safetensors
"""


def parser() -> argparse.ArgumentParser:
    """The parser with every verb."""
    root = argparse.ArgumentParser(
        prog="sparsecomp",
        description="Prune, pack, run and export N:M sparse linear layers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"sparsecomp {sparsecomp.__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        verb = module.add(verbs)
        verb.formatter_class = argparse.RawDescriptionHelpFormatter
        verb.set_defaults(run=module.run)
        # after the verb as well; SUPPRESS keeps a --debug given before it
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and give its exit code."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left: nothing to say, and nowhere to say it
        sys.stderr.close()
        return 1
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return code


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, SparsecompError | OSError):
        return text
    return f"{type(error).__name__}: {text} (add --debug for the traceback)"


if __name__ == "__main__":
    sys.exit(main())
