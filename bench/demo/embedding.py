"""One engine's part of the demo, run in the engine's own process: a model from its file, asked and timed.

Takes files, gives embeddings and seconds. Knows nothing of the other engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sparsecomp as sc
from bench import minilm
from sparsecomp.engines.timing import Sampler, wait_until_idle

# input_ids and attention_mask, int64 [texts, tokens]
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Embedding:
    """Sentence embeddings by one engine."""

    def __init__(self, of: Callable[[Any, Arrays], Callable[[], object]], make: Callable[[], object]) -> None:
        """``of`` binds what ``make`` builds to a batch."""
        self._of, self._made = of, make()
        self._sampler: Sampler | None = None

    @torch.inference_mode()
    def embed(self, batch: Arrays) -> np.ndarray[Any, Any]:
        """The embeddings of a batch, float32 [texts, width]."""
        return np.array(self._of(self._made, batch)(), dtype=np.float32)

    def bind(self, batch: Arrays) -> None:
        """Time this batch from now on."""
        # the engines' threads sleep between samples, and some wake more slowly than others
        self._sampler = Sampler(self._of(self._made, batch), after_sleep=True)

    @torch.inference_mode()
    def sample(self) -> float:
        """Seconds of one embedding; it returns when the engine's threads have gone to sleep."""
        assert self._sampler is not None
        seconds = self._sampler()
        wait_until_idle()
        return seconds


def dense_model() -> nn.Module:
    """The original."""
    return minilm.load_model()


def sparse_model(
    path: Path, dense: Sequence[str] = (), dense_above: Mapping[str, int | None] | None = None
) -> nn.Module:
    """The saved model; the layers in ``dense`` as ordinary ones, zeros in place, others with their ``dense_above``."""
    model = sc.load(path, into=minilm.load_model())
    for name in dense:
        model.set_submodule(name, _sparse_layer(model, name).to_linear())
    for name, batch in (dense_above or {}).items():
        _sparse_layer(model, name).dense_above = batch
    return model


def stock_session(path: Path) -> Any:
    """An ONNX file in ONNX Runtime as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def our_session(path: Path) -> Any:
    """An ONNX file in ONNX Runtime with our operators. Warns with RuntimeWarning where they are not there."""
    return sc.onnx_session(path, intra_op_num_threads=torch.get_num_threads())


def of_model(model: nn.Module, batch: Arrays) -> Callable[[], object]:
    """One forward pass and pooling."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    return lambda: minilm.pool(model(**tensors).last_hidden_state, tensors["attention_mask"])


def of_session(session: Any, batch: Arrays) -> Callable[[], object]:
    """One run of the session."""
    feeds = dict(batch)
    return lambda: session.run(None, feeds)[0]


def of_openvino(path: Path, batch: Arrays) -> Callable[[], object]:
    """One inference of an ONNX file in OpenVINO, in fp32, compiled for the shape of this batch, which it prefers."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(value.shape) for name, value in batch.items()})
    settings = {
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": "NO",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    inputs = {name: openvino.Tensor(np.ascontiguousarray(value)) for name, value in batch.items()}
    for name, tensor in inputs.items():
        request.set_tensor(name, tensor)

    def call() -> object:
        request.infer()
        return request.get_output_tensor(0).data

    return call


def quantize_int8(dense: Path, path: Path, per_channel: bool) -> None:
    """The int8 file that ONNX Runtime's quantize_dynamic makes of a dense ONNX file by its defaults.

    Weights are int8 with one scale, or with ``per_channel`` one for each output; activations are rounded at run time.
    Raises ImportError where its quantization tools are not installed.
    """
    from onnxruntime.quantization import quantize_dynamic

    # it advises every caller, on the root logger, to run a pre-processing that changes nothing here
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(dense, path, per_channel=per_channel)
    finally:
        logging.disable(disabled)


def _sparse_layer(model: nn.Module, name: str) -> sc.SparseLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, sc.SparseLinear)
    return layer
