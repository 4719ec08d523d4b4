"""Tune a whole pruned model to reproduce the dense one: hidden states, final output, or what the user names.

Takes the pruned model, the dense one and batches. Needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.models.batches import Forward, eager, entering, evaluating, first_tensor, fresh, run_batch, split
from sparsecomp.models.blocks import find_chains
from sparsecomp.models.layers import LayerTable, find_layers, require_layers
from sparsecomp.models.rows import RowMask, RowMasks
from sparsecomp.modules.snapshot import ModuleState
from sparsecomp.pruning.learning import Call, tunable
from sparsecomp.pruning.tuning import Target, Tuning, TuningReport, tune, variance

Output = Callable[[Any, Any], Tensor]


def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    masks: Mapping[str, Tensor],
    held_out: Iterable[Any] | None = None,
    output: Output | None = None,
    tuning: Tuning = Tuning(),  # noqa: B008 (frozen)
    forward: Forward | None = None,
    mask: RowMask | None = None,
    show_progress: bool = True,
) -> TuningReport:
    """Tune the kept weights, biases and norms of ``model``, in place and masks fixed, to do what ``teacher`` does.

    ``masks`` (bool [out, in], True = kept) by layer name are ``PruneReport.masks``. What is matched: the hidden states
    that the repeated blocks return, on real tokens (``mask`` as in ``calibrate``), those of the last block once
    more, and ``output(result, batch)``, a tensor [..., features] made of what the model returns, such as pooled
    embeddings or logits. The loss is the sum of the mean squared error of the hidden states, of the last, and of the
    output, each relative to the teacher's variance. ``teacher`` is the dense model, of the same class; it runs beside
    the model at every step, so that no more than the held-out batches' states are kept in memory.

    ``held_out`` batches, or a share of ``batches``, are not trained on and decide which step is kept.

    Rows that ``mask`` hides count neither in the hidden states nor in an ``output`` with the mask's leading dimensions;
    where ``mask`` gives masks by name, the hidden states have the name of their block and the output is "output".
    Both models run as in ``calibrate``.

    Raises ModelError if there is neither a chain of blocks nor an ``output``, or ``teacher`` shares weights that are
    tuned with the model; CalibrationError for fewer than two batches; MethodError where no gradient reaches the
    weights, as in a forward under torch.no_grad.
    """
    model, teacher = eager(model), eager(teacher)
    with entering(model), entering(teacher), evaluating(teacher):
        every, train, kept_out = split(batches, held_out, tuning.held_out)
        layers = require_layers(find_layers(model))
        _check(model, teacher, masks, layers)
        candidates = _candidates(model, masks, output)
        rows = RowMasks(teacher, mask, [*layers, *candidates, "output"])
        wanted = _Wanted(_Entry(teacher, forward, candidates), every, rows, output, tuning.autocast)
        watched = wanted.watch(kept_out[0])
        if not watched and output is None:
            raise ModelError(_NO_STATES)
        known = {index: wanted(index) for index in kept_out}
        scales = [variance(each) for each in zip(*known.values(), strict=True)]

        def loss(call: Call, index: int) -> Tensor:
            targets = known[index] if index in known else wanted(index)
            made = wanted.outputs(call, index)
            parts = [target.loss(each) / scale for target, each, scale in zip(targets, made, scales, strict=True)]
            blocks, rest = parts[: len(watched)], parts[len(watched) :]
            return torch.stack([*rest, *([torch.stack(blocks).mean(), blocks[-1]] if blocks else [])]).sum()

        stored = {
            f"model.{name}.weight" if name else "model.weight": layers[name].from_matrix(each)
            for name, each in masks.items()
        }
        student = _Entry(model, forward, watched)
        return tune("whole model", student, stored, loss, train, kept_out, tuning, show_progress)


_NO_STATES = (
    "the model has no repeated blocks with masks whose hidden states could be matched; "
    "pass output=lambda result, batch: ... to say what is"
)


def _check(model: nn.Module, teacher: nn.Module, masks: Mapping[str, Tensor], layers: LayerTable) -> None:
    for name, each in masks.items():
        if name not in layers:
            raise ModelError(
                f'a mask is given for "{name}", which is no linear layer or convolution of the model; pass report.masks'
            )
        if each.shape != layers[name].shape:
            raise ModelError(
                f'the mask of "{name}" has shape {tuple(each.shape)}, its weight {layers[name].shape}; '
                "pass the masks of this model's report"
            )
    own = {id(layers[name].parameter) for name in masks} | {id(each) for each in tunable(model, {}).values()}
    if any(id(each) in own for each in teacher.parameters()):
        raise ModelError(
            "teacher shares weights with the model and was pruned with it; keep a copy.deepcopy of the dense model"
        )


def _candidates(model: nn.Module, masks: Mapping[str, Tensor], output: Output | None) -> list[str]:
    """The blocks of all chains."""
    try:
        return [name for chain in find_chains(model, masks) for name in chain.modules]
    except ModelError:
        if output is None:
            raise ModelError(_NO_STATES) from None
        return []


class _Entry(nn.Module):
    """A model called on a batch, that also gives the hidden states its blocks return."""

    def __init__(self, model: nn.Module, forward: Forward | None, watched: Sequence[str]) -> None:
        super().__init__()
        self.model, self._forward, self.watched = model, forward, tuple(watched)
        self.seen: Callable[[str, Tensor], None] | None = None

    def forward(self, batch: Any, index: int) -> tuple[Any, dict[str, Tensor]]:
        with _noting(self.model, self.watched, self.seen) as states:
            result = run_batch(self.model, batch, index, self._forward)
        return result, states


@contextmanager
def _noting(
    model: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None] | None
) -> Iterator[dict[str, Tensor]]:
    states: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with suppress(ModelError):
                states[name] = first_tensor(output)
                if seen is not None:
                    seen(name, states[name])

        return hook

    handles = [_part(model, name).register_forward_hook(note(name)) for name in names]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _part(model: nn.Module, name: str) -> nn.Module:
    """The block of that name, also where parts of only one of two models are compiled."""
    plain = ".".join(each for each in name.split(".") if each != "_orig_mod")
    try:
        return model.get_submodule(plain)
    except AttributeError as error:
        raise ModelError(
            f'the teacher has no block "{plain}", which the model has; pass the dense model, of the same class'
        ) from error


class _Wanted:
    """What the teacher does on a batch, and what of a model's doing is compared with it."""

    def __init__(
        self,
        teacher: _Entry,
        batches: Sequence[Any],
        rows: RowMasks,
        output: Output | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.teacher, self.batches, self.rows = teacher, batches, rows
        self.output, self.autocast = output, autocast
        self._state = ModuleState(teacher)

    def watch(self, index: int) -> tuple[str, ...]:
        """Watch only the blocks that return hidden states, as in this batch, in the order of their calls."""
        with self._dense():
            _, states = self.teacher(fresh(self.batches[index]), index)
        self.teacher.watched = tuple(states)
        return self.teacher.watched

    def outputs(self, call: Call, index: int, own: Any = None) -> list[Tensor]:
        """The blocks' hidden states, then the output."""
        result, states = call(fresh(self.batches[index]) if own is None else own, index)
        missing = next((name for name in self.teacher.watched if name not in states), None)
        if missing is not None:
            raise CalibrationError(
                f'batch {index} does not reach block "{missing}" as others do; distil with batches of one kind'
            )
        found = [states[name] for name in self.teacher.watched]
        if self.output is None:
            return found
        made = self.output(result, self.batches[index])
        if not isinstance(made, Tensor) or not made.is_floating_point() or made.ndim == 0:
            got = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ModelError(f"output(result, batch) gave a {got}; it must give numbers as a tensor [..., features]")
        return [*found, made]

    @contextmanager
    def _dense(self) -> Iterator[None]:
        device = next((each.device.type for each in self.teacher.parameters()), "cpu")
        try:
            with torch.no_grad(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            self._state.restore()

    def __call__(self, index: int) -> list[Target]:
        """The targets of the batch."""
        with self._dense():
            self.rows.learn(self.batches[index], lambda part: self.teacher(part, index))
        own = fresh(self.batches[index])
        masks: dict[str, Tensor | None] = {}

        def note(name: str, state: Tensor) -> None:
            masks[name] = self.rows.of(name, state)

        with self._dense(), self.rows.reading(index, own):
            self.teacher.seen = note
            try:
                made = self.outputs(self.teacher, index, own)
            finally:
                self.teacher.seen = None
            names = [*self.teacher.watched, *(["output"] if self.output is not None else [])]
            if self.output is not None:
                masks["output"] = self.rows.of("output", made[-1])
        return [Target(each, masks[name]) for name, each in zip(names, made, strict=True)]
