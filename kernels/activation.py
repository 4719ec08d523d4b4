"""Activations of a finished fp32 sum: the formulas' constants, and their form in Triton. Imports triton.

``sparse_mma_epilogue`` has the same formulas as PTX, for kernels whose registers tensor operations would spill.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)

# (1 + tanh u) / 2 is the logistic function of 2u; in powers of two that is 2 log2(e) u
TANH_SLOPE = 2 * math.sqrt(2 / math.pi) * LOG2_E
TANH_CUBIC = 0.044715 * TANH_SLOPE

# x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc of Abramowitz and Stegun 7.1.26, to 1.5e-7
ERFC_SCALE = 0.3275911 / math.sqrt(2)
HALF_ERFC = (0.254829592 / 2, -0.284496736 / 2, 1.421413741 / 2, -1.453152027 / 2, 1.061405429 / 2)
ERFC_BEYOND = 64.0
"""Beyond, the second term is 0, where infinity times 0 would not be."""

_LOG2_E, _SLOPE, _CUBIC = tl.constexpr(LOG2_E), tl.constexpr(TANH_SLOPE), tl.constexpr(TANH_CUBIC)
_SCALE, _BEYOND = tl.constexpr(ERFC_SCALE), tl.constexpr(ERFC_BEYOND)
_E1, _E2, _E3, _E4, _E5 = (tl.constexpr(each) for each in HALF_ERFC)


@triton.jit
def _logistic_of_power(exponent):
    return 1.0 / (1.0 + tl.exp2(-exponent))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """One of "none", "relu", "gelu", "gelu_tanh" and "silu" of an fp32 tensor; a NaN stays."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0.0, 0.0, v)
    elif ACTIVATION == "silu":
        v = v * _logistic_of_power(v * _LOG2_E)
    elif ACTIVATION == "gelu_tanh":
        v = v * _logistic_of_power(v * (v * v * _CUBIC + _SLOPE))
    elif ACTIVATION == "gelu":
        size = tl.minimum(tl.abs(v), _BEYOND)
        t = 1.0 / (size * _SCALE + 1.0)
        half_erfc = ((((_E5 * t + _E4) * t + _E3) * t + _E2) * t + _E1) * t
        v = tl.where(v < 0.0, 0.0, v) - half_erfc * size * tl.exp2(size * size * (-_LOG2_E / 2))
    return v
