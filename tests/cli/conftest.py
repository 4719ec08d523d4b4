"""Every test of the command line runs in a folder of its own that holds the factories of shop.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a folder that holds the factories, with measurements kept apart; 80 columns wide."""
    (tmp_path / "shop.py").write_text((HERE / "shop.py").read_text())
    (tmp_path / "torn.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path
