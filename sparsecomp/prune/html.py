"""A pruning report as one self-contained HTML page, its plots as inline SVG.

Takes a ``PruneReport``, gives text. Computes nothing but what it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsecomp.patterns import NM, VNM

if TYPE_CHECKING:
    from sparsecomp.prune.report import PruneReport
    from sparsecomp.prune.tuning import TuningReport

# colours that stay apart for readers who do not see red and green as different
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_LINES = (_BLUE, _ORANGE, _GREEN, _PURPLE)
_MAP_ROWS, _MAP_COLUMNS = 32, 64
_CELL = 4
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px } th, td { padding: 2px 10px; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { display: inline-block; margin: 0 14px 14px 0; vertical-align: top } figcaption { font-size: 12px; color: #555 }
p.note { color: #555; font-size: 13px } .scroll { overflow-x: auto }
"""


def page(report: PruneReport, title: str) -> str:
    """The whole page; it refers to nothing outside itself."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(report.layers)} layers with <b>{escape(report.method)}</b>: {report.density:.1%} of their "
        f"weights kept, mean layer error {report.mean_error:.4f} (geometric), "
        f"{report.seconds:.0f} s for the layers.</p>",
    ]
    sections = (
        ("Stage by stage", _stages(report)),
        ("Error by layer", _errors(report)),
        ("Tuning", "".join(_figure(_curve(each), str(each)) for each in report.tunings)),
        ("Kept positions within a group", _positions(report)),
        (f"Masks (the first {_MAP_ROWS} rows and {_MAP_COLUMNS} columns, kept weights dark)", _maps(report)),
        ("Layers", _table(report)),
        ("Notes", "".join(_note(each.name, note) for each in report.layers.values() for note in each.notes)),
        ("Left dense", _reasons(report.skipped)),
        ("Input channels not permuted", _reasons(report.unpermuted)),
    )
    parts.extend(f"<h2>{heading}</h2>\n{body}" for heading, body in sections if body)
    return "\n".join([*parts, "</body></html>", ""])


def _errors(report: PruneReport) -> str:
    """Horizontal bars: calibration error, and held-out error where there is one."""
    layers = list(report.layers.values())
    if not layers:
        return ""
    left, width, step = 300, 560, 22
    values = [value for each in layers for value in (each.error, each.held_out_error or 0.0) if math.isfinite(value)]
    top = max([*values, 1e-12])
    height = step * len(layers) + 30
    parts = []
    for i, layer in enumerate(layers):
        y = i * step + 4
        parts.append(_text(left - 8, y + 12, layer.name or "(the model)", "end"))
        bars = [(layer.error, _BLUE, "calibration")]
        if layer.held_out_error is not None:
            bars.append((layer.held_out_error, _ORANGE, "held out"))
        for k, (value, colour, what) in enumerate(bars):
            long = width * (value / top if math.isfinite(value) else 1.0)
            tip = f"{layer.name}: {what} error {value:.4f}"
            parts.append(
                f'<rect x="{left}" y="{y + 8 * k}" width="{max(long, 0.5):.1f}" height="7" fill="{colour}">'
                f"<title>{escape(tip)}</title></rect>"
            )
        longest = min(max(layer.error, layer.held_out_error or 0.0) / top, 1.0)
        figures = " / ".join(f"{value:.4f}" for value, _, _ in bars)
        parts.append(_text(left + width * longest + 6, y + 11, figures, "start", 10))
    key = _text(left, height - 6, "blue: calibration data", "start") + _text(
        left + 160, height - 6, "orange: held out", "start"
    )
    return f'<div class="scroll">{_svg(left + width + 110, height, [*parts, key], "Relative error by layer")}</div>'


def _stages(report: PruneReport) -> str:
    """A table, and one small plot for each figure that several stages have."""
    if not report.stages:
        return ""
    figures = list(dict.fromkeys(name for stage in report.stages for name in stage.figures))
    head = "".join(f"<th>{escape(each)}</th>" for each in ("stage", *figures, "seconds"))
    rows = []
    for stage in report.stages:
        cells = [f"<td>{escape(stage.name)}</td>"]
        cells += [_number(f"{stage.figures[name]:.4f}" if name in stage.figures else "") for name in figures]
        rows.append(f"<tr>{''.join(cells)}{_number(f'{stage.seconds:.0f}')}</tr>")
    plots = []
    for colour, name in zip(_LINES * len(figures), figures, strict=False):
        points = [(stage.name, stage.figures[name]) for stage in report.stages if name in stage.figures]
        if len(points) > 1:
            plots.append(_steps(points, colour, name))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table><p></p>{''.join(plots)}"


def _steps(points: Sequence[tuple[str, float]], colour: str, title: str) -> str:
    """Vertical bars, one a stage, on an axis that shows the differences."""
    values = [value for _, value in points if math.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    base = max(0.0, low - 0.35 * (high - low)) if high > low else 0.0
    width, height, bar = 70 * len(points) + 20, 190, 46
    parts = []
    for i, (name, value) in enumerate(points):
        share = (value - base) / (high - base) if high > base else 1.0
        tall = 120 * share if math.isfinite(value) else 0.0
        x = 20 + 70 * i
        parts.append(f'<rect x="{x}" y="{145 - tall:.1f}" width="{bar}" height="{tall:.1f}" fill="{colour}"/>')
        parts.append(_text(x + bar / 2, 140 - tall, f"{value:.4f}", "middle", 11))
        for line, word in enumerate(_wrapped(name)):
            parts.append(_text(x + bar / 2, 159 + 11 * line, word, "middle", 9))
    return _figure(_svg(width, height, parts, title), f"{title} (the axis starts at {base:.3g})")


def _wrapped(name: str) -> list[str]:
    lines = [""]
    for word in name.split():
        if lines[-1] and len(lines[-1]) + len(word) > 11:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:3]


def _curve(tuning: TuningReport) -> str:
    """The held-out loss while tuning, with the step that was kept."""
    points = [(step, loss) for step, loss in tuning.curve if math.isfinite(loss)]
    width, height = 260, 130
    if not points:
        return _svg(width, height, [_text(10, 60, "the loss was not finite", "start")], tuning.name)
    top = max(loss for _, loss in points) or 1.0
    last = max(tuning.steps, 1)

    def at(step: int, loss: float) -> str:
        return f"{20 + 220 * step / last:.1f},{110 - 95 * loss / top:.1f}"

    line = " ".join(at(*point) for point in points)
    best = at(tuning.best_step, tuning.held_out_after).split(",")
    return _svg(
        width,
        height,
        [
            '<line x1="20" x2="240" y1="110" y2="110" stroke="#999"/>',
            f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="2"/>',
            f'<circle cx="{best[0]}" cy="{best[1]}" r="4" fill="{_ORANGE}"/>',
            _text(20, 124, "0", "middle", 9),
            _text(240, 124, f"step {tuning.steps}", "end", 9),
            _text(20, 10, f"{tuning.name}: held-out loss", "start", 10),
        ],
        tuning.name,
    )


def _positions(report: PruneReport) -> str:
    """For each pattern with groups, how often each position of a group is kept, over all its layers."""
    counts: dict[str, Tensor] = {}
    groups: dict[str, int] = {}
    for name, mask in report.masks.items():
        pattern = report.layers[name].pattern
        if not isinstance(pattern, NM | VNM) or mask.numel() == 0:
            continue
        whole = mask[:, : mask.shape[1] // pattern.m * pattern.m].reshape(-1, pattern.m)
        key = str(pattern)
        counts[key] = counts.get(key, torch.zeros(pattern.m, dtype=torch.float64)) + whole.double().sum(dim=0).cpu()
        groups[key] = groups.get(key, 0) + whole.shape[0]
    parts = []
    for key, count in counts.items():
        shares = (count / max(groups[key], 1)).tolist()
        bars = []
        for i, share in enumerate(shares):
            x = 24 + 26 * i
            bars.append(
                f'<rect x="{x}" y="{110 - 90 * share:.1f}" width="20" height="{90 * share:.1f}" fill="{_BLUE}"/>'
            )
            bars.append(_text(x + 10, 106 - 90 * share, f"{100 * share:.0f}", "middle", 9))
            bars.append(_text(x + 10, 124, str(i), "middle", 9))
        drawn = _svg(40 + 26 * len(shares), 132, bars, f"Kept positions, {key}")
        parts.append(_figure(drawn, f"{key}: % of groups that keep the position"))
    return "".join(parts)


def _maps(report: PruneReport) -> str:
    parts = []
    for name, mask in report.masks.items():
        corner = mask[:_MAP_ROWS, :_MAP_COLUMNS].cpu()
        if corner.numel() == 0:
            continue
        runs = "".join(f"M{start} {row}h{stop - start}v1h{start - stop}z" for row, start, stop in _runs(corner))
        size = f'width="{_CELL * corner.shape[1]}" height="{_CELL * corner.shape[0]}"'
        drawn = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {corner.shape[1]} {corner.shape[0]}">'
            f'<title>{escape(name)}</title><rect width="100%" height="100%" fill="#eef2f5"/>'
            f'<path d="{runs}" fill="#1f2d3d"/></svg>'
        )
        parts.append(_figure(drawn, name or "(the model)"))
    return "".join(parts)


def _runs(mask: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, first column, column after the last) of each run of kept weights."""
    for row, kept in enumerate(mask.tolist()):
        start = None
        for column, one in enumerate([*kept, False]):
            if one and start is None:
                start = column
            elif not one and start is not None:
                yield row, start, column
                start = None


def _table(report: PruneReport) -> str:
    columns = ("layer", "out x in", "pattern", "kept", "error", "held out", "seconds", "permuted")
    rows = []
    for layer in report.layers.values():
        held = "" if layer.held_out_error is None else f"{layer.held_out_error:.4f}"
        cells = [f"<td>{escape(layer.name or '(the model)')}</td>", f"<td>{layer.shape[0]} x {layer.shape[1]}</td>"]
        cells += [f"<td>{layer.pattern}</td>", _number(f"{layer.density:.1%}"), _number(f"{layer.error:.4f}")]
        cells += [_number(held), _number(f"{layer.seconds:.2f}"), f"<td>{'yes' if layer.permuted else ''}</td>"]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{each}</th>" for each in columns)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _reasons(reasons: Mapping[str, str]) -> str:
    return "".join(_note(*each) for each in reasons.items())


def _note(name: str, text: str) -> str:
    return f'<p class="note">{escape(name or "(the model)")}: {escape(text)}</p>'


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'{head} font-family="sans-serif"><title>{escape(title)}</title>{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
