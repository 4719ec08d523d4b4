"""The argument parser of every verb: an option that is given twice is refused, where argparse keeps the last silently.

Also the types of arguments that several verbs take: files to write, numbers and lists of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsecomp.errors import FormatError, SparsecompError
from sparsecomp.reporting.terminal import wrap
from sparsecomp.reporting.writing import require_folder, require_new_folder


class UsageError(SparsecompError):
    """Options that cannot be meant as they are given, as can be told without the model: exit code 2, as argparse."""


class _Once(argparse.Action):
    """What argparse does without an action, once: the second value is an error and replaces nothing."""

    _first: object = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep the value; wrong usage where there is one already."""
        if option_string is not None and self._first is not None:
            raise argparse.ArgumentError(
                self, f"is given twice ({_text(self._first)}, then {_text(values)}) and takes one value; give it once"
            )
        self._first = values
        setattr(namespace, self.dest, values)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as wide as the terminal; lines that are indented or an example stay as they are, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        open_paragraph = False
        for line in text.splitlines():
            as_it_is = not line or line.startswith((" ", "example:"))
            if open_paragraph and not as_it_is:
                lines[-1] += f" {line}"
            else:
                lines.append(line)
            open_paragraph = not as_it_is
        return "\n".join(line if line.startswith((" ", "example:")) else wrap(line, width, "") for line in lines)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose plain options may be given once; used for one command line only."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: D107  (the class says it)
        super().__init__(*arguments, **named)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def error(self, message: str) -> NoReturn:
        """Leave with code 2, after the shortest usage and the sentence."""
        usage = wrap(f"usage: {' '.join([self.prog, *self._required()])} [options]", indent="       ")
        self.exit(2, f"{usage}\n       all options: {self.prog} --help\nerror: {message}\n")

    def _required(self) -> list[str]:
        """What must be given; the help has the rest."""
        words = []
        for action in self._actions:
            value = action.metavar or action.dest.upper()
            if not action.option_strings:
                words.append(str(value))
            elif action.required:
                words.append(f"{action.option_strings[0]} {value}")
        return words


def output_file(*endings: str) -> Callable[[str], str]:
    """The argparse type of a file to write: its folder is there, it is no folder, and it has one of the endings."""

    def check(text: str) -> str:
        path = Path(text)
        _require_name(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f'"{text}" is a folder; name a file in it, such as {_example(path)}')
        if text.endswith("/"):
            there = f"{path}" if path.suffix.lower() in endings else _example(path)
            raise argparse.ArgumentTypeError(
                f'"{text}" ends in a slash, which names a folder; name a file, such as {there}'
            )
        _in_a_folder(text)
        if endings and path.suffix.lower() not in endings:
            got = f'ends in "{path.suffix}"' if path.suffix else "has no ending"
            allowed = ", ".join(endings[:-1]) + (" or " if endings[1:] else "") + endings[-1]
            raise argparse.ArgumentTypeError(
                f'"{text}" {got}; this file is written as {allowed}, so give it that ending'
            )
        return text

    def _example(folder: Path) -> str:
        name = "report" if ".html" in endings else "model"
        return str(folder / f"{name}{endings[0] if endings else '.safetensors'}")

    return check


def output_path(text: str) -> str:
    """The argparse type of a file or a model folder to write: what it is to lie in is there."""
    return _in_a_folder(text)


def output_folder(text: str) -> str:
    """The argparse type of a folder to write in, which is made where it is not there."""
    _require_name(text)
    try:
        require_new_folder(Path(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _require_name(text: str) -> None:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give the name of a file to write")


def _in_a_folder(text: str) -> str:
    _require_name(text)
    try:
        require_folder(Path(text))
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def words(text: str) -> tuple[str, ...]:
    """The argparse type of a list such as fp32,bf16, without what is named twice."""
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f'"{text}" is an empty list; name at least one, separated by commas')
    return found


def counts(text: str) -> tuple[int, ...]:
    """The argparse type of a list of whole numbers of 1 or more, such as 1,8,128."""
    return _whole(text, 1)


def counts_or_none(text: str) -> tuple[int, ...]:
    """The argparse type of such a list in which 0 stands for none."""
    return tuple(number for number in _whole(text, 0) if number)


def _whole(text: str, least: int) -> tuple[int, ...]:
    found = []
    for word in words(text):
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f'"{word}" is no whole number of {least} or more; write a list such as 1,8,128'
            )
        found.append(number)
    return tuple(found)


def whole(least: int = 0) -> Callable[[str], int]:
    """The argparse type of one whole number of ``least`` or more."""

    def check(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f'"{text}" is no whole number of {least} or more; write one such as 100')
        return number

    return check


def positive(text: str) -> float:
    """The argparse type of a finite number above 0, such as 0.5."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f'"{text}" is no number above 0; write one such as 0.5')
    return number


def number(text: str) -> float:
    """The argparse type of a finite number, such as 0.1; what it is for says which are allowed."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f'"{text}" is no number; write one such as 0.1')
    return found


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """The argparse type of a list of shapes out x in, such as 4096x4096,3072x768."""
    found = []
    for word in words(text):
        sides: Sequence[str] = word.split("x")
        if len(sides) != 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
            raise argparse.ArgumentTypeError(
                f'"{word}" is no shape; write out x in, two whole numbers of 1 or more, such as 4096x4096'
            )
        found.append((int(sides[0]), int(sides[1])))
    return tuple(found)
