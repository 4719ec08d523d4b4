"""The end of the sparse tensor-core kernels: scales, bias, activation and rounding of two values in one block of PTX.

Two values are finished in one block, so that their temporaries die before the next ones are born: as tensor operations
they would spill. Imports triton.
"""

from __future__ import annotations

import struct

from triton.experimental import gluon

from sparsecomp.kernels.activation import ERFC_BEYOND, ERFC_SCALE, HALF_ERFC, LOG2_E, TANH_CUBIC, TANH_SLOPE


def _hex(value: float) -> str:
    """A constant of PTX: the bits of the fp32 nearest to it."""
    return "0f" + struct.pack(">f", value).hex().upper()


# Of %v1 in place, by the formulas of ``activation``. ex2 and rcp are the hardware's, good to 2e-7 (PTX ISA 8.7,
# section 9.7.3).
_LOGISTIC = "ex2.approx.ftz.f32 %e1, %e1; add.f32 %e1, %e1, 0f3F800000; rcp.approx.ftz.f32 %e1, %e1;"
_ACTIVATE = {
    "none": "",
    # a NaN stays
    "relu": "setp.lt.f32 %c1, %v1, 0f00000000; selp.f32 %v1, 0f00000000, %v1, %c1;",
    "silu": f"mul.f32 %e1, %v1, {_hex(-LOG2_E)}; {_LOGISTIC} mul.f32 %v1, %v1, %e1;",
    "gelu_tanh": (
        f"mul.f32 %e2, %v1, %v1; fma.rn.f32 %e1, %e2, {_hex(-TANH_CUBIC)}, {_hex(-TANH_SLOPE)};"
        f"mul.f32 %e1, %e1, %v1; {_LOGISTIC} mul.f32 %v1, %v1, %e1;"
    ),
    "gelu": (
        f"abs.f32 %e1, %v1; min.f32 %e1, %e1, {_hex(ERFC_BEYOND)};"
        f"fma.rn.f32 %e2, %e1, {_hex(ERFC_SCALE)}, 0f3F800000; rcp.approx.ftz.f32 %e2, %e2;"
        f"fma.rn.f32 %e3, %e2, {_hex(HALF_ERFC[4])}, {_hex(HALF_ERFC[3])};"
        f"fma.rn.f32 %e3, %e3, %e2, {_hex(HALF_ERFC[2])}; fma.rn.f32 %e3, %e3, %e2, {_hex(HALF_ERFC[1])};"
        f"fma.rn.f32 %e3, %e3, %e2, {_hex(HALF_ERFC[0])}; mul.f32 %e3, %e3, %e2; mul.f32 %e3, %e3, %e1;"
        f"mul.f32 %e2, %e1, {_hex(-LOG2_E / 2)}; mul.f32 %e2, %e2, %e1; ex2.approx.ftz.f32 %e2, %e2;"
        "mul.f32 %e3, %e3, %e2; setp.lt.f32 %c1, %v1, 0f00000000; selp.f32 %e1, 0f00000000, %v1, %c1;"
        "sub.f32 %v1, %e1, %e3;"
    ),
}
ACTIVATIONS = tuple(_ACTIVATE)


@gluon.constexpr_function
def finish(activation, out, scaled):
    """PTX and constraints that make two outputs of a Triton type (fp16, bf16 or fp32) of two accumulators.

    Without ``scaled`` the accumulators are fp32 and hold the bias already. With it they are int32, and three more pairs
    of fp32 follow them: scales of rows, scales of tokens, biases.
    """
    pair = {"fp16": "f16x2", "bf16": "bf16x2", "fp32": None}[out.name]
    results = 2 if pair is None else 1
    steps = []
    for i in range(2):
        accumulator = results + i
        if scaled:
            steps.append(
                f"cvt.rn.f32.s32 %v1, ${accumulator}; mul.f32 %e1, ${accumulator + 2}, ${accumulator + 4};"
                f"fma.rn.f32 %v1, %v1, %e1, ${accumulator + 6};"
            )
        else:
            steps.append(f"mov.f32 %v1, ${accumulator};")
        steps.append(_ACTIVATE[activation])
        if i == 0:
            steps.append("mov.f32 %w1, %v1;")
    # outputs may share registers with inputs, so they are written last
    steps.append("mov.f32 $0, %w1; mov.f32 $1, %v1;" if pair is None else f"cvt.rn.{pair}.f32 $0, %v1, %w1;")
    registers = ".reg .f32 %v<2>; .reg .f32 %w<2>; .reg .f32 %e<4>; .reg .pred %c<2>;"
    constraints = ["=f" if pair is None else "=r"] * results + (["r"] * 2 + ["f"] * 6 if scaled else ["f"] * 2)
    return f"{{ {registers} {' '.join(steps)} }}", ",".join(constraints)
