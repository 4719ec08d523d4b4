"""The product as a function of arrays of any library: NumPy, CuPy, JAX and whatever speaks DLPack, without copies.

Takes arrays that speak ``__dlpack__`` or ``__cuda_array_interface__`` and gives arrays of the same library. Knows
no modules.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsecomp.activations import require_activation
from sparsecomp.backends import registry
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError
from sparsecomp.nn import operators
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import parse_weights, weights_name

_REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, BufferError, AttributeError, AssertionError, ImportError)


def prepare(weight: Any, pattern: str | Pattern = "2:4", *, backend: str | None = None) -> Kernel:
    """A weight [out, in] prepared once for ``linear``, on the device where it is.

    ``weight`` is an array (fp32, fp16 or bf16) that fits ``pattern``, such as "2:4" or, for integers, "8:16+int8@a8",
    or a ``PackedWeight``, which has a pattern of its own. ``backend`` names one; otherwise the first that runs the
    weight on its device is taken. On a GPU the work is done when this returns, so that ``linear`` may use the kernel on
    any stream.
    Raises ModelError for what is no array and for a backend that cannot run it, PatternError for a weight that does
    not fit.
    """
    with _stream(weight):
        source = weight if isinstance(weight, PackedWeight) else as_tensor(weight, "weight")
        if isinstance(source, PackedWeight):
            kept, numbers = source.pattern, source.numbers
        else:
            kept, numbers = parse_weights(pattern)
            source = in_numbers(pack(source, kept), numbers) if numbers.has_scales else source
        kernel = registry.prepared(source, Choice.asked(kept, numbers, backend))
        _finish(kernel.tensors[0])
    return kernel


def linear(x: Any, weight: Kernel, bias: Any = None, activation: str = "none") -> Any:
    """y [..., out] = activation(x W^T + bias) for x [..., in], as an array of the library of ``x``.

    ``x`` and ``bias`` [out] are arrays of any library, in the dtype and on the device of the weight that ``prepare``
    made; they are not copied, and neither is y. Work on a GPU is queued on CuPy's current stream for an array of
    CuPy, else on torch's, which waits for the stream that a ``__cuda_array_interface__`` names. y is a torch tensor,
    which speaks both protocols, where the library of ``x`` has no ``from_dlpack``. Torch tensors that require a
    gradient get one; an array of another library has no place for it.
    Raises ModelError for operands of another kind, and for a bias whose gradient y could not carry.
    """
    if not isinstance(weight, Kernel):
        raise ModelError(f"linear takes a weight that prepare made, got a {type(weight).__name__}; call prepare first")
    require_activation(activation)
    with _stream(x), _current(weight.tensors[0].device):
        rows = as_tensor(x, "x")
        shift = None if bias is None else as_tensor(bias, "bias")
        _check(rows, shift, weight)
        if isinstance(x, Tensor) or isinstance(bias, Tensor):
            facts = weight.backend, weights_name(weight.pattern, weight.numbers), *weight.shape, weight.dtype
            y = operators.linear(rows, list(weight.tensors), shift, *facts, None, activation)
        else:
            # nobody but this call can watch tensors that it made itself
            shift = None if shift is None else shift.contiguous()
            y = operators.apply(weight, operators.rows(rows), shift, None, activation).view(
                *rows.shape[:-1], weight.shape[0]
            )
        return like(y, x)


def as_tensor(array: Any, name: str) -> Tensor:
    """The memory of ``array`` as a tensor: through DLPack, else through ``__cuda_array_interface__``.

    ``name`` is what errors call it. Raises ModelError for what speaks neither, and for arrays that torch cannot see.
    """
    if isinstance(array, Tensor):
        return array
    strides = getattr(array, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):
        # torch.from_dlpack ends the process
        raise ModelError(f"{name} runs backwards in memory, which torch tensors cannot; make it contiguous first")
    try:
        if hasattr(array, "__dlpack__"):
            tensor: Tensor = torch.from_dlpack(array)  # type: ignore[attr-defined]
            return tensor
        if hasattr(array, "__cuda_array_interface__"):
            return _by_interface(array, name)
    except _REFUSALS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{name} is a {type(array).__name__} that torch cannot read ({reason}); pass a contiguous array of "
            f"float32, float16 or bfloat16 on a device that torch sees"
        ) from error
    raise ModelError(
        f"{name} is a {type(array).__name__}; allowed are torch tensors and arrays with __dlpack__ or "
        f"__cuda_array_interface__, such as those of NumPy and CuPy"
    )


def _by_interface(array: Any, name: str) -> Tensor:
    """The memory of an array that speaks ``__cuda_array_interface__`` alone, on torch's current GPU.

    Torch's current stream waits for the stream that version 3 of the interface names (1 is the legacy default stream,
    2 the one of each thread, None asks for nothing).
    """
    interface = array.__cuda_array_interface__
    tensor = torch.as_tensor(array, device="cuda")
    if tensor.numel() and tensor.data_ptr() != interface["data"][0]:
        # torch copies from one GPU to another without a word
        raise ModelError(
            f"{name} is not in the memory of {tensor.device}; arrays with __cuda_array_interface__ are read on the "
            f"GPU of the weight, else on torch's current one, so make theirs current with torch.cuda.device(...)"
        )
    stream = interface.get("stream")
    here = torch.cuda.current_stream(tensor.device)
    if stream is not None and stream != here.cuda_stream:
        here.wait_stream(torch.cuda.ExternalStream(stream, device=tensor.device))  # type: ignore[no-untyped-call]
    return tensor


def like(y: Tensor, array: Any) -> Any:
    """The memory of ``y`` as an array of the library of ``array``; ``y`` itself where that library has no way in.

    Raises ModelError for a y that requires a gradient, where the array could not carry it.
    """
    if isinstance(array, Tensor):
        return y
    spoken = hasattr(array, "__array_namespace__")
    library = array.__array_namespace__() if spoken else import_module(_library(array))
    from_dlpack = getattr(library, "from_dlpack", None)
    if from_dlpack is None:
        return y
    if y.requires_grad:
        raise ModelError(
            f"bias requires a gradient, which a {type(array).__name__} like x cannot carry; pass x as a torch tensor, "
            f"or bias.detach()"
        )
    return from_dlpack(y)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _stream(array: Any) -> AbstractContextManager[Any]:
    """CuPy's current stream as torch's, so that neither library frees memory the other one still works on."""
    if _library(array) != "cupy":
        return nullcontext()
    device = array.device.id
    with array.device:  # each GPU has a current stream of its own
        pointer = import_module("cupy").cuda.get_current_stream().ptr
    if pointer == 0:
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device=device))  # type: ignore[no-untyped-call]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _finish(tensor: Tensor) -> None:
    """Wait for the work on torch's current stream that made ``tensor``."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _check(x: Tensor, bias: Tensor | None, weight: Kernel) -> None:
    out, columns = weight.shape
    device = weight.tensors[0].device
    if x.ndim == 0 or x.shape[-1] != columns or x.dtype != weight.dtype or x.device != device:
        raise ModelError(
            f"x is {tuple(x.shape)} of {x.dtype} on {x.device}; this weight takes [..., {columns}] of {weight.dtype} "
            f"on {device}"
        )
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != weight.dtype or bias.device != device):
        raise ModelError(
            f"bias is {tuple(bias.shape)} of {bias.dtype} on {bias.device}; this weight takes ({out},) of "
            f"{weight.dtype} on {device}"
        )
