"""The goals of the benchmark: every case measured once, and a verdict that says what was reached."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cpu import anyshape
from sparsecomp.benchmark import aims, goals, report
from sparsecomp.benchmark.aims import LARGE
from sparsecomp.cli.main import main

GOAL = aims.GOALS[1]


MACHINE = {"isa": "avx512_bf16", "vnni": True}
ALONE = {"isa": "avx2", "vnni": False}


def rows(speedups: dict[int, float], threads: int = 1, goal: aims.Goal = GOAL) -> list[dict[str, Any]]:
    """A dense and a sparse row of the goal's kind for each batch."""
    made = []
    for batch, speedup in speedups.items():
        shape = goal.shapes[0]
        case = {"out": shape[0], "in": shape[1], "batch": batch, "dtype": goal.dtype, "threads": threads}
        for engine, pattern, us in (("torch", None, 100.0), ("sparsecomp", goal.pattern, 100.0 / speedup)):
            row = case | {"weights": goal.weights, "engine": engine, "pattern": pattern, "us": us}
            made.append(row | {"us_low": us, "us_high": us, "bound": 2.0, "bound_by": "compute"})
    return made


@pytest.mark.parametrize(("isa", "vnni"), [("avx2", False), ("avx2", True), ("avx512", False), ("avx512", True)])
def test_the_parts_measure_every_case_of_every_goal_of_a_machine_once(isa: str, vnni: bool) -> None:
    measured: dict[tuple[Any, ...], int] = {}
    machine = aims.kinds(isa, vnni)
    for part in goals.parts((1, 2), machine, 0.25):
        if part is goals.CURVE:
            continue
        assert part.threads == (1, 2) and part.seconds == 0.25
        assert part.int8 == any("@a8" in pattern for pattern in part.patterns)
        for weights, batches in (("warm", part.batches), ("cold", part.cold_batches)):
            for shape in part.shapes:
                for batch in batches:
                    for pattern in part.patterns:
                        case = (part.dtypes, shape, weights, batch, pattern)
                        measured[case] = measured.get(case, 0) + 1
    wanted = {
        ((goal.dtype,), shape, goal.weights, batch, pattern)
        for goal in aims.GOALS
        if goal.kind in machine
        for shape in goal.shapes
        for batch in goal.batches
        for pattern in goal.patterns
    }
    assert set(measured) == wanted
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
    first, second = goals.standings({"machine": MACHINE, "rows": rows(speedups) + other})
    assert (first.goal, first.threads, first.verdict, first.worst.row["batch"]) == (GOAL, 1, verdict, worst)
    assert (second.threads, second.verdict) == (2, "0 of 1")
    text = goals.render({"machine": MACHINE, "rows": rows(speedups)})
    assert f"{min(speedups.values()):.2f}x" in text
    assert verdict in text


def test_a_result_without_rows_of_a_goal_has_no_table() -> None:
    assert goals.render({"machine": MACHINE, "rows": rows({3: 2.0})}) == ""
    # nor one of another kind of machine
    assert (
        goals.render(
            {"machine": ALONE, "rows": rows({2: 2.0}, goal=aims.Goal("fp32", "8:16", LARGE, (2,), "cold", 1, 2))}
        )
        == ""
    )


def test_machines_are_held_to_what_they_can() -> None:
    assert aims.kinds("avx2", False) == (aims.ANY, aims.AVX2)
    assert aims.kinds("avx2", True) == (aims.ANY,)  # dense engines would use what ours are kept from
    assert aims.kinds("avx512_bf16", True) == (aims.ANY, aims.WIDE, aims.VNNI)
    assert aims.kinds("avx512", False) == aims.kinds("neon", False) == (aims.ANY, aims.WIDE)
    assert goals.kinds_of({"machine": {"isa": "avx2"}}) == (aims.ANY, aims.AVX2)
    assert goals.kinds_of({"machine": {"isa": "avx512"}}) == (aims.ANY, aims.WIDE, aims.VNNI)
    assert {goal.kind for goal in aims.GOALS} == {aims.ANY, aims.WIDE, aims.AVX2, aims.VNNI}
    assert set(goals.kinds_here()) <= {aims.ANY, aims.WIDE, aims.AVX2, aims.VNNI}


def test_of_several_patterns_the_fastest_of_a_turn_counts() -> None:
    goal = next(each for each in aims.GOALS if each.kind == aims.AVX2 and each.pattern == "2:4 or 4:8")
    found = rows({1: 1.7}, goal=goal)
    two, four = found[1] | {"pattern": "2:4"}, found[1] | {"pattern": "4:8", "us": 50.0}
    again = [found[0] | {"us": 80.0}, two | {"us": 80.0}]
    (standing,) = goals.standings({"machine": ALONE, "rows": [found[0], two, four, *again]})
    assert standing.goal is goal and [each.speedup for each in standing.rows] == [2.0, 1.0]
    assert [each.row["pattern"] for each in standing.rows] == ["4:8", "2:4"] and standing.verdict == "1 of 2"


def test_int8_is_held_to_dense_int8_and_to_floats() -> None:
    same, over = (
        next(
            goal
            for goal in aims.GOALS
            if (goal.kind, goal.pattern, goal.over) == (aims.AVX2, "8:16+int8@a8", kind) and 8 in goal.batches
        )
        for kind in ("same", "other")
    )
    assert (same.least, same.aim, over.least) == (1.6, 1.85, 3.2)
    dense, sparse = rows({8: 3.5}, goal=same)
    integers = dense | {"engine": "onnxruntime int8", "numbers": "int8", "us": 50.0}
    ours = sparse | {"numbers": "int8"}
    standings = {each.goal: each for each in goals.standings({"machine": ALONE, "rows": [dense, integers, ours]})}
    assert standings[same].worst.speedup == pytest.approx(1.75) and standings[same].verdict == "all"
    assert standings[over].worst.speedup == pytest.approx(3.5) and standings[over].verdict == "all"
    text = goals.render({"machine": ALONE, "rows": [dense, integers, ours]})
    assert "1.75x" in text and "3.50x" in text
    # floats alone say nothing of a goal over dense int8
    assert list(goals.standings({"machine": ALONE, "rows": [dense, ours]})) == []


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
    assert main(["bench", "--goals", "--no-int8"]) != 0
    assert "--goals sets no-int8 itself" in capsys.readouterr().err


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
