"""What ``prune`` did, layer by layer: a table to read and a dictionary to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparsecomp.display import table
from sparsecomp.patterns import Pattern

_NAMES_PER_REASON = 3


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    ``density`` is the fraction of weights kept; ``error`` is relative, on the calibration Gram ("gram") or on the
    weight alone ("weight"), see ``PrunedWeight``.
    """

    name: str
    shape: tuple[int, int]
    pattern: Pattern
    method: str
    density: float
    error: float
    measured_on: Literal["gram", "weight"]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """This layer as JSON values; an error that is not finite is None."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "pattern": str(self.pattern),
            "method": self.method,
            "density": self.density,
            "error": self.error if math.isfinite(self.error) else None,
            "measured_on": self.measured_on,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class PruneReport:
    """All pruned layers by name, and the reason for each layer that was left dense."""

    method: str
    layers: Mapping[str, LayerReport]
    skipped: Mapping[str, str]

    @property
    def mean_error(self) -> float:
        """Geometric mean of the layer errors over the layers that changed; 0.0 if none did."""
        errors = [layer.error for layer in self.layers.values() if layer.error > 0.0]
        return math.exp(sum(math.log(error) for error in errors) / len(errors)) if errors else 0.0

    @property
    def density(self) -> float:
        """Fraction of all weights of the pruned layers that are kept."""
        sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in self.layers.items()}
        kept = sum(layer.density * sizes[name] for name, layer in self.layers.items())
        return kept / max(sum(sizes.values()), 1)

    @property
    def seconds(self) -> float:
        """Time spent on the layers."""
        return sum(layer.seconds for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "method": self.method,
            "mean_error": self.mean_error if math.isfinite(self.mean_error) else None,
            "density": self.density,
            "seconds": self.seconds,
            "layers": [layer.to_dict() for layer in self.layers.values()],
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        """The report as a table."""
        layers = list(self.layers.values())
        count = f"{len(layers)} layer" + ("s" if len(layers) != 1 else "")
        measures = {layer.measured_on for layer in layers}
        mixed = len(measures) > 1
        rows = [
            (
                layer.name or "(the model)",
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.pattern,
                f"{layer.density:.1%}",
                _error(layer.error) + ("*" if mixed and layer.measured_on == "weight" else ""),
                f"{layer.seconds:.2f}" if layer.seconds >= 0.005 else "<0.01",
            )
            for layer in layers
        ]
        columns = ("layer", ">out x in", "pattern", ">kept", ">error", ">seconds")
        lines = [table(columns, rows, title=f'Pruned {count} with "{self.method}"')]
        if layers:
            lines.append(
                f"In all: {self.density:.1%} of the weights kept, mean error {_error(self.mean_error)} (geometric), "
                f"{self.seconds:.1f} s"
            )
            lines.append(_LEGEND["mixed" if mixed else measures.pop()])
        if self.skipped:
            lines.append(_skipped(self.skipped))
        return "\n".join(lines)


_LEGEND = {
    "gram": "Error: ||(W-V)X|| / ||WX|| on the calibration data.",
    "weight": "Error: ||W-V|| / ||W|| of the weights alone; there were no calibration data.",
    "mixed": "Error: ||(W-V)X|| / ||WX|| on the calibration data; *: ||W-V|| / ||W||, not in the calibration.",
}


def _error(error: float) -> str:
    return "0" if error == 0.0 else f"{error:.4f}" if error >= 5e-4 else f"{error:.1e}"


def _skipped(skipped: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name or "(the model)")
    lines = [f"Left dense: {len(skipped)}"]
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMES_PER_REASON} more" if len(names) > _NAMES_PER_REASON else ""
        lines.append(f"  {', '.join(names[:_NAMES_PER_REASON])}{more}: {reason}")
    return "\n".join(lines)
