"""The goals on one Hopper GPU, as verdicts on what sweeps have measured. Pure functions, standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.report import DECODE, PREFILL, Comparison, compare, geometric_mean

LARGE_MEAN, LARGE_PEAK, LARGE_FP8 = 1.35, 1.6, 1.3
TO_VENDOR, DECODE_MEAN, COMPILED, PACKING_US = 0.98, 1.5, 0.98, 1000.0
_PACKED_SIDE = 4096


@dataclass(frozen=True)
class Verdict:
    """A goal, the figure found (None: not measured), whether it is met, and over what it was taken."""

    goal: str
    wanted: str
    found: str | None
    met: bool
    basis: str

    @property
    def state(self) -> str:
        """Whether it is met, MISSED, or open because it was not measured."""
        return "open" if self.found is None else "met" if self.met else "MISSED"

    def __str__(self) -> str:
        """A line of the summary."""
        return f"{self.state:<7} {self.goal}: {self.found or 'not measured'}, wanted {self.wanted} ({self.basis})"


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """One for each goal; ``results`` are those of the sweeps "bf16", "fp8" and "compiled", as far as there are any."""
    bf16, fp8, compiled = (results.get(name, {}) for name in ("bf16", "fp8", "compiled"))
    found, narrow, whole = (compare(each.get("rows", ())) for each in (bf16, fp8, compiled))
    large = [each for each in found if each.ours["tokens"] >= PREFILL]
    vendor = [each for each in large if each.to_vendor is not None]
    l2_bytes = (bf16.get("machine") or {}).get("l2_mib", 0) << 20
    decode = [each for each in found if each.ours["tokens"] <= DECODE and _bytes(each) > l2_bytes > 0]
    large_fp8 = [each for each in narrow if each.ours["tokens"] >= PREFILL]
    packing = [row["default"] for row in bf16.get("packing") or () if row["side"] == _PACKED_SIDE]
    left = len(bf16.get("not measured") or ())
    cut = f", {left} of the sweep not reached" if left else ""
    return [
        _mean(f"bf16, M >= {PREFILL}, geometric mean", LARGE_MEAN, large, cut),
        _extreme(f"bf16, M >= {PREFILL}, peak", LARGE_PEAK, large, max, _speedup, cut),
        _extreme(f"bf16, M >= {PREFILL}, worst against cuSPARSELt", TO_VENDOR, vendor, min, _to_vendor, cut),
        _mean(f"fp8, M >= {PREFILL}, geometric mean", LARGE_FP8, large_fp8, ""),
        _mean(f"bf16, M <= {DECODE}, weights larger than L2, geometric mean", DECODE_MEAN, decode, cut),
        _extreme("compiled layers, worst against nn.Linear", COMPILED, whole, min, _speedup, ""),
        Verdict(
            f"packing {_PACKED_SIDE}x{_PACKED_SIDE} on the GPU, the backend a layer gets",
            f"under {PACKING_US:g} us",
            f"{packing[0]:g} us" if packing else None,
            bool(packing) and packing[0] < PACKING_US,
            "median of the sweep's packing section",
        ),
    ]


def _mean(goal: str, wanted: float, cases: Sequence[Comparison], cut: str) -> Verdict:
    mean = geometric_mean([each.speedup for each in cases])
    found = None if mean is None else f"{mean:.3f}x"
    return Verdict(
        goal, f"at least {wanted:g}x", found, mean is not None and mean >= wanted, f"{len(cases)} cases{cut}"
    )


def _extreme(
    goal: str,
    wanted: float,
    cases: Sequence[Comparison],
    pick: Callable[..., Comparison],
    value: Callable[[Comparison], float],
    cut: str,
) -> Verdict:
    if not cases:
        return Verdict(goal, f"at least {wanted:g}x", None, False, f"0 cases{cut}")
    best = pick(cases, key=value)
    row = best.ours
    where = f"{row['out']}x{row['in']}, {row['tokens']} tokens, {row['engine']}"
    found = f"{value(best):.3f}x at {where}"
    return Verdict(goal, f"at least {wanted:g}x", found, value(best) >= wanted, f"{len(cases)} cases{cut}")


def _speedup(each: Comparison) -> float:
    return each.speedup


def _to_vendor(each: Comparison) -> float:
    assert each.to_vendor is not None
    return each.to_vendor


def _bytes(each: Comparison) -> int:
    return int(each.ours["out"] * each.ours["in"] * 2)
