"""The state of a training in tensors and plain values, and back, bit for bit.

Takes a rule, layers and progress. Knows no hooks; model and optimizer are saved by their owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsecomp.errors import ModelError
from sparsecomp.patterns.numbers import weights_name
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules import Progress, Rule

_PARTS = frozenset(("method", "step", "steps", "layers", "extra", "generator"))


def saved(rule: Rule, progress: Progress) -> dict[str, Any]:
    """All that the model and the optimizer do not hold; copies."""
    return {
        "method": rule.name,
        "step": progress.step,
        "steps": progress.steps,
        "layers": {each.name: _of_layer(each) for each in progress.layers},
        "extra": {key: _copied(value) for key, value in progress.extra.items()},
        "generator": progress.generator.get_state(),
    }


def restore(state: Mapping[str, Any], rule: Rule, progress: Progress) -> None:
    """Put a state back; the parameters show it. ModelError, and nothing changed, for the state of another training."""
    if not isinstance(state, Mapping) or not state.keys() >= _PARTS:
        raise ModelError("this is no state of a sparse training; give what SparseTraining.state_dict() gave")
    if state["method"] != rule.name or state["steps"] != progress.steps:
        raise ModelError(
            f'the state is of "{state["method"]}" over {state["steps"]} steps; this is "{rule.name}" over '
            f"{progress.steps}, so call sparsify with the same method and steps"
        )
    held = state["layers"]
    for each in progress.layers:
        if (there := _difference(each, held.get(each.name))) is not None:
            raise ModelError(f'the state {there}, where this training has "{each.name}" in {_asked(each)}')
    if more := sorted(held.keys() - {each.name for each in progress.layers}):
        raise ModelError(f'the state has "{more[0]}", which this training has not; call sparsify with the same layers')
    with torch.no_grad():
        for each in progress.layers:
            _into_layer(each, held[each.name])
    progress.step = int(state["step"])
    progress.extra = {key: _copied(value) for key, value in state["extra"].items()}
    progress.generator.set_state(state["generator"].cpu())


def _of_layer(layer: TrainedLayer) -> dict[str, Any]:
    return {
        "pattern": _asked(layer),
        "mask": layer.mask.clone(),
        "dense": None if layer.dense is None else layer.dense.clone(),
        "state": {key: value.clone() for key, value in layer.state.items()},
    }


def _into_layer(layer: TrainedLayer, held: Mapping[str, Any]) -> None:
    device = layer.parameter.device
    layer.mask = held["mask"].to(device, copy=True)
    layer.dense = None if held["dense"] is None else held["dense"].to(device, copy=True)
    layer.state = {key: value.to(device, copy=True) for key, value in held["state"].items()}
    layer.show()


def _difference(layer: TrainedLayer, held: Mapping[str, Any] | None) -> str | None:
    if held is None:
        return "lacks it"
    if held["pattern"] != _asked(layer):
        return f"has it in {held['pattern']}"
    if held["mask"].shape != layer.mask.shape:
        return f"has it in the shape {tuple(held['mask'].shape)}"
    return None


def _asked(layer: TrainedLayer) -> str:
    """Pattern and numbers, as in "8:16+int8@a8"."""
    return weights_name(layer.pattern, layer.numbers)


def _copied(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value
