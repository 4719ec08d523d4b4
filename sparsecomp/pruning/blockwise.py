"""Prune block after block, each seeing the pruned blocks before it, and tune each to what the dense block returned.

Takes a model and batches. Knows how blocks follow each other; layers are solved in ``solve``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import ModelError
from sparsecomp.methods.registry import get_method
from sparsecomp.models.batches import Forward, eager, entering, evaluating, first_tensor, split
from sparsecomp.models.blocks import Blocks, find_chains
from sparsecomp.models.calibration import Calibration, collect
from sparsecomp.models.calls import BlockRows, Blockwise, Chain, capture
from sparsecomp.models.graph import Hidden
from sparsecomp.models.layers import Globs, LayerTable, LinearRef, find_layers, require_layers
from sparsecomp.models.rows import RowMask, RowMasks
from sparsecomp.modules.snapshot import put, tensors_of
from sparsecomp.patterns import Pattern
from sparsecomp.planning.selection import choose_patterns
from sparsecomp.pruning.checkpoint import Checkpoint, digest
from sparsecomp.pruning.learning import Call
from sparsecomp.pruning.model import check_calibration, check_masks, permutable
from sparsecomp.pruning.provenance import describe
from sparsecomp.pruning.refilled import warn_where_refilled
from sparsecomp.pruning.report import LayerReport, PruneReport
from sparsecomp.pruning.solve import make_jobs, solve, warn_of_thin
from sparsecomp.pruning.tuning import Target, Tuning, TuningReport, tune, variance

if TYPE_CHECKING:
    from sparsecomp.planning.planner import Plan


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
    and norms are tuned, masks fixed, to return what the dense block returned in the dense model. A model with several
    chains of blocks, such as an encoder and a decoder, has each pruned in the order of their calls, on what the pruned
    chains before it give. Layers outside the blocks stay dense and are named in the report; blocks in which nothing is
    pruned stay as they are. ``batches``, ``forward`` and ``mask`` are as in ``calibrate``, all batches are held in
    memory as the blocks' inputs; patterns, masks and ``method`` as in ``prune``. ``held_out`` batches, or a share of
    ``batches``, are neither calibrated nor trained on: the report shows both errors.

    Models run as in ``calibrate``, without a cache of keys and values; every call of a block gets copies of its
    arguments, and the model's buffers and attributes are those of before.

    ``checkpoint`` is a folder in which finished blocks are kept; a second call with equal input goes on from there.
    If anything is raised, also KeyboardInterrupt, the model gets its dense weights back.

    Raises what ``prune`` raises, ModelError if the model has no chain of blocks, CalibrationError for fewer than two
    batches, MethodError for a block that cannot be tuned, such as one whose forward runs without gradients.
    """
    model = eager(model)
    get_method(method)
    with entering(model):
        found = require_layers(find_layers(model, only, skip))
        patterns, skipped = choose_patterns(found, pattern)
        chains = find_chains(model, patterns)
        _leave(patterns, skipped, chains, "it is in none of the blocks")
        given = check_masks(masks, patterns, found)
        every, train, kept_out = split(batches, held_out, (tuning or Tuning()).held_out)
        example = None if forward else every[0]
        hidden, unpermuted = permutable(
            model, example, method, found, patterns, given, "forward=... hides how a batch enters it"
        )
        before = {name: each.detach().clone() for name, each in _state(model).items()}
        store = Checkpoint(checkpoint)
        done: list[_Done] = []
        try:
            with evaluating(model):
                rows = RowMasks(
                    model, mask, [*found, *(name for each in chains for name in each.modules)], found.convolutions
                )
                layers = {name: found[name] for name in patterns}
                captured = _usable(capture(model, chains, every, forward, rows, layers), skipped, patterns)
                check_masks(masks, patterns, found)
                run = _Run(train, kept_out, method, tuning, store, seed, show_progress)
                key = ""
                if store.folder is not None:
                    # what reaches the blocks, not the batches: they may be of any kind, and entered in any way
                    reaching = tensors_of([each.reaching() for each in captured])
                    key = digest(*reaching, train, kept_out, method, tuning, seed, *before.values())
                for place, dense in enumerate(captured):
                    # the chains before have changed what reaches this one
                    seen = dense if place == 0 else capture(model, [dense.blocks], every, forward)[0]
                    if seen.why_not is not None:
                        raise ModelError(f"after the blocks before were pruned: {seen.why_not}")
                    blocks = [_Block(*each, found, patterns, given, hidden) for each in dense.blocks.modules.items()]
                    done.extend(run.chain(dense, seen, blocks, key))
                    for block in blocks:
                        key = block.key(key)
        except BaseException:
            for name, each in _state(model).items():
                put(each, before[name])
            raise
    finished = {name: report for each in done for name, report in each.layers.items()}
    kept = {name: mask for each in done for name, mask in each.masks.items()}
    tunings = tuple(each.tuning for each in done if each.tuning is not None)
    unpermuted = {name: reason for name, reason in unpermuted.items() if name in finished}
    warn_of_thin(finished.values())
    warn_where_refilled(found[name].parameter for name in finished)
    told = describe(model, skipped, seed=seed, batches=len(train), held_out_batches=len(kept_out))
    return PruneReport(method, finished, skipped, kept, unpermuted, tunings, provenance=told)


def _leave(patterns: dict[str, Pattern], skipped: dict[str, str], chains: Iterable[Blocks], reason: str) -> None:
    """Take the layers that are in none of the chains out of ``patterns``."""
    chains = list(chains)
    for name in [name for name in patterns if all(each.owner(name) is None for each in chains)]:
        del patterns[name]
        skipped[name] = reason


def _usable(chains: list[Chain], skipped: dict[str, str], patterns: dict[str, Pattern]) -> list[Chain]:
    """The chains whose blocks can be called one by one, in the order of their calls; the others' layers stay dense.

    Raises ModelError for the largest chain that was called.
    """
    called = [each for each in chains if each.began is not None]
    if not called:
        raise ModelError(f"no batch reaches the blocks of the model ({chains[0].why_not}); pass batches that do")
    if called[0].why_not is not None:
        raise ModelError(called[0].why_not)
    usable = [each for each in called if each.why_not is None]
    for each in chains:
        if each not in usable:
            others = [one.blocks for one in chains if one is not each]
            _leave(
                patterns, skipped, others, "no batch reaches its blocks" if each.began is None else f"{each.why_not}"
            )
    return sorted(usable, key=lambda each: each.began or 0)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@dataclass(frozen=True, eq=False)
class _Done:
    layers: Mapping[str, LayerReport]
    masks: Mapping[str, Tensor]
    tuning: TuningReport | None


class _Block:
    """One block, and what concerns the layers in it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        found: Mapping[str, LinearRef],
        patterns: Mapping[str, Pattern],
        masks: Mapping[str, Tensor],
        hidden: Sequence[Hidden],
    ) -> None:
        def inside(layer: str) -> bool:
            return layer.startswith(f"{name}.")

        self.name, self.module = name, module
        self.layers = {key: each for key, each in found.items() if inside(key)}
        self.patterns = {key: each for key, each in patterns.items() if inside(key)}
        self.masks = {key: each for key, each in masks.items() if inside(key)}
        self.hidden = [each for each in hidden if inside(each.consumer) and all(map(inside, each.producers))]

    def key(self, before: str) -> str:
        """Stands for the work on this block after work that ``before`` stands for."""
        return digest(before, self.name, self.patterns, self.hidden, list(self.masks), *self.masks.values())

    def stored_masks(self, solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks by parameter name within the block, as the parameters are stored."""
        stored = {}
        for name, mask in solved.items():
            stored[f"{name.removeprefix(self.name + '.')}.weight"] = self.layers[name].from_matrix(mask)
        return stored


class _Rows:
    """The rows that count in the calls of a block, by batch."""

    def __init__(self, rows: Sequence[BlockRows]) -> None:
        self._rows, self._now = rows, BlockRows()

    def learn(self, batch: int, run: Callable[[Any], object]) -> None:
        pass

    @contextmanager
    def reading(self, index: int, batch: int) -> Iterator[None]:
        self._now = self._rows[batch]
        with self._now.reading(index, batch):
            yield

    def of(self, name: str, x: Tensor) -> Tensor | None:
        return self._now.of(name, x)


@dataclass(frozen=True, eq=False)
class _Run:
    train: Sequence[int]
    held_out: Sequence[int]
    method: str
    tuning: Tuning | None
    checkpoint: Checkpoint
    seed: int
    show_progress: bool

    def chain(self, dense: Chain, seen: Chain, blocks: Iterable[_Block], key: str) -> Iterator[_Done]:
        """Prune block after block: ``dense`` has the calls in the dense model, ``seen`` those in the pruned one."""
        before, now = Blockwise(dense), Blockwise(seen)
        for block in blocks:
            key = block.key(key)
            wanted = before.advance(block.name)
            if block.patterns:
                finished = self.load(block, key)
                if finished is None:
                    finished = self.prune(block, now, dense.rows[block.name], wanted)
                    self.save(block, key, finished)
                yield finished
            now.advance(block.name)

    def prune(self, block: _Block, calls: Blockwise, rows: Sequence[BlockRows], wanted: Sequence[Tensor]) -> _Done:
        """Calibrate, prune and tune the block."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            grams = self._calibrate(block, calls, rows, self.train)
            held_out = self._calibrate(block, calls, rows, self.held_out)
        check_calibration(get_method(self.method), list(block.patterns), grams)
        jobs = make_jobs(block.layers, block.patterns, self.method, grams, held_out, block.masks)
        what = f"{block.name} ({self.method})"
        solved = solve(jobs, block.hidden, Checkpoint(None), what, self.show_progress, self.seed)
        for each in solved.values():
            each.write()
        masks = {name: each.mask for name, each in solved.items()}
        layers = {name: each.report for name, each in solved.items()}
        return _Done(layers, masks, None if self.tuning is None else self._tune(block, calls, rows, wanted, masks))

    def _calibrate(
        self, block: _Block, calls: Blockwise, rows: Sequence[BlockRows], batches: Sequence[int]
    ) -> Calibration:
        def run(batch: int, _index: int) -> object:
            args, kwargs = calls.arguments(block.name, batch)
            return block.module(*args, **kwargs)

        layers = LayerTable({name: block.layers[name] for name in block.patterns}, {})
        return collect(block.module, layers, batches, _Rows(rows), run)

    def _tune(
        self,
        block: _Block,
        calls: Blockwise,
        rows: Sequence[BlockRows],
        wanted: Sequence[Tensor],
        masks: Mapping[str, Tensor],
    ) -> TuningReport:
        assert self.tuning is not None
        targets = [Target(each, row.output) for each, row in zip(wanted, rows, strict=True)]
        scale = variance(targets)

        def loss(call: Call, batch: int) -> Tensor:
            args, kwargs = calls.arguments(block.name, batch)
            return targets[batch].loss(first_tensor(call(*args, **kwargs))) / scale

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
        for name, each in _state(block.module).items():
            put(each, tensors[f"state.{name}"])
        layers = {each["name"]: LayerReport.from_dict(each) for each in facts["layers"]}
        masks = {name: tensors[f"mask.{name}"].to(block.layers[name].device) for name in layers}
        tuning = None if facts["tuning"] is None else TuningReport.from_dict(facts["tuning"])
        return _Done(layers, masks, tuning)
