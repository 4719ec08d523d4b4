"""The limit plot: speedup over the best dense engine against batch size, the bound drawn, as an SVG.

Takes a sweep's result, gives SVG text. Knows nothing of how it was measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from sparsecomp.benchmark.report import Comparison, comparisons, in_int8

_WIDTH, _HEIGHT = 760, 390
_FONT = 'font-family="sans-serif" font-size="13"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 178, 68, 56
# the spread reaches so many times the highest figure at most, and is cut there
_MOST_SPREAD = 1.5
# pixels between the labels of two lines
_LABEL = 36
# a speedup is called above its bound from so many times the bound on
_ABOVE = 1.02
_NOTE = ("above the bound: there the best", "dense engine is below its peak")
_NOTE_WIDTH = 200
_WEIGHTS = {"cold": "weights from memory", "warm": "weights in cache"}
# colours that stay apart for readers who do not see red and green as different
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def limit_plot(result: dict[str, Any], shape: tuple[int, int], dtype: str, threads: int) -> str:
    """One line for each pattern and its bound, over the batches of one shape [out, in]: cold ones if there are any."""
    chosen = [
        each
        for each in comparisons(result)
        if ((each.row["out"], each.row["in"]), each.row["dtype"], each.row["threads"]) == (shape, dtype, threads)
    ]
    weights = "cold" if any(each.row["weights"] == "cold" for each in chosen) else "warm"
    chosen = [each for each in chosen if each.row["weights"] == weights]
    counts = Counter(each.row["pattern"] for each in chosen)
    drawn = {pattern for pattern, count in counts.most_common(len(_COLOURS)) if count >= min(3, max(counts.values()))}
    chosen = [each for each in chosen if each.row["pattern"] in drawn]
    batches = sorted({int(each.row["batch"]) for each in chosen})
    highest = max(max(each.speedup, each.row["bound"]) for each in chosen)
    # the spread too, but a bar of noise must not flatten all the rest
    top = min(max(highest, *(each.spread[1] for each in chosen)), _MOST_SPREAD * highest)
    top = max(2.5, math.ceil(2 * top) / 2)
    # from dense on, or from the slowest: what lies between 0 and there says nothing
    bottom = min(1.0, math.floor(2 * min(min(each.speedup, each.spread[0]) for each in chosen)) / 2)
    frame = _Frame(batches, bottom, top)
    title = f"Speedup over the best dense engine, {shape[0]} x {shape[1]}, {dtype}, {_threads(threads)}"
    machine = result["machine"]
    place = f"{machine['cpu']} ({machine['isa']}), {_WEIGHTS[weights]}, {result['date']}"
    if any(in_int8(each.row) for each in chosen):
        place += "; int8@a8 over the best dense int8"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_FONT}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 24, title, "start", 'font-size="15" font-weight="bold"'),
        _text(_LEFT, 42, place, "start", 'fill="#555555"'),
        *frame.axes(),
    ]
    patterns = list(dict.fromkeys(each.row["pattern"] for each in chosen))
    for i, (colour, pattern) in enumerate(zip(_COLOURS, patterns, strict=False)):
        shift = 6.0 * (i - (len(patterns) - 1) / 2)  # so that bars of one batch stand side by side
        line = sorted((each for each in chosen if each.row["pattern"] == pattern), key=lambda each: each.row["batch"])
        parts.extend(frame.pattern(line, pattern, colour, shift))
    labels = _labels(chosen)
    places = _spread_out([value for _, _, value in labels], frame)
    for colour, (pattern, text, _), y in zip(_COLOURS, labels, places, strict=False):
        bold = f'fill="{colour}" font-weight="bold"'
        parts.append(_text(_WIDTH - _RIGHT + 12, y, pattern, "start", bold))
        parts.append(_text(_WIDTH - _RIGHT + 12, y + 15, text, "start", f'fill="{colour}" font-size="12"'))
    parts.extend(frame.above_bound(chosen))
    parts.append(_text(_WIDTH - _RIGHT + 12, _HEIGHT - 36, "dashed: the bound", "start", 'fill="#555555"'))
    parts.append(_text(_WIDTH - _RIGHT + 12, _HEIGHT - 20, "bars: 10% to 90%", "start", 'fill="#555555"'))
    return "\n".join([*parts, "</svg>", ""])


class _Frame:
    def __init__(self, batches: Sequence[int], bottom: float, top: float) -> None:
        self.batches, self.bottom, self.top = batches, bottom, top

    def x(self, batch: int) -> float:
        first, last = math.log2(self.batches[0]), math.log2(max(self.batches[-1], self.batches[0] + 1))
        span = _WIDTH - _RIGHT - _LEFT - 40
        return _LEFT + 20 + span * (math.log2(batch) - first) / (last - first)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (value - self.bottom) / (self.top - self.bottom)

    def axes(self) -> list[str]:
        right = _WIDTH - _RIGHT
        parts = []
        for half in range(round(self.bottom * 2), round(self.top * 2) + 1):
            value = half / 2
            style = 'stroke="#999999"' if value in (self.bottom, 1.0) else 'stroke="#e5e5e5"'
            parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}" {style}/>')
            named = "dense 1x" if value == 1.0 else f"{value:g}x"
            parts.append(_text(_LEFT - 8, self.y(value) + 4, named, "end"))
        for batch in self.batches:
            parts.append(_text(self.x(batch), _HEIGHT - _BOTTOM + 20, str(batch), "middle"))
        parts.append(_text((_LEFT + right) / 2, _HEIGHT - 16, "batch (rows of the input)", "middle"))
        return parts

    def pattern(self, line: Sequence[Comparison], name: str, colour: str, shift: float) -> list[str]:
        parts = []
        for values, dash in (
            ([each.speedup for each in line], ""),
            ([float(each.row["bound"]) for each in line], ' stroke-dasharray="5 4" opacity="0.7"'),
        ):
            points = " ".join(
                f"{self.x(each.row['batch']) + shift:.1f},{self.y(value):.1f}"
                for each, value in zip(line, values, strict=True)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for each in line:
            x, (low, high) = self.x(each.row["batch"]) + shift, each.spread
            tip = f"{name}, batch {each.row['batch']}: {each.speedup:.2f}x, bound {each.row['bound']:.2f}x"
            ends = self.y(max(low, self.bottom)), self.y(min(high, self.top))
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>')
            parts.append(
                f'<circle cx="{x:.1f}" cy="{self.y(each.speedup):.1f}" r="4" fill="{colour}">'
                f"<title>{escape(tip)}</title></circle>"
            )
        return parts

    def above_bound(self, chosen: Sequence[Comparison]) -> list[str]:
        """Why a speedup exceeds its bound, beside the point that does so most; nothing where none does."""
        above = [each for each in chosen if each.speedup > _ABOVE * each.row["bound"]]
        if not above:
            return []
        most = max(above, key=lambda each: each.speedup)
        x, y = self.x(most.row["batch"]), max(self.y(most.speedup) + 4, _TOP + 12)
        for at, anchor, start in ((x + 22, "start", x + 22), (x - 22, "end", x - 22 - _NOTE_WIDTH)):
            inside = start >= _LEFT and start + _NOTE_WIDTH <= _WIDTH - _RIGHT
            if inside and not self._covers(chosen, start, start + _NOTE_WIDTH, y - 14, y + 22):
                return [_text(at, y + 16 * i, line, anchor, 'fill="#555555"') for i, line in enumerate(_NOTE)]
        return [_text(_LEFT, _TOP - 4, " ".join(_NOTE), "start", 'fill="#555555" font-size="12"')]

    def _covers(self, chosen: Sequence[Comparison], left: float, right: float, top: float, bottom: float) -> bool:
        """Whether a box of these pixels lies on a line of speedups or bounds, or on a bar."""
        for pattern in dict.fromkeys(each.row["pattern"] for each in chosen):
            line = sorted((each for each in chosen if each.row["pattern"] == pattern), key=lambda e: e.row["batch"])
            across = [self.x(each.row["batch"]) for each in line]
            for x, (low, high) in zip(across, (each.spread for each in line), strict=True):
                beside = left - 12 <= x <= right + 12
                if beside and self.y(min(high, self.top)) <= bottom and self.y(low) >= top:
                    return True
            for values in ([each.speedup for each in line], [float(each.row["bound"]) for each in line]):
                for (x, value), (next_x, following) in pairwise(zip(across, values, strict=True)):
                    for share in (i / 32 for i in range(33)):
                        y = self.y(value + (following - value) * share)
                        if left <= x + (next_x - x) * share <= right and top <= y <= bottom:
                            return True
        return False


def _labels(chosen: Sequence[Comparison]) -> list[tuple[str, str, float]]:
    """(pattern, text, where it ends) of each line, in the order of the colours."""
    labels = []
    for pattern in dict.fromkeys(each.row["pattern"] for each in chosen):
        last = max((each for each in chosen if each.row["pattern"] == pattern), key=lambda each: each.row["batch"])
        text = f"{last.speedup:.2f}x of {last.row['bound']:.2f}x at batch {last.row['batch']}"
        labels.append((pattern, text, last.speedup))
    return labels


def _spread_out(values: Sequence[float], frame: _Frame) -> list[float]:
    """Where labels go so that those of nearly equal values do not cover each other, nor the key below them."""
    places = [0.0] * len(values)
    lowest = _HEIGHT - _BOTTOM - 12.0
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for rank, i in enumerate(order):
        above = places[order[rank - 1]] + _LABEL if rank else 0.0
        room = lowest - _LABEL * (len(order) - 1 - rank)
        places[i] = max(min(frame.y(values[i]) - 4, room), above)
    return places


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'
