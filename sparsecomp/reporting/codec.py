"""Frozen values <-> JSON values: dataclasses as objects, tuples as arrays, patterns and numbers by their names.

Takes a value, or JSON values and the type they are of. Knows no report and writes no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparsecomp.errors import FormatError, PatternError, SparsecompError
from sparsecomp.patterns import Pattern, parse
from sparsecomp.patterns.numbers import Numbers, parse_numbers

_PATTERNS = get_args(Pattern)
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def plain(value: Any) -> Any:
    """The value as JSON values. A number that is not finite becomes null, another kind of value its text."""
    if isinstance(value, (*_PATTERNS, Numbers)):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def decoded(kind: Any, value: Any, where: str = "", keys: Mapping[str, str] = MappingProxyType({})) -> Any:
    """The value of type ``kind`` of which ``plain`` made these JSON values.

    ``kind`` is a dataclass, a tuple, a Mapping, a Literal, a Pattern, Numbers, int, float, str or bool, or one of them
    or None. ``keys`` are those of a dataclass's fields that stand under another key than their name; keys that it has
    no field for are ignored. Numbers are finite, and whole ones fit into 64 bits. Raises FormatError that names the
    place, as ``where`` begins it, what stands there and what may.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        others = [each for each in inner if each is not NoneType]
        return _named(Pattern, value, where) if set(others) <= set(_PATTERNS) else decoded(others[0], value, where)
    if kind is Any:
        return value
    if kind in _PATTERNS or kind is Numbers:
        return _named(kind, value, where)
    if origin is tuple:
        kinds = inner
        if isinstance(value, list):
            kinds = (inner[0],) * len(value) if inner[-1] is ... else inner
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _refused(where, value, f"a list of {len(inner)}" if inner[-1] is not ... else "a list")
        return tuple(
            decoded(each, got, f"{where}[{i}]") for i, (each, got) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is not None and origin is not Literal:
        if not isinstance(value, dict):
            raise _refused(where, value, "an object")
        return {_key(inner[0], key, where): decoded(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is Literal:
        if value not in inner:
            raise _refused(where, value, " or ".join(f'"{each}"' for each in inner))
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, keys)
    if type(value) is int and abs(value) >= 1 << 63:
        raise _refused(where, value, "a number of 64 bits")
    if type(value) is float and not math.isfinite(value):
        raise _refused(where, value, "a finite number")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _refused(where, value, _WORDS[kind])
    return value


def _dataclass(kind: Any, value: Any, where: str, keys: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        raise _refused(where, value, "an object")
    hints, facts = get_type_hints(kind), {}
    for each in dataclasses.fields(kind):
        key = keys.get(each.name, each.name)
        if key in value:
            facts[each.name] = decoded(hints[each.name], value[key], f"{where}.{key}" if where else key)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise FormatError(f'{where or "it"} has no "{key}"')
    try:
        return kind(**facts)
    except SparsecompError as error:
        raise FormatError(f"{where}: {error}" if where else str(error)) from error


def _key(kind: type, key: str, where: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise _refused(f"a key of {where}", key, _WORDS[kind]) from None


def _named(kind: Any, value: Any, where: str) -> Pattern | Numbers:
    if not isinstance(value, str):
        named = 'numbers, such as "float"' if kind is Numbers else 'a pattern, such as "2:4"'
        raise _refused(where, value, f"the name of {named}")
    try:
        return parse_numbers(value) if kind is Numbers else parse(value)
    except PatternError as error:
        raise FormatError(f"{where}: {error}") from error


def _refused(where: str, value: Any, allowed: str) -> FormatError:
    got = repr(value)
    return FormatError(f"{where} is {got if len(got) <= 80 else got[:77] + '...'}, where {allowed} belongs")
