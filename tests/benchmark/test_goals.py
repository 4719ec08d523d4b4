"""The goals of the benchmark: every case measured once, and a verdict that says what was reached."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cpu import anyshape
from sparsecomp.benchmark import goals, report
from sparsecomp.cli.main import main

GOAL = goals.GOALS[1]


def rows(speedups: dict[int, float], threads: int = 1) -> list[dict[str, Any]]:
    """A dense and a sparse row of GOAL's kind for each batch."""
    made = []
    for batch, speedup in speedups.items():
        (shape,) = GOAL.shapes
        case = {"out": shape[0], "in": shape[1], "batch": batch, "dtype": GOAL.dtype, "threads": threads}
        for engine, pattern, us in (("torch", None, 100.0), ("sparsecomp", GOAL.pattern, 100.0 / speedup)):
            row = case | {"weights": GOAL.weights, "engine": engine, "pattern": pattern, "us": us}
            made.append(row | {"us_low": us, "us_high": us, "bound": 2.0, "bound_by": "compute"})
    return made


def test_the_parts_measure_every_case_of_every_goal_once() -> None:
    measured: dict[tuple[Any, ...], int] = {}
    for part in goals.parts((1, 2), 0.25):
        if part is goals.CURVE:
            continue
        assert part.threads == (1, 2) and part.seconds == 0.25
        for weights, batches in (("warm", part.batches), ("cold", part.cold_batches)):
            for shape in part.shapes:
                for batch in batches:
                    for pattern in part.patterns:
                        case = (part.dtypes, shape, weights, batch, pattern)
                        measured[case] = measured.get(case, 0) + 1
    wanted = {
        ((goal.dtype,), shape, goal.weights, batch, goal.pattern)
        for goal in goals.GOALS
        for shape in goal.shapes
        for batch in goal.batches
    }
    assert set(measured) >= wanted
    assert set(measured.values()) == {1}


@pytest.mark.parametrize(
    ("speedups", "verdict", "worst"),
    [
        ({2: 2.1, 4: 2.0}, "all, and the aim", 4),
        ({2: 1.8, 4: 1.9, 8: 5.0}, "all", 2),
        ({2: 1.8, 4: 1.6, 8: 1.2}, "1 of 3", 8),
        ({2: 1.69}, "0 of 1", 2),
    ],
)
def test_a_goal_stands_where_its_worst_row_does(speedups: dict[int, float], verdict: str, worst: int) -> None:
    other = rows({2: 0.5}, threads=2)
    first, second = goals.standings({"rows": rows(speedups) + other})
    assert (first.goal, first.threads, first.verdict, first.worst.row["batch"]) == (GOAL, 1, verdict, worst)
    assert (second.threads, second.verdict) == (2, "0 of 1")
    text = goals.render({"rows": rows(speedups)})
    assert f"{min(speedups.values()):.2f}x" in text
    assert verdict in text


def test_a_result_without_rows_of_a_goal_has_no_table() -> None:
    assert goals.render({"rows": rows({3: 2.0})}) == ""


def test_time_by_n_is_shown_as_a_share_of_dense() -> None:
    dense = rows({1: 1.0})[0]
    sparse = [dense | {"engine": f"n{n}", "pattern": f"{n}:16", "us": 10.0 * n, "bound": 2.0} for n in range(1, 9)]
    text = report._curve(list(report.comparisons({"rows": [dense, *sparse]})))
    assert "8:16" in text
    assert "0.80" in text
    assert report._curve(list(report.comparisons({"rows": [dense, *sparse[:3]]}))) == ""


def test_goals_and_shapes_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--goals", "--shapes", "64x64"]) != 0
    assert "--goals sets shapes itself" in capsys.readouterr().err


def test_random_sizes_are_the_same_for_one_seed_and_within_range() -> None:
    drawn = anyshape.sizes(300)
    assert drawn == anyshape.sizes(300) != anyshape.sizes(300, seed=1)
    for out, columns, batch in drawn:
        assert 1 <= out <= anyshape.MOST_FEATURES
        assert 1 <= columns <= anyshape.MOST_FEATURES
        assert 1 <= batch <= anyshape.MOST_BATCH


def test_a_compiled_layer_is_compared_with_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyshape, "_SECONDS", 0.01)
    counts = [False, True]
    found = [
        anyshape.compare(33, 65, 3, "fp32", lambda: counts.pop(0)),
        anyshape.compare(1, 1, 1, "bf16", lambda: True),
    ]
    assert not counts, "a comparison that does not count is made again"
    assert all(row["low"] <= row["speedup"] <= row["high"] for row in found)
    slow = found[0] | {"speedup": 0.5, "low": 0.4, "high": 0.6, "sparse": True}
    text = anyshape.render([*found, slow])
    assert "0.50x" in text
    assert "3 layers" in text
    assert "1 layer: 0 packed; 1 left dense" in anyshape.render([slow | {"sparse": False}])
    assert "1 of them beyond their spread" in text or "2 of them beyond" in text
