"""Copies share nothing with what they were made of, and the state of a module comes back."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch import nn

from sparsecomp.errors import ModelError
from sparsecomp.modules.snapshot import ModuleState, clone, copied, put

Pair = namedtuple("Pair", ["left", "right"])


class Cache:
    def __init__(self, x):
        self.keys, self.more = [x], {"x": x}


def test_a_copy_keeps_what_is_the_same_and_shares_nothing():
    x = torch.randn(3)
    value = [x, (x, Pair(x, 1)), OrderedDict(a=x), Cache(x), None, torch.float32, len, torch.Size([1])]
    made = copied(value)
    assert made[0] is made[1][0] is made[1][1].left is made[2]["a"] is made[3].keys[0] is made[3].more["x"]
    assert type(made[1][1]) is Pair and type(made[2]) is OrderedDict and made[4:] == value[4:]
    before = x.clone()
    made[0].add_(1)
    made[3].keys.append(1)
    assert torch.equal(x, before) and len(value[3].keys) == 1


def test_modules_stay_and_what_cannot_be_copied_is_named():
    module = nn.Linear(2, 2)
    assert copied({"m": module})["m"] is module

    class Locked:
        def __copy__(self):
            raise TypeError("locked")

    with pytest.raises(ModelError, match=r"an argument of class Locked cannot be copied \(locked\)"):
        copied([Locked()])


def test_a_clone_can_be_trained_on_and_takes_no_more_memory():
    with torch.inference_mode():
        made = clone(torch.randn(2))
    assert not made.is_inference() and not made.requires_grad
    expanded = torch.randn(2, 1, 3).expand(2, 500, 3)
    other = clone(expanded)
    assert torch.equal(other, expanded) and other.untyped_storage().nbytes() == 2 * 3 * 4
    assert not clone(torch.ones(1, requires_grad=True) * 2).requires_grad


def test_put_writes_where_torch_would_not():
    with torch.inference_mode():
        parameter = nn.Parameter(torch.zeros(2))
    put(parameter, torch.ones(2))
    leaf = nn.Parameter(torch.zeros(2))
    put(leaf, torch.ones(2))
    assert bool((parameter == 1).all()) and bool((leaf == 1).all())


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)
        self.inner = nn.Linear(2, 2)
        self.number, self.entries, self.table = 0, [torch.zeros(1)], {"a": [1]}
        self.last, self.names, self.box = deque([1]), {"x"}, Cache(torch.zeros(1))

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        self.absent = x
        self.register_buffer("late", x)
        self.number += 1
        self.entries[0].add_(1)
        self.entries.append(x)
        self.table["a"].append(2)
        self.table["b"] = x
        self.last.append(2)
        self.names.add("y")
        self.box.keys[0].add_(1)
        self.box.more["y"] = x
        self.inner.note = x
        self.inner.register_forward_hook(lambda *_: None)
        return x


def test_the_state_of_a_module_comes_back_each_time():
    model = Changing()
    written, replaced, weight = model.written, model.replaced, model.inner.weight
    state = ModuleState(model)
    with torch.no_grad():
        model.inner.weight.add_(1)  # parameters are not state
    changed = weight.detach().clone()
    for _ in range(2):
        model(torch.ones(2))
        state.restore()
        assert model.written is written and model.replaced is replaced and model.absent is None
        assert (
            not bool(written.any())
            and not bool(replaced.any())
            and set(dict(model.named_buffers()))
            == {
                "written",
                "replaced",
            }
        )
        assert model.number == 0 and [float(each) for each in model.entries] == [0.0] and model.table == {"a": [1]}
        assert list(model.last) == [1] and model.names == {"x"} and float(model.box.keys[0]) == 0.0
        assert set(model.box.more) == {"x"} and not hasattr(model.inner, "note")
        assert not model.inner._forward_hooks
    assert torch.equal(model.inner.weight, changed)


def test_the_state_of_inference_mode_comes_back_too():
    model = Changing()
    with torch.inference_mode():
        model.written = torch.zeros(2)
        kept = ModuleState(model)
        model(torch.ones(2))
    kept.restore()
    assert not bool(model.written.any())


def test_lazy_modules_become_what_they_become():
    model = nn.Sequential(nn.LazyLinear(3))
    state = ModuleState(model)
    model(torch.ones(1, 2))
    state.restore()
    assert type(model[0]) is nn.Linear and model(torch.ones(1, 2)).shape == (1, 3)
