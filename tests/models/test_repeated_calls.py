"""Calls that are captured and replayed: no cache, state or write of one call reaches the next."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError, ModelError
from sparsecomp.models.blocks import find_chains
from sparsecomp.models.calibration import calibrate
from sparsecomp.pruning import Tuning, distill, prune, prune_blocks
from tests.small_models import ids, reals, small, small_batches

CHAINS = {
    "llama": ["model.layers"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
}
QUICK = Tuning(steps=6, learning_rate=1e-3)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def pruned_slowly(model: nn.Module, batches, chains) -> nn.Module:
    """The slow twin: the whole half-pruned model is run for every block."""
    for chain in chains:
        for i in range(len(model.get_submodule(chain))):
            layers = f"{chain}.{i}.*"
            prune(model, "2:4", "wanda", calibrate(model, batches, only=layers, show_progress=False), only=layers)
    return model


@pytest.mark.parametrize("tuning", [None, QUICK])
@pytest.mark.parametrize("kind", ["plain", "left padding", "asked for", "positions"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_causal_model_is_pruned_alike_with_and_without_its_cache(name, kind, tuning):
    batches = small_batches(name)
    for batch in batches:
        if kind == "left padding":
            batch["attention_mask"] = reals(3, 9, 6).flip(1)
        if kind == "positions":
            batch["position_ids"] = torch.arange(9)[None] + 2
    models = [small(name), small(name)]
    cached = [batch | ({"use_cache": True} if kind == "asked for" else {}) for batch in batches]
    for model, given in zip(models, (cached, [batch | {"use_cache": False} for batch in batches]), strict=True):
        prune_blocks(model, given, "2:4", "wanda", tuning=tuning, show_progress=False)
        assert model.config.use_cache is True
    assert_same(*models)
    if tuning is None:
        # one batch is held out
        twin = pruned_slowly(small(name), [batches[i] for i in (0, 1, 3)], CHAINS[name])
        assert_same(models[0], twin)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_stacks_of_an_encoder_decoder_are_pruned_the_decoder_on_the_pruned_encoder(name):
    batches = small_batches(name)
    batches = [each | {"attention_mask": reals(3, 9, 5), "decoder_attention_mask": reals(3, 6, 4)} for each in batches]
    model = small(name)
    report = prune_blocks(model, batches, "2:4", "wanda", tuning=None, held_out=batches[:1], show_progress=False)
    assert_same(model, pruned_slowly(small(name), batches, CHAINS[name]))
    assert sum("encoder." in each for each in report.layers) == 12
    assert sum("decoder." in each for each in report.layers) == 20
    assert all("shared" in reason for reason in report.skipped.values())
    tuned = small(name)
    report = prune_blocks(tuned, batches, "2:4", "wanda", tuning=QUICK, held_out=batches[:1], show_progress=False)
    assert [each.name for each in report.tunings] == [f"{chain}.{i}" for chain in CHAINS[name] for i in (0, 1)]
    assert all(each.held_out_after < each.held_out_before for each in report.tunings)


def padded(name: str, seed: int) -> list[dict[str, Tensor]]:
    """Batches that differ by seed in what stands in the padding alone, as many real rows in neither stack as there."""
    batches = []
    for batch in small_batches(name, 4):
        words = {"input_ids": batch["input_ids"], "decoder_input_ids": ids(3, 9)}
        masks = {"attention_mask": reals(3, 9, 5), "decoder_attention_mask": reals(3, 9, 7)}
        batches.append(words | masks)
    torch.manual_seed(seed)
    for batch in batches:
        for words, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            batch[words] = torch.where(batch[mask].bool(), batch[words], ids(3, 9))
    return batches


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_stands_in_the_padding_of_either_stack_changes_nothing(name):
    results = []
    for seed in (3, 4):
        torch.manual_seed(0)
        batches = padded(name, seed)
        model = small(name)
        report = prune_blocks(model, batches, tuning=QUICK, show_progress=False)
        pruned = {key: value.clone() for key, value in model.state_dict().items()}
        told = distill(model, small(name), batches, masks=report.masks, tuning=QUICK, show_progress=False)
        output = distill(
            model,
            small(name),
            batches,
            masks=report.masks,
            output=lambda result, batch: result.logits,
            tuning=Tuning(steps=1),
            show_progress=False,
        )
        losses = [each.held_out_after for each in (*report.tunings, told, output)]
        results.append((batches, pruned, losses, report))
    (one, first, losses, report), (two, second, others, _) = results
    assert not torch.equal(one[0]["input_ids"], two[0]["input_ids"])
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert losses == pytest.approx(others, rel=1e-3)
    cross = next(layer for key, layer in report.layers.items() if "decoder" in key and layer.rows == 3 * 3 * 5)
    assert any(each in cross.name for each in ("EncDecAttention.k", "encoder_attn.k"))
    assert {layer.rows for layer in report.layers.values()} == {3 * 3 * 5, 3 * 3 * 7}


def test_a_second_call_goes_on_in_the_second_chain(tmp_path):
    batches, whole = small_batches("t5"), small("t5")
    first = prune_blocks(whole, batches, tuning=QUICK, checkpoint=tmp_path, show_progress=False)
    assert len(list(tmp_path.iterdir())) == 4
    again = small("t5")
    second = prune_blocks(again, batches, tuning=QUICK, checkpoint=tmp_path, show_progress=False)
    assert_same(whole, again)
    assert [each.seconds for each in first.tunings] == [each.seconds for each in second.tunings]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_distillation_is_the_same_with_and_without_the_cache(name):
    results = []
    for off in ({}, {"use_cache": False}):
        model, dense = small(name), small(name)
        masks = prune(model, "2:4", show_progress=False).masks
        batches = [batch | off for batch in small_batches(name)]
        report = distill(model, dense, batches, masks=masks, tuning=QUICK, show_progress=False)
        assert report.held_out_after < report.held_out_before
        results.append(model)
    assert_same(*results)


class Stateful(nn.Module):
    """A block that changes what it holds or what it is given, and whose result depends on that."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(16, 24), nn.Linear(24, 16), kind
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Tensor] = []
        self.calls = 0
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor, bias: Tensor, box: dict[str, Tensor]) -> Tensor:
        match self.kind:
            case "buffer written":
                self.count += 1
                x = x * (1 + self.count)
            case "buffer replaced":
                self.count = self.count + 1
                x = x * (1 + self.count)
            case "list":
                self.seen.append(x)
                x = torch.stack(self.seen).sum(dim=0)
            case "number":
                self.calls += 1
                x = x * self.calls
            case "new attribute":
                x = x + getattr(self, "before", 0.0)
                self.before = x
            case "dictionary":
                x = x + self.cache.setdefault("first", x)
            case "argument":
                x = x + bias.add_(1)
            case "argument's entry":
                box["sum"] = box.get("sum", torch.zeros_like(x)) + x
                x = x + box["sum"]
        y = self.b(torch.relu(self.a(x)))
        return x.add_(y) if self.kind == "input" else x + y


class Chained(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Stateful(kind) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            # what a call leaves in a box is not the next block's
            x = block(x, torch.zeros(16), box={})
        return x


KINDS = ["buffer written", "buffer replaced", "list", "number", "new attribute", "dictionary", "argument"]


@pytest.mark.parametrize("kind", [*KINDS, "argument's entry", "input"])
def test_blocks_that_change_what_they_hold_or_get_are_pruned_as_in_the_model(kind):
    torch.manual_seed(1)
    batches = [torch.randn(20, 16) for _ in range(4)]
    before = [each.clone() for each in batches]
    model = Chained(kind)
    prune_blocks(model, batches, "2:4", "wanda", tuning=None, held_out=batches[:1], show_progress=False)
    twin = Chained(kind)
    for i in range(3):
        # the twin's model is new for every batch
        layers = f"blocks.{i}.*"
        statistics = calibrate(
            twin, batches, only=layers, forward=lambda model, x: copied_call(model, x), show_progress=False
        )
        prune(twin, "2:4", "wanda", statistics, only=layers, show_progress=False)
    assert_same(model, twin)
    block = model.blocks[0]
    assert block.count.item() == 0 and block.seen == [] and block.calls == 0 and block.cache == {}
    assert not hasattr(block, "before")
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def copied_call(model: nn.Module, x: Tensor) -> object:
    return model(x.clone())


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_starts_every_step_from_the_same_state(kind):
    torch.manual_seed(1)
    batches = [torch.randn(20, 16) for _ in range(4)]
    model = Chained(kind)
    report = prune_blocks(model, batches, "2:4", "wanda", tuning=QUICK, show_progress=False)
    assert all(each.held_out_after < each.held_out_before for each in report.tunings)
    assert model.blocks[0].count.item() == 0 and model.blocks[0].calls == 0
    dense = Chained(kind)
    masks = prune(model := copy.deepcopy(dense), "2:4", show_progress=False).masks
    tuned = distill(model, dense, batches, masks=masks, tuning=QUICK, show_progress=False)
    with torch.no_grad():
        # what was reported is what the model does when it is called once
        again = distill(model, dense, batches, masks=masks, tuning=Tuning(steps=1), show_progress=False)
    assert again.held_out_before == pytest.approx(tuned.held_out_after, rel=1e-5)


def test_a_block_that_destroys_what_its_gradient_needs_says_so():
    batches = [torch.randn(20, 16) for _ in range(3)]
    model = Chained("input")
    before = copy.deepcopy(model)
    with pytest.raises(MethodError, match=r"blocks\.0: its gradient cannot be computed .* leave tuning out"):
        prune_blocks(model, batches, tuning=QUICK, show_progress=False)
    assert_same(model, before)


class Handing(nn.Module):
    """Blocks that hand on a second tensor beside the hidden states, as those with a residual of their own do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            residual = x if residual is None else residual + x
            return self.a(residual), residual

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Handing.Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x


def test_what_blocks_hand_on_beside_the_hidden_states_is_that_of_the_pruned_blocks():
    batches = [torch.randn(20, 16) for _ in range(3)]
    model = Handing()
    prune_blocks(model, batches, tuning=None, held_out=batches[:1], show_progress=False)
    assert_same(model, pruned_slowly(Handing(), batches, ["blocks"]))


class Sharing(nn.Module):
    """Blocks that share what the model passes to all: each reads its own entry, or what all before have left there."""

    class Block(nn.Module):
        def __init__(self, number: int, reads: str) -> None:
            super().__init__()
            self.a, self.b, self.number, self.reads = nn.Linear(16, 16), nn.Linear(16, 16), number, reads

        def forward(self, x: Tensor, box: dict[Any, Any]) -> Tensor:
            key = self.a(x)
            if self.reads == "its own":
                key = key + box.get(self.number, 0.0)
            box[self.number] = key
            if self.reads != "its own":
                key = torch.stack([each for name, each in box.items() if name != "now"]).sum(dim=0)
            return x + self.b(key) * (1 + box.get("now", 0))

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = reads
        self.blocks = nn.ModuleList(Sharing.Block(i, reads) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        box: dict[Any, Any] = {}
        for i, block in enumerate(self.blocks):
            if self.reads == "all, told which":
                box["now"] = i
            x = block(x, box=box)
        return x


@pytest.mark.parametrize("reads", ["its own", "all"])
def test_what_blocks_leave_for_each_other_is_that_of_the_pruned_blocks(reads):
    batches = [torch.randn(20, 16) for _ in range(3)]
    model = Sharing(reads)
    prune_blocks(model, batches, tuning=None, held_out=batches[:1], show_progress=False)
    assert_same(model, pruned_slowly(Sharing(reads), batches, ["blocks"]))
    report = prune_blocks(Sharing(reads), batches, tuning=QUICK, show_progress=False)
    assert all(each.held_out_after < each.held_out_before for each in report.tunings)


def test_what_the_model_itself_tells_its_blocks_is_not_lost():
    # the box is changed between two blocks, so that each has it as it was in the dense model
    batches = [torch.randn(20, 16) for _ in range(3)]
    model = Sharing("all, told which")
    report = prune_blocks(model, batches, tuning=None, held_out=batches[:1], show_progress=False)
    assert len(report.layers) == 6
    twin = pruned_slowly(Sharing("all, told which"), batches, ["blocks"])
    assert torch.equal(model.blocks[0].b.weight, twin.blocks[0].b.weight)
    assert torch.equal(model.blocks[1].a.weight, twin.blocks[1].a.weight)


class Two(nn.Module):
    """A chain, and heads that all take what it returns; a third list that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(16, 4)) for _ in range(2))
        self.unused = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.stack([head(x) for head in self.heads])


def test_chains_that_cannot_be_pruned_stay_dense_and_say_why():
    model = Two()
    batches = [torch.randn(20, 16) for _ in range(3)]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [each.name for each in find_chains(model, names)] == ["blocks", "heads", "unused"]
    report = prune_blocks(model, batches, tuning=None, show_progress=False)
    assert {name.split(".")[0] for name in report.layers} == {"blocks"}
    assert 'block "heads.1" does not take what the block before it returned' in report.skipped["heads.0.0"]
    assert report.skipped["unused.1.0"] == "no batch reaches its blocks"
    with pytest.raises(ModelError, match=r'a mask is given for "heads.0.0", which is not pruned'):
        prune_blocks(Two(), batches, masks={"heads.0.0": torch.ones(4, 16, dtype=torch.bool)}, show_progress=False)


def test_words_of_the_batches_are_not_changed():
    batches = [{"input_ids": ids(2, 8), "use_cache": True} for _ in range(3)]
    prune_blocks(small("gpt2"), batches, tuning=None, show_progress=False)
    assert all(each["use_cache"] is True for each in batches)
