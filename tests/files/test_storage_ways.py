"""Modules that save and load in ways of their own, or have hooks there, get from a file what they saved."""

import copy

import pytest
import torch
from torch import nn

from sparsecomp.errors import FormatError
from sparsecomp.files.storage import load, save
from sparsecomp.nn import SparseLinear
from tests.files.saved_models import Beside, Extra, assert_refused, packed


class Doubled(nn.Module):
    """Saves twice what it has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("q", torch.zeros(3))
        self.loaded = []

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}q"] = self.q * 2

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.loaded.append(prefix)
        self.q = state_dict[f"{prefix}q"] / 2


def own_ways(sparse=False, fill=0.0):
    model = Beside(sparse, plain=torch.full((2, 1), fill).expand(2, 3))
    model.extra, model.twin, model.doubled = Extra(), Extra(), Doubled()
    model.extra.state.fill_(fill)
    model.twin.state = model.extra.state
    model.doubled.q.fill_(fill)
    return model


def test_extra_state_and_modules_that_load_in_their_own_way_get_what_was_saved(tmp_path):
    save(saved := own_ways(True, 3.0), tmp_path / "m")
    fresh = load(tmp_path / "m", into=own_ways())
    assert fresh.extra.state.tolist() == fresh.twin.state.tolist() == fresh.doubled.q.tolist() == [3, 3, 3]
    assert fresh.plain.tolist() == [[3, 3, 3], [3, 3, 3]]
    assert fresh.extra.state.data_ptr() != fresh.twin.state.data_ptr()
    x = torch.randn(2, 16)
    assert torch.equal(fresh.lin(x), saved.lin(x))


def test_hooks_on_loading_run_with_every_entry(tmp_path):
    save(Beside(True, plain=torch.ones(2)), tmp_path / "m")
    fresh, seen = Beside(plain=torch.zeros(2)), []
    fresh.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.extend(state))

    def enlarge(module, keys):
        module.plain.mul_(5)

    fresh.register_load_state_dict_post_hook(enlarge)
    load(tmp_path / "m", into=fresh)
    assert set(seen) == {"lin.values", "lin.metadata", "lin.bias", "plain"}
    assert fresh.plain.tolist() == [5, 5]
    assert fresh.lin.weight.count_nonzero() == 8


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_an_error_in_the_models_own_loading_undoes_all_of_it(tmp_path, error):
    save(own_ways(True, 3.0), tmp_path / "m")
    fresh = own_ways(fill=1.0)

    def refuse(module, keys):
        module.plain.fill_(9)
        module.lin.bias.data = torch.zeros(4)
        raise error("not today")

    fresh.register_load_state_dict_post_hook(refuse)
    buffer = fresh.doubled.q
    assert_refused(tmp_path / "m", fresh, "not today", FormatError if error is RuntimeError else error)
    assert fresh.doubled.q is buffer
    assert fresh.doubled.loaded == []
    assert type(fresh.lin) is nn.Linear


def test_what_the_models_own_loading_reports_is_told(tmp_path):
    save(Beside(True, plain=torch.ones(2)), tmp_path / "m")
    bigger = Beside(plain=torch.ones(2))
    bigger.extra = Extra()
    assert_refused(tmp_path / "m", bigger, 'lacks "extra._extra_state"')


def test_batch_norms_are_copied_without_their_own_loading(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    model[0].num_batches_tracked.fill_(7)
    save(model, tmp_path / "m")
    fresh = load(tmp_path / "m", into=copy.deepcopy(model).apply(lambda m: getattr(m, "reset_parameters", int)()))
    assert fresh[0].num_batches_tracked.item() == 7


class Versioned(nn.Module):
    """Its state is of version 2; older ones were in other units."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("q", torch.zeros(2))

    def _load_from_state_dict(self, state_dict, prefix, notes, *rest):
        super()._load_from_state_dict(state_dict, prefix, notes, *rest)
        if notes.get("version") != 2:
            self.q.mul_(100)


def test_a_module_that_asks_for_its_version_is_told_it(tmp_path):
    saved = nn.Sequential(packed(1), Versioned())
    saved[1].q.fill_(3)
    save(saved, tmp_path / "m")
    assert load(tmp_path / "m", into=nn.Sequential(nn.Linear(16, 4), Versioned()))[1].q.tolist() == [3, 3]


class Renaming(Beside):
    """Saves its buffer under another name, and knows it again."""

    def __init__(self, sparse=False, **buffers):
        super().__init__(sparse, **buffers)
        self.register_state_dict_post_hook(Renaming.there)
        self.register_load_state_dict_pre_hook(Renaming.back)

    @staticmethod
    def there(module, state, prefix, notes):
        state[f"{prefix}old"] = state.pop(f"{prefix}new")

    @staticmethod
    def back(module, state, prefix, *rest):
        state[f"{prefix}new"] = state.pop(f"{prefix}old")


def test_hooks_that_rename_entries_meet_again(tmp_path):
    save(Renaming(True, new=torch.ones(2)), tmp_path / "m")
    fresh = load(tmp_path / "m", into=Renaming(new=torch.zeros(2)))
    assert fresh.new.tolist() == [1, 1]
    assert isinstance(fresh.lin, SparseLinear)
