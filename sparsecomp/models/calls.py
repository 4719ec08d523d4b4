"""What goes through the blocks of a model, batch by batch, kept so that each block can be called again on its own.

Takes a model, its chains of blocks and batches, gives calls. Knows nothing of pruning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.models.batches import Forward, first_tensor, fresh, run_batch
from sparsecomp.models.blocks import Blocks
from sparsecomp.models.layers import LinearRef
from sparsecomp.models.rows import RowMasks
from sparsecomp.modules.snapshot import (
    ModuleState,
    Placeholder,
    clone,
    copied,
    holds_state,
    tensors_of,
    traits,
    version,
)

# a block, and which of the tensors that it returns, or of its arguments as its call leaves them
Place = tuple[str, int | str]


@dataclass(frozen=True)
class Link(Placeholder):
    """Stands in a call for what a block before returns, or for an argument that the block before had as well."""

    place: Place


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of one call of a block, with a ``Link`` for what blocks before it return."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    links: frozenset[Place]

    def fill(self, made: Mapping[Place, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that the block may change, with what the blocks before it returned this time."""
        args, kwargs = copied(
            (self.args, dict(self.kwargs)),
            lambda each: copied(made[each.place] if isinstance(each, Link) else each),
        )
        return args, kwargs


@dataclass(eq=False)
class BlockRows:
    """Which rows count in one call of a block: in its layers' inputs, call by call, and in what it returns."""

    layers: dict[str, list[Tensor | None]] = field(default_factory=dict)
    output: Tensor | None = None

    @contextmanager
    def reading(self, index: int, batch: Any) -> Iterator[None]:
        """The call is repeated within."""
        self._waiting = {name: iter(masks) for name, masks in self.layers.items()}
        yield

    def of(self, name: str, x: Tensor) -> Tensor | None:
        """The mask of the next input of that layer."""
        mask = next(self._waiting.get(name, iter(())), None)
        return mask if mask is None else mask.to(x.device)


@dataclass(eq=False)
class Chain:
    """A chain of blocks and its calls, by block and batch; ``why_not`` says why they cannot be repeated.

    ``began`` orders chains by their first call; None if there was none.
    """

    blocks: Blocks
    calls: dict[str, list[BlockCall]]
    rows: dict[str, list[BlockRows]]
    began: int | None = None
    why_not: str | None = None

    def reaching(self) -> list[Any]:
        """All that reaches the blocks from outside, and which rows of it count."""
        calls = [(call.args, call.kwargs) for each in self.calls.values() for call in each]
        return [calls, [([*rows.layers.values()], rows.output) for each in self.rows.values() for rows in each]]

    def last_uses(self) -> dict[Place, str]:
        """Which block is the last to take what is at a place."""
        return {place: name for name, calls in self.calls.items() for call in calls for place in call.links}


def capture(
    model: nn.Module,
    chains: Iterable[Blocks],
    batches: Sequence[Any],
    forward: Forward | None,
    rows: RowMasks | None = None,
    layers: Mapping[str, LinearRef] | None = None,
) -> list[Chain]:
    """The calls of every block in every batch, from one run of ``model``; ``entering`` it is the caller's.

    With ``rows`` and the ``layers`` in the blocks, which rows of their inputs count as well. A chain some block of
    which is not called once a batch, on what the one before returned, says so. Raises what ``run_batch`` does, and
    CalibrationError for inputs that are not finite.
    """
    if rows is not None:
        for index, batch in enumerate(batches):
            rows.learn(batch, lambda part, index=index: run_batch(model, part, index, forward))  # type: ignore[misc]
    clock = itertools.count()
    watches = [_Watch(each, rows, clock) for each in chains]
    handles = [handle for watch in watches for handle in watch.hooks(layers or {})]
    try:
        state = ModuleState(model)
        with torch.no_grad():
            for index, batch in enumerate(batches):
                own = fresh(batch)
                for watch in watches:
                    watch.begin(index)
                reading: AbstractContextManager[None] = nullcontext() if rows is None else rows.reading(index, own)
                try:
                    with reading:
                        run_batch(model, own, index, forward)
                finally:
                    state.restore()
                for watch in watches:
                    watch.end()
    finally:
        for handle in handles:
            handle.remove()
    return [watch.chain for watch in watches]


class _Watch:
    """Hooks that note the calls of a chain and check that each block gets what the one before returned."""

    def __init__(self, blocks: Blocks, rows: RowMasks | None, clock: Iterator[int]) -> None:
        self.chain = Chain(blocks, {name: [] for name in blocks.modules}, {name: [] for name in blocks.modules})
        self.row_masks, self.clock = rows, clock
        self.first = next(iter(blocks.modules))

    def hooks(self, layers: Mapping[str, LinearRef]) -> Iterator[Any]:
        for name, module in self.chain.blocks.modules.items():
            yield module.register_forward_pre_hook(self.before(name), with_kwargs=True)
            yield module.register_forward_hook(self.after(name))
            for layer, found in layers.items():
                if self.row_masks is not None and layer.startswith(f"{name}."):
                    yield found.module.register_forward_pre_hook(self.layer(name, layer), with_kwargs=True)

    def begin(self, index: int) -> None:
        """A batch begins."""
        self.index = index
        self.returned: dict[int, tuple[Place, Tensor, int | None]] = {}
        self.output: Tensor | None = None
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # objects that blocks are given and may leave something in, such as a cache of all blocks
        self.passed: dict[int, tuple[Place, object, list[object]]] = {}
        self.given: dict[str, list[tuple[Place, object]]] = {}

    def end(self) -> None:
        """A batch has ended."""
        self.begin(self.index)
        for name, calls in self.chain.calls.items():
            if len(calls) != self.index + 1:
                self.refuse(
                    f'block "{name}" was called {len(calls) - self.index} times in batch {self.index}; blocks pruned '
                    "one after the other must be called once a batch"
                )

    def refuse(self, why: str) -> None:
        if self.chain.why_not is None:
            self.chain.why_not = why

    def before(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.chain.began is None:
                self.chain.began = next(self.clock)
            if self.chain.why_not is None:
                # a forward of its own may be in inference mode, where nothing could be trained on later
                with torch.inference_mode(False), torch.no_grad():
                    self.call(name, args, kwargs)

        return note

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first_input(args, kwargs)
        if x is None:
            return self.refuse(
                f'block "{name}" is not called with a tensor first; it cannot be pruned after the one before'
            )
        links: set[Place] = set()
        before: Link | None = None
        if name != self.first:
            if self.output is None or not _same(x, self.output):
                return self.refuse(
                    f'block "{name}" does not take what the block before it returned; blocks of this model cannot '
                    "be pruned one after the other"
                )
            names = list(self.chain.blocks.modules)
            before = Link((names[names.index(name) - 1], 0))
        elif not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f'block "{name}": its input holds NaN or Inf in calibration batch {self.index} '
                "(counted from 0); repair that batch"
            )

        def keep(tensor: Tensor) -> Tensor | Link:
            place = self.returned.get(id(tensor))
            link = before if tensor is x else None
            if link is None and place is not None and place[2] == version(tensor):
                link = Link(place[0])
            if link is None:
                return self.snapshot(tensor)
            links.add(link.place)
            return link

        def handed_on(key: str, value: Any) -> Any:
            if not holds_state(value):
                return value
            self.given.setdefault(name, []).append(((name, key), value))
            place, _, left = self.passed.get(id(value), (None, None, None))
            if place is None or left != traits(value):
                return value
            links.add(place)
            return Link(place)

        try:
            handed = [handed_on(str(i), each) for i, each in enumerate(args)]
            named = {key: handed_on(key, each) for key, each in kwargs.items()}
            kept_args, kept_kwargs = copied((tuple(handed), named), lambda x: x if isinstance(x, Link) else keep(x))
        except ModelError as error:
            return self.refuse(f'block "{name}": {error}')
        self.chain.calls[name].append(BlockCall(kept_args, kept_kwargs, frozenset(links)))
        self.chain.rows[name].append(BlockRows())
        return None

    def snapshot(self, tensor: Tensor) -> Tensor:
        """A copy, the same for all blocks that are given the tensor as it is now."""
        now = version(tensor)
        if now is None:
            return clone(tensor)
        # the original is kept, for as long as its id stands for it
        return self.kept.setdefault((id(tensor), now), (tensor, clone(tensor)))[1]

    def after(self, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if self.chain.why_not is not None:
                return None
            try:
                self.output = first_tensor(output)
            except ModelError as error:
                return self.refuse(str(error))
            for place, tensor in enumerate(tensors_of(output)):
                self.returned[id(tensor)] = ((name, place), tensor, version(tensor))
            for argument, value in self.given.pop(name, []):
                self.passed[id(value)] = (argument, value, traits(value))
            if self.row_masks is not None:
                self.chain.rows[name][-1].output = self.row_masks.of(name, self.output)
            return None

        return note

    def layer(self, name: str, layer: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.row_masks is not None and self.chain.why_not is None and self.chain.rows[name]:
                mask = self.row_masks.of(layer, args[0] if args else next(iter(kwargs.values())))
                self.chain.rows[name][-1].layers.setdefault(layer, []).append(mask)

        return note


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a block is given: the first positional argument, or the first keyword of numbers."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    numbers = {key: each for key, each in kwargs.items() if isinstance(each, Tensor) and each.is_floating_point()}
    return numbers.get("hidden_states", next(iter(numbers.values()), None))


def _same(x: Tensor, output: Tensor) -> bool:
    return x is output or (x.shape == output.shape and bool(torch.equal(x, output)))


class Blockwise:
    """What the blocks of a chain return in one state of the model, batch by batch, for as long as it is needed."""

    def __init__(self, chain: Chain) -> None:
        """Nothing has been called yet."""
        self._chain = chain
        self._last = chain.last_uses()
        count = len(next(iter(chain.calls.values())))
        self._made: list[dict[Place, Any]] = [{} for _ in range(count)]

    def arguments(self, name: str, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block is called with in that batch, to be used once."""
        return self._chain.calls[name][batch].fill(self._made[batch])

    def advance(self, name: str) -> list[Tensor]:
        """Call the block as it is now, for the blocks after it; its hidden states in every batch."""
        module = self._chain.blocks.modules[name]
        state = ModuleState(module)
        results = []
        for batch, made in enumerate(self._made):
            args, kwargs = self.arguments(name, batch)
            try:
                with torch.no_grad():
                    output = module(*args, **kwargs)
            finally:
                state.restore()
            results.append(clone(first_tensor(output)))
            for order, tensor in enumerate(tensors_of(output)):
                if (name, order) in self._last:
                    made[(name, order)] = results[-1] if order == 0 else clone(tensor)
            for key, value in [*((str(i), each) for i, each in enumerate(args)), *kwargs.items()]:
                if (name, key) in self._last:
                    made[(name, key)] = value
            for place in [place for place in made if self._last[place] == name]:
                del made[place]
        return results
