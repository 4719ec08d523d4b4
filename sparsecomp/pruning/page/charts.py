"""Charts of the page, each only where it shows what the table does not: error by depth, tuning, stages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsecomp.reporting.figures import change_text, error_text, role, seconds_text
from sparsecomp.reporting.markup import Axes, figure, label, name_text, section, svg, text, ticks

if TYPE_CHECKING:
    from sparsecomp.pruning.report import LayerReport, PruneReport
    from sparsecomp.pruning.tuning import TuningReport

# a curve needs so many layers of one role; errors nearer to each other than this make a flat one
_POINTS, _FLAT = 5, 1.1
_MOST_PANELS = 12
_CURVES_SHOWN = 6
_TUNED = ("tuned", "held-out loss", "change", "trained-on loss", "kept step", "time")


def depth(report: PruneReport) -> str:
    """Error against the place in the model, a panel for each role of layer, all on one scale."""
    roles: dict[str, list[LayerReport]] = {}
    for layer in report.layers.values():
        if math.isfinite(layer.error):
            roles.setdefault(role(layer.name), []).append(layer)
    panels = {name: layers for name, layers in roles.items() if len(layers) >= _POINTS}
    errors = [layer.error for layers in panels.values() for layer in layers]
    if not errors or max(errors) < _FLAT * min(errors):
        return ""
    held = [
        layer.held_out_error
        for layers in panels.values()
        for layer in layers
        if layer.held_out_error is not None and math.isfinite(layer.held_out_error)
    ]
    scale = ticks(0.0, max([*errors, *held]))
    drawn = "".join(_panel(name, layers, scale) for name, layers in list(panels.items())[:_MOST_PANELS])
    key = '<span class="line"><span class="key a"></span> calibration rows</span>'
    if held:
        key += ' <span class="line"><span class="key b"></span> held-out rows</span>'
    more = len(panels) - _MOST_PANELS
    rest = f" {more} more kinds of layers are in the table only." if more > 0 else ""
    said = f'<p class="note">Layers of one kind in the model\u2019s order, all panels on one scale. {key}.{rest}</p>'
    return section("Error by depth", f'{said}\n<div class="figures">{drawn}</div>', "depth")


def _panel(name: str, layers: Sequence[LayerReport], scale: Sequence[float]) -> str:
    axes = Axes((0, len(layers) - 1), scale, "block", "error", width=270, height=160)
    places = [(i, _number(layer.name, i)) for i, layer in enumerate(layers)]
    step = max(1, math.ceil(len(layers) / 8))
    parts = axes.drawn([each for each in places if each[0] % step == 0])
    held = [
        (i, layer.held_out_error)
        for i, layer in enumerate(layers)
        if layer.held_out_error is not None and math.isfinite(layer.held_out_error)
    ]
    if held:
        parts.append(axes.line(held, "b"))
        parts += [axes.dot(i, value, "b", f"{layers[i].name}: held out {error_text(value)}", 2.5) for i, value in held]
    points = [(i, layer.error) for i, layer in enumerate(layers)]
    parts.append(axes.line(points, "a"))
    parts += [axes.dot(i, value, "a", f"{layers[i].name}: {error_text(value)}", 2.5) for i, value in points]
    return figure(svg(axes.width, axes.height, parts, f"Error by depth, {name}"), f"<code>{name_text(name)}</code>")


def _number(name: str, place: int) -> str:
    found = re.search(r"(?<![^.])\d+(?![^.])", name)
    return found[0] if found else str(place)


def tunings(report: PruneReport) -> str:
    """A table of all tunings, and the curve of each: of many in a part that is closed at first."""
    if not report.tunings:
        return ""
    rows = "".join(_tuning_row(each) for each in report.tunings)
    heads = "".join(f'<th scope="col"{"" if head == "tuned" else " class=n"}>{head}</th>' for head in _TUNED)
    table = (
        f'<div class="scroll"><table class="stack"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    note = (
        '<p class="note">Losses are relative squared errors against what the dense model returns there, before and '
        "after. Held-out batches are not trained on; the step that is best on them is kept (the ring), 0 is the state "
        "before.</p>"
    )
    curves = f'<div class="figures">{"".join(map(_curve, report.tunings))}</div>'
    if len(report.tunings) > _CURVES_SHOWN:
        curves = f"<details><summary>{len(report.tunings)} curves</summary>{curves}</details>"
    return section("Tuning", f"{note}\n{table}\n{curves}", "tuning")


def _tuning_row(each: TuningReport) -> str:
    before, after = each.held_out_before, each.held_out_after
    stopped = f"<br><span class=note>{text(each.stopped)}</span>" if each.stopped else ""
    cells = (
        f"{before:.4g} \u2192 {after:.4g}",
        change_text(before, after),
        f"{each.train_before:.4g} \u2192 {each.train_after:.4g}",
        f"{each.best_step} of {each.steps}",
        seconds_text(each.seconds),
    )
    numbers = "".join(
        f'<td class=n data-h="{head}">{text(cell)}</td>' for head, cell in zip(_TUNED[1:], cells, strict=True)
    )
    return f"<tr><th scope=row>{name_text(each.name)}{stopped}</th>{numbers}</tr>"


def _curve(tuning: TuningReport) -> str:
    points = [(step, loss) for step, loss in tuning.curve if math.isfinite(loss)]
    title = f"{tuning.name}: held-out loss"
    if not points:
        return figure(
            svg(300, 40, [label(8, 24, "the loss was not finite")], title), f"<code>{name_text(tuning.name)}</code>"
        )
    losses = [loss for _, loss in points]
    last = max(tuning.steps, 1)
    axes = Axes((0, last), ticks(min(losses), max(losses)), "step", "held-out loss")
    parts = axes.drawn([(0, "0"), (last / 2, f"{last / 2:g}"), (last, f"{last}")])
    parts.append(axes.line(points, "a"))
    parts += [axes.dot(step, loss, "a", f"step {step}: {loss:.4g}", 2.5) for step, loss in points]
    if math.isfinite(tuning.held_out_after):
        tip = f"step {tuning.best_step} was kept: {tuning.held_out_after:.4g}"
        parts.append(axes.dot(tuning.best_step, tuning.held_out_after, "b ring", tip, 5))
    return figure(
        svg(axes.width, axes.height, parts, title),
        f"<code>{name_text(tuning.name)}</code>",
    )


def stages(report: PruneReport) -> str:
    """What was measured after each step of the work: a table, and a line for each figure that several have."""
    if not report.stages:
        return ""
    figures = list(dict.fromkeys(name for stage in report.stages for name in stage.figures))
    heads = "".join(f'<th scope="col" class=n>{text(each)}</th>' for each in (*figures, "time"))
    rows = []
    for i, stage in enumerate(report.stages, 1):
        cells = [(name, f"{stage.figures[name]:.4f}" if name in stage.figures else "") for name in figures]
        cells.append(("time", seconds_text(stage.seconds)))
        numbers = "".join(f'<td class=n data-h="{text(head)}">{cell}</td>' for head, cell in cells)
        rows.append(f"<tr><td class=n>{i}</td><th scope=row>{text(stage.name)}</th>{numbers}</tr>")
    table = (
        f'<div class="scroll"><table class="stack"><thead><tr><th scope="col" class=n>#</th>'
        f'<th scope="col">stage</th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    drawn = "".join(_progress(report, name) for name in figures)
    return section("Stage by stage", table + (f'\n<div class="figures">{drawn}</div>' if drawn else ""), "stages")


def _progress(report: PruneReport, name: str) -> str:
    points = [
        (i, stage.figures[name], stage.name)
        for i, stage in enumerate(report.stages, 1)
        if math.isfinite(stage.figures.get(name, math.nan))
    ]
    if len(points) < 2:
        return ""
    values = [value for _, value, _ in points]
    axes = Axes((0.5, len(report.stages) + 0.5), ticks(min(values), max(values)), "stage", name)
    parts = axes.drawn([(i, str(i)) for i in range(1, len(report.stages) + 1)])
    parts.append(axes.line([(i, value) for i, value, _ in points], "a"))
    parts += [axes.dot(i, value, "a", f"{stage}: {value:.4f}", 4) for i, value, stage in points]
    return figure(svg(axes.width, axes.height, parts, f"{name} by stage"))
