"""Numbers of weights: names and back, what is refused, sizes in bits, and the tensors a weight has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsecomp as sc
from sparsecomp.backends.registry import backends
from sparsecomp.errors import FormatError, PatternError
from sparsecomp.machine.request import Request
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import NM, Block, parse
from sparsecomp.patterns.numbers import (
    COMPUTED,
    FLOAT,
    INT8,
    INT8_A8,
    PART_NAMES,
    Numbers,
    parse_numbers,
    parse_weights,
    weights_name,
)

INTEGERS = st.builds(
    Numbers,
    st.sampled_from((4, 8)),
    st.none() | st.integers(1, 64).map(lambda times: 16 * times),
    st.booleans(),
    st.sampled_from((None, 8)),
)


@pytest.mark.parametrize(("name", "value"), [("float", FLOAT), ("int8", INT8), (" int8 ", INT8), ("int8@a8", INT8_A8)])
def test_numbers_have_names(name: str, value: Numbers) -> None:
    assert parse_numbers(name) == value
    assert parse_numbers(str(value)) == value
    assert parse_numbers(value) is value


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        (Numbers(4), "int4"),
        (Numbers(4, 128), "int4@g128"),
        (Numbers(4, 128, zero_point=True), "int4@g128@z"),
        (Numbers(4, activation_bits=8), "int4@a8"),
    ],
)
def test_numbers_that_nothing_computes_are_refused_by_name_and_by_value(numbers: Numbers, name: str) -> None:
    assert str(numbers) == name
    for given_ in (name, numbers):
        with pytest.raises(
            PatternError, match=f'no kernel computes numbers "{name}" yet.*"float", "int8" and "int8@a8";'
        ):
            parse_numbers(given_)


@given(INTEGERS)
def test_every_name_says_all_of_its_numbers(numbers: Numbers) -> None:
    """A name that is understood and not computed is named in the refusal as it was given."""
    if numbers in COMPUTED:
        assert parse_numbers(str(numbers)) == numbers
    else:
        with pytest.raises(PatternError, match=f'no kernel computes numbers "{numbers}" yet'):
            parse_numbers(str(numbers))


@given(INTEGERS, INTEGERS)
def test_different_numbers_have_different_names(one: Numbers, other: Numbers) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    "name", ["", "int", "int5", "int8@g12", "int8@g0", "int8@z@g16", "int8@a4", "float@g16", "fp8", "uint8", "int-8"]
)
def test_names_outside_the_grammar_are_refused(name: str) -> None:
    with pytest.raises(PatternError, match='allowed are "float" and "intB"'):
        parse_numbers(name)


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(PatternError, match="not int"):
        parse_numbers(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "facts", [{"group": 128}, {"zero_point": True}, {"activation_bits": 8}, {"bits": 3}, {"bits": 8, "group": 24}]
)
def test_facts_that_contradict_each_other_make_no_numbers(facts: dict[str, int]) -> None:
    with pytest.raises(PatternError, match="allowed are"):
        Numbers(**facts)


@pytest.mark.parametrize(
    ("name", "pattern", "numbers"),
    [
        ("2:4", NM(2, 4), FLOAT),
        ("8:16+int8", NM(8, 16), INT8),
        ("16:16+int8@a8", NM(16, 16), INT8_A8),
        ("block16x16:0.5", Block(16, 16, 0.5), FLOAT),
    ],
)
def test_weights_are_named_by_pattern_and_numbers(name: str, pattern: NM, numbers: Numbers) -> None:
    assert parse_weights(name) == (pattern, numbers)
    assert weights_name(pattern, numbers) == name
    assert parse_weights(pattern) == (pattern, FLOAT)
    assert parse_weights(f"{pattern}+float") == (pattern, FLOAT)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("2:4+", 'numbers "" are not understood'),
        ("2:4+int4", 'no kernel computes numbers "int4" yet'),
        ("2:3+int8", 'pattern "2:3"'),
        ("2:4+int8+int8", 'numbers "int8[+]int8" are not understood'),
        ("block16x16:0.5+int8", "row scales need an N:M or V:N:M pattern"),
        ("unstructured:0.5+int8", "row scales need an N:M or V:N:M pattern"),
    ],
)
def test_weights_outside_the_grammar_are_refused(name: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        parse_weights(name)


@pytest.mark.parametrize("name", ["8:16", "16:16", "64:2:8"])
def test_numbers_are_asked_for_beside_a_pattern(name: str) -> None:
    for quantize, activations, numbers in ((None, None, FLOAT), ("int8", None, INT8), ("int8", "int8", INT8_A8)):
        assert parse_weights(name, quantize, activations) == (parse(name), numbers)
        assert parse_weights(weights_name(parse(name), numbers), quantize, activations) == (parse(name), numbers)
    for stored in ("int8", "int8@a8"):
        assert parse_weights(f"{name}+{stored}", activations="int8") == (parse(name), INT8_A8)
    assert parse_weights(f"{name}+int8@a8") == (parse(name), INT8_A8)


@pytest.mark.parametrize(
    ("name", "quantize", "activations", "said"),
    [
        ("2:4", None, "int8", 'activations="int8" multiplies integers; give quantize="int8"'),
        ("2:4", "float", "int8", 'activations="int8" cannot multiply float weights'),
        ("2:4+float", None, "int8", 'activations="int8" cannot multiply float weights'),
        ("auto+int8@a8", None, None, '"auto" takes no numbers behind it; name the pattern'),
        ("2:4", "int8", "int4", "activations='int4' is not known; use \"int8\""),
        ("2:4", "int4", None, 'no kernel computes numbers "int4" yet'),
        ("2:4", True, None, "numbers are a name or a value of Numbers, not bool"),
        ("2:4+int8", "int8", "int8", '"2:4[+]int8" names the numbers int8 and int8@a8 are asked for'),
        ("2:4+int8@a8", "int8", None, '"2:4[+]int8@a8" names the numbers int8@a8 and int8 are asked for'),
        ("block4x4:0.5", "int8", "int8", "row scales need an N:M or V:N:M pattern"),
    ],
)
def test_what_is_asked_for_and_makes_no_sense_is_refused(name, quantize, activations, said) -> None:
    with pytest.raises(PatternError, match=said):
        parse_weights(name, quantize, activations)


def test_positions_take_no_bits_where_dense_groups_multiply_integers() -> None:
    for pattern, bits in ((NM(8, 16), 4), (NM(16, 16), 0), (NM(4, 4), 0), (NM(3, 4), 2)):
        assert INT8_A8.position_bits(pattern) == bits
        assert FLOAT.position_bits(pattern) == INT8.position_bits(pattern) == pattern.index_bits
    with pytest.raises(PatternError, match="not stored as N:M groups"):
        FLOAT.position_bits(Block(4, 4, 0.5))


def test_sizes_are_counted_in_bits() -> None:
    half, byte = Numbers(4), INT8
    assert [half.bytes_of(count, torch.float32) for count in (0, 1, 2, 7)] == [0, 1, 1, 4]
    assert [byte.bytes_of(count, torch.float32) for count in (0, 7)] == [0, 7]
    assert FLOAT.bytes_of(7, torch.bfloat16) == 14
    assert FLOAT.scales_bytes((3, 100)) == 0
    assert INT8.scales_bytes((3, 100)) == 3 * 4
    assert Numbers(4, 32).scales_bytes((3, 100)) == 3 * 4 * 4  # the last group of columns is short
    assert Numbers(4, 32, zero_point=True).scales_bytes((3, 100)) == 3 * (4 * 4 + 2)


@pytest.mark.parametrize("pattern", ["2:4", "5:8@v4", "64:2:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_and_sizes_are_those_of_packed_weights(pattern: str, dtype: torch.dtype) -> None:
    floating = sc.pack(torch.zeros(6, 20, dtype=dtype), pattern)
    quantised = ((sc.quantize(floating), INT8), (sc.quantize(floating, "int8"), INT8_A8))
    for packed, numbers in ((floating, FLOAT), *quantised):
        assert tuple(packed.parts) == numbers.part_names
        nbytes = 6 * numbers.bytes_of(packed.values.shape[1], dtype) + numbers.scales_bytes(packed.shape)
        assert packed.nbytes - packed.metadata.nbytes == nbytes
        assert packed.numbers == numbers and packed.values.dtype == numbers.values_dtype(dtype)
        again = sc.PackedWeight.of(tuple(packed.parts.values()), packed.pattern, packed.shape, dtype, numbers)
        assert again.parts == packed.parts and again.dtype == dtype
    assert parse_weights(f"{pattern}+int8") == (parse(pattern), INT8)


def test_tensors_of_a_weight_are_named() -> None:
    assert PART_NAMES == ("values", "metadata", "scales")
    assert Numbers(4, 32, zero_point=True).part_names == (*PART_NAMES, "zero_points")
    assert Numbers(4).values_dtype(torch.float32) == torch.uint8
    packed = sc.pack(torch.zeros(6, 20), "2:4")
    with pytest.raises(FormatError, match="int8 has the tensors values, metadata, scales, got 2 of them; give all"):
        sc.PackedWeight.of(tuple(packed.parts.values()), packed.pattern, packed.shape, packed.dtype, INT8)


def test_numbers_in_words() -> None:
    assert FLOAT.in_words(torch.float32) == "float32"
    assert INT8.in_words(torch.bfloat16) == "int8 weights, bfloat16"
    assert INT8_A8.product_in_words == "int8 weights and int8 activations"
    assert INT8_A8.in_words(torch.float32) == "int8@a8 weights, float32"


@pytest.mark.parametrize("name", ["cpu", "dense", "reference", "triton"])
def test_backends_refuse_numbers_they_have_no_kernel_for(name: str) -> None:
    device = "cuda" if name == "triton" else "cpu"
    request = Request(parse("2:4"), (16, 32), torch.float32, device, 1, Numbers(4, 32))
    known = "float, int8 and int8@a8" if name != "triton" else "float and int8"
    assert backends()[name].supports(request) == f"has no kernel for weights in int4@g32; {known} only"


def test_weights_are_not_stored_in_numbers_that_nothing_computes() -> None:
    packed = sc.pack(torch.zeros(6, 32), "2:4")
    assert in_numbers(packed, FLOAT) is packed
    assert in_numbers(packed, INT8).numbers == INT8
    with pytest.raises(PatternError, match='no kernel computes numbers "int8@g32" yet'):
        in_numbers(packed, Numbers(8, 32))
