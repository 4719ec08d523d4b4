"""Figures and names as reports print them: errors, shares, counts, times, the role that a layer's name tells.

Takes plain values, gives plain values. Knows nothing of reports.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def geometric_mean(errors: Iterable[float]) -> float:
    """Geometric mean of what is above zero; 0.0 of nothing."""
    positive = [error for error in errors if error > 0.0]
    return statistics.geometric_mean(positive) if positive else 0.0


def error_text(error: float) -> str:
    """A relative error as it is printed everywhere."""
    return "0" if error == 0.0 else f"{error:.4f}" if not error < 5e-4 else f"{error:.1e}"


def role(name: str) -> str:
    """The name with a star for each number: the layers of one role in all the blocks have the same."""
    return _NUMBER.sub("*", name)


def ratio_text(ratio: float) -> str:
    """Rows for each input in two figures or more, rounded down, so that what is below a limit reads so."""
    if ratio >= 10:
        return f"{math.floor(ratio):,}"
    return f"{math.floor(10 * ratio) / 10:.1f}" if ratio >= 1 else f"{ratio:.2g}"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that each reason is given for."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "(the model)")
    return names


def by_kind(notes: Iterable[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """(name, note) of notes that differ in their figures only, together; the key has an ellipsis for each figure.

    Notes that do not differ keep their figures in the key.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, note in notes:
        kinds.setdefault(_FIGURE.sub("\u2026", note), []).append((name, note))
    return {(kind if len({note for _, note in each}) > 1 else each[0][1]): each for kind, each in kinds.items()}


def count_text(count: int) -> str:
    """A number of weights as one says it."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def share_text(part: float, whole: float) -> str:
    """A share in percent that says 0% and 100% only of nothing and of all."""
    share = part / whole if whole else 0.0
    if 0.0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1.0 else f"{share:.0%}"


def change_text(before: float, after: float) -> str:
    """By how much a loss changed, in percent; nothing where that is no number."""
    return f"{after / before - 1.0:+.0%}" if before and math.isfinite(before) and math.isfinite(after) else ""


def seconds_text(seconds: float) -> str:
    """A time as one says it."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.01:
        return "<0.01 s"
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def microseconds(seconds: float) -> str:
    """A time as people read it, in us, ms or s with three figures."""
    if seconds >= 0.9995:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e6:.3g} us" if seconds < 999.5e-6 else f"{seconds * 1e3:.3g} ms"
