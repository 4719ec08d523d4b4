"""A plan as a value: what happens to each layer of a model and why, as text and as JSON values.

Decides nothing and measures nothing; ``sparsecomp.plan`` makes it, ``sparsecomp.compile`` and ``prune`` follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsecomp.machine.bound import Bound
from sparsecomp.machine.device import Device
from sparsecomp.patterns import Pattern
from sparsecomp.planning.overview import Row, draw, grouped
from sparsecomp.reporting.figures import microseconds
from sparsecomp.reporting.terminal import by_reason, counted, terminal_width, wrap


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer. ``pattern`` is None where it stays dense, with the ``reason`` in words.

    Times in seconds by batch, dense and with ``tried``, the pattern of the decision; empty where nothing was measured.
    ``dense_above`` is the batch from which the sparse layer unpacks its weight for a dense product, or None. ``error``
    is the relative layer error of a plain pruning to ``tried``, where ``max_error`` asked for it. ``backend`` is the
    fastest of those that run it, None where there is none; ``others`` are the sparse seconds of the rest by batch.
    """

    name: str
    shape: tuple[int, int]
    pattern: Pattern | None
    reason: str
    tried: Pattern | None
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, Bound]
    dense_above: int | None = None
    error: float | None = None
    backend: str | None = None
    others: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def speedup(self) -> Mapping[int, float]:
        """Dense time over sparse time by batch."""
        return {batch: self.dense[batch] / self.sparse[batch] for batch in self.sparse}


@dataclass(frozen=True)
class Plan:
    """Decisions for every layer that could be sparse, in the order of the model; the layers left out, with reasons.

    ``weights`` counts the elements of all parameters of the model, None if they were not counted.
    """

    device: Device
    batches: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    weights: int | None = None

    def __getitem__(self, name: str) -> LayerPlan:
        """The decision for the layer of that name; KeyError if the plan has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[LayerPlan]:
        """Decisions in the order of the model."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers were decided."""
        return len(self.layers)

    @property
    def sparse(self) -> Mapping[str, LayerPlan]:
        """The layers that go sparse, by name."""
        return {layer.name: layer for layer in self.layers if layer.pattern is not None}

    @property
    def stayed_dense(self) -> Mapping[str, str]:
        """The layers that stay dense, by name, each with the reason."""
        return {layer.name: layer.reason for layer in self.layers if layer.pattern is None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device.describe(),
            "batches": list(self.batches),
            "skipped": dict(self.skipped),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "pattern": None if layer.pattern is None else str(layer.pattern),
                    "backend": layer.backend,
                    "reason": layer.reason,
                    "dense_seconds": {str(batch): value for batch, value in layer.dense.items()},
                    "sparse_seconds": {str(batch): value for batch, value in layer.sparse.items()},
                    "other_backends": {
                        name: {str(batch): value for batch, value in seconds.items()}
                        for name, seconds in layer.others.items()
                    },
                    "bound": {str(batch): value.value for batch, value in layer.bound.items()},
                    "dense_above": layer.dense_above,
                    "error": layer.error,
                }
                for layer in self.layers
            ],
        }

    def totals(self) -> dict[str, Any]:
        """The whole model in figures: the share of its weights that goes sparse, and the times of all layers by batch.

        ``share`` is None where the model's weights were not counted. ``torch_seconds`` sums one dense call of each
        decided layer, ``planned_seconds`` the same calls as planned; layers that were not measured are in neither.
        """
        sparse = sum(layer.shape[0] * layer.shape[1] for layer in self.sparse.values())
        known = {batch: [layer for layer in self.layers if batch in layer.sparse] for batch in self.batches}
        dense = {str(batch): sum(layer.dense[batch] for layer in known[batch]) for batch in self.batches}
        planned = {
            str(batch): sum((layer.dense if layer.pattern is None else layer.sparse)[batch] for layer in known[batch])
            for batch in self.batches
        }
        return {
            "layers": len(self.layers),
            "sparse_layers": len(self.sparse),
            "sparse_weights": sparse,
            "weights": self.weights,
            "share": sparse / self.weights if self.weights else None,
            "torch_seconds": dense,
            "planned_seconds": planned,
        }

    def __str__(self) -> str:
        """``text()`` for the terminal."""
        return self.text()

    def text(self, width: int | None = None, every: bool = False) -> str:
        """Tables and sentences of at most ``width`` columns (None: the terminal's), "torch" being dense torch.

        Layers that are decided and timed alike share a row, unless ``every`` asks for a row each.
        """
        width = width or terminal_width()
        rows = [_row(layer) for layer in self.layers]
        drawn = draw(rows if every else grouped(rows), self.batches, self.device.describe(), "runs", width, None)
        return "\n".join([drawn, *by_reason("skipped", self.skipped, width, every), *self._sums(width)])

    def _sums(self, width: int) -> list[str]:
        if not self.layers:
            return []
        totals = self.totals()
        some, every = totals["sparse_layers"], counted(totals["layers"], "layer")
        share = (
            f", which hold {totals['share']:.1%} of the model's weights" if some and totals["share"] is not None else ""
        )
        lines = [f"in all: {some or 'none'} of {every} {'goes' if some < 2 else 'go'} sparse{share}"]
        for batch in self.batches:
            dense, planned = totals["torch_seconds"][str(batch)], totals["planned_seconds"][str(batch)]
            if planned:
                times = f"{microseconds(dense)} in dense torch, {microseconds(planned)} as planned"
                ratio = f"{dense / planned:.2f}x (one call of each; the rest of the model is not in it)"
                lines.append(f"batch {batch}: these layers take {times}, {ratio}")
        return [wrap(line, width) for line in lines]


def _row(layer: LayerPlan) -> Row:
    error = {} if layer.error is None else {">error": f"{layer.error:.3f}"}
    facts = layer.dense, layer.sparse, layer.bound
    return Row(
        (layer.name,), layer.shape, str(layer.pattern or "dense"), layer.backend or "", *facts, layer.reason, error
    )
