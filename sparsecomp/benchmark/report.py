"""A sweep's result as what people read: ratios to the best dense engine, beside their bounds, with a verdict.

Takes the JSON values of a result; every ratio that is printed anywhere is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from sparsecomp.errors import FormatError
from sparsecomp.reporting.terminal import table, wrap

EVEN = 0.97
# a table of time by N is worth printing from so many N on
_CURVE_POINTS = 6


@dataclass(frozen=True)
class Comparison:
    """A row of ours beside the best dense engine of the same numbers, case and run.

    A row with int8 weights and int8 activations stands beside dense int8, every other beside a floating product.
    ``other`` is the best dense engine of the other numbers, None where none was measured.
    """

    row: dict[str, Any]
    dense: dict[str, Any]
    torch_us: float | None
    other: dict[str, Any] | None = None

    @property
    def speedup(self) -> float:
        """Median time of the best dense engine over that of the sparse one."""
        return float(self.dense["us"] / self.row["us"])

    @property
    def beside(self) -> float | None:
        """Median time of the best dense engine of the other numbers over that of the sparse one."""
        return None if self.other is None else float(self.other["us"] / self.row["us"])

    @property
    def spread(self) -> tuple[float, float]:
        """The ratio with the 10% and 90% quantiles set against each other: the worst and the best case."""
        return self.dense["us_low"] / self.row["us_high"], self.dense["us_high"] / self.row["us_low"]

    @property
    def verdict(self) -> str:
        """One word: "wins" from 1/0.97 on, "even" down to 0.97, "loses" below (a compiled layer then runs dense).

        "unclear" where the ratio wins or loses but its spread reaches to the other side of 1.
        """
        low, high = self.spread
        if self.speedup >= 1 / EVEN:
            return "wins" if low >= 1 else "unclear"
        if self.speedup >= EVEN:
            return "even"
        return "loses" if high <= 1 else "unclear"


def load_result(path: Path) -> dict[str, Any]:
    """A result file. Raises FormatError if it is none."""
    try:
        result = json.loads(path.read_text())
        known = result["format"] == 2 and result["kind"] == "gemm" and isinstance(result["rows"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no benchmark result: {error!r}; make one with: sparsecomp bench") from error
    if not known:
        raise FormatError(f"{path} is a result of another kind or version; make a new one with: sparsecomp bench")
    return dict(result)


def comparisons(result: dict[str, Any]) -> Iterator[Comparison]:
    """Every row of ours with the best dense rows that were measured in turn with it."""
    for rows in _turns(result["rows"]):
        dense = [row for row in rows if row["pattern"] is None]
        torch_us = next((row["us"] for row in dense if row["engine"] == "torch"), None)
        integer, floating = (min(filter(kind, dense), key=_us, default=None) for kind in (in_int8, _in_floats))
        for row in rows:
            if row["pattern"] is not None:
                same, other = (integer, floating) if in_int8(row) else (floating, integer)
                best, beside = (same, other) if same is not None else (other, None)
                if best is not None:
                    yield Comparison(row, best, torch_us, beside)


def in_int8(row: dict[str, Any]) -> bool:
    """Whether a row multiplies int8 weights and int8 activations; a result of before has no such row."""
    return row.get("numbers") == "int8"


def _in_floats(row: dict[str, Any]) -> bool:
    return not in_int8(row)


def _us(row: dict[str, Any]) -> float:
    return float(row["us"])


def _turns(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows whose samples were taken in turn: neighbours of one case, the dense ones first.

    A case that another part of the sweep measures too, minutes later, has a turn of its own there.
    """
    turn: list[dict[str, Any]] = []
    for row in rows:
        if turn and (_case(row) != _case(turn[-1]) or (row["pattern"] is None and turn[-1]["pattern"] is not None)):
            yield turn
            turn = []
        turn.append(row)
    if turn:
        yield turn


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("out", "in", "batch", "dtype", "threads", "weights"))


def render(result: dict[str, Any]) -> str:
    """The whole result as aligned tables, one for each dtype and number of threads, and the geometric means."""
    machine = result["machine"]
    found = list(comparisons(result))
    parts = [_heading(machine)]
    for dtype in dict.fromkeys(each.row["dtype"] for each in found):
        for threads in dict.fromkeys(each.row["threads"] for each in found):
            chosen = [each for each in found if each.row["dtype"] == dtype and each.row["threads"] == threads]
            title = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}{', pinned' if threads == 1 else ''}"
            for weights in dict.fromkeys(each.row["weights"] for each in chosen):
                shown = [each for each in chosen if each.row["weights"] == weights]
                beside = any(each.other is not None for each in shown)
                columns = _COLUMNS + _BESIDE * beside
                rows = [(*_cells(each), *(_others(each) if beside else ())) for each in shown]
                parts.append(table(columns, rows, title=f"{title}, {weights} weights"))
    if any(each.other is not None for each in found):
        parts.append(wrap(_ON_OTHERS))
    parts.append(_means(found))
    if curve := _curve(found):
        parts.append(curve)
    for name, reason in result["missing"].items():
        parts.append(wrap(f"left out: {name}: {reason}"))
    for name, remark in result.get("remarks", {}).items():
        parts.append(wrap(f"{name}: {remark}"))
    for threads, seen in result.get("shared_cores", {}).items():
        end = "; then patience was at its end, and later rounds were kept unseen" if seen["gave_up"] else ""
        shared = (
            f"{threads} threads: cores of this machine were shared for a while; {seen['dropped_rounds']} rounds were"
        )
        parts.append(wrap(f"{shared} measured again after {seen['waited_s']} s{end}"))
    return "\n\n".join(parts)


_COLUMNS = (
    ">out x in",
    ">batch",
    "pattern",
    "?>us",
    ">dense us",
    "by",
    "?>torch us",
    ">speedup",
    "?>low-high",
    ">bound",
    "?limit",
    "verdict",
)
_BESIDE = (">beside", "?of")
_ON_OTHERS = (
    "Rows with int8 weights and int8 activations (int8@a8) are compared with the best dense int8 engine, all others "
    "with the best floating one; beside: the ratio to the best of the other kind."
)


def _cells(each: Comparison) -> tuple[str, ...]:
    row, low_high = each.row, each.spread
    return (
        f"{row['out']}x{row['in']}",
        str(row["batch"]),
        row["pattern"],
        f"{row['us']:.4g}",
        f"{each.dense['us']:.4g}",
        each.dense["engine"],
        "" if each.torch_us is None else f"{each.torch_us:.4g}",
        f"{each.speedup:.2f}x",
        f"{low_high[0]:.2f}-{low_high[1]:.2f}",
        f"{row['bound']:.2f}x",
        row["bound_by"],
        each.verdict,
    )


def _others(each: Comparison) -> tuple[str, str]:
    return ("", "") if each.other is None else (f"{each.beside:.2f}x", each.other["engine"])


def _heading(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine["packages"].items() if value)
    lines = [f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores; {versions}"]
    for threads, peak in machine["peaks"].items():
        integers = f"int8 {peak['int8_gops']:.0f} GOP/s, " if peak.get("int8_gops") else ""
        lines.append(
            f"measured peaks, {threads} thread(s): fp32 {peak['fp32_gflops']:.0f} GFLOP/s, "
            f"bf16 {peak['bf16_gflops']:.0f} GFLOP/s, {integers}memory {peak['read_gb_s']:.0f} GB/s"
        )
    return "\n".join(map(wrap, lines))


def _curve(found: list[Comparison]) -> str:
    """Time by N of N:16 as a share of the best dense engine's, where a case has many N; "" if none has."""
    cases: dict[tuple[Any, ...], dict[int, Comparison]] = {}
    for each in found:
        row = each.row
        kept, _, group = row["pattern"].partition(":")
        if group == "16":  # of floating weights
            key = tuple(row[name] for name in ("out", "in", "dtype", "threads", "weights", "batch"))
            cases.setdefault(key, {})[int(kept)] = each
    curves = {key: by_n for key, by_n in cases.items() if len(by_n) >= _CURVE_POINTS}
    if not curves:
        return ""
    kept_counts = sorted(set().union(*curves.values()))
    lines = [
        (
            f"{n}:16",
            *(f"{by_n[n].row['us'] / by_n[n].dense['us']:.2f}" if n in by_n else "" for by_n in curves.values()),
        )
        for n in kept_counts
    ]
    heads = [f">{key[0]}x{key[1]} {key[2]}, batch {key[5]}, {key[3]} thread(s)" for key in curves]
    return table(("pattern", *heads), lines, title="Time by N, as a share of the best dense engine's")


def _means(found: list[Comparison]) -> str:
    rows = []
    for pattern in dict.fromkeys(each.row["pattern"] for each in found):
        for dtype in dict.fromkeys(each.row["dtype"] for each in found):
            chosen = [each for each in found if each.row["pattern"] == pattern and each.row["dtype"] == dtype]
            if not chosen:
                continue
            verdicts = [each.verdict for each in chosen]
            rows.append(
                (
                    pattern,
                    dtype,
                    len(chosen),
                    f"{geometric_mean(each.speedup for each in chosen):.2f}x",
                    f"{geometric_mean(each.row['bound'] for each in chosen):.2f}x",
                    verdicts.count("wins"),
                    verdicts.count("even"),
                    verdicts.count("loses"),
                    verdicts.count("unclear"),
                )
            )
    columns = ("pattern", "dtype", ">rows", ">speedup", ">bound", ">wins", ">even", ">loses", ">unclear")
    return table(columns, rows, title="Geometric mean over the best dense engine of the same numbers")
