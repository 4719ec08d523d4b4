"""Tables and progress bars as a person sees them on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> str:
    """A plain-text table; columns whose name starts with ">" are aligned to the right."""
    head = [column.removeprefix(">") for column in columns]
    lines = [head, *([" ".join(str(cell).splitlines()) for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligned = [
        "   ".join(
            cell.rjust(width) if column.startswith(">") else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        for line in lines
    ]
    rule = "\u2500" * (len(aligned[0]) + 1)
    drawn = [f" {line}".rstrip() for line in (aligned[0], rule, *aligned[1:])]
    return "\n".join(drawn if title is None else [title, "", *drawn])


def progress(items: Sequence[T] | Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on standard error while it is a terminal and rich is installed."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)
