"""The other dense engines of this machine beside the layers of a plan, as text: the fastest of each kind.

Takes times of layers, gives lines. Measures nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsecomp.reporting.figures import microseconds
from sparsecomp.reporting.terminal import by_reason, label, table, wrap

_HEAD = "Dense engines of this machine beside the plan, the fastest of each kind, one call outside the model"
_IN_BRACKETS = (
    "in brackets: how many times as fast as planned. int8 rounds weights and activations: its product is another one. "
    "--json and the file of the plan have the times of every engine"
)
_INT8 = " int8"


@dataclass(frozen=True)
class Beside:
    """Layers ``names`` and what they run in as planned; seconds as planned by batch, and of engines by batch."""

    names: tuple[str, ...]
    runs: str
    planned: Mapping[int, float]
    engines: Mapping[str, Mapping[int, float]]


def draw_beside(
    layers: Sequence[Beside], batches: Sequence[int], missing: Mapping[str, str], width: int, every: bool
) -> list[str]:
    """A table of at most ``width`` columns, and who is missing; nothing of none.

    Layers that differ in their names only share a row, unless ``every`` asks for a row each.
    """
    cells: list[list[object]] = []
    for layer in layers if every else _grouped(layers):
        for batch in batches:
            taken = {name: times[batch] for name, times in layer.engines.items() if batch in times}
            if not taken or batch not in layer.planned:
                continue
            planned = layer.planned[batch]
            kinds = [{n: s for n, s in taken.items() if (_INT8 in n) == int8} for int8 in (False, True)]
            best = [_fastest(kind, planned) for kind in kinds]
            cells.append([label(layer.names), batch, layer.runs, microseconds(planned), *best])
    columns = ("layer", ">batch", "runs", ">planned", "floating", "int8")
    drawn = ["", table(columns, cells, _HEAD, width), wrap(_IN_BRACKETS, width)] if cells else []
    return [*drawn, *by_reason("not measured", missing, width)]


def _grouped(layers: Sequence[Beside]) -> list[Beside]:
    found: list[Beside] = []
    for layer in layers:
        for i, other in enumerate(found):
            if replace(layer, names=other.names) == other:
                found[i] = replace(other, names=(*other.names, *layer.names))
                break
        else:
            found.append(layer)
    return found


def _fastest(taken: Mapping[str, float], planned: float) -> str:
    if not taken:
        return ""
    best = min(taken, key=lambda name: taken[name])
    faster = f" ({planned / taken[best]:.2f}x)" if taken[best] < planned else ""
    return f"{microseconds(taken[best])} {best}{faster}"
