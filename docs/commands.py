"""The reference of the command line: what each verb says with ``--help``, at 80 columns."""

from __future__ import annotations

import argparse
import os

from sparsecomp.cli.main import parser


def page() -> str:
    """The page in Markdown."""
    os.environ["COLUMNS"] = "80"
    root = parser()
    verbs = next(each for each in root._actions if isinstance(each, argparse._SubParsersAction)).choices
    parts = [
        "# Commands\n\nWritten by `make docs` from `sparsecomp --help` and the help of each verb.\n",
        f"## sparsecomp\n\n```text\n{root.format_help()}```\n",
    ]
    parts += [f"## sparsecomp {name}\n\n```text\n{verb.format_help()}```\n" for name, verb in verbs.items()]
    return "\n".join(parts)
