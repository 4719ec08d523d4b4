"""What is computed once more on the way back meets the weights of now, and nobody's gradients are touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsecomp.errors import ModelError
from sparsecomp.pruning import Tuning, distill, prune, prune_blocks
from tests.small_models import small, small_batches

SETTINGS = Tuning(steps=12, learning_rate=1e-3)


class Block(nn.Module):
    """Two halves, each computed once more on the way back; ``reentrant`` None computes them once."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)
        self.reentrant = reentrant

    def first(self, x):
        return torch.relu(self.a(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.norm(x + self.b(self.first(x)))
        h = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.norm(x + checkpoint(self.b, h, use_reentrant=self.reentrant))


class Words(nn.Module):
    """Whole blocks are computed once more, behind an embedding that asks for no gradient."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(None) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def blocks(reentrant: bool | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(reentrant) for _ in range(2)))


# the order in which a reentrant checkpoint adds gradients up is its own, and so is the last bit
@pytest.mark.parametrize(("reentrant", "tolerance"), [(False, 0.0), (True, 1e-6)])
def test_activation_checkpointing_does_not_change_what_is_learnt(reentrant, tolerance):
    torch.manual_seed(1)
    batches = [torch.randn(30, 16) for _ in range(5)]
    models = [blocks(each) for each in (None, reentrant)]
    reports = [prune_blocks(each, batches, "2:4", "wanda", tuning=SETTINGS, show_progress=False) for each in models]
    assert all(each.best_step > 0 for each in reports[1].tunings)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=tolerance)
    words = [torch.randint(0, 40, (4, 8)) for _ in range(5)]
    models = [Words(each) for each in (None, reentrant)]
    for model in models:
        dense = copy.deepcopy(model)
        masks = prune(model, "2:4", show_progress=False).masks
        report = distill(model, dense, words, masks=masks, tuning=SETTINGS, show_progress=False)
        assert report.held_out_after < 0.97 * report.held_out_before
        assert not model.embedding.weight.requires_grad
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_hugging_face_models_changes_nothing(reentrant):
    models = [small("llama"), small("llama")]
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    models[1].train()
    for model in models:
        prune_blocks(model, small_batches("llama"), tuning=SETTINGS, show_progress=False)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert models[1].training


def test_gradients_and_flags_of_the_model_are_left_alone():
    torch.manual_seed(1)
    batches = [torch.randint(0, 40, (4, 8)) for _ in range(4)]
    model = Words(True)
    model.embedding.requires_grad_(True)
    model.blocks[0].a.weight.requires_grad_(False)
    dense = copy.deepcopy(model)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    flags = [each.requires_grad for each in model.parameters()]
    identities = [id(each) for each in model.parameters()]
    masks = prune(model, "2:4", show_progress=False).masks
    distill(model, dense, batches, masks=masks, tuning=SETTINGS, show_progress=False)
    assert all(bool((each.grad == 1).all()) for each in model.parameters())
    assert [each.requires_grad for each in model.parameters()] == flags
    assert [id(each) for each in model.parameters()] == identities
    assert torch.equal(model.embedding.weight, dense.embedding.weight)


def test_a_teacher_that_shares_norms_is_refused():
    model = Words(None)
    teacher = copy.deepcopy(model)
    masks = prune(model, "2:4", show_progress=False).masks
    teacher.blocks[0].norm = model.blocks[0].norm
    with pytest.raises(ModelError, match="teacher shares weights with the model"):
        distill(model, teacher, [torch.randint(0, 40, (4, 8))] * 2, masks=masks, show_progress=False)
