"""The options of ``sparsecomp prune``: each reaches the work it names, and gives what the Python call gives."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.cli.main import main
from sparsecomp.pruning import PruneReport

_FACTORIES = """\
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2)]
    return nn.Sequential(*blocks)


def batches():
    return [torch.randn(40, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
"""


@pytest.fixture(autouse=True)
def tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tower.py").write_text(_FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tower", raising=False)


def made() -> tuple[nn.Module, list[Tensor]]:
    import tower

    return tower.build(), tower.batches()


BASE = ["prune", "tower:build", "--method", "wanda", "--calibration", "tower:batches", "-o", "out.safetensors"]


def test_blocks_tuning_distillation_masks_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pattern", "*.2=1:4", "--pattern", "2:4", "--blocks", "--tune", "4", "--distill", "5", "--seed", "3"]
    options += [
        "--learning-rate",
        "0.002",
        "--held-out",
        "0.3",
        "--checkpoint",
        "work",
        "--save-masks",
        "m.safetensors",
    ]
    reports = [option for name in ("r.json", "r.csv", "r.html") for option in ("--report", name)]
    assert main([*BASE, *options, *reports]) == 0
    model, batches = made()
    dense, _ = made()
    tuning = sc.Tuning(steps=4, learning_rate=0.002, held_out=0.3, seed=3)
    patterns = {"*.2": "1:4", "*": "2:4"}
    report = sc.prune_blocks(model, batches, patterns, "wanda", tuning=tuning, seed=3, show_progress=False)
    tuning = sc.Tuning(steps=5, learning_rate=0.002, held_out=0.3, seed=3)
    sc.distill(model, dense, batches, masks=report.masks, output=lambda y, _: y, tuning=tuning, show_progress=False)
    state = load_file("out.safetensors")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    masks = load_file("m.safetensors")
    assert masks.keys() == report.masks.keys()
    assert all(torch.equal(mask, report.masks[name]) for name, mask in masks.items())
    assert [each["name"] for each in json.loads(Path("r.json").read_text())["tunings"]] == ["0", "1", "whole model"]
    assert "<svg" in Path("r.html").read_text() and "0.2,16x24,1:4" in Path("r.csv").read_text()
    assert len(list(Path("work").iterdir())) == 2
    out = capsys.readouterr().out
    assert "whole model: held-out loss" in out and "wrote out.safetensors" in out


def test_masks_go_in() -> None:
    assert main([*BASE, "--pattern", "2:4", "--save-masks", "m.safetensors"]) == 0
    first = load_file("out.safetensors")
    assert main([*BASE[:2], "--pattern", "2:4", "--masks", "m.safetensors", "-o", "out.safetensors"]) == 0
    second = load_file("out.safetensors")
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([*BASE, "--pattern", "2:4", "--masks", "missing.safetensors"], 'masks "missing.safetensors" cannot be read'),
        ([*BASE, "--pattern", "nothing.*=2:4"], 'pattern for "nothing.*" matches no layer'),
    ],
)
def test_one_line_says_what_is_wrong(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error, error


def test_wrong_options_cost_no_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def working(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sparsecomp.cli.models.load_model", working)
    assert main([*BASE, "--pattern", "2:4", "--distill", "-1"]) == 2
    assert '"-1" is no whole number of 0 or more' in capsys.readouterr().err
    assert main([*BASE, "--pattern", "2:4", "--learning-rate", "1e-3"]) == 2
    for option in ("--report", "--save-masks"):
        assert main([*BASE, "--pattern", "2:4", option, "nowhere/file.json"]) == 2
        assert 'there is no folder "nowhere"' in capsys.readouterr().err


def test_a_report_that_cannot_be_printed_does_not_cost_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(PruneReport, "__str__", broken)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main([*BASE, "--pattern", "2:4"]) == 1
    assert Path("out.safetensors").is_file()


@pytest.mark.parametrize("order", [["*.2=1:4", "2:4"], ["2:4", "*.2=1:4"]])
def test_a_pattern_without_a_glob_is_that_of_the_other_layers(order: list[str]) -> None:
    options = [word for pattern in order for word in ("--pattern", pattern)]
    assert main([*BASE, *options, "--report", "r.json"]) == 0
    layers = json.loads(Path("r.json").read_text())["layers"]
    assert [each["pattern"] for each in layers] == ["2:4", "1:4", "2:4", "1:4"]


@pytest.mark.parametrize(
    ("options", "judged"), [(["wanda"], False), (["wanda", "--held-out", "0.5"], True), (["best"], True)]
)
def test_batches_are_held_out_where_something_is_judged_by_them(options: list[str], judged: bool) -> None:
    rest = [word for word in BASE if word not in ("--method", "wanda")]
    assert main([*rest, "--pattern", "2:4", "--method", *options, "--report", "r.json"]) == 0
    layers = json.loads(Path("r.json").read_text())["layers"]
    assert all((each["held_out_error"] is not None) == judged for each in layers)
    assert any("damping" in note for note in layers[0]["notes"]) == ("best" in options)
