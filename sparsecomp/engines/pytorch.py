"""torch as an engine: nn.Linear in the dtype of the layer, and torch's own dynamic quantisation of it to int8."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsecomp.engines.base import DTYPES, Engine, Loaded, Modules, Operands
from sparsecomp.patterns.numbers import INT8_A8

# torch's names for what multiplies int8: "x86" chooses between the libraries behind the other two
_FIRST = ("x86", "fbgemm", "qnnpack")


def linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with this weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


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
        return Modules([linear(weight, operands.bias, dtype) for weight in operands.weights], dtype)


class TorchWidenedEngine(TorchEngine):
    """torch.nn.Linear in fp32 in a layer of less, with x and y converted in the call."""

    name = "torch fp32"

    def missing(self, dtype: str) -> str | None:
        """A layer in fp32 is torch's own already."""
        return None if dtype != "fp32" else "a layer in fp32 has nothing to convert"

    def computes(self, dtype: str) -> str:
        """Always "fp32"."""
        return "fp32"

    def title(self, dtype: str) -> str:
        """Always "torch fp32"."""
        return self.name

    def load(self, operands: Operands) -> Loaded:
        """One nn.Linear in fp32 for each copy."""
        dtype = DTYPES[operands.dtype]
        layers = [linear(weight, operands.bias, torch.float32) for weight in operands.weights]
        return Modules([_Widened(layer, dtype) for layer in layers], dtype)


class _Widened(nn.Module):
    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float())
        return y.to(self.dtype)


class TorchInt8Engine(Engine):
    """torch's dynamic quantisation: int8 weights with row scales, activations rounded with one scale in each call."""

    openmp = True
    numbers = INT8_A8

    def __init__(self, library: str | None = None) -> None:
        """``library`` is torch's name of what multiplies, None for the one that torch takes by itself."""
        self.name = "torch int8" if library is None else f"torch int8 {library}"
        self._library = library

    def missing(self, dtype: str) -> str | None:
        """Why it cannot run, if it cannot."""
        if not hasattr(getattr(torch.ao, "quantization", None), "quantize_dynamic"):
            return f"torch {torch.__version__} has no torch.ao.quantization.quantize_dynamic; it was there in 2.13"
        if self._chosen() is None:
            return f"torch was built without {self._library or 'a library that multiplies int8'}"
        return None if dtype == "fp32" else "it takes and gives fp32"

    def load(self, operands: Operands) -> Loaded:
        """Each copy quantised as ``quantize_dynamic`` does it with a scale for each row."""
        ao = torch.ao.quantization
        layers = nn.Sequential(*(linear(weight, operands.bias, torch.float32) for weight in operands.weights))
        with _library(str(self._chosen())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            made = ao.quantize_dynamic(layers, {nn.Linear: ao.per_channel_dynamic_qconfig}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        return Modules(list(made), torch.float32)

    def _chosen(self) -> str | None:
        built = torch.backends.quantized.supported_engines
        wanted = _FIRST if self._library is None else (self._library,)
        return next((each for each in wanted if each in built), None)


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Weights are packed for the library that is set meanwhile, and stay with it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
