"""Products of int8 weights with activations rounded to int8: against integers counted by hand, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparsecomp as sc
from sparsecomp.activations import ACTIVATIONS, activate
from sparsecomp.backends import cpu
from sparsecomp.backends.registry import backends, explain
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing import PackedWeight
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import INT8_A8
from sparsecomp.patterns.rounding import rounded_rows
from tests.sparse_layers import TOLERANCE

PATTERNS = ["2:4", "8:16", "12:16", "1:16", "5:8", "16:16", "4:4", "2:4@v4", "4:2:8"]
SHAPES = [(1, 1), (3, 16), (17, 43), (24, 64)]


def weight(pattern: str, out: int, columns: int, dtype: torch.dtype = torch.float32) -> PackedWeight:
    dense = prune_weight(torch.randn(out, columns), pattern).weight.to(dtype)
    return sc.quantize(sc.pack(dense, pattern), "int8")


def on_a_grid(batch: int, columns: int) -> Tensor:
    """Rows whose numbers are whole multiples of their step, a power of two, so that rounding has nothing to decide."""
    integers = torch.randint(-100, 155, (batch, columns)).float()
    if columns > 1:  # the extremes are 254 steps apart
        integers[:, 0], integers[:, -1] = -100, 154
    return integers * 2.0 ** torch.arange(-3, batch - 3)[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rows_are_rounded_by_their_own_extremes() -> None:
    x = torch.tensor([[0.0, 127.0, -127.0], [0.0, 254.0, 1.6], [-254.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 25.4]])
    integers, zeros, steps = rounded_rows(x)
    assert steps.flatten().tolist() == [1.0, 1.0, 1.0, 2.0**-126, pytest.approx(0.1)]
    assert zeros.flatten().tolist() == [128, 1, 255, 1, 1]
    assert integers.tolist() == [[128, 255, 1], [1, 255, 3], [1, 254, 255], [1, 1, 1], [11, 21, 255]]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
def test_no_number_moves_by_more_than_half_a_step(scale: float) -> None:
    x = torch.randn(64, 33) * scale
    x[:8] = x[:8].abs()
    integers, zeros, steps = rounded_rows(x)
    moved = ((integers - zeros) * steps.double() - x.double()).abs()
    assert bool((moved <= steps / 2 * (1 + 1e-5)).all())
    assert int(integers.min()) >= 1 and int(integers.max()) <= 255
    assert not bool(((integers - zeros) * (x == 0)).any())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_twin_counts_integers(pattern: str) -> None:
    for out, columns in SHAPES:
        packed, x = weight(pattern, out, columns), on_a_grid(3, columns)
        kernel = backends()["reference"].prepare(packed)
        y = backends()["reference"].run(kernel, x, None)
        integers, zeros, steps = rounded_rows(x)
        assert packed.scales is not None
        stored = packed.integers().unpack().tolist()
        for row in range(3):
            whole = [value - int(zeros[row]) for value in integers[row].tolist()]
            sums = [sum(a * b for a, b in zip(whole, each, strict=True)) for each in stored]
            want = torch.tensor(sums, dtype=torch.float64) * steps[row].double() * packed.scales.double()
            torch.testing.assert_close(y[row].double(), want, rtol=1e-6, atol=0)


def _pairs() -> list[str]:
    return [name for name, reason in explain(_request("8:16")) if reason is None and name != "dense"]


def _request(pattern: str, shape: tuple[int, int] = (8, 16), dtype: torch.dtype = torch.float32) -> Request:
    return Request(parse(pattern), shape, dtype, "cpu", 1, INT8_A8)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", _pairs())
def test_products_are_those_of_integers(name: str, pattern: str, dtype: torch.dtype, activation: str) -> None:
    backend, twin = backends()[name], backends()["reference"]
    for out, columns in SHAPES:
        packed, bias = weight(pattern, out, columns, dtype), torch.randn(out).to(dtype)
        kernel, known = backend.prepare(packed), twin.prepare(packed)
        restored = backend.restore(kernel)
        assert restored.numbers == INT8_A8
        assert all(torch.equal(restored.parts[part], tensor) for part, tensor in packed.parts.items())
        assert torch.equal(backend.dense(kernel), packed.unpack())
        for batch in (0, 1, 2, 9):
            x = on_a_grid(batch, columns).to(dtype)
            for shift in (None, bias):
                got, want = backend.run_activated(kernel, x, shift, activation), twin.run(known, x.float(), None)
                exact = activate(want.double() + (0 if shift is None else shift.double()), activation)
                scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
                assert got.dtype == dtype and tuple(got.shape) == (batch, out)
                torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("name", _pairs())
@pytest.mark.parametrize("pattern", ["8:16", "16:16"])
def test_the_error_is_that_of_half_a_step(name: str, pattern: str) -> None:
    packed, x = weight(pattern, 24, 100), torch.randn(7, 100)
    backend = backends()[name]
    y = backend.run(backend.prepare(packed), x, None)
    dense = packed.to(dtype=torch.float64).unpack()
    steps = (x.amax(1) - x.amin(1)) / 254
    most = steps[:, None] / 2 * dense.abs().sum(1) * 1.01 + 1e-6
    assert bool(((y - x.double() @ dense.T).abs() <= most).all())
    assert not torch.allclose(y.double(), x.double() @ dense.T, rtol=0, atol=1e-4)  # x is rounded


@pytest.mark.parametrize("name", _pairs())
@pytest.mark.parametrize("pattern", ["8:16", "4:4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_does(name: str, pattern: str, bad: float) -> None:
    packed, x = weight(pattern, 9, 40), torch.randn(5, 40)
    backend = backends()[name]
    kernel = backend.prepare(packed)
    want = backend.run(kernel, x, None)
    x[1, 3] = x[3, 39] = bad
    y = backend.run(kernel, x, None)
    assert bool(y[[1, 3]].isnan().all()) and torch.equal(y[[0, 2, 4]], want[[0, 2, 4]])


@pytest.mark.parametrize("name", _pairs())
def test_rows_of_zeros_and_strided_rows(name: str) -> None:
    packed, bias = weight("8:16", 9, 40), torch.randn(9)
    backend = backends()[name]
    kernel = backend.prepare(packed)
    assert torch.equal(backend.run(kernel, torch.zeros(2, 40), bias), bias.expand(2, 9))
    wide = torch.randn(6, 100)
    for x in (wide[:, 5:45], wide[::2, :40], wide.T[:40].T, torch.randn(40, 3).T):
        torch.testing.assert_close(backend.run(kernel, x, bias), backend.run(kernel, x.contiguous(), bias))


@pytest.mark.parametrize("name", _pairs())
def test_activations_are_applied_to_the_scaled_sum(name: str) -> None:
    packed, x, bias = weight("8:16", 9, 40), on_a_grid(2, 40), torch.randn(9)
    backend = backends()[name]
    kernel = backend.prepare(packed)
    for activation in ACTIVATIONS:
        want = activate(backend.run(kernel, x, bias), activation)
        torch.testing.assert_close(backend.run_activated(kernel, x, bias, activation), want, rtol=1e-5, atol=1e-5)


def test_who_multiplies_floats_alone_says_so() -> None:
    for name, backend in backends().items():
        if name not in ("cpu", "dense", "reference"):
            request = Request(parse("2:4"), (64, 64), torch.float16, "cuda", 1, INT8_A8)
            assert backend.supports(request) is not None, name


def test_sums_that_would_not_fit_32_bits_are_refused_by_name() -> None:
    for pattern, columns in (("8:16", 1 << 17), ("16:16", 1 << 16), ("4:16", 1 << 18)):
        assert backends()["cpu"].supports(_request(pattern, (4, columns))) is None
        reason = backends()["cpu"].supports(_request(pattern, (4, columns + 16)))
        assert reason is not None and "int8@a8 rows keep at most 65536 weights, whose sum fits 32 bits" in reason


@pytest.mark.parametrize("name", _pairs())
@pytest.mark.parametrize("weight_sign", [-1, 1])
@pytest.mark.parametrize("x_sign", [-1, 1])
@pytest.mark.parametrize(("pattern", "columns"), [("16:16", 1 << 16), ("8:16", 1 << 17), ("8:16", 64)])
def test_the_largest_sums_are_exact(name: str, pattern: str, columns: int, x_sign: int, weight_sign: int) -> None:
    """Pairs of 127 are what no quantisation here makes of N < M; a weight from elsewhere may have them."""
    nm = parse(pattern)
    dense = torch.zeros(1, columns, dtype=torch.int8)
    dense.view(1, -1, 16)[..., : 16 if pattern == "16:16" else 8] = 127 * weight_sign
    integers, numbers = sc.pack(dense, pattern), (torch.ones(1), torch.float32, 8)
    metadata = integers.metadata[:, :0] if pattern == "16:16" else integers.metadata
    packed = PackedWeight(integers.values, metadata, nm, (1, columns), *numbers).validate()
    x = torch.full((1, columns), 254.0 * x_sign)
    kept = int((dense != 0).sum())
    y = backends()[name].run(backends()[name].prepare(packed), x, None)
    assert float(y) == torch.tensor(127.0 * 254 * kept * x_sign * weight_sign).item()


def test_dense_groups_are_not_taken_for_a_tensor_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # their metadata is empty, and empty tensors start nowhere
    if (reason := backends()["cpu"].missing()) is not None:
        pytest.skip(reason)
    layer = sc.SparseLinear.from_linear(torch.nn.Linear(32, 16), "16:16+int8@a8", backend="cpu")
    x = torch.randn(3, 32)
    want = backends()["cpu"].run(layer.kernel, x, None)
    monkeypatch.setattr(cpu, "_addresses", lambda **tensors: pytest.fail(f"searched {', '.join(tensors)}"))
    assert torch.equal(backends()["cpu"].run(layer.kernel, x, None), want)
