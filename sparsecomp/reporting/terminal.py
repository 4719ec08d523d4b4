"""Tables, names and progress bars as a person sees them on a terminal.

Everything here fits ``terminal_width()``: COLUMNS where it is set, else the terminal of standard output, else 80. What
is written to a file or a pipe is thereby as narrow as a mail; set COLUMNS for wider tables. Knows nothing of models.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TypeVar

from sparsecomp.reporting.letters import end, fold, span, start
from sparsecomp.reporting.letters import left as left_of
from sparsecomp.reporting.letters import right as right_of

T = TypeVar("T")

NARROWEST = 40
ELSEWHERE = 80
# what a column of names or of words is not squeezed below while another way is left; for names this wide others go
_NAMES, _WORDS, _MIDDLE = 18, 24, 9
_WIDE_NAMES = 28
_LISTED = 3
# fewer columns than this show nothing of a name
_LEAST = 4


def terminal_width() -> int:
    """Columns to write for: COLUMNS if it is set, else those of the terminal on standard output, else 80."""
    return max(NARROWEST, shutil.get_terminal_size((ELSEWHERE, 24)).columns)


def wrap(text: str, width: int | None = None, indent: str = "  ") -> str:
    """``text`` in lines of at most ``width`` columns (None: the terminal's), those after the first indented.

    A word that is longer than a line, such as a path, stays whole, so that it can be copied.
    """
    columns = width or terminal_width()
    return "\n".join("\n".join(fold(line, columns, indent)) for line in text.splitlines())


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, width: int | None = None
) -> str:
    """A plain-text table that is at most ``width`` columns wide (None: the terminal's) as far as its words allow.

    A column whose name starts with ">" is aligned to the right, one that starts with "?" may be left out where there is
    no room, the rightmost first; a line under the table then names it. The first column holds names, which are
    shortened in the middle; words in the others are wrapped.
    """
    width = width or terminal_width()
    cells = [[" ".join(str(cell).splitlines()) for cell in row] for row in rows]
    kept = list(range(len(columns)))
    hidden: list[str] = []
    head = [column.lstrip("?>") for column in columns]
    right = [column.lstrip("?").startswith(">") for column in columns]
    natural = [max(map(span, column)) for column in zip(head, *cells, strict=True)]
    room = width - 2  # a blank before the table, and the rule reaches one column beyond it
    gap = 3 if sum(natural) + 3 * (len(columns) - 1) <= room else 2
    # a heading may be folded, a number not
    least = [max(map(span, (*name.split(), *each))) for name, *each in zip(head, *cells, strict=True)]
    floors = _floors(natural, least, right, _WIDE_NAMES, _WORDS, None)
    while sum(floors[i] for i in kept) + gap * (len(kept) - 1) > room:
        optional = [i for i in kept if columns[i].startswith("?")]
        if not optional:
            break
        kept.remove(optional[-1])
        hidden.insert(0, head[optional[-1]])
    widths, gap = _widths([natural[i] for i in kept], [least[i] for i in kept], [right[i] for i in kept], room, gap)
    head, right = [head[i] for i in kept], [right[i] for i in kept]
    lines = [[row[i] for i in kept] for row in cells]
    names = _shortened([line[0] for line in lines], widths[0]) if lines else []
    folded = [_folded(head, widths)]
    folded += [_folded([name, *line[1:]], widths) for name, line in zip(names, lines, strict=True)]
    aligned = [
        [
            (" " * gap).join(
                right_of(cell, size) if flush else left_of(cell, size)
                for cell, size, flush in zip(physical, widths, right, strict=True)
            )
            for physical in row
        ]
        for row in folded
    ]
    rule = "\u2500" * (sum(widths) + gap * (len(widths) - 1) + 1)
    drawn = [f" {line}".rstrip() for line in (*aligned[0], rule, *(line for row in aligned[1:] for line in row))]
    if lines:
        drawn += _legend([line[0] for line in lines], names, width)
    if hidden:
        drawn.append(wrap(f" (left out at {width} columns: {', '.join(hidden)})", width, " "))
    return "\n".join(drawn if title is None else [wrap(title, width), "", *drawn])


def fits(columns: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> bool:
    """Whether a table of these columns and rows needs no squeezing at that width."""
    head = [column.lstrip("?>") for column in columns]
    natural = [max(span(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    return sum(natural) + 2 * (len(natural) - 1) + 2 <= (width or terminal_width())


def _floors(
    natural: Sequence[int], least: Sequence[int], right: Sequence[bool], names: int, words: int, middle: int | None
) -> list[int]:
    """The least width of each column; ``middle`` is that of words between the first and the last column."""
    floors = list(natural)
    for i, size in enumerate(natural):
        if right[i]:
            floors[i] = least[i]
        elif i == 0:
            floors[i] = min(size, names)
        elif i == len(natural) - 1:
            floors[i] = min(size, words)
        elif middle is not None:
            # shapes and the like are words, and are not broken
            floors[i] = min(size, max(middle, min(least[i], 2 * middle)))
    return floors


def _widths(
    natural: Sequence[int], least: Sequence[int], right: Sequence[bool], room: int, gap: int
) -> tuple[list[int], int]:
    """Widths that fill the room, and the gap between columns; wider than the room only where nothing gives way."""
    folded = [False] * len(right)  # numbers too, at last, for what stands there may be words
    tries = (
        (_NAMES, _WORDS, None, gap, right),
        (_NAMES, _WORDS, _MIDDLE, gap, right),
        (12, 16, _MIDDLE, 1, right),
        (8, 8, 6, 1, right),
        (8, 8, 8, 1, folded),
    )
    for names, words, middle, gap, flush in tries:
        widths = _floors(natural, least if flush is right else [0] * len(least), flush, names, words, middle)
        if sum(widths) + gap * (len(widths) - 1) <= room:
            break
    spare = max(0, room - sum(widths) - gap * (len(widths) - 1))
    # names lose letters when they are short of room, words only lines
    for i in (*range(1, len(widths) - 1), 0, len(widths) - 1):
        more = min(spare, natural[i] - widths[i])
        widths[i] += more
        spare -= more
    return widths, gap


def _folded(cells: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """The lines of one row of a table."""
    folded = [
        [cell] if span(cell) <= width else fold(cell, max(width, 1), break_words=True)
        for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, folded))
    return [[lines[i] if i < len(lines) else "" for lines in folded] for i in range(height)]


def _shortened(names: Sequence[str], width: int) -> list[str]:
    """The names, shortened; whole where two would read the same, to be wrapped."""
    short = [shorten(name, width) for name in names]
    distinct = len(set(zip(names, short, strict=True))) == len(set(short))
    return short if distinct else list(names)


def _legend(names: Sequence[str], short: Sequence[str], width: int) -> list[str]:
    """One line that reads the first of the shortened names out, so that the others can be read; none without any."""
    for name, brief in zip(names, short, strict=True):
        whole, cut = _parts(name)[1], _parts(brief)[1]
        if cut and cut != whole:
            return fold(f" (names are shortened: {cut} is {whole})", width, " ", break_words=True)
    return []


def _parts(name: str) -> tuple[str, str, str]:
    """What ``label`` puts before a name, the name, and what it puts after it."""
    one = re.fullmatch(r"(\d+ x )(.*)", name, re.DOTALL)
    if one is not None:
        return one[1], one[2], ""
    several = re.fullmatch(r"(\d+ layers: )(.*)( and \d+ other kinds?)", name, re.DOTALL)
    if several is not None:
        return several[1], several[2], several[3]
    # without a name, as ``shorten`` makes it
    return (name, "", "") if re.fullmatch(r"\d+ layers(, \d+ kinds|\u2026)", name) else ("", name, "")


def shorten(name: str, width: int) -> str:
    """A dotted name in ``width`` columns: parts in the middle lose letters but for numbers, then the front goes.

    "encoder.layer.0.attention.self.query" is at 24 columns "encoder.l.0.a.self.query", at 12 "\u2026self.query". What
    ``label`` puts before and after a name stays, or the name goes: "24 layers, 5 kinds".
    """
    if span(name) <= width:
        return name
    before, core, after = _parts(name)
    room = width - span(before) - span(after)
    parts = core.split(".")
    short = list(parts)
    for i in (*range(1, len(parts) - 1), *([0] if len(parts) > 1 else [])):
        short[i] = parts[i] if parts[i].isdigit() else parts[i][:1]
        if span(".".join(short)) <= room:
            return f"{before}{'.'.join(short)}{after}"
    for first in range(1, len(parts)):
        if span(tail := ".".join(parts[first:])) < room:
            return f"{before}\u2026{tail}{after}"
    if after:
        count, kinds = before.split()[0], int(after.split()[1]) + 1
        told = f"{count} layers, {kinds} kinds"
        return told if span(told) <= width else f"{count} layers\u2026"
    if room < _LEAST:
        return f"{start(name, width - 1)}\u2026"
    last = (2 * room) // 3
    return f"{before}{start(core, room - last - 1)}\u2026{end(core, last)}"


def quoted(name: str) -> str:
    """A layer's name for a sentence: in quotes where it would read as a number, such as "0" or "0.2"."""
    if not name:
        return "the model"
    return name if re.search(r"[^\W\d_]", name) else f'"{name}"'


def numbered(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in their numbers only, as one with "*" in place of these, each with how many they are."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)  # words and numbers in turn
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    found = []
    for group in alike.values():
        same = [len(set(values)) == 1 for values in zip(*group, strict=True)]
        found.append(("".join(p if kept else "*" for p, kept in zip(group[0], same, strict=True)), len(group)))
    return found


def label(names: Sequence[str]) -> str:
    """Names as one cell of a table: "down", "12 x layers.*.up", or "24 layers: layers.*.up and 1 other kind"."""
    kinds = numbered(names)
    first = kinds[0][0] or "(the model)"
    if len(kinds) > 1:
        return f"{len(names)} layers: {first} and {counted(len(kinds) - 1, 'other kind')}"
    return f"{len(names)} x {first}" if len(names) > 1 else first


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 layer", "2 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: few as they are, many by their kinds, such as "12 x layers.*.up, lm_head"."""
    if len(names) <= _LISTED:
        return ", ".join(map(quoted, names))
    return ", ".join(f"{count} x {quoted(kind)}" if count > 1 else quoted(kind) for kind, count in numbered(names))


def by_reason(title: str, reasons: Mapping[str, str], width: int | None = None, every: bool = False) -> list[str]:
    """One wrapped line for each reason, with the names that have it: "title: names: reason"; or one for each name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault((reason, name if every else ""), []).append(name)
    return [wrap(f"{title}: {listed(names)}: {reason}", width) for (reason, _), names in groups.items()]


def progress(items: Sequence[T] | Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on standard error while it is a terminal and rich is installed."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=description, total=total, console=Console(stderr=True), transient=True)
