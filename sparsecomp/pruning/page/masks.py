"""What masks look like, where that can be seen: blocks, rows and columns that keep more than others.

The mask of an N:M pattern keeps the same number in every small group and looks like noise whatever is in it, so none
is drawn; what is looked at there is whether some positions of a group are preferred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsecomp.patterns import NM, VNM, Block, Unstructured
from sparsecomp.reporting.figures import role
from sparsecomp.reporting.markup import figure, label, name_text, section, svg, text

if TYPE_CHECKING:
    from sparsecomp.pruning.report import LayerReport, PruneReport

_CELLS = (32, 64)
_CELL_PIXELS = 5
_MOST_MAPS = 3
_CANDIDATES = 12
_SHADES = 5
# shares of cells spread this many times wider than those of random masks show something
_STRUCTURE = 1.5
# positions of a group are worth a chart where one differs by so much of all groups, and by so many standard deviations
_UNEVEN, _SURE = 0.05, 5.0


def maps(report: PruneReport) -> str:
    """At most three masks of blocks or of no structure at all, those that show the most, each of another role."""
    found: dict[tuple[str, str], tuple[float, LayerReport, Tensor, tuple[int, int]]] = {}
    for name, layer in report.layers.items():
        mask, key = report.masks.get(name), (role(name), str(layer.pattern))
        if mask is None or mask.numel() == 0 or key in found or len(found) == _CANDIDATES:
            continue
        if not isinstance(layer.pattern, Block | Unstructured):
            continue
        cell = _cell(mask, layer.pattern)
        shares = _shares(mask, cell)
        seen = _structure(shares, mask, cell)
        if isinstance(layer.pattern, Block) or seen > _STRUCTURE:
            found[key] = (seen, layer, shares, cell)
    best = sorted(found.values(), key=lambda each: -each[0])[:_MOST_MAPS]
    drawn = "".join(_map(layer, shares, cell) for _, layer, shares, cell in best)
    said = (
        '<p class="note">Whole weights, outputs down and inputs across; the darker a cell, the more of it is kept.</p>'
    )
    return section("Masks", f'{said}\n<div class="figures">{drawn}</div>' if drawn else "", "masks")


def _cell(mask: Tensor, pattern: Block | Unstructured) -> tuple[int, int]:
    """Sides of a cell: whole blocks, and few enough cells to be drawn."""
    unit = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    down, across = (
        side * math.ceil(size / (side * most)) for size, side, most in zip(mask.shape, unit, _CELLS, strict=True)
    )
    return down, across


def _shares(mask: Tensor, cell: tuple[int, int]) -> Tensor:
    """Share that each cell keeps, float64 [cells down, cells across]."""
    rows = []
    for part in torch.split(mask, cell[0]):
        counts = part.sum(dim=0).cpu()
        rows.append(
            torch.tensor(
                [float(each.sum()) / (each.numel() * part.shape[0]) for each in torch.split(counts, cell[1])],
                dtype=torch.float64,
                device="cpu",
            )
        )
    return torch.stack(rows)


def _structure(shares: Tensor, mask: Tensor, cell: tuple[int, int]) -> float:
    """How many times wider the shares spread than those of a random mask as dense as this one."""
    density = float(mask.sum()) / mask.numel()
    chance = math.sqrt(density * (1.0 - density) / (cell[0] * cell[1]))
    return float(shares.std(correction=0)) / chance if chance else 0.0


def _map(layer: LayerReport, shares: Tensor, cell: tuple[int, int]) -> str:
    low, high = float(shares.min()), float(shares.max())
    shades = ((shares - low) / (high - low or 1.0) * (_SHADES - 1)).round().long().tolist()
    paths = []
    for shade in range(1, _SHADES):
        runs = "".join(f"M{start} {row}.5h{stop - start}" for row, start, stop in _runs(shades, shade))
        if runs:
            paths.append(f'<path class="m{shade}" d="{runs}"/>')
    down, across = shares.shape
    title = f"{layer.name or 'the model'}: mask"
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" width="{_CELL_PIXELS * across}" '
        f'height="{_CELL_PIXELS * down}" viewBox="0 0 {across} {down}" role="img"><title>{text(title)}</title>'
        f"{''.join(paths)}</svg>"
    )
    caption = (
        f"<code>{name_text(layer.name)}</code>, {text(layer.pattern)}: cells of {cell[0]} x {cell[1]} weights keep "
        f"{low:.0%} to {high:.0%}"
    )
    return figure(drawn, caption)


def _runs(shades: Sequence[Sequence[int]], shade: int) -> Iterator[tuple[int, int, int]]:
    """(row, first column, column after the last) of each run of cells of that shade."""
    for row, cells in enumerate(shades):
        start = None
        for column, one in enumerate([*(each == shade for each in cells), False]):
            if one and start is None:
                start = column
            elif not one and start is not None:
                yield row, start, column
                start = None


def positions(report: PruneReport) -> str:
    """How often each position of a group is kept, for each pattern whose masks clearly prefer some."""
    counts: dict[str, Tensor] = {}
    groups: dict[str, int] = {}
    wanted: dict[str, float] = {}
    for name, mask in report.masks.items():
        pattern = report.layers[name].pattern
        if not isinstance(pattern, NM | VNM) or mask.shape[1] < pattern.m or mask.numel() == 0:
            continue
        whole = mask[:, : mask.shape[1] // pattern.m * pattern.m]
        key = str(pattern)
        seen = whole.sum(dim=0).reshape(-1, pattern.m).sum(dim=0).double().cpu()
        counts[key] = counts[key] + seen if key in counts else seen
        groups[key] = groups.get(key, 0) + whole.shape[0] * whole.shape[1] // pattern.m
        wanted[key] = pattern.density
    drawn = ""
    for key, count in counts.items():
        shares = (count / groups[key]).tolist()
        chance = math.sqrt(wanted[key] * (1.0 - wanted[key]) / groups[key])
        if max(abs(share - wanted[key]) for share in shares) > max(_UNEVEN, _SURE * chance):
            drawn += _bars(key, shares)
    return section("Positions that masks prefer within a group", f'<div class="figures">{drawn}</div>' if drawn else "")


def _bars(key: str, shares: Sequence[float]) -> str:
    step, floor, tall = 30, 118, 92
    parts = []
    for i, share in enumerate(shares):
        x = 8 + step * i
        height = tall * share
        parts.append(f'<rect class="a" x="{x}" y="{floor - height:.1f}" width="22" height="{height:.1f}"/>')
        parts.append(label(x + 11, floor - 5 - height, f"{100 * share:.0f}%", "middle"))
        parts.append(label(x + 11, floor + 15, str(i), "middle"))
    return figure(
        svg(16 + step * len(shares), 140, parts, f"Kept positions, {key}"),
        f"{text(key)}: share of groups that keep each position",
    )
