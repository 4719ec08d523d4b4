"""Solve the layers of a model or of one block, each on its own, before any weight is written.

Takes layers, patterns and statistics, gives ``Solved`` values; writing them is another step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sparsecomp.errors import naming
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.order import search
from sparsecomp.methods.weight import PrunedWeight, prune_weight
from sparsecomp.models.calibration import ENOUGH_ROWS, LayerStatistics
from sparsecomp.models.graph import Hidden
from sparsecomp.models.layers import LinearRef
from sparsecomp.modules.snapshot import put
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.positions import cut_positions, missing, pad_gram, pad_positions
from sparsecomp.pruning.checkpoint import Checkpoint, digest
from sparsecomp.pruning.report import LayerReport
from sparsecomp.reporting.terminal import progress

_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to solve: ``gram`` and ``held_out`` [in, in] or None, ``mask`` [out, in] the user's or None.

    ``rows`` are the input rows that ``gram`` is the sum of.
    """

    layer: LinearRef
    pattern: Pattern
    method: str
    gram: Tensor | None = None
    held_out: Tensor | None = None
    mask: Tensor | None = None
    rows: int | None = None


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer's new weight and mask [out, in], in the order of rows and columns it is to have.

    ``rows`` and ``columns`` say which old row or column each new one was; None where they stay as they were.
    """

    layer: LinearRef
    weight: Tensor
    mask: Tensor
    report: LayerReport
    rows: Tensor | None = None
    columns: Tensor | None = None

    def write(self) -> None:
        """Put the weight into the layer, and its bias into the order of the rows."""
        with torch.inference_mode(self.layer.parameter.is_inference()):
            self.layer.set_weight(self.weight)
        bias = self.layer.bias
        if self.rows is not None and bias is not None:
            put(bias, bias.detach()[self.rows.to(bias.device)])


def make_jobs(
    layers: Mapping[str, LinearRef],
    patterns: Mapping[str, Pattern],
    method: str,
    grams: Mapping[str, LayerStatistics],
    held_out: Mapping[str, LayerStatistics],
    masks: Mapping[str, Tensor],
) -> dict[str, Job]:
    """One job a layer that has a pattern."""
    return {
        name: Job(
            layers[name],
            pattern,
            method,
            grams[name].gram if name in grams else None,
            held_out[name].gram if name in held_out else None,
            masks.get(name),
            grams[name].tokens if name in grams else None,
        )
        for name, pattern in patterns.items()
    }


def solve(
    jobs: Mapping[str, Job],
    hidden: Sequence[Hidden],
    checkpoint: Checkpoint,
    description: str,
    show_progress: bool = True,
    seed: int = 0,
) -> dict[str, Solved]:
    """Solve every job; nothing is written. ``hidden`` are the permutations to try, each kept only where it helps.

    Methods run with torch's generator at ``seed``; the caller's generator is left as it was.

    Raises what ``prune_weight`` raises, with the layer's name.
    """
    solved = solve_each(jobs, hidden, checkpoint, description, lambda each: each, show_progress, seed)
    orders: dict[str, Tensor] = {}
    for one in hidden:
        order = solved[one.consumer].columns
        if order is not None:
            orders.update(dict.fromkeys(one.producers, order))
    for name, order in orders.items():
        each = solved[name]
        rows = order.to(each.weight.device)
        solved[name] = replace(each, weight=each.weight[rows], mask=each.mask[rows], rows=rows)
    return solved


def solve_each(
    jobs: Mapping[str, Job],
    hidden: Sequence[Hidden],
    checkpoint: Checkpoint,
    description: str,
    use: Callable[[Solved], _Made],
    show_progress: bool = True,
    seed: int = 0,
) -> dict[str, _Made]:
    """What ``use`` makes of each layer as ``solve`` solves it, before the next is solved: it may let the weight go.

    Rows are as they were, also where ``hidden`` lets the columns of a consumer move. Raises as ``solve``.
    """
    consumers = {each.consumer: each for each in hidden}
    made: dict[str, _Made] = {}
    items = list(jobs.items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, job in progress(items, description, len(items)) if show_progress else items:
            with naming(name):
                solved = _solve_one(name, job, consumers.get(name), checkpoint)
            made[name] = use(solved)
            del solved
    return made


def warn_of_thin(reports: Iterable[LayerReport]) -> None:
    """One UserWarning if layers were fitted to so few rows that their errors say little of other data."""
    every = list(reports)
    thin = [each for each in every if each.few_rows]
    if thin:
        worst = min(thin, key=lambda each: each.rows_per_input or 0.0)
        warnings.warn(
            f"{len(thin)} of {len(every)} pruned layers have fewer than {ENOUGH_ROWS} calibration rows for each "
            f'input ("{worst.name}" has {worst.rows} for {worst.shape[1]}), so that they are fitted to these rows and '
            "their errors look better than they are; calibrate with more batches",
            UserWarning,
            stacklevel=3,
        )


def warn_of_notes(reports: Iterable[LayerReport]) -> None:
    """One UserWarning with what the methods noted, for callers that hand no report on."""
    noted: dict[str, list[str]] = {}
    for each in reports:
        for note in each.notes:
            noted.setdefault(note, []).append(each.name or "the model")
    if noted:
        told = [f"{note} ({len(names)} layers, the first {names[0]})" for note, names in noted.items()]
        warnings.warn(
            f"pruning noted: {'; '.join(told)}; sc.prune returns a report of every layer, and takes held_out and "
            "example batches",
            UserWarning,
            stacklevel=3,
        )


def _solve_one(name: str, job: Job, hidden: Hidden | None, checkpoint: Checkpoint) -> Solved:
    segments = None if hidden is None else hidden.segments
    weight = job.layer.get_weight()
    key = ""
    if checkpoint.folder is not None:
        key = digest(
            weight,
            str(job.pattern),
            job.method,
            job.gram,
            job.held_out,
            job.mask,
            segments,
            job.rows,
            job.layer.channels,
        )
        found = checkpoint.load(name, key)
        if found is not None:
            tensors, facts = found
            tensors = {key: each.to(weight.device) for key, each in tensors.items()}
            report = LayerReport.from_dict(facts)
            return Solved(job.layer, tensors["weight"], tensors["mask"], report, columns=tensors.get("order"))
    begin = time.perf_counter()
    pruned, held, order = _best_order(weight, job, segments)
    seconds = time.perf_counter() - begin
    report = LayerReport(
        name,
        job.layer.shape,
        pruned.pattern,
        job.method,
        pruned.density,
        pruned.error,
        pruned.measured_on,
        seconds,
        held,
        order is not None,
        pruned.notes,
        job.rows,
        job.layer.runs_dense,
    )
    tensors = {"weight": pruned.weight, "mask": pruned.mask}
    checkpoint.save(name, key, tensors if order is None else tensors | {"order": order}, report.to_dict())
    return Solved(job.layer, pruned.weight, pruned.mask, report, columns=order)


def _best_order(
    weight: Tensor, job: Job, segments: Sequence[int] | None
) -> tuple[PrunedWeight, float | None, Tensor | None]:
    """The solved weight, its held-out error, and the order of columns if a permuted layer was solved better."""
    if job.layer.kind == "conv2d":
        return *_prune_positions(weight, job), None
    plain, error = _prune(weight, job, None)
    if segments is None or job.gram is None:
        return plain, error, None
    order = search(weight, job.gram, job.pattern, segments)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return plain, error, None
    permuted, permuted_error = _prune(weight, job, order)
    before = (plain.error if error is None else error, plain.error)
    after = (permuted.error if permuted_error is None else permuted_error, permuted.error)
    # kept only if neither the calibration nor the held-out error grows
    if after[0] < before[0] and after[1] <= before[1]:
        return permuted, permuted_error, order
    return plain, error, None


def _prune(weight: Tensor, job: Job, order: Tensor | None) -> tuple[PrunedWeight, float | None]:
    gram, held_out = job.gram, job.held_out
    if order is not None:
        order = order.to(weight.device)
        weight = weight[:, order]
        gram, held_out = (None if each is None else each[order][:, order] for each in (gram, held_out))
    pruned = prune_weight(weight, job.pattern, job.method, gram, job.mask, held_out)
    return pruned, None if held_out is None else relative_error(weight, pruned.weight, held_out)


def _prune_positions(weight: Tensor, job: Job) -> tuple[PrunedWeight, float | None]:
    """A convolution, solved with columns of zeros where groups would cross from one kernel position to the next."""
    channels, pattern, columns = job.layer.channels, job.pattern, weight.shape[1]
    if not missing(pattern, channels, columns) or not _fitting(weight, job):
        return _prune(weight, job, None)  # also says what is wrong, in the columns that the layer has
    wide = pad_positions(weight, channels, pattern)
    gram, held_out = (None if each is None else pad_gram(each, channels, pattern) for each in (job.gram, job.held_out))
    mask = None if job.mask is None else pad_positions(job.mask, channels, pattern)
    pruned = prune_weight(wide, pattern, job.method, gram, mask, held_out)
    values, kept = (cut_positions(each, channels, pattern, columns) for each in (pruned.weight, pruned.mask))
    error = None if job.held_out is None else relative_error(weight, values, job.held_out)
    return replace(pruned, weight=values, mask=kept), error


def _fitting(weight: Tensor, job: Job) -> bool:
    """Whether what is given has the shapes of the layer, and its weight is finite."""
    columns = weight.shape[1]
    if any(each is not None and tuple(each.shape) != (columns, columns) for each in (job.gram, job.held_out)):
        return False
    mask = job.mask
    fits = mask is None or (isinstance(mask, Tensor) and mask.shape == weight.shape and mask.dtype == torch.bool)
    return fits and bool(torch.isfinite(weight).all())
