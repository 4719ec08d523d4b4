"""Masks of other libraries: read, used here, and written back for torch's own two."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity, WeightNormSparsifier
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import sparsecomp as sc
from sparsecomp.errors import ModelError
from sparsecomp.patterns import parse
from sparsecomp.patterns.project import project

LAYERS = ("0", "2")


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def chosen(model: nn.Module) -> dict[str, Tensor]:
    return {name: project(model.get_submodule(name).weight.detach().abs(), parse("2:4")) for name in LAYERS}


def by_torch_prune(model: nn.Module, name: str, mask: Tensor) -> None:
    torch_prune.custom_from_mask(model.get_submodule(name), "weight", mask)


def by_fake_sparsity(model: nn.Module, name: str, mask: Tensor) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", FakeSparsity(mask))


def by_asp(model: nn.Module, name: str, mask: Tensor) -> None:
    layer = model.get_submodule(name)
    layer.register_buffer("__weight_mma_mask", mask)
    layer.register_buffer("__weight_mma_pruned_p", torch.zeros(mask.shape))


class _Dynamic(nn.Linear):
    """As Model-Optimizer's dynamic class: the weight that is read is masked, the Parameter is not."""

    _weight_mask: Tensor | None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        value = super().__getattr__(name)
        return value * self._buffers["_weight_mask"] if name == "weight" else value


def by_model_optimizer(model: nn.Module, name: str, mask: Tensor) -> None:
    layer = model.get_submodule(name)
    layer.register_buffer("_weight_mask", mask)
    layer.__class__ = _Dynamic


LIBRARIES = [by_torch_prune, by_fake_sparsity, by_asp, by_model_optimizer]


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_goes_round(library: Callable[[nn.Module, str, Tensor], None]) -> None:
    model = plain()
    fresh, want = copy.deepcopy(model), chosen(model)
    for name, mask in want.items():
        library(model, name, mask)
    found = sc.masks(model)
    assert list(found) == list(LAYERS)
    assert all(torch.equal(found[name], want[name]) and found[name].dtype == torch.bool for name in LAYERS)

    report = sc.prune(copy.deepcopy(fresh), "2:4", masks=found, show_progress=False)
    assert all(torch.equal(report.masks[name], want[name]) for name in LAYERS)
    handle = sc.sparsify(fresh, "2:4", torch.optim.SGD(fresh.parameters(), lr=0.1), start=found, steps=1)
    assert all(torch.equal(each, want[name]) for name, each in handle.masks.items())
    assert all(torch.equal(each, want[name]) for name, each in sc.masks(fresh).items())


@pytest.mark.parametrize("library", [by_asp, by_model_optimizer])
def test_masks_are_read_from_a_loaded_checkpoint(library: Callable[[nn.Module, str, Tensor], None]) -> None:
    model, again = plain(), plain()
    for name, mask in chosen(model).items():
        library(model, name, mask)
        library(again, name, torch.ones_like(mask))
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(each, chosen(plain())[name]) for name, each in sc.masks(again).items())


def test_a_sparsifier_of_torch_ao_is_read_as_it_squashes() -> None:
    model = plain()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in LAYERS])
    sparsifier.step()
    found = sc.masks(model)
    sparsifier.squash_mask()
    assert all(torch.equal(found[name], model.get_submodule(name).weight != 0) for name in LAYERS)
    assert sc.masks(model) == {}


def test_asp_masks_under_a_mangled_name() -> None:
    class Asp(nn.Linear):
        def keep(self, mask: Tensor) -> None:
            self.__weight_mma_mask = mask

    layer = Asp(8, 4)
    layer.keep(torch.eye(4, 8).bool())
    assert torch.equal(sc.masks(layer)[""], torch.eye(4, 8).bool())


@pytest.mark.parametrize("library", [by_torch_prune, by_fake_sparsity])
def test_our_masks_are_written_for_torch(library: Callable[[nn.Module, str, Tensor], None]) -> None:
    model = plain()
    handle = sc.sparsify(model, "2:4", torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    ours = handle.masks
    handle.bake()
    x = torch.randn(3, 16)
    before = model(x)
    for name, mask in ours.items():
        library(model, name, mask)
    assert torch.equal(model(x), before)
    assert all(torch.equal(sc.masks(model)[name], mask) for name, mask in ours.items())


@pytest.mark.parametrize("library", [by_torch_prune, by_fake_sparsity, by_asp])
def test_masks_of_convolutions_are_matrices(library: Callable[[nn.Module, str, Tensor], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU())
    handle = sc.sparsify(model, "2:4", torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    ours = handle.masks["0"]
    assert torch.equal(sc.masks(model)["0"], ours) and ours.shape == (4, 72)
    handle.bake()
    assert sc.masks(model) == {}
    out, kernel, channels = 4, 3, 8
    library(model, "0", ours.reshape(out, kernel, kernel, channels).permute(0, 3, 1, 2))
    assert torch.equal(sc.masks(model)["0"], ours)


def test_masks_of_hugging_face_conv1d_are_transposed() -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    model = nn.Sequential(conv1d(4, 8))  # stored [in, out] = [8, 4]
    stored = torch.rand(8, 4) > 0.5
    by_torch_prune(model, "0", stored)
    assert torch.equal(sc.masks(model)["0"], stored.t())


def test_several_masks_on_a_layer_keep_what_all_keep() -> None:
    model = plain()
    first, second = torch.rand(24, 16) > 0.5, torch.rand(24, 16) > 0.5
    by_asp(model, "0", first)
    by_torch_prune(model, "0", second)
    assert torch.equal(sc.masks(model)["0"], first & second)


def test_copies_are_given() -> None:
    model = plain()
    by_asp(model, "0", torch.ones(24, 16, dtype=torch.bool))
    sc.masks(model)["0"].zero_()
    assert bool(sc.masks(model)["0"].all())


def test_none_where_there_is_none() -> None:
    model = plain()
    model[0].register_buffer("_weight_mask", None)
    torch_prune.l1_unstructured(model[0], "bias", amount=2)
    assert sc.masks(model) == {}
    assert sc.masks(torch.compile(plain(), backend="eager")) == {}  # type: ignore[arg-type]


def test_what_is_no_mask_is_said() -> None:
    model = plain()
    by_asp(model, "2", torch.ones(24, 8, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"2: its mask has shape \(24, 8\) and its weight \(8, 24\)"):
        sc.masks(model)
    model = plain()
    by_asp(model, "0", torch.full((24, 16), 0.5))
    with pytest.raises(ModelError, match="0: its mask holds other numbers than 0 and 1"):
        sc.masks(model)
    with pytest.raises(ModelError, match="the model is a str"):
        sc.masks("model")  # type: ignore[arg-type]


def test_masks_that_are_no_matrix_are_left_out_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    by_torch_prune(model, "0", torch.ones(4, 4, 3))
    by_torch_prune(model, "1", torch.ones(4, 1, 3, 3))
    with pytest.warns(UserWarning, match=r'the masks of 2 layers are left out \("0", "1"\)'):
        assert sc.masks(model) == {}
