"""A weight in the kernel layout, made through the raw-pointer binding. For the tests of this folder only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp import _native
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import NM, parse

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
ROUNDING = 4  # int8 weights whose product rounds the activations
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_weight(pattern: str, out: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A dense weight [out, columns] that fits the pattern, with some groups emptier than allowed."""
    nm = parse(pattern)
    assert isinstance(nm, NM)
    rows, groups = -(-out // nm.mask_rows), nm.groups(columns)
    score = torch.rand(rows, groups, nm.m, generator=generator)
    kept = score.argsort(dim=2) < nm.n
    kept = kept.repeat_interleave(nm.mask_rows, dim=0)[:out]
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, kept.shape, generator=generator)
    else:
        weight = torch.randn(kept.shape, generator=generator)
    kept &= torch.rand(kept.shape, generator=generator) < 0.95
    return (weight * kept).view(out, groups * nm.m)[:, :columns].to(dtype).contiguous()


@dataclass
class Layout:
    """Values and metadata bytes of one weight, and the integers that describe it."""

    description: tuple[int, int, int, int, int, int]
    values: Tensor
    metadata: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.metadata.nbytes

    @classmethod
    def of(cls, packed: PackedWeight, *, rounding: bool = False) -> Layout:
        nm = packed.pattern
        assert isinstance(nm, NM)
        description = (*packed.shape, nm.n, nm.m, nm.mask_rows, ROUNDING if rounding else CODES[packed.dtype])
        values = torch.full((_native.nm_values_bytes(*description),), 0xA5, dtype=torch.uint8)
        metadata = torch.full((_native.nm_metadata_bytes(*description),), 0xA5, dtype=torch.uint8)
        _native.nm_pack(
            *description,
            packed.values.data_ptr(),
            packed.metadata.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
        )
        return cls(description, values, metadata)

    def unpack_into(self, packed: PackedWeight) -> None:
        _native.nm_unpack(
            *self.description,
            self.values.data_ptr(),
            self.metadata.data_ptr(),
            packed.values.data_ptr(),
            packed.metadata.data_ptr(),
        )

    def to_dense(self, dtype: torch.dtype, threads: int = 1) -> Tensor:
        dense = torch.full(self.description[:2], 77, dtype=dtype)
        _native.nm_to_dense(
            *self.description, self.values.data_ptr(), self.metadata.data_ptr(), dense.data_ptr(), threads
        )
        return dense

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
        threads: int = 1,
        *,
        activation: int = 0,
        scales: Tensor | None = None,
    ) -> None:
        """Rows of x and y may be apart; their strides are passed on."""
        _native.nm_linear(
            *self.description,
            self.values.data_ptr(),
            self.metadata.data_ptr(),
            CODES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            0 if scales is None else scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            activation,
            y.data_ptr(),
            y.stride(0),
            threads,
        )


def check_linear(
    pattern: str,
    out: int,
    columns: int,
    batch: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = True,
    gap: int = 0,
    threads: int = 1,
    seed: int = 0,
    int8_weights: bool = False,
) -> None:
    """Compare one product with float64, outputs poisoned beforehand and the gaps between rows of y untouched.

    ``dtype`` is that of x and y, and of the weight if it is not int8, which then has row scales.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(pattern, out, columns, torch.int8 if int8_weights else dtype, generator)
    layout = Layout.of(pack(weight, pattern))
    scales = torch.rand(out, generator=generator) / 64 if int8_weights else None
    x = torch.randn(batch, columns + gap, generator=generator).to(dtype)
    x[:, columns:] = float("nan")
    bias = torch.randn(out, generator=generator).to(dtype) if has_bias else None
    y = torch.full((batch, out + gap), float("nan"), dtype=dtype)
    layout.linear(x, bias, y, threads, scales=scales)

    x64, w64 = x[:, :columns].double(), weight.double()
    if scales is not None:
        w64 = w64 * scales.double()[:, None]
    want = x64 @ w64.T
    scale = x64.abs() @ w64.abs().T
    if bias is not None:
        want = want + bias.double()
        scale = scale + bias.double().abs()
    # fp32 sums: a pessimistic error of a few ulp per added term; then one rounding to the output type
    bound = scale * (2.0**-24 * (4 + columns**0.5)) + want.abs() * EPSILON[dtype] * 1.01 + 1e-7
    error = (y[:, :out].double() - want).abs()
    assert bool((error <= bound).all()), f"error {(error / bound).nan_to_num(1e30).max().item():.3g} times the bound"
    assert bool(y[:, out:].isnan().all()), "the gap between rows of y was written"
    assert layout.to_dense(weight.dtype).equal(weight)


def check_rounded(
    pattern: str, out: int, columns: int, batch: int, dtype: torch.dtype, *, threads: int = 1, gap: int = 0
) -> Tensor:
    """Compare one product of int8 weights and rounded activations with exact integers; y [batch, out].

    One row of x in five is of one sign, one holds NaN.
    """
    generator = torch.Generator().manual_seed(out + batch)
    weight = random_weight(pattern, out, columns, torch.int8, generator)
    layout = Layout.of(pack(weight, pattern), rounding=True)
    x = torch.randn(batch, columns + gap, generator=generator)
    x[1::5] += 6
    x[2::5, :1] = float("nan")
    x = x.to(dtype)
    scales = torch.rand(out, generator=generator) / 64
    bias = torch.randn(out, generator=generator).to(dtype)
    y = torch.full((batch, out + gap), 7.0, dtype=dtype)
    layout.linear(x[:, :columns], bias, y[:, :out], threads, scales=scales)

    low, high = x[:, :columns].float().aminmax(dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high / 254 - low / 254).clamp_min(torch.finfo(torch.float32).tiny)
    zero_point = ((-low / scale).round() - 127).clamp(max=127)
    integers = ((x[:, :columns].float() * (1 / scale)).round() + zero_point).clamp(-127, 127) - zero_point
    product = (integers.double() @ weight.double().T).float() * scale
    want = product.double() * scales.double() + bias.double()  # one rounding more where it is not fused
    unit = (product * scales).abs().double() * 2.0**-24 + want.abs() * EPSILON[dtype] * 1.01
    error = (y[:, :out].double() - want).abs()
    assert y[:, :out].isnan().equal(want.isnan())
    assert bool((error.nan_to_num(0) <= unit.nan_to_num(0)).all()), f"{error.nan_to_num(0).max()}"
    assert bool((y[:, out:] == 7).all()), "the gap between rows of y was written"
    assert layout.to_dense(torch.int8).equal(weight)
    return y
