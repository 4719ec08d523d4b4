"""Tune a whole pruned model to reproduce the dense one: hidden states, final output, or what the user names.

Takes the pruned model, the dense one and batches. Needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.calibration import row_mask, run_batch
from sparsecomp.errors import ModelError
from sparsecomp.layers import find_linears, require_layers
from sparsecomp.prune.blocks import Forward, RowMask, find_blocks, first_tensor
from sparsecomp.prune.tuning import Call, Target, Tuning, TuningReport, evaluating, split, tune, variance

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

    Rows that ``mask`` hides count neither in the hidden states nor in an ``output`` with the mask's leading dimensions.

    Raises ModelError if there is neither a chain of blocks nor an ``output``, or ``teacher`` shares pruned
    weights with the model; CalibrationError for fewer than two batches.
    """
    every, train, kept_out = split(batches, held_out, tuning.held_out)
    layers = require_layers(find_linears(model))
    for name, each in masks.items():
        if name not in layers:
            raise ModelError(f'a mask is given for "{name}", which is no linear layer of the model; pass report.masks')
        if each.shape != layers[name].shape:
            raise ModelError(
                f'the mask of "{name}" has shape {tuple(each.shape)}, its weight {layers[name].shape}; '
                "pass the masks of this model's report"
            )
    own = {id(layers[name].parameter) for name in masks}
    if any(id(each) in own for each in teacher.parameters()):
        raise ModelError(
            "teacher shares weights with the model and was pruned with it; keep a copy.deepcopy of the dense model"
        )
    watched = tuple(_watched(model, masks, output))
    wanted = _Wanted(_Entry(teacher, forward, watched), every, mask, output, tuning.autocast)
    with evaluating(teacher):
        known = {index: wanted(index) for index in kept_out}
    scales = [variance(each) for each in zip(*known.values(), strict=True)]

    def loss(call: Call, index: int) -> Tensor:
        targets = known[index] if index in known else wanted(index)
        made = wanted.outputs(call, index)
        parts = [target.loss(each) / scale for target, each, scale in zip(targets, made, scales, strict=True)]
        blocks, rest = parts[: len(watched)], parts[len(watched) :]
        return torch.stack([*rest, *([torch.stack(blocks).mean(), blocks[-1]] if blocks else [])]).sum()

    stored = {
        f"model.{name}.weight" if name else "model.weight": each if layers[name].kind == "linear" else each.t()
        for name, each in masks.items()
    }
    student = _Entry(model, forward, watched)
    with evaluating(teacher):
        return tune("whole model", student, stored, loss, train, kept_out, tuning, show_progress)


def _watched(model: nn.Module, masks: Mapping[str, Tensor], output: Output | None) -> list[str]:
    try:
        return list(find_blocks(model, masks).modules)
    except ModelError:
        if output is None:
            raise ModelError(
                "the model has no repeated blocks with masks whose hidden states could be matched; "
                "pass output=lambda result, batch: ... to say what is"
            ) from None
        return []


class _Entry(nn.Module):
    """A model called on a batch, that also gives the hidden states its blocks return."""

    def __init__(self, model: nn.Module, forward: Forward | None, watched: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._forward, self._watched = model, forward, watched

    def forward(self, batch: Any, index: int) -> tuple[Any, list[Tensor]]:
        with _noting(self.model, self._watched) as states:
            result = run_batch(self.model, batch, index, self._forward)
        return result, [states[name] for name in self._watched]


@contextmanager
def _noting(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    states: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[name] = first_tensor(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class _Wanted:
    """What the teacher does on a batch, and what of a model's doing is compared with it."""

    def __init__(
        self,
        teacher: _Entry,
        batches: Sequence[Any],
        mask: RowMask | None,
        output: Output | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.teacher, self.batches, self.mask = teacher, batches, mask
        self.output, self.autocast = output, autocast

    def outputs(self, call: Call, index: int) -> list[Tensor]:
        """The blocks' hidden states, then the output."""
        result, states = call(self.batches[index], index)
        assert isinstance(states, list)
        if self.output is None:
            return states
        made = self.output(result, self.batches[index])
        if not isinstance(made, Tensor) or not made.is_floating_point() or made.ndim == 0:
            got = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ModelError(f"output(result, batch) gave a {got}; it must give numbers as a tensor [..., features]")
        return [*states, made]

    def __call__(self, index: int) -> list[Target]:
        """The targets of the batch."""
        device = next((each.device.type for each in self.teacher.parameters()), "cpu")
        with torch.no_grad(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            made = self.outputs(self.teacher, index)
        rows = row_mask(self.batches[index], self.mask)
        return [Target(each, rows) for each in made]
