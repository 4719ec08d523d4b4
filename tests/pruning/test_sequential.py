"""Block after block: against a slow twin that runs the whole model, and what happens when it is stopped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecomp.errors import CalibrationError, MethodError, ModelError
from sparsecomp.methods.error import relative_error
from sparsecomp.models.blocks import find_chains
from sparsecomp.models.calibration import calibrate
from sparsecomp.pruning import Tuning, prune, prune_blocks
from sparsecomp.pruning import blockwise as sequential
from tests.pruning.block_models import encoder, token_batches

QUICK = Tuning(steps=12, learning_rate=3e-3)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gated", [False, True])
def test_each_block_sees_the_pruned_blocks_before_it(gated):
    batches, held_out = token_batches(4), token_batches(2, seed=9)
    model, twin, dense = (encoder(blocks=3, gated=gated) for _ in range(3))
    report = prune_blocks(model, batches, "2:4", "wanda", tuning=None, held_out=held_out, show_progress=False)
    for i in range(3):  # the twin runs the whole half-pruned model for every block
        layers = f"blocks.{i}.*"
        seen, unseen = (calibrate(twin, each, only=layers, show_progress=False) for each in (batches, held_out))
        prune(twin, "2:4", "wanda", seen, only=layers, show_progress=False)
        for name, statistics in unseen.items():
            old, new = (each.get_submodule(name).weight.detach() for each in (dense, twin))
            assert report.layers[name].held_out_error == pytest.approx(
                relative_error(old, new, statistics.gram), rel=1e-4
            )
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert report.skipped == {"head": "it is in none of the blocks"}
    assert len(report.layers) == len(report.masks) == 3 * (7 if gated else 6)
    for name, mask in report.masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())


def test_tuning_brings_each_block_nearer_to_the_dense_one():
    batches, held_out = token_batches(6), token_batches(2, seed=9)
    model = encoder()
    report = prune_blocks(model, batches, "2:4", "wanda", tuning=QUICK, held_out=held_out, show_progress=False)
    assert [tuning.name for tuning in report.tunings] == ["blocks.0", "blocks.1"]
    dense = encoder()
    plain = encoder()
    prune_blocks(plain, batches, "2:4", "wanda", tuning=None, held_out=held_out, show_progress=False)

    def distance(other: nn.Module) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in held_out:
                real = batch["attention_mask"].bool()
                total += float((other(**batch).hidden - dense(**batch).hidden)[real].square().sum())
        return total

    assert all(tuning.held_out_after < 0.95 * tuning.held_out_before for tuning in report.tunings)
    assert distance(model) < 0.9 * distance(plain)
    assert all(bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in report.masks.items())
    assert torch.equal(model.head.weight, dense.head.weight) and torch.equal(
        model.embedding.weight, dense.embedding.weight
    )


def test_stopped_in_the_second_block_the_model_is_whole_and_the_second_call_goes_on(tmp_path, monkeypatch):
    batches = token_batches()

    def arguments(model):
        return {"model": model, "batches": batches, "method": "wanda", "tuning": QUICK, "show_progress": False}

    want = encoder(blocks=3)
    expected = prune_blocks(**arguments(want))
    model = encoder(blocks=3)
    before, real, tuned = state(model), sequential.tune, []

    def stopping(name, *rest):
        if name == "blocks.1":
            raise KeyboardInterrupt
        tuned.append(name)
        return real(name, *rest)

    monkeypatch.setattr(sequential, "tune", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune_blocks(**arguments(model), checkpoint=tmp_path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert tuned == ["blocks.0"] and len(list(tmp_path.iterdir())) == 1

    def counting(name, *rest):
        tuned.append(name)
        return real(name, *rest)

    monkeypatch.setattr(sequential, "tune", counting)
    report = prune_blocks(**arguments(model), checkpoint=tmp_path)
    assert tuned == ["blocks.0", "blocks.1", "blocks.2"]
    torch.testing.assert_close(model.state_dict(), want.state_dict(), rtol=0, atol=0)
    assert list(report.layers) == list(expected.layers)
    assert all(torch.equal(report.masks[name], mask) for name, mask in expected.masks.items())
    assert [each.held_out_after for each in report.tunings] == [each.held_out_after for each in expected.tunings]
    # other settings are other work
    prune_blocks(**(arguments(encoder(blocks=3)) | {"tuning": Tuning(steps=3)}), checkpoint=tmp_path)
    assert tuned[3:] == ["blocks.0", "blocks.1", "blocks.2"]


def test_patterns_masks_and_globs_reach_the_blocks():
    given = {"blocks.1.up": torch.zeros(32, 16, dtype=torch.bool)}
    model = encoder()
    report = prune_blocks(
        model,
        token_batches(2),
        {"*.up": "1:4", "*": "2:4"},
        "wanda",
        tuning=None,
        skip="*.q",
        masks=given,
        show_progress=False,
    )
    assert {str(report.layers[f"blocks.{i}.up"].pattern) for i in (0, 1)} == {"1:4"}
    assert str(report.layers["blocks.0.down"].pattern) == "2:4"
    assert not bool(report.masks["blocks.1.up"].any()) and not bool(model.blocks[1].up.weight.any())
    assert report.skipped["blocks.0.q"] == 'excluded by skip "*.q"'
    with pytest.raises(ModelError, match=r'a mask is given for "head", which is not pruned'):
        prune_blocks(encoder(), token_batches(2), masks={"head": torch.ones(4, 16, dtype=torch.bool)})


def test_a_block_that_is_left_dense_is_part_of_the_chain(tmp_path):
    batches = token_batches(4)
    model, twin, dense = (encoder(blocks=4) for _ in range(3))
    chosen = {"tuning": None, "skip": ["blocks.1.*", "blocks.3.*"], "held_out": token_batches(2, seed=9)}
    for each in (model, encoder(blocks=4)):
        report = prune_blocks(each, batches, "2:4", "wanda", show_progress=False, checkpoint=tmp_path, **chosen)
        assert {name.split(".")[1] for name in report.layers} == {"0", "2"}
        model = each
    assert len(list(tmp_path.iterdir())) == 2
    for i in (0, 2):
        seen = calibrate(twin, batches, only=f"blocks.{i}.*", show_progress=False)
        prune(twin, "2:4", "wanda", seen, only=f"blocks.{i}.*", show_progress=False)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.blocks[1].state_dict(), dense.blocks[1].state_dict(), rtol=0, atol=0)
    assert report.skipped["blocks.1.q"] == 'excluded by skip "blocks.1.*"'


class Wrapped:
    """A batch that only the caller's forward can open."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch


def test_a_checkpoint_is_that_of_its_data_whatever_the_batches_are(tmp_path):
    def pruned(seed, checkpoint):
        model, batches = encoder(), [Wrapped(each) for each in token_batches(3, seed=seed)]
        report = prune_blocks(
            model,
            batches,
            method="best",
            tuning=None,
            forward=lambda model, each: model(**each.batch),
            mask=lambda each: each.batch["attention_mask"],
            checkpoint=checkpoint,
            show_progress=False,
        )
        assert report.unpermuted["blocks.0.down"] == "forward=... hides how a batch enters it"
        return model.state_dict()

    pruned(1, tmp_path)
    torch.testing.assert_close(pruned(7, tmp_path), pruned(7, None), rtol=0, atol=0)


def test_models_and_batches_that_do_not_fit():
    with pytest.raises(CalibrationError, match=r"batches is one Tensor.*pass \[batch\]"):
        prune_blocks(encoder(), torch.zeros(4, 10, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"held_out is one dict.*pass \[batch\]"):
        prune_blocks(encoder(), token_batches(2), held_out=token_batches(1)[0])
    with pytest.raises(ModelError, match="the model has no repeated blocks"):
        prune_blocks(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), [torch.randn(2, 8)])
    with pytest.raises(CalibrationError, match="tuning got 1 batch"):
        prune_blocks(encoder(), token_batches(1))
    with pytest.raises(MethodError, match="unknown pruning method"):
        prune_blocks(encoder(), token_batches(2), method="nope")

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](2 * self.blocks[0](x))

    broken = Skipping()
    before = state(broken)
    with pytest.raises(ModelError, match=r'block "blocks.1" does not take what the block before it returned'):
        prune_blocks(broken, [torch.randn(4, 8) for _ in range(2)])
    torch.testing.assert_close(broken.state_dict(), before, rtol=0, atol=0)
    poisoned = token_batches(2)
    model = encoder()
    with torch.no_grad():
        model.embedding.weight[int(poisoned[1]["input_ids"][0, 0])] = torch.nan
    with pytest.raises(CalibrationError, match=r'block "blocks.0": its input holds NaN or Inf in calibration batch'):
        prune_blocks(model, poisoned)


def test_blocks_are_the_list_that_holds_most_layers():
    model = nn.ModuleDict({"small": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "large": encoder(blocks=4)})
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = find_chains(model, names)[0]
    assert blocks.name == "large.blocks" and len(blocks.modules) == 4
    assert blocks.owner("large.blocks.10.q") is None
    assert blocks.owner("large.blocks.1.q") == "large.blocks.1"


def test_training_mode_and_bits_for_one_seed():
    models = [encoder().train() for _ in range(2)]
    for model in models:
        prune_blocks(model, token_batches(3), "2:4", "wanda", tuning=QUICK, show_progress=False)
        assert model.training and model.blocks[1].first.training
    torch.testing.assert_close(models[0].state_dict(), copy.deepcopy(models[1].state_dict()), rtol=0, atol=0)
