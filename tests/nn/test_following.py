"""The layouts hold the weight of now, whoever wrote it, and are filled only where it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsecomp.backends.refill import Refillable
from sparsecomp.errors import ModelError
from tests.training_layers import assert_as_dense, layer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_steps_of_an_optimizer(name: str) -> None:
    sparse = layer()
    mask, optimizer = sparse.mask, OPTIMIZERS[name](sparse.parameters())
    for _ in range(3):
        before = sparse.weight.detach().clone()
        assert_as_dense(sparse, torch.randn(5, 36))
        optimizer.step()
        with torch.no_grad():
            sparse.weight.mul_(mask)
        assert not torch.equal(before, sparse.weight)
    assert_as_dense(sparse, torch.randn(5, 36))


def _written_by_numpy(sparse: nn.Linear) -> None:
    sparse.weight.detach().numpy()[:] *= 2


def _in_inference_mode(sparse: nn.Linear) -> None:
    with torch.inference_mode():
        sparse.weight.mul_(2)


def _another_storage(sparse: nn.Linear) -> None:
    sparse.weight.data = sparse.weight.data * 2


def _another_parameter(sparse: nn.Linear) -> None:
    sparse.weight = nn.Parameter(sparse.weight.detach() * 2)


def _loaded(sparse: nn.Linear) -> None:
    sparse.load_state_dict({name: each * 2 for name, each in sparse.state_dict().items()})


def _one_entry(sparse: nn.Linear) -> None:
    row, column = sparse.weight.detach().nonzero()[1].tolist()
    with torch.no_grad():
        sparse.weight[row, column] = 3.0


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "data": lambda sparse: sparse.weight.data.mul_(2),
    "detached": lambda sparse: sparse.weight.detach().mul_(2),
    **{each.__name__: each for each in (_written_by_numpy, _in_inference_mode, _another_storage, _another_parameter)},
    **{each.__name__: each for each in (_loaded, _one_entry)},
}


@pytest.mark.parametrize("way", WRITES)
def test_however_the_weight_was_written(way: str) -> None:
    sparse, x = layer(), torch.randn(5, 36)
    assert_as_dense(sparse, x)
    before = sparse.weight.detach().clone()
    WRITES[way](sparse)
    assert not torch.equal(before, sparse.weight)
    assert_as_dense(sparse, x)


def test_an_unchanged_weight_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[Refillable] = []
    real = Refillable.fill
    monkeypatch.setattr(Refillable, "fill", lambda self, weight: (filled.append(self), real(self, weight))[1])
    sparse, x = layer(), torch.randn(5, 36)
    for _ in range(3):
        assert_as_dense(sparse, x)
    assert len(filled) == 2  # once for each of the two products
    with torch.no_grad():
        sparse.weight.mul_(2)
        for _ in range(3):
            sparse(x)
    assert len(filled) == 3


def test_a_weight_written_between_forward_and_backward_is_an_error_as_in_torch() -> None:
    sparse = layer()
    y = sparse(torch.randn(3, 36, requires_grad=True))
    with torch.no_grad():
        sparse.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_outside_the_mask_are_an_error() -> None:
    sparse, x = layer(), torch.randn(5, 36)
    with torch.no_grad():
        sparse.weight.add_(1)
    for _ in range(2):
        with pytest.raises(ModelError, match="not zero where its mask is False"):
            sparse(x)
    with torch.no_grad():
        sparse.weight.mul_(sparse.mask)
    assert_as_dense(sparse, x)
