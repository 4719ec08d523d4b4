"""Small pieces of HTML and SVG: everything that comes from outside is escaped here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# what HTML allows in no document, and lone halves of characters that no file can hold
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# decimals of a figure before it is written with an exponent; pixels of a digit at the size of the page's drawings
_PLACES, _DIGIT = 6, 6.6


def text(value: object) -> str:
    """``value`` as text of an element or of a quoted attribute."""
    return escape(_NOT_TEXT.sub("\ufffd", str(value)), quote=True)


def name_text(name: str) -> str:
    """A layer's name that may break after its dots."""
    return text(name or "(the model)").replace(".", ".<wbr>")


def section(heading: str, body: str, ident: str = "") -> str:
    """A section, or nothing where there is nothing to say."""
    mark = f' id="{ident}"' if ident else ""
    return f"<section{mark}>\n<h2>{text(heading)}</h2>\n{body}\n</section>" if body else ""


def pairs(items: Iterable[tuple[str, str]], kind: str) -> str:
    """A list of terms (text) and what is said of them (HTML)."""
    lines = "".join(f"<div><dt>{text(term)}</dt><dd>{said}</dd></div>\n" for term, said in items)
    return f'<dl class="{kind}">\n{lines}</dl>'


def figure(drawn: str, caption: str = "") -> str:
    """A drawing and the text below it (HTML), if there is any."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{drawn}{below}</figure>\n"


def svg(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """A drawing whose ``title`` is read aloud for it; its colours come from the page's style."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    return f'{head} viewBox="0 0 {width:g} {height:g}" role="img"><title>{text(title)}</title>{"".join(parts)}</svg>'


def label(x: float, y: float, said: str, anchor: str = "start", more: str = "") -> str:
    """Text in a drawing."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{text(said)}</text>'


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above, at even steps."""
    span = max(high - low, abs(high) * 1e-3, 1e-12)
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [each * step for each in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Axes:
    """A plot of ``width`` x ``height`` pixels: ``x`` from and to, ``y`` its ticks, names of both."""

    x: tuple[float, float]
    y: Sequence[float]
    x_name: str
    y_name: str
    width: int = 300
    height: int = 170
    right: int = 18
    top: int = 10
    bottom: int = 38

    @property
    def y_labels(self) -> list[str]:
        """The figures of the ticks: no two alike, all with as many digits as their steps need."""
        step = (self.y[-1] - self.y[0]) / max(len(self.y) - 1, 1)
        if step <= 0:
            return [f"{value:.6g}" for value in self.y]
        place = math.floor(math.log10(step) + 1e-9)
        if place >= -_PLACES:
            return [f"{value:.{max(0, -place)}f}" for value in self.y]
        return [f"{value / 10.0**place:.0f}e{place}" if value else "0" for value in self.y]

    @property
    def left(self) -> float:
        """Pixels beside the axis: its figures, and the name that stands upright before them."""
        return max(56.0, 27.0 + _DIGIT * max(map(len, self.y_labels), default=0))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[-1] - self.y[0]) or 1.0)
        inner = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + inner[0] * across, self.height - self.bottom - inner[1] * up

    def drawn(self, x_labels: Iterable[tuple[float, str]]) -> list[str]:
        """Lines, figures and names of the axes."""
        right, floor = self.width - self.right, self.height - self.bottom
        parts = []
        for value, shown in zip(self.y, self.y_labels, strict=True):
            y = self.at(self.x[0], value)[1]
            parts.append(f'<path class="grid" d="M{self.left:g} {y:.1f}H{right}"/>')
            parts.append(label(self.left - 5, y + 4, shown, "end"))
        for value, said in x_labels:
            parts.append(label(self.at(value, self.y[0])[0], floor + 15, said, "middle"))
        parts.append(label((self.left + right) / 2, self.height - 6, self.x_name, "middle"))
        middle = (self.top + floor) / 2
        turned = f' transform="rotate(-90 11 {middle:.1f})"'
        return [*parts, label(11, middle, self.y_name, "middle", turned)]

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> str:
        """The points joined."""
        joined = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        return f'<polyline class="{kind}" points="{joined}"/>'

    def dot(self, x: float, y: float, kind: str, tip: str, radius: float = 3) -> str:
        """A point with words that show on it."""
        left, top = self.at(x, y)
        return (
            f'<circle class="{kind}" cx="{left:.1f}" cy="{top:.1f}" r="{radius:g}"><title>{text(tip)}</title></circle>'
        )
