"""CPU kernels of a mask, whose values are fetched anew from a dense weight: positions are packed once.

Takes a mask [out, in] and gives a Refillable. Knows no autograd and no module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.backends.base import Kernel
from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.patterns import NM, Block, Pattern, row_nm
from sparsecomp.patterns.check import breach

_BACKEND = "cpu"
_MOST = 1 << 30  # weights of a layer, whose places fit the digits below
# Places are packed as if they were weights, some bits at a time: dtype -> integers of its size, bits of a digit, and
# what is added so that every digit stands for a normal number, of which none is zero, infinite or rounded
_DIGITS = {
    torch.float32: (torch.int32, 30, 0x0080_0000),
    torch.bfloat16: (torch.int16, 14, 0x0400),
    torch.float16: (torch.int16, 14, 0x0400),
}


@dataclass(frozen=True, eq=False)
class Refillable:
    """A kernel of a weight W [out, in] or of its transpose, and where each of its values lies in W.

    ``places`` is int32, one number for each value of the layout: the position in the row-major W, or -1 for padding
    and for free slots, which hold zeros.
    """

    kernel: Kernel
    places: Tensor

    def fill(self, weight: Tensor) -> None:
        """Put the values of ``weight``, contiguous, of the kernel's dtype and on the CPU, into the layout."""
        values = self.kernel.tensors[0]
        module = native()
        assert not isinstance(module, str)  # it made the kernel
        pointers = weight.data_ptr(), weight.numel(), self.places.data_ptr(), self.places.numel(), values.data_ptr()
        module.gather(weight.dtype.itemsize, *pointers, torch.get_num_threads())

    def run(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of the kernel: x W^T + bias, or of the transpose x W."""
        return backends()[_BACKEND].run(self.kernel, x, bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the layout and the places."""
        return self.kernel.nbytes + self.places.nbytes


def transposed(pattern: Pattern) -> Pattern | None:
    """The pattern in which the transpose of a weight of ``pattern`` might be packed; None if there is none."""
    if isinstance(pattern, NM) and pattern.transposable:
        return pattern
    if isinstance(pattern, Block):
        return Block(pattern.cols, pattern.rows, pattern.keep)
    nm = row_nm(pattern)
    return None if nm is None else NM(nm.n, nm.m)


def why_not_refillable(pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """None if the CPU kernels run weights of that kind, whatever their values, else the reason."""
    if shape[0] * shape[1] >= _MOST:
        return f"has {shape[0] * shape[1]:,} weights; layers of fewer than {_MOST:,} are refilled"
    backend = backends()[_BACKEND]
    return backend.missing() or backend.supports(Request(pattern, shape, dtype, _BACKEND, batch=1))


def refillable(mask: Tensor, pattern: Pattern, dtype: torch.dtype, *, transpose: bool = False) -> Refillable:
    """The kernel of weights that are zero where ``mask`` (bool [out, in], on the CPU) is False; its values are zeros.

    With ``transpose`` the kernel is that of the transpose [in, out], which is to fit ``pattern``.
    Raises BackendError for what no kernel runs and PatternError for a mask that breaks the pattern.
    """
    shape = (mask.shape[1], mask.shape[0]) if transpose else (mask.shape[0], mask.shape[1])
    if reason := why_not_refillable(pattern, shape, dtype):
        raise BackendError(f"a {pattern} weight of shape {shape} in {dtype} cannot be refilled: {reason}")
    integer, bits, least = _DIGITS[dtype]
    kept = mask.t().contiguous() if transpose else mask.contiguous()
    places = torch.arange(mask.numel(), dtype=torch.int32, device="cpu").view(mask.shape)
    if transpose:
        places = places.t().contiguous()
    backend = backends()[_BACKEND]
    found = stored = None
    for shift in range(0, max(1, (mask.numel() - 1).bit_length()), bits):
        digit = ((places >> shift) & ((1 << bits) - 1)) + least
        coded = (digit * kept).to(integer).view(dtype)
        kernel = backend.prepare(pack(coded, pattern))
        held = kernel.tensors[0].view(integer).to(torch.int32)
        part = (held - least) << shift
        found, stored = part if found is None else found | part, held != 0
    assert found is not None and stored is not None  # there is at least one digit
    kernel.tensors[0].zero_()
    return Refillable(kernel, torch.where(stored, found, -1))


def why_not_transposed(mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> str | None:
    """None if the transpose of weights of that mask, which obeys ``pattern``, can be packed, else the reason."""
    other = transposed(pattern)
    if other is None:
        return f"{pattern} has no transpose that is packed"
    if found := breach(mask.t(), other):
        return f"the transposed mask breaks {other} in {found}"
    return why_not_refillable(other, (mask.shape[1], mask.shape[0]), dtype)
