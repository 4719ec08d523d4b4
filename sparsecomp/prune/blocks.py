"""The repeated blocks of a model and what goes through them, batch by batch.

Takes any ``nn.Module``, finds the chain of modules that it applies one after the other. Knows nothing of pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.calibration import row_mask, run_batch
from sparsecomp.errors import CalibrationError, ModelError

Forward = Callable[[nn.Module, Any], object]
RowMask = Callable[[Any], Tensor | None]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of the same class by dotted name, in the order of the model."""

    name: str
    modules: Mapping[str, nn.Module]

    def owner(self, layer: str) -> str | None:
        """The block that holds the layer of that name, or None."""
        return next((name for name in self.modules if layer == name or layer.startswith(f"{name}.")), None)


def find_blocks(model: nn.Module, layers: Iterable[str]) -> Blocks:
    """The nn.ModuleList or nn.Sequential of ``model`` whose children hold most of ``layers``, the outermost of equals.

    Its children with such layers must be of one class, and it must have two or more of that class. Those without are
    part of the chain as well. Raises ModelError if there is none.
    """
    names = list(layers)
    best: Blocks | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        prefix = f"{name}." if name else ""
        children = {f"{prefix}{key}": child for key, child in module.named_children()}
        kinds = {type(child) for key, child in children.items() if any(layer.startswith(f"{key}.") for layer in names)}
        alike = {key: child for key, child in children.items() if type(child) in kinds}
        held = sum(layer.startswith(prefix) for layer in names)
        if len(kinds) == 1 and len(alike) >= 2 and held > most:
            best, most = Blocks(name, alike), held
    if best is None:
        raise ModelError(
            "the model has no repeated blocks: no nn.ModuleList or nn.Sequential holds two or more modules of one "
            "class with layers to prune; use prune(model, ..., calibration=...) without blocks"
        )
    return best


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of a block: its input ``x``, and every other argument."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: str | None

    @property
    def x(self) -> Tensor:
        """The input that the block before makes: the first positional argument, or the keyword ``key``."""
        value = self.args[0] if self.key is None else self.kwargs[self.key]
        assert isinstance(value, Tensor)
        return value

    def with_input(self, x: Tensor) -> BlockCall:
        """The same call on another input."""
        if self.key is None:
            return BlockCall((x, *self.args[1:]), self.kwargs, None)
        return BlockCall(self.args, {**self.kwargs, self.key: x}, self.key)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of what a block returns: the tensor, or the first of a tuple. Raises ModelError for others."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ModelError(
            f"a block returns a {type(value).__name__}, not hidden states as a tensor or first in a tuple; "
            "blocks of this model cannot be pruned one after the other"
        )
    return value


def capture(
    model: nn.Module, blocks: Blocks, batches: Sequence[Any], forward: Forward | None, mask: RowMask | None
) -> tuple[dict[str, list[BlockCall]], list[Tensor | None]]:
    """Every block's call in every batch, from one run of ``model``, and the row mask of each batch.

    Inputs of the blocks after the first are dropped: they are what the block before returns, which is checked.
    Raises ModelError where a block is not called once a batch on what the one before returned.
    """
    calls: dict[str, list[BlockCall]] = {name: [] for name in blocks.modules}
    rows = []
    chain = _Chain(calls, first=next(iter(blocks.modules)))
    handles = [
        handle
        for name, module in blocks.modules.items()
        for handle in (
            module.register_forward_pre_hook(chain.before(name), with_kwargs=True),
            module.register_forward_hook(chain.after(name)),
        )
    ]
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                chain.output = None
                rows.append(row_mask(batch, mask))
                run_batch(model, batch, index, forward)
                missing = next((name for name, each in calls.items() if len(each) != index + 1), None)
                if missing is not None:
                    raise ModelError(
                        f'block "{missing}" was called {len(calls[missing]) - index} times in batch {index}; blocks '
                        "pruned one after the other must be called once a batch"
                    )
    finally:
        for handle in handles:
            handle.remove()
    return calls, rows


class _Chain:
    """Hooks that note calls and check that each block gets what the one before returned."""

    def __init__(self, calls: dict[str, list[BlockCall]], first: str) -> None:
        self.calls, self.first = calls, first
        self.output: Tensor | None = None

    def before(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _block_call(name, args, kwargs)
            if name != self.first:
                if self.output is None or not _same(call.x, self.output):
                    raise ModelError(
                        f'block "{name}" does not take what the block before it returned; blocks of this model cannot '
                        "be pruned one after the other"
                    )
                # the input is what the block before returns, so it is not kept
                call = call.with_input(call.x.new_empty(0))
            elif not bool(torch.isfinite(call.x).all()):
                raise CalibrationError(
                    f'block "{name}": its input holds NaN or Inf in calibration batch {len(self.calls[name])} '
                    "(counted from 0); repair that batch"
                )
            self.calls[name].append(call)

        return note

    def after(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output = first_tensor(output)

        return note


def _block_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
    if args and isinstance(args[0], Tensor):
        return BlockCall(args, kwargs, None)
    key = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    if args or key is None:
        raise ModelError(f'block "{name}" is not called with a tensor first; it cannot be pruned after the one before')
    return BlockCall(args, kwargs, key)


def _same(x: Tensor, output: Tensor) -> bool:
    return x is output or (x.shape == output.shape and bool(torch.equal(x, output)))
