"""fp8 products through the slow twin of the kernels: scales of every kind, shapes of any kind, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparsecomp.activations import ACTIVATIONS, activate
from sparsecomp.backends.gpu.cutlass.fp8 import FP8, fp8_linear, fp8_why_not, prepare_fp8, scaled
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import quantize
from tests.backends.cutlass_twins import Twins, twin_folder, twins

__all__ = ["twin_folder", "twins"]


def _packed(out: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    generator = torch.Generator().manual_seed(out + columns)
    mask = (torch.rand(out, -(-columns // 4), 4, generator=generator).argsort(dim=2) < 2).flatten(1)[:, :columns]
    sizes = torch.logspace(-3, 3, out).unsqueeze(1)
    return pack((torch.randn(out, columns, generator=generator) * mask * sizes).to(dtype), "2:4")


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 128), (70, 250)])
@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("weight_rows", [True, False])
@pytest.mark.parametrize("x_rows", [True, False])
def test_products(twins: Twins, shape: tuple[int, int], batch: int, weight_rows: bool, x_rows: bool) -> None:
    packed = _packed(*shape)
    weight = prepare_fp8(packed, weight_rows)
    assert weight.scales.numel() == (shape[0] if weight_rows else 1)
    x, x_scales = scaled(torch.randn(batch, shape[1]) * 3, x_rows)
    bias = torch.randn(shape[0]).to(torch.bfloat16)
    y = fp8_linear(x, x_scales, weight, bias)
    # the weight that the fp8 values stand for, by way of the canonical form
    values, _ = scaled(packed.values, weight_rows)
    wide = values.double() * weight.scales.double().unsqueeze(1)
    dense = torch.zeros(*shape, dtype=torch.float64)
    for row, column, slot in _places(packed):
        dense[row, column] = wide[row, slot]
    exact = functional.linear(x.double() * x_scales.double().unsqueeze(1), dense, bias.double())
    assert y.dtype == torch.bfloat16 and y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=8e-3, atol=1e-3)
    # two roundings to 4 bits, each off by at most 1/16
    product = x.double() * x_scales.double().unsqueeze(1)
    size = functional.linear(product.abs(), packed.unpack().double().abs())
    if weight_rows:
        assert bool(((exact - bias.double() - product @ packed.unpack().double().T).abs() <= size / 16 + 1e-9).all())


def _places(packed: PackedWeight) -> list[tuple[int, int, int]]:
    columns = packed.positions().to(torch.int64) + 4 * torch.arange(packed.positions().shape[1]).view(1, -1, 1)
    return [
        (row, int(column), slot)
        for row in range(packed.shape[0])
        for slot, column in enumerate(columns[row].flatten())
        if column < packed.shape[1]
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_no_bias(twins: Twins, activation: str) -> None:
    weight = prepare_fp8(_packed(24, 64))
    x, x_scales = scaled(torch.randn(5, 64))
    plain = fp8_linear(x, x_scales, weight)
    y = fp8_linear(x, x_scales, weight, activation=activation, fast=True)
    torch.testing.assert_close(y.double(), activate(plain.double(), activation), rtol=2e-2, atol=2e-2)
    assert [config.fast for config in twins.loaded] == [False, True]


def test_scales_bring_the_largest_to_the_largest() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e30, 1e30, -1e-30]])
    values, scales = scaled(x)
    assert values.dtype == FP8 and scales.tolist() == pytest.approx([2 / 448, 1.0, 3e30 / 448])
    assert values.float()[0].tolist() == [224.0, -448.0, 112.0] and values.float()[2, 0] == 448
    values, scales = scaled(x, per_row=False)
    assert scales.shape == (1,) and values.float()[2, 0] == 448 and bool(values.float().isfinite().all())
    for shape in ((0, 4), (4, 0), (0, 0)):
        values, scales = scaled(torch.zeros(shape))
        assert values.shape == shape and scales.shape == (shape[0],)
        assert scaled(torch.zeros(shape), per_row=False)[1].shape == (1,)


def test_what_is_refused() -> None:
    weight = prepare_fp8(_packed(16, 32))
    x, x_scales = scaled(torch.randn(3, 32))
    with pytest.raises(BackendError, match=r"got \(3, 32\) of torch.float32 on cpu; this operand is \(3, 32\)"):
        fp8_linear(x.float(), x_scales, weight)
    with pytest.raises(BackendError, match=r"got \(3, 31\) of torch.float8_e4m3fn"):
        fp8_linear(x[:, :31], x_scales, weight)
    with pytest.raises(BackendError, match=r"got \(2,\) of torch.float32 on cpu; this operand is \(3,\) or \(1,\)"):
        fp8_linear(x, x_scales[:2], weight)
    with pytest.raises(BackendError, match=r"got \(16,\) of torch.float32"):
        fp8_linear(x, x_scales, weight, torch.zeros(16))
    with pytest.raises(BackendError, match=r"gives torch.bfloat16 or torch.float16, not torch.float32"):
        fp8_linear(x, x_scales, weight, output=torch.float32)
    with pytest.raises(ModelError, match="is not known"):
        fp8_linear(x, x_scales, weight, activation="tanh")
    with pytest.raises(BackendError, match="the fp8 product has no kernel for 4:8"):
        prepare_fp8(pack(torch.zeros(8, 8), "4:8"))
    with pytest.raises(BackendError, match=r"has no kernel for torch\.int8"):
        prepare_fp8(quantize(_packed(16, 32)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    assert "CUDA" in str(fp8_why_not()) or "ROCm" in str(fp8_why_not())
