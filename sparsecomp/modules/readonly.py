"""Tensors that can be read and computed with, but neither written nor trained: the dense weight of a packed layer.

Takes a Source of values. Knows nothing of kernels and layers.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsecomp.errors import ModelError
from sparsecomp.modules.unpacked import Source, one_read

NO_WEIGHT_GRADIENT = (
    "a packed weight cannot be trained or assigned; train layer.to_linear() and pack the result with "
    "SparseLinear.from_linear(), or load another weight with SparseLinear.from_packed()"
)
_NO_WRITING = (
    "a packed weight cannot be written in place; change layer.to_linear().weight and pack the result with "
    "SparseLinear.from_linear(), or load another weight with SparseLinear.from_packed()"
)

_ATEN = torch.ops.aten
# the same values again: nothing is unpacked for them
_ALIASES = frozenset([_ATEN.detach.default, _ATEN.alias.default])
# they ask for shape, dtype and device only
_LIKE = frozenset(
    [
        *(_ATEN.zeros_like.default, _ATEN.ones_like.default, _ATEN.empty_like.default, _ATEN.full_like.default),
        *(_ATEN.rand_like.default, _ATEN.randn_like.default),
    ]
)
_NEW = frozenset(
    [
        *(_ATEN.new_zeros.default, _ATEN.new_ones.default, _ATEN.new_empty.default, _ATEN.new_full.default),
        *(_ATEN.new_empty_strided.default, _ATEN.is_pinned.default),
    ]
)
# where batch norms keep their running statistics, which no schema calls written
_STATISTICS = slice(3, 5)


class ReadOnly(Tensor):
    """A dense tensor to read. What is computed from it is plain; views of it are read-only too.

    Whatever would change it raises ModelError, also below Python; a write of the values it has is none.
    """

    _held: Tensor

    @staticmethod
    def view_of(tensor: Tensor) -> ReadOnly:
        """``tensor`` as one that cannot be written; it shares the memory."""
        view: ReadOnly = torch.Tensor._make_subclass(ReadOnly, tensor)
        view._held = tensor
        return view

    def _dense(self) -> Tensor:
        return self._held

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Go on to ``__torch_dispatch__``; a function reads a weight once, however many operators it consists of."""
        with one_read():
            # of Tensor itself: super() would make what comes out read-only as well
            return Tensor.__torch_function__(func, (), args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the dense tensors."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _ALIASES and isinstance(first, ReadOnly):
            return first._again()
        if (func in _LIKE or func in _NEW) and isinstance(first, ReadOnly):
            if func in _LIKE:
                kwargs = {"memory_format": torch.contiguous_format, **kwargs}
            return func(first._described(), *args[1:], **kwargs)
        written = [each for each in tree_leaves(_written(func, args, kwargs)) if isinstance(each, ReadOnly)]
        if written:
            return _written_in_vain(func, args, kwargs, written)
        owners = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, ReadOnly)}
        dense = {key: each._dense() for key, each in owners.items()}
        if func.__name__.startswith("set_."):  # another tensor is to have this memory, and may write it
            dense = {key: each.clone() for key, each in dense.items()}
        args, kwargs = tree_map_only(ReadOnly, lambda each: dense[id(each)], (args, kwargs))
        result = func(*args, **kwargs)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        return tree_map_only(Tensor, ReadOnly.view_of, result) if is_view else result

    def _again(self) -> ReadOnly:
        """The same values as another object."""
        return ReadOnly.view_of(self._held)

    def _described(self) -> Tensor:
        """A tensor of this shape, dtype and device, whatever its values."""
        return self._held

    # What torch answers from memory, past the dispatcher.

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array of its own."""
        array = self._dense().clone().numpy(force=force)
        array.setflags(write=False)
        return array

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self._dense().tolist()

    def data_ptr(self) -> int:
        """The address of the dense values, which must not be written."""
        return self._dense().data_ptr()

    def __dlpack__(self, **named: Any) -> Any:
        """A copy, as nothing guards the memory elsewhere."""
        return self._dense().clone().__dlpack__(**named)

    def __repr__(self, **named: Any) -> str:  # type: ignore[override]
        """As the dense tensor."""
        return f"ReadOnly({self._dense()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor of its own."""
        made = memo[id(self)] = self._dense().clone()
        return made

    def __reduce_ex__(self, protocol: object) -> Any:
        """Pickled as a plain tensor."""
        return self._dense().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Refused where it would train, with a warning: whole models are thawed by such calls."""
        # SparseLinear.requires_grad_ and that of models around it say what becomes of packed weights
        if requires_grad and sys._getframe(1).f_code is not nn.Module.requires_grad_.__code__:
            _warn_of_training()
        return self

    @property
    def requires_grad(self) -> bool:
        """False, always."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            _warn_of_training()

    @property
    def grad(self) -> None:
        """None, always."""
        return

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ModelError(f"layer.weight has no gradient: {NO_WEIGHT_GRADIENT}")

    @property
    def data(self) -> ReadOnly:
        """The same values."""
        return self._again()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ModelError(f"data would write layer.weight: {_NO_WRITING}")


class PackedParameter(ReadOnly):
    """What stands for a packed weight [out, in] among a module's parameters: it is unpacked when its values are read.

    Shape, dtype, device and count cost nothing, and neither do ``data`` and ``detach()``. A weight that is read again
    and again, as some models do at every call, is kept unpacked from the second time on, until ``hold`` is given
    another or the packed memory changes.
    """

    _is_param = True  # isinstance(weight, nn.Parameter) asks this
    _pinned: weakref.ref[Tensor]  # torch.utils.swap_tensors refuses a tensor that somebody refers to
    _source: Source

    @staticmethod
    def of(source: Source) -> PackedParameter:
        """A parameter whose values are those of ``source``."""
        made: PackedParameter = _lazy(PackedParameter, source)
        made._pinned = weakref.ref(made)
        return made

    @property
    def source(self) -> Source:
        """Where the values come from."""
        return self._source

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held beside the packed weight: of the dense copy that repeated reads keep, else 0."""
        return self._source.kept_bytes

    # Python's own attributes are asked at every call of some models; through torch they cost 2 us each.
    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Element type of the dense weight."""
        return self._source.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the weight is."""
        return self._source.device

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(out_features, in_features)."""
        return self._source.shape

    def stride(self, dim: int | None = None) -> Any:
        """As of the dense weight, row by row."""
        strides = (max(self._source.shape[1], 1), 1)
        return strides if dim is None else strides[dim]

    def is_contiguous(self, *args: Any, **named: Any) -> bool:
        """As the dense weight is."""
        return True

    def _dense(self) -> Tensor:
        return self._source.dense()

    def _again(self) -> ReadOnly:
        view: ReadOnly = _lazy(_PackedView, self._source)
        return view

    def _described(self) -> Tensor:
        return _stand_in(self._source)

    def data_ptr(self) -> int:
        """The address of the dense values, which are kept from then on and must not be written."""
        return self._source.keep().data_ptr()

    def __repr__(self, **named: Any) -> str:  # type: ignore[override]
        """As the dense parameter."""
        return f"PackedParameter({self._source.fresh()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A dense parameter of its own; modules copy their packed weight themselves."""
        made = memo[id(self)] = nn.Parameter(self._source.fresh(), requires_grad=False)
        return made

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickled packed, not as the dense weight."""
        return self._source.reduce()


class _PackedView(PackedParameter):
    """The same values under another name, as ``data`` and ``detach()`` give them: no parameter of a module."""

    _is_param = False


def _lazy(cls: type[Any], source: Source) -> Any:
    made = torch.Tensor._make_subclass(cls, _stand_in(source))
    made._source = source
    return made


def _stand_in(source: Source) -> Tensor:
    """One NaN seen as a whole matrix: code that reads raw memory past this class must not take it for a weight."""
    return torch.full((1, 1), torch.nan, dtype=source.dtype, device=source.device).expand(source.shape)


def _warn_of_training() -> None:
    warnings.warn(f"layer.weight stays without a gradient: {NO_WEIGHT_GRADIENT}", stacklevel=3)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes."""
    arguments = func._schema.arguments
    given = list(zip(arguments, args, strict=False))
    given += [(each, kwargs[each.name]) for each in arguments if each.name in kwargs]
    written = [value for each, value in given if each.alias_info is not None and each.alias_info.is_write]
    if func.namespace == "c10d" and func._opname.endswith("_"):
        written += args[:1]
    if func._opname.endswith("batch_norm") and True in args[_STATISTICS.stop :]:
        written += args[_STATISTICS]
    return written


def _written_in_vain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[ReadOnly]) -> Any:
    """ModelError, unless what is written are the values that are there already."""
    if func.namespace != "c10d":
        owners = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, ReadOnly)}
        dense = {key: each._dense() for key, each in owners.items()}
        tried = {key: each.clone() for key, each in dense.items()}
        plain_args, plain_kwargs = tree_map_only(ReadOnly, lambda each: tried[id(each)], (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if all(_equal(tried[key], dense[key]) for key in tried):
            back = {id(tried[id(each)]): each for each in written}
            return tree_map_only(Tensor, lambda each: back.get(id(each), each), result)
    raise ModelError(f"{func._opname} would write layer.weight: {_NO_WRITING}")


def _equal(tried: Tensor, dense: Tensor) -> bool:
    return tried.shape == dense.shape and torch.equal(tried, dense)
