"""Prune block after block, each seeing the pruned blocks before it, and tune each to what the dense block returned.

Takes a model and batches. Knows how blocks follow each other; layers are solved in ``layerwise``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecomp.calibration import Calibration, LayerStatistics, calibrate
from sparsecomp.layers import Globs, LinearRef, find_linears, require_layers
from sparsecomp.patterns import Pattern
from sparsecomp.prune.blocks import BlockCall, Forward, RowMask, capture, find_blocks, first_tensor
from sparsecomp.prune.checkpoint import Checkpoint, digest, tensors_of
from sparsecomp.prune.graph import Hidden
from sparsecomp.prune.layerwise import make_jobs, naming, solve
from sparsecomp.prune.model import check_calibration, check_masks, choose_patterns, permutable
from sparsecomp.prune.provenance import describe
from sparsecomp.prune.registry import get_method
from sparsecomp.prune.report import LayerReport, PruneReport
from sparsecomp.prune.tuning import Call, Target, Tuning, TuningReport, evaluating, split, tune, variance

if TYPE_CHECKING:
    from sparsecomp.plan import Plan


def prune_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    pattern: str | Pattern | Mapping[str, str | Pattern] | Plan = "2:4",
    method: str = "wanda",
    *,
    tuning: Tuning | None = Tuning(),  # noqa: B008 (frozen)
    held_out: Iterable[Any] | None = None,
    only: Globs = None,
    skip: Globs = None,
    masks: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
    mask: RowMask | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> PruneReport:
    """Prune the repeated blocks of ``model`` one after the other, in place, and tune each after it was pruned.

    A block is calibrated on what the pruned blocks before it return. Then, with ``tuning``, its kept weights, biases
    and norms are tuned, masks fixed, to return what the dense block returned in the dense model. Layers outside the
    blocks stay dense and are named in the report; blocks in which nothing is pruned stay as they are. ``batches``,
    ``forward`` and ``mask`` are as in ``calibrate``, all batches are held in memory as the blocks' inputs; patterns,
    masks and ``method`` as in ``prune``. ``held_out`` batches, or a share of ``batches``, are neither calibrated nor
    trained on: the report shows both errors.

    ``checkpoint`` is a folder in which finished blocks are kept; a second call with equal input goes on from there.
    If anything is raised, also KeyboardInterrupt, the model gets its dense weights back.

    Raises what ``prune`` raises, ModelError if the model has no chain of blocks, CalibrationError for fewer than two
    batches.
    """
    chosen = get_method(method)
    found = require_layers(find_linears(model, only, skip))
    patterns, skipped = choose_patterns(found, pattern)
    blocks = find_blocks(model, patterns)
    for name in [name for name in patterns if blocks.owner(name) is None]:
        del patterns[name]
        skipped[name] = "it is in none of the blocks"
    given = check_masks(masks, patterns, found)
    every, train, kept_out = split(batches, held_out, (tuning or Tuning()).held_out)
    hidden, unpermuted = permutable(
        model, None if forward else every[0], method, found, patterns, given, "forward=... hides how a batch enters it"
    )
    before = {name: each.detach().clone() for name, each in _state(model).items()}
    store = Checkpoint(checkpoint)
    done: list[_Done] = []
    try:
        with evaluating(model):
            calls, rows = capture(model, blocks, every, forward, mask)
            run = _Run(rows, train, kept_out, method, tuning, store, seed, show_progress)
            dense = [call.x for call in calls[next(iter(blocks.modules))]]
            pruned = list(dense)
            key = ""
            if store.folder is not None:
                # what reaches the blocks, not the batches: they may be of any kind, and entered in any way
                passed = [(call.args, call.kwargs) for each in calls.values() for call in each]
                key = digest(*tensors_of(passed), *rows, train, kept_out, method, tuning, seed, *before.values())
            for name, block in blocks.modules.items():
                mine = _Block(name, block, calls[name], found, patterns, given, hidden)
                key = digest(key, name, mine.patterns, mine.hidden, list(mine.masks), *mine.masks.values())
                wanted = run.outputs(mine, dense)
                if mine.patterns:
                    finished = run.load(mine, key)
                    if finished is None:
                        finished = run.prune(mine, pruned, wanted, chosen.needs_gram)
                        run.save(mine, key, finished)
                    done.append(finished)
                dense, pruned = wanted, run.outputs(mine, pruned)
    except BaseException:
        with torch.no_grad():
            for name, each in _state(model).items():
                each.copy_(before[name])
        raise
    layers = {name: report for each in done for name, report in each.layers.items()}
    kept = {name: mask for each in done for name, mask in each.masks.items()}
    tunings = tuple(each.tuning for each in done if each.tuning is not None)
    told = describe(model, skipped, seed=seed, batches=len(train), held_out_batches=len(kept_out))
    return PruneReport(method, layers, skipped, kept, unpermuted, tunings, provenance=told)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@dataclass(frozen=True, eq=False)
class _Done:
    layers: Mapping[str, LayerReport]
    masks: Mapping[str, Tensor]
    tuning: TuningReport | None


class _Block:
    """One block, its calls, and what concerns the layers in it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[BlockCall],
        found: Mapping[str, LinearRef],
        patterns: Mapping[str, Pattern],
        masks: Mapping[str, Tensor],
        hidden: Sequence[Hidden],
    ) -> None:
        def inside(layer: str) -> bool:
            return layer.startswith(f"{name}.")

        self.name, self.module, self.calls = name, module, calls
        self.layers = {key: each for key, each in found.items() if inside(key)}
        self.patterns = {key: each for key, each in patterns.items() if inside(key)}
        self.masks = {key: each for key, each in masks.items() if inside(key)}
        self.hidden = [each for each in hidden if inside(each.consumer) and all(map(inside, each.producers))]

    def stored_masks(self, solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks by parameter name within the block, as the parameters are stored."""
        stored = {}
        for name, mask in solved.items():
            layer = self.layers[name]
            stored[f"{name.removeprefix(self.name + '.')}.weight"] = mask if layer.kind == "linear" else mask.t()
        return stored


@dataclass(frozen=True, eq=False)
class _Run:
    rows: Sequence[Tensor | None]
    train: Sequence[int]
    held_out: Sequence[int]
    method: str
    tuning: Tuning | None
    checkpoint: Checkpoint
    seed: int
    show_progress: bool

    def outputs(self, block: _Block, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the block returns now, batch by batch."""
        results = []
        with torch.no_grad():
            for call, x in zip(block.calls, inputs, strict=True):
                whole = call.with_input(x)
                results.append(first_tensor(block.module(*whole.args, **whole.kwargs)))
        return results

    def prune(self, block: _Block, inputs: Sequence[Tensor], wanted: Sequence[Tensor], needs_gram: bool) -> _Done:
        """Calibrate, prune and tune the block."""
        items = [(call.with_input(x), rows) for call, x, rows in zip(block.calls, inputs, self.rows, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            grams = self._calibrate(block, [items[i] for i in self.train])
            held_out = self._calibrate(block, [items[i] for i in self.held_out])
            if needs_gram:
                check_calibration(get_method(self.method), list(block.patterns), grams)
            jobs = make_jobs(block.layers, block.patterns, self.method, grams, held_out, block.masks)
            what = f"{block.name} ({self.method})"
            solved = solve(jobs, block.hidden, Checkpoint(None), what, self.show_progress)
        for each in solved.values():
            each.write()
        masks = {name: each.mask for name, each in solved.items()}
        layers = {name: each.report for name, each in solved.items()}
        return _Done(layers, masks, None if self.tuning is None else self._tune(block, items, wanted, masks))

    def _calibrate(self, block: _Block, items: Sequence[tuple[BlockCall, Tensor | None]]) -> Calibration:
        def forward(module: nn.Module, item: tuple[BlockCall, Tensor | None]) -> object:
            return module(*item[0].args, **item[0].kwargs)

        with naming(block.name):
            names = [name.removeprefix(f"{block.name}.") for name in block.patterns]
            found = calibrate(
                block.module, items, only=names, forward=forward, mask=lambda item: item[1], show_progress=False
            )
        statistics: dict[str, LayerStatistics] = {f"{block.name}.{name}": each for name, each in found.items()}
        return replace(found, layers=statistics)

    def _tune(
        self,
        block: _Block,
        items: Sequence[tuple[BlockCall, Tensor | None]],
        wanted: Sequence[Tensor],
        masks: Mapping[str, Tensor],
    ) -> TuningReport:
        assert self.tuning is not None
        targets = [Target(each, rows) for each, rows in zip(wanted, self.rows, strict=True)]
        scale = variance(targets)

        def loss(call: Call, batch: int) -> Tensor:
            made = items[batch][0]
            return targets[batch].loss(first_tensor(call(*made.args, **made.kwargs))) / scale

        stored = block.stored_masks(masks)
        return tune(block.name, block.module, stored, loss, self.train, self.held_out, self.tuning, self.show_progress)

    def save(self, block: _Block, key: str, done: _Done) -> None:
        tensors = {f"state.{name}": each for name, each in _state(block.module).items()}
        tensors |= {f"mask.{name}": each for name, each in done.masks.items()}
        facts = {
            "layers": [each.to_dict() for each in done.layers.values()],
            "tuning": None if done.tuning is None else done.tuning.to_dict(),
        }
        self.checkpoint.save(block.name, key, tensors, facts)

    def load(self, block: _Block, key: str) -> _Done | None:
        """The finished block, its weights put in place; None if it has not been finished."""
        kept = self.checkpoint.load(block.name, key)
        if kept is None:
            return None
        tensors, facts = kept
        with torch.no_grad():
            for name, each in _state(block.module).items():
                each.copy_(tensors[f"state.{name}"])
        layers = {each["name"]: LayerReport.from_dict(each) for each in facts["layers"]}
        masks = {name: tensors[f"mask.{name}"].to(block.layers[name].device) for name in layers}
        tuning = None if facts["tuning"] is None else TuningReport.from_dict(facts["tuning"])
        return _Done(layers, masks, tuning)
