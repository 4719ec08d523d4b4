"""Adapter of the compiled CPU kernels (C ABI, raw pointers): N:M and V:N:M weights in fp32, fp16, bf16 and int8, the
last with activations as they are or rounded to int8, and block weights in fp32, fp16 and bf16.

Gives a Kernel of two byte tensors in the layout of csrc/include/sparsecomp.h, and row scales for int8.
Knows no instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.base import Backend, Kernel, numbers_why_not
from sparsecomp.errors import BackendError
from sparsecomp.machine.native import DTYPE_CODES, ROUNDING_CODE, extension, native
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import packed_bytes
from sparsecomp.packing.format import PackedWeight, dequantize, scales_of
from sparsecomp.patterns import Block, Pattern, row_nm
from sparsecomp.patterns.numbers import COMPUTED, FLOAT, Numbers

MOST_KEPT = 1 << 16  # weights of a row that are multiplied as integers: their sum fits 32 bits
MOST_PADDING = 1.5  # stored over real weights of a block
MOST_SIDE = 1 << 20
_LAYOUT = 2  # byte tensors of the library; scales follow
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def _require_native() -> ModuleType:
    module = native()
    if isinstance(module, str):
        raise BackendError(f"the cpu backend cannot run: {module}")
    return module


def _stored(
    pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype, numbers: Numbers, kept: int
) -> tuple[str, tuple[int, ...]]:
    """The family of functions of the library that serve a weight in a layer of ``dtype``, and its description.

    ``kept`` counts blocks.
    """
    code = DTYPE_CODES[numbers.values_dtype(dtype)] if numbers.activation_bits is None else ROUNDING_CODE
    if isinstance(pattern, Block):
        return "block", (*shape, pattern.rows, pattern.cols, kept, code)
    nm = row_nm(pattern)
    if nm is None:
        raise BackendError(f'"{pattern}" has no packed form; the cpu backend runs N:M, V:N:M and block patterns')
    return "nm", (*shape, nm.n, nm.m, nm.mask_rows, code)


def _call(family: str, function: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(_require_native(), f"{family}_{function}")
    return found


def _family(kernel: Kernel) -> str:
    return "block" if isinstance(kernel.pattern, Block) else "nm"


def _holds(tensor: Tensor, size: int) -> bool:
    return tensor.nbytes == size and tensor.is_cpu and tensor.is_contiguous()


def _require_layout(kernel: Kernel) -> None:
    """BackendError unless the tensors are what the library will read: it takes addresses and asks nothing more."""
    tensors, sizes = kernel.tensors, kernel.sizes
    if len(tensors) == len(sizes) and _holds(tensors[0], sizes[0]) and _holds(tensors[1], sizes[1]):
        if len(sizes) == _LAYOUT:
            return
        if _holds(tensors[2], sizes[2]) and tensors[2].dtype is torch.float32:
            return
    got = ", ".join(f"{each.nbytes} ({each.dtype}, strides {each.stride()}, {each.device})" for each in tensors)
    raise BackendError(
        f"a {kernel.pattern} layout of shape {kernel.shape} in {kernel.dtype} takes contiguous tensors of "
        f"{', '.join(map(str, sizes))} bytes on the cpu, scales in torch.float32, got {got}; "
        f"prepare it with SparseLinear"
    )


def _addresses(**tensors: Tensor) -> list[int]:
    """Where tensors start; BackendError for elements without memory, as 0 means none to the library."""
    found = [tensor.data_ptr() for tensor in tensors.values()]
    if 0 in found:
        for name, tensor in tensors.items():
            if tensor.data_ptr() == 0 and tensor.numel() != 0:
                raise BackendError(
                    f"{name} has shape {tuple(tensor.shape)} and no memory; the cpu backend reads tensors whose "
                    f"storage holds their elements, so do not resize the storage, or set the tensor anew"
                )
    return found


def _kept_blocks(values_bytes: int, pattern: Block, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """How many blocks values of so many bytes hold, at most all of the grid."""
    down, across = pattern.grid(*shape)
    if down * across == 0:
        return 0
    family, arguments = _stored(pattern, shape, dtype, FLOAT, 1)
    return min(down * across, values_bytes // int(_call(family, "values_bytes")(*arguments)))


def _canonical_shapes(kernel: Kernel) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Shapes of the canonical values and metadata of a kernel's weight (docs/format.md)."""
    pattern, (out, columns) = kernel.pattern, kernel.shape
    if isinstance(pattern, Block):
        down, across = pattern.grid(out, columns)
        return (kernel.arguments[4], pattern.rows, pattern.cols), (down, packed_bytes(across, 1))
    nm = row_nm(pattern)
    assert nm is not None  # it was prepared
    slots = nm.slots(columns)
    return (out, slots), (-(-out // nm.mask_rows), packed_bytes(slots, kernel.numbers.position_bits(nm)))


def _unfit_block(pattern: Block) -> str | None:
    """Why the library would store blocks of that size with too much padding, or None."""
    rows, cols = pattern.rows, pattern.cols
    if max(rows, cols) >= MOST_SIDE:
        return f"has no kernel for {pattern}; sides of a block are below {MOST_SIDE}"
    stored = _require_native().block_values_bytes(rows, cols, rows, cols, 1, DTYPE_CODES[torch.int8])
    if stored <= MOST_PADDING * rows * cols:
        return None
    return (
        f"has no kernel for {pattern}: a {rows}x{cols} block fills less than two thirds of the vectors of 16 weights "
        f"it takes; sides such as 16x1, 4x4, 1x16 and their multiples fill them"
    )


def _unfit_integers(request: Request) -> str | None:
    """Why sums of integers would not fit 32 bits, or None; sums of floats always do."""
    nm = row_nm(request.pattern)
    if request.numbers.activation_bits is None or nm is None or (kept := nm.slots(request.shape[1])) <= MOST_KEPT:
        return None
    return (
        f"has no kernel that sums {kept} integers of a row; {request.numbers} rows keep at most {MOST_KEPT} weights, "
        f"whose sum fits 32 bits"
    )


class CpuBackend(Backend):
    """The kernels of the C library, with as many threads as torch uses."""

    name = "cpu"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if the compiled extension is loaded, else why it is not."""
        module = native()
        return module if isinstance(module, str) else None

    def refusal(self) -> str | None:
        """The extension's own words where it is installed and refuses this machine or SPARSECOMP_ISA, else None."""
        module = native()
        return module if isinstance(module, str) and not isinstance(extension(), str) else None

    def supports(self, request: Request) -> str | None:
        """None for N:M, V:N:M and blocks that fill vectors, in fp32, fp16 and bf16 on the CPU, else the reason."""
        if request.device != "cpu":
            return f"runs on cpu, not on {request.device}"
        if isinstance(request.pattern, Block):
            if request.numbers.has_scales:
                return f"has no kernel for {request.numbers} blocks; N:M and V:N:M weights only"
            if reason := self.missing() or _unfit_block(request.pattern):
                return reason
        elif row_nm(request.pattern) is None:
            return f"has no kernel for {request.pattern}; N:M, V:N:M and block patterns only"
        if request.dtype not in DTYPE_CODES or request.dtype == torch.int8:
            return f"has no kernel for {request.dtype}; torch.float32, torch.float16 and torch.bfloat16 only"
        return numbers_why_not(request.numbers, COMPUTED) or _unfit_integers(request)

    def adopt(
        self,
        tensors: tuple[Tensor, ...],
        pattern: Pattern,
        shape: tuple[int, int],
        dtype: torch.dtype,
        numbers: Numbers,
    ) -> Kernel:
        """The kernel whose layout these byte tensors (and scales) are; BackendError if they cannot be."""
        kept = _kept_blocks(tensors[0].nbytes, pattern, shape, dtype) if isinstance(pattern, Block) else 0
        family, arguments = _stored(pattern, shape, dtype, numbers, kept)
        layout = _call(family, "values_bytes")(*arguments), _call(family, "metadata_bytes")(*arguments)
        sizes = (*layout, *([numbers.scales_bytes(shape)] if numbers.has_scales else []))
        kernel = Kernel(self.name, tensors, pattern, shape, dtype, numbers, arguments, sizes=sizes)
        _require_layout(kernel)
        return kernel

    def nearest(self, request: Request) -> bool:
        """True on the CPU, of which no other sparse backend knows."""
        return torch.device(request.device).type == "cpu"

    def prepare(self, packed: PackedWeight) -> Kernel:
        """The layout of ``packed``, which must be on the CPU."""
        facts = packed.pattern, packed.shape, packed.dtype, packed.numbers
        family, arguments = _stored(*facts, packed.values.shape[0])
        values = torch.empty(_call(family, "values_bytes")(*arguments), dtype=torch.uint8, device="cpu")
        metadata = torch.empty(_call(family, "metadata_bytes")(*arguments), dtype=torch.uint8, device="cpu")
        canonical = {"values": packed.values.detach().contiguous(), "metadata": packed.metadata.contiguous()}
        _call(family, "pack")(*arguments, *_addresses(**canonical), values.data_ptr(), metadata.data_ptr())
        tensors = values, metadata, *(each.detach().contiguous() for each in scales_of(packed))
        return self.adopt(tensors, packed.pattern, packed.shape, packed.dtype, packed.numbers)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, bit for bit what ``prepare`` was given."""
        _require_layout(kernel)
        shapes = _canonical_shapes(kernel)
        layout, scales = kernel.tensors[:_LAYOUT], kernel.tensors[_LAYOUT:]
        values = torch.empty(shapes[0], dtype=kernel.numbers.values_dtype(kernel.dtype), device="cpu")
        metadata = torch.empty(shapes[1], dtype=torch.uint8, device="cpu")
        pointers = _addresses(values=layout[0], metadata=layout[1])
        _call(_family(kernel), "unpack")(*kernel.arguments, *pointers, values.data_ptr(), metadata.data_ptr())
        parts = values, metadata, *scales
        return PackedWeight.of(parts, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)

    def dense(self, kernel: Kernel) -> Tensor:
        """The dense weight [out, in], written straight from the layout."""
        _require_layout(kernel)
        values, metadata, *scales = kernel.tensors
        weight = torch.empty(kernel.shape, dtype=kernel.numbers.values_dtype(kernel.dtype), device="cpu")
        pointers = _addresses(values=values, metadata=metadata)
        _call(_family(kernel), "to_dense")(*kernel.arguments, *pointers, weight.data_ptr(), torch.get_num_threads())
        return dequantize(weight, scales[0], kernel.dtype) if scales else weight

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation applied in the same call."""
        return self.run(kernel, x, bias, _ACTIVATION_CODES[activation])

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: int = 0) -> Tensor:
        """y [batch, out] in one call of the library; only ``x`` with strided columns is copied."""
        _require_layout(kernel)
        batch, columns = x.shape
        out = kernel.shape[0]
        y = x.new_empty(batch, out)  # of the kernel's dtype, as x is; sizes as arguments, as a tuple they cost 0.5 us
        if batch == 0 or out == 0:
            return y
        step = columns
        if not x.is_contiguous():
            step = x.stride(0)
            if x.stride(1) != 1 or step < columns:
                x, step = x.contiguous(), columns
        values, metadata, *scales = kernel.tensors
        # at every call: a tensor whose storage was replaced is then followed, not read after free
        values_start, metadata_start, x_start = values.data_ptr(), metadata.data_ptr(), x.data_ptr()
        scales_start = scales[0].data_ptr() if scales else 0
        bias_start = 0 if bias is None else bias.data_ptr()
        # dense groups of integers have no metadata
        got = values_start and (metadata_start or not kernel.sizes[1]) and x_start
        if not (got and (bias_start or bias is None) and (scales_start or not scales)):
            optional = {"scales": scales[0] if scales else None, "bias": bias}
            given = {name: tensor for name, tensor in optional.items() if tensor is not None}
            _addresses(values=values, metadata=metadata, x=x, **given)
        module = _require_native()
        linear = module.block_linear if isinstance(kernel.pattern, Block) else module.nm_linear
        linear(
            *kernel.arguments,
            values_start,
            metadata_start,
            DTYPE_CODES[kernel.dtype],
            x_start,
            step,
            batch,
            scales_start,
            bias_start,
            activation,
            y.data_ptr(),
            out,
            torch.get_num_threads(),
        )
        return y


def eager_product(functions: object, kernel: Kernel, activation: str, otherwise: Callable[..., Any]) -> Any:
    """The product of a kernel as one function of the extension: (x, bias, dense_above) -> y, or None.

    ``functions`` is the extension's hold of torch; ``otherwise`` sees to gradients and dense products.
    """
    facts = isinstance(kernel.pattern, Block), kernel.arguments, DTYPE_CODES[kernel.dtype], kernel.tensors
    return _require_native().eager_product(functions, *facts, _ACTIVATION_CODES[activation], otherwise)
