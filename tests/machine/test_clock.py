"""The clock: whose turn it is, how many rounds there are, and that the work of a GPU is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from sparsecomp.machine import clock


def _noting(calls: list[str], names: str) -> dict[str, Callable[[], float]]:
    """Samplers that note their turn and give how many there were."""

    def sample(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    return {name: partial(sample, name) for name in names}


@pytest.mark.parametrize(("shift", "order"), [(1, "abcbcacab"), (0, "abcabcabc"), (2, "abccabbca")])
def test_every_round_has_each_once_and_starts_further_on(shift: int, order: str) -> None:
    calls: list[str] = []
    samples = clock.in_turn(_noting(calls, "abc"), 0.0, 3, 9, shift=shift)
    assert "".join(calls) == order
    assert samples == {name: [place + 1.0 for place, each in enumerate(order) if each == name] for name in "abc"}


def test_rounds_go_on_for_the_budget_and_end_at_the_most() -> None:
    calls: list[str] = []
    assert len(clock.in_turn(_noting(calls, "a"), 60.0, 2, 5)["a"]) == 5
    begin = time.perf_counter()
    samples = clock.in_turn({"a": lambda: time.sleep(0.01) or 1.0}, 0.05, 1, 10**6)
    assert 0.05 <= time.perf_counter() - begin < 5 and 1 <= len(samples["a"]) <= 5


def test_a_round_that_does_not_count_is_taken_again() -> None:
    calls: list[str] = []
    answers = [True, False, True]
    samples = clock.in_turn(_noting(calls, "ab"), 0.0, 2, 2, counts=lambda: answers.pop(0))
    # the round that was dropped had b first, and so has the one in its place
    assert "".join(calls) == "abbaba" and samples == {"a": [1.0, 6.0], "b": [2.0, 5.0]}


def test_seconds_are_those_of_the_run_and_end_with_the_work_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.01 <= clock.seconds(partial(time.sleep, 0.01)) < 5
    awaited: list[str] = []

    def synchronize(place: str) -> None:
        awaited.append(place)
        time.sleep(0.02)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert clock.seconds(lambda: awaited.append("run"), "cuda:1") >= 0.02
    assert awaited == ["run", "cuda:1"]
