"""The product as a function of arrays of any library: NumPy, CuPy, JAX and whatever speaks DLPack, without copies.

Takes arrays that speak ``__dlpack__`` or ``__cuda_array_interface__`` and gives arrays of the same library. Knows of
modules only how they prepare a weight for a kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsecomp import ops
from sparsecomp.activations import require_activation
from sparsecomp.backends.registry import Kernel
from sparsecomp.errors import ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.pack.format import PackedWeight, pack
from sparsecomp.patterns import Pattern

_REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, BufferError, AttributeError, AssertionError, ImportError)


def prepare(weight: Any, pattern: str | Pattern = "2:4", *, backend: str | None = None) -> Kernel:
    """A weight [out, in] prepared once for ``linear``, on the device where it is.

    ``weight`` is an array (fp32, fp16 or bf16) that fits ``pattern``, or a ``PackedWeight``, which has a pattern of its
    own. ``backend`` names one; otherwise the first that runs the weight on its device is taken.
    Raises ModelError for what is no array and for a backend that cannot run it, PatternError for a weight that does
    not fit.
    """
    packed = weight if isinstance(weight, PackedWeight) else pack(as_tensor(weight, "weight"), pattern)
    return SparseLinear.from_packed(packed, backend=backend).kernel


def linear(x: Any, weight: Kernel, bias: Any = None, activation: str = "none") -> Any:
    """y [..., out] = activation(x W^T + bias) for x [..., in], as an array of the library of ``x``.

    ``x`` and ``bias`` [out] are arrays of any library, in the dtype and on the device of the weight that ``prepare``
    made; they are not copied, and neither is y. Work on a GPU is queued on CuPy's current stream for an array of
    CuPy, else on torch's. y is a torch tensor, which speaks both protocols, where the library of ``x`` has no
    ``from_dlpack``. Torch tensors that require a gradient get one.
    Raises ModelError for operands of another kind.
    """
    if not isinstance(weight, Kernel):
        raise ModelError(f"linear takes a weight that prepare made, got a {type(weight).__name__}; call prepare first")
    require_activation(activation)
    with _stream(x):
        rows = as_tensor(x, "x")
        shift = None if bias is None else as_tensor(bias, "bias")
        _check(rows, shift, weight)
        if isinstance(x, Tensor) or isinstance(bias, Tensor):
            facts = weight.backend, str(weight.pattern), *weight.shape, weight.dtype
            y = ops.linear(rows, list(weight.tensors), shift, *facts, None, activation)
        else:
            # nobody but this call can watch tensors that it made itself
            shift = None if shift is None else shift.contiguous()
            y = ops.apply(weight, ops.rows(rows), shift, None, activation).view(*rows.shape[:-1], weight.shape[0])
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
            return torch.as_tensor(array, device="cuda")
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


def like(y: Tensor, array: Any) -> Any:
    """The memory of ``y`` as an array of the library of ``array``; ``y`` itself where that library has no way in."""
    if isinstance(array, Tensor):
        return y
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__().from_dlpack(y)
    from_dlpack = getattr(import_module(_library(array)), "from_dlpack", None)
    return y if from_dlpack is None else from_dlpack(y)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _stream(array: Any) -> AbstractContextManager[Any]:
    """CuPy's current stream as torch's, so that neither library frees memory the other one still works on."""
    if _library(array) != "cupy":
        return nullcontext()
    pointer, device = import_module("cupy").cuda.get_current_stream().ptr, array.device.id
    if pointer == 0:
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device=device))  # type: ignore[no-untyped-call]


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
