"""How a configuration is chosen by measurement; the clock is replaced, for no GPU is there."""

from __future__ import annotations

from collections.abc import Callable

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
