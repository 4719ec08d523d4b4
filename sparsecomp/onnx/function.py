"""The operators ``sparsecomp::NMLinear...`` as ONNX functions made of standard operators.

y [..., out] = activation(x [..., in] W^T + bias), W given by the canonical ``values`` and ``metadata`` of
docs/format.md. ``NMLinearInt8...`` has int8 ``values`` and ``scales`` as well and rounds each row of x to 8 bits;
``LinearInt8...`` is the same of dense groups, which have no metadata. There is one operator for each activation, as a
function body cannot choose by an attribute.
A runtime that knows the operator runs it; every other one inlines this body. Its constants depend on initialisers only,
so that a runtime which folds constants is left with one dense MatMul, of integers in floats where x is rounded.
"""

from __future__ import annotations

from typing import Any

from sparsecomp.onnx.extra import require

DOMAIN = "sparsecomp"
OPERATOR_VERSION = 1
MIN_OPSET = 18  # the first with BitwiseAnd and with the axes of ReduceSum as an input

# Positions are read bit by bit, because fields of three bits cross bytes. Weights are scattered in float32, which holds
# every weight dtype exactly. All constants are typed, so that none depends on x.
_OPENING = """
<opset_import: ["" : {opset}], domain: "{domain}">
{operator} <{attributes}> ({inputs}) => (y)
{{
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    minus_one = Constant <value_ints: ints = [-1]> ()
    in_scalar = Constant <value_int: int = @in_features> ()
    in_1 = Reshape (in_scalar, one)
    updates = Cast <to: int = 1> (values)
"""

_SCATTERED = """
    zero_scalar = Constant <value_int: int = 0> ()
    one_scalar = Constant <value_int: int = 1> ()
    n_scalar = Constant <value_int: int = @n> ()
    m_scalar = Constant <value_int: int = @m> ()
    mask_rows_scalar = Constant <value_int: int = @mask_rows> ()
    index_bits_scalar = Constant <value_int: int = @index_bits> ()
    mask_rows_1 = Reshape (mask_rows_scalar, one)
    index_bits_1 = Reshape (index_bits_scalar, one)
    out_1 = Shape <start: int = 0, end: int = 1> (values)
    slots_1 = Shape <start: int = 1, end: int = 2> (values)
    slots_scalar = Squeeze (slots_1, zero)

    shifts = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
    lowest = Constant <value = uint8[1] {{1}}> ()
    powers = Constant <value = int32[4] {{1, 2, 4, 8}}> ()
    octets = Unsqueeze (metadata, minus_one)
    shifted = BitShift <direction = "RIGHT"> (octets, shifts)
    bits = BitwiseAnd (shifted, lowest)
    row_shape = Concat <axis: int = 0> (zero, minus_one)
    stream = Reshape (bits, row_shape)
    used = Mul (slots_1, index_bits_1)
    fields = Slice (stream, zero, used, one)
    field_shape = Concat <axis: int = 0> (zero, slots_1, index_bits_1)
    field_bits = Reshape (fields, field_shape)
    field_bits_wide = Cast <to: int = 6> (field_bits)
    place_values = Slice (powers, zero, index_bits_1, zero)
    weighted = Mul (field_bits_wide, place_values)
    positions_narrow = ReduceSum <keepdims: int = 0> (weighted, two)
    positions = Cast <to: int = 7> (positions_narrow)

    slot = Range (zero_scalar, slots_scalar, one_scalar)
    group = Div (slot, n_scalar)
    group_start = Mul (group, m_scalar)
    tile_columns = Add (positions, group_start)
    tiles = Unsqueeze (tile_columns, one)
    repeats = Concat <axis: int = 0> (one, mask_rows_1, one)
    repeated = Expand (tiles, repeats)
    flat_shape = Concat <axis: int = 0> (minus_one, slots_1)
    all_columns = Reshape (repeated, flat_shape)
    columns = Slice (all_columns, zero, out_1, zero)

    groups_scalar = Div (slots_scalar, n_scalar)
    width_scalar = Mul (groups_scalar, m_scalar)
    width_1 = Reshape (width_scalar, one)
    padded_shape = Concat <axis: int = 0> (out_1, width_1)
    blank = ConstantOfShape <value = float[1] {{0.0}}> (padded_shape)
    padded = ScatterElements <axis: int = 1> (blank, columns, updates)
    dense_wide = Slice (padded, zero, in_1, one)
"""

# dense groups lie side by side; columns that only fill the last one up come off
_DENSE = """
    dense_wide = Slice (updates, zero, in_1, one)
"""

_PRODUCT = """
    dense = Cast <to: int = @weight_type> (dense_wide)
    weight = Transpose <perm: ints = [1, 0]> (dense)
    product = MatMul (x, weight)
    sum = Add (product, bias)
"""

# As sparsecomp/patterns/rounding.py has it. Large sums of integers in float32 lose their last bits. Reductions and Clip
# of runtimes may pass NaN by, so it is put in the place of what is not finite. ONNX Runtime reduces [0, in] to
# [0, in]; one column of it is taken.
_ROUNDED_PRODUCT = """
    weight = Transpose <perm: ints = [1, 0]> (dense_wide)
    nothing = Constant <value_float: float = 0.0> ()
    unit = Constant <value_float: float = 1.0> ()
    levels = Constant <value_float: float = 254.0> ()
    most = Constant <value_float: float = 255.0> ()
    invalid = Constant <value = float {{nan}}> ()
    wide = Cast <to: int = 1> (x)
    is_nan = IsNaN (wide)
    is_infinite = IsInf (wide)
    is_bad = Or (is_nan, is_infinite)
    finite = Where (is_bad, nothing, wide)
    smallest = ReduceMin <keepdims: int = 1> (finite, minus_one)
    largest = ReduceMax <keepdims: int = 1> (finite, minus_one)
    low = Min (smallest, nothing)
    high = Max (largest, nothing)
    low_part = Div (low, levels)
    high_part = Div (high, levels)
    range = Sub (high_part, low_part)
    least = Constant <value_float: float = 1.17549435e-38> ()
    every_step = Max (range, least)
    step = Slice (every_step, zero, one, minus_one)
    low_steps = Div (low, step)
    low_rounded = Round (low_steps)
    zero_point = Sub (unit, low_rounded)
    inverse = Div (unit, step)
    steps = Mul (finite, inverse)
    rounded = Round (steps)
    raised = Add (rounded, zero_point)
    stored = Clip (raised, unit, most)
    whole = Sub (stored, zero_point)
    integers = Where (is_bad, invalid, whole)
    sums = MatMul (integers, weight)
    stepped = Mul (sums, step)
    scaled = Mul (stepped, scales)
    bias_wide = Cast <to: int = 1> (bias)
    sum = Add (scaled, bias_wide)
"""

# On ``sum``, in float32 whatever the dtype of x: runtimes lack some of these for 16-bit types.
_WIDE = "v = Cast <to: int = 1> (sum) {formula} y = Cast <to: int = @weight_type> (activated)"
_ACTIVATIONS = {
    "none": "y = Cast <to: int = @weight_type> (sum)",
    "relu": _WIDE.format(formula="activated = Relu (v)"),
    "gelu": _WIDE.format(
        formula="""
    root = Constant <value_float: float = 0.70710678> ()
    half = Constant <value_float: float = 0.5> ()
    argument = Mul (v, root)
    error = Erf (argument)
    half_error = Mul (error, half)
    probability = Add (half_error, half)
    activated = Mul (v, probability)
    """
    ),
    # (1 + tanh(u)) / 2 is the logistic function of 2u; here 2u = sqrt(8 / pi) (v + 0.044715 v^3)
    "gelu_tanh": _WIDE.format(
        formula="""
    linear = Constant <value_float: float = 1.5957691> ()
    cubic = Constant <value_float: float = 0.071354816> ()
    square = Mul (v, v)
    part = Mul (square, cubic)
    factor = Add (part, linear)
    argument = Mul (v, factor)
    probability = Sigmoid (argument)
    activated = Mul (v, probability)
    """
    ),
    "silu": _WIDE.format(formula="probability = Sigmoid (v) activated = Mul (v, probability)"),
}


# by the name without an activation: attributes, inputs, the weight [out, in] in float32, and the product
_NM_ATTRIBUTES = "n, m, mask_rows, index_bits, in_features, weight_type"
_KINDS = {
    "NMLinear": (_NM_ATTRIBUTES, "x, values, metadata, bias", _SCATTERED, _PRODUCT),
    "NMLinearInt8": (_NM_ATTRIBUTES, "x, values, metadata, scales, bias", _SCATTERED, _ROUNDED_PRODUCT),
    "LinearInt8": ("m, in_features, weight_type", "x, values, scales, bias", _DENSE, _ROUNDED_PRODUCT),
}
FLOATS, INTEGERS, DENSE_INTEGERS = _KINDS


def operator(kind: str, activation: str) -> str:
    """The name of an operator of that kind: ``FLOATS``, ``INTEGERS`` or ``DENSE_INTEGERS``."""
    return kind + ("" if activation == "none" else activation.title().replace("_", ""))


# kind and activation by name, the activations in the order of sparsecomp.activations, which needs torch
OPERATORS = {operator(kind, activation): (kind, activation) for kind in _KINDS for activation in _ACTIVATIONS}


def linear_function(opset: int, name: str) -> Any:
    """The function of that operator as an ``onnx.FunctionProto`` at this opset, which must be that of its model."""
    parser = require("onnx.parser")
    kind, activation = OPERATORS[name]
    attributes, inputs, weight, product = _KINDS[kind]
    parts = (_OPENING, weight, product, f"    {_ACTIVATIONS[activation]}\n}}}}\n")
    facts = {"opset": opset, "domain": DOMAIN, "operator": name, "attributes": attributes, "inputs": inputs}
    return parser.parse_function("".join(parts).format(**facts))
