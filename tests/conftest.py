"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # waits for processes of its own: begun first, they go on beside all the others
    items.sort(key=lambda item: item.path.name != "test_triton_versions.py")
