"""Every kind of pattern through every room: pruned, packed or refused in words, planned, bounded, asked of backends."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.backends.registry import backends
from sparsecomp.errors import PatternError
from sparsecomp.machine.bound import bound
from sparsecomp.machine.device import detect
from sparsecomp.machine.request import Request
from sparsecomp.methods.registry import get_method, methods
from sparsecomp.patterns import Pattern, parse
from sparsecomp.patterns.check import breach, check_mask
from sparsecomp.patterns.project import project
from sparsecomp.planning import measure
from tests.methods.problems import layer_of

# names of every kind of the grammar; a new kind enters here
EVERY_KIND = ["2:4", "5:8@v3", "2:4@t", "4:2:8", "block4x8:0.4", "unstructured:0.3"]
DENSE = ("dense", "reference")  # backends that multiply by any weight, unpacked
OUT, COLUMNS = 24, 160  # more columns than a pass takes at once, and no multiple of that


@pytest.fixture(params=EVERY_KIND)
def pattern(request: pytest.FixtureRequest) -> Pattern:
    return parse(request.param)


def test_every_kind_is_here() -> None:
    kinds = {type(parse(name)) for name in EVERY_KIND}
    assert kinds == set(get_args(Pattern)), "name one of each kind in EVERY_KIND"


def test_its_name_and_its_density(pattern: Pattern) -> None:
    assert parse(str(pattern)) == pattern
    assert 0.0 < pattern.density < 1.0


@pytest.mark.parametrize("shape", [(OUT, COLUMNS), (13, 37), (1, 5), (5, 1), (0, 8), (4, 0)])
def test_the_best_mask_passes_the_check_and_a_full_one_does_not(pattern: Pattern, shape: tuple[int, int]) -> None:
    mask = project(layer_of(*shape)[0].abs(), pattern)
    assert tuple(mask.shape) == shape and mask.dtype == torch.bool
    check_mask(mask, pattern)
    assert breach(mask.numpy(), pattern) is None
    if shape == (OUT, COLUMNS):  # the others are too small to break every pattern
        assert float(mask.float().mean()) == pytest.approx(pattern.density, abs=0.02)
        with pytest.raises(PatternError, match=f"the mask breaks {pattern} in "):
            check_mask(torch.ones(shape, dtype=torch.bool), pattern)


@pytest.mark.parametrize("method", methods())
def test_every_method_obeys_it_and_a_mask_of_the_user(pattern: Pattern, method: str) -> None:
    weight, gram = layer_of(OUT, COLUMNS)
    given = weight.clone()
    pruned = sc.prune_weight(weight, pattern, method, gram)
    check_mask(pruned.mask, pattern)
    assert torch.equal(weight, given) and not bool(pruned.weight[~pruned.mask].any())
    assert torch.equal(pruned.weight, sc.prune_weight(weight, pattern, method, gram).weight)
    mask = project(torch.rand(OUT, COLUMNS, generator=torch.Generator().manual_seed(1)), pattern)
    mask[0] = False
    kept = sc.prune_weight(weight, pattern, method, gram, mask=mask)
    assert torch.equal(kept.mask, mask) and not bool(kept.weight[~mask].any())
    if get_method(method).only_chooses:
        assert torch.equal(kept.weight, torch.where(mask, weight, 0.0))


def test_it_is_packed_or_refused(pattern: Pattern) -> None:
    weight = sc.prune_weight(layer_of(OUT, COLUMNS)[0], pattern).weight
    if pattern.mask_only:
        with pytest.raises(PatternError, match=f'"{pattern}" is a mask-only pattern and has no packed form'):
            sc.pack(weight, pattern)
        return
    packed = sc.pack(weight, pattern).validate()
    assert torch.equal(packed.unpack(), weight) and str(packed.pattern) == str(pattern)
    assert measure.random_weight(pattern, (OUT, COLUMNS), torch.float32).shape == (OUT, COLUMNS)


def test_plan_answers(pattern: Pattern) -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, OUT))
    if pattern.mask_only:
        with pytest.raises(PatternError, match=f'"{pattern}" is a mask-only pattern that no kernel runs'):
            sc.plan(model, pattern, measure=False)
        return
    (layer,) = sc.plan(model, pattern, measure=False)
    assert layer.choice is not None or layer.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_backend_takes_it_or_says_why_not(pattern: Pattern, device: str) -> None:
    request = Request(pattern, (OUT, COLUMNS), torch.float32, device, 1)
    for backend in backends().values():
        reason = backend.supports(request)
        assert reason is None or reason.strip()
        if pattern.mask_only and backend.name not in DENSE:
            assert reason is not None, f"{backend.name} has no kernel for it"


def test_it_has_a_bound(pattern: Pattern) -> None:
    limit = bound(Request(pattern, (OUT, COLUMNS), torch.float32, "cpu", 1), detect("cpu"))
    assert math.isfinite(limit.value) and limit.value > 0.0
