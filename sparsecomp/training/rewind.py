"""Iterative magnitude pruning with rewinding: train, drop the smallest of what is left, go back, train again.

Takes a model and the user's own function that trains it; masks are kept by ``sparsify``. Nothing here trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError, ModelError, PatternError
from sparsecomp.models.batches import eager
from sparsecomp.models.layers import Globs, find_layers, require_layers
from sparsecomp.patterns import Block, Pattern, Unstructured, parse
from sparsecomp.training.choice import choose, from_units, units
from sparsecomp.training.handle import SparseTraining, sparsify
from sparsecomp.training.hooks import innermost
from sparsecomp.training.layers import TrainedLayer

GoBack = Literal["weights", "learning-rate"]
Control = Literal["random", "reinitialised"]
CONTROLS: tuple[Control, ...] = ("random", "reinitialised")
# a kept weight of exactly zero still ranks above what was dropped; its square is a normal float64
_LEAST_SCORE = 1e-150
# added to the seed of new weights: a model that was made after manual_seed(0) would be drawn as it was
_OTHER_WEIGHTS = 0x9E3779B9


def rewind(
    model: nn.Module,
    train: Callable[[nn.Module, Round], Any],
    *,
    rounds: int = 10,
    drop: float = 0.2,
    to: GoBack = "weights",
    early: int | Mapping[str, Any] = 0,
    pattern: str = "unstructured",
    only: Globs = None,
    skip: Globs = None,
) -> RewindReport:
    """Find a lottery ticket: train, drop the smallest weights of all layers together, rewind, and so on.

    ``train(model, round)`` is your own training from its first step to its last. It makes its optimizer anew, calls
    ``round.sparsify(optimizer, steps=...)`` before its first step, and returns what you like, such as an accuracy.
    ``round.step`` is the step of its learning rate schedule at which to begin. It is called ``rounds`` + 1 times: round
    0 is dense, and each later one keeps 1 - ``drop`` of the weights that the one before kept, (1 - drop)^n of all:
    those with the largest |w|. Each layer keeps at least half a percent.

    ``to="weights"`` puts weights and buffers back to what they were at ``early`` (Frankle and Carbin 2019,
    arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671): the optimizer step of round 0 with that number, 0 being
    the weights that the model comes with, or a state_dict of your own. ``to="learning-rate"`` keeps the trained weights
    and lets only the schedule begin again, at step ``early`` (Renda et al. 2020, arXiv:2003.02389). ``pattern`` is
    "unstructured" or whole blocks, such as "block4x4". ``only`` and ``skip`` choose layers as in ``prune``.

    The model ends as the last round trained it, zeros in place. Raises MethodError for numbers that make no rounds, and
    for a ``train`` that does not call ``sparsify`` or ends before step ``early``; ModelError for weights that are not
    finite after a round, and a state_dict of another model; what ``prune`` raises for globs.
    """
    _check(rounds, drop, to, early)
    model = eager(model)
    layers = _Layers(model, pattern, only, skip)
    if isinstance(early, Mapping):
        _load(model, early)
    step = 0 if isinstance(early, Mapping) else early
    state = copy.deepcopy(model.state_dict()) if step == 0 else None
    masks = {name: torch.ones(ref.shape, dtype=torch.bool, device=ref.device) for name, ref in layers.found.items()}
    done: list[Round] = []
    for number in range(rounds + 1):
        density = (1.0 - drop) ** number
        if number:
            masks = layers.smaller(masks, density)
            if to == "weights":
                assert state is not None
                _load(model, state)
        now = Round(model, layers, number, density, masks, step if number else 0, early=0 if number else step)
        layers.drop(masks)
        state = now._run(train) or state
        done.append(now)
    assert state is not None
    return RewindReport(tuple(done), state, step, layers.pattern, only, skip)


class Round:
    """One training of ``rewind``: what ``train`` is given, and what came of it.

    ``number`` counts from 0, the dense round. ``density`` is the share of weights asked for. ``masks`` are bool
    [out, in] by layer name, True where a weight is kept. ``step`` is the step at which the schedule of the learning
    rate is to begin. ``result`` is what ``train`` returned.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: _Layers,
        number: int,
        density: float,
        masks: Mapping[str, Tensor],
        step: int,
        early: int = 0,
    ) -> None:
        """Use ``rewind``."""
        self.number, self.density, self.masks, self.step = number, density, dict(masks), step
        self.result: Any = None
        self._early = early
        self._live: tuple[nn.Module, _Layers] | None = (model, layers)
        self._handle: SparseTraining | None = None
        self._state: dict[str, Any] | None = None

    def sparsify(self, optimizer: torch.optim.Optimizer, *, steps: int) -> SparseTraining:
        """Keep the round's masks in the ``steps`` steps of this optimizer; the handle is that of ``sc.sparsify``.

        Raises MethodError for a second call in a round and for a round that is over.
        """
        if self._live is None:
            raise MethodError(f"round {self.number} is over; call sparsify within train")
        if self._handle is not None:
            raise MethodError(f"sparsify was called twice in round {self.number}; call it once, with the one optimizer")
        if steps < self._early:
            raise MethodError(
                f"weights are to be put back to those of step {self._early}, and round {self.number} has only {steps} "
                "steps; train longer, or give an earlier step"
            )
        model, layers = self._live
        patterns: dict[str, str | Pattern] = dict.fromkeys(layers.found, layers.at(self.density))
        handle = sparsify(
            model,
            patterns,
            optimizer,
            steps=steps,
            start=self.masks,
            scope="global",
            only=layers.only,
            skip=layers.skip,
        )
        self._handle = handle
        if self._early:
            self._note(innermost(optimizer), handle)
        return handle

    def _note(self, optimizer: torch.optim.Optimizer, handle: SparseTraining) -> None:
        """Take the model's state after the early step, when the handle's own hook has run."""

        def after(*_: Any) -> None:
            if handle.step == self._early and self._state is None:
                self._state = copy.deepcopy(handle.model.state_dict())
                hook.remove()

        hook = optimizer.register_step_post_hook(after)

    def _run(self, train: Callable[[nn.Module, Round], Any]) -> dict[str, Any] | None:
        """Train, and end the round. Gives the state at the early step, where it was to be taken."""
        assert self._live is not None
        model, layers = self._live
        with torch.enable_grad():
            self.result = train(model, self)
        if self._handle is None:
            raise MethodError(
                f"train did not call sparsify in round {self.number}, so that nothing kept the masks; call "
                "round.sparsify(optimizer, steps=...) before the first step"
            )
        if self._early and self._state is None:
            raise MethodError(
                f"weights are to be put back to those of step {self._early}, and round {self.number} ended after step "
                f"{self._handle.step}; train longer, or give an earlier step"
            )
        if not self._handle.baked:
            self._handle.bake()
        layers.require_trained(self)
        state, self._handle, self._live, self._state = self._state, None, None, None
        return state


@dataclass(frozen=True, eq=False)
class RewindReport:
    """What ``rewind`` found: its rounds, and the state (weights and buffers) that a ticket begins with.

    ``step`` is the optimizer step at which ``state`` was taken, 0 for the weights that the model came with.
    """

    rounds: tuple[Round, ...]
    state: Mapping[str, Any]
    step: int
    pattern: Pattern
    only: Globs
    skip: Globs

    def begin(
        self,
        model: nn.Module,
        control: Control | None = None,
        *,
        number: int = -1,
        seed: int = 0,
        initialise: Callable[[nn.Module], Any] | None = None,
    ) -> Round:
        """Put the model to the start of round ``number`` (-1: the last), and give the round for a call of ``train``.

        Without a ``control`` that is the ticket: ``state`` under the round's masks. "random" puts other masks in their
        place, which keep as many weights in each layer, at places drawn with ``seed``. "reinitialised" keeps the masks
        and draws all weights anew, from step 0 on; ``initialise(model)`` does so, or else every module's
        ``reset_parameters``.

        Raises MethodError for a control that is none and a round that there is not, ModelError for another model and
        one with parameters that no ``reset_parameters`` draws.
        """
        if control is not None and control not in CONTROLS:
            raise MethodError(f'control="{control}" is not known; use "random" or "reinitialised", or leave it out')
        if not -len(self.rounds) <= number < len(self.rounds):
            raise MethodError(f"there is no round {number}; there are 0 to {len(self.rounds) - 1}")
        model = eager(model)
        found = self.rounds[number]
        layers = _Layers(model, str(self.pattern).partition(":")[0], self.only, self.skip)
        _load(model, self.state)
        if control == "reinitialised":
            _reinitialise(model, seed, initialise)
        masks = layers.shuffled(found.masks, seed) if control == "random" else found.masks
        layers.drop(masks)
        return Round(model, layers, found.number, found.density, masks, 0 if control == "reinitialised" else self.step)

    def train(
        self,
        model: nn.Module,
        train: Callable[[nn.Module, Round], Any],
        control: Control | None = None,
        *,
        number: int = -1,
        seed: int = 0,
        initialise: Callable[[nn.Module], Any] | None = None,
    ) -> Round:
        """``begin`` a round and train it as ``rewind`` does; the round that is given back holds the ``result``.

        Raises what ``begin`` and ``rewind`` raise.
        """
        now = self.begin(model, control, number=number, seed=seed, initialise=initialise)
        now._run(train)
        return now

    def __str__(self) -> str:
        """A line for each round."""
        lines = [f"round {each.number}: {each.density:.1%} kept, {each.result}" for each in self.rounds]
        return "\n".join(lines)


class _Layers:
    """The layers whose weights are dropped, all with one pattern and one density."""

    def __init__(self, model: nn.Module, pattern: str, only: Globs, skip: Globs) -> None:
        self.found = require_layers(find_layers(model, only, skip))
        self.only, self.skip = only, skip
        named = parse(f"{pattern}:1") if isinstance(pattern, str) and ":" not in pattern else None
        if not isinstance(named, Unstructured | Block):
            raise PatternError(
                f'pattern="{pattern}" has no density that rounds could lower; use "unstructured" or whole blocks, such '
                'as "block4x4"'
            )
        self.pattern = named

    def at(self, density: float) -> Pattern:
        """The pattern with this density."""
        if isinstance(self.pattern, Block):
            return Block(self.pattern.rows, self.pattern.cols, density)
        return Unstructured(density)

    def _trained(self, name: str, mask: Tensor) -> TrainedLayer:
        ref = self.found[name]
        return TrainedLayer(name, ref, self.pattern, ref.from_matrix(mask.to(ref.device)).contiguous(), ref.parameter)

    def smaller(self, masks: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """The masks that keep the largest of what is kept, at this density over all layers."""
        layers = [self._trained(name, mask) for name, mask in masks.items()]
        scores = {
            each.name: each.weight.abs().double().clamp_min(_LEAST_SCORE).masked_fill(~each.mask, 0.0)
            for each in layers
        }
        chosen = choose(layers, scores, dict.fromkeys(masks, density), "global")
        return {each.name: each.matrix(chosen[each.name]).contiguous() for each in layers}

    def shuffled(self, masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Masks that keep as many units in each layer, at random places."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shuffled = {}
        for name, mask in masks.items():
            layer = self._trained(name, mask)
            kept = units(layer, layer.mask) > 0
            order = torch.randperm(kept.numel(), generator=generator, device="cpu").to(kept.device)
            drawn = from_units(layer, kept.flatten()[order].view(kept.shape))
            shuffled[name] = layer.matrix(drawn).contiguous()
        return shuffled

    def drop(self, masks: Mapping[str, Tensor]) -> None:
        """Zeros where masks say so."""
        with torch.no_grad():
            for name, mask in masks.items():
                layer = self._trained(name, mask)
                layer.parameter.masked_fill_(~layer.mask, 0.0)

    def require_trained(self, now: Round) -> None:
        """Raises ModelError for weights that are not finite or that the masks dropped."""
        for name, mask in now.masks.items():
            weight = self.found[name].get_weight()
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    f"{name}: its weights are not finite after round {now.number}; lower the learning rate of train"
                )
            if bool((weight.masked_fill(mask.to(weight.device), 0.0) != 0).any()):
                raise ModelError(
                    f"{name}: weights that round {now.number} had dropped are not zero after it; train the model that "
                    "train is given, with the optimizer that sparsify was given"
                )


def _check(rounds: object, drop: object, to: object, early: object) -> None:
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise MethodError(f"rounds={rounds!r} drops nothing; give 1 or more")
    if not isinstance(drop, float) or not 0.0 < drop < 1.0:
        raise MethodError(f"drop={drop!r} is no share of weights; give a number between 0 and 1, such as 0.2")
    if to not in ("weights", "learning-rate"):
        raise MethodError(f'to="{to}" is not known; use "weights" or "learning-rate"')
    if isinstance(early, Mapping):
        return
    if not isinstance(early, int) or isinstance(early, bool) or early < 0:
        raise MethodError(
            f"early={early!r} is no step; give the number of an optimizer step, 0 or more, or a state_dict"
        )


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, AttributeError) as error:
        told = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the state to go back to is of another model ({told}); give a state_dict of this one"
        ) from None


def _reinitialise(model: nn.Module, seed: int, initialise: Callable[[nn.Module], Any] | None) -> None:
    devices = sorted({each.device.index or 0 for each in model.parameters() if each.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_OTHER_WEIGHTS + seed)
        if initialise is not None:
            initialise(model)
            return
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ModelError(
                    f"{name or 'the model'} is a {type(module).__name__}, which has no reset_parameters to draw its "
                    "weights anew; pass initialise=lambda model: ..."
                )
