"""The measurement of int8: what is simulated is what the words say, and padding is seen and not judged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsecomp as sc
from bench.int8 import error, inputs, quality
from bench.int8.error import Error, Layer
from bench.int8.ranges import BY_ROW, BY_TENSOR, CLIPPED, FIXED, PARTS, Calibrated, by_row, by_tensor, ways, within


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-0.001, 5.0)])
def test_numbers_become_the_nearest_of_254_steps_with_zero_among_them(low: float, high: float) -> None:
    x = 3 * random(20, 7)
    low_end, high_end = min(low, 0.0), max(high, 0.0)
    step = (high_end - low_end) / 254
    zero = round(-low_end / step)
    points = (torch.arange(255, dtype=torch.float64) - zero) * step
    nearest = points[(x.double().flatten()[:, None] - points).abs().argmin(dim=1)].view_as(x)
    assert torch.allclose(within(x, low, high).double(), nearest, atol=1e-5)
    assert float(within(torch.zeros(1, 1), low, high)) == 0.0


def test_a_range_of_nothing_gives_zeros() -> None:
    assert not within(random(2, 3), 0.0, 0.0).any()


def test_one_large_number_spoils_its_own_row_alone_where_ranges_are_by_row() -> None:
    x = random(8, 64)
    x[3, 5] = 1000.0
    moved = [(each(x) - x).square().sum(dim=1).sqrt() for each in (by_row, by_tensor)]
    others = torch.arange(8) != 3
    assert float(moved[0][others].max()) < 0.1 < 2.0 < float(moved[1][others].min())
    assert float(moved[0][3]) > 2.0


def test_the_clipped_range_is_the_part_that_moves_least() -> None:
    x = random(50, 40)
    x[0, 0] = 30.0
    calibrated = Calibrated()
    for part in x.split(10):
        calibrated.see(part)
    for part in x.split(10):
        calibrated.try_parts(part)
    assert (calibrated.low, calibrated.high) == (float(x.min()), 30.0)
    by_hand = {part: float((within(x, part * float(x.min()), part * 30.0) - x).square().sum()) for part in PARTS}
    assert calibrated.best_part == min(by_hand, key=lambda part: by_hand[part])
    assert torch.equal(ways(calibrated)[FIXED](x), within(x, calibrated.low, 30.0))
    assert set(ways(calibrated)) == {BY_ROW, BY_TENSOR, FIXED, CLIPPED}


def test_an_error_adds_up_over_batches() -> None:
    y, other = random(30, 5), random(30, 5, seed=1)
    running = Error()
    for a, b in zip(y.split(7), other.split(7), strict=True):
        running.add(a, b)
    assert running.value == pytest.approx(float((other - y).norm() / y.norm()), rel=1e-6)
    assert Error().value == 0.0
    nothing = Error()
    nothing.add(torch.zeros(1, 2), torch.ones(1, 2))
    assert nothing.value == float("inf")


def made_layer(folder: Path, seed: int = 0) -> Layer:
    dense = random(32, 64, seed=seed)
    pruned = sc.prune_weight(dense, "8:16", method="magnitude").weight
    calibrated = Calibrated(-6.0, 6.0)
    return Layer(dense, pruned, "8:16", calibrated, folder)


def test_a_layer_compares_each_way_with_its_own_truth_and_judges_no_padding(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime.quantization")
    x, real = random(3, 5, 64), torch.ones(3, 5, dtype=torch.bool)
    real[1, 3:] = real[2, 1:] = False
    clean, padded = made_layer(tmp_path), made_layer(tmp_path)
    clean.see(x, real)
    loud = torch.where(real[..., None], x, 500.0)
    padded.see(loud, real)
    first, second = ({way: each.value for way, each in layer.errors.items()} for layer in (clean, padded))
    # the range of a call holds its padding; nothing else sees it
    together = {f"ort{kind}_32" for kind in ("", "_channel")}
    assert {way for way in first if first[way] != second[way]} == together
    assert all(second[way] > 3 * first[way] for way in together)
    rows = x[real]
    simulated = by_row(rows) @ error.product(clean._pruned, "8:16+int8@a8").weight.T
    truth = rows @ clean._pruned.T
    expected = float((simulated - truth).norm() / truth.norm())
    assert first[error.OURS] == pytest.approx(expected, rel=1e-3)
    assert first[BY_ROW] == pytest.approx(expected, rel=1e-4)
    assert 0.003 < first["ort_channel_1"] < 0.03
    assert first["ort_channel_1"] <= first["ort_channel_32"]


def test_the_summary_counts_layers_in_which_a_rival_is_better() -> None:
    ways_of = (error.OURS, error.OURS_DENSE, *error.RIVALS, *error.SIMULATED)
    rows: list[dict[str, Any]] = [
        {"layer": f"encoder.layer.{i}.x", **dict.fromkeys(ways_of, 0.02), error.OURS: 0.01} for i in range(3)
    ]
    result = {
        "rows": rows,
        "settings": {"pattern": "8:16"},
        "tokens": {"held_out": 10},
        "machine": {"cpu": "A Processor"},
        "date": "2026-11-30",
    }
    assert "In every layer ours is not larger" in error.summary(result)
    rows[1]["ort_channel_1"] = 0.009
    text = error.summary(result)
    assert "larger than the least of ONNX Runtime's in 1: encoder.layer.1.x." in " ".join(text.split())
    (line,) = [line.split() for line in text.splitlines() if "by channel, one text" in line]
    assert line[-1] == "1"


class Small(nn.Module):
    """Layers under the names that the benchmark looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.encoder(x)
        return y


def test_a_simulated_model_is_the_compiled_one() -> None:
    torch.manual_seed(0)
    model, x = Small().requires_grad_(False), random(4, 6, 32)
    sc.prune(model, "8:16", method="magnitude", show_progress=False)
    ready = {name: Calibrated(-6.0, 6.0) for name in ("encoder.0", "encoder.2")}
    simulated = quality._rounding(model, "8:16", ready, BY_ROW)
    compiled = sc.compile(copy.deepcopy(model), "8:16+int8@a8", where="everywhere", max_rounding=1.0)
    assert torch.allclose(simulated(x), compiled(x), atol=1e-5)
    assert not torch.equal(simulated(x), model(x))
    assert not torch.allclose(simulated(x), quality._rounding(model, "8:16", ready, FIXED)(x), atol=1e-5)


def test_inputs_come_with_what_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Small):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(input_ids)

    batches = [
        {"input_ids": random(2, n, 32, seed=n), "attention_mask": torch.tensor([[1] * n, [1] + [0] * (n - 1)])}
        for n in (3, 5)
    ]
    monkeypatch.setattr(inputs.minilm, "batches", lambda texts, size: batches)
    model, seen = Model(), []
    inputs.visit_inputs(model, ["unused"], lambda name, x, real: seen.append((name, x.shape, int(real.sum()))))
    assert seen == [
        (name, torch.Size([2, n, width]), n + 1)
        for n in (3, 5)
        for name, width in (("encoder.0", 32), ("encoder.2", 48))
    ]
    found = inputs.calibrate_ranges(model, ["unused"])
    words = torch.cat([each["input_ids"][each["attention_mask"].bool()] for each in batches])
    assert (found["encoder.0"].low, found["encoder.0"].high) == (float(words.min()), float(words.max()))
    assert not model.encoder[0]._forward_pre_hooks
