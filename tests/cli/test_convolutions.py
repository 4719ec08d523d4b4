"""A network of convolutions through the commands: pruned whole, compiled where a product can run it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import sparsecomp as sc
from sparsecomp.cli.main import main
from sparsecomp.nn import SparseConv2d
from tests.cli.shop import convolutional, images

PRUNE = ["prune", "shop:convolutional", "--pattern", "2:4", "--method", "wanda", "--calibration", "shop:images"]


@pytest.mark.parametrize("everywhere", [True, False])
def test_prune_and_compile(everywhere: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "-o", "pruned.safetensors", "--save-masks", "masks.safetensors"]) == 0
    assert "1 of 3 stays dense in execution" in " ".join(capsys.readouterr().out.split())
    model = convolutional()
    report = sc.prune(model, "2:4", "wanda", sc.calibrate(model, images(), show_progress=False), show_progress=False)
    state, masks = load_file("pruned.safetensors"), load_file("masks.safetensors")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(masks[name], mask) for name, mask in report.masks.items())
    options = ["--everywhere"] if everywhere else ["--batch", "16"]
    assert main(["compile", "shop:convolutional", "--weights", "pruned.safetensors", *options, "-o", "c.st"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "larger than 1x1 stays dense in execution" in told
    loaded = sc.load("c.st", convolutional())
    assert not everywhere or type(loaded[2]) is SparseConv2d
    torch.testing.assert_close(loaded(images()[0]), model(images()[0]))
    again = [*PRUNE[:4], "--masks", "masks.safetensors", "-o", "again.safetensors"]
    assert main(again) == 0
    assert all(torch.equal(state[name], value) for name, value in load_file("again.safetensors").items())
