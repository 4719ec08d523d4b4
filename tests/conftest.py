"""The order of the tests, and what several of their files ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecomp.machine import native as machine
from sparsecomp.nn.eager.probe import probe
from tests.other_defaults import PAST_MODES, TRACED, other_defaults

TESTS = Path(__file__).parent
# tensors are small there: on more than one thread the tests would only wait for their threads
ONE_THREAD = ("methods", "models", "pruning", "training")
# fixtures that compile: what asks for one is slow
COMPILING = {"twins", "simulated", "own_cache"}


@pytest.fixture
def native() -> Any:
    """The extension, where it takes part in eager calls."""
    found = probe()
    if isinstance(found, str) or found.extension is None:
        pytest.skip(found if isinstance(found, str) else str(found.in_python))
    return machine.native()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    if request.path.parent.name in ONE_THREAD:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--other-defaults", action="store_true", help="see tests/other_defaults.py")


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--other-defaults"):
        yield
        return
    if request.path.relative_to(TESTS).as_posix() in PAST_MODES or request.node.name.startswith(TRACED):
        pytest.skip("looks at calls that go past torch's modes, of which a default device is one")
    with other_defaults():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # waits for processes of its own: begun first, they go on beside all the others
    items.sort(key=lambda item: item.path.name != "test_triton_versions.py")
    for item in (each for each in items if COMPILING & set(getattr(each, "fixturenames", ()))):
        item.add_marker(pytest.mark.slow)
    # few rows are enough there; the warning of them has tests of its own
    for item in (each for each in items if each.path.parent.name == "pruning"):
        item.add_marker(pytest.mark.filterwarnings("ignore:.*calibration rows for each input:UserWarning"))
