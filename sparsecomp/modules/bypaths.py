"""Ways past its modules by which a model reaches a layer: lists, dicts, partials, bound methods, closures, objects.

Takes modules and gives names. Knows nothing of patterns, masks and kernels.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DEPTH = 2  # containers within containers


def bypaths(modules: Iterable[nn.Module], names: Mapping[int, list[str]]) -> dict[int, str]:
    """{id of a module: where it is held} for modules that an attribute of a module holds past torch's own table.

    Whoever puts another module in the place of such a one does not reach that attribute. ``names`` gives the names of
    a module by its id.
    """
    found: dict[int, str] = {}
    for module in modules:
        name = names[id(module)][0] or "self"
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                for held in _held(value, _DEPTH):
                    for reached in _known(held, names, set()):
                        found.setdefault(reached, f"{name}.{attribute}")
    return found


def _known(module: nn.Module, names: Mapping[int, list[str]], seen: set[int]) -> Iterator[int]:
    """The module itself if the model has it, otherwise what it reaches of the model: in its own table it stays."""
    if id(module) in names:
        yield id(module)
    elif id(module) not in seen:
        seen.add(id(module))
        for child in module.children():
            yield from _known(child, names, seen)


def _held(value: Any, depth: int) -> Iterator[nn.Module]:
    """The modules in ``value`` itself, not those that are parts of them."""
    # by its type: a weak proxy of a module calls itself one, and looks into that module's own table
    if issubclass(type(value), nn.Module):
        yield value
    elif isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        yield value.__self__
    elif depth:
        for each in _within(value):
            yield from _held(each, depth - 1)


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    if isinstance(value, MethodType):
        return (value.__self__,)
    if isinstance(value, weakref.ref):
        return (value(),)
    if isinstance(value, type | ModuleType | Tensor):
        return ()
    with suppress(Exception):  # an object of the model's own, which may answer in any way
        return list(object.__getattribute__(value, "__dict__").values())
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that has no value yet
        return False
