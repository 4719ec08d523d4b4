"""Where the goals stand: the parts of a sweep that measure them, and the table that says what was reached.

Takes the list of aims and results, gives settings and text. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import geometric_mean
from typing import Any

from sparsecomp.benchmark.aims import GOALS, WIDE_SHAPES, Goal, kinds
from sparsecomp.benchmark.machine import vnni
from sparsecomp.benchmark.report import Comparison, comparisons, in_int8
from sparsecomp.benchmark.settings import Settings
from sparsecomp.machine.device import detect
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.reporting.terminal import table

# the time of N:16 is proportional to N
CURVE = Settings(
    shapes=WIDE_SHAPES,
    batches=(1, 8, 128),
    cold_batches=(),
    dtypes=("fp32",),
    patterns=tuple(f"{n}:16" for n in range(1, 17)),
    seconds=1.5,
    int8=False,
)


# for all engines of a row: on several threads a sample takes some 20 ms, most of it untimed
_SECONDS = 1.0


def kinds_here() -> tuple[str, ...]:
    """The kinds of this machine."""
    return kinds(detect("cpu").isa, vnni())


def kinds_of(result: dict[str, Any]) -> tuple[str, ...]:
    """The kinds of the machine of a result; one of before VNNI was recorded has it with AVX-512 alone."""
    isa = result["machine"]["isa"]
    return kinds(isa, bool(result["machine"].get("vnni", isa != "avx2")))


def parts(threads: tuple[int, ...], machine: Sequence[str], seconds: float | None = None) -> list[Settings]:
    """The sweeps that measure every goal of these kinds of ``machine``, each case once, and the curve of N:16.

    ``seconds`` for all engines of a row of the former, 1 if None; the curve is measured on one thread. Dense int8
    engines take part where a pattern has int8 activations.
    """
    cases: dict[tuple[str, tuple[int, int], str, int], dict[str, None]] = {}
    for goal in GOALS:
        if goal.kind in machine:
            for shape, batch, pattern in product(goal.shapes, goal.batches, goal.patterns):
                cases.setdefault((goal.dtype, shape, goal.weights, batch), {})[pattern] = None
    groups: dict[tuple[str, tuple[int, int], str, tuple[str, ...]], list[int]] = {}
    for (dtype, shape, weights, batch), patterns in cases.items():
        groups.setdefault((dtype, shape, weights, tuple(patterns)), []).append(batch)
    return [
        *(
            Settings(
                shapes=(shape,),
                batches=tuple(sorted(batches)) if weights == "warm" else (),
                cold_batches=tuple(sorted(batches)) if weights == "cold" else (),
                dtypes=(dtype,),
                patterns=patterns,
                threads=threads,
                seconds=_SECONDS if seconds is None else seconds,
                int8=any(_rounds(pattern) for pattern in patterns),
            )
            for (dtype, shape, weights, patterns), batches in groups.items()
        ),
        CURVE,
    ]


def _rounds(label: str) -> bool:
    return parse_weights(label)[1].activation_bits is not None


@dataclass(frozen=True)
class Standing:
    """A goal and the rows of one run that it covers, on one number of threads; of several patterns the fastest's."""

    goal: Goal
    threads: int
    rows: tuple[Comparison, ...]

    @property
    def worst(self) -> Comparison:
        """The row with the smallest ratio."""
        return min(self.rows, key=lambda each: each.speedup)

    @property
    def verdict(self) -> str:
        """How many rows reach the least; "all, and the aim" where even the aim is reached everywhere."""
        reached = sum(each.speedup >= self.goal.least for each in self.rows)
        if reached < len(self.rows):
            return f"{reached} of {len(self.rows)}"
        return "all, and the aim" if self.worst.speedup >= self.goal.aim else "all"


def standings(result: dict[str, Any]) -> Iterator[Standing]:
    """Every goal for the machine of the result of which it has rows."""
    found, machine = list(comparisons(result)), kinds_of(result)
    for goal in GOALS:
        for threads in dict.fromkeys(each.row["threads"] for each in found):
            covered = [each for each in found if each.row["threads"] == threads and goal.covers(each.row)]
            fastest: dict[int, Comparison] = {}
            for each in filter(None, (_against(each, goal) for each in covered)):
                turn = id(each.dense)  # the patterns of one turn share its dense row
                if turn not in fastest or each.speedup > fastest[turn].speedup:
                    fastest[turn] = each
            if fastest and goal.kind in machine:
                yield Standing(goal, threads, tuple(fastest.values()))


def _against(each: Comparison, goal: Goal) -> Comparison | None:
    """The comparison with the engine that the goal is over; None where none of its numbers was measured."""
    if goal.over == "other":
        return None if each.other is None else replace(each, dense=each.other, other=each.dense)
    # without a dense int8 engine, int8 stands beside floats
    return each if in_int8(each.row) == in_int8(each.dense) else None


def render(result: dict[str, Any]) -> str:
    """The goals, the worst row of each beside its bound, in a table for each number of threads; "" without any row."""
    found = list(standings(result))
    tables = []
    for threads in dict.fromkeys(each.threads for each in found):
        lines = [_cells(each) for each in found if each.threads == threads]
        title = f"Goals, {threads} thread{'s' if threads > 1 else ''}: ratio to the best dense engine of the row"
        tables.append(table(_COLUMNS, lines, title=title))
    return "\n\n".join(tables)


_COLUMNS = (
    "dtype",
    "pattern",
    "out x in",
    "batch",
    "?weights",
    "?over",
    "?>mean",
    ">worst",
    "?>low-high",
    "?of",
    "?>bound",
    ">least",
    "?>aim",
    "reached by",
)


def _cells(each: Standing) -> tuple[str, ...]:
    goal, worst = each.goal, each.worst
    low, high = worst.spread
    return (
        goal.dtype,
        goal.pattern,
        " ".join(f"{out}x{columns}" for out, columns in goal.shapes),
        _span(goal.batches),
        goal.weights,
        "floats" if goal.over == "other" else "int8" if in_int8(worst.dense) else "floats",
        f"{geometric_mean(row.speedup for row in each.rows):.2f}x",
        f"{worst.speedup:.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{worst.row['out']}x{worst.row['in']}, batch {worst.row['batch']}",
        f"{worst.row['bound'] if goal.counted is None else goal.counted:.2f}x",
        f"{goal.least:.2f}x",
        f"{goal.aim:.2f}x",
        each.verdict,
    )


def _span(batches: Iterable[int]) -> str:
    listed = sorted(batches)
    return str(listed[0]) if len(listed) == 1 else f"{listed[0]}-{listed[-1]}"
