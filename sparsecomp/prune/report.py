"""What ``prune`` did, layer by layer: a table to read, JSON and CSV to keep, a page to look at."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sparsecomp.display import table
from sparsecomp.errors import FormatError
from sparsecomp.patterns import Pattern, parse
from sparsecomp.prune.tuning import TuningReport

_NAMES_PER_REASON = 3


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    ``density`` is the fraction of weights kept; ``error`` is relative, on the calibration Gram ("gram") or on the
    weight alone ("weight"), see ``PrunedWeight``; ``held_out_error`` is the same on data the method has not seen.
    ``permuted`` tells that its input channels were put into another order, with those of the layers before it;
    ``notes`` say what the method had to do unasked or did not reach.
    """

    name: str
    shape: tuple[int, int]
    pattern: Pattern
    method: str
    density: float
    error: float
    measured_on: Literal["gram", "weight"]
    seconds: float
    held_out_error: float | None = None
    permuted: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """The layer that ``to_dict`` told of."""
        facts = dict(values)
        facts["shape"] = tuple(facts["shape"])
        facts["notes"] = tuple(facts["notes"])
        facts["pattern"] = parse(facts["pattern"])
        facts["error"] = math.inf if facts["error"] is None else facts["error"]
        return cls(**facts)

    def to_dict(self) -> dict[str, Any]:
        """This layer as JSON values; an error that is not finite is None."""
        held_out = self.held_out_error
        return {
            "name": self.name,
            "shape": list(self.shape),
            "pattern": str(self.pattern),
            "method": self.method,
            "density": self.density,
            "error": self.error if math.isfinite(self.error) else None,
            "measured_on": self.measured_on,
            "seconds": self.seconds,
            "held_out_error": held_out if held_out is not None and math.isfinite(held_out) else None,
            "permuted": self.permuted,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Stage:
    """The state after a step of the work, in figures by name (such as "cosine"), and how long the step took."""

    name: str
    seconds: float
    figures: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class PruneReport:
    """All pruned layers by name, and the reason for each layer that was left dense.

    ``masks`` (bool [out, in], True = kept) are by layer name; ``unpermuted`` says for layers whose input channels a
    method wanted to reorder why that was not possible. ``tunings`` tell of blocks or the whole model, ``stages`` of
    what was measured after each step.
    """

    method: str
    layers: Mapping[str, LayerReport]
    skipped: Mapping[str, str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    unpermuted: Mapping[str, str] = field(default_factory=dict)
    tunings: Sequence[TuningReport] = ()
    stages: Sequence[Stage] = ()

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
        """The report as JSON values; figures that are not finite are None."""
        return {
            "method": self.method,
            "mean_error": self.mean_error if math.isfinite(self.mean_error) else None,
            "density": self.density,
            "seconds": self.seconds,
            "layers": [layer.to_dict() for layer in self.layers.values()],
            "skipped": dict(self.skipped),
            "unpermuted": dict(self.unpermuted),
            "tunings": [tuning.to_dict() for tuning in self.tunings],
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.seconds,
                    "figures": {name: value if math.isfinite(value) else None for name, value in stage.figures.items()},
                }
                for stage in self.stages
            ],
        }

    def to_csv(self) -> str:
        """One row a layer, with a header; the columns are the keys of ``LayerReport.to_dict``."""
        rows = [
            layer.to_dict() | {"shape": "x".join(map(str, layer.shape)), "notes": "; ".join(layer.notes)}
            for layer in self.layers.values()
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_html(self, title: str = "Pruning report") -> str:
        """One self-contained page: errors by layer, mask maps, kept positions and what each stage gained, as SVG."""
        from sparsecomp.prune.html import page

        return page(self, title)

    def save(self, path: str | Path) -> None:
        """Write the report as its suffix says: .json, .csv or .html. Raises FormatError for another suffix."""
        path = Path(path)
        match path.suffix:
            case ".json":
                text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
            case ".csv":
                text = self.to_csv()
            case ".html":
                text = self.to_html()
            case other:
                raise FormatError(f'a report is no "{other}" file; name it .json, .csv or .html')
        path.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        """The report as a table."""
        layers = list(self.layers.values())
        count = f"{len(layers)} layer" + ("s" if len(layers) != 1 else "")
        measures = {layer.measured_on for layer in layers}
        mixed = len(measures) > 1
        rows: list[list[object]] = [
            [
                layer.name or "(the model)",
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.pattern,
                f"{layer.density:.1%}",
                _error(layer.error) + ("*" if mixed and layer.measured_on == "weight" else ""),
                f"{layer.seconds:.2f}" if layer.seconds >= 0.005 else "<0.01",
            ]
            for layer in layers
        ]
        columns = ["layer", ">out x in", "pattern", ">kept", ">error", ">seconds"]
        if any(layer.held_out_error is not None for layer in layers):
            columns.insert(5, ">held out")
            for row, layer in zip(rows, layers, strict=True):
                row.insert(5, "" if layer.held_out_error is None else _error(layer.held_out_error))
        if any(layer.permuted for layer in layers):
            columns.append("permuted")
            for row, layer in zip(rows, layers, strict=True):
                row.append("yes" if layer.permuted else "")
        lines = [table(columns, rows, title=f'Pruned {count} with "{self.method}"')]
        if layers:
            lines.append(
                f"In all: {self.density:.1%} of the weights kept, mean error {_error(self.mean_error)} (geometric), "
                f"{self.seconds:.1f} s"
            )
            lines.append(_LEGEND["mixed" if mixed else measures.pop()])
        lines.extend(f"{layer.name}: {note}" for layer in layers for note in layer.notes)
        if self.skipped:
            lines.append(_by_reason("Left dense", self.skipped))
        if self.unpermuted:
            lines.append(_by_reason("Input channels not permuted", self.unpermuted))
        lines.extend(map(str, self.tunings))
        if self.stages:
            lines.append(self._stages())
        return "\n".join(lines)

    def _stages(self) -> str:
        figures = list(dict.fromkeys(name for stage in self.stages for name in stage.figures))
        rows = [
            [
                stage.name,
                *(f"{stage.figures[name]:.4f}" if name in stage.figures else "" for name in figures),
                f"{stage.seconds:.0f}",
            ]
            for stage in self.stages
        ]
        return table(["stage", *(f">{name}" for name in figures), ">seconds"], rows, title="Stage by stage")


_LEGEND = {
    "gram": "Error: ||(W-V)X|| / ||WX|| on the calibration data.",
    "weight": "Error: ||W-V|| / ||W|| of the weights alone; there were no calibration data.",
    "mixed": "Error: ||(W-V)X|| / ||WX|| on the calibration data; *: ||W-V|| / ||W||, not in the calibration.",
}


def _error(error: float) -> str:
    return "0" if error == 0.0 else f"{error:.4f}" if error >= 5e-4 else f"{error:.1e}"


def _by_reason(title: str, reasons: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name or "(the model)")
    lines = [f"{title}: {len(reasons)}"]
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMES_PER_REASON} more" if len(names) > _NAMES_PER_REASON else ""
        lines.append(f"  {', '.join(names[:_NAMES_PER_REASON])}{more}: {reason}")
    return "\n".join(lines)
