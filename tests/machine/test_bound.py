"""The roofline bound against the formula by hand, and packed sizes against what pack writes."""

from __future__ import annotations

import pytest
import torch

from sparsecomp.machine.bound import bound, packed_nbytes
from sparsecomp.machine.device import Device
from sparsecomp.machine.request import Request
from sparsecomp.packing import quantize
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import DTYPES, INT8, INT8_A8
from sparsecomp.planning.measure import random_weight

FLOPS, BYTES = 2e11, 4e10


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(Device, "flops", lambda self, dtype, threads=None: FLOPS)
    monkeypatch.setattr(Device, "integer_flops", lambda self, threads=None: 4 * FLOPS)
    monkeypatch.setattr(Device, "bandwidth", lambda self, threads=None: BYTES)
    return Device("cpu", "a processor", "avx512", 2, None, None, 32 << 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:8", "8:16", "5:16", "2:4@v4", "64:2:8", "block16x8:0.3"])
@pytest.mark.parametrize("shape", [(64, 128), (33, 45), (1, 1)])
def test_packed_bytes_are_those_of_the_format(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = random_weight(parse(pattern), shape, torch.float32)
    assert packed_nbytes(parse(pattern), shape, torch.float32) == packed.nbytes
    values = packed.values.numel() * (torch.float32.itemsize - dtype.itemsize)
    assert packed_nbytes(parse(pattern), shape, dtype) == packed.nbytes - values


def test_int8_weights_are_counted_in_bytes_with_their_scales(cpu: Device) -> None:
    request = Request(parse("2:4"), (4096, 4096), torch.float32, "cpu", 1, numbers=INT8)
    got = bound(request, cpu)
    dense, packed, moved = 4096 * 4096 * 4, 4096 * 2048 + 4096 * 512 + 4096 * 4, 2 * 4096 * 4
    assert packed == quantize(random_weight(parse("2:4"), (4096, 4096), torch.float32)).nbytes
    assert got.limited_by == "memory" and got.value == pytest.approx((dense + moved) / (packed + moved))


def test_bytes_bound_at_batch_one(cpu: Device) -> None:
    got = bound(Request(parse("2:4"), (4096, 4096), torch.float32, "cpu", 1), cpu)
    dense, packed, moved = 4096 * 4096 * 4, 4096 * 4096 * 2 + 4096 * 512, 2 * 4096 * 4
    assert got.limited_by == "memory"
    assert got.value == pytest.approx((dense + moved) / (packed + moved))
    assert got.dense_seconds == pytest.approx((dense + moved) / BYTES)
    assert got.value == pytest.approx(1.88, abs=0.01)
    half = bound(Request(parse("2:4"), (8192, 8192), torch.bfloat16, "cpu", 1), cpu)
    assert half.value == pytest.approx(1.78, abs=0.01)


def test_compute_bound_at_large_batch(cpu: Device) -> None:
    for pattern, value in (("2:4", 2.0), ("4:16", 4.0), ("12:16", 16 / 12), ("16:16", 1.0), ("block16x16:0.25", 4.0)):
        got = bound(Request(parse(pattern), (4096, 4096), torch.float32, "cpu", 2048), cpu)
        assert got.limited_by == "compute" and got.value == pytest.approx(value)
        assert got.dense_seconds == pytest.approx(2 * 4096 * 4096 * 2048 / FLOPS)


def test_integers_have_a_peak_of_their_own(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern, value in (("8:16", 8.0), ("16:16", 4.0)):
        request = Request(parse(pattern), (4096, 4096), torch.float32, "cpu", 2048, INT8_A8)
        got = bound(request, cpu)
        assert got.limited_by == "compute" and got.value == pytest.approx(value)
        assert got.dense_seconds == pytest.approx(2 * 4096 * 4096 * 2048 / FLOPS)
        monkeypatch.setattr(Device, "integer_flops", lambda self, threads=None: None)
        assert bound(request, cpu).value == pytest.approx(value / 4)
        monkeypatch.setattr(Device, "integer_flops", lambda self, threads=None: 4 * FLOPS)
        assert bound(request, cpu, dense_numbers=INT8_A8).value == pytest.approx(value / 4)
    one = Request(parse("8:16"), (8192, 8192), torch.float32, "cpu", 1, INT8_A8)
    assert bound(one, cpu).value == pytest.approx(32 / 6, abs=0.01)  # bits: 4 of a value and 2 of a position
    assert bound(one, cpu, dense_numbers=INT8_A8).value == pytest.approx(8 / 6, abs=0.01)
    weights_alone = Request(parse("8:16"), (4096, 4096), torch.float32, "cpu", 2048, INT8)
    assert bound(weights_alone, cpu).value == pytest.approx(2.0)


def test_cached_weights_are_not_bound_by_memory_unless_cold(cpu: Device) -> None:
    request = Request(parse("2:4"), (768, 768), torch.float32, "cpu", 1)
    assert bound(request, cpu).limited_by == "compute" and bound(request, cpu).value == pytest.approx(2.0)
    cold = bound(request, cpu, warm=False)
    assert cold.limited_by == "memory" and cold.value == pytest.approx(1.88, abs=0.01)


def test_bound_between_the_limits_never_exceeds_both(cpu: Device) -> None:
    for batch in (1, 2, 4, 8, 16, 64, 512):
        got = bound(Request(parse("8:16"), (4096, 4096), torch.float32, "cpu", batch), cpu)
        assert 1.0 <= got.value <= 2.0
        assert str(got) == f"{got.value:.2f}x ({got.limited_by})"


def test_nothing_to_do_has_no_bound(cpu: Device) -> None:
    assert bound(Request(parse("2:4"), (0, 8), torch.float32, "cpu", 4), cpu).value == 1.0
