"""Text in columns of a terminal: wide characters take two, marks on others none.

Takes and gives text. Knows nothing of tables.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator

_NOTHING = ("Mn", "Me", "Cf")


def span(text: str) -> int:
    """Columns that the text takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(letter: str) -> int:
    if unicodedata.category(letter) in _NOTHING:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def start(text: str, columns: int) -> str:
    """As much of the beginning as fits."""
    used = 0
    for i, letter in enumerate(text):
        used += _columns(letter)
        if used > columns:
            return text[:i]
    return text


def end(text: str, columns: int) -> str:
    """As much of the end as fits."""
    used = 0
    for i in range(len(text) - 1, -1, -1):
        used += _columns(text[i])
        if used > columns:
            return text[i + 1 :]
    return text


def left(text: str, columns: int) -> str:
    """The text and blanks up to so many columns."""
    return text + " " * (columns - span(text))


def right(text: str, columns: int) -> str:
    """Blanks and the text, so many columns in all."""
    return " " * (columns - span(text)) + text


def fold(text: str, columns: int, indent: str = "", break_words: bool = False) -> list[str]:
    """Lines of at most so many columns, those after the first indented; words stay whole unless ``break_words``."""
    if text.isascii() or span(text) == len(text):
        return textwrap.wrap(
            text, columns, subsequent_indent=indent, break_long_words=break_words, break_on_hyphens=False
        )
    lead = text[: len(text) - len(text.lstrip(" "))]
    lines = [lead]
    for word in _words(text, columns - span(indent), break_words):
        blank = " " if lines[-1].strip() else ""
        if blank and span(lines[-1] + blank + word) > columns:
            lines.append(indent + word)
        else:
            lines[-1] += blank + word
    return lines


def _words(text: str, columns: int, break_words: bool) -> Iterator[str]:
    for word in text.split():
        rest = word
        while break_words and span(rest) > columns:
            # one letter at least, however narrow the column
            piece = start(rest, columns) or rest[0]
            yield piece
            rest = rest[len(piece) :]
        if rest:
            yield rest
