"""The engines compared: each one holds weights in its own form and binds them to an input as a callable.

Several copies of a weight stand for a model whose layers come in turn. Knows nothing of clocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.backends.registry import backends
from sparsecomp.machine.request import Request
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns.numbers import FLOAT, Numbers, parse_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Operands:
    """fp32 ``weights`` [out, in] (the copies) and ``bias`` [out], of values that ``dtype`` ("fp32", "bf16") holds."""

    weights: Sequence[Tensor]
    bias: Tensor
    dtype: str


@dataclass(frozen=True, eq=False)
class Runner:
    """``call()`` multiplies the input by every copy in turn; ``result()`` is what it gave for the last one, in fp32.

    ``held`` is memory that the call reads without owning it: the runner must live as long as it is called.
    """

    call: Callable[[], object]
    result: Callable[[], Tensor]
    held: object = None


class Loaded(ABC):
    """Weights in an engine's own form."""

    @abstractmethod
    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        """The first ``copies`` weights times ``x`` [batch, in] (fp32) on so many threads."""


class Engine(ABC):
    """A way to compute y = x W^T + b. ``pattern`` is None for a dense engine, ``label`` names it in a result."""

    name: str
    openmp: ClassVar[bool] = False  # whether its threads are libgomp's
    pattern: str | None = None
    label: str | None = None
    numbers: Numbers = FLOAT

    @abstractmethod
    def missing(self, dtype: str) -> str | None:
        """None if it runs this dtype here, else the reason why not."""

    def remark(self, dtype: str) -> str | None:
        """What a reader of its times should know, if anything."""
        return None

    @abstractmethod
    def load(self, operands: Operands) -> Loaded:
        """The operands in the engine's form; weights must fit ``pattern``."""

    def effective(self, weight: Tensor) -> Tensor:
        """The fp32 weight the engine multiplies by when given ``weight``: what its product is checked against."""
        return weight


@dataclass(frozen=True, eq=False)
class _Modules(Loaded):
    layers: Sequence[nn.Module]
    dtype: torch.dtype

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        layers, source = self.layers[:copies], x.to(self.dtype)

        def call() -> Tensor:
            for layer in layers:
                y = layer(source)
            return y  # type: ignore[no-any-return]

        return Runner(call=call, result=lambda: call().float())


class TorchEngine(Engine):
    """torch.nn.Linear."""

    name = "torch"
    openmp = True

    def missing(self, dtype: str) -> str | None:
        """None: torch is always there."""
        return None

    def load(self, operands: Operands) -> Loaded:
        """One nn.Linear for each copy."""
        dtype = DTYPES[operands.dtype]
        layers = []
        for weight in operands.weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            layer.bias = nn.Parameter(operands.bias.to(dtype), requires_grad=False)
            layers.append(layer)
        return _Modules(layers, dtype)


class SparseEngine(Engine):
    """SparseLinear pinned to the compiled CPU kernels, so that it never falls back to dense."""

    openmp = True

    def __init__(self, label: str) -> None:
        """An engine for weights that fit a pattern, such as "2:4"; "2:4+int8" rounds them to int8 with row scales."""
        self.name = f"sparsecomp {label}"
        self.label = label
        pattern, self.numbers = parse_weights(label)
        self.pattern = str(pattern)

    def missing(self, dtype: str) -> str | None:
        """Why the compiled kernels cannot run this dtype, if they cannot."""
        cpu = backends()["cpu"]
        return cpu.missing() or cpu.supports(
            Request(sc.parse_pattern(self.pattern or ""), (64, 64), DTYPES[dtype], "cpu", 1, self.numbers)
        )

    def load(self, operands: Operands) -> Loaded:
        """One SparseLinear for each copy."""
        dtype, bias = DTYPES[operands.dtype], operands.bias
        packed = (self._packed(weight.to(dtype)) for weight in operands.weights)
        return _Modules([sc.SparseLinear.from_packed(each, bias.to(dtype), backend="cpu") for each in packed], dtype)

    def effective(self, weight: Tensor) -> Tensor:
        """The weight itself, or what its integers and scales stand for."""
        return self._packed(weight).unpack() if self.numbers.has_scales else weight

    def _packed(self, weight: Tensor) -> sc.PackedWeight:
        assert self.pattern is not None
        return in_numbers(sc.pack(weight, self.pattern), self.numbers)


class _OnnxSessions(Loaded):
    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.sessions: dict[tuple[int, int], Any] = {}

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        import onnxruntime

        if (threads, copies) not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            model = _gemm_model(self.operands, "batch", copies)
            self.sessions[threads, copies] = onnxruntime.InferenceSession(
                model, sess_options=options, providers=["CPUExecutionProvider"]
            )
        session = self.sessions[threads, copies]
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        shape = [x.shape[0], self.operands.bias.shape[0]]
        values = [onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32) for _ in range(copies)]
        for i, value in enumerate(values):
            binding.bind_ortvalue_output(f"y{i}", value)
        return Runner(
            call=lambda: session.run_with_iobinding(binding),
            result=lambda: torch.from_numpy(values[-1].numpy().copy()),
        )


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime's CPU provider: one Gemm node for each copy, inputs and outputs bound in place."""

    name = "onnxruntime"

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if find_spec("onnxruntime") is None or find_spec("onnx") is None:
            return "onnx and onnxruntime are not installed; pip install 'sparsecomp[onnx]'"
        return None if dtype == "fp32" else "its CPU provider has no bf16 Gemm"

    def load(self, operands: Operands) -> Loaded:
        """Sessions are made when they are bound, one for each number of threads and copies."""
        return _OnnxSessions(operands)


@dataclass(frozen=True, eq=False)
class _OpenVino(Loaded):
    operands: Operands
    precision: str

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": "NO",
        }
        model = core.read_model(_gemm_model(self.operands, x.shape[0], copies))
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(0, openvino.Tensor(x.numpy(), shared_memory=True))
        return Runner(
            call=request.infer,
            result=lambda: torch.from_numpy(np.array(request.get_output_tensor(copies - 1).data, dtype=np.float32)),
            held=x,
        )


@cache
def _openvino_precision(dtype: str) -> str:
    """The dtype where OpenVINO lists it; elsewhere it would emulate bf16, up to fifty times as slowly as fp32."""
    import openvino

    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if dtype == "bf16" and "BF16" in known else "f32"


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plugin: latency hint, static shapes; bf16 where the processor multiplies that, else in fp32."""

    name = "openvino"

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if find_spec("openvino") is None or find_spec("onnx") is None:
            return "openvino and onnx are not installed; pip install 'sparsecomp[bench,onnx]'"
        return None

    def remark(self, dtype: str) -> str | None:
        """Whether it computes in another precision."""
        if dtype == "fp32" or _openvino_precision(dtype) == "bf16":
            return None
        return "computes in fp32, as by its own choice on a processor that does not multiply bf16"

    def load(self, operands: Operands) -> Loaded:
        """Models are compiled when they are bound."""
        return _OpenVino(operands, _openvino_precision(operands.dtype))


def dense_engines() -> list[Engine]:
    """Every dense engine, installed or not."""
    return [TorchEngine(), OnnxRuntimeEngine(), OpenVinoEngine()]


def _gemm_model(operands: Operands, batch: int | str, copies: int) -> bytes:
    """A serialized ONNX model with one Gemm for each copy, all on the same x [batch, in]."""
    import onnx
    from onnx import helper, numpy_helper

    out, columns = operands.weights[0].shape
    nodes, outputs = [], []
    stored = [numpy_helper.from_array(operands.bias.numpy(), "bias")]
    for i, weight in enumerate(operands.weights[:copies]):
        stored.append(numpy_helper.from_array(weight.numpy(), f"w{i}"))
        nodes.append(helper.make_node("Gemm", ["x", f"w{i}", "bias"], [f"y{i}"], transB=1))
        outputs.append(helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [batch, out]))
    source = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, columns])
    graph = helper.make_graph(nodes, "gemm", [source], outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized
