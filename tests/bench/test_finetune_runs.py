"""Runs of the fine-tuning benchmark on made-up texts: made once, resumed, chosen by validation, reported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsecomp as sc
from bench.demo.integers import why_not_here
from bench.finetune.__main__ import main
from bench.finetune.data import Task
from bench.finetune.judging import mcnemar, unpacked
from bench.finetune.report import collect, summary
from bench.finetune.results import Results
from bench.finetune.runner import Bench, Runner
from bench.finetune.runs import Run, Sparse, chosen, registry
from bench.finetune.task import logits_of
from sparsecomp.errors import SparsecompError
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.training.choice import check_scope
from sparsecomp.training.rules import get_rule
from tests.bench.toy_texts import WIDTH, Tiny, encode, made_up


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the program has it; more would wait for each other on models so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS = {
    run.name: run
    for run in [
        Run("toy/dense", "toy", 2, (1e-2, 3e-2), keep=True),
        Run("toy/dense-again/1", "toy", 1, (1e-2,), "toy/dense"),
        Run(
            "toy/2:4-fast/1", "toy", 1, (1e-2,), "toy/dense", Sparse("2:4", start="fast"), "toy/dense-again/1", checks=2
        ),
    ]
}


def bench(folder: Path, load: Any = None) -> Bench:
    task = Task("toy", ("low", "high"), 8, made_up(200, 1), made_up(40, 2), made_up(60, 3))
    return Bench(load or (lambda name: task), Tiny, WIDTH, encode, ("encoder.inner",), folder / "dense", False)


def test_runs_are_made_once_and_the_rest_is_made_later(tmp_path: Path) -> None:
    results = Results(tmp_path / "work")
    some = [RUNS["toy/dense"], RUNS["toy/dense-again/1"]]
    Runner(bench(tmp_path), results, RUNS).complete(some, [0])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert len(files) == 3
    Runner(bench(tmp_path), results, RUNS).complete(list(RUNS.values()), [0, 1])
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(list((tmp_path / "work").iterdir())) == 7

    def untouched(name: str) -> Task:
        raise AssertionError(f"{name} was loaded, but nothing is left to do")

    Runner(bench(tmp_path, untouched), results, RUNS).complete(list(RUNS.values()), [0, 1])


def test_a_sitting_may_try_some_rates_only(tmp_path: Path) -> None:
    run = Run("toy/dense-again/1", "toy", 1, (1e-2, 3e-2), "toy/dense")
    runs, results = {"toy/dense": RUNS["toy/dense"], run.name: run}, Results(tmp_path / "work")
    Runner(bench(tmp_path), results, runs).complete(list(runs.values()), [0], [3e-2])
    assert len(results.chosen(RUNS["toy/dense"], [0])) == 1
    assert results.read(run, 0, 3e-2) is not None
    assert results.read(run, 0, 1e-2) is None and results.chosen(run, [0]) == []


def test_a_run_of_steps_at_rate_0_leaves_what_is_kept_to_the_method(tmp_path: Path) -> None:
    sparse = Sparse("unstructured:0.2", "obs", None, "global", {"gradients": 4}, {"curve": "exponential", "every": 4})
    run = Run("toy/once", "toy", 0, (0.0,), "toy/dense", sparse, "toy/dense", keep=True, steps=8)
    runs, results = {"toy/dense": RUNS["toy/dense"], run.name: run}, Results(tmp_path / "work")
    runner = Runner(bench(tmp_path), results, runs)
    runner.complete(list(runs.values()), [0])
    row = results.chosen(run, [0])[0]
    assert (row["steps"], row["density"]) == (8, 52 / 256)
    made, dense = (runner.trained(each, 0).state_dict() for each in (run, RUNS["toy/dense"]))
    assert {name for name in dense if not torch.equal(made[name], dense[name])} == {"encoder.inner.weight"}


def test_a_run_in_integers_is_judged_as_it_runs(tmp_path: Path) -> None:
    pattern = "8:16+int8@a8"
    if why := why_not_here(pattern):
        pytest.skip(why)
    run = Run("toy/int8", "toy", 1, (1e-2,), "toy/dense", Sparse(pattern, start="fast"), "toy/dense", keep=True)
    runs, results = {"toy/dense": RUNS["toy/dense"], run.name: run}, Results(tmp_path / "work")
    runner = Runner(bench(tmp_path), results, runs)
    runner.complete(list(runs.values()), [0])
    row, model, test = results.chosen(run, [0])[0], runner.trained(run, 0), runner.parts("toy").test
    sc.compile(model, pattern, only=["encoder.inner"], where="everywhere")
    assert isinstance(model.encoder.inner, sc.SparseLinear)
    assert torch.equal(unpacked(row["right"], 60), logits_of(model, test).argmax(dim=1) == test.labels)


def test_a_result_says_what_was_done_and_is_the_same_in_one_sitting_or_two(tmp_path: Path) -> None:
    rows = []
    for name, sittings in (("one", [list(RUNS.values())]), ("two", [[run] for run in RUNS.values()])):
        results = Results(tmp_path / name)
        for runs in sittings:
            Runner(bench(tmp_path / name), results, RUNS).complete(runs, [0])
        row = results.chosen(RUNS["toy/2:4-fast/1"], [0])[0]
        rows.append({key: value for key, value in row.items() if key != "seconds"})
    assert rows[0] == rows[1]
    assert rows[0]["density"] == 0.5 and rows[0]["steps"] == 7
    assert [step for step, _ in rows[0]["curve"]] == [0, 3, 6]
    assert rows[0]["settings"]["distilled"] and rows[0]["settings"]["sparse"]["start"] == "fast"
    right = unpacked(rows[0]["right"], rows[0]["tests"])
    assert float(right.double().mean()) == pytest.approx(rows[0]["test"])


def test_validation_chooses_the_rate_and_a_missing_one_is_named(tmp_path: Path) -> None:
    results, run = Results(tmp_path), RUNS["toy/dense"]
    results.write(run, 0, 1e-2, {"validation": 0.7, "test": 0.9, "rate": 1e-2})
    with pytest.raises(SparsecompError, match=r"no result on seed 0 at the rate 0\.03"):
        results.rate(run)
    results.write(run, 0, 3e-2, {"validation": 0.8, "test": 0.1, "rate": 3e-2})
    assert results.rate(run) == 3e-2
    results.write(run, 0, 3e-2, {"validation": 0.7, "test": 0.1, "rate": 3e-2})
    assert results.rate(run) == 1e-2


def test_the_report_fits_80_columns_and_compares_with_dense_at_equal_budget(tmp_path: Path) -> None:
    results = Results(tmp_path / "work")
    Runner(bench(tmp_path), results, RUNS).complete(list(RUNS.values()), [0, 1])
    result = json.loads(json.dumps(collect(results, RUNS, [0, 1])))
    text = summary(result)
    assert max(map(len, text.splitlines())) <= 80
    by_run = {row["run"]: row for row in result["rows"] if row["seed"] == 1}
    sparse, dense = by_run["toy/2:4-fast/1"], by_run["toy/dense-again/1"]
    both = [unpacked(row["right"], 60) for row in (sparse, dense)]
    assert f"{mcnemar(*both)[2]:.2f}" in next(line for line in text.splitlines() if "2:4-fast/1" in line)
    tried = next(row for row in result["tried"] if row["run"] == "toy/2:4-fast/1")
    goal = next(row for row in result["rows"] if (row["run"], row["seed"]) == ("toy/dense", 0))["validation"] - 0.01
    first = next((str(step) for step, score in tried["curve"] if score >= goal), "never")
    assert text.splitlines()[-1].split()[-2:] == [first, "7"]
    assert summary({**result, "rows": []}) == "no result yet"


def test_runs_bring_what_they_start_from() -> None:
    runs = registry()
    names = [run.name for run in chosen(runs, ["movies/2:4-fast/1"])]
    assert names == ["movies/dense", "movies/2:4-fast/1"]
    with pytest.raises(SparsecompError, match="no run matches"):
        chosen(runs, ["movies/3:4*"])


def test_every_run_has_its_base_before_it_and_a_dense_one_of_equal_budget_beside_it() -> None:
    seen: dict[str, Run] = {}
    for run in registry().values():
        assert run.base is None or seen[run.base].base is None
        if run.sparse is not None:
            assert run.beside is not None
            beside = seen[run.beside]
            assert beside.sparse is None and beside.base == (run.base if any(run.rates) else None)
            assert beside.task == run.task
            if any(run.rates):
                assert beside.epochs == run.epochs and set(run.rates) <= set(beside.rates)
        seen[run.name] = run


def test_the_program_lists_its_runs_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "r8/8:16-fast/*"]) == 0
    assert capsys.readouterr().out.split() == ["r8/dense", "r8/8:16-fast/1", "r8/8:16-fast/2"]
    assert main(["--list", "--only", "nothing"]) == 1
    assert "no run matches" in capsys.readouterr().err


def test_settings_of_runs_are_plain_values() -> None:
    for run in registry().values():
        assert json.loads(json.dumps(dataclasses.asdict(run)))["name"] == run.name


def test_methods_and_patterns_of_runs_are_known_ones() -> None:
    for run in registry().values():
        if run.sparse is not None:
            pattern, _ = parse_weights(run.sparse.pattern)
            assert dataclasses.replace(get_rule(run.sparse.method), **run.sparse.rule)  # type: ignore[type-var]
            check_scope(run.sparse.scope, {"layer": pattern})
