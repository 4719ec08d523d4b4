"""Values become JSON values and come back; what cannot come back is named with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sparsecomp.errors import FormatError, ModelError
from sparsecomp.patterns import Pattern, parse
from sparsecomp.reporting.codec import decoded, plain


@dataclass(frozen=True)
class Inner:
    count: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    pattern: Pattern
    maybe: Pattern | None
    sizes: tuple[int, int]
    inner: tuple[Inner, ...]
    times: Mapping[int, float]
    deep: Mapping[str, Mapping[int, Inner]]
    flag: bool = False
    rate: float | None = None


VALUE = Outer(
    "a layer",
    parse("2:4@v4"),
    None,
    (3, 4),
    (Inner(1), Inner(2, "b")),
    {1: 0.1, 128: 1e-300},
    {"x": {7: Inner(3)}},
    True,
    2.0,
)


def test_a_value_comes_back_exactly_from_json() -> None:
    assert decoded(Outer, json.loads(json.dumps(plain(VALUE)))) == VALUE


def test_what_json_lacks_becomes_null_or_text() -> None:
    assert plain({"a": math.inf, 2: [math.nan, Path("x"), None]}) == {"a": None, "2": [None, "x", None]}


def test_fields_may_be_missing_or_unknown() -> None:
    assert decoded(Inner, {"count": 1, "later": 2}) == Inner(1)
    assert decoded(Outer, {**plain(VALUE), "rate": 3}).rate == 3.0
    assert decoded(Inner, {"n": 1}, keys={"count": "n"}) == Inner(1)


@pytest.mark.parametrize(
    ("key", "wrong", "says"),
    [
        ("name", 3, "^name is 3, where text belongs$"),
        ("flag", 1, "^flag is 1, where true or false belongs$"),
        ("rate", "fast", "^rate is 'fast', where a number belongs$"),
        ("rate", True, "^rate is True, where a number belongs$"),
        ("rate", float("inf"), "^rate is inf, where a finite number belongs$"),
        ("rate", 10**400, r"^rate is 10{76}\.\.\., where a number of 64 bits belongs$"),
        ("sizes", [3, 1 << 63], r"^sizes\[1\] is 9223372036854775808, where a number of 64 bits belongs$"),
        ("pattern", 7, "^pattern is 7, where the name of a pattern"),
        ("pattern", "5:4", "^pattern: .*5:4"),
        ("sizes", [3], r"^sizes is \[3\], where a list of 2 belongs$"),
        ("sizes", [3, 4.0], r"^sizes\[1\] is 4.0, where a whole number belongs$"),
        ("inner", {}, "^inner is {}, where a list belongs$"),
        ("inner", [{}], r'^inner\[0\] has no "count"$'),
        ("inner", [3], r"^inner\[0\] is 3, where an object belongs$"),
        ("inner", [{"count": 1, "kind": "c"}], r'^inner\[0\].kind is \'c\', where "a" or "b" belongs$'),
        ("times", [1], r"^times is \[1\], where an object belongs$"),
        ("times", {"one": 1.0}, "^a key of times is 'one', where a whole number belongs$"),
        ("deep", {"x": {"7": 1}}, "^deep.x.7 is 1, where an object belongs$"),
        ("name", ["x" * 200], r"^name is \['x{75}\.\.\., where"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(key: str, wrong: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        decoded(Outer, {**plain(VALUE), key: wrong})


@dataclass(frozen=True)
class Even:
    count: int

    def __post_init__(self) -> None:
        if self.count % 2:
            raise ModelError(f"{self.count} is odd")


def test_what_a_value_itself_refuses_is_named_with_its_place() -> None:
    with pytest.raises(FormatError, match=r"^layers\[2\]: 3 is odd$"):
        decoded(Even, {"count": 3}, "layers[2]")
