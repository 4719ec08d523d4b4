"""What a person reads about sparse layers: the explanation of one layer, the summary of a model.

Takes layers, bounds and measurements that exist or can be had, gives printable values. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsecomp import cost, tune
from sparsecomp.backends import registry
from sparsecomp.backends.cuda import uncertified
from sparsecomp.backends.registry import Kernel, Request
from sparsecomp.cost import Bound
from sparsecomp.device import Device, detect
from sparsecomp.display import by_reason, terminal_width
from sparsecomp.errors import ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.overview import Row, draw, grouped, microseconds
from sparsecomp.patterns import Block
from sparsecomp.tune import DENSE, SPARSE, UNPACKED, Measurement

_BY_NAME = "asked for by name"
_FASTEST = "the fastest of the backends that run it, measured when the model was planned"


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs a request, and why; ``str()`` is for people.

    ``seconds`` holds what was measured on this machine before, by candidate, or None. ``rejected`` names every other
    backend with the reason. ``epilogue`` says how an activation is applied, if the layer has one; ``notes`` are what
    else should be known. ``bound`` is None where the peaks of the device could not be measured.
    """

    request: Request
    kernel: str
    reason: str
    bound: Bound | None
    seconds: Mapping[str, float] | None
    rejected: tuple[tuple[str, str], ...]
    epilogue: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Some lines: the request, the kernel, the bound, the times, the rejected."""
        out, columns = self.request.shape
        weights = ", int8 weights," if self.request.quantized else ""
        lines = [
            f"{out}x{columns} {self.request.pattern} {self.request.dtype}{weights} on {self.request.device}, "
            f"batch {self.request.batch}",
            f"  kernel    {self.kernel}: {self.reason}",
        ]
        if self.epilogue:
            lines.append(f"  epilogue  {self.epilogue}")
        if self.bound is not None:
            lines.append(f"  bound     {self.bound} over dense, on the measured peaks of this machine")
        if self.seconds is None:
            lines.append("  measured  not yet on this machine; sparsecomp.compiler.summary measures it")
        else:
            times = ", ".join(f"{name} {microseconds(value)}" for name, value in self.seconds.items())
            lines.append(f"  measured  {times}")
        lines += [f"  note      {note}" for note in self.notes]
        lines += [f"  rejected  {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def explain_kernel(
    kernel: Kernel,
    batch: int,
    dense_above: int | None,
    wanted: str | None,
    activation: str = "none",
    preferred: str | None = None,
) -> Explanation:
    """Why ``kernel`` runs a batch of that many rows.

    ``wanted`` is the backend a user pinned, ``preferred`` the one that a plan found the fastest, if any.
    """
    if not isinstance(batch, int) or batch < 0:
        raise ModelError(f"batch={batch!r} is not a number of rows; use 0 or more")
    device = str(kernel.tensors[0].device)
    request = Request(kernel.pattern, kernel.shape, kernel.dtype, device, batch, kernel.quantized)
    if device == "meta":
        return Explanation(request, "none", "the layer is on the meta device and has no values", None, None, ())
    answers = {**dict(registry.explain(request)), **dict(kernel.refused)}
    chosen = kernel.backend
    if wanted is not None:
        reason = _BY_NAME
    elif dense_above is not None and batch >= dense_above:
        reason = f"from {dense_above} rows on, unpacking the weight and a dense product was measured to be faster"
    elif chosen == preferred:
        reason = _FASTEST
    else:
        reason = "the first backend, in order of preference, that runs this request"
    runs = "runs it too"
    if wanted is None:
        after = f"comes after {chosen} in the order of preference"
        runs += f", {'was not the fastest' if chosen == preferred else after}"
    rejected = tuple((name, why or runs) for name, why in answers.items() if name != chosen)
    where = detect(device)
    known = tune.lookup(request, where, forced(request, chosen))
    limit = cost.known_bound(request, where, warm=known is None or not known.cold)
    epilogue = ""
    if activation != "none":
        unpacks = dense_above is not None and batch >= dense_above
        fused = registry.backends()[chosen].fuses_activations and not unpacks
        epilogue = f"{activation}, {'inside the kernel' if fused else 'by torch, after the product'}"
    seconds = None if known is None else dict(known.seconds)
    notes: list[str] = []
    if where.kind == "cuda" and not registry.backends()[chosen].of_a_vendor:
        notes += filter(None, [uncertified(device)])
    if limit is None:
        notes.append("the bound is unknown: measuring the peaks of the device needs more memory than is free")
    return Explanation(request, chosen, reason, limit, seconds, rejected, epilogue, tuple(notes))


@dataclass(frozen=True)
class SummaryRow:
    """One linear layer of a model. Times are in seconds by batch, empty for a layer that stayed dense unmeasured."""

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
                    "dtype": row.dtype,
                    "dense_bytes": row.dense_bytes,
                    "bytes": row.bytes,
                    "kernel": row.kernel,
                    "why": row.why,
                    "dense_seconds": {str(batch): value for batch, value in row.dense.items()},
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
    return Row((row.name,), row.shape, row.pattern, row.kernel, *times, row.why, sizes)


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
    requests = {batch: Request(*facts, batch, layer.quantized) for batch in batches}
    backend = layer.kernel.backend
    measured = {batch: tune.measure(each, backend=forced(each, backend)) for batch, each in requests.items()}
    return SummaryRow(
        name=name or "the model",
        shape=shape,
        pattern=str(layer.pattern),
        dtype=("int8 weights, " if layer.quantized else "") + str(layer.dtype).removeprefix("torch."),
        dense_bytes=shape[0] * shape[1] * layer.dtype.itemsize,
        bytes=layer.kernel.nbytes,
        kernel=backend,
        why=_why(layer),
        dense={batch: value.seconds[DENSE] for batch, value in measured.items()},
        sparse={batch: taken_seconds(value, batch, layer.dense_above) for batch, value in measured.items()},
        bound=cost.known_bounds(requests, device, {batch: not value.cold for batch, value in measured.items()}),
    )


def _why(layer: SparseLinear) -> str:
    explanation = layer.explain()
    if layer.dense_above is not None:
        return f"dense product from {layer.dense_above} rows on"
    if explanation.reason in (_BY_NAME, _FASTEST):
        return explanation.reason
    if explanation.kernel != "dense":
        return "sparse kernel runs it"
    return f"no sparse kernel ({why_no_kernel(explanation.request)})"


def forced(request: Request, backend: str) -> str | None:
    """That backend where it is another than the one that would be chosen, so that its own times are looked at."""
    return None if registry.choose(request) == backend else backend


def why_no_kernel(request: Request) -> str:
    """The name and the reason of the backend that comes nearest to running a request which none runs sparse."""
    on_gpu = "triton_block" if isinstance(request.pattern, Block) else "triton"
    name = "cpu" if torch.device(request.device).type == "cpu" else on_gpu
    return f"{name}: {dict(registry.explain(request))[name]}"


def taken_seconds(measurement: Measurement, batch: int, dense_above: int | None) -> float:
    """Seconds of the way a layer with that ``dense_above`` goes at this batch."""
    unpacks = dense_above is not None and batch >= dense_above
    return measurement.seconds[UNPACKED if unpacks and UNPACKED in measurement.seconds else SPARSE]


def megabytes(count: int) -> str:
    """A size as people read it, in KB or MB (powers of 1000)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"
