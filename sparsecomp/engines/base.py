"""What an engine is: it holds the weights of a layer in its own form and binds them to an input as a callable.

Several copies of a weight stand for a model whose layers come in turn. Knows no library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsecomp.patterns.numbers import FLOAT, Numbers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative Frobenius distance to float64 above which a figure would be the speed of something else. Of int8, rounding
# normal activations with one scale, to 7 bits as torch does, gives 0.025, and weights of 7 bits 0.017.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
_INT8_TOLERANCE = 4e-2
_LIBRARIES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


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
    """A way to compute y = x W^T + b. ``pattern`` is None for a dense engine, ``label`` names it in a result.

    ``numbers`` are those that it stores and multiplies: FLOAT is the dtype of the layer.
    """

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

    def computes(self, dtype: str) -> str:
        """The numbers that it multiplies in a layer of ``dtype``: "fp32", "bf16", or "int8" on both sides."""
        return dtype if self.numbers.activation_bits is None else f"int{self.numbers.activation_bits}"

    def title(self, dtype: str) -> str:
        """Its library and the numbers that it multiplies, as a report says them: "OpenVINO bf16"."""
        return titled(self.name) if self.numbers.has_scales else f"{titled(self.name)} {self.computes(dtype)}"

    def wrong(self, error: float, dtype: str) -> str:
        """The sentence on a product whose ``error`` exceeds the tolerance."""
        return (
            f"relative error {error:.2e} against float64, at most {self.tolerance(dtype):g} in {self.computes(dtype)}; "
            "its time would mean nothing"
        )

    def tolerance(self, dtype: str) -> float:
        """The relative Frobenius distance to the float product above which its product is wrong."""
        return _TOLERANCE[dtype] if self.numbers.activation_bits is None else _INT8_TOLERANCE


@dataclass(frozen=True, eq=False)
class Modules(Loaded):
    """torch modules, each with one copy of the weight, that take and give ``dtype``."""

    layers: Sequence[nn.Module]
    dtype: torch.dtype

    def bind(self, x: Tensor, threads: int, copies: int) -> Runner:
        """The modules called in turn; how many threads they use is set in torch."""
        layers, source = self.layers[:copies], x.to(self.dtype)

        def call() -> Tensor:
            for layer in layers:
                y = layer(source)
            return y  # type: ignore[no-any-return]

        return Runner(call=call, result=lambda: call().float())


def titled(name: str) -> str:
    """The name of an engine as a report says it: "ONNX Runtime int8" of "onnxruntime int8"."""
    library, _, rest = name.partition(" ")
    return f"{_LIBRARIES.get(library, library)} {rest}".rstrip()


def quantized(weight: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """int8 ``weight`` [out, in] with a symmetric float32 scale [out, 1] for each row, ``largest`` being its largest."""
    scales = weight.abs().amax(dim=1, keepdim=True) / largest
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (weight / scales).round_().to(torch.int8), scales
