"""The support matrix of one device as text: which backend runs which weights, and in footnotes why not.

Takes rows of ``backends.support`` as JSON values. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from sparsecomp.reporting.terminal import table, wrap

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


class Footnotes:
    """Reasons with a letter each, in the order in which they were met, and who gave them."""

    def __init__(self) -> None:
        """None yet."""
        self._of: dict[str, list[str]] = {}

    def mark(self, reason: str, backend: str) -> str:
        """The letter of a reason: a, b, ... z, aa, ab, ..."""
        givers = self._of.setdefault(reason, [])
        if backend not in givers:
            givers.append(backend)
        return _letter(list(self._of).index(reason))

    def lines(self) -> Iterator[str]:
        """A wrapped line for each."""
        for index, (reason, givers) in enumerate(self._of.items()):
            yield wrap(f" {_letter(index)}: {', '.join(givers)}: {reason}", indent="    ")


def matrix(device: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the matrix; backends that run nothing on the device stand under it, with their first reason."""
    from sparsecomp.backends.support import BATCH, PATTERNS, SHAPE

    notes, cells = Footnotes(), []
    able = {row["backend"] for row in rows if None in row["answers"]}
    for row in rows:
        if row["backend"] in able:
            dtypes = "any" if len(row["dtypes"]) == len(_SHORT) else " ".join(_SHORT[each] for each in row["dtypes"])
            cells.append((row["backend"], row["numbers"], dtypes, *_answers(row, notes)))
    heads = [pattern.replace("block", "block ").replace(":0.5", "") for pattern in PATTERNS]
    title = f"{device}: what runs a {SHAPE[0]}x{SHAPE[1]} weight at batch {BATCH}; a letter is a footnote"
    unable = {row["backend"]: row["answers"][0] for row in reversed(rows) if row["backend"] not in able}
    lines = [table(("backend", "weights", "x", *heads), cells, title), *notes.lines()]
    return lines + [wrap(f" none of it: {name}: {reason}", indent="    ") for name, reason in unable.items()]


def _answers(row: Mapping[str, Any], notes: Footnotes) -> Iterator[str]:
    for reason, by_name in zip(row["answers"], row["by_name_only"], strict=True):
        if reason is not None:
            yield notes.mark(reason, row["backend"])
        elif by_name is not None:
            yield f"yes, {notes.mark(by_name, row['backend'])}"
        else:
            yield "yes"


def _letter(index: int) -> str:
    more, last = divmod(index, len(ascii_lowercase))
    return (_letter(more - 1) if more else "") + ascii_lowercase[last]
