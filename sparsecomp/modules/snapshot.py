"""Copies of what a call is given, and of what a module holds beside its parameters, so that a call can be repeated.

Takes arguments of any nesting and any ``nn.Module``. Knows nothing of layers, batches or pruning.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import ModelError

_BY_REFERENCE = (nn.Module, str, bytes, int, float, complex, bool, type, Enum, type(None), torch.dtype, torch.device)
_NOT_FOLLOWED = frozenset(("_parameters", "_modules", "_buffers", "training"))
_DEPTH = 2


class Placeholder:
    """Base of what stands for a tensor in arguments that are kept."""


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """What is made within can be trained on later; gradients stay as they are, off or on."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def version(x: Tensor) -> int | None:
    """How often ``x`` was written in place; None where torch does not count it, in tensors of inference mode."""
    return None if x.is_inference() else x._version


def clone(x: Tensor) -> Tensor:
    """The numbers of ``x`` in memory of their own, outside autograd and inference mode; expanded axes stay expanded."""
    with torch.inference_mode(False), torch.no_grad():
        if x.layout != torch.strided or x.is_nested:
            return x.detach().clone()
        expanded = tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())
        if x.numel() and any(each != slice(None) for each in expanded):
            return x.detach()[expanded].clone().expand(x.shape)
        return x.detach().clone()


def put(tensor: Tensor, values: Tensor) -> None:
    """Write ``values`` into a parameter or buffer in place, also if it was made under torch.inference_mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def copied(value: Any, on_tensor: Callable[[Any], Any] = clone, memo: dict[int, Any] | None = None) -> Any:
    """A copy of arguments that no call can change the original by: tensors, containers, caches and the like.

    What was one object stays one; modules, functions and plain values are the same objects. ``on_tensor`` gives what
    stands for a tensor or ``Placeholder`` in the copy; ``memo`` is what was copied already, by id. Raises ModelError
    for an object that cannot be copied.
    """
    memo = {} if memo is None else memo
    if isinstance(value, _BY_REFERENCE) or callable(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if isinstance(value, Tensor | Placeholder):
        made = on_tensor(value)
    elif type(value) is dict:
        made = {key: copied(each, on_tensor, memo) for key, each in value.items()}
    elif type(value) in (list, tuple):
        made = type(value)(copied(each, on_tensor, memo) for each in value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        made = type(value)(*(copied(each, on_tensor, memo) for each in value))
    else:
        made = _object_copy(value, memo, on_tensor)
    memo[id(value)] = made
    return made


def _object_copy(value: Any, memo: dict[int, Any], on_tensor: Callable[[Tensor], Any]) -> Any:
    try:
        made = copy.copy(value)
        if isinstance(value, dict):
            for key, each in value.items():
                dict.__setitem__(made, key, copied(each, on_tensor, memo))
        elif isinstance(value, list):
            made[:] = [copied(each, on_tensor, memo) for each in value]
        if hasattr(made, "__dict__") and made is not value:
            memo[id(value)] = made
            vars(made).update({key: copied(each, on_tensor, memo) for key, each in vars(value).items()})
            return made
        return made if isinstance(value, dict | list) else copy.deepcopy(value)
    except Exception as error:  # what an object of any class may raise
        raise ModelError(
            f"an argument of class {type(value).__name__} cannot be copied ({error}), and a call that may change it "
            "cannot be repeated; pass batches without it"
        ) from error


def holds_state(value: Any) -> bool:
    """Whether a call could leave something in ``value`` for the next, as in a list or a cache."""
    return not isinstance(value, (*_BY_REFERENCE, Tensor, tuple, torch.Size)) and not callable(value)


def traits(value: Any, seen: set[int] | None = None) -> list[object]:
    """What tells whether an object was changed between two looks at it: its entries, tensors by identity and writes."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [id(value), version(value)]
    if isinstance(value, _BY_REFERENCE) or callable(value) or id(value) in seen:
        return [value] if isinstance(value, str | bytes | int | float | complex) else [id(value)]
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | deque):
        parts = list(value)
    elif hasattr(value, "__dict__"):
        parts = [*vars(value), *vars(value).values()]
    else:
        return [id(value)]
    return [len(parts), *(trait for part in parts for trait in traits(part, seen))]


class ModuleState:
    """What a module and its parts hold beside parameters: buffers, attributes and hooks, to be put back after calls.

    ``restore`` makes them what they were. Buffers keep their identity. Of attributes, tensors and the entries of
    containers and plain objects are followed two levels deep; modules and parameters are not.
    """

    def __init__(self, module: nn.Module) -> None:
        """Note the state of now."""
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any], frozenset[str]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._tensors: list[tuple[Tensor, int | None, Tensor]] = []
        self._seen: set[int] = set()
        for part in module.modules():
            # a lazy module becomes another class in its first call, hooks and all
            if not isinstance(part, nn.modules.lazy.LazyModuleMixin):
                self._note(part._buffers, 0)
                self._note(vars(part), -1, _NOT_FOLLOWED)

    def _note(self, value: Any, depth: int, others: frozenset[str] = frozenset()) -> None:
        if isinstance(value, (*_BY_REFERENCE, nn.Parameter)) or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if value.device.type != "meta":
                self._tensors.append((value, version(value), clone(value)))
        elif isinstance(value, dict):
            before = {key: each for key, each in value.items() if key not in others}
            self._dicts.append((value, before, others))
            for each in before.values():
                self._note(each, depth + 1)
        elif isinstance(value, list | deque):
            self._lists.append((value, list(value)))
            for each in value:
                self._note(each, depth + 1)
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, tuple):
            for each in value:
                self._note(each, depth + 1)
        elif _is_plain_object(value):
            self._note(vars(value), depth)

    def restore(self) -> None:
        """Put everything back."""
        for values, before, others in self._dicts:
            _put_back(values, before, others)
        for sequence, entries in self._lists:
            if len(sequence) != len(entries) or any(a is not b for a, b in zip(sequence, entries, strict=True)):
                sequence.clear()
                sequence.extend(entries)
        for members, kept in self._sets:
            if members != kept:
                members.clear()
                members.update(kept)
        for index, (tensor, seen, kept_values) in enumerate(self._tensors):
            now = version(tensor)
            if now is None or now != seen:
                put(tensor, kept_values)
                self._tensors[index] = (tensor, version(tensor), kept_values)


def _put_back(values: dict[Any, Any], before: Mapping[Any, Any], others: frozenset[str]) -> None:
    for key in [key for key in values if key not in before and key not in others]:
        del values[key]
    for key, value in before.items():
        if key not in values or values[key] is not value:
            values[key] = value


def _is_plain_object(value: Any) -> bool:
    """Whether it is of a class that someone's model brought along, and not a function or a part of a library."""
    if callable(value) or not hasattr(value, "__dict__"):
        return False
    home = type(value).__module__.partition(".")[0]
    return home not in sys.stdlib_module_names - {"__main__"} and home not in ("torch", "numpy")


def tensors_of(value: object) -> Iterator[Tensor]:
    """The tensors in a batch: a tensor, or any nesting of mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
