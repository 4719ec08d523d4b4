"""Ways past its modules by which a model reaches a layer: lists, tuples, dicts, partials, bound methods, closures.

Takes modules and gives names. Knows nothing of patterns, masks and kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn

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
                    found.setdefault(id(held), f"{name}.{attribute}")
    return found


def _held(value: Any, depth: int) -> Iterator[nn.Module]:
    """The modules in ``value`` itself, not those that are parts of them."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        if isinstance(value.__self__, nn.Module):
            yield value.__self__
    elif depth:
        for each in _within(value):
            yield from _held(each, depth - 1)


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a variable that has no value yet
        return False
