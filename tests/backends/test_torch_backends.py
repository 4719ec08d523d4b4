"""The cpu, dense and reference backends: exact layouts, and products against float64."""

from __future__ import annotations

import pytest
import torch

from sparsecomp.backends.base import Backend
from sparsecomp.backends.registry import backends
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse

NM_PATTERNS = ["1:2", "2:4", "3:4", "4:8", "2:8", "8:16", "5:16", "16:16", "2:4@v4", "4:2:8"]
PATTERNS = [*NM_PATTERNS, "block4x8:0.4", "block3x3:0.5"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(1, 1), (5, 3), (16, 32), (17, 47), (33, 130), (4, 0), (0, 8)]


@pytest.fixture(params=["cpu", "dense", "reference"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found = backends()[request.param]
    if reason := found.missing():
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_layout_and_product(backend: Backend, pattern: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for out, columns in SHAPES:
        if reason := backend.supports(Request(parse(pattern), (out, columns), dtype, "cpu", 1)):
            assert pattern.startswith("block") and "block" in reason
            continue
        weight = prune_weight(torch.randn(out, columns), pattern).weight.to(dtype)
        packed = pack(weight, pattern)
        kernel = backend.prepare(packed)
        back = backend.restore(kernel)
        assert torch.equal(back.values, packed.values) and torch.equal(back.metadata, packed.metadata)
        assert back.pattern == packed.pattern and back.shape == packed.shape
        assert torch.equal(backend.dense(kernel), weight)
        adopted = backend.adopt(kernel.tensors, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)
        for batch in (0, 1, 6):
            x = torch.randn(batch, columns).to(dtype)
            for bias in (None, torch.randn(out).to(dtype)):
                want = x.double() @ weight.double().T
                if bias is not None:
                    want = want + bias.double()
                for held in (kernel, adopted):
                    got = backend.run(held, x, bias)
                    assert got.dtype == dtype and got.shape == (batch, out)
                    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
                    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_rows_may_have_any_stride(backend: Backend) -> None:
    torch.manual_seed(0)
    weight = prune_weight(torch.randn(9, 24), "2:4").weight
    kernel = backend.prepare(pack(weight, "2:4"))
    wide = torch.randn(7, 60)
    views = [wide[:, 5:29], wide[:, 1:49:2], wide[::3, :24], wide[:1, :24].expand(4, 24), torch.randn(24, 5).T]
    views.append(torch.randn(40).as_strided((6, 24), (3, 1)))
    for x in views:
        want = x.double() @ weight.double().T
        torch.testing.assert_close(backend.run(kernel, x, None).double(), want, rtol=0, atol=1e-4)


def test_layout_does_not_alias_the_weight_it_was_given() -> None:
    backend = backends()["cpu"]
    if reason := backend.missing():
        pytest.skip(reason)
    packed = pack(prune_weight(torch.randn(16, 16), "8:16").weight, "8:16")
    kernel = backend.prepare(packed)
    want = packed.values.clone()
    packed.values.zero_()
    assert torch.equal(backend.restore(kernel).values, want)
