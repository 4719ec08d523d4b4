"""A pruning report as plain text whose tables fit the terminal.

Takes a ``PruneReport``, gives lines. Computes nothing but what it prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsecomp.display import fits, label, table

if TYPE_CHECKING:
    from sparsecomp.prune.report import LayerReport, PruneReport

_NAMES_PER_REASON = 3
# from so many layers on, equal layers of several blocks share a line
_MANY = 24
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

_LEGEND = {
    "gram": "Error: ||(W-V)X|| / ||WX|| on the calibration data.",
    "weight": "Error: ||W-V|| / ||W|| of the weights alone; there were no calibration data.",
    "mixed": "Error: ||(W-V)X|| / ||WX|| on the calibration data; *: ||W-V|| / ||W||, not in the calibration.",
}


def render(report: PruneReport) -> str:
    """The whole report."""
    layers = list(report.layers.values())
    count = f"{len(layers)} layer" + ("s" if len(layers) != 1 else "")
    measures = {layer.measured_on for layer in layers}
    mixed = len(measures) > 1
    lines = [_layers(layers, f'Pruned {count} with "{report.method}"', mixed)]
    if layers:
        lines.append(
            f"In all: {report.density:.1%} of the weights kept, mean error {error_text(report.mean_error)} "
            f"(geometric), {report.seconds:.1f} s"
        )
        lines.append(_LEGEND["mixed" if mixed else measures.pop()])
    lines.extend(_few_rows(layers))
    lines.extend(f"{layer.name}: {note}" for layer in layers for note in layer.notes)
    if report.skipped:
        lines.append(_by_reason("Left dense", report.skipped))
    if report.unpermuted:
        lines.append(_by_reason("Input channels not permuted", report.unpermuted))
    lines.extend(map(str, report.tunings))
    if report.stages:
        lines.append(_stages(report))
    return "\n".join(lines + _provenance(report))


def error_text(error: float) -> str:
    """A relative error as it is printed everywhere."""
    return "0" if error == 0.0 else f"{error:.4f}" if not error < 5e-4 else f"{error:.1e}"


def role(name: str) -> str:
    """The name with a star for each number: the layers of one role in all the blocks have the same."""
    return _NUMBER.sub("*", name)


def _layers(layers: Sequence[LayerReport], title: str, mixed: bool) -> str:
    groups: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in layers:
        key = (role(layer.name), layer.shape, layer.pattern, layer.method, layer.measured_on)
        groups.setdefault(key, []).append(layer)
    if len(layers) > _MANY and len(groups) <= len(layers) / 2:
        title += "; equal layers share a line, which has their worst errors"
        gathered = list(groups.values())
    else:
        gathered = [[layer] for layer in layers]
    names = [label([layer.name for layer in group]) for group in gathered]
    columns, notes = _columns(gathered, mixed), []
    if not fits(["layer", *columns], zip(names, *columns.values(), strict=True)):
        same = [name for name in ("pattern", ">kept") if len(set(columns[name])) == 1]
        said = ", ".join(f"{name.removeprefix('>')} {columns[name][0]}" for name in same)
        notes = [f"All layers: {said}."] if same else []
        columns = {name: cells for name, cells in columns.items() if name not in same}
    return "\n".join([table(["layer", *columns], list(zip(names, *columns.values(), strict=True)), title), *notes])


def _columns(groups: Sequence[Sequence[LayerReport]], mixed: bool) -> dict[str, list[str]]:
    """Cells by column, one a group; a group shows its worst errors and all its time."""
    layers = [layer for group in groups for layer in group]
    columns = {">out x in": [f"{group[0].shape[0]} x {group[0].shape[1]}" for group in groups]}
    columns["pattern"] = [str(group[0].pattern) for group in groups]
    columns[">kept"] = [f"{sum(each.density for each in group) / len(group):.1%}" for group in groups]
    star = {True: "*", False: ""}
    columns[">error"] = [
        error_text(max(each.error for each in group)) + star[mixed and group[0].measured_on == "weight"]
        for group in groups
    ]
    if any(layer.held_out_error is not None for layer in layers):
        held = [[each.held_out_error for each in group if each.held_out_error is not None] for group in groups]
        columns[">held out"] = [error_text(max(errors)) if errors else "" for errors in held]
    if any(layer.rows is not None for layer in layers):
        columns[">rows/in"] = [_rows(group) for group in groups]
    seconds = [sum(each.seconds for each in group) for group in groups]
    columns[">seconds"] = [f"{each:.2f}" if each >= 0.005 else "<0.01" for each in seconds]
    if any(layer.permuted for layer in layers):
        counts = [sum(each.permuted for each in group) for group in groups]
        columns["permuted"] = [
            "" if not count else "yes" if count == len(group) else f"{count} of {len(group)}"
            for count, group in zip(counts, groups, strict=True)
        ]
    return columns


def _rows(group: Sequence[LayerReport]) -> str:
    known = [(each.rows_per_input, each) for each in group if each.rows_per_input is not None]
    if not known:
        return ""
    least, layer = min(known, key=lambda each: each[0])
    return ratio_text(least) + ("!" if layer.few_rows else "")


def ratio_text(ratio: float) -> str:
    """Rows for each input, in three figures or so."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"


def _few_rows(layers: Sequence[LayerReport]) -> list[str]:
    few = [layer for layer in layers if layer.few_rows]
    if not few:
        return []
    worst = min(few, key=lambda each: each.rows_per_input or 0.0)
    return [
        f"!: {len(few)} of {len(layers)} layers saw fewer than 4 rows of calibration for each input "
        f'("{worst.name or "the model"}": {worst.rows:,} rows, {worst.shape[1]:,} inputs): their masks fit these rows, '
        "and their errors look better than they are; calibrate on more"
    ]


def _by_reason(title: str, reasons: Mapping[str, str]) -> str:
    lines = [f"{title}: {len(reasons)}"]
    for reason, names in by_reason(reasons).items():
        more = f" and {len(names) - _NAMES_PER_REASON} more" if len(names) > _NAMES_PER_REASON else ""
        lines.append(f"  {', '.join(names[:_NAMES_PER_REASON])}{more}: {reason}")
    return "\n".join(lines)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that each reason is given for."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "(the model)")
    return names


def _stages(report: PruneReport) -> str:
    figures = list(dict.fromkeys(name for stage in report.stages for name in stage.figures))
    rows = [
        [
            stage.name,
            *(f"{stage.figures[name]:.4f}" if name in stage.figures else "" for name in figures),
            f"{stage.seconds:.0f}",
        ]
        for stage in report.stages
    ]
    return table(["stage", *(f">{name}" for name in figures), ">seconds"], rows, title="Stage by stage")


def count_text(count: int) -> str:
    """A number of weights as one says it."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def _provenance(report: PruneReport) -> list[str]:
    told = report.provenance
    if told is None:
        return []
    share = f", {report.weights / told.model.parameters:.0%} of them in pruned layers" if told.model.parameters else ""
    seed = "" if told.seed is None else f", seed {told.seed}"
    versions = ", ".join(f"{name} {version}" for name, version in told.versions.items())
    return [
        f"{told.model.name}: {count_text(told.model.parameters)} parameters{share}",
        f"{told.created}{seed}, {versions}",
    ]


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
