"""The benchmark of training steps, on tiny layers: what it writes and what it says. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.training import step
from bench.training.ways import DENSE, LIBRARY, SPARSE, UNMASKED, Y_ONLY, Stack, Training, trainings, ways
from sparsecomp.nn.training import SparseTrainingLinear


def test_every_way_of_a_layer_gives_the_products_of_its_weight() -> None:
    x = torch.randn(5, 32, requires_grad=True)
    for way, layer in ways(nn.Linear(32, 48)).items():
        assert isinstance(layer, SparseTrainingLinear) == (way in (SPARSE, Y_ONLY))
        grad = torch.randn(5, 48)
        y = layer(x)
        got = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
        want = grad @ layer.weight, grad.t() @ x, grad.sum(0)
        torch.testing.assert_close(y, x @ layer.weight.t() + layer.bias, rtol=0, atol=1e-4)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_every_training_of_the_stack_makes_the_same_steps_under_masks() -> None:
    stack, x = Stack(1, 64), torch.randn(2, 4, 64)
    found = trainings(stack)
    assert set(found) >= {DENSE, SPARSE, UNMASKED}
    for each in found.values():
        for _ in range(3):
            each.step(x)
    want = found[DENSE].model.state_dict()
    for way in set(found) & {LIBRARY, SPARSE}:
        got = found[way].model.state_dict()
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-3)
    assert not hasattr(Training(stack, UNMASKED), "handle")
    assert (want["blocks.0.up.weight"] == 0).float().mean() == 0.5
    assert sum(isinstance(each, SparseTrainingLinear) for each in found[SPARSE].model.modules()) == 6


def test_the_program_writes_its_rows_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    whole = step.run

    def tiny(threads: list[int], repeats: int, depth: int) -> dict[str, Any]:
        return whole(threads, repeats, depth, shapes=[(48, 32)], width=32, tokens=16)

    monkeypatch.setattr(step, "run", tiny)
    output = tmp_path / "step.json"
    assert step.main(["--threads", "1", "--repeats", "2", "--depth", "1", "--output", str(output)]) == 0
    layer, whole_step = json.loads(output.read_text())["rows"]
    assert (layer["what"], layer["out"], layer["in"], layer["repeats"]) == ("layer", 48, 32, 2)
    assert (whole_step["what"], whole_step["layers"]) == ("step", 6)
    for row, pairs in (
        (layer, [(DENSE, SPARSE), (DENSE, Y_ONLY)]),
        (whole_step, [(DENSE, SPARSE), (UNMASKED, SPARSE)]),
    ):
        for dense, sparse in pairs:
            found = row["ratios"][f"{dense} / {sparse}"]
            assert 0 < found["low"] <= found["median"] <= found["high"]
    assert layer["parts"]["fetch"]["median"] >= 0 and layer["bounds"][DENSE] > 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("48x32" in line for line in lines) and any("6 layers" in line for line in lines)
    assert "oals" in lines[-1] or "oals" in lines[-2]
