"""The order of the tests, and what several of their files ask for."""

from __future__ import annotations

from typing import Any

import pytest

from sparsecomp.backends import cpu


@pytest.fixture
def native() -> Any:
    """The extension, where this torch lets it read tensors."""
    module = cpu.native()
    if isinstance(module, str) or cpu._torch_functions() is None:
        pytest.skip(module if isinstance(module, str) else "this torch has no DLPack table")
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # waits for processes of its own: begun first, they go on beside all the others
    items.sort(key=lambda item: item.path.name != "test_triton_versions.py")
