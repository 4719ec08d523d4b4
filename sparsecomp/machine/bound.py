"""The roofline bound of a request on a device: how much faster than dense a sparse product can be at most.

Takes a Request and measured peaks, gives a Bound. Knows no kernel, so no kernel can be worse than it promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsecomp.machine.device import Device
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import packed_bytes
from sparsecomp.patterns import Block, Pattern, row_nm
from sparsecomp.patterns.numbers import FLOAT, Numbers


@dataclass(frozen=True)
class Bound:
    """Largest possible ratio of dense time to sparse time, and what sets it.

    ``limited_by`` is "compute" or "memory": what the sparse product waits for when it runs at the measured peaks.
    ``dense_seconds`` and ``sparse_seconds`` are the least times at those peaks.
    """

    value: float
    limited_by: str
    dense_seconds: float
    sparse_seconds: float

    def __str__(self) -> str:
        """Such as "1.88x (memory)"."""
        return f"{self.value:.2f}x ({self.limited_by})"


def packed_nbytes(pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, numbers: Numbers = FLOAT) -> int:
    """Bytes of the canonical packed form of a weight [out, in] that uses all the room its pattern gives."""
    out, columns = shape
    scales = numbers.scales_bytes(shape)
    nm = row_nm(pattern)
    if nm is not None:
        slots = nm.slots(columns)
        values = out * numbers.bytes_of(slots, dtype)
        return values + scales + -(-out // nm.mask_rows) * packed_bytes(slots, numbers.position_bits(nm))
    if isinstance(pattern, Block):
        down, across = pattern.grid(out, columns)
        kept = pattern.kept_blocks(out, columns)
        values = kept * numbers.bytes_of(pattern.rows * pattern.cols, dtype)
        return values + scales + down * packed_bytes(across, 1)
    return numbers.bytes_of(round(out * columns * pattern.density), dtype) + scales + out * packed_bytes(columns, 1)


def bound(
    request: Request, device: Device, threads: int | None = None, warm: bool = True, dense_numbers: Numbers = FLOAT
) -> Bound:
    """The bound of one product y[batch, out] = x[batch, in] W^T (roofline, Williams, Waterman and Patterson 2009).

    time = max(operations / peak operations, bytes / peak bandwidth), for dense and for sparse, and the bound is their
    ratio. Dense does 2*batch*out*in operations, sparse ``density`` of them, at the peak of integers where it multiplies
    integers. Bytes are the weight, dense or in canonical form, and x and y once each. Where the dense weight fits the
    last-level cache no byte need come from memory, and only the operations count: the bound of floats is then
    1 / density. With ``warm=False`` weights come from memory whatever their size, as in a model whose layers come in
    turn. A dense product that is slower than its own limit makes a measured speedup exceed the bound. The dense weight
    is stored and multiplied in ``dense_numbers``, by default those of the layer's dtype.
    """
    out, columns = request.shape
    operations = 2.0 * request.batch * out * columns
    dense_compute = operations / _peak(device, request.dtype, dense_numbers, threads)
    sparse_peak = _peak(device, request.dtype, request.numbers, threads)
    sparse_compute = operations * request.pattern.density / sparse_peak
    dense_bytes = dense_numbers.bytes_of(out * columns, request.dtype) + dense_numbers.scales_bytes(request.shape)
    dense_memory = sparse_memory = 0.0
    if not warm or dense_bytes > device.last_level_bytes:
        rate = device.bandwidth(threads)
        activations = request.batch * (out + columns) * request.dtype.itemsize
        dense_memory = (dense_bytes + activations) / rate
        packed = packed_nbytes(request.pattern, request.shape, request.dtype, request.numbers)
        sparse_memory = (packed + activations) / rate
    dense, sparse = max(dense_compute, dense_memory), max(sparse_compute, sparse_memory)
    if sparse == 0.0:
        return Bound(1.0, "compute", dense, sparse)
    return Bound(dense / sparse, "memory" if sparse_memory > sparse_compute else "compute", dense, sparse)


def _peak(device: Device, dtype: torch.dtype, numbers: Numbers, threads: int | None) -> float:
    integers = None if numbers.activation_bits is None else device.integer_flops(threads)
    return integers or device.flops(dtype, threads)


def known_bound(request: Request, device: Device, warm: bool = True) -> Bound | None:
    """``bound``, or None on a device that lacks the memory for measuring its peaks."""
    try:
        return bound(request, device, warm=warm)
    except torch.OutOfMemoryError:
        return None


def known_bounds(requests: Mapping[int, Request], device: Device, warm: Mapping[int, bool]) -> dict[int, Bound]:
    """The bounds of requests by batch, those of batches that are ``warm``; what is unknown is left out."""
    found = {size: known_bound(request, device, warm[size]) for size, request in requests.items()}
    return {size: limit for size, limit in found.items() if limit is not None}
