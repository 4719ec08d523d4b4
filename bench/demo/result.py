"""What the demo found, as values: engines measured on one machine in one run, layers, and the same as JSON.

Takes figures, decides and draws nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.minilm import Quality
from sparsecomp.engines.timing import Timing

DENSE, INT8, SPARSE = "dense fp32", "dense int8", "sparse fp32"
OUR_INT8 = "int8 in our kernel"


@dataclass(frozen=True)
class Measured:
    """One engine: of which ``kind``, the bytes of the model's file, its agreement with the dense model, its times.

    ``what`` says how to get it; ``times`` are seconds of one forward pass by number of texts.
    """

    name: str
    kind: str
    what: str
    bytes: int
    quality: Quality
    times: Mapping[int, Timing]


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer: its weight [out, in], relative error, bytes; seconds and the bound by rows of x."""

    name: str
    shape: tuple[int, int]
    error: float
    dense_bytes: int
    bytes: int
    kernel: str
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, float]


@dataclass(frozen=True)
class DemoResult:
    """Everything the report says.

    ``machine`` and ``device`` say where it ran, ``stayed_dense`` which layers the planner would leave dense and why,
    ``missing`` which engines could not be measured and why. ``difference`` is the largest of an embedding's values to
    those of torch with the same weights, by engine. Bytes are of whole files or state dicts; ``integer_bytes`` those of
    the pruned layers alone, in each of our int8 files.
    """

    pattern: str
    method: str
    date: str
    machine: Mapping[str, Any]
    device: str
    threads: int
    calibration: str
    held_out: int
    tokens: int
    folder: str
    layers: Sequence[LayerRow]
    stayed_dense: Mapping[str, str]
    dense_bytes: int
    file_bytes: int
    engines: Sequence[Measured]
    difference: Mapping[str, float]
    missing: Mapping[str, str]
    seconds: float
    integer_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def batches(self) -> tuple[int, ...]:
        """The numbers of texts that were timed."""
        return tuple(self.engines[0].times)


def to_dict(result: DemoResult) -> dict[str, Any]:
    """The result as JSON values; times are in seconds."""
    return dataclasses.asdict(result)
