"""The decision about a layer as one value: what it refuses, how a layer follows it, how it is copied and pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsecomp.backends import registry
from sparsecomp.backends.choice import Choice, unpacks
from sparsecomp.backends.reference import ReferenceBackend
from sparsecomp.errors import ModelError
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8

PATTERN = parse("2:4")


def layer_of(choice: Choice) -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear.of_choice(prune_weight(torch.randn(24, 40), choice.pattern).weight, choice, torch.ones(24))


def test_a_name_pins_and_a_preference_does_not() -> None:
    assert Choice.asked(PATTERN, FLOAT, None) == Choice(PATTERN)
    assert Choice.asked(PATTERN, FLOAT, None, "cpu") == Choice(PATTERN, FLOAT, "cpu")
    assert Choice.asked(PATTERN, FLOAT, "cpu", "dense") == Choice(PATTERN, FLOAT, "cpu", pinned=True)


@pytest.mark.parametrize("wrong", [4.0, "8", 1 << 63, [1]])
def test_rows_are_a_number(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"^dense_above must be an int or None, got "):
        Choice(PATTERN, dense_above=wrong)


@pytest.mark.parametrize("rows", [np.int64(8), torch.tensor(8), 8])
def test_rows_become_an_int_that_a_file_holds(rows: Any) -> None:
    assert type(Choice(PATTERN, dense_above=rows).dense_above) is int
    assert Choice(PATTERN, dense_above=rows) == Choice(PATTERN, dense_above=8)


def test_unpacking_begins_at_that_number_of_rows() -> None:
    assert [unpacks(8, batch) for batch in (0, 7, 8, 9)] == [False, False, True, True]
    assert not unpacks(None, 1 << 40) and unpacks(0, 0)


def test_a_layer_follows_its_choice_and_takes_it_along() -> None:
    choice = Choice(PATTERN, FLOAT, "reference", 4)
    layer = layer_of(choice)
    assert (layer.choice, layer.kernel.backend, layer.dense_above, layer.pattern) == (choice, "reference", 4, PATTERN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.choice == choice and twin.kernel.backend == "reference"
    assert "from 4 rows on" in layer.explain(4).reason and layer.explain(3).reason.startswith("the fastest")
    layer.dense_above = 7
    assert layer.choice == Choice(PATTERN, FLOAT, "reference", 7)
    layer.to(torch.bfloat16)
    assert layer.choice == Choice(PATTERN, FLOAT, "reference")  # rows were measured with float32


def test_a_layer_stores_its_weight_in_the_numbers_chosen() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    layer = SparseLinear.following(linear, Choice(PATTERN, INT8), "magnitude")
    assert layer.numbers == INT8 and layer.choice == Choice(PATTERN, INT8)
    twin = SparseLinear.from_linear(linear, "2:4", "magnitude", quantized=True)
    assert twin.choice == layer.choice and torch.equal(twin.packed().values, layer.packed().values)
    assert (
        SparseLinear.from_packed(layer.packed()).choice == SparseLinear(40, 24, quantized=True).choice == layer.choice
    )
    assert pickle.loads(pickle.dumps(layer)).choice == layer.choice


def test_rows_measured_with_another_backend_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "supports", lambda self, request: "cannot")
    layer = layer_of(Choice(PATTERN, FLOAT, "reference", 4))
    assert layer.kernel.backend != "reference" and layer.choice == Choice(PATTERN, FLOAT, "reference")
    assert layer_of(Choice(PATTERN, FLOAT, None, 4)).dense_above == 4
    with pytest.raises(ModelError, match='backend "reference" cannot'):
        layer_of(Choice(PATTERN, FLOAT, "reference", pinned=True))


def test_a_layer_pickled_before_it_held_a_choice_is_read() -> None:
    """Version 0.1.0 kept the pattern, the rows and the names of two backends as attributes."""
    layer = layer_of(Choice(PATTERN))
    state = layer.__getstate__()
    del state["choice"]
    state |= {"pattern": PATTERN, "dense_above": 16, "_wanted": None, "_preferred": "reference"}
    old = SparseLinear.__new__(SparseLinear)
    nn.Module.__init__(old)
    old.__setstate__(state)
    assert old.choice == Choice(PATTERN, FLOAT, "reference", 16) and old.kernel.backend == "reference"
    assert torch.equal(old.weight, layer.weight) and "_wanted" not in vars(old)


def test_dense_products_are_no_sparse_backends() -> None:
    sparse = {name for name, backend in registry.backends().items() if backend.sparse}
    assert set(registry.backends()) - sparse == {"dense", "reference"}
    request = Request(PATTERN, (24, 40), torch.float32, "cpu", 1)
    assert set(registry.sparse_backends(request)) <= {"cpu"}


def test_the_order_of_backends_says_nothing_of_which_are_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(PATTERN, (24, 40), torch.float32, "cpu", 1)
    before = registry.sparse_backends(request)
    turned = dict(reversed(registry.backends().items()))
    monkeypatch.setattr(registry, "backends", lambda: turned)
    assert registry.sparse_backends(request) == before


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "meta"])
@pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "2:4@v4", "block16x16:0.5", "unstructured:0.5"])
def test_one_backend_is_the_nearest_to_every_request(device: str, pattern: str) -> None:
    request = Request(parse(pattern), (64, 64), torch.float32, device, 1)
    assert sum(backend.nearest(request) for backend in registry.backends().values()) == 1


def test_a_backend_that_is_not_known_is_told_of_and_another_taken() -> None:
    """A plan or a file of a later version may name one."""
    registry._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r'backend "of_later" is not known here; known are .*see layer\.explain'):
        layer = layer_of(Choice(PATTERN, FLOAT, "of_later"))
    assert layer.kernel.backend == registry.choose(Request(PATTERN, (24, 40), torch.float32, "cpu", 1))
