"""Every dense engine there is code for, installed or not, in the order of results."""

from __future__ import annotations

from sparsecomp.engines.base import Engine
from sparsecomp.engines.onnx_runtime import OnnxRuntimeEngine, OnnxRuntimeInt8Engine
from sparsecomp.engines.openvino_cpu import OpenVinoEngine, OpenVinoInt8Engine
from sparsecomp.engines.pytorch import TorchEngine, TorchInt8Engine, TorchWidenedEngine


def float_engines() -> list[Engine]:
    """The dense engines that multiply floating numbers."""
    return [TorchEngine(), TorchWidenedEngine(), OnnxRuntimeEngine(), OpenVinoEngine()]


def int8_engines() -> list[Engine]:
    """The dense engines with int8 weights and int8 activations, fp32 in and out."""
    return [
        TorchInt8Engine(),
        TorchInt8Engine("onednn"),
        OnnxRuntimeInt8Engine(),
        OpenVinoInt8Engine("static"),
        OpenVinoInt8Engine("dynamic"),
    ]


def given(engine: Engine, dtype: str) -> str:
    """What ``engine`` is given of a layer of ``dtype``, as its user would: that, or fp32 where it takes fp32 alone."""
    return dtype if engine.missing(dtype) is None or engine.missing("fp32") is not None else "fp32"


def dense_engines() -> list[Engine]:
    """All of them."""
    return [*float_engines(), *int8_engines()]
