"""The loss of a student beside a teacher: soft and hard targets, and hidden states; on real tokens alone.

Takes tensors or what models return, gives a scalar. Knows no masks of weights and no layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import MethodError, ModelError

# of labels that do not count, as in torch's cross-entropy
IGNORED = -100
States = Sequence[int] | Sequence[tuple[int, int]] | None


def distillation_loss(
    student: Any,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    soft: float = 1.0,
    hard: float = 1.0,
    hidden: float = 0.0,
    states: States = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """How far ``student`` is from ``teacher``, and from ``labels`` where they are given: a scalar, float32.

    Both are logits [..., classes], or what a model returned: an object or mapping with ``logits`` and, for ``hidden``,
    ``hidden_states``, such as Hugging Face models give with ``output_hidden_states=True``. The loss is the sum of

    - ``soft`` times T^2 KL(teacher || student) of the softmax at ``temperature`` T, the mean over rows (Hinton, Vinyals
      and Dean 2015, arXiv:1503.02531);
    - ``hard`` times the cross-entropy with ``labels`` (int64 [...], -100 where none counts), if there are any;
    - ``hidden`` times the mean over hidden states of their squared error relative to the variance of the teacher's:
      sum |s - t|^2 / sum |t - mean t|^2 over rows. ``states`` says which by index, or (student's, teacher's) pairs of
      them where the two are not as deep; by default all are.

    ``mask`` (bool, or int as in an attention mask, [batch, tokens]) says which tokens are real: no other counts, in any
    part. Where logits are [batch, classes] it is for hidden states alone. With ``causal`` the logits of each token are
    for the label of the next one, so that ``labels`` may be the input. No gradient goes to the teacher. Everything is
    computed in float32, whatever autocast and dtypes are. A part in which no row counts is 0.

    Raises MethodError for a temperature or weights that make no loss, ModelError for shapes that do not go together and
    results that lack what is asked for.
    """
    _check(temperature, soft, hard, hidden)
    wanted = soft > 0 or (labels is not None and hard > 0)
    parts: list[Tensor] = []
    with torch.autocast(_device(student), enabled=False):
        if wanted:
            own, given = _logits(student, "student"), _logits(teacher, "teacher").detach()
            if own.shape != given.shape:
                raise ModelError(
                    f"the student's logits have shape {tuple(own.shape)} and the teacher's {tuple(given.shape)}; run "
                    "both on the same batch, with the same classes"
                )
            real = _rows(mask, own)
            if soft > 0:
                parts.append(soft * _divergence(own, given, temperature, real))
            if labels is not None and hard > 0:
                parts.append(hard * _cross_entropy(own, labels, real, causal))
        if hidden > 0:
            parts.append(hidden * _hidden(student, teacher, states, mask))
    if not parts:
        raise MethodError("soft and hidden are zero and there are no labels, so that nothing is learned; give one")
    return torch.stack(parts).sum()


def _check(temperature: float, soft: float, hard: float, hidden: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise MethodError(f"temperature={temperature} is not above zero; use 1, or 2 for softer targets")
    for name, weight in (("soft", soft), ("hard", hard), ("hidden", hidden)):
        if not 0.0 <= weight < math.inf:
            raise MethodError(f"{name}={weight} is no weight of a part of the loss; give 0 or a number above it")


def _divergence(own: Tensor, given: Tensor, temperature: float, real: Tensor | None) -> Tensor:
    """T^2 KL(given || own), the mean over rows that count."""
    own, given = _selected(own, real), _selected(given, real)
    if temperature != 1.0:
        own, given = own / temperature, given / temperature
    total = functional.kl_div(own.log_softmax(dim=1), given.log_softmax(dim=1), reduction="sum", log_target=True)
    return total * (temperature**2 / max(own.shape[0], 1))


def _cross_entropy(own: Tensor, labels: Tensor, real: Tensor | None, causal: bool) -> Tensor:
    if labels.shape != own.shape[:-1] or labels.is_floating_point():
        raise ModelError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; logits of shape {tuple(own.shape)} take int64 "
            f"of shape {tuple(own.shape[:-1])}"
        )
    if real is not None:
        labels = labels.masked_fill(~real, IGNORED)
    if causal:
        if own.ndim < 3:
            raise ModelError(
                f"causal=True reads logits [batch, tokens, classes], got shape {tuple(own.shape)}; leave causal out"
            )
        own, labels = own[..., :-1, :], labels[..., 1:]
    counted = labels != IGNORED
    rows, wanted = _selected(own, counted), labels[counted].to(torch.int64)
    return functional.cross_entropy(rows, wanted, reduction="sum") / max(len(wanted), 1)


def _hidden(student: Any, teacher: Any, states: States, mask: Tensor | None) -> Tensor:
    own, given = _part(student, "hidden_states"), _part(teacher, "hidden_states")
    for whose, found in (("student", own), ("teacher", given)):
        if not found:
            raise ModelError(
                f"the {whose} gave no hidden_states; call it with output_hidden_states=True, or leave hidden out"
            )
    pairs = [each if isinstance(each, tuple) else (each, each) for each in states or range(len(own))]
    if states is None and len(own) != len(given):
        raise ModelError(
            f"the student has {len(own)} hidden states and the teacher {len(given)}; say with states=[(student's, "
            "teacher's), ...] which belong together"
        )
    losses = []
    for first, second in pairs:
        if not (-len(own) <= first < len(own) and -len(given) <= second < len(given)):
            raise ModelError(
                f"states names ({first}, {second}); the student has {len(own)} hidden states and the teacher "
                f"{len(given)}, counted from 0"
            )
        losses.append(_distance(own[first], given[second].detach(), mask))
    return torch.stack(losses).mean()


def _distance(own: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
    if own.shape != given.shape:
        raise ModelError(
            f"a hidden state has shape {tuple(own.shape)} in the student and {tuple(given.shape)} in the teacher; "
            "choose with states those of one shape"
        )
    real = _rows(mask, own)
    own, given = _selected(own, real), _selected(given, real)
    spread = (given - given.mean(dim=0)).square().sum() if given.shape[0] else given.new_zeros(())
    # one row, or rows that are all alike, have nothing to compare with
    return (own - given).square().sum() / torch.where(spread > 0, spread, 1.0)


def _rows(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """Bool [...]: which rows of ``values`` [..., features] count; None if all do."""
    if mask is None or mask.ndim >= values.ndim:
        return None
    if mask.shape != values.shape[:-1]:
        raise ModelError(
            f"mask has shape {tuple(mask.shape)} and what it is for {tuple(values.shape)}; it must have all dimensions "
            "but the last"
        )
    return mask.to(values.device) != 0


def _selected(values: Tensor, real: Tensor | None) -> Tensor:
    rows = values if real is None else values[real]
    return rows.reshape(-1, values.shape[-1]).float()


def _logits(result: Any, whose: str) -> Tensor:
    found = result if isinstance(result, Tensor) else _part(result, "logits")
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(
            f"the logits of the {whose} are {got}; give a tensor [..., classes], or what a model with logits returned"
        )
    return found


def _part(result: Any, name: str) -> Any:
    return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)


def _device(result: Any) -> str:
    if isinstance(result, Tensor):
        return result.device.type
    for each in (_part(result, "logits"), *(_part(result, "hidden_states") or ())):
        if isinstance(each, Tensor):
            return each.device.type
    return "cpu"
