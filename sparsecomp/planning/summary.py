"""What a person reads about sparse layers: the explanation of one layer, the summary of a model.

Takes layers, bounds and measurements that exist or can be had, gives printable values. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsecomp.backends.choice import unpacks
from sparsecomp.backends.explain import BY_NAME, FASTEST
from sparsecomp.backends.registry import why_no_kernel
from sparsecomp.errors import ModelError
from sparsecomp.machine.bound import Bound, known_bounds
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import SPARSE, UNPACKED, Measurement
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns.numbers import FLOAT
from sparsecomp.planning import measure as measuring
from sparsecomp.planning.overview import Row, draw, grouped
from sparsecomp.reporting.terminal import by_reason, terminal_width


@dataclass(frozen=True)
class SummaryRow:
    """One linear layer of a model. Times are in seconds by batch, empty for a layer that stayed dense unmeasured.

    ``baseline`` names the dense product that ``dense`` is the time of, by batch. ``numbers`` are those of the weight,
    such as "int8@a8".
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    dtype: str
    dense_bytes: int
    bytes: int
    kernel: str
    why: str
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, Bound]
    baseline: Mapping[int, str] = field(default_factory=dict)
    numbers: str = str(FLOAT)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what was pickled before the baseline and the numbers were named."""
        self.__dict__.update({"baseline": {}, "numbers": str(FLOAT)} | state)


@dataclass(frozen=True)
class Summary:
    """Every sparse layer of a model with its bytes, times and bounds; ``str()`` is a table with totals.

    ``stayed_dense`` names the layers that could be sparse and are not, each with the reason.
    """

    device: Device
    batches: tuple[int, ...]
    rows: tuple[SummaryRow, ...]
    stayed_dense: Mapping[str, str]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights of all rows as dense matrices."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes the weights of all rows take now."""
        return sum(row.bytes for row in self.rows)

    def speedup(self, batch: int) -> float:
        """Time of all rows dense over their time as they are, one call each."""
        return sum(row.dense[batch] for row in self.rows) / sum(row.sparse[batch] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device.describe(),
            "batches": list(self.batches),
            "dense_bytes": self.dense_bytes,
            "bytes": self.bytes,
            "stayed_dense": dict(self.stayed_dense),
            "layers": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "pattern": row.pattern,
                    "numbers": row.numbers,
                    "dtype": row.dtype,
                    "dense_bytes": row.dense_bytes,
                    "bytes": row.bytes,
                    "kernel": row.kernel,
                    "why": row.why,
                    "dense_seconds": {str(batch): value for batch, value in row.dense.items()},
                    "baseline": {str(batch): way for batch, way in row.baseline.items()},
                    "sparse_seconds": {str(batch): value for batch, value in row.sparse.items()},
                    "bound": {str(batch): value.value for batch, value in row.bound.items()},
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        """``text()`` for the terminal."""
        return self.text()

    def text(self, width: int | None = None, every: bool = False) -> str:
        """A table with totals of at most ``width`` columns (None: the terminal's), then the layers that stayed dense.

        Layers that are packed and timed alike share a row, unless ``every`` asks for a row each.
        """
        width = width or terminal_width()
        rows = [_line(row) for row in self.rows]
        dense = {batch: sum(row.dense[batch] for row in self.rows) for batch in self.batches}
        sparse = {batch: sum(row.sparse[batch] for row in self.rows) for batch in self.batches}
        sizes = {"dtype": "", ">bytes dense": megabytes(self.dense_bytes), ">packed": megabytes(self.bytes)}
        total = Row(("total",), (0, 0), "", "", dense, sparse, {}, "one call of each layer", sizes)
        shown = rows if every else grouped(rows)
        drawn = draw(shown, self.batches, self.device.describe(), "pattern", width, total)
        sizes_told = f"weights: {megabytes(self.dense_bytes)} dense, {megabytes(self.bytes)} packed"
        return "\n".join([drawn, sizes_told, *by_reason("stayed dense", self.stayed_dense, width, every)])


def _line(row: SummaryRow) -> Row:
    sizes = {"dtype": row.dtype, ">bytes dense": megabytes(row.dense_bytes), ">packed": megabytes(row.bytes)}
    times = row.dense, row.sparse, row.bound
    runs = row.pattern if row.numbers == str(FLOAT) else f"{row.pattern}+{row.numbers}"
    return Row((row.name,), row.shape, runs, row.kernel, *times, row.why, sizes, row.baseline)


def summarise(model: nn.Module, batch: Sequence[int], stayed_dense: Mapping[str, str]) -> Summary:
    """Measure every sparse layer of ``model`` at these batch sizes (equal requests once; known ones not again).

    Raises ModelError for a model without sparse layers.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not layers:
        raise ModelError("the model has no sparse layer; make some with sparsecomp.compile")
    kinds = {layer.device.type for layer in layers.values()}
    if kinds - {"cpu", "cuda"} or len(kinds) > 1:
        raise ModelError(f"sparse layers are on {', '.join(sorted(kinds))}; move the model to one cpu or cuda device")
    devices = {str(layer.device): detect(str(layer.device)) for layer in layers.values()}
    rows = tuple(_row(name, layer, tuple(batch), devices[str(layer.device)]) for name, layer in layers.items())
    return Summary(next(iter(devices.values())), tuple(batch), rows, dict(stayed_dense))


def _row(name: str, layer: SparseLinear, batches: tuple[int, ...], device: Device) -> SummaryRow:
    shape = (layer.out_features, layer.in_features)
    facts = layer.pattern, shape, layer.dtype, str(layer.device)
    requests = {batch: Request(*facts, batch, layer.numbers) for batch in batches}
    backend = layer.kernel.backend
    measured = {batch: measuring.measure(each, backend=backend) for batch, each in requests.items()}
    return SummaryRow(
        name=name or "the model",
        shape=shape,
        pattern=str(layer.pattern),
        dtype=layer.numbers.in_words(layer.dtype),
        dense_bytes=shape[0] * shape[1] * layer.dtype.itemsize,
        bytes=layer.kernel.nbytes,
        kernel=backend,
        why=_why(layer),
        dense={batch: value.dense for batch, value in measured.items()},
        sparse={batch: taken_seconds(value, batch, layer.dense_above) for batch, value in measured.items()},
        bound=known_bounds(requests, device, {batch: not value.cold for batch, value in measured.items()}),
        baseline={batch: value.baseline(layer.dtype) for batch, value in measured.items()},
        numbers=str(layer.numbers),
    )


def _why(layer: SparseLinear) -> str:
    explanation = layer.explain()
    if layer.dense_above is not None:
        return f"dense product from {layer.dense_above} rows on"
    if explanation.reason in (BY_NAME, FASTEST):
        return explanation.reason
    if explanation.kernel != "dense":
        return "sparse kernel runs it"
    return f"no sparse kernel ({why_no_kernel(explanation.request)})"


def taken_seconds(measurement: Measurement, batch: int, dense_above: int | None) -> float:
    """Seconds of the way a layer with that ``dense_above`` goes at this batch."""
    unpacked = unpacks(dense_above, batch) and UNPACKED in measurement.seconds
    return measurement.seconds[UNPACKED if unpacked else SPARSE]


def megabytes(count: int) -> str:
    """A size as people read it, in KB or MB (powers of 1000)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"
