"""The pruning methods by name. A method takes a ``Problem`` and gives the weight and the mask it chose."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sparsecomp.errors import MethodError
from sparsecomp.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer to prune, checked: finite values and fitting shapes.

    ``weight`` [out, in] float32 or float64; ``gram`` X^T X [in, in] float32 or float64, or None; ``mask`` bool
    [out, in] is the user's mask, True where a weight is kept, or None where the method chooses. ``held_out`` is the
    Gram of other tokens, to choose settings by.
    """

    weight: Tensor
    pattern: Pattern
    gram: Tensor | None = None
    mask: Tensor | None = None
    held_out: Tensor | None = None


class Solution(NamedTuple):
    """``weight`` [out, in] and ``mask`` bool [out, in]; what the mask drops counts as 0.

    ``notes`` are sentences on what the method had to do unasked or did not reach.
    """

    weight: Tensor
    mask: Tensor
    notes: tuple[str, ...] = ()


Solve = Callable[[Problem], Solution]


@dataclass(frozen=True)
class Method:
    """A registered method; one that ``only_chooses`` leaves the values of kept weights as they are."""

    name: str
    solve: Solve
    needs_gram: bool
    description: str
    only_chooses: bool = False


_METHODS: dict[str, Method] = {}


def method(name: str, *, needs_gram: bool, description: str, only_chooses: bool = False) -> Callable[[Solve], Solve]:
    """Register the decorated function as the pruning method ``name``."""

    def register(solve: Solve) -> Solve:
        _METHODS[name] = Method(name, solve, needs_gram, description, only_chooses)
        return solve

    return register


def methods() -> tuple[str, ...]:
    """Names of the registered methods, in the order of registration."""
    return tuple(_METHODS)


def get_method(name: str) -> Method:
    """The method of that name; raises MethodError for another, listing the names."""
    if name in _METHODS:
        return _METHODS[name]
    near = difflib.get_close_matches(str(name), _METHODS, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "choose one of them"
    raise MethodError(f'unknown pruning method "{name}"; the methods are {", ".join(_METHODS)}; {hint}')
