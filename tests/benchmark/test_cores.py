"""Samples that were taken while cores of the machine were shared are dropped."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from sparsecomp.benchmark import cores
from sparsecomp.benchmark.cores import Cores
from sparsecomp.engines import timing

APART, CLOCKED_DOWN, TOGETHER, BESIDE_A_NEIGHBOUR = [2.4, 2.3], [2.1, 2.0], [1.3, 1.0], [2.3, 1.2]


class _Machine:
    """Two cores, and what each look at both finds; then they are at their full rate."""

    def __init__(self, *looks: list[float]) -> None:
        self.looks = list(looks)

    def __call__(self, asked: Sequence[int]) -> list[float]:
        assert list(asked) in ([3, 5], [3], [5])
        if len(asked) == 1:
            return [2.4]
        return self.looks.pop(0) if self.looks else APART


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3})
    monkeypatch.setattr(cores, "_PAUSE_S", 0.001)


def test_cores_at_their_full_rate_count() -> None:
    machine = _Machine(APART, CLOCKED_DOWN, APART)
    found = Cores(2, machine)
    assert found() and found() and found() and not machine.looks
    assert found.record() == {"dropped_rounds": 0, "waited_s": 0.0, "gave_up": False}


@pytest.mark.parametrize("shared", [TOGETHER, BESIDE_A_NEIGHBOUR])
def test_shared_cores_are_waited_for(shared: list[float]) -> None:
    machine = _Machine(APART, *[shared] * 7, CLOCKED_DOWN)
    found = Cores(2, machine)
    assert found()
    assert not found() and not machine.looks
    assert found()
    record = found.record()
    assert record["dropped_rounds"] == 1 and found.waited_s >= 0.007 and not record["gave_up"]


def test_the_full_rate_may_be_seen_late() -> None:
    slow = [1.3, 1.3]
    machine = _Machine(slow, APART, slow)
    found = Cores(2, lambda asked: machine(asked) if len(asked) == 2 else [1.3])
    assert found() and found()
    assert not found()


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "MOST_PATIENCE_S", 0.05)
    found = Cores(2, _Machine(*[TOGETHER] * 10**6))
    assert not found()
    assert found() and found() and found.record()["gave_up"]


@pytest.mark.parametrize("threads", [1, 3])
def test_one_core_and_cores_that_are_not_there_are_never_waited_for(threads: int) -> None:
    assert Cores(threads, _Machine(*[TOGETHER] * 9))()


def test_rounds_that_do_not_count_are_taken_again() -> None:
    answers = [True, False, False] + [True] * timing.MIN_REPETITIONS
    calls: list[str] = []

    def sample(name: str) -> float:
        calls.append(name)
        return len(calls) * 1.0

    timings = timing.measure({"a": lambda: sample("a"), "b": lambda: sample("b")}, 0.0, lambda: answers.pop(0))
    assert timings["a"].samples == timings["b"].samples == timing.MIN_REPETITIONS
    # one untimed each, a round that counts (3 and 4), two that do not (5 to 8), and six that do
    assert timings["a"].low > 8 and timings["b"].low > 8, "the second smallest of seven"
    assert len(calls) == 2 * (1 + 2 + timing.MIN_REPETITIONS)


def test_real_cores_have_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    mine = sorted(os.sched_getaffinity(0))
    rates = cores._rates(mine[:2])
    assert len(rates) == len(mine[:2]) and all(rate > 0 for rate in rates)
    assert sorted(os.sched_getaffinity(0)) == mine
