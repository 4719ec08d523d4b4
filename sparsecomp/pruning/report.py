"""What ``prune`` did, layer by layer: a table to read, JSON and CSV to keep, a page to look at."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sparsecomp.errors import FormatError
from sparsecomp.methods.registry import get_method, methods
from sparsecomp.models.calibration import ENOUGH_ROWS
from sparsecomp.patterns import Pattern
from sparsecomp.pruning.provenance import Provenance
from sparsecomp.pruning.tuning import TuningReport
from sparsecomp.reporting.codec import decoded, plain
from sparsecomp.reporting.figures import geometric_mean


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    ``density`` is the fraction of weights kept; ``error`` is relative, on the calibration Gram ("gram") or on the
    weight alone ("weight"), see ``PrunedWeight``; ``held_out_error`` is the same on data the method has not seen.
    ``permuted`` tells that its input channels were put into another order, with those of the layers before it;
    ``notes`` say what the method had to do unasked or did not reach. ``rows`` are the input rows in the Gram.
    ``runs_dense`` tells of a convolution that no sparse product runs; the ``shape`` of one is [out, kh*kw*in].
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
    rows: int | None = None
    runs_dense: bool = False

    @property
    def rows_per_input(self) -> float | None:
        """Rows of the Gram for each input of the layer; None if they are not known."""
        return None if self.rows is None else self.rows / max(self.shape[1], 1)

    @property
    def few_rows(self) -> bool:
        """Whether the method looked at so few rows that it can have fitted them, and its error with them."""
        ratio = self.rows_per_input
        if ratio is None or self.measured_on != "gram" or ratio >= ENOUGH_ROWS:
            return False
        return self.method not in methods() or get_method(self.method).needs_gram

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """The layer that ``to_dict`` told of."""
        if values["error"] is not None:
            found: LayerReport = decoded(cls, values)
            return found
        finite: LayerReport = decoded(cls, {**values, "error": 0.0})
        return replace(finite, error=math.inf)

    def to_dict(self) -> dict[str, Any]:
        """This layer as JSON values; an error that is not finite is None."""
        facts: dict[str, Any] = plain(self)
        return facts


@dataclass(frozen=True)
class Stage:
    """The state after a step of the work, in figures by name (such as "cosine"), and how long the step took."""

    name: str
    seconds: float
    figures: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class PruneReport:
    """All pruned layers by name, and the reason for each layer that was left dense.

    ``masks`` (bool [out, in], True = kept) are by layer name, those of convolutions [out, kh*kw*in] with the input
    channels of each kernel position side by side; ``unpermuted`` says for layers whose input channels a
    method wanted to reorder why that was not possible. ``tunings`` tell of blocks or the whole model, ``stages`` of
    what was measured after each step, ``provenance`` of where all this comes from.
    """

    method: str
    layers: Mapping[str, LayerReport]
    skipped: Mapping[str, str]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    unpermuted: Mapping[str, str] = field(default_factory=dict)
    tunings: Sequence[TuningReport] = ()
    stages: Sequence[Stage] = ()
    provenance: Provenance | None = None

    @property
    def mean_error(self) -> float:
        """Geometric mean of the layer errors over the layers that changed; 0.0 if none did."""
        return geometric_mean(layer.error for layer in self.layers.values())

    @property
    def mean_held_out_error(self) -> float | None:
        """The same of the held-out errors, over the layers that have one; None if none has."""
        errors = [layer.held_out_error for layer in self.layers.values() if layer.held_out_error is not None]
        return geometric_mean(errors) if errors else None

    @property
    def weights(self) -> int:
        """Weights of the pruned layers, those that became zero included."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def density(self) -> float:
        """Fraction of all weights of the pruned layers that are kept."""
        kept = sum(layer.density * layer.shape[0] * layer.shape[1] for layer in self.layers.values())
        return kept / max(self.weights, 1)

    @property
    def seconds(self) -> float:
        """Time spent on the layers."""
        return sum(layer.seconds for layer in self.layers.values())

    @property
    def patterns(self) -> tuple[str, ...]:
        """Names of the patterns, in the order in which layers have them."""
        return tuple(dict.fromkeys(str(layer.pattern) for layer in self.layers.values()))

    def with_command(
        self,
        command: Sequence[str],
        *,
        data: str | None = None,
        batches: int | None = None,
        held_out_batches: int | None = None,
    ) -> PruneReport:
        """This report with the command line that made it, and what it knows of its data; see ``Provenance``.

        A report without provenance stays as it is.
        """
        if self.provenance is None:
            return self
        told = self.provenance.with_command(command, data=data, batches=batches, held_out_batches=held_out_batches)
        return replace(self, provenance=told)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; figures that are not finite are None."""
        return {
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
            "method": self.method,
            "patterns": list(self.patterns),
            "mean_error": plain(self.mean_error),
            "mean_held_out_error": plain(self.mean_held_out_error),
            "weights": self.weights,
            "density": self.density,
            "seconds": self.seconds,
            "layers": [layer.to_dict() for layer in self.layers.values()],
            "skipped": dict(self.skipped),
            "unpermuted": dict(self.unpermuted),
            "tunings": [tuning.to_dict() for tuning in self.tunings],
            "stages": plain(self.stages),
        }

    def to_csv(self) -> str:
        """One row a layer, with a header: the keys of ``LayerReport.to_dict``, then the same provenance in each row."""
        told = {} if self.provenance is None else self.provenance.flat()
        rows = [
            layer.to_dict() | {"shape": "x".join(map(str, layer.shape)), "notes": "; ".join(layer.notes)} | told
            for layer in self.layers.values()
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*LayerReport.__dataclass_fields__, *told], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_html(self, title: str | None = None) -> str:
        """One self-contained page: verdict, totals, definitions, a table to sort and filter, and charts as SVG.

        ``title`` stands above it; by default the model and what was done to it.
        """
        from sparsecomp.pruning.page import page

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
        """The report as a table that fits the terminal, and sentences."""
        from sparsecomp.pruning.text import render

        return render(self)
