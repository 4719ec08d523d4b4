"""Tune what pruning kept, weights under fixed masks, biases and norms, until a held-out loss stops falling.

Takes a module, masks and a loss, gives a ``TuningReport``. Needs no labels; knows nothing of blocks and models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError
from sparsecomp.models.batches import entering, evaluating
from sparsecomp.modules.snapshot import clone
from sparsecomp.pruning.learning import Learner, Loss, tunable
from sparsecomp.reporting.codec import plain
from sparsecomp.reporting.terminal import progress

_WARM_UP = 20
_LAST_RATE = 0.02
_CHECKS = 8
_BETAS = (0.9, 0.99)
_TRAIN_SAMPLE = 4


@dataclass(frozen=True)
class Tuning:
    """How long and how fast to tune: Adam with a linear warm-up, then a cosine down to 2% of ``learning_rate``.

    A fraction ``held_out`` of the batches, unless others are given, is never trained on and decides which step is kept.
    ``autocast`` is the type of matrix products, or None for the model's own; parameters and Adam's state are float32
    either way. ``seed`` orders the batches.
    """

    steps: int = 300
    learning_rate: float = 3e-4
    held_out: float = 0.1
    autocast: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.steps < 1:
            raise MethodError(f"steps={self.steps} tunes nothing; use at least 1, or tuning=None")
        if not (0.0 < self.learning_rate < math.inf):
            raise MethodError(f"learning_rate={self.learning_rate} is not above zero; try 3e-4")
        if not 0.0 < self.held_out < 1.0:
            raise MethodError(f"held_out={self.held_out} leaves nothing to train on or to judge by; try 0.1")


@dataclass(frozen=True)
class TuningReport:
    """What tuning gained. Losses are relative squared errors, on batches trained on and on batches held out.

    ``curve`` has (step, held-out loss); ``best_step`` is the one kept, 0 for the state before. ``stopped`` says why
    tuning ended early, if it did.
    """

    name: str
    steps: int
    best_step: int
    train_before: float
    train_after: float
    held_out_before: float
    held_out_after: float
    curve: Sequence[tuple[int, float]]
    seconds: float
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; a loss that is not finite is None."""
        facts: dict[str, Any] = plain(self)
        return {**{key: value for key, value in facts.items() if key != "curve"}, "curve": facts["curve"]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuningReport:
        """The report that ``to_dict`` told of; a loss that was not finite comes back as NaN."""
        facts = dict(values)
        for key in ("train_before", "train_after", "held_out_before", "held_out_after"):
            facts[key] = math.nan if facts[key] is None else facts[key]
        facts["curve"] = [(step, math.nan if loss is None else loss) for step, loss in facts["curve"]]
        return cls(**facts)

    def __str__(self) -> str:
        """One line."""
        kept = f"kept step {self.best_step} of {self.steps}" if self.best_step else "no step was better: left as it was"
        return (
            f"{self.name}: held-out loss {self.held_out_before:.4g} -> {self.held_out_after:.4g}, "
            f"trained-on {self.train_before:.4g} -> {self.train_after:.4g}; {kept}, {self.seconds:.0f} s"
            + (f" ({self.stopped})" if self.stopped else "")
        )


def tune(
    name: str,
    module: nn.Module,
    masks: Mapping[str, Tensor],
    loss: Loss,
    train: Sequence[int],
    held_out: Sequence[int],
    settings: Tuning,
    show_progress: bool = True,
) -> TuningReport:
    """Minimise ``loss`` over the batches ``train``, in place; the best state on the batches ``held_out`` is written.

    ``loss(call, i)`` gives the loss of batch i, where ``call`` runs ``module`` with the parameters of now. ``masks``
    (bool, True = kept) are by parameter name and as the parameter is stored. The module runs in eval mode, and
    requires_grad of its parameters does not change. A loss that is not finite ends the tuning with the best state
    so far, and the report says so.

    Raises MethodError if nothing can be tuned, or no gradient reaches the pruned weights.
    """
    begin = time.perf_counter()
    parameters = tunable(module, masks)
    if not parameters:
        raise MethodError(f"{name}: it has no weight, bias or norm that could be tuned; leave tuning out")
    with entering(module), evaluating(module):
        state = Learner(module, masks, parameters, settings.autocast)
        return _descend(name, state, loss, train, held_out, settings, show_progress, begin)


def _descend(
    name: str,
    state: Learner,
    loss: Loss,
    train: Sequence[int],
    held_out: Sequence[int],
    settings: Tuning,
    show_progress: bool,
    begin: float,
) -> TuningReport:
    optimizer = torch.optim.Adam(state.values.values(), lr=settings.learning_rate, betas=_BETAS)
    generator = torch.Generator(device="cpu").manual_seed(settings.seed)
    sample = train[:: max(1, len(train) // _TRAIN_SAMPLE)][:_TRAIN_SAMPLE]
    before = state.evaluate(loss, held_out)
    train_before = state.evaluate(loss, sample)
    best, best_step, best_values = before, 0, _copy(state.values)
    curve = [(0, before)]
    check = max(1, settings.steps // _CHECKS)
    order: list[int] = []
    stopped = None
    steps = range(1, settings.steps + 1)
    for step in progress(steps, f"tuning {name}", settings.steps) if show_progress else steps:
        if not order:
            order = [train[i] for i in torch.randperm(len(train), generator=generator, device="cpu").tolist()]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        if not state.learn(name, loss, order.pop()):
            stopped = f"the loss is not finite at step {step}; a smaller learning_rate may help"
            break
        # Adam makes its counts of steps on the default device
        with torch.device("cpu"):
            optimizer.step()
        if step % check == 0 or step == settings.steps:
            now = state.evaluate(loss, held_out)
            curve.append((step, now))
            if now < best:
                best, best_step, best_values = now, step, _copy(state.values)
    with torch.no_grad():
        for key, value in best_values.items():
            state.values[key].copy_(value)
    train_after = state.evaluate(loss, sample)
    if best_step:
        state.write()
    seconds = time.perf_counter() - begin
    return TuningReport(
        name, settings.steps, best_step, train_before, train_after, before, best, curve, seconds, stopped
    )


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at ``step`` of 1 to ``steps``."""
    falling = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
    return min(1.0, step / min(_WARM_UP, steps)) * (_LAST_RATE + (1.0 - _LAST_RATE) * falling)


def _copy(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


class Target:
    """What to reproduce in one batch: the rows of an output that count."""

    def __init__(self, output: Tensor, rows: Tensor | None) -> None:
        """``output`` [..., features]; ``rows`` is a bool mask of its leading dimensions; another shape counts whole."""
        fits = rows is not None and output.shape[:-1][: rows.ndim] == rows.shape
        self.rows = rows.to(output.device) if rows is not None and fits else None
        self.value = self._select(clone(output))

    def _select(self, output: Tensor) -> Tensor:
        rows = output if self.rows is None else output[self.rows]
        return rows.reshape(-1, output.shape[-1]).float()

    def loss(self, output: Tensor) -> Tensor:
        """Mean squared distance of the rows that count, summed over features, in float32."""
        return (self._select(output) - self.value).square().sum() / max(self.value.shape[0], 1)


def variance(targets: Iterable[Target]) -> float:
    """Mean squared distance of the targets' rows to their mean, to make losses relative; 1.0 if there is none."""
    values = [each.value.double() for each in targets]
    count = sum(each.shape[0] for each in values)
    mean = torch.stack([each.sum(dim=0) for each in values]).sum(dim=0) / max(count, 1)
    # one row, or rows that are all alike, have nothing to compare with
    return sum(float((each - mean).square().sum()) for each in values) / max(count, 1) or 1.0
