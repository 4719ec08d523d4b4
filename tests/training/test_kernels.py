"""A model whose layers go to sparse training kernels and back, compared with the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.errors import ModelError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn.training import SparseTrainingLinear
from sparsecomp.patterns import Pattern, parse
from sparsecomp.training.kernels import BOTH, accelerate, restore

NAMES = {"0": "2:4@t", "2": "8:16"}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))


def masked(net: nn.Module, patterns: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Pattern]]:
    """Masks by layer name; the weights obey them."""
    masks = {}
    for name, pattern in patterns.items():
        found = prune_weight(net.get_submodule(name).weight.detach(), pattern, method="magnitude")
        masks[name] = found.mask
        with torch.no_grad():
            net.get_submodule(name).weight.copy_(found.weight)
    return masks, {name: parse(each) for name, each in patterns.items()}


def test_a_loop_trains_as_without_kernels_and_ends_with_plain_layers() -> None:
    net = model()
    masks, patterns = masked(net, NAMES)
    twin = copy.deepcopy(net).double()
    said = accelerate(net, masks, patterns)
    assert said["0"] == BOTH
    assert said["2"].startswith("y is sparse, the gradient of x dense: the transposed mask breaks 8:16")
    assert [type(each) is SparseTrainingLinear for each in net] == [True, False, True, False, False]
    losses: dict[str, list[float]] = {"sparse": [], "dense": []}
    batches = torch.randn(6, 20, 32)
    for label, each in (("sparse", net), ("dense", twin)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for batch in batches.to(each[0].weight.dtype):
            loss = each(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    each.get_submodule(name).weight.mul_(mask)
            losses[label].append(loss.item())
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-3)
    parameters = list(net.parameters())
    restore(net)
    assert [type(each) for each in net] == [type(each) for each in twin]
    assert all(one is other for one, other in zip(parameters, net.parameters(), strict=True))
    for one, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-3)


def test_what_stays_dense_is_said() -> None:
    net = nn.ModuleDict(
        {
            "loose": nn.Linear(8, 8),
            "twisted": nn.Linear(8, 8),
            "conv": nn.Conv1d(8, 8, 1),
            "attention": nn.MultiheadAttention(8, 2),
            "dense": nn.Linear(8, 8),
        }
    )
    nn.utils.parametrizations.weight_norm(net["twisted"])
    names = ["loose", "twisted", "conv", "attention.out_proj", "dense"]
    masks = {name: torch.ones(8, 8, dtype=torch.bool) for name in names}
    patterns = {name: parse("2:4") for name in names} | {"loose": parse("unstructured:1")}
    said = accelerate(net, masks, patterns)
    assert all(each.startswith("dense: ") for each in said.values())
    for name, words in {
        "loose": "no kernel for unstructured",
        "twisted": "parametrization",
        "conv": "Conv1d layers",
        "attention.out_proj": "never calls it",
        "dense": "the mask breaks 2:4",
    }.items():
        assert words in said[name]
    assert not any(isinstance(each, SparseTrainingLinear) for each in net.modules())


def test_another_mask_is_taken_and_one_that_does_not_fit_makes_the_layer_plain() -> None:
    net = model()
    masks, patterns = masked(net, {"0": "2:4@t"})
    accelerate(net, masks, patterns)
    other, _ = masked(net, {"0": "2:4@t"})
    other["0"] = other["0"].flip(0)
    assert accelerate(net, other, patterns) == {"0": BOTH}
    assert torch.equal(net[0].mask, other["0"])
    said = accelerate(net, {"0": torch.ones(48, 32, dtype=torch.bool)}, patterns)
    assert "the mask breaks 2:4@t" in said["0"] and type(net[0]) is nn.Linear


def test_names_and_masks_that_are_wrong() -> None:
    net = model()
    masks, patterns = masked(net, {"0": "2:4@t"})
    with pytest.raises(ModelError, match='the mask of "5"'):
        accelerate(net, {"5": masks["0"]}, {"5": patterns["0"]})
    with pytest.raises(ModelError, match="0: the mask is"):
        accelerate(net, {"0": masks["0"][:3]}, patterns)


def test_a_layer_reached_by_two_names_and_fused_encoders() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()
    flags = [(each.activation_relu_or_gelu) for each in encoder.layers]
    patterns = {f"layers.{k}.linear{which}": "2:4@t" for k in range(2) for which in (1, 2)}
    masks, parsed = masked(encoder, patterns)
    x = torch.randn(2, 5, 16)
    want = encoder(x)
    assert set(accelerate(encoder, masks, parsed).values()) == {BOTH}
    torch.testing.assert_close(encoder(x), want, rtol=0, atol=1e-4)
    with torch.no_grad():  # torch's own fused path, which reads the weights
        torch.testing.assert_close(encoder(x), want, rtol=0, atol=1e-4)
    assert [(each.activation_relu_or_gelu) for each in encoder.layers] == flags
