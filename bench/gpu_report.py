"""A GPU sweep's rows as what people read: ratios to the best dense engine and to cuSPARSELt.

Pure functions, standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

PREFILL, DECODE = 2048, 16
OURS = "sparsecomp"


@dataclass(frozen=True)
class Comparison:
    """All engines of one case: the best dense one, the best of ours, and the best vendor library for 2:4."""

    dense: Row
    ours: Row
    vendor: Row | None

    @property
    def speedup(self) -> float:
        """Time of the best dense engine over that of our best."""
        return float(self.dense["us"] / self.ours["us"])

    @property
    def to_vendor(self) -> float | None:
        """Time of the best vendor library for 2:4 over that of our best, None where none ran."""
        return None if self.vendor is None else float(self.vendor["us"] / self.ours["us"])


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """One comparison for each case in which a dense engine and one of ours were timed."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["out"], row["in"], row["tokens"], row["dtype"]), []).append(row)
    found = []
    for group in grouped.values():
        dense = [row for row in group if not row["sparse"]]
        ours = [row for row in group if row["engine"].startswith(OURS)]
        vendor = [row for row in group if row["sparse"] and not row["engine"].startswith(OURS)]
        if dense and ours:
            found.append(Comparison(_fastest(dense), _fastest(ours), _fastest(vendor) if vendor else None))
    return found


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else None


def summary(result: dict[str, Any]) -> str:
    """The whole report as text: machine, a line for each case, means at prefill and decode, what was left out."""
    found = compare(result["rows"])
    lines = [*_machine_lines(result), "", *_case_lines(found), ""]
    prefill = [each for each in found if each.ours["tokens"] >= PREFILL]
    decode = [each for each in found if each.ours["tokens"] <= DECODE]
    lines += [
        _mean_line(f"tokens >= {PREFILL}", prefill),
        _mean_line(f"tokens <= {DECODE}", decode),
        _mean_line("all", found),
    ]
    slower = [each for each in found if each.speedup < 1]
    lines.append(f"slower than the best dense engine: {len(slower)} of {len(found)} cases")
    lines += packing_lines(result.get("packing") or [])
    for name in ("missing", "refused", "failed", "not measured"):
        entries = result.get(name) or []
        lines += [f"{name}: {len(entries)}", *(f"  {entry}" for entry in entries)] if entries else []
    return "\n".join(lines) + "\n"


def packing_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each square that ``gpu_packing.packing_rows`` timed."""
    return [
        f"packing {row['side']}x{row['side']} bf16: {row['default']:g} us for {row['backend']}, the backend a layer "
        f"gets; {row['planes']:g} us for triton; for gluon {row['dense']:g} us from dense, {row['canonical']:g} us "
        f"from the canonical form, {row['torch']:g} us from it by torch"
        for row in rows
    ]


def _machine_lines(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    lines = [f"date: {result.get('date', 'unknown')}"]
    lines += [f"{name}: {machine[name]}" for name in machine if name != "during"]
    during = machine.get("during") or {}
    return lines + [f"{name} during the run: {low:g} to {high:g}" for name, (low, high) in during.items()]


def _case_lines(found: Sequence[Comparison]) -> list[str]:
    head = (
        f"{'out x in':>13} {'tokens':>6} {'dense us':>10} {'ours us':>10} {'speedup':>8} {'to vendor':>9}  by, against"
    )
    lines = [head]
    for each in sorted(found, key=lambda each: (each.ours["tokens"], each.ours["out"], each.ours["in"])):
        row = each.ours
        vendor = "" if each.to_vendor is None else f"{each.to_vendor:.2f}x"
        lines.append(
            f"{row['out']:>6}x{row['in']:<6} {row['tokens']:>6} {each.dense['us']:>10.2f} {row['us']:>10.2f} "
            f"{each.speedup:>7.2f}x {vendor:>9}  {row['engine']} {row['note']}, {each.dense['engine']}"
        )
    return lines


def _mean_line(name: str, found: Sequence[Comparison]) -> str:
    mean = geometric_mean([each.speedup for each in found])
    if mean is None:
        return f"{name}: nothing was measured"
    vendor = geometric_mean([each.to_vendor for each in found if each.to_vendor is not None])
    best = max(found, key=lambda each: each.speedup)
    to_vendor = "" if vendor is None else f", {vendor:.2f}x to the vendor's 2:4"
    shape = f"{best.ours['out']}x{best.ours['in']}, {best.ours['tokens']} tokens"
    return f"{name}: geometric mean {mean:.2f}x{to_vendor}; peak {best.speedup:.2f}x at {shape}; {len(found)} cases"


def _fastest(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: float(row["us"]))
