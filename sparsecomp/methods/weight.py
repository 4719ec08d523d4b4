"""Prune one weight: checks what it is given, runs the method, measures the error. Knows nothing of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsecomp.errors import CalibrationError, MethodError, PatternError
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.registry import Problem, get_method
from sparsecomp.patterns import Pattern, parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.patterns.numbers import LAYER_DTYPES

_ASYMMETRY = 1e-3


@dataclass(frozen=True, eq=False)
class PrunedWeight:
    """A weight that fits its pattern.

    ``weight`` [out, in] in the dtype it came in, zero where ``mask`` (bool [out, in]) is False. ``error`` is relative:
    ||(W-V)X|| / ||WX|| on the Gram if ``measured_on`` is "gram", ||W-V|| / ||W|| if it is "weight". ``notes`` say what
    the method had to do unasked, such as raising the damping, or did not reach.
    """

    weight: Tensor
    mask: Tensor
    pattern: Pattern
    method: str
    error: float
    measured_on: Literal["gram", "weight"]
    notes: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Fraction of weights the mask keeps; 0.0 for an empty weight."""
        return int(self.mask.sum()) / max(self.mask.numel(), 1)


def prune_weight(
    w: Tensor,
    pattern: str | Pattern,
    method: str = "magnitude",
    gram: Tensor | None = None,
    mask: Tensor | None = None,
    held_out: Tensor | None = None,
) -> PrunedWeight:
    """Prune ``w`` [out, in] (fp32, fp16, bf16 or fp64; computed in fp32 or wider) to ``pattern``.

    ``gram`` is X^T X [in, in], fp32 or fp64, over all calibration tokens; methods that need none use it for ``.error``.
    ``mask`` (bool [out, in], True = kept) replaces the method's own choice; it may keep less than the pattern allows.
    ``held_out`` is the Gram of tokens that ``gram`` has not seen; "best" chooses its damping by it.

    Raises MethodError for an unknown method, PatternError for a weight or mask that cannot be used, CalibrationError
    for a Gram that is missing, of the wrong size or not finite.
    """
    pattern = parse(pattern)
    chosen = get_method(method)
    weight = _checked_weight(w)
    if held_out is not None:
        held_out = _checked_gram(held_out, weight, "held_out")
    if gram is not None:
        gram = _checked_gram(gram, weight)
    elif chosen.needs_gram:
        raise CalibrationError(
            f'method "{method}" needs a Gram matrix and got none; '
            f"pass gram=cal[name].gram of cal = sc.calibrate(model, batches)"
        )
    if mask is not None:
        mask = _checked_mask(mask, weight, pattern)
    wide = weight if weight.dtype == torch.float64 else weight.float()
    values, kept, notes = chosen.solve(Problem(wide, pattern, gram, mask, held_out))
    pruned = torch.where(kept, values, 0.0).to(weight.dtype)
    if not bool(torch.isfinite(pruned).all()):
        raise MethodError(
            f'method "{method}" gave weights that overflow {weight.dtype}; prune a float32 weight instead'
        )
    error = relative_error(weight, pruned, gram)
    return PrunedWeight(pruned, kept, pattern, method, error, "weight" if gram is None else "gram", notes)


def _checked_weight(w: Tensor) -> Tensor:
    if not isinstance(w, Tensor) or w.ndim != 2:
        got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise PatternError(f"prune_weight takes a weight of shape [out, in], got {got}; reshape it to two dimensions")
    if w.dtype not in LAYER_DTYPES:
        names = ", ".join(str(dtype) for dtype in LAYER_DTYPES)
        raise PatternError(f"prune_weight takes dtypes {names}, got {w.dtype}; convert the weight first")
    weight = w.detach()
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        value = weight[row, column].item()
        raise PatternError(f"weight[{row}, {column}] is {value}; weights must be finite, repair the weight first")
    return weight


def _checked_gram(gram: Tensor, weight: Tensor, name: str = "gram") -> Tensor:
    columns = weight.shape[1]
    how = "pass X^T X over the layer's inputs, for example from sc.calibrate"
    if not isinstance(gram, Tensor):
        raise CalibrationError(f"{name} is a {type(gram).__name__}, not a tensor [in, in]; pass cal[name].gram")
    if tuple(gram.shape) != (columns, columns):
        raise CalibrationError(
            f"{name} has shape {tuple(gram.shape)}; a weight of shape {tuple(weight.shape)} needs "
            f"{(columns, columns)}; {how}"
        )
    if gram.dtype not in (torch.float32, torch.float64):
        raise CalibrationError(f"{name} is {gram.dtype}; allowed are torch.float32 and torch.float64; {how}")
    gram = gram.detach().to(weight.device)
    finite = torch.isfinite(gram)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise CalibrationError(f"{name}[{row}, {column}] is {gram[row, column].item()}; a Gram must be finite; {how}")
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        feature = int((diagonal < 0).nonzero()[0])
        raise CalibrationError(f"{name}[{feature}, {feature}] is {diagonal[feature].item()}, below zero; {how}")
    scale = float(diagonal.max()) if columns else 0.0
    if columns and float((gram - gram.T).abs().max()) > _ASYMMETRY * scale:
        raise CalibrationError(f"{name} is not symmetric; {how}")
    return gram


def _checked_mask(mask: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise PatternError(f"mask is {got}; allowed is a torch.bool tensor, True where a weight is kept; try mask != 0")
    if mask.shape != weight.shape:
        raise PatternError(
            f"mask has shape {tuple(mask.shape)}; the weight has {tuple(weight.shape)} and the mask must too"
        )
    mask = mask.detach().to(weight.device)
    check_mask(mask, pattern)
    return mask
