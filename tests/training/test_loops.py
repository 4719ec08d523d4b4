"""Loops as users write them: masks obey the pattern after every step, whatever steps on the weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsecomp as sc
from tests.training import small

METHODS = ("fixed", "sr-ste")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "momentum fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "momentum foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.001, maximize=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p),
}


def moved(before: nn.Module, after: nn.Module) -> bool:
    return not small.equal(before, after)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, method: str) -> None:
    model = small.model()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=6)
    small.obeys(handle)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for batch in small.batches(6):
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        small.obeys(handle)
    assert handle.step == 6
    assert any(not torch.equal(start[key], value) for key, value in model.state_dict().items())
    assert handle.bake() is model


@pytest.mark.parametrize("method", METHODS)
def test_clipping_accumulation_a_scheduler_and_gradients_that_are_zeroed_in_place(method: str) -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=5)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=5)
    for index, batch in enumerate(small.batches(15)):
        (small.loss_of(model, batch) / 3).backward()
        if index % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=False)
            small.obeys(handle)
    assert handle.step == 5


def test_accumulated_steps_are_those_of_the_whole_batch() -> None:
    results = []
    for parts in (1, 3):
        model = small.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sc.sparsify(model, "2:4", optimizer, "sr-ste", steps=4)
        for x, y in small.batches(4):
            optimizer.zero_grad()
            for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (small.loss_of(model, (some, wanted)) / parts).backward()
            optimizer.step()
        results.append(model)
    for one, other in zip(*(each.parameters() for each in results), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_parameter_groups(method: str) -> None:
    model = small.model()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=3)
    for batch in small.batches(3):
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        small.obeys(handle)


class Tied(nn.Module):
    """An embedding tied to the output layer, and a layer that is reached under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = self.second = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.second(self.first(self.embed(tokens)).relu()))
        return out


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_and_a_layer_under_two_names(method: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=3)
    assert list(handle.patterns) == ["first"] and "lm_head" in handle.skipped
    for _ in range(3):
        tokens = torch.randint(20, (6, 5))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        small.obeys(handle)
    assert model.lm_head.weight is model.embed.weight and model.second is model.first
    assert bool((model.embed.weight != 0).all())


def test_sparse_gradients_beside_dense_ones() -> None:
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(20, (6,))).square().sum().backward()
        optimizer.step()
        small.obeys(handle)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_stay_as_they_are(method: str) -> None:
    model = small.model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=4)
    kept = model[0].weight.detach().clone()
    for index, batch in enumerate(small.batches(4)):
        model[2].requires_grad_(index % 2 == 0)  # and one that is frozen and thawed
        optimizer.zero_grad()
        small.loss_of(model, batch).backward()
        optimizer.step()
        small.obeys(handle)
    assert torch.equal(model[0].weight, kept)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method: str) -> None:
    results = []
    for recompute in (False, True):
        model = small.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = sc.sparsify(model, "2:4", optimizer, method, steps=3)
        for x, y in small.batches(3):
            optimizer.zero_grad()
            out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            nn.functional.mse_loss(out, y).backward()
            optimizer.step()
            small.obeys(handle)
        results.append(model)
    assert small.equal(*results)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_a_grad_scaler(method: str, dtype: torch.dtype, fused: bool) -> None:
    model = small.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    handle = sc.sparsify(model, "2:4", optimizer, method, steps=6)
    for index, batch in enumerate(small.batches(6)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = small.loss_of(model, batch)
        if index == 3:
            loss = loss * torch.inf  # the scaler passes over this step
        scaler.scale(loss).backward()
        if index % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        small.obeys(handle)
    assert handle.step == 5 and scaler.get_scale() == 512.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_grad_scaler_leaves_the_numbers_as_they_are(method: str, fused: bool) -> None:
    results = []
    for scaled in (False, True):
        model = small.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        sc.sparsify(model, "2:4", optimizer, method, steps=4)
        for x, y in small.batches(4):
            optimizer.zero_grad()
            for some, wanted in zip(x.chunk(2), y.chunk(2), strict=True):
                scaler.scale(small.loss_of(model, (some, wanted)) / 2).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(model)
    assert small.equal(*results)  # a scale of a power of two rounds nothing


def closed(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss = small.loss_of(model, batch)
    loss.backward()
    return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("by_name", [False, True])
def test_closures(method: str, by_name: bool) -> None:
    results = []
    for closing in (False, True):
        model = small.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = sc.sparsify(model, "2:4", optimizer, method, steps=4)
        for batch in small.batches(4):
            closure = partial(closed, model, optimizer, batch)
            if not closing:
                closure()
                optimizer.step()
            else:
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert loss is not None and loss.item() > 0
            small.obeys(handle)
        assert handle.step == 4
        results.append(model)
    assert small.equal(*results)


def test_a_closure_whose_loss_is_nan() -> None:
    model = small.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sc.sparsify(model, "2:4", optimizer, steps=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def closure() -> Tensor:
        loss = model(torch.ones(1, small.IN)).sum() * torch.nan
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="gradients are not finite at step 1"):
        optimizer.step(closure)
    assert handle.step == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_compiled_models(method: str, backend: str) -> None:
    results = []
    for compiled in (False, True):
        model = small.model()
        network: Any = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = sc.sparsify(network, "2:4", optimizer, method, steps=3)
        assert list(handle.patterns) == ["0", "2"]
        for batch in small.batches(3):
            optimizer.zero_grad()
            small.loss_of(network, batch).backward()
            optimizer.step()
            small.obeys(handle)
        results.append(model)
    for one, other in zip(*(each.parameters() for each in results), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_distributed_data_parallel_in_one_process(method: str, tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed here")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for wrapped in (False, True):
            model = small.model()
            network = nn.parallel.DistributedDataParallel(model) if wrapped else model
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
            handle = sc.sparsify(model, "2:4", optimizer, method, steps=3)
            for batch in small.batches(3):
                optimizer.zero_grad()
                small.loss_of(network, batch).backward()
                optimizer.step()
                small.obeys(handle)
            results.append(model)
        assert small.equal(*results)
    finally:
        torch.distributed.destroy_process_group()
