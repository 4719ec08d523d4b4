"""Tensors here are small: on more than one thread the tests would only wait for their threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # few rows are enough to test with; the warning of them has tests of its own
    # the hook is given the items of every folder
    for item in (each for each in items if Path(__file__).parent in each.path.parents):
        item.add_marker(pytest.mark.filterwarnings("ignore:.*calibration rows for each input:UserWarning"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
