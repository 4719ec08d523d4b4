"""``sparsify(..., kernels=True)``: the same training through sparse kernels, compared with the one without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import MethodError
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.training import RigL
from tests.training import small

SELDOM = RigL(alpha=0.3), sc.Schedule("constant", every=20)


def kinds(network: nn.Module) -> list[bool]:
    return [isinstance(each, SparseTrainingLinear) for each in network if isinstance(each, nn.Linear)]


def twins(pattern: str, method: str | RigL, steps: int, **options: object) -> list[tuple[nn.Module, ...]]:
    """The model, its optimizer and handle, without kernels and with them."""
    found = []
    for kernels in (False, True):
        network = small.model()
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        found.append(
            (
                network,
                optimizer,
                sc.sparsify(network, pattern, optimizer, method, steps=steps, kernels=kernels, **options),
            )
        )
    return found


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "2:4@t"])
def test_gradients_and_weights_are_those_without_kernels(pattern: str) -> None:
    (plain, slow, without), (network, fast, handle) = twins(pattern, "fixed", 6)
    assert kinds(plain) == [False, False] and kinds(network) == [True, True]
    for batch in small.batches(6):
        for each, optimizer in ((plain, slow), (network, fast)):
            optimizer.zero_grad()
            small.loss_of(each, batch).backward()
        near(
            {name: each.grad for name, each in plain.named_parameters()},
            {name: each.grad for name, each in network.named_parameters()},
        )
        slow.step()
        fast.step()
        near(plain.state_dict(), network.state_dict())
        small.obeys(handle)
    parameters = list(network.parameters())
    assert handle.bake() is network
    without.bake()
    assert [type(each) for each in network] == [type(each) for each in plain]
    assert all(one is other for one, other in zip(parameters, network.parameters(), strict=True))
    near(plain.state_dict(), network.state_dict())
    sc.compile(network.eval(), pattern)


def test_changed_masks_are_packed_anew_and_copies_compute_the_same() -> None:
    method, schedule = SELDOM
    (plain, slow, _), (network, fast, handle) = twins("unstructured:0.5", method, 50, schedule=schedule)
    assert kinds(network) == [False, False]  # no kernel for that pattern
    (plain, slow, _), (network, fast, handle) = twins("2:4", method, 50, schedule=schedule)
    before = handle.masks
    small.train(plain, slow, 25)
    small.train(network, fast, 25)
    assert any(not torch.equal(handle.masks[name], mask) for name, mask in before.items())
    for name, mask in handle.masks.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, SparseTrainingLinear) and torch.equal(layer.mask, mask)
    near(plain.state_dict(), network.state_dict())
    twin, x = copy.deepcopy(network), torch.randn(3, small.IN)
    torch.testing.assert_close(twin(x), network(x))
    torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=1e-3)


def test_a_gradual_training_goes_to_kernels_where_its_masks_fit() -> None:
    schedule = sc.Schedule("linear", every=20)
    network, optimizer, handle = small.made("gradual", 40, schedule=schedule, kernels=True)
    assert kinds(network) == [False, False] and "dense: the mask breaks 2:4" in str(handle)
    small.train(network, optimizer, 40)
    assert kinds(network) == [True, True]
    assert 'kernels: "0", "2": y is sparse, the gradient of x dense: the transposed' in str(handle)
    handle.bake()
    assert kinds(network) == [False, False] and "kernels" not in str(handle)


def test_a_training_that_is_resumed_packs_the_masks_of_its_state() -> None:
    method, schedule = SELDOM
    network, optimizer, handle = small.made(method, 60, schedule=schedule, kernels=True)
    small.train(network, optimizer, 30)
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict(), handle.state_dict()))
    other, resumed, again = small.made(method, 60, schedule=schedule, kernels=True, start="random")
    for each, state in zip((other, resumed, again), saved, strict=True):
        each.load_state_dict(state)
    for name, mask in handle.masks.items():
        assert torch.equal(other.get_submodule(name).mask, mask)
    small.train(network, optimizer, 30, seed=2)
    small.train(other, resumed, 30, seed=2)
    assert small.equal(network, other)


def test_integers_and_convolutions_stay_dense_and_are_said_to() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    names = {"0": "2:4", "2": "8:16+int8@a8", "4": "2:4@t"}
    handle = sc.sparsify(network, names, optimizer, steps=4, kernels=True)
    assert kinds(network) == [False, True]
    said = str(handle)
    assert 'kernels: "0": dense: Conv2d layers have no sparse training kernel' in said
    assert 'kernels: "2": dense: it trains in int8@a8' in said
    assert 'kernels: "4": y and the gradient of x are sparse' in said
    for _ in range(4):
        network(torch.randn(3, 8, 2, 2)).square().mean().backward()
        optimizer.step()
    handle.bake()
    assert kinds(network) == [False, False]


def test_masks_that_change_often_are_refused() -> None:
    network = small.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(MethodError, match='"sr-ste" changes, here after every 1 steps; allowed are'):
        sc.sparsify(network, "2:4", optimizer, "sr-ste", steps=40, kernels=True)
    sc.sparsify(network, "2:4", optimizer, "sr-ste", steps=40).bake()
