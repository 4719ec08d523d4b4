"""Channel permutation: what the graph allows, what the search gains, and that the model's function stays."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsecomp.methods.order import _Swaps, search
from sparsecomp.models.calibration import calibrate
from sparsecomp.models.graph import Hidden, find_hidden
from sparsecomp.models.layers import find_linears
from sparsecomp.patterns import NM, parse
from sparsecomp.pruning import prune, prune_blocks
from tests.pruning.block_models import Block, encoder, token_batches
from tests.small_models import small, small_batches


def kept(scores: torch.Tensor, n: int, m: int) -> float:
    """The slow twin: what N of every M columns keep of the scores."""
    return sum(
        float(scores[:, start : start + m].double().topk(min(n, scores[:, start : start + m].shape[1]), dim=1)[0].sum())
        for start in range(0, scores.shape[1], m)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (3, 8)]), st.integers(2, 4), st.integers(0, 99)
)
def test_every_swap_is_priced_exactly(rows, pattern, groups, seed):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties are common
    scores = torch.randint(0, 6, (rows, groups * m), generator=generator).float()
    swaps = _Swaps(scores, n, m)
    i = seed % scores.shape[1]
    gains = swaps.gains(i, 0, scores.shape[1])
    for j in range(scores.shape[1]):
        if j // m != i // m:
            swapped = scores.clone()
            swapped[:, [i, j]] = swapped[:, [j, i]]
            assert float(gains[j]) == pytest.approx(kept(swapped, n, m) - kept(scores, n, m), abs=1e-4)
    j = (i + m) % scores.shape[1]
    swaps.swap(i, j)
    assert torch.equal(swaps.kept, _Swaps(swaps.scores, n, m).kept)
    assert torch.equal(swaps.rival, _Swaps(swaps.scores, n, m).rival)


@pytest.mark.parametrize(
    ("pattern", "columns", "segments"),
    [("2:4", 32, (32,)), ("2:4", 30, (30,)), ("8:16", 64, (32, 32)), ("2:4", 24, (6, 6, 6, 6)), ("2:4@v4", 32, (32,))],
)
def test_the_order_keeps_more_and_no_segment_mixes(pattern, columns, segments):
    torch.manual_seed(0)
    weight, gram = torch.randn(9, columns), torch.randn(columns, 200)
    weight[:, : columns // 4] *= 4
    gram = gram @ gram.T
    chosen = parse(pattern)
    assert isinstance(chosen, NM)
    order = search(weight, gram, chosen, segments)
    start = 0
    for length in segments:
        assert sorted(order[start : start + length].tolist()) == list(range(start, start + length))
        start += length
    scores = (weight.double().square() * gram.diagonal()).float()
    if chosen.mask_rows == 1:
        assert kept(scores[:, order], chosen.n, chosen.m) > 1.02 * kept(scores, chosen.n, chosen.m)
    assert torch.equal(order, search(weight, gram, chosen, segments))


@pytest.mark.parametrize("pattern", ["4:4", "unstructured:0.5", "block2x2:0.5"])
def test_patterns_that_gain_nothing_keep_their_order(pattern):
    assert torch.equal(search(torch.randn(8, 8), torch.eye(8), parse(pattern), (8,)), torch.arange(8))


@pytest.mark.parametrize("gated", [False, True])
def test_the_graph_of_attention_and_mlp(gated):
    model = encoder(blocks=1, gated=gated)
    hidden, reasons = find_hidden(model, token_batches(1)[0], find_linears(model))
    producers = ("blocks.0.gate", "blocks.0.up") if gated else ("blocks.0.up",)
    assert [(each.consumer, each.segments) for each in hidden] == [("blocks.0.o", (8, 8)), ("blocks.0.down", (32,))]
    assert hidden[0].producers == ("blocks.0.v",) and set(hidden[1].producers) == set(producers)
    assert "residual stream" in reasons["blocks.0.up"] and "residual" in reasons["blocks.0.q"]
    assert reasons["head"].startswith("its input is also read elsewhere") or "layer_norm" in reasons["head"]


def test_what_cannot_be_permuted_says_why():
    shared_values = encoder(blocks=1, heads=4, values=2)
    _, reasons = find_hidden(shared_values, token_batches(1)[0], find_linears(shared_values))
    assert (
        "reads" in reasons["blocks.0.o"] or "grouped-query" in reasons["blocks.0.o"] or "mixes" in reasons["blocks.0.o"]
    )

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
            self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(8))

        def forward(self, x):
            y = self.b(self.norm(self.a(x)))
            z = self.c(self.b(y)) * self.scale
            return self.d(z)

    _, reasons = find_hidden(Odd(), torch.randn(2, 8), find_linears(Odd()))
    assert "model's inputs" in reasons["a"]
    assert reasons["b"] == "it is called 2 times"
    assert "parameter of its own" in reasons["d"]

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    hidden, reasons = find_hidden(Untraceable(), torch.randn(2, 8), {"a": find_linears(Untraceable())["a"]})
    assert hidden == () and reasons["a"].startswith("torch.export cannot trace the model")


def test_channels_with_another_reader_or_limits_of_their_own_stay_in_order():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(self.a(x).relu()) + self.c(self.a(2 * x).cumsum(-1))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(self.a(x).relu()) @ self.a.weight.t()

    class Limited(nn.Module):
        def __init__(self, act) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 16), nn.Linear(16, 8), act
            self.own = nn.Parameter(torch.rand(16))

        def forward(self, x):
            return self.b(self.act(self.a(x), self.own))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(self.a(x).relu() * self.a(-x).sigmoid())

    def clamped(x, limit):
        return x.clamp(max=limit)

    def powered(x, limit):
        return x.square().pow(limit)

    def found(model):
        return find_hidden(model, torch.randn(4, 8), find_linears(model))

    for model in (Twice(), Tied()):
        hidden, reasons = found(model)
        assert hidden == () and reasons["b"] == 'the weight of "a" is also used elsewhere in the model'
    for act in (clamped, powered):
        hidden, reasons = found(Limited(act))
        assert hidden == () and reasons["b"].endswith("with numbers of each channel's own")
    # all calls of the producer lead to the one layer
    assert found(Both())[0] == (Hidden("b", ("a",), (16,)),)


def lossless_if_permuted(layer: nn.Linear, columns: tuple[int, ...]) -> None:
    """Give the layer weights in these columns alone: too many for one group, and no loss when they are spread."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, list(columns)] = torch.randn(layer.out_features, len(columns))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_permuted_model_computes_the_same_function(gated, by_blocks):
    model = encoder(blocks=2, gated=gated)
    for block in model.blocks:
        assert isinstance(block, Block)
        lossless_if_permuted(block.down, (0, 1, 2, 9))
        lossless_if_permuted(block.o, (0, 1, 3, 5, 8, 9, 10))
    dense, batches = copy.deepcopy(model), token_batches(4)
    # every other layer keeps all of its weights, so that only the permutation can change what the model computes
    patterns = {"*.down": "2:4", "*.o": "2:4", "*": "4:4"}
    if by_blocks:
        report = prune_blocks(model, batches, patterns, "best", tuning=None, show_progress=False)
    else:
        calibration = calibrate(model, batches, show_progress=False)
        report = prune(model, patterns, "best", calibration, example=batches[0], show_progress=False)
    permuted = [name for name, layer in report.layers.items() if layer.permuted]
    assert permuted == ["blocks.0.o", "blocks.0.down", "blocks.1.o", "blocks.1.down"]
    assert all(report.layers[name].error < 1e-5 for name in permuted)
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).hidden, dense(**batch).hidden, rtol=2e-5, atol=2e-5)
    assert not torch.equal(model.blocks[0].v.bias, dense.blocks[0].v.bias)
    for name, mask in report.masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())
    assert set(report.unpermuted) == set(report.layers) - set(permuted)


class Spread(nn.Module):
    """A hidden tensor that several functions read before their ways meet again, as in GPT-2's GELU."""

    def __init__(self, kept: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), kept

    def forward(self, x):
        h = self.a(x)
        out = self.b(0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3.0)))))
        return out + h if self.kept else out


def test_channels_that_part_and_meet_again_may_move():
    torch.manual_seed(0)
    model, batches = Spread(), [torch.randn(40, 8) for _ in range(3)]
    lossless_if_permuted(model.b, (0, 1, 2, 9))
    dense = copy.deepcopy(model)
    report = prune(
        model,
        {"a": "4:4", "b": "2:4"},
        "best",
        calibrate(model, batches, show_progress=False),
        example=batches[0],
        show_progress=False,
    )
    assert report.layers["b"].permuted and report.layers["b"].error < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), dense(batches[0]), rtol=2e-5, atol=2e-5)
    kept = Spread(kept=True)
    hidden, reasons = find_hidden(kept, batches[0], find_linears(kept))
    assert hidden == () and "also read elsewhere" in reasons["b"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_default_batches_of_models_with_a_cache_are_followed(name):
    model, batches = small(name), small_batches(name)
    hidden, reasons = find_hidden(model, batches[0], find_linears(model))
    wanted = {
        "gpt2": {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"},
        "llama": {f"model.layers.{i}.{each}" for i in (0, 1) for each in ("self_attn.o_proj", "mlp.down_proj")},
        "t5": {f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in (0, 1)},
    }[name]
    assert wanted <= {each.consumer for each in hidden}
    assert not any("cannot trace" in reason for reason in reasons.values())
    assert model.config.use_cache is True


def test_no_layer_is_worse_and_the_reported_error_is_the_models():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 10, bias=False))
    dense = copy.deepcopy(model)
    batches, held = [torch.randn(300, 12)], [torch.randn(300, 12)]
    calibration, held_out = (calibrate(model, each, show_progress=False) for each in (batches, held))
    plain = prune(copy.deepcopy(model), {"0": "4:4", "2": "2:4"}, "best", calibration, held_out=held_out)
    report = prune(
        model, {"0": "4:4", "2": "2:4"}, "best", calibration, held_out=held_out, example=batches[0], show_progress=False
    )
    assert report.layers["2"].permuted
    assert report.layers["2"].error < plain.layers["2"].error
    assert report.layers["2"].held_out_error < plain.layers["2"].held_out_error
    with torch.no_grad():
        change, whole = (model(held[0]) - dense(held[0])).norm(), dense(held[0]).norm()
    assert report.layers["2"].held_out_error == pytest.approx(float(change / whole), rel=1e-4)


def test_layers_that_must_keep_their_rows_are_not_permuted():
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 10))
    batch = torch.randn(100, 12)
    calibration = calibrate(model, [batch], show_progress=False)

    def reason(patterns, **options):
        report = prune(
            copy.deepcopy(model), patterns, "best", calibration, example=batch, show_progress=False, **options
        )
        assert not report.layers["2"].permuted
        return report.unpermuted["2"]

    assert reason({"0": "2:4@v4", "2": "2:4"}).startswith('rows of "0" share their masks')
    assert reason({"2": "2:4"}) == '"0" is not pruned and stays as it is'
    assert reason("2:4", masks={"2": torch.zeros(10, 64, dtype=torch.bool)}) == 'the mask of "2" was given'
    assert "gains nothing" in reason({"0": "2:4", "2": "4:4"})
    report = prune(copy.deepcopy(model), "2:4", "best", calibration, show_progress=False)
    assert "pass example=batch" in report.unpermuted["2"]


def test_a_permuted_layer_comes_back_from_its_checkpoint(tmp_path):
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 10))
        batch = torch.randn(300, 12)
        calibration = calibrate(model, [batch], show_progress=False)
        report = prune(model, "2:4", "best", calibration, example=batch, checkpoint=tmp_path, show_progress=False)
        assert report.layers["2"].permuted
        made.append((model, report))
    torch.testing.assert_close(made[0][0].state_dict(), made[1][0].state_dict(), rtol=0, atol=0)
    assert all(torch.equal(mask, made[1][1].masks[name]) for name, mask in made[0][1].masks.items())
    assert made[0][1].layers == made[1][1].layers  # times as well: nothing was solved again
