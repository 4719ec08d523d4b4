"""Bits <-> numbers. A register holds unsigned integers of its width; a type says what they mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptxsim.parser import WIDTHS

Array = NDArray[np.generic]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}


def resize(bits: Array, width: int) -> Array:
    """The low ``width`` bytes, or zeros above: what PTX does between registers and types of other widths."""
    return bits if bits.dtype.itemsize == width or bits.dtype == bool else bits.astype(UNSIGNED[width])


def decode(bits: Array, kind: str) -> Array:
    """Numbers of PTX type ``kind``: bf16 as float32, the other floats as themselves, b and u types unsigned."""
    if kind == "pred":
        return bits
    bits = np.ascontiguousarray(resize(bits, WIDTHS[kind]))
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind in _FLOATS:
        return bits.view(_FLOATS[kind])
    return bits.view(SIGNED[WIDTHS[kind]]) if kind[0] == "s" else bits


def encode(numbers: Array, kind: str) -> Array:
    """The bits of numbers in ``kind``; floats are rounded to nearest even, integers wrap."""
    if kind == "pred":
        return numbers.astype(bool)
    if kind == "bf16":
        return _to_bf16(numbers)
    if kind == "tf32":
        return _to_tf32(numbers)
    if kind in _FLOATS:
        with np.errstate(over="ignore"):
            return numbers.astype(_FLOATS[kind]).view(UNSIGNED[WIDTHS[kind]])
    return numbers.astype(SIGNED[WIDTHS[kind]] if kind[0] == "s" else UNSIGNED[WIDTHS[kind]]).view(
        UNSIGNED[WIDTHS[kind]]
    )


def elements(bits: Array, kind: str) -> Array:
    """The 1, 2 or 4 numbers in each 32-bit word, [..., count], the lowest bits first."""
    width = WIDTHS[kind]
    parts = np.ascontiguousarray(bits, np.uint32).view(UNSIGNED[width]).reshape(*bits.shape, 4 // width)
    return decode(parts, kind)


def _to_bf16(numbers: Array) -> Array:
    single = np.ascontiguousarray(numbers, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), np.uint64(0x7FFF), rounded).astype(np.uint16)


def _to_tf32(numbers: Array) -> Array:
    """Ten bits of the mantissa, rounded to nearest, ties away from zero: the only rounding PTX has for tf32."""
    single = np.ascontiguousarray(numbers, np.float32)
    bits = single.view(np.uint32)
    return np.where(np.isfinite(single), bits + np.uint32(0x1000) & np.uint32(0xFFFFE000), bits)
