"""Training after pruning: a warning where the zeros get gradients, none where masks or our own tuning keep them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.pruning.report import PruneReport


def pruned() -> tuple[nn.Sequential, PruneReport]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    return model, sc.prune(model, "2:4", "magnitude", show_progress=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()


def test_the_first_gradient_that_fills_zeros_is_told_once() -> None:
    model, _ = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"weights that pruning removed.*sparsify.*distill"):
        step(model, optimizer)
    assert float((model[0].weight == 0).float().mean()) < 0.5  # what was told happened
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    assert not any(each._post_accumulate_grad_hooks for each in model.parameters())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_hooks_with_the_reports_masks_keep_the_zeros(make: type[torch.optim.Optimizer]) -> None:
    model, report = pruned()
    for name, mask in report.masks.items():
        model.get_submodule(name).weight.register_hook(lambda grad, mask=mask: grad * mask)
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, optimizer)
    sc.compile(model, "2:4", where="everywhere")


def test_frozen_weights_and_our_own_tuning_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
        sc.prune(frozen, "2:4", "magnitude", show_progress=False)
        dense, report = pruned()
        teacher = copy.deepcopy(dense)
        pickle.loads(pickle.dumps(dense))
        tuning = sc.Tuning(steps=2)
        batches = [torch.randn(4, 16) for _ in range(3)]
        output = {"output": lambda result, batch: result}
        sc.distill(dense, teacher, batches, masks=report.masks, tuning=tuning, show_progress=False, **output)
    assert float((dense[0].weight == 0).float().mean()) == 0.5


def test_blocks_that_were_pruned_are_watched() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16)) for _ in range(2)))
    batches = [torch.randn(80, 16) for _ in range(3)]
    sc.prune_blocks(blocks, batches, "2:4", "wanda", tuning=sc.Tuning(steps=2), show_progress=False)
    with pytest.warns(UserWarning, match="weights that pruning removed"):
        step(blocks, torch.optim.SGD(blocks.parameters(), lr=0.1))


def test_nothing_is_told_where_sparse_training_keeps_the_zeros(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sparse = sc.sparsify(model, "2:4", optimizer, start="zeros", steps=1)
    step(model, optimizer)
    sparse.bake()
    assert [each for each in recwarn if "pruning removed" in str(each.message)] == []
