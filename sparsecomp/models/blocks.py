"""The repeated blocks of a model: the chains of modules that it applies one after the other.

Takes any ``nn.Module``. Knows nothing of pruning, nor of what goes through the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sparsecomp.errors import ModelError
from sparsecomp.models.batches import eager


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of the same class by dotted name, in the order of the model."""

    name: str
    modules: Mapping[str, nn.Module]

    def owner(self, layer: str) -> str | None:
        """The block that holds the layer of that name, or None."""
        return next((name for name in self.modules if layer == name or layer.startswith(f"{name}.")), None)


def find_chains(model: nn.Module, layers: Iterable[str]) -> tuple[Blocks, ...]:
    """The chains of blocks that hold ``layers``, those with most layers first, such as a decoder's and an encoder's.

    A chain is an nn.ModuleList or nn.Sequential, the outermost of equals, whose children with such layers are of one
    class, two or more. Children without layers that are of that class are part of the chain as well. No chain is inside
    another. Raises ModelError if there is none.
    """
    names = list(layers)
    candidates: list[tuple[int, Blocks]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        prefix = f"{name}." if name else ""
        children = {f"{prefix}{key}": child for key, child in module.named_children()}
        classes = {key: type(eager(child)) for key, child in children.items()}
        kinds = {classes[key] for key in children if any(layer.startswith(f"{key}.") for layer in names)}
        alike = {key: child for key, child in children.items() if classes[key] in kinds}
        if len(kinds) == 1 and len(alike) >= 2:
            candidates.append((sum(layer.startswith(prefix) for layer in names), Blocks(name, alike)))
    chosen: list[Blocks] = []
    # sorting is stable, so that the outermost of equals comes first
    for _, each in sorted(candidates, key=lambda candidate: -candidate[0]):
        if not any(_overlap(each, other) for other in chosen):
            chosen.append(each)
    if not chosen:
        raise ModelError(
            "the model has no repeated blocks: no nn.ModuleList or nn.Sequential holds two or more modules of one "
            "class with layers to prune; use prune(model, ..., calibration=...) without blocks"
        )
    return tuple(chosen)


def _overlap(a: Blocks, b: Blocks) -> bool:
    shared = {id(each) for each in a.modules.values()} & {id(each) for each in b.modules.values()}
    return bool(shared) or a.owner(b.name) is not None or b.owner(a.name) is not None
