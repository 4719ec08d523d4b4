"""Weights that a model reads beside calling the layer: found while it is calibrated, and left dense by the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsecomp as sc
from sparsecomp.models.reads import noting_reads


class Reader(nn.Module):
    """Calls two of its layers, multiplies by the weight of a third, and asks only for facts of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.read, self.both = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.asked.weight.dtype)[:, : self.asked.weight.shape[1]]
        scaled = functional.linear(x, 2 * self.read.weight)
        return self.both(self.asked(x) + scaled) + self.both.weight.sum()


def test_reads_are_told_from_calls_and_questions() -> None:
    model = Reader()
    layers = dict(model.named_children())
    with noting_reads(layers) as read:
        model(torch.randn(2, 16))
        assert read == {"read", "both"}
    model(torch.randn(2, 16))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.values())


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    layer = nn.Linear(4, 4)
    with noting_reads({"0": layer}) as read:
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, 5))
        layer.weight.abs()
        assert read == {"0"}
    assert not layer._forward_hooks


def test_weights_inside_lists_and_keywords_count() -> None:
    layers = {str(index): nn.Linear(4, 4) for index in range(2)}
    with noting_reads(layers) as read:
        torch.cat([layers["0"].weight, torch.zeros(4, 4)])
        torch.add(torch.zeros(4, 4), other=layers["1"].weight)
    assert read == {"0", "1"}


def test_the_plan_leaves_read_layers_dense() -> None:
    model = Reader().eval()
    calibration = sc.calibrate(model, [torch.randn(80, 16)], show_progress=False)
    assert calibration.read == ("read", "both") and calibration.unreached == ("read",)
    plan: Any = sc.plan(model, "2:4", calibration=calibration, measure=False)
    assert list(plan.sparse) == ["asked"] and set(plan.stayed_dense) == {"read", "both"}
    assert "reads its weight beside calling it" in plan.stayed_dense["both"]
    plain = sc.plan(model, "2:4", measure=False)
    assert list(plain.sparse) == ["asked", "read", "both"]
