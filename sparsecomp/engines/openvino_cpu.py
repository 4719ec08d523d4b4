"""OpenVINO's CPU plugin as an engine: in floating point, and in int8 in the two ways it has of rounding activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsecomp.engines.base import Engine, Loaded, Operands, Runner, quantized
from sparsecomp.engines.graphs import gemm
from sparsecomp.patterns.numbers import INT8_A8

_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# the fastest of 32 (its own default), 64, 128, 256 and the whole row on 768x768 to 3072x768 at batch 128 (AMD EPYC with
# AVX-512, 2026-11-30); a group that exceeds the row would leave the activations unrounded
_GROUPS = (128, 64, 32)
# rounding gives less, a saturated sum more
_ERROR_OF_SUMS = 0.1


def _run(model: Any, x: Tensor, threads: int, copies: int, precision: str, hints: Mapping[str, str]) -> Runner:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": "NO",
        **hints,
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    source = openvino.Tensor(x.numpy(), shared_memory=True)
    for i in range(len(compiled.inputs)):
        request.set_input_tensor(i, source)
    return Runner(
        call=request.infer,
        result=lambda: torch.from_numpy(np.array(request.get_output_tensor(copies - 1).data, dtype=np.float32)),
        held=x,
    )


@dataclass(frozen=True, eq=False)
class Floating(Loaded):
    """Gemms, compiled when they are bound in OpenVINO's ``precision`` ("f32", "bf16")."""

    operands: Operands
    precision: str

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        """A model of static shapes."""
        import openvino

        model = openvino.Core().read_model(gemm(self.operands, x.shape[0], copies))
        return _run(model, x, threads, copies, self.precision, {})


@dataclass(frozen=True, eq=False)
class _Integers(Loaded):
    weights: list[tuple[Tensor, Tensor]]
    bias: Tensor
    rounding: Literal["static", "dynamic"]
    hints: Mapping[str, str] = field(default_factory=dict)

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        import openvino
        from openvino import opset13

        # an input for each copy, so that none shares the rounded activations of another
        sources = [opset13.parameter(list(x.shape), np.float32) for _ in range(copies)]
        largest = np.float32(max(float(x.abs().max()), 1e-30)) if x.numel() else np.float32(1)
        low, high = -largest, largest * np.float32(127 / 128)
        products = []
        for source, (integers, scales) in zip(sources, self.weights, strict=False):
            rounded = opset13.fake_quantize(source, low, high, low, high, 256) if self.rounding == "static" else source
            weight = opset13.multiply(opset13.convert(opset13.constant(integers.numpy()), np.float32), scales.numpy())
            product = opset13.matmul(rounded, weight, False, True)
            products.append(opset13.add(product, self.bias.numpy()[None]))
        return _run(openvino.Model(products, sources, "layer"), x, threads, copies, "f32", self.hints)


def _why_no_import() -> str | None:
    """Why OpenVINO cannot be imported though it is installed, or None if it can."""
    try:
        import openvino  # noqa: F401
    except Exception as error:
        # a broken library raises an OSError, a package of another version whatever it runs into
        return f"openvino cannot be imported: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


@cache
def precision_of(dtype: str) -> str:
    """The dtype where OpenVINO lists it; elsewhere it would emulate bf16, up to fifty times as slowly as fp32."""
    import openvino

    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if dtype == "bf16" and "BF16" in known else "f32"


@cache
def _rounds_by_itself() -> bool:
    """Whether dynamic quantisation rounds activations here: weights of 1 and -1 lose nothing else.

    OpenVINO ignores the hint in silence where the processor has no VNNI.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(32, 64, generator=generator, device="cpu", dtype=torch.float32).sign()
    return _error("dynamic", weight, torch.randn(4, 64, generator=generator, device="cpu", dtype=torch.float32)) > 1e-4


@cache
def _largest_weight() -> int:
    """The largest int8 weight beside static activations: 63 where sums of pairs saturate, as they may without VNNI."""
    ones = torch.ones(32, 64, device="cpu", dtype=torch.float32)
    return 127 if _error("static", ones, ones) < _ERROR_OF_SUMS else 63


def _error(rounding: Literal["static", "dynamic"], weight: Tensor, x: Tensor) -> float:
    """Relative distance of the product of x and weights that int8 with row scales of 1/127 holds to float64."""
    scales = torch.full((weight.shape[0], 1), 1 / 127, device="cpu", dtype=torch.float32)
    bias = torch.zeros(weight.shape[0], device="cpu", dtype=torch.float32)
    hints = {_GROUP: str(_GROUPS[-1])} if rounding == "dynamic" else {}
    runner = _Integers([((weight * 127).to(torch.int8), scales)], bias, rounding, hints).bind(x, 1, 1)
    runner.call()
    truth = x.double() @ weight.double().T
    return float((runner.result() - truth).norm() / truth.norm())


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plugin: latency hint, static shapes; bf16 where the processor multiplies that, else in fp32."""

    name = "openvino"

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if find_spec("openvino") is None or find_spec("onnx") is None:
            return "openvino and onnx are not installed; pip install 'sparsecomp[bench,onnx]'"
        return _why_no_import()

    def remark(self, dtype: str) -> str | None:
        """Whether it computes in another precision."""
        if self.computes(dtype) == dtype:
            return None
        return "computes in fp32, as by its own choice on a processor that does not multiply bf16"

    def computes(self, dtype: str) -> str:
        """The dtype, or "fp32" where it would emulate that."""
        return "fp32" if precision_of(dtype) == "f32" else dtype

    def load(self, operands: Operands) -> Loaded:
        """Models are compiled when they are bound."""
        return Floating(operands, precision_of(operands.dtype))


class OpenVinoInt8Engine(Engine):
    """OpenVINO with int8 weights with row scales and int8 activations, whose scale is "static" or "dynamic".

    "static": a FakeQuantize of the range that the input has, as calibration gives it. "dynamic": the plugin rounds the
    input of compressed weights by itself, with a scale for each group of columns.
    """

    numbers = INT8_A8

    def __init__(self, rounding: Literal["static", "dynamic"]) -> None:
        """An engine that rounds activations in that way."""
        self.name = f"openvino int8 {rounding}"
        self._rounding: Literal["static", "dynamic"] = rounding

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if find_spec("openvino") is None:
            return "openvino is not installed; pip install 'sparsecomp[bench]'"
        if dtype != "fp32":
            return "it takes and gives fp32"
        if (broken := _why_no_import()) is not None:
            return broken
        try:
            rounds = self._rounding == "static" or _rounds_by_itself()
        except RuntimeError as error:
            return f"OpenVINO cannot compile it here: {str(error).splitlines()[-1]}"
        return None if rounds else "it rounds no activations on this processor and multiplies in fp32; that needs VNNI"

    def remark(self, dtype: str) -> str | None:
        """Whether weights have 7 bits."""
        if self._rounding == "dynamic" or _largest_weight() == 127:
            return None
        return "has weights of 7 bits, because sums of 8 bits saturate on this processor"

    def load(self, operands: Operands) -> Loaded:
        """Models are compiled when they are bound."""
        largest = _largest_weight() if self._rounding == "static" else 127
        weights = [quantized(weight, largest) for weight in operands.weights]
        columns = operands.weights[0].shape[1]
        group = next((each for each in _GROUPS if each <= columns), _GROUPS[-1])
        hints = {_GROUP: str(group)} if self._rounding == "dynamic" else {}
        return _Integers(weights, operands.bias, self._rounding, hints)
