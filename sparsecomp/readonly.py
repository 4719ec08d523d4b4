"""Tensors that can be read and computed with, but neither written nor trained: the dense weight of a packed layer.

Takes a function that unpacks a weight. Knows nothing of kernels and layers.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsecomp.errors import ModelError

NO_WEIGHT_GRADIENT = (
    "a packed weight cannot be trained or assigned; train layer.to_linear() and pack the result with "
    "SparseLinear.from_linear(), or load another weight with SparseLinear.from_packed()"
)
_NO_WRITING = (
    "a packed weight cannot be written in place; change layer.to_linear().weight and pack the result with "
    "SparseLinear.from_linear(), or load another weight with SparseLinear.from_packed()"
)

_BASE = vars(torch._C.TensorBase)
_IN_PLACE_OPERATORS = frozenset(
    [
        *("__iadd__", "__isub__", "__imul__", "__imatmul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__"),
        *("__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__delitem__"),
    ]
)
# in place by their names, but nothing of the weight changes
_HARMLESS = frozenset([Tensor.requires_grad_, Tensor.detach_, Tensor.share_memory_])
# they hand out the address of the memory: what it points to must outlive the call
_ADDRESSES = frozenset([Tensor.data_ptr, Tensor.storage])
# they hand the memory to other libraries, where nothing guards it: it is a copy of their own
_EXPORTS = frozenset([Tensor.numpy, Tensor.__array__, Tensor.__dlpack__])
# torch's functions that write the tensors of their first argument, without saying so by their names
_WRITING = frozenset([Tensor.resize_, _BASE["data"].__set__, torch.nn.init.trunc_normal_])


def _getters(*names: str) -> Iterator[Any]:
    # another torch may lack some
    return (_BASE[name].__get__ for name in names if name in _BASE)


# What the stand-in answers itself, without a dense weight.
DESCRIBING: frozenset[Any] = frozenset(
    [
        *_getters("requires_grad", "is_leaf", "grad", "grad_fn", "_version", "layout", "device", "dtype", "shape"),
        *_getters("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "names", "ndim"),
        *_getters("output_nr", "itemsize", "is_mkldnn", "is_xpu", "is_mps", "is_sparse_csr", "retains_grad", "_base"),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.ndimension),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.get_device, Tensor.__len__),
        *(Tensor.is_inference, Tensor.is_conj, Tensor.is_neg, Tensor.type, Tensor.storage_offset, Tensor.is_pinned),
        # of the stand-in as it is: one number seen many times; files of exported programs hold no more of it
        *(Tensor.stride, Tensor.is_contiguous, Tensor.untyped_storage, Tensor.is_shared),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference, torch.is_conj, torch.is_neg),
    ]
)


class ReadOnly(Tensor):
    """A dense tensor to read. What is computed from it is plain, unless it shares its memory: then it is read-only too.

    Whatever would write it raises ModelError, and so does training it. ``numpy()`` gives a read-only array.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` on plain tensors; ModelError for whatever would write or train one of ours."""
        kwargs = kwargs or {}
        _refuse_training(func, args)
        _refuse_writing(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            owners = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, ReadOnly)}
            plain = {key: each._plain(func) for key, each in owners.items()}
            versions = [_version(each) for each in plain.values()]
            args, kwargs = tree_map_only(ReadOnly, lambda each: plain[id(each)], (args, kwargs))
            result = func(*args, **kwargs)
            if versions != [_version(each) for each in plain.values()]:
                # a function that no list has: what it wrote is thrown away
                for each in owners.values():
                    each._forget()
                raise ModelError(f"{getattr(func, '__name__', func)} writes layer.weight: {_NO_WRITING}")
            storages = {_storage(each) for each in plain.values()} - {None}
            return _guarded(result, storages)

    def set_(self, *args: Any, **named: Any) -> Tensor:
        """Refused; torch does not ask ``__torch_function__`` about it."""
        raise ModelError(f"set_ would write layer.weight: {_NO_WRITING}")

    def _plain(self, func: Callable[..., Any]) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain.clone() if func in _EXPORTS else plain

    def _forget(self) -> None:
        """Nothing is remembered here."""


class PackedParameter(ReadOnly):
    """What stands for a packed weight [out, in] among a module's parameters: it is unpacked when its values are read.

    Device, dtype, shape and count cost nothing. A weight that is read again and again, as some models do at every
    call, is kept unpacked from the second time on, until ``hold`` is given another.
    """

    _is_param = True  # isinstance(weight, nn.Parameter) asks this
    _unpack: Callable[[], Tensor]
    _reduce: Callable[[], tuple[Any, ...]]
    _facts: tuple[torch.dtype, torch.device, torch.Size]
    _kept: Tensor | None
    _reads: int
    _pinned: weakref.ref[Tensor]  # torch.utils.swap_tensors refuses a tensor that somebody refers to

    @staticmethod
    def of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> PackedParameter:
        """A parameter of that description; ``hold`` says what its values are."""
        made = _stand_in(shape, dtype, device).as_subclass(PackedParameter)
        made._pinned = weakref.ref(made)
        return made

    def hold(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor],
        reduce: Callable[[], tuple[Any, ...]],
    ) -> None:
        """Stand for the weight of that description from now on; ``unpack`` gives it dense, ``reduce`` for pickle."""
        with torch._C.DisableTorchFunctionSubclass():
            if (tuple(_BASE["shape"].__get__(self)), _BASE["dtype"].__get__(self), _BASE["device"].__get__(self)) != (
                shape,
                dtype,
                device,
            ):
                _BASE["data"].__set__(self, _stand_in(shape, dtype, device))
        self._unpack, self._reduce = unpack, reduce
        self._facts = dtype, device, torch.Size(shape)
        self._kept, self._reads = None, 0

    # Python's own attributes are asked at every call of some models; through torch they cost 2 us each.
    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Element type of the dense weight."""
        return self._facts[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the weight is."""
        return self._facts[1]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(out_features, in_features)."""
        return self._facts[2]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held beside the packed weight: of the dense copy that repeated reads keep, else 0."""
        return 0 if self._kept is None else self._kept.nbytes

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickled packed, not as the dense weight."""
        return self._reduce()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """As ReadOnly; what only describes the weight does not unpack it."""
        if func in DESCRIBING and len(args) and isinstance(args[0], cls):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _plain(self, func: Callable[..., Any]) -> Tensor:
        export = func in _EXPORTS
        if self._kept is not None and not export:
            return self._kept
        with torch.inference_mode(False), torch.no_grad():
            dense = self._unpack().detach()
        self._reads += 1
        if not export and (func in _ADDRESSES or self._reads > 1):
            self._kept = dense
        return dense

    def _forget(self) -> None:
        self._kept = None


def _stand_in(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One NaN seen as a whole matrix: code that reads raw memory past this class must not take it for a weight."""
    return torch.full((1, 1), torch.nan, dtype=dtype, device=device).expand(shape)


def _refuse_training(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if func == Tensor.requires_grad_:
        wanted = args[1] if len(args) > 1 else True
        # a whole module may be thawed; its packed weights stay as they are, as SparseLinear.requires_grad_ says
        training = bool(wanted) and _caller() is not nn.Module.requires_grad_.__code__
    elif func == _BASE["requires_grad"].__set__:
        training = bool(args[1])
    elif func == _BASE["grad"].__set__:
        training = args[1] is not None
    else:
        training = func == Tensor.retain_grad
    if training:
        raise ModelError(f"layer.weight is a copy: {NO_WEIGHT_GRADIENT}")


def _caller() -> CodeType | None:
    """The code that calls torch's function on a tensor of ours."""
    frame: FrameType | None = sys._getframe(1)
    # modes, of which a default device is one, stand between
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return None if frame is None else frame.f_code


def _refuse_writing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS or func in _WRITING
    written = [kwargs.get("out"), args[:1] if kwargs.get("inplace") is True else None]
    if in_place and func not in _HARMLESS:
        written += [args[:1], kwargs.get("self"), kwargs.get("input"), kwargs.get("tensor")]
    if any(isinstance(each, ReadOnly) for each in tree_leaves(written)):
        what = "data" if func == _BASE["data"].__set__ else name
        raise ModelError(f"{what} would write layer.weight: {_NO_WRITING}")


def _guarded(result: Any, storages: set[int | None]) -> Any:
    """The result with all that shares memory with one of ``storages`` made read-only."""
    if isinstance(result, np.ndarray):
        result.setflags(write=False)
        return result

    def guard(tensor: Tensor) -> Tensor:
        shares = type(tensor) is Tensor and _storage(tensor) in storages
        return tensor.as_subclass(ReadOnly) if shares else tensor

    return tree_map_only(Tensor, guard, result)


def _storage(tensor: Tensor) -> int | None:
    """Where the memory of a tensor starts; None where it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # fake and functional tensors
        return None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
