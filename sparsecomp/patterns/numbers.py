"""In what numbers weights are stored and multiplied: values with names such as "int8", their sizes, their tensors.

Takes such a name, alone or behind a pattern as in ``"2:4+int8"``, and gives values. Knows nothing of layouts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparsecomp.errors import PatternError
from sparsecomp.patterns.grammar import GROUP_SIZES, Pattern, parse, row_nm

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float64 has no sparse kernel; it is there so that a model with packed layers can become float64 as a whole
LAYER_DTYPES = (*FLOAT_DTYPES, torch.float64)
DTYPES = (*LAYER_DTYPES, torch.int8)
LARGEST_INT8 = 127  # of quantised weights: symmetric, so -128 is not used

WEIGHT_BITS = (4, 8)
ACTIVATION_BITS = (8,)
SCALE_DTYPE = torch.float32
_STEP = max(GROUP_SIZES)  # so that no group of a pattern has two scales
_GRAMMAR = (
    f'allowed are "float" and "intB" with B in 4, 8, then "@gG" (G columns share a scale, a multiple of {_STEP}), '
    '"@z" (zero points beside the scales) and "@a8" (activations rounded to int8), such as "int8"'
)


@dataclass(frozen=True)
class Numbers:
    """How the weights of a layer are stored, and what multiplies them.

    ``bits`` are those of a stored integer, which stands for (integer - zero point) * scale; None means floating weights
    in the dtype of their layer. ``group`` consecutive columns of a row share a float32 scale; None means the whole row.
    Without ``zero_point`` integers are symmetric around 0. With ``activation_bits`` the input of the layer is rounded
    to integers of so many bits, with a scale for each of its rows; None leaves it as it is.

    Raises PatternError for facts outside the grammar. A value can say more than is computed: see ``COMPUTED``.
    """

    bits: int | None = None
    group: int | None = None
    zero_point: bool = False
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no way to store or to multiply weights."""
        if self.bits is None and (self.group is not None or self.zero_point or self.activation_bits is not None):
            raise PatternError(f"{self!r} has floating weights, which take no scales and no integers; {_GRAMMAR}")
        if self.bits not in (None, *WEIGHT_BITS) or self.activation_bits not in (None, *ACTIVATION_BITS):
            raise PatternError(f'numbers "{self}" have a width that is not known; {_GRAMMAR}')
        if self.group is not None and (self.group < 1 or self.group % _STEP):
            raise PatternError(f'numbers "{self}" share a scale among {self.group} columns; {_GRAMMAR}')

    @property
    def has_scales(self) -> bool:
        """Whether stored weights are integers that stand for others."""
        return self.bits is not None

    def position_bits(self, pattern: Pattern) -> int:
        """Bits of one stored position of a weight in N:M groups: none where dense groups multiply integers.

        Dense groups in other numbers keep the positions that their files have always had.
        """
        nm = row_nm(pattern)
        if nm is None:
            raise PatternError(f'"{pattern}" is not stored as N:M groups; it has no in-group positions')
        return 0 if nm.n == nm.m and self.activation_bits is not None else nm.index_bits

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of a weight's tensors in files and in a state_dict, in the order in which kernels hold them."""
        scales = ("scales",) if self.has_scales else ()
        return ("values", "metadata", *scales, *(("zero_points",) if self.zero_point else ()))

    def values_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Element type of the tensor that holds the weights of a layer of ``dtype``; of less than a byte, of bytes."""
        return dtype if self.bits is None else torch.int8 if self.bits == torch.int8.itemsize * 8 else torch.uint8

    def weight_bits(self, dtype: torch.dtype) -> int:
        """Bits of one stored weight of a layer that computes in ``dtype``."""
        return 8 * dtype.itemsize if self.bits is None else self.bits

    def bytes_of(self, count: int, dtype: torch.dtype) -> int:
        """Bytes of ``count`` weights stored side by side, such as those of a row, in a layer of ``dtype``."""
        return -(-count * self.weight_bits(dtype) // 8)

    def scales_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that the scales of a weight [out, in] take, and its zero points with the bits of a weight each."""
        if self.bits is None:
            return 0
        out, columns = shape
        each = 1 if self.group is None else -(-columns // self.group)
        return out * (each * SCALE_DTYPE.itemsize + (-(-each * self.bits // 8) if self.zero_point else 0))

    def in_words(self, dtype: torch.dtype) -> str:
        """These numbers in a layer of ``dtype`` as tables show them: "float32", or "int8 weights, float32"."""
        return (f"{self} weights, " if self.has_scales else "") + str(dtype).removeprefix("torch.")

    @property
    def product_in_words(self) -> str:
        """What is multiplied, in a sentence: "int8 weights", "int8 weights and int8 activations"."""
        if self.activation_bits is None:
            return f"{self} weights"
        return f"{replace(self, activation_bits=None)} weights and int{self.activation_bits} activations"

    def __str__(self) -> str:
        """The name that parses back to this value."""
        if self.bits is None:
            return "float"
        scales = "" if self.group is None else f"@g{self.group}"
        activations = "" if self.activation_bits is None else f"@a{self.activation_bits}"
        return f"int{self.bits}{scales}{'@z' if self.zero_point else ''}{activations}"


FLOAT = Numbers()
INT8 = Numbers(bits=8)
INT8_A8 = Numbers(bits=8, activation_bits=8)  # integers on both sides of the product
COMPUTED = (FLOAT, INT8, INT8_A8)  # what there is code for; the parser lets nothing else in
PART_NAMES = tuple(dict.fromkeys(name for numbers in COMPUTED for name in numbers.part_names))

_INTEGERS = re.compile(r"int(\d+)(?:@g(\d+))?(@z)?(?:@a(\d+))?")


def parse_numbers(numbers: str | Numbers) -> Numbers:
    """The numbers of that name; a value passes through unchanged.

    Raises PatternError for a name outside the grammar, and for numbers that no code computes yet.
    """
    found = numbers if isinstance(numbers, Numbers) else _named(numbers)
    if found not in COMPUTED:
        allowed = listed(COMPUTED, '"')
        raise PatternError(f'no kernel computes numbers "{found}" yet; allowed are {allowed}; take one of them')
    return found


def listed(every: Sequence[Numbers], quote: str = "") -> str:
    """Their names for a message: float, int8 and int8@a8."""
    *names, last = (f"{quote}{each}{quote}" for each in every)
    return f"{', '.join(names)} and {last}" if names else last


def _named(name: str) -> Numbers:
    if not isinstance(name, str):
        raise PatternError(f"numbers are a name or a value of Numbers, not {type(name).__name__}; {_GRAMMAR}")
    if name.strip() == "float":
        return FLOAT
    match = _INTEGERS.fullmatch(name.strip())
    if match is None:
        raise PatternError(f'numbers "{name}" are not understood; {_GRAMMAR}')
    bits, group, zero_point, activation_bits = match.groups()
    return Numbers(
        int(bits),
        None if group is None else int(group),
        zero_point is not None,
        None if activation_bits is None else int(activation_bits),
    )


def parse_weights(
    name: str | Pattern, quantize: str | None = None, activations: str | None = None
) -> tuple[Pattern, Numbers]:
    """Pattern and numbers of a name such as "2:4+int8"; without numbers, as in "2:4", the weights are floating.

    ``quantize="int8"`` and ``activations="int8"`` say the same beside a name: "2:4+int8@a8". "2:4+int8" with
    ``activations="int8"`` is that as well.

    Raises PatternError for a name that either grammar refuses, for integers in a pattern that cannot hold them, and
    where name and words contradict each other.
    """
    kept, plus, stored = name.partition("+") if isinstance(name, str) else (name, "", "")
    if plus and kept == "auto":
        raise PatternError(
            f'"{name}" is not understood: "auto" takes no numbers behind it; name the pattern, such as "8:16+int8@a8", '
            "or give quantize= and activations= beside it"
        )
    pattern, numbers = parse(kept), parse_numbers(stored) if plus else FLOAT
    if plus and quantize is None and activations is not None:
        return parse_weights(kept, str(numbers), activations)
    asked = numbers_asked(quantize, activations)
    if plus and asked not in (FLOAT, numbers):
        raise PatternError(f'"{name}" names the numbers {numbers} and {asked} are asked for beside it; name them once')
    numbers = numbers if asked == FLOAT else asked
    if reason := integers_why_not(pattern, numbers):
        raise PatternError(reason)
    return pattern, numbers


def numbers_asked(quantize: str | None, activations: str | None) -> Numbers:
    """The numbers that ``quantize="int8", activations="int8"`` ask for; floating ones where both are None.

    Raises PatternError for other words, and for activations that are rounded where weights are not.
    """
    if activations is not None and activations != "int8":
        raise PatternError(f'activations={activations!r} is not known; use "int8", or None to leave them as they are')
    if quantize is None:
        if activations is not None:
            raise PatternError('activations="int8" multiplies integers; give quantize="int8" with it')
        return FLOAT
    numbers = parse_numbers(quantize)
    if activations is None:
        return numbers
    if not numbers.has_scales:
        raise PatternError(f'activations="int8" cannot multiply {numbers} weights; give quantize="int8" with it')
    return parse_numbers(replace(numbers, activation_bits=ACTIVATION_BITS[0]))


def weights_name(pattern: Pattern, numbers: Numbers) -> str:
    """The name that ``parse_weights`` takes back: "2:4" or "2:4+int8"."""
    return f"{pattern}+{numbers}" if numbers.has_scales else str(pattern)


def integers_why_not(pattern: Pattern, numbers: Numbers) -> str | None:
    """Why weights of ``pattern`` cannot be stored in ``numbers``, or None if they can."""
    if not numbers.has_scales or row_nm(pattern) is not None:
        return None
    return (
        f'"{pattern}" cannot be quantised to {numbers}: row scales need an N:M or V:N:M pattern; '
        "choose one, or keep the weights floating"
    )
