"""Times of layers as a table that fits the terminal: one row for all layers that are decided and timed alike.

Takes rows of plain values, gives text. Knows nothing of models, measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sparsecomp.machine.bound import Bound
from sparsecomp.reporting.figures import microseconds
from sparsecomp.reporting.terminal import fits, label, listed, numbered, table, wrap

_MEAN = " in the mean"
_TORCH = "torch "
_TOTAL = ("total",)  # the name of a row of sums
_ABOVE = (
    "*: above its bound. The bound compares with a dense torch that reaches the measured peaks of this machine, and "
    "there torch is below them"
)


@dataclass(frozen=True)
class Row:
    """Layers ``names`` of one shape [out, in], run in one way. Times in seconds by batch, empty if not measured.

    ``facts`` are further cells by the name of their column, as ``table`` takes it. ``by`` is the dense product that was
    timed, by batch, "torch" where it is not known.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    runs: str
    kernel: str
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, Bound]
    why: str
    facts: Mapping[str, str] = field(default_factory=dict)
    by: Mapping[int, str] = field(default_factory=dict)


def grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in their names only as one, at the place of the first."""
    found: list[Row] = []
    for row in rows:
        for i, other in enumerate(found):
            if replace(row, names=other.names) == other:
                found[i] = replace(other, names=(*other.names, *row.names))
                break
        else:
            found.append(row)
    return found


def draw(rows: Sequence[Row], batches: Sequence[int], title: str, runs: str, width: int, last: Row | None) -> str:
    """The table of the rows: one line a row where that fits ``width``, else one line a row and batch.

    ``runs`` heads the column of what runs a layer. The column of dense times is named after the product that was timed,
    and each time is where they differ. ``last`` is a row of sums under the others, or None. Where reasons
    have no column they follow as sentences.
    """
    every = [*rows, *([last] if last is not None else [])]
    columns, cells = _wide(every, batches, runs)
    parts = []
    named: set[str] = set()  # layers that a sentence names
    if fits(columns, cells, width):
        parts.append(table(columns, cells, title, width))
    else:
        parts.append(table(*_tall(every, batches, runs), title, width))
        kernels: dict[str, list[str]] = {}
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.kernel:
                kernels.setdefault(row.kernel, []).extend(row.names)
            reasons.setdefault(row.why, []).extend(row.names)
        means = {why: names for why, names in reasons.items() if why.endswith(_MEAN)}
        if means and len(batches) > 1:
            said = [f"{why} ({listed(names)})" for why, names in means.items()]
            parts.append(wrap(f"speedup over the batches: {', '.join(said)}", width))
            named.update(*means.values())
        # of one batch the mean stands in the table
        others = {why: names for why, names in reasons.items() if why not in means}
        named.update(*others.values())
        parts += [wrap(f"{listed(names)}: {why}", width) for why, names in others.items()]
        for kernel, names in kernels.items():
            parts.append(wrap(f"kernel {kernel}: {listed(names) if len(kernels) > 1 else 'all of them'}", width))
    for row in rows:
        # the table names the first kind alone, or none
        if len(numbered(row.names)) > 1 and not named.issuperset(row.names):
            parts.append(wrap(f"{len(row.names)} layers {_shape(row)}: {listed(row.names)}", width))
    if any(_above(row, batch) for row in rows for batch in batches):
        parts.append(wrap(_ABOVE, width))
    return "\n".join(parts)


def _wide(rows: Sequence[Row], batches: Sequence[int], runs: str) -> tuple[list[str], list[list[object]]]:
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    columns = ["layer", ">out x in", runs, *facts, "kernel"]
    dense = _baseline(rows)
    for batch in batches:
        columns += [f">{dense or 'torch'} b{batch}", ">sparse", ">speedup", ">bound"]
    cells: list[list[object]] = []
    for row in rows:
        line: list[object] = [label(row.names), _shape(row), row.runs, *(row.facts.get(each, "") for each in facts)]
        line.append(row.kernel)
        for batch in batches:
            line += _times(row, batch, str(row.bound.get(batch, "")), not dense)
        cells.append([*line, row.why])
    return [*columns, "why"], cells


def _tall(rows: Sequence[Row], batches: Sequence[int], runs: str) -> tuple[list[str], list[list[object]]]:
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    columns = ["layer", ">out x in", runs, *(f"?{name}" for name in facts)]
    dense = _baseline(rows)
    columns += [">batch", f">{dense or 'torch'}", ">sparse", ">speedup", ">bound"]
    cells: list[list[object]] = []
    for row in rows:
        first: list[object] = [label(row.names), _shape(row), row.runs, *(row.facts.get(each, "") for each in facts)]
        for i, batch in enumerate(batches):
            limit = row.bound.get(batch)
            times = _times(row, batch, "" if limit is None else f"{limit.value:.2f}x", not dense)
            cells.append([*(first if i == 0 else [""] * len(first)), batch if any(times) else "", *times])
    return columns, cells


def _baseline(rows: Sequence[Row]) -> str:
    """The dense product of all times, "" if there are several, each of torch."""
    named = {row.by.get(batch, "torch") for row in rows for batch in row.sparse if row.names != _TOTAL}
    return named.pop() if len(named) == 1 else "" if named else "torch"


def _shape(row: Row) -> str:
    return f"{row.shape[0]}x{row.shape[1]}" if row.shape != (0, 0) else ""


def _times(row: Row, batch: int, limit: str, named: bool) -> list[object]:
    if batch not in row.sparse:
        return ["", "", "", limit]
    dense, sparse = row.dense[batch], row.sparse[batch]
    mark = "*" if _above(row, batch) else ""
    by = f" {row.by[batch].removeprefix(_TORCH)}" if named and batch in row.by else ""
    return [f"{microseconds(dense)}{by}", microseconds(sparse), f"{dense / sparse:.2f}x{mark}", limit]


def _above(row: Row, batch: int) -> bool:
    """Whether a measured ratio reads as more than its bound."""
    if batch not in row.sparse or batch not in row.bound:
        return False
    return round(row.dense[batch] / row.sparse[batch], 2) > round(row.bound[batch].value, 2)
