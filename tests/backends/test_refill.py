"""Layouts that are refilled from a dense weight, compared with layouts that were packed from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsecomp.backends import refill
from sparsecomp.backends.refill import Refillable, refillable, transposed, why_not_transposed
from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing.format import pack
from sparsecomp.patterns import Pattern, parse

PATTERNS = ["2:4@t", "2:4", "8:16", "3:4", "1:2@t", "2:4@v4", "4:2:8", "block16x16:0.5", "block4x4:0.3", "16:16"]
SHAPES = [(1, 1), (4, 4), (33, 35), (48, 80), (130, 70)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pruned(pattern: str | Pattern, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight and its mask."""
    found = prune_weight(torch.randn(*shape), pattern, method="magnitude")
    return found.weight.to(dtype), found.mask


def assert_packed(layout: Refillable, weight: Tensor, pattern: Pattern) -> None:
    """The layout is, byte for byte, what the backend makes of the weight."""
    want = backends()["cpu"].prepare(pack(weight, pattern))
    assert [torch.equal(*pair) for pair in zip(layout.kernel.tensors, want.tensors, strict=True)] == [True, True]
    assert layout.kernel.arguments == want.arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_refilled_layout_is_the_packed_one(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    kept = parse(pattern)
    weight, mask = pruned(kept, shape, dtype)
    mask = weight != 0  # a weight that 16 bits round to zero is packed as a free slot
    layout = refillable(mask, kept, dtype)
    for factor in (1.0, -2.0):
        layout.fill(weight * factor)
        assert_packed(layout, weight * factor, kept)
    if why_not_transposed(mask, kept, dtype) is None:
        other = transposed(kept)
        assert other is not None
        layout = refillable(mask, other, dtype, transpose=True)
        layout.fill(weight)
        assert_packed(layout, weight.t().contiguous(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places_of_several_digits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in layers whose places take more bits than a weight can hold."""
    integer, _, least = refill._DIGITS[dtype]
    monkeypatch.setitem(refill._DIGITS, dtype, (integer, 3, least))
    weight, mask = pruned("2:4@t", (40, 36), dtype)
    layout = refillable(mask, parse("2:4@t"), dtype)
    layout.fill(weight)
    assert_packed(layout, weight, parse("2:4@t"))


def test_free_slots_and_padding_hold_zeros_whatever_the_weight_is() -> None:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 3] = True
    layout = refillable(mask, parse("2:4"), torch.float32)
    layout.fill(torch.full((5, 6), 7.0))
    values = layout.kernel.tensors[0].view(torch.float32)
    assert values.count_nonzero() == 1 and values.max() == 7.0
    assert int((layout.places >= 0).sum()) == 1


def test_products_are_those_of_the_masked_weight() -> None:
    weight, mask = torch.randn(20, 28), pruned("2:4@t", (20, 28))[1]
    x, grad, bias = torch.randn(3, 28), torch.randn(3, 20), torch.randn(20)
    kept = (weight * mask).double()
    forward = refillable(mask, parse("2:4@t"), torch.float32)
    backward = refillable(mask, parse("2:4@t"), torch.float32, transpose=True)
    forward.fill(weight)
    backward.fill(weight)
    torch.testing.assert_close(forward.run(x, bias).double(), x.double() @ kept.T + bias.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(backward.run(grad).double(), grad.double() @ kept, rtol=0, atol=1e-5)


def test_what_cannot_be_refilled_is_said() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(BackendError, match=r"no kernel for torch.float64"):
        refillable(mask, parse("4:4"), torch.float64)
    with pytest.raises(BackendError, match="no kernel for unstructured"):
        refillable(mask, parse("unstructured:1"), torch.float32)
    with pytest.raises(PatternError, match="2:4"):
        refillable(mask, parse("2:4"), torch.float32)
    assert "fewer than" in str(refill.why_not_refillable(parse("2:4"), (1 << 15, 1 << 15), torch.float32))


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "2:4@v4", "4:2:8", "unstructured:0.5"])
def test_a_transpose_that_does_not_fit_is_said(pattern: str) -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 0] = True
    reason = why_not_transposed(mask, parse(pattern), torch.float32)
    assert reason is not None and ("transpose" in reason)
