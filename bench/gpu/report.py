"""A GPU sweep's rows as what people read: ratios to the best dense engine and to cuSPARSELt.

Pure functions, standard library only.
"""

from __future__ import annotations

import math
import statistics
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
        grouped.setdefault(_case(row), []).append(row)
    found = []
    for group in grouped.values():
        dense = [row for row in group if not row["sparse"]]
        ours = [row for row in group if row["engine"].startswith(OURS)]
        vendor = [row for row in group if row["sparse"] and not row["engine"].startswith(OURS)]
        if dense and ours:
            found.append(Comparison(_fastest(dense), _fastest(ours), _fastest(vendor) if vendor else None))
    return found


def geometric_mean(values: Sequence[float]) -> float | None:
    """Geometric mean; None of no values."""
    return statistics.geometric_mean(values) if values else None


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
    lines += _engine_lines(result["rows"])
    slower = [each for each in found if each.speedup < 1]
    lines.append(f"slower than the best dense engine: {len(slower)} of {len(found)} cases")
    lines += packing_lines(result.get("packing") or [])
    for name in ("missing", "refused", "failed", "not measured"):
        entries = result.get(name) or []
        shown = _by_engine(entries) if name == "refused" else entries
        lines += [f"{name}: {len(entries)}", *(f"  {entry}" for entry in shown)] if entries else []
    return "\n".join(lines) + "\n"


def _engine_lines(rows: Sequence[Row]) -> list[str]:
    """Each engine's geometric mean against the best dense one, for large batches and for decoding."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if not row["sparse"]:
            best[_case(row)] = min(row["us"], best.get(_case(row), math.inf))
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine and _case(row) in best]
        ratios = [(row["tokens"], best[_case(row)] / row["us"]) for row in own]
        cells = []
        for name, wanted in ((f"tokens >= {PREFILL}", range(PREFILL, 1 << 31)), (f"<= {DECODE}", range(DECODE + 1))):
            mean = geometric_mean([ratio for tokens, ratio in ratios if tokens in wanted])
            cells.append(f"{name} {'-' if mean is None else f'{mean:.2f}x'}")
        lines.append(f"  {engine:<28} {', '.join(cells)}")
    return ["each engine over the cases it ran, the best dense one being 1:", *lines] if lines else []


def _by_engine(entries: Iterable[str]) -> list[str]:
    """Refusals with the first reason of each engine and how many there were; all of them are in the JSON."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(entry.split(",")[0], []).append(entry)
    return [each[0] + (f" (and {len(each) - 1} more)" if len(each) > 1 else "") for each in found.values()]


def _case(row: Row) -> tuple[Any, ...]:
    return row["out"], row["in"], row["tokens"], row["dtype"]


def packing_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each square that ``packing.packing_rows`` timed."""
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
    titles = f"{'dense us':>10} {'ours us':>10} {'spread':>7} {'speedup':>8} {'to vendor':>9}"
    head = f"{'out x in':>13} {'tokens':>6} {titles}  by, against"
    lines = [head]
    for each in sorted(found, key=lambda each: (each.ours["tokens"], each.ours["out"], each.ours["in"])):
        row = each.ours
        vendor = "" if each.to_vendor is None else f"{each.to_vendor:.2f}x"
        times = f"{each.dense['us']:>10.2f} {row['us']:>10.2f} {_spread(row):>6.1f}% {each.speedup:>7.2f}x {vendor:>9}"
        engines = ", ".join(part for part in (row["engine"], row["note"]) if part)
        lines.append(f"{row['out']:>6}x{row['in']:<6} {row['tokens']:>6} {times}  {engines}; {each.dense['engine']}")
    return lines


def _spread(row: Row) -> float:
    """Percent of the median between the 10% and the 90% quantile."""
    return 100.0 * float(row["us_high"] - row["us_low"]) / float(row["us"])


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
