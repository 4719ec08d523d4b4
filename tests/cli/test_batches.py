"""Batches from a factory: what is no list of batches is refused, and too few rows are told of."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.cli.main import main

_FACTORIES = """\
import torch


def one_tensor():
    return torch.ones(20, 32, dtype=torch.float32, device="cpu")


def few():
    return [torch.randn(40, 32, generator=torch.Generator().manual_seed(0))]


def many():
    return [torch.randn(400, 32, generator=torch.Generator().manual_seed(0))]
"""

COMPILE = ["compile", "shop:build", "--pattern", "2:4", "--everywhere", "-o", "x.safetensors"]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.py").write_text(_FACTORIES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "data", raising=False)


@pytest.mark.parametrize("verb", [COMPILE, ["prune", "shop:build", "--pattern", "2:4", "-o", "x.safetensors"]])
@pytest.mark.parametrize(
    ("factory", "item", "says"),
    [
        ("data:one_tensor", [], '"data:one_tensor" gave one tensor, of shape (20, 32); return a list: [batch]'),
        ("data:one_tensor", ["--batch-item", "0"], "gave one tensor"),
        ("data:few", ["--batch-item", "0"], "batch 0 is a tensor, of which --batch-item 0 would take rows"),
        ("data:few", ["--batch-item", "0,1"], "leave out --batch-item"),
    ],
)
def test_rows_are_not_taken_for_batches(
    verb: list[str], factory: str, item: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--method", "wanda", "--calibration", factory, *item]) == 1
    assert says in capsys.readouterr().err and not Path("x.safetensors").exists()


@pytest.mark.parametrize(
    ("factory", "method", "told"), [("few", "wanda", 2), ("many", "wanda", 0), ("few", "magnitude", 0)]
)
def test_compile_tells_of_few_rows_as_prune_does(
    factory: str, method: str, told: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMPILE, "--method", method, "--calibration", f"data:{factory}"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "calibration rows" in line]
    assert len(lines) == bool(told)
    if told:
        assert lines[0].startswith(
            'warning: 2 of 2 pruned layers have fewer than 4 calibration rows for each input ("2" '
        )
        assert "has 40 for 48" in lines[0] and "calibrate with more batches" in lines[0]


@pytest.mark.parametrize(("rows", "told"), [(40, True), (200, False)])
def test_the_warning_of_few_rows_points_at_the_call_of_compile(rows: int, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    calibration = sc.calibrate(model, [torch.randn(rows, 32)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sc.compile(model, "2:4", where="everywhere", method="wanda", calibration=calibration)
    found = [each for each in caught if "calibration rows" in str(each.message)]
    assert len(found) == told
    assert not told or found[0].filename == __file__
