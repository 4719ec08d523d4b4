"""Inputs that break careless solvers: every data-driven method must take them or say what is wrong."""

import pytest
import torch

from sparsecomp.errors import CalibrationError
from sparsecomp.methods.objective import objective
from sparsecomp.methods.weight import prune_weight
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask
from tests.methods.problems import layer_of

SEARCHES = ["sparsegpt", "obs", "fast", "admm", "balanced"]
HARD = ["no input", "dead channels", "one token", "few tokens", "outlier channels", "twins", "tiny", "huge"]


def hard_gram(kind, columns=48):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 * columns, columns, generator=generator)
    if kind == "no input":
        x *= 0
    elif kind == "dead channels":
        x[:, 5:17] = 0
    elif kind == "one token":
        x = x[:1]
    elif kind == "few tokens":
        x = x[:20]
    elif kind == "outlier channels":
        x[:, [3, 30]] *= 1000
    elif kind == "twins":
        x[:, 1::2] = x[:, ::2]
    elif kind == "tiny":
        x *= 1e-15
    elif kind == "huge":
        x *= 1e15
    return x.T @ x


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", ["2:4", "8:16"])
def test_hard_grams(method, kind, name):
    weight, gram = layer_of(12, 48)[0], hard_gram(kind)
    result = prune_weight(weight, name, method, gram)
    check_mask(result.mask, parse(name))
    assert bool(torch.isfinite(result.weight).all())
    # nothing may run away where the data say nothing
    assert result.weight.abs().max() <= 20 * weight.abs().max()
    baseline = prune_weight(weight, name, "wanda", gram)
    assert result.error <= baseline.error * 1.001


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_solved_in_float32(method, dtype):
    weight, gram = layer_of(12, 48)
    result = prune_weight(weight.to(dtype), "2:4", method, gram)
    assert result.weight.dtype == dtype
    same = prune_weight(weight.to(dtype).float(), "2:4", method, gram)
    assert torch.equal(result.mask, same.mask)
    assert torch.equal(result.weight.float(), same.weight.to(dtype).float())


@pytest.mark.parametrize("method", SEARCHES)
def test_dead_channels_go_first(method):
    weight, gram = layer_of(12, 48)[0], hard_gram("dead channels")
    kept = prune_weight(weight, "2:4", method, gram).mask
    # channels 16 to 19: one dead, three alive
    assert not bool(kept[:, 16].any())


def test_damping_is_raised_and_said():
    weight, gram = layer_of(12, 48)
    gram.diagonal().sub_(1.2 * torch.linalg.eigvalsh(gram)[0] + 0.02 * gram.diagonal().mean())
    layer = objective(weight, gram)
    assert "not positive definite at damping 0.01; it was raised to 0.1" in layer.notes[0]
    result = prune_weight(weight, "2:4", "fast", gram)
    assert result.notes == layer.notes


def test_what_is_no_gram_is_refused():
    gram = torch.full((8, 8), 1e3).fill_diagonal_(1.0)
    with pytest.raises(CalibrationError, match="not positive definite even with damping"):
        prune_weight(torch.randn(2, 8), "2:4", "fast", gram)
