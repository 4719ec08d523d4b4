"""How a configuration is chosen by measurement; the clock is replaced, for no GPU is there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sparsecomp.kernels import sparse_mma_tuning as tuning
from sparsecomp.kernels.sparse_mma_config import CONFIGS, Config


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    state = [False]
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


def test_the_fastest_is_measured_once(capturing: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Config] = []
    times = {CONFIGS[0]: 3.0, CONFIGS[1]: 1.0, CONFIGS[2]: 2.0}

    def clock(call: Callable[[], object]) -> float:
        call()
        return times[ran[-1]]

    monkeypatch.setattr(tuning, "seconds", clock)
    for _ in range(2):
        assert tuning.tuned((0, 64, 64, 8), CONFIGS[:3], ran.append) == CONFIGS[1]
        assert ran == list(CONFIGS[:3])
    assert tuning.known((0, 64, 64, 8)) == CONFIGS[1] and tuning.known((0, 64, 64, 16)) is None


def test_nothing_is_timed_while_a_graph_is_captured(capturing: list[bool]) -> None:
    capturing[0] = True
    ran: list[Config] = []
    assert tuning.tuned((1,), CONFIGS[3:5], ran.append) == CONFIGS[3]
    assert ran == [] and tuning.known((1,)) is None


def test_batches_share_a_measurement_up_to_a_power_of_two() -> None:
    assert [tuning.bucket(tokens) for tokens in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_what_cannot_run_is_left_out(capturing: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {CONFIGS[1]: 2.0, CONFIGS[2]: 1.0}

    def run(config: Config) -> float:
        if config not in times:
            raise RuntimeError(f"out of resource: shared memory of {CONFIGS.index(config)}")
        return times[config]

    monkeypatch.setattr(tuning, "seconds", lambda call: call())
    assert tuning.tuned((2,), CONFIGS[:3], run) == CONFIGS[2]
    with pytest.raises(RuntimeError, match="shared memory of 3"):
        tuning.tuned((3,), CONFIGS[3:5], run)
    assert tuning.known((3,)) is None


class Event:
    """A CUDA event that notes when it is recorded."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def record(self) -> None:
        self.notes.append("event")

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: Event) -> float:
        return 2.0


@pytest.mark.parametrize("full", [False, True])
def test_the_cache_is_overwritten_between_what_is_timed(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    sizes: list[int] = []

    def empty(size: int, **_: object) -> SimpleNamespace:
        sizes.append(size)
        if full:
            raise torch.OutOfMemoryError
        return SimpleNamespace(zero_=lambda: notes.append("flush"))

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(notes))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=100))
    monkeypatch.setattr(torch, "empty", empty)
    assert tuning.seconds(lambda: notes.append("call")) == 2e-3
    timed = ["event", "call", "event"]
    assert notes == ["call", *((timed if full else ["flush", *timed]) * tuning._ROUNDS)] and sizes == [200]
