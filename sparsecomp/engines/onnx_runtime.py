"""ONNX Runtime's CPU provider as an engine: a Gemm in fp32, and what its dynamic quantisation makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecomp.engines.base import Engine, Loaded, Operands, Runner, quantized
from sparsecomp.engines.graphs import gemm, quantized_gemm
from sparsecomp.patterns.numbers import INT8_A8

_NOT_INSTALLED = "onnx and onnxruntime are not installed; pip install 'sparsecomp[onnx]'"


class _Sessions(Loaded):
    def __init__(self, graph: Callable[[int | str, int], bytes], out: int) -> None:
        """``graph`` gives the model of a batch and of so many copies, each with ``out`` outputs."""
        self.graph, self.out = graph, out
        self.sessions: dict[tuple[int, int], Any] = {}

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        import onnxruntime

        if (threads, copies) not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            self.sessions[threads, copies] = onnxruntime.InferenceSession(
                self.graph("batch", copies), sess_options=options, providers=["CPUExecutionProvider"]
            )
        session = self.sessions[threads, copies]
        binding = session.io_binding()
        source = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        for each in session.get_inputs():
            binding.bind_ortvalue_input(each.name, source)
        shape = [x.shape[0], self.out]
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
            return _NOT_INSTALLED
        return None if dtype == "fp32" else "its CPU provider has no bf16 Gemm"

    def load(self, operands: Operands) -> Loaded:
        """Sessions are made when they are bound, one for each number of threads and copies."""
        return _Sessions(partial(gemm, operands), operands.bias.shape[0])


class OnnxRuntimeInt8Engine(Engine):
    """ONNX Runtime's dynamic int8: the graph of ``quantize_dynamic(per_channel=True)``, which it fuses to one node."""

    name = "onnxruntime int8"
    numbers = INT8_A8

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if find_spec("onnxruntime") is None or find_spec("onnx") is None:
            return _NOT_INSTALLED
        return None if dtype == "fp32" else "it takes and gives fp32"

    def load(self, operands: Operands) -> Loaded:
        """Sessions are made when they are bound, one for each number of threads and copies."""
        weights = [quantized(weight) for weight in operands.weights]
        return _Sessions(partial(quantized_gemm, weights, operands.bias), operands.bias.shape[0])
