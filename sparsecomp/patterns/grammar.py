"""Sparsity patterns as frozen values: their names, their geometry, their density.

Takes a name such as ``"2:4"`` and gives a value. Knows nothing of tensors, packing or kernels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from sparsecomp.errors import PatternError

GROUP_SIZES = (2, 4, 8, 16)
TRANSPOSABLE_GROUP_SIZES = (2, 4)
VNM_GROUP_SIZES = (8, 16)
VNM_KEPT_COLUMNS = 4
_ALLOWED = (
    'allowed are "N:M" with M in 2, 4, 8, 16 and 1 <= N <= M (such as "2:4" or "8:16"), '
    '"N:M@vR" (R rows share a mask), "N:M@t" with M in 2, 4 (its transpose is N:M, too), '
    '"V:2:M" with M in 8, 16 (such as "64:2:8"), '
    '"blockRxC:DENSITY" (such as "block16x16:0.5") and "unstructured:DENSITY"'
)


@dataclass(frozen=True)
class NM:
    """N of every M consecutive input columns are kept in each row.

    ``mask_rows`` consecutive rows share one mask ("2:4@v4"); 1 means that every row has its own. In a ``transposable``
    mask ("2:4@t") N of every M consecutive rows are kept in each column as well, so that the transposed weight of a
    backward pass obeys N:M, too.
    """

    mask_only: ClassVar[bool] = False
    n: int
    m: int
    mask_rows: int = 1
    transposable: bool = False

    def __post_init__(self) -> None:
        """Refuse a geometry outside the grammar."""
        if self.m not in GROUP_SIZES or not 1 <= self.n <= self.m:
            raise PatternError(f'pattern "{self.n}:{self.m}" has no such group; {_ALLOWED}')
        if self.mask_rows < 1:
            raise PatternError(f'pattern "{self.n}:{self.m}@v{self.mask_rows}" shares masks among no rows; {_ALLOWED}')
        if self.transposable and (self.m not in TRANSPOSABLE_GROUP_SIZES or self.mask_rows != 1):
            raise PatternError(f'pattern "{self.n}:{self.m}@t" is no transposable pattern; {_ALLOWED}')

    @property
    def density(self) -> float:
        """Fraction of weights kept, in (0, 1]."""
        return self.n / self.m

    @property
    def index_bits(self) -> int:
        """Bits of one in-group position: ceil(log2 M)."""
        return (self.m - 1).bit_length()

    def groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` columns, the last one padded."""
        return -(-in_features // self.m)

    def slots(self, in_features: int) -> int:
        """Stored weights in a row of ``in_features`` columns."""
        return self.groups(in_features) * self.n

    def __str__(self) -> str:
        """The name that parses back to this value."""
        shared = f"@v{self.mask_rows}" if self.mask_rows > 1 else ""
        return f"{self.n}:{self.m}{shared}" + ("@t" if self.transposable else "")


@dataclass(frozen=True)
class VNM:
    """V:N:M (VENOM, Castro et al. 2023): a tile of V rows by M columns keeps 4 columns, 2 of them in each row."""

    mask_only: ClassVar[bool] = False
    v: int
    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse a geometry outside the grammar."""
        if self.v < 1 or self.n != 2 or self.m not in VNM_GROUP_SIZES:
            raise PatternError(f'pattern "{self.v}:{self.n}:{self.m}" is no V:N:M pattern; {_ALLOWED}')

    @property
    def density(self) -> float:
        """Fraction of weights kept, in (0, 1]."""
        return self.n / self.m

    @property
    def row_pattern(self) -> NM:
        """The N:M pattern that every single row obeys; it is the stored form."""
        return NM(self.n, self.m)

    def __str__(self) -> str:
        """The name that parses back to this value."""
        return f"{self.v}:{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Whole blocks of ``rows`` x ``cols`` weights are kept; ``keep`` is the fraction of blocks kept in a layer."""

    mask_only: ClassVar[bool] = False
    rows: int
    cols: int
    keep: float

    def __post_init__(self) -> None:
        """Refuse a geometry outside the grammar."""
        if self.rows < 1 or self.cols < 1 or not 0.0 < self.keep <= 1.0:
            raise PatternError(f'pattern "{self}" needs positive block sides and a density in (0, 1]; {_ALLOWED}')

    @property
    def density(self) -> float:
        """Fraction of weights kept, in (0, 1]."""
        return self.keep

    def grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Blocks down and across a weight of this shape, ragged edges padded."""
        return -(-out_features // self.rows), -(-in_features // self.cols)

    def kept_blocks(self, out_features: int, in_features: int) -> int:
        """Most blocks a weight of this shape may keep: ceil(density * blocks)."""
        down, across = self.grid(out_features, in_features)
        return math.ceil(self.keep * down * across - 1e-9)

    def __str__(self) -> str:
        """The name that parses back to this value."""
        return f"block{self.rows}x{self.cols}:{_density_name(self.keep)}"


@dataclass(frozen=True)
class Unstructured:
    """Any positions, a fraction ``keep`` of every row. A mask-only pattern: it can be pruned to, not packed."""

    mask_only: ClassVar[bool] = True
    keep: float

    def __post_init__(self) -> None:
        """Refuse a geometry outside the grammar."""
        if not 0.0 < self.keep <= 1.0:
            raise PatternError(f'pattern "{self}" needs a density in (0, 1]; {_ALLOWED}')

    @property
    def density(self) -> float:
        """Fraction of weights kept, in (0, 1]."""
        return self.keep

    def kept_per_row(self, in_features: int) -> int:
        """Weights kept in a row of ``in_features`` columns: ceil(density * columns)."""
        return math.ceil(self.keep * in_features - 1e-9)

    def __str__(self) -> str:
        """The name that parses back to this value."""
        return f"unstructured:{_density_name(self.keep)}"


Pattern = NM | VNM | Block | Unstructured

_NM = re.compile(r"(\d+):(\d+)(?:@v(\d+)|@(t))?")
_VNM = re.compile(r"(\d+):(\d+):(\d+)")
_BLOCK = re.compile(r"block(\d+)x(\d+):([0-9.]+(?:e-?\d+)?)")
_UNSTRUCTURED = re.compile(r"unstructured:([0-9.]+(?:e-?\d+)?)")


def _density_name(keep: float) -> str:
    short = f"{keep:g}"
    return short if float(short) == keep else repr(keep)  # a name parses back to the same value


def _density(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PatternError(f'pattern "{name}" has a density that is no number; {_ALLOWED}') from None


def parse(pattern: str | Pattern) -> Pattern:
    """The pattern of that name; a pattern passes through unchanged.

    Raises PatternError for a name outside the grammar, saying what is allowed.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise PatternError(f"a pattern is a name or a pattern value, not {type(pattern).__name__}; {_ALLOWED}")
    name = pattern.strip()
    if match := _NM.fullmatch(name):
        return NM(int(match[1]), int(match[2]), int(match[3] or 1), match[4] is not None)
    if match := _VNM.fullmatch(name):
        return VNM(int(match[1]), int(match[2]), int(match[3]))
    if match := _BLOCK.fullmatch(name):
        return Block(int(match[1]), int(match[2]), _density(match[3], name))
    if match := _UNSTRUCTURED.fullmatch(name):
        return Unstructured(_density(match[1], name))
    raise PatternError(f'pattern "{pattern}" is not understood; {_ALLOWED}')


def row_nm(pattern: Pattern) -> NM | None:
    """The N:M pattern in which rows of ``pattern`` are stored, or None for patterns that are not N:M."""
    if isinstance(pattern, NM):
        return NM(pattern.n, pattern.m) if pattern.transposable else pattern
    if isinstance(pattern, VNM):
        return pattern.row_pattern
    return None


def rows_together(pattern: Pattern, out_features: int) -> int:
    """Consecutive rows of a weight of ``out_features`` rows whose masks depend on one another; 1: none on another."""
    match pattern:
        case NM():
            return pattern.m if pattern.transposable else pattern.mask_rows
        case VNM():
            return pattern.v
        case Unstructured():
            return 1
        case Block():
            return max(out_features, 1)
