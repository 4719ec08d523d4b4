"""Dense training until Adam's variance has settled, then masks under that variance: STEP."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from sparsecomp.errors import MethodError
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.rules.base import Progress, Rule, rule

# at which of the optimizer's own steps the variance of a layer was frozen
_FROZEN = "frozen_at"
# the step of the training after which masks began, and the last changes of the variance
_SWITCHED, _CHANGES = "switched", "changes"
_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass(frozen=True)
class _Adam:
    """What Adam's parameter group says of one weight."""

    rate: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float
    decoupled: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Adam:
        beta1, beta2 = (float(each) for each in group["betas"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        return cls(float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"]), decoupled)

    def gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """The gradient that goes into the moments."""
        if self.decay and not self.decoupled:
            return gradient.add(weight, alpha=self.decay)
        return gradient


@rule
@dataclass(frozen=True)
class Step(Rule):
    """STEP (Lu et al. 2023, arXiv:2302.01172): Adam's variance is learned dense, then frozen while masks are learned.

    In the first phase the model is dense by design: plain Adam or AdamW. Watched is the mean |v_t - v_{t-1}| over the
    weights to prune. Once its mean over a window is below ``settled``, but not in the first ``earliest`` share of the
    steps, and in any case after the ``latest`` share, the second phase begins: the mask keeps the largest |w| of each
    step, the straight-through gradient moves all weights, and v stays as it was. A weight's update is then
    -lr m_t / (1 - beta1^t) / (sqrt(v_T / (1 - beta2^T)) + eps^0.75), T being the optimizer's step at the switch.

    The window is 1 / (1 - beta2) steps, as in the paper, but no longer than the first ``earliest`` share of the steps,
    so that it is full when the switch is first allowed. Unlike in the paper the frozen variance is corrected for its
    start at zero: after few steps beta2^T is not small. eps^0.75 stands where Adam has eps, as a variance that froze
    near zero no longer grows with the gradient. The schedule counts from the first step, and its density is that of
    the step at which masks are chosen.
    """

    name: ClassVar[str] = "step"
    keeps_dense: ClassVar[bool] = True
    settled: float = 1e-8
    earliest: float = 0.1
    latest: float = 0.5

    def __post_init__(self) -> None:
        """Refuse phases that are none."""
        super().__post_init__()
        if not 0 <= self.earliest <= self.latest <= 1:
            raise MethodError(
                f"earliest={self.earliest} and latest={self.latest} are no shares of the steps in that order; give "
                "0 <= earliest <= latest <= 1"
            )

    def require_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Adam or AdamW, in their plain forms."""
        if not isinstance(optimizer, Adam | AdamW):
            raise MethodError(
                f'method "step" freezes the variance of Adam or AdamW; the optimizer is {type(optimizer).__name__}, so '
                'use method="sr-ste"'
            )
        for option in _REFUSED:
            if any(group.get(option) for group in optimizer.param_groups):
                raise MethodError(
                    f'method "step" makes the updates of Adam itself, without {option}; make the optimizer without it, '
                    'or use method="sr-ste"'
                )

    def describe(self, progress: Progress) -> str | None:
        """In which phase it is."""
        if _SWITCHED in progress.extra:
            return f"the variance has been frozen since step {int(progress.extra[_SWITCHED])}"
        return (
            "the model is dense by design until Adam's variance has settled, at the latest after step "
            f"{self._last(progress)}"
        )

    def before(self, progress: Progress) -> None:
        """First phase: see how far the variance moves. Second: step on the layers whose variance is frozen."""
        if _SWITCHED not in progress.extra:
            self._watch(progress)
            return
        for each in progress.layers:
            if each.parameter.grad is not None and _FROZEN in each.state:
                _step(each, progress.optimizer, _Adam.of(progress.group(each)))

    def update(self, progress: Progress) -> None:
        """Begin the second phase if it is time; in it, the largest weights of now."""
        if _SWITCHED not in progress.extra and self._is_time(progress):
            progress.extra[_SWITCHED] = progress.step
            progress.extra.pop(_CHANGES, None)
        if _SWITCHED in progress.extra:
            self._freeze(progress)
            if progress.schedule.acts(progress.step, progress.steps):
                progress.keep_largest()

    def finish(self, progress: Progress) -> None:
        """Where the first phase never ended, masks are chosen now, with a warning."""
        if _SWITCHED not in progress.extra:
            warnings.warn(
                f'"step" was baked after step {progress.step} of {progress.steps}, while the model was dense by design '
                f"(at the latest until step {self._last(progress)}), so that masks were chosen without any training",
                stacklevel=3,
            )
            progress.keep_largest()

    def _last(self, progress: Progress) -> int:
        return max(1, int(self.latest * progress.steps))

    def _first(self, progress: Progress) -> int:
        return max(1, int(self.earliest * progress.steps))

    def _is_time(self, progress: Progress) -> bool:
        if progress.step >= self._last(progress):
            return True
        changes = progress.extra.get(_CHANGES)
        if not isinstance(changes, Tensor) or progress.step <= self._first(progress):
            return False
        return len(changes) >= self._window(progress) and float(changes.mean()) < self.settled

    def _window(self, progress: Progress) -> int:
        beta2 = max(_Adam.of(progress.group(each)).beta2 for each in progress.layers)
        whole = round(1 / (1 - beta2)) if beta2 < 1 else progress.steps
        return max(1, min(whole, self._first(progress)))

    def _watch(self, progress: Progress) -> None:
        """v_t - v_{t-1} = (1 - beta2) (g^2 - v_{t-1}), so that nothing has to be remembered of the last step."""
        total, count = 0.0, 0
        for each in progress.layers:
            if (gradient := each.parameter.grad) is None:
                continue
            adam = _Adam.of(progress.group(each))
            change = adam.gradient(gradient, each.parameter).square()
            variance = progress.optimizer.state.get(each.parameter, {}).get("exp_avg_sq")
            if variance is not None:
                change = change - variance
            total += (1 - adam.beta2) * float(change.abs().sum(dtype=torch.float64))
            count += change.numel()
        if count:
            now = torch.tensor([total / count], dtype=torch.float64, device="cpu")
            before = progress.extra.get(_CHANGES)
            changes = torch.cat([before, now]) if isinstance(before, Tensor) else now
            progress.extra[_CHANGES] = changes[-self._window(progress) :]

    def _freeze(self, progress: Progress) -> None:
        """Layers that have a variance keep it; one that gets its first gradient later freezes it then."""
        for each in progress.layers:
            state = progress.optimizer.state.get(each.parameter, {})
            if _FROZEN not in each.state and "exp_avg_sq" in state:
                each.state[_FROZEN] = torch.tensor(float(state["step"]), dtype=torch.float64, device="cpu")


def _step(layer: TrainedLayer, optimizer: torch.optim.Optimizer, adam: _Adam) -> None:
    """Adam's step on the learned weight, which the parameter holds now, under the frozen variance.

    The gradient is taken from the optimizer, which then passes over the weight. Momentum and the count of steps stay
    in the optimizer's own state.
    """
    parameter, state = layer.parameter, optimizer.state[layer.parameter]
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = None
    state["step"] += 1
    momentum: Tensor = state["exp_avg"]
    if adam.decay and adam.decoupled:
        parameter.mul_(1 - adam.rate * adam.decay)
    momentum.lerp_(adam.gradient(gradient, parameter).to(momentum.dtype), 1 - adam.beta1)
    corrected = state["exp_avg_sq"] / (1 - adam.beta2 ** float(layer.state[_FROZEN]))
    scale = corrected.sqrt_().add_(adam.epsilon**0.75)
    parameter.addcdiv_(momentum, scale, value=-adam.rate / (1 - adam.beta1 ** float(state["step"])))
