"""Whether what a weight keeps obeys its pattern, and where it does not: the one check of masks, weights and files.

Takes a mask [out, in] of NumPy or torch, of which it knows neither, and a pattern; gives the first breach in words.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sparsecomp.errors import PatternError
from sparsecomp.patterns.grammar import NM, VNM, VNM_KEPT_COLUMNS, Block, Pattern, Unstructured


def breach(kept: Any, pattern: Pattern, weights: str = "weights kept", across: str = "columns") -> str | None:
    """Where ``kept`` (bool [out, in], an array or a tensor) first keeps more than ``pattern`` allows; None if it obeys.

    Groups, tiles and blocks that the shape cuts short are judged by the weights they have. ``weights`` and ``across``
    are what to call kept weights and columns.
    """
    out, columns = kept.shape
    if out == 0 or columns == 0:
        return None
    match pattern:
        case NM():
            found = _in_groups(kept, pattern.mask_rows, pattern.m, pattern.n, weights, across)
            return found or (_in_columns(kept, pattern, weights) if pattern.transposable else None)
        case VNM():
            shared = _in_groups(kept, pattern.v, pattern.m, VNM_KEPT_COLUMNS, f"{across} in use", across)
            return shared or _in_groups(kept, 1, pattern.m, pattern.n, weights, across)
        case Block():
            return _in_blocks(kept, pattern)
        case Unstructured():
            return _in_groups(kept, 1, columns, pattern.kept_per_row(columns), weights, across)


def check_mask(mask: Any, pattern: Pattern) -> None:
    """Raises PatternError if ``mask`` (bool [out, in]) keeps more than ``pattern`` allows, naming the first offence."""
    found = breach(mask, pattern)
    if found is not None:
        raise PatternError(
            f"the mask breaks {pattern} in {found}; keep fewer, or leave the mask out and have the method choose"
        )


def check_weight(weight: Any, pattern: Pattern) -> None:
    """Raises PatternError if ``weight`` [out, in] has more nonzeros than ``pattern`` allows, naming the first place."""
    found = breach(weight != 0, pattern, "nonzeros")
    if found is not None:
        raise PatternError(f"weight breaks {pattern} in {found}; prune it first, for example with method='magnitude'")


def group_counts(kept: Any, size: int) -> Any:
    """How many of each ``size`` consecutive columns are kept: integers [out, ceil(in / size)]."""
    if size >= kept.shape[1]:
        return kept.sum(1)[:, None]
    # column by column of the groups: a sum over a short last dimension is slow
    count = kept[:, ::size] + 0
    for column in range(1, size):
        part = kept[:, column::size]
        count[:, : part.shape[1]] += part
    return count


def _union(kept: Any, rows: int) -> Any:
    """Whether any of ``rows`` consecutive rows keeps a column: bool [ceil(out / rows), in]."""
    if rows == 1:
        return kept
    union = kept[::rows] | False
    for row in range(1, rows):
        part = kept[row::rows]
        union[: part.shape[0]] |= part
    return union


class _Place(NamedTuple):
    """The first true entry, row by row, and "3 of 96": how many there are."""

    row: int
    column: int
    share: str


def _first(over: Any) -> _Place | None:
    if not bool(over.any()):
        return None
    row = over.any(1).tolist().index(True)
    return _Place(row, over[row].tolist().index(True), f"{int(over.sum())} of {math.prod(over.shape)}")


def _in_groups(kept: Any, rows: int, size: int, allowed: int, what: str, across: str) -> str | None:
    count = group_counts(_union(kept, rows), size)
    if (place := _first(count > allowed)) is None:
        return None
    out, columns = kept.shape
    first, last = place.row * rows, min((place.row + 1) * rows, out) - 1
    where = f"row {first}" if rows == 1 else f"rows {first} to {last} together"
    span = f"{across} {place.column * size} to {min((place.column + 1) * size, columns) - 1}"
    span, unit = (span, "rows") if size >= columns else (f"group {place.column} ({span})", "groups")
    kept_here = int(count[place.row, place.column])
    return f"{where}, {span}: {kept_here} {what}, at most {allowed} allowed; {place.share} {unit} break it"


def _in_columns(kept: Any, pattern: NM, what: str) -> str | None:
    """The breach of a transposable pattern, whose columns must obey it as rows do."""
    count = group_counts(kept.T, pattern.m).T
    if (place := _first(count > pattern.n)) is None:
        return None
    first, last = place.row * pattern.m, min((place.row + 1) * pattern.m, kept.shape[0]) - 1
    return (
        f"column {place.column}, rows {first} to {last}: {int(count[place.row, place.column])} {what}, "
        f"at most {pattern.n} allowed; {place.share} groups of rows break it"
    )


def _in_blocks(kept: Any, pattern: Block) -> str | None:
    used = _union(_union(kept, pattern.rows).T, pattern.cols)
    count, allowed = int(used.sum()), pattern.kept_blocks(*kept.shape)
    return f"its {math.prod(used.shape)} blocks: {count} in use, at most {allowed} allowed" if count > allowed else None
