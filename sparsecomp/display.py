"""Tables and progress bars as a person sees them on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import TypeVar

T = TypeVar("T")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> str:
    """A plain-text table; columns whose name starts with ">" are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    buffer = StringIO()
    Console(file=buffer, width=4000, color_system=None, markup=False, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def progress(items: Sequence[T] | Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on standard error while it is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)
