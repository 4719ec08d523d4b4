"""Calls the shared libraries of csrc/cuda on torch's tensors: the C ABI of wgmma_sp.h, and the choice of a library.

Takes operands in the layout of ``packing.layouts.wgmma``; knows nothing of packing, requests or layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gpu.cutlass.build import libraries
from sparsecomp.backends.gpu.cutlass.config import Choice, Config, candidates
from sparsecomp.errors import BackendError

ABI = 1
_ROW_BYTES = 16  # rows of x and y start at multiples of this: the tensor copy engine asks for it


class Arguments(ctypes.Structure):
    """``sparsecomp_wgmma_sp_arguments`` of csrc/cuda/wgmma_sp.h, field by field."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("weight_scales", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("out", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("scale_per_row", ctypes.c_int32),
        ("scale_per_token", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Scales:
    """fp32 factors of fp8 operands on their device: of the weight [out] or [1], of x [tokens] or [1]."""

    weight: Tensor
    x: Tensor


@dataclass(frozen=True)
class Place:
    """Where a product runs: the device's number, its multiprocessors, and the stream as a cudaStream_t."""

    device: int
    multiprocessors: int
    stream: int


def product(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out: int,
    options: tuple[Config, ...],
    activation: str = "none",
    scales: Scales | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """y [tokens, out] = activation(x W^T + bias) in ``options``' output type, on torch's current stream.

    ``x`` [tokens, in] whose rows do not start at multiples of 16 bytes is copied once. A y whose rows would not is
    computed in wider rows and copied. ``choice`` None takes the fastest of a few, measured at the first call for about
    that many tokens; ``libraries`` must have been asked for ``options`` before a CUDA graph is captured.
    """
    tokens, columns = x.shape
    output = getattr(torch, options[0].output)
    multiple = _ROW_BYTES // output.itemsize
    y = torch.empty(tokens, -(-out // multiple) * multiple, dtype=output, device=x.device)
    if tokens == 0 or out == 0:
        return y[:, :out]
    x = aligned(x)
    place = where(x)
    arguments = Arguments(
        values=values.data_ptr(),
        metadata=metadata.data_ptr(),
        x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        weight_scales=None if scales is None else scales.weight.data_ptr(),
        x_scales=None if scales is None else scales.x.data_ptr(),
        # the stride of a single row means nothing to torch, and may be anything
        x_stride=x.stride(0) if tokens > 1 else -(-columns * x.itemsize // _ROW_BYTES) * _ROW_BYTES // x.itemsize,
        y_stride=y.shape[1],
        out=out,
        tokens=tokens,
        columns=columns,
        activation=ACTIVATIONS.index(activation),
        scale_per_row=int(scales is not None and scales.weight.numel() > 1),
        scale_per_token=int(scales is not None and scales.x.numel() > 1),
        device=place.device,
        multiprocessors=place.multiprocessors,
    )
    # the library launches in the current context, which need not be that of x
    with torch.cuda.device(place.device) if x.is_cuda else nullcontext():
        if choice is None:
            tuning = _tuning()
            key = tuning_key(place.device, options, out, columns, tokens)
            choice = tuning.known(key)
            if choice is None:
                choices = candidates(options, out, tokens, place.multiprocessors)
                choice = tuning.tuned(key, choices, lambda each: launch(each, arguments, place.stream))
        launch(choice, arguments, place.stream)
    return y if y.shape[1] == out else y[:, :out].contiguous()


def tuning_key(device: int, options: Sequence[Config], out: int, columns: int, tokens: int) -> tuple[object, ...]:
    """Under which the fastest choice for such products is remembered."""
    return ("wgmma_sp", device, str(options[0]), out, columns, _tuning().bucket(tokens))


def launch(choice: Choice, arguments: Arguments, stream: int) -> None:
    """One launch; raises BackendError with the library's reason if it is refused."""
    library = load(choice.config)
    arguments.swizzle = choice.swizzle
    result = library.sparsecomp_wgmma_sp(ctypes.byref(arguments), ctypes.c_void_p(stream))
    if result != 0:
        reason = library.sparsecomp_wgmma_sp_error(result).decode()
        raise BackendError(
            f"CUTLASS refused a product of {arguments.tokens} tokens with a weight of "
            f"{arguments.out}x{arguments.columns} ({reason}); use another backend for this layer"
        )


def where(x: Tensor) -> Place:
    """The device and the current stream of a tensor."""
    device = x.get_device()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Place(device, multiprocessors, torch.cuda.current_stream(device).cuda_stream)


def aligned(x: Tensor) -> Tensor:
    """``x`` [tokens, in] itself if its rows start at multiples of 16 bytes, else a copy whose rows do."""
    size = x.itemsize
    rows_start = x.shape[0] == 1 or x.stride(0) * size % _ROW_BYTES == 0
    # rows that overlap or stand still (an expanded x) have strides the copy engine has no words for
    apart = x.shape[0] == 1 or x.stride(0) >= x.shape[1]
    if x.data_ptr() % _ROW_BYTES == 0 and rows_start and apart and (x.stride(1) == 1 or x.shape[1] == 1):
        return x
    width = -(-x.shape[1] * size // _ROW_BYTES) * _ROW_BYTES // size
    copy = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)[:, : x.shape[1]]
    return copy.copy_(x)


@cache
def load(config: Config) -> ctypes.CDLL:
    """The shared library of a configuration: built with the package, in the cache, or compiled now.

    Raises BackendError if it can be none of these, if it is damaged, or if it has another C interface.
    """
    path = libraries((config,))[config]
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded ({error}); delete the file") from error
    library.sparsecomp_wgmma_sp.argtypes = (ctypes.POINTER(Arguments), ctypes.c_void_p)
    library.sparsecomp_wgmma_sp_error.restype = ctypes.c_char_p
    if library.sparsecomp_wgmma_sp_abi() != ABI:
        raise BackendError(f"{path} has another C interface than this package; delete the file")
    return library


def _tuning() -> ModuleType:
    return import_module("sparsecomp.kernels.sparse_mma_tuning")
