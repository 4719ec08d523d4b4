"""Sparse training in the user's own loop: hooks on the user's optimizer keep the masks, and a handle tells of them.

The model always holds what would be deployed: kept weights, zeros elsewhere. Where a rule lets dropped weights go on
learning, the handle holds them and shows them to the optimizer for the time of its step. So nothing about the model
changes: its state_dict, its copies, its compiled form, what wraps it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError, ModelError, naming
from sparsecomp.models.batches import eager
from sparsecomp.models.calibration import LayerStatistics
from sparsecomp.models.layers import Globs, find_layers, require_layers
from sparsecomp.modules.snapshot import outside_inference_mode
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.check import check_weight
from sparsecomp.planning.plan import Plan
from sparsecomp.planning.selection import choose_weights
from sparsecomp.pruning.refilled import zeros_are_kept
from sparsecomp.training.choice import Scope, check_scope
from sparsecomp.training.hooks import StepHooks, finite, gradients, innermost, parameters
from sparsecomp.training.kernels import TrainingKernels, require_seldom
from sparsecomp.training.layers import TrainedLayer
from sparsecomp.training.live import discharge, enlist, live_mask
from sparsecomp.training.rounding import RoundedInputs, RoundedWeight, require_linear
from sparsecomp.training.rules import Progress, Rule, get_rule
from sparsecomp.training.saving import restore, saved
from sparsecomp.training.schedule import Schedule
from sparsecomp.training.start import Start, start_masks

if TYPE_CHECKING:
    from sparsecomp.training.trainer import MaskCallback


def sparsify(
    model: nn.Module,
    pattern: str | Pattern | Mapping[str, str | Pattern] | Plan,
    optimizer: torch.optim.Optimizer | None = None,
    method: str | Rule = "fixed",
    *,
    steps: int,
    start: Start = None,
    calibration: Mapping[str, LayerStatistics] | None = None,
    schedule: str | Schedule | None = None,
    scope: Scope = "layer",
    only: Globs = None,
    skip: Globs = None,
    seed: int = 0,
    kernels: bool = False,
) -> SparseTraining:
    """Train ``model`` sparse in your own loop; give your ``optimizer``, which holds its weights, and go on as before.

    ``pattern``, ``only`` and ``skip`` are as in ``prune``. ``steps`` are the optimizer steps you will make; after them
    masks stay as they are. ``method`` names a rule, or is one with settings of your own. ``start`` chooses the first
    masks where the method begins sparse: a pruning method ("fast" with ``calibration``, else "magnitude", is the
    default), "zeros", "random", or masks (bool [out, in]) by layer name. ``schedule`` is a curve's name or a Schedule;
    each method has its own default. ``scope="global"`` shares one density out over all layers, for "unstructured:D"
    and "blockRxC:D". Without an ``optimizer`` give it to ``attach`` later, before the first step.

    After every step the weights in the model fit the pattern that the schedule asks for then. ``bake`` ends it.
    Numbers in a name, as in "8:16+int8@a8", are trained with: the model computes, in training and evaluation, with the
    rounded weights and inputs that ``compile`` would give it, and gradients go past the rounding (straight through).

    ``kernels=True`` computes y, and under "2:4@t" the gradient of x too, by sparse kernels on the CPU, for the linear
    layers that have them; print the handle to see which. Masks that change are packed anew, which pays where they
    seldom do: it is for "fixed", and for schedules with ``every=20`` or more.

    Raises ModelError for an optimizer that does not hold the weights, masks that do not fit, and weights that are in
    a live training; MethodError for an unknown method, one that cannot use the optimizer, no steps, a schedule that
    leaves none, or one too busy for ``kernels``; what ``prune`` raises for patterns, globs and start.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise MethodError(
            f"steps={steps!r} trains nothing; give the number of optimizer steps you will make, 1 or more"
        )
    model = eager(model)
    rule = get_rule(method)
    with outside_inference_mode():
        found = require_layers(find_layers(model, only, skip))
        chosen, skipped = choose_weights(found, pattern)
        patterns = {name: each.pattern for name, each in chosen.items()}
        if not patterns:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            raise ModelError(f"no layer would be trained sparse ({why}); choose a pattern that fits their shapes")
        check_scope(scope, patterns)
        rule.require(patterns, scope)
        for name in patterns:
            if live_mask(found[name].parameter) is not None:
                raise ModelError(f"{name}: its weight is in a training that is still live; bake that one first")
        plan = rule.schedule(schedule, steps)
        if kernels:
            require_seldom(rule, plan)
        layers = {
            name: TrainedLayer(name, found[name], each, _all(found[name].parameter), found[name].parameter)
            for name, each in patterns.items()
        }
        for name, each in layers.items():
            each.numbers = chosen[name].numbers
        require_linear(layers)
        handle = SparseTraining(model, rule, layers, skipped, plan, steps, scope, seed)
        inner = None if optimizer is None else handle._accepted(optimizer)
        handle._begin(start, calibration, kernels)
        if inner is not None:
            handle.attach(inner)
    return handle


@dataclass(frozen=True)
class Change:
    """What one choice of masks did: the density after ``step``, and the share of mask entries that changed."""

    step: int
    density: float
    flip_rate: float


class SparseTraining:
    """A model that is being trained sparse. Made by ``sparsify``; print it to see where it stands."""

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        layers: Mapping[str, TrainedLayer],
        skipped: Mapping[str, str],
        schedule: Schedule,
        steps: int,
        scope: Scope,
        seed: int,
    ) -> None:
        """Use ``sparsify``."""
        self.model, self.rule, self.skipped = model, rule, dict(skipped)
        self.history: list[Change] = []
        self._layers = dict(layers)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self._progress = Progress(list(layers.values()), steps, schedule, scope, generator)
        self._hooks: StepHooks | None = None
        self._inputs = RoundedInputs(model, [])
        self._kernels = TrainingKernels(model, ())
        self._warned = False
        self._baked = False
        self._names = {name for name, _ in model.named_modules()}
        zeros_are_kept(each.parameter for each in self._layers.values())
        enlist(self._layers.values())

    # --- what it tells ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """How many optimizer steps are done."""
        return self._progress.step

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of now, bool [out, in] by layer name, True where a weight is kept; copies."""
        return {name: each.matrix(each.mask).clone() for name, each in self._layers.items()}

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The pattern that each layer will have in the end, by name."""
        return {name: each.pattern for name, each in self._layers.items()}

    @property
    def density(self) -> float:
        """The share of weights kept now, of all layers together."""
        kept = sum(int(each.mask.sum()) for each in self._layers.values())
        return kept / max(sum(each.mask.numel() for each in self._layers.values()), 1)

    @property
    def baked(self) -> bool:
        """Whether ``bake`` has ended it."""
        return self._baked

    @property
    def flip_rate(self) -> float:
        """The share of mask entries that the last choice of masks changed."""
        return self.history[-1].flip_rate if self.history else 0.0

    def __str__(self) -> str:
        """A few lines."""
        rule, plan = self._progress, self._progress.schedule
        lines = [
            f"{self.rule.name}: step {rule.step} of {rule.steps}, {len(self._layers)} layers keep {self.density:.1%} "
            f"of their weights, schedule {plan.curve}",
        ]
        if self.history:
            lines.append(f"the last change of masks flipped {self.flip_rate:.2%} of their entries")
        elif self.rule.changes_masks:
            lines.append("masks have not changed yet")
        if (more := self.rule.describe(rule)) is not None:
            lines.append(more)
        lines += self._kernels.describe()
        if self._baked:
            lines.append("baked: its hooks are gone")
        elif self._hooks is None:
            lines.append("no optimizer yet: give it to attach before the first step")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line."""
        state = "baked" if self._baked else "live"
        return f"<SparseTraining {self.rule.name}, {state}, step {self.step} of {self._progress.steps}>"

    # --- the loop -----------------------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the masks in the steps of this optimizer; ModelError if it does not hold the weights."""
        self._require_live()
        inner = self._accepted(optimizer)
        if self._hooks is not None:
            self._hooks.remove()
        self._progress.attached = inner
        self._hooks = StepHooks(inner, self._before, self._after)

    def bake(self) -> nn.Module:
        """End it: take the hooks off, leave plain layers whose weights fit their patterns, and give the model.

        Where the pattern names integers, as in "8:16+int8@a8", the weights that are left are the floats behind them:
        ``compile`` with the same name rounds them to what was trained, and rounds inputs as they were in training.

        Raises PatternError if a weight does not fit, as after it was written to outside the optimizer.
        """
        self._require_live()
        with torch.no_grad():
            for each in self._layers.values():
                each.follow()
                each.absorb()
            self.rule.finish(self._progress)
            for each in self._layers.values():
                each.unround()
        self._check_layers()
        progress = self._progress
        if progress.step < progress.schedule.last(progress.steps) and progress.schedule.curve != "constant":
            warnings.warn(
                f"baked after step {progress.step} of {progress.steps}, before the schedule has reached its goal: "
                f"{self.density:.1%} of the weights are kept, and layers need not fit their patterns",
                stacklevel=2,
            )
        elif progress.scope == "layer":
            for name, each in self._layers.items():
                with naming(name):
                    check_weight(each.grouped(each.parameter.detach()), each.pattern)
        self._release()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All that the model and the optimizer do not hold, in tensors and plain values: save the three together."""
        with torch.no_grad():
            for each in self._layers.values():
                each.follow()
                each.absorb()
        history = [(change.step, change.density, change.flip_rate) for change in self.history]
        return saved(self.rule, self._progress) | {"history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, bit for bit, after model and optimizer have been loaded.

        Raises ModelError for the state of another training.
        """
        self._require_live()
        restore(state, self.rule, self._progress)
        self.history = [Change(*each) for each in state.get("history", ())]
        self._kernels.follow()

    def callback(self, *, bake: bool = True, resume_from: str | Path | None = None) -> MaskCallback:
        """A callback for transformers' Trainer, which attaches the Trainer's optimizer, logs, saves and resumes.

        It logs ``sparse_density`` and ``sparse_flip_rate``, and writes the state into every checkpoint folder, from
        where ``trainer.train(resume_from_checkpoint=...)`` reads it; ``resume_from`` is that folder where it does not
        lie in the Trainer's output folder. With ``bake`` the end of training bakes. MethodError without transformers.
        """
        try:
            from sparsecomp.training.trainer import MaskCallback
        except ModuleNotFoundError as error:
            raise MethodError(
                f"callback is for the Trainer of transformers, and {error.name} is not installed; pip install "
                "'transformers[torch]', or train in a loop of your own"
            ) from error
        return MaskCallback(self, bake=bake, resume_from=resume_from)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, start: Start, calibration: Mapping[str, LayerStatistics] | None, kernels: bool) -> None:
        with torch.no_grad():
            if self.rule.starts_sparse:
                scope, generator = self._progress.scope, self._progress.generator
                shares = self.rule.shares(self._progress.layers, scope)
                for name, mask in start_masks(
                    self.model, self._layers, start, calibration, scope, generator, shares
                ).items():
                    self._layers[name].mask = mask
            elif start is not None:
                raise MethodError(f'method "{self.rule.name}" begins dense and chooses its own masks; leave start out')
            for each in self._layers.values():
                if each.numbers.has_scales:
                    each.rounding, each.forgets_dropped = RoundedWeight(each.numbers), not self.rule.keeps_dense
                if self.rule.keeps_dense or each.numbers.has_scales:
                    each.keep_dense()
            self.rule.begin(self._progress)
            for each in self._layers.values():
                each.show()
        rounded = [each for each in self._layers.values() if each.numbers.activation_bits is not None]
        self._inputs = RoundedInputs(self.model, [each.ref.module for each in rounded])
        self._kernels = TrainingKernels(self.model, self._progress.layers if kernels else ())
        self._kernels.follow()

    def _accepted(self, optimizer: Any) -> torch.optim.Optimizer:
        inner = innermost(optimizer)
        held = {id(each) for each in parameters(inner)}
        lacking = [name for name, each in self._layers.items() if id(each.parameter) not in held]
        if lacking:
            some = ", ".join(f'"{each}"' for each in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            raise ModelError(
                f"the optimizer does not hold the weights of {len(lacking)} of {len(self._layers)} layers ({some}); "
                "make it of this model's parameters, or leave the layers out with skip="
            )
        self.rule.require_optimizer(inner)
        return inner

    def _before(self) -> bool:
        progress = self._progress
        for each in progress.layers:
            if each.ref.module._parameters.get("weight") is not each.parameter:
                raise ModelError(
                    f"{each.name}: its weight was replaced after sparsify; bake before you change the model, or write "
                    "into the weight in place"
                )
        if not finite(gradients(progress.optimizer)):
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"gradients are not finite at step {progress.step + 1}, so that weights and masks were left as "
                    "they were; it is said once, look for the loss that is NaN or infinite",
                    stacklevel=5,
                )
            return False
        for each in progress.layers:
            each.follow()
            if each.parameter.grad is not None:
                each.parameter.grad = self.rule.gradient(progress, each, each.parameter.grad)
            each.expose()
        self.rule.before(progress)
        return True

    def _after(self) -> None:
        progress = self._progress
        progress.step += 1
        for each in progress.layers:
            each.changed = 0
            each.deploy()
        if progress.step > progress.steps:
            return
        self.rule.update(progress)
        changed = sum(each.changed for each in progress.layers)
        if changed or (self.rule.changes_masks and progress.schedule.acts(progress.step, progress.steps)):
            total = max(sum(each.mask.numel() for each in progress.layers), 1)
            self.history.append(Change(progress.step, self.density, changed / total))
        for each in progress.layers:
            if each.changed:
                each.show()
        if changed:
            self._kernels.follow(changed=True)

    def _check_layers(self) -> None:
        added = sorted({name for name, _ in self.model.named_modules()} - self._names)
        linears = [name for name in added if name in find_layers(self.model)]
        if linears:
            some = ", ".join(f'"{each}"' for each in linears[:3]) + (", ..." if len(linears) > 3 else "")
            warnings.warn(
                f"{len(linears)} layers were added to the model after sparsify and were trained dense ({some}); call "
                "sparsify after the last change of the model",
                stacklevel=3,
            )

    def _require_live(self) -> None:
        if self._baked:
            raise ModelError("this training was baked, and its hooks are gone; call sparsify again to go on")

    def _release(self) -> None:
        self._baked = True
        self._inputs.remove()
        self._kernels.release()
        if self._hooks is not None:
            self._hooks.remove()
        discharge(self._layers.values())


def _all(parameter: Tensor) -> Tensor:
    return torch.ones_like(parameter, dtype=torch.bool)
