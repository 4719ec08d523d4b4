"""A pruning report as plain text whose tables fit the terminal.

Takes a ``PruneReport``, gives lines. Computes nothing but what it prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsecomp.reporting.figures import (
    by_kind,
    by_reason,
    change_text,
    count_text,
    error_text,
    ratio_text,
    role,
    share_text,
)
from sparsecomp.reporting.terminal import fits, label, quoted, table, wrap

if TYPE_CHECKING:
    from sparsecomp.pruning.report import LayerReport, PruneReport
    from sparsecomp.pruning.tuning import TuningReport

_NAMES_PER_REASON = 3
_NOTES_PER_KIND = 4
# more tunings than these are a table
_TUNINGS_SAID = 3
# from so many layers on, equal layers of several blocks share a line
_MANY = 24

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
        said = (
            f"In all: {report.density:.1%} of the weights kept, mean error {error_text(report.mean_error)} "
            f"(geometric), {report.seconds:.1f} s"
        )
        lines += [wrap(said), wrap(_LEGEND["mixed" if mixed else measures.pop()])]
    lines.extend(map(wrap, _few_rows(layers)))
    lines.extend(map(wrap, _notes(layers)))
    if dense := sum(layer.runs_dense for layer in layers):
        lines.append(
            wrap(
                f"{dense} of {len(layers)} {'stays' if dense == 1 else 'stay'} dense in execution: convolutions larger "
                "than 1x1, or padded, have zeros that no kernel here skips"
            )
        )
    if report.skipped:
        lines.append(_by_reason("Left dense", report.skipped))
    if report.unpermuted:
        lines.append(_by_reason("Input channels not permuted", report.unpermuted))
    if len(report.tunings) > _TUNINGS_SAID:
        lines.append(_tunings(report.tunings))
    else:
        lines.extend(wrap(str(each)) for each in report.tunings)
    if report.stages:
        lines.append(_stages(report))
    return "\n".join([*lines, *map(wrap, _provenance(report))])


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
    names = [[layer.name for layer in group] for group in gathered]
    columns, notes = _columns(gathered, mixed), []
    for narrower in (_without_uniform, _without_beginning, _without_seconds):
        cells = list(zip(map(label, names), *columns.values(), strict=True))
        if fits(["layer", *columns], cells):
            break
        names, columns, note = narrower(names, columns)
        notes += note
    cells = list(zip(map(label, names), *columns.values(), strict=True))
    return "\n".join([table(["layer", *columns], cells, title), *notes])


Names = list[list[str]]
Columns = dict[str, list[str]]


def _without_uniform(names: Names, columns: Columns) -> tuple[Names, Columns, list[str]]:
    """The columns pattern and kept go where they say the same in each row; a line says it instead."""
    same = [name for name in ("pattern", ">kept") if len(set(columns[name])) == 1]
    said = ", ".join(f"{name.removeprefix('>')} {columns[name][0]}" for name in same)
    rest = {name: cells for name, cells in columns.items() if name not in same}
    return names, rest, [f"All layers: {said}."] if same else []


def _without_beginning(names: Names, columns: Columns) -> tuple[Names, Columns, list[str]]:
    """What all names begin with goes, or what those of several blocks do where other layers stand beside them."""
    starred = [[role(name) if len(group) > 1 else name for name in group] for group in names]
    several = [name.split(".") for group in starred if len(group) > 1 for name in group]
    parts = several or [name.split(".") for group in starred for name in group]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    beginning = ".".join(parts[0][:shared]) + "."
    if not shared or sum(map(len, names)) == 1:
        return names, columns, []
    everywhere = all(name.startswith(beginning) for group in starred for name in group)
    mark = "" if everywhere else "\u2026"

    def short(name: str, star: str) -> str:
        return mark + ".".join(name.split(".")[shared:]) if star.startswith(beginning) else name

    shorter = [[short(*each) for each in zip(*pair, strict=True)] for pair in zip(names, starred, strict=True)]
    return shorter, columns, [f"{f'{mark} stands for' if mark else 'All names begin with'} {beginning}"]


def _without_seconds(names: Names, columns: Columns) -> tuple[Names, Columns, list[str]]:
    return names, {name: cells for name, cells in columns.items() if name != ">seconds"}, []


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


def _notes(layers: Sequence[LayerReport]) -> list[str]:
    """The notes, of many that differ in figures only the first few."""
    lines = []
    for notes in by_kind((layer.name, note) for layer in layers for note in layer.notes).values():
        shown = notes[:_NOTES_PER_KIND]
        lines += [f"{quoted(name)}: {note}" for name, note in shown]
        if len(notes) > len(shown):
            lines.append(f"... and {len(notes) - len(shown)} more such notes, in the report as .json, .csv and .html")
    return lines


def _by_reason(title: str, reasons: Mapping[str, str]) -> str:
    lines = [f"{title}: {len(reasons)}"]
    for reason, names in by_reason(reasons).items():
        more = f" and {len(names) - _NAMES_PER_REASON} more" if len(names) > _NAMES_PER_REASON else ""
        said = f"  {', '.join(names[:_NAMES_PER_REASON])}{more}: {reason}"
        lines.append(wrap(said, indent="    "))
    return "\n".join(lines)


def _tunings(tunings: Sequence[TuningReport]) -> str:
    """Many tunings as a table; why one stopped early stands below it."""
    rows = [
        [
            each.name,
            f"{each.held_out_before:.4g}",
            f"{each.held_out_after:.4g}",
            change_text(each.held_out_before, each.held_out_after),
            f"{each.best_step} of {each.steps}",
            f"{each.seconds:.0f}",
        ]
        for each in tunings
    ]
    columns = ["tuned", ">held-out loss", ">after", ">change", ">kept step", ">seconds"]
    stopped = [wrap(f"{quoted(each.name)}: {each.stopped}") for each in tunings if each.stopped]
    return "\n".join([table(columns, rows, title="Tuning"), *stopped])


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


def _provenance(report: PruneReport) -> list[str]:
    told = report.provenance
    if told is None:
        return []
    share = ""
    if told.model.parameters:
        share = f", {share_text(report.weights, told.model.parameters)} of them in pruned layers"
    seed = "" if told.seed is None else f", seed {told.seed}"
    versions = ", ".join(f"{name} {version}" for name, version in told.versions.items())
    return [
        f"{told.model.name}: {count_text(told.model.parameters)} parameters{share}",
        f"{told.created}{seed}, {versions}",
    ]
