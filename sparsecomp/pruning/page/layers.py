"""The tables of the page: layers, to be sorted and filtered, then notes and what was left dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsecomp.reporting.figures import by_kind, by_reason, count_text, error_text, ratio_text
from sparsecomp.reporting.markup import name_text, section, text

if TYPE_CHECKING:
    from sparsecomp.pruning.report import LayerReport, PruneReport

# longer tables scroll inside a box of their own, so that what follows stays near
_LONG_TABLE = 30
_NAMES_SHOWN = 4
_NAME_COLUMN = 2


@dataclass(frozen=True)
class _Column:
    """``cell`` gives a layer's whole <td>; ``number`` columns sort by value, the largest first."""

    head: str
    cell: Callable[[LayerReport], str]
    number: bool = True


def layer_table(report: PruneReport) -> str:
    """One row a layer; columns that say nothing, for every row has the same, are left out."""
    layers = list(report.layers.values())
    if not layers:
        return ""
    columns = _columns(layers)
    heads = "".join(
        f'<th scope="col"{" class=n" if each.number else ""}{" aria-sort=ascending" if i == 0 else ""}>'
        f'<button type="button">{text(each.head)}</button></th>'
        for i, each in enumerate(columns)
    )
    rows = "\n".join(
        f"<tr><td class=n>{i}</td>{''.join(each.cell(layer) for each in columns[1:])}</tr>"
        for i, layer in enumerate(layers, 1)
    )
    long = " long" if len(layers) > _LONG_TABLE else ""
    return (
        '<p class="filter" hidden><label>Show layers whose line has <input type="search" autocomplete="off" '
        f'spellcheck="false"></label> <output aria-live="polite">{len(layers)} of {len(layers)}</output></p>\n'
        f'<div class="scroll{long}" role="region" aria-label="Layers" tabindex="0">\n'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
        f"{_alike(layers)}"
    )


def card_style(report: PruneReport) -> str:
    """On a narrow screen rows become cards, in which each figure has its column's name before it."""
    columns = _columns(list(report.layers.values())) if report.layers else []
    named = "".join(
        f'  .sortable td:nth-child({i})::before {{ content: "{text(each.head)}" }}\n'
        for i, each in enumerate(columns, 1)
        if i > _NAME_COLUMN
    )
    return f"@media (max-width: 640px) {{\n{named}}}\n"


def _columns(layers: Sequence[LayerReport]) -> list[_Column]:
    finite = [layer.error for layer in layers if math.isfinite(layer.error)]
    top = max([*finite, 1e-12])

    def error(layer: LayerReport) -> str:
        share = 100.0 * layer.error / top if math.isfinite(layer.error) else 100.0
        star = "*" if layer.measured_on == "weight" else ""
        value = layer.error if math.isfinite(layer.error) else "Infinity"
        return f'<td class="n bar" style="--w:{share:.0f}%" data-v="{value}">{error_text(layer.error)}{star}</td>'

    def shape(layer: LayerReport) -> str:
        out, columns = layer.shape
        return f'<td class=n data-v="{out * columns}">{out} x {columns}</td>'

    def held(layer: LayerReport) -> str:
        value = layer.held_out_error
        return f"<td class=n>{'' if value is None else error_text(value)}</td>"

    def rows(layer: LayerReport) -> str:
        ratio = layer.rows_per_input
        if ratio is None:
            return "<td class=n></td>"
        mark = ' class="n few"' if layer.few_rows else " class=n"
        tip = f"{layer.rows:,} rows, {layer.shape[1]:,} inputs"
        return f'<td{mark} data-v="{ratio:.6g}" title="{tip}">{ratio_text(ratio)}{"!" if layer.few_rows else ""}</td>'

    found = [
        _Column("#", lambda layer: ""),
        _Column("layer", lambda layer: f"<th scope=row>{name_text(layer.name)}</th>", number=False),
        _Column("out x in", shape),
    ]
    if len({layer.pattern for layer in layers}) > 1:
        found.append(_Column("pattern", lambda layer: f"<td>{text(layer.pattern)}</td>", number=False))
    if len({layer.method for layer in layers}) > 1:
        found.append(_Column("method", lambda layer: f"<td>{text(layer.method)}</td>", number=False))
    if len({f"{layer.density:.1%}" for layer in layers}) > 1:
        found.append(_Column("kept", lambda layer: f"<td class=n>{layer.density:.1%}</td>"))
    found.append(_Column("error", error))
    if any(layer.held_out_error is not None for layer in layers):
        found.append(_Column("held out", held))
    if any(layer.rows is not None for layer in layers):
        found.append(_Column("rows/input", rows))
    found.append(_Column("seconds", lambda layer: f"<td class=n>{layer.seconds:.2f}</td>"))
    if any(layer.permuted for layer in layers):
        found.append(_Column("permuted", lambda layer: f"<td>{'yes' if layer.permuted else ''}</td>", number=False))
    if any(layer.runs_dense for layer in layers):
        found.append(_Column("runs dense", lambda layer: f"<td>{'yes' if layer.runs_dense else ''}</td>", number=False))
    return found


def _alike(layers: Sequence[LayerReport]) -> str:
    """What holds for all rows and has no column."""
    said = []
    if len({layer.pattern for layer in layers}) == 1:
        said.append(f"pattern {layers[0].pattern}")
    if len({f"{layer.density:.1%}" for layer in layers}) == 1:
        said.append(f"{layers[0].density:.1%} kept")
    return f'<p class="note">All layers: {text(", ".join(said))}.</p>' if said and len(layers) > 1 else ""


def notes(report: PruneReport) -> str:
    """Each note once with its layers, those that differ in their figures together."""
    found = by_kind((layer.name, note) for layer in report.layers.values() for note in layer.notes)
    alike, items = {}, ""
    for kind, each in found.items():
        if len({note for _, note in each}) == 1:
            alike[kind] = [name or "(the model)" for name, _ in each]
            continue
        lines = "".join(f"<li><code>{name_text(name)}</code>: {text(note)}</li>" for name, note in each)
        listed = f"<ul>{lines}</ul>"
        if len(each) > _NAMES_SHOWN:
            listed = f"<details><summary>{len(each)} notes</summary>{listed}</details>"
        items += f"<li><p>{text(kind)} <span class=note>({len(each)} layers)</span></p>{listed}</li>"
    told = _listed(alike, {}) + (f'<ul class="reasons">{items}</ul>' if items else "")
    return section("Notes", told, "notes")


def left_dense(report: PruneReport) -> str:
    """The reasons, and the layers that each holds for with their weights."""
    weights = {} if report.provenance is None else report.provenance.model.left_dense
    return section("Left dense", _listed(by_reason(report.skipped), weights), "left-dense")


def unpermuted(report: PruneReport) -> str:
    """The same for input channels that stayed in order."""
    return section("Input channels not permuted", _listed(by_reason(report.unpermuted), {}), "unpermuted")


def _listed(reasons: Mapping[str, Sequence[str]], weights: Mapping[str, int]) -> str:
    items = []
    for reason, names in reasons.items():
        total = sum(weights.get(name, 0) for name in names)
        size = f", {count_text(total)} weights" if total else ""
        count = f"{len(names)} layer{'' if len(names) == 1 else 's'}{size}"
        listed = ", ".join(f"<code>{name_text(name)}</code>" for name in names)
        if len(names) > _NAMES_SHOWN:
            listed = f"<details><summary>{len(names)} names</summary>{listed}</details>"
        items.append(f"<li><p>{text(reason)} <span class=note>({count})</span></p>{listed}</li>")
    return f'<ul class="reasons">{"".join(items)}</ul>' if items else ""
