"""A plan as a value: what happens to each layer of a model and why, as text, as JSON values and as a file.

Decides nothing and measures nothing; ``sparsecomp.plan`` makes it, ``sparsecomp.compile`` and ``prune`` follow it.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import FormatError
from sparsecomp.machine.bound import Bound
from sparsecomp.machine.device import Device
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import FLOAT
from sparsecomp.planning.beside import Beside, draw_beside
from sparsecomp.planning.overview import Row, draw, grouped
from sparsecomp.reporting.codec import decoded, plain
from sparsecomp.reporting.figures import microseconds
from sparsecomp.reporting.terminal import by_reason, counted, listed, terminal_width, wrap
from sparsecomp.reporting.writing import require_folder, whole_file

PLAN_VERSION = 1
_ERROR = (
    "error: relative, of the layer's output, after a plain pruning by magnitude (by Wanda where there was a "
    "calibration), whatever method prunes it"
)
ASSUMED = (
    "no calibration tells of the inputs, which are taken to be normally distributed: outliers, which integers serve "
    "badly, are not seen"
)
_AGAIN = 'make it again with sparsecomp.plan(...).save(path) or "sparsecomp plan ... --output FILE"'


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer. ``choice`` is how it runs sparse, None where it stays dense; ``reason`` says why.

    Times in seconds by batch, dense and with ``tried``, the choice that was decided about, by the fastest of the
    backends that run it; empty where nothing was measured, and None where nothing could be tried. ``dense`` is the
    fastest of ``dense_ways``, the dense products of this process by name ("torch bf16", "torch fp32"), that of the
    layer as it is first. ``others`` are the sparse seconds of the other backends by batch, ``engines`` dense ones of
    other libraries where they were asked for. ``error`` is the relative layer error where ``max_error`` asked for
    it: of a plain pruning to the pattern, by magnitude or, with a calibration, by Wanda, whatever method prunes later.
    ``rounding`` is how far the integers of ``tried`` move the layer's output on calibration inputs, relative to it;
    None of floats and where nothing was calibrated.
    """

    name: str
    shape: tuple[int, int]
    choice: Choice | None
    reason: str
    tried: Choice | None
    dense: Mapping[int, float]
    sparse: Mapping[int, float]
    bound: Mapping[int, Bound]
    error: float | None = None
    others: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    rounding: float | None = None
    dense_ways: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    engines: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def baseline(self) -> Mapping[int, str]:
        """The dense product that ``dense`` is the time of, by batch; "torch" in a plan of before it was kept."""
        ways = self.dense_ways
        named = {batch: [way for way in ways if batch in ways[way]] for batch in self.dense}
        return {
            batch: min(known, key=lambda way, at=batch: ways[way][at], default="torch")  # type: ignore[misc]
            for batch, known in named.items()
        }

    @property
    def planned(self) -> Mapping[int, float]:
        """Seconds as planned by batch: of the sparse layer, or of the dense one as it is, in its own dtype."""
        if self.choice is not None:
            return self.sparse
        own = next(iter(self.dense_ways.values()), self.dense)
        return {batch: own.get(batch, seconds) for batch, seconds in self.dense.items() if batch in self.sparse}

    @property
    def runs(self) -> str:
        """What it runs in, for a table: its pattern and numbers, or "dense"."""
        return "dense" if self.choice is None else self.choice.weights

    @property
    def pattern(self) -> Pattern | None:
        """The pattern in which the layer goes sparse, None where it stays dense."""
        return None if self.choice is None else self.choice.pattern

    @property
    def backend(self) -> str | None:
        """The backend of the choice, or that which was tried; None where there is none."""
        chosen = self.choice or self.tried
        return None if chosen is None else chosen.backend

    @property
    def dense_above(self) -> int | None:
        """Rows from which the sparse layer unpacks its weight for a dense product, or None."""
        return None if self.choice is None else self.choice.dense_above

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what was pickled before a layer's plan held a choice, or further dense products."""
        if "choice" not in state:
            state = dict(state)
            pattern, tried, backend = state.pop("pattern"), state.pop("tried"), state.pop("backend", None)
            above = state.pop("dense_above", None)
            state["choice"] = None if pattern is None else Choice(pattern, FLOAT, backend, above)
            state["tried"] = None if tried is None else Choice(tried, FLOAT, backend, above)
        self.__dict__.update({"rounding": None, "dense_ways": {}, "engines": {}} | state)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the layer") -> LayerPlan:
        """The layer that ``to_dict`` told of. Raises FormatError for what it never tells."""
        keys = {"dense": "dense_seconds", "sparse": "sparse_seconds", "others": "other_backends", "bound": "limits"}
        if "pattern" not in values:  # null says that the layer stays dense
            raise FormatError(f'{where} has no "pattern"')
        found: LayerPlan = decoded(cls, {**values, "choice": None}, where, keys)
        found._require_times(where)
        return found if values["pattern"] is None else replace(found, choice=decoded(Choice, values, where))

    def _require_times(self, where: str) -> None:
        """FormatError for times that nothing takes, and for batches with a sparse time and no dense one."""
        dense = {**self.dense_ways, **self.engines}
        for what, times in {"dense_seconds": self.dense, "sparse_seconds": self.sparse, **self.others, **dense}.items():
            for batch, seconds in times.items():
                if seconds <= 0:
                    raise FormatError(f"{where} takes {seconds!r} seconds at batch {batch} ({what}), where more belong")
        if lacking := sorted(self.sparse.keys() - self.dense.keys()):
            raise FormatError(f"{where} has sparse_seconds of batch {lacking[0]}, and no dense_seconds of it")

    def to_dict(self) -> dict[str, Any]:
        """This layer as JSON values. The choice is ``pattern`` (null where it stays dense), ``backend``, ..."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "pattern": None if self.choice is None else str(self.choice.pattern),
            "numbers": None if self.choice is None else str(self.choice.numbers),
            "backend": self.backend,
            "reason": self.reason,
            "dense_seconds": plain(self.dense),
            "sparse_seconds": plain(self.sparse),
            "other_backends": plain(self.others),
            "baseline": plain(self.baseline),
            "dense_ways": plain(self.dense_ways),
            "engines": plain(self.engines),
            "bound": {str(batch): limit.value for batch, limit in self.bound.items()},
            "dense_above": self.dense_above,
            "error": self.error,
            "rounding": self.rounding,
            "pinned": self.choice is not None and self.choice.pinned,
            "tried": plain(self.tried),
            "limits": plain(self.bound),
        }

    @property
    def speedup(self) -> Mapping[int, float]:
        """Dense time over sparse time by batch."""
        return {batch: self.dense[batch] / self.sparse[batch] for batch in self.sparse}


@dataclass(frozen=True)
class Plan:
    """Decisions for every layer that could be sparse, in the order of the model; the layers left out, with reasons.

    ``weights`` counts the elements of all parameters of the model, None if they were not counted. ``engines_missing``
    are the other dense engines that were asked for and gave no times, each with the reason.
    """

    device: Device
    batches: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    weights: int | None = None
    engines_missing: Mapping[str, str] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what was pickled before other engines were measured."""
        self.__dict__.update({"engines_missing": {}} | state)

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
        """JSON values, all of the plan: ``from_dict`` gives it back."""
        return {
            "plan_version": PLAN_VERSION,
            "device": self.device.describe(),
            "machine": plain(self.device),
            "batches": list(self.batches),
            "weights": self.weights,
            "skipped": dict(self.skipped),
            "engines_missing": dict(self.engines_missing),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` told of, also where other keys were added.

        Raises FormatError for what is no plan, one of another version, and one with entries that no plan has.
        """
        version = values.get("plan_version") if isinstance(values, Mapping) else None
        if version is None:
            raise FormatError(f"this is no plan, for it has no plan_version; {_AGAIN}")
        if version != PLAN_VERSION:
            raise FormatError(f"this plan has version {version!r}, and this package reads {PLAN_VERSION}; {_AGAIN}")
        layers = values.get("layers")
        if not isinstance(layers, list) or not all(isinstance(each, Mapping) for each in layers):
            raise FormatError(f"this plan has no list of layers; {_AGAIN}")
        try:
            made = tuple(LayerPlan.from_dict(each, f"layers[{i}]") for i, each in enumerate(layers))
            found: Plan = decoded(cls, {**values, "layers": []}, keys={"device": "machine"})
        except FormatError as error:
            raise FormatError(f"{error}; {_AGAIN}") from error
        if twice := [name for name, count in Counter(each.name for each in made).items() if count > 1]:
            raise FormatError(f'this plan decides layer "{twice[0]}" twice; {_AGAIN}')
        return replace(found, layers=made)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all. Raises FormatError where it cannot be written."""
        path = Path(path)
        require_folder(path)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan that ``save`` or ``sparsecomp plan --output`` wrote.

        Raises FormatError for a file that cannot be read, and as ``from_dict``.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else f"it is no JSON: {error}"
            raise FormatError(f'the plan "{path}" cannot be read ({why}); {_AGAIN}') from error
        try:
            return cls.from_dict(values)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error

    def totals(self) -> dict[str, Any]:
        """The whole model in figures: the share of its weights that goes sparse, and the times of all layers by batch.

        ``share`` is None where the model's weights were not counted. ``torch_seconds`` sums one dense call of each
        decided layer, by its ``baseline``, ``planned_seconds`` the same calls as planned; layers that were not measured
        are in neither.
        """
        sparse = sum(layer.shape[0] * layer.shape[1] for layer in self.sparse.values())
        known = {batch: [layer for layer in self.layers if batch in layer.sparse] for batch in self.batches}
        dense = {str(batch): sum(layer.dense[batch] for layer in known[batch]) for batch in self.batches}
        planned = {str(batch): sum(layer.planned[batch] for layer in known[batch]) for batch in self.batches}
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
        """Tables and sentences of at most ``width`` columns (None: the terminal's), "torch fp32" being its dense layer.

        Layers that are decided and timed alike share a row, unless ``every`` asks for a row each.
        """
        width = width or terminal_width()
        rows = [_row(layer) for layer in self.layers]
        drawn = draw(rows if every else grouped(rows), self.batches, self.device.describe(), "runs", width, None)
        errors = [wrap(_ERROR, width)] if any(layer.error is not None for layer in self.layers) else []
        errors += [wrap(sentence, width) for sentence in _rounding(self.layers)]
        others = [Beside((each.name,), each.runs, each.planned, each.engines) for each in self.layers]
        beside = draw_beside(others, self.batches, self.engines_missing, width, every)
        skipped = by_reason("skipped", self.skipped, width, every)
        return "\n".join([drawn, *errors, *skipped, *self._sums(width), *beside])

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
                named = " or ".join(sorted({each.baseline[batch] for each in self.layers if batch in each.sparse}))
                times = f"{microseconds(dense)} in dense {named}, {microseconds(planned)} as planned"
                ratio = f"{dense / planned:.2f}x (one call of each; the rest of the model is not in it)"
                lines.append(f"batch {batch}: these layers take {times}, {ratio}")
        return [wrap(line, width) for line in lines]


def _rounding(layers: Sequence[LayerPlan]) -> Iterator[str]:
    """What is known of layers that round, in sentences."""
    known: dict[str, float] = {}
    assumed: list[str] = []
    for layer in layers:
        if layer.choice is None or not layer.choice.numbers.has_scales:
            continue
        if layer.rounding is not None:
            known[layer.name] = layer.rounding
        elif layer.choice.numbers.activation_bits is not None:
            assumed.append(layer.name)
    if known:
        worst = max(known, key=lambda name: known[name])
        yield (
            f"integers move the output of a layer by {statistics.mean(known.values()):.1%} in the mean and "
            f'{known[worst]:.1%} at most ("{worst}"), on calibration inputs'
        )
    if assumed:
        yield f"{listed(assumed)}: {ASSUMED}"


def _row(layer: LayerPlan) -> Row:
    error = {} if layer.error is None else {">error": f"{layer.error:.3f}"}
    facts = layer.dense, layer.sparse, layer.bound
    return Row(
        (layer.name,),
        layer.shape,
        layer.runs,
        layer.backend or "",
        *facts,
        layer.reason,
        error,
        layer.baseline,
    )
