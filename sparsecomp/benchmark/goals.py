"""What the CPU kernels are held to: for each precision, pattern and size the least ratio to the best dense engine.

The parts of a sweep that measure it, and the table that says where each goal stands. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from sparsecomp.benchmark.report import Comparison, comparisons
from sparsecomp.benchmark.sweep import Settings
from sparsecomp.reporting.terminal import table

Shapes = tuple[tuple[int, int], ...]

LARGE: Shapes = ((4096, 4096),)
LARGEST: Shapes = ((4096, 4096), (11008, 4096))
SMALL: Shapes = ((768, 768), (3072, 768), (384, 1536))
WIDE: Shapes = ((3072, 768),)
TINY: Shapes = ((384, 384),)


@dataclass(frozen=True)
class Goal:
    """Rows of one kind: ``least`` is what each must reach over the best dense engine, ``aim`` what is hoped for.

    ``weights`` are "cold" where a dense weight does not fit the last-level cache of the machines aimed at (32 MB).
    """

    dtype: str
    pattern: str
    shapes: Shapes
    batches: tuple[int, ...]
    weights: str
    least: float
    aim: float

    def covers(self, row: dict[str, Any]) -> bool:
        """Whether a row of a result is one of these."""
        kind = (row["dtype"], row["pattern"], row["weights"]) == (self.dtype, self.pattern, self.weights)
        return kind and (row["out"], row["in"]) in self.shapes and row["batch"] in self.batches


def _both(
    dtype: str, pattern: str, batches: tuple[int, ...], largest: tuple[int, ...], least: float, aim: float
) -> tuple[Goal, ...]:
    """3072x768, which fits the cache, and 4096x4096, which does not, up to the ``largest`` batches."""
    wide = Goal(dtype, pattern, WIDE, batches, "warm", least, aim)
    return wide, Goal(dtype, pattern, LARGE, largest, "cold", least, aim)


GOALS = (
    Goal("fp32", "2:4", LARGEST, (1,), "cold", 1.7, 1.85),
    Goal("fp32", "2:4", LARGE, (2, 4, 8, 16), "cold", 1.7, 2.0),
    Goal("fp32", "2:4", SMALL, (1, 4, 16), "warm", 1.25, 1.6),
    *_both("fp32", "2:4", (32, 64), (32, 64), 1.35, 1.7),
    *_both("fp32", "2:4", (128, 512, 2048), (128, 512), 1.5, 1.8),
    *_both("fp32", "2:4@v4", (64, 128, 512, 2048), (64, 128, 512), 1.5, 1.8),
    Goal("bf16", "2:4", LARGEST, (1, 2, 4), "cold", 1.6, 1.75),
    *_both("bf16", "2:4", (8, 16, 32, 64), (8, 16, 32, 64), 1.35, 1.7),
    *_both("bf16", "2:4", (128, 512, 2048), (128, 512), 1.1, 1.6),
    *_both("bf16", "2:4@v4", (128, 512, 2048), (128, 512), 1.4, 1.6),
    Goal("fp32", "2:4+int8", LARGE, (1,), "cold", 3.0, 5.0),
    Goal("fp32", "8:16", LARGEST, (1,), "cold", 1.65, 1.8),
    Goal("fp32", "8:16", SMALL + TINY, (1,), "warm", 1.65, 1.8),
    Goal("fp32", "8:16", LARGE, (2, 4, 8, 16, 32, 64, 128, 512), "cold", 1.4, 1.6),
    Goal("fp32", "8:16", WIDE, (4, 16, 32, 64, 128, 512, 2048), "warm", 1.4, 1.6),
    Goal("fp32", "8:16", ((768, 768), (384, 1536), (384, 384)), (4, 16, 128), "warm", 1.4, 1.6),
    Goal("fp32", "4:16", SMALL + TINY, (128,), "warm", 2.5, 3.2),
    Goal("fp32", "4:16", LARGE, (128,), "cold", 2.5, 3.2),
    Goal("fp32", "12:16", SMALL + TINY, (128,), "warm", 0.97, 1.1),
    Goal("fp32", "12:16", LARGE, (128,), "cold", 0.97, 1.1),
    Goal("fp32", "1:4", WIDE, (128,), "warm", 2.2, 3.0),
    Goal("fp32", "block16x16:0.25", WIDE, (128,), "warm", 2.2, 3.0),
)
# the time of N:16 is proportional to N
CURVE = Settings(
    shapes=WIDE,
    batches=(1, 8, 128),
    cold_batches=(),
    dtypes=("fp32",),
    patterns=tuple(f"{n}:16" for n in range(1, 17)),
    seconds=1.5,
)


# for all engines of a row: on several threads a sample takes some 20 ms, most of it untimed
_SECONDS = 1.0


def parts(threads: tuple[int, ...], seconds: float | None = None) -> list[Settings]:
    """The sweeps that measure every goal, each case once, and the curve of N:16 on one thread.

    ``seconds`` for all engines of a row of the former, 1 if None.
    """
    cases: dict[tuple[str, tuple[int, int], str, int], dict[str, None]] = {}
    for goal in GOALS:
        for shape in goal.shapes:
            for batch in goal.batches:
                cases.setdefault((goal.dtype, shape, goal.weights, batch), {})[goal.pattern] = None
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
            )
            for (dtype, shape, weights, patterns), batches in groups.items()
        ),
        CURVE,
    ]


@dataclass(frozen=True)
class Standing:
    """A goal and the rows of one run that it covers, on one number of threads."""

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
    """Every goal of which the result has rows."""
    found = list(comparisons(result))
    for goal in GOALS:
        for threads in dict.fromkeys(each.row["threads"] for each in found):
            rows = tuple(each for each in found if each.row["threads"] == threads and goal.covers(each.row))
            if rows:
                yield Standing(goal, threads, rows)


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
        f"{geometric_mean(row.speedup for row in each.rows):.2f}x",
        f"{worst.speedup:.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{worst.row['out']}x{worst.row['in']}, batch {worst.row['batch']}",
        f"{worst.row['bound']:.2f}x",
        f"{goal.least:.2f}x",
        f"{goal.aim:.2f}x",
        each.verdict,
    )


def _span(batches: Iterable[int]) -> str:
    listed = sorted(batches)
    return str(listed[0]) if len(listed) == 1 else f"{listed[0]}-{listed[-1]}"
