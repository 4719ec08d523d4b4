"""The Python blocks of a page: found, run one after the other in a folder of their own, and what they print.

A fenced block ``text`` right after a ``python`` block is its output. HTML comments, which no reader sees, say the rest:
``<!-- not run: REASON -->`` before a block leaves it out, ``<!-- run first`` ... ``-->`` holds code that the block
needs and the page does not show, ``<!-- measured -->`` before an output says that it holds times of one machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"  # pages may import small.py from there
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?"
    r"(?:^<!-- run first\n(?P<first>.*?)^-->\n)?"
    r"^```python\n(?P<code>(?:(?!```)[^\n]*\n)*)```\n"
    r"(?:\n(?P<measured><!-- measured -->\n)?```text\n(?P<output>(?:(?!```)[^\n]*\n)*)```\n)?",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"\d{4}-\d\d-\d\dT[\d:+]+|\d+\.\d[\d.]*(?:e[+-]?\d+)?|\d+e[+-]?\d+")
_RUNNER = """\
import contextlib, io, json, sys
namespace, printed = {"__name__": "__main__"}, []
for code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<block>", "exec"), namespace)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


@dataclass(frozen=True)
class Block:
    """One Python block: its code, with what it needs unseen, the output under it or None, and why it is not run."""

    code: str
    output: str | None
    measured: bool
    not_run: str | None


def parse(text: str) -> list[Block]:
    """The Python blocks of a page, in order."""
    return [
        Block((found["first"] or "") + found["code"], found["output"], bool(found["measured"]), found["why"])
        for found in _BLOCK.finditer(text)
    ]


def run(text: str) -> list[str]:
    """What each block of a page prints, "" for one that is not run; all share one process and one namespace.

    Raises RuntimeError with the traceback of a block that fails.
    """
    codes = ["" if block.not_run else block.code for block in parse(text)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "COLUMNS": "80", "SPARSECOMP_CACHE": "off", "PYTHONPATH": str(EXAMPLES)}
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER],
            input=json.dumps(codes),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    printed: list[str] = json.loads(done.stdout)
    return printed


def with_outputs(text: str, printed: list[str]) -> str:
    """The page with these outputs in place of those it shows; blocks without one stay without."""
    remaining = iter(printed)

    def replace(found: re.Match[str]) -> str:
        output = next(remaining)
        if found["output"] is None or found["why"]:
            return found[0]
        start, end = (place - found.start() for place in found.span("output"))
        return found[0][:start] + output + found[0][end:]

    return _BLOCK.sub(replace, text)


def skeleton(output: str) -> list[str]:
    """The lines of an output without what differs between machines and runs: decimals, dates, widths of columns."""
    lines = [" ".join(_NUMBER.sub("#", line).split()) for line in output.splitlines()]
    return [re.sub(r"[\u2500-]{2,}", "--", line) for line in lines if line]
