"""Whether the contents of a file fit a model: every check that ``load`` makes, each with its FormatError.

Takes the contents of a file, layers and tensors. Changes nothing; knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecomp.errors import FormatError
from sparsecomp.files.container import Contents, key, some
from sparsecomp.files.live import holds, leading, overlapping, place, same, why_no_plain, written
from sparsecomp.models.layers import LayerTable
from sparsecomp.nn import SparseLinear


def replaceable(
    path: str | Path, name: str, contents: Contents, old: nn.Module | None, linears: LayerTable
) -> nn.Module:
    """The layer of the model that the saved one replaces. Raises FormatError if it does not fit."""
    where = f'{path}: sparse layer "{name}"'
    packed, biased, activation = contents.layers[name], name in contents.biased, contents.activations[name]
    applied = old.activation if isinstance(old, SparseLinear) else "none"
    if isinstance(old, SparseLinear):
        shape, dtype, has_bias = (old.out_features, old.in_features), old.dtype, old.bias is not None
    else:
        ref = next((ref for ref in linears.values() if name == ref.name or name in ref.aliases), None)
        if ref is None or old is None:
            reason = linears.skipped.get(name, "it has no such linear layer")
            raise FormatError(f"{where} has no place in the model: {reason}; load it into the class that was saved")
        shape, dtype, has_bias = ref.shape, ref.dtype, ref.bias is not None
    if shape != packed.shape:
        raise FormatError(f"{where} has shape {packed.shape}, the model's layer has {shape}; use a model of that size")
    if dtype != packed.dtype:
        raise FormatError(
            f"{where} is {packed.dtype}, the model's layer is {dtype}; convert the model first with .to()"
        )
    if activation != applied:
        raise FormatError(
            f'{where} applies the activation "{activation}", the model\'s layer "{applied}"; put a SparseLinear with '
            f'activation="{activation}" there first'
        )
    if has_bias != biased:
        raise FormatError(f"{where} has {'a' if biased else 'no'} bias, the model's layer is the other way round")
    return old


def check_entries(
    path: str | Path, own: Mapping[str, Any], live: Mapping[str, Tensor], loaded: Mapping[str, Tensor], own_ways: bool
) -> None:
    """Raises FormatError unless the file and the model have the same entries, and each has a way into the model."""
    mine = live if own_ways else own  # the others are for the model's own loading to look for
    missing, unexpected = sorted(set(mine) - set(loaded)), sorted(set(loaded) - set(own))
    if own_ways:
        unexpected = []
    if missing or unexpected:
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(unexpected)} too many"] * bool(unexpected)
        raise FormatError(f"{path} {' and '.join(parts)} for this model; load it into the class that was saved")
    made = sorted(set(own) - set(live))
    if made and not own_ways:
        raise FormatError(
            f"{path}: {some(made)} of the model is no parameter or buffer, so nothing can be copied into it; load it "
            "with load_state_dict"
        )


def check_unknown(path: str | Path, contents: Contents, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Raises FormatError for tensors below a sparse layer that neither a SparseLinear nor the model's layer has."""
    within = tuple(key(name, "") for name in contents.layers)
    known = {key(name, part) for name, packed in contents.layers.items() for part in packed.parts}
    known |= {key(name, "bias") for name in contents.biased}
    unknown = sorted(each for each in state if each.startswith(within) and each not in known and each not in own)
    if unknown:
        raise FormatError(
            f"{path} has {some(unknown)} too many; a sparse layer has values, metadata, scales if quantised, and bias"
        )


def check_state(path: str | Path, own: Mapping[str, Any], loaded: Mapping[str, Tensor]) -> None:
    """Raises FormatError unless ``loaded`` can be copied into ``own``, entry by entry."""
    tied: dict[tuple[Any, ...], str] = {}
    for entry, value in loaded.items():
        mine = own[entry]
        if (got := why_no_plain(mine)) is not None and not mine.is_meta:
            raise FormatError(f'{path}: "{entry}" is {got} in the model, a plain tensor in the file; convert it first')
        if mine.shape != value.shape:
            raise FormatError(
                f'{path}: "{entry}" has shape {tuple(value.shape)}, the model wants {tuple(mine.shape)}; '
                "load it into a model of the class and size that was saved"
            )
        if mine.dtype != value.dtype:
            raise FormatError(
                f'{path}: "{entry}" is {value.dtype}, the model has {mine.dtype}; convert the model first with .to()'
            )
        if mine.is_meta:
            raise FormatError(f'the model has "{entry}" on the meta device; give it memory first with .to_empty()')
        part = written(mine.detach())
        alike = part.shape == value.shape or same(value, leading(value, part.shape).expand_as(value))
        if not alike:
            raise FormatError(
                f'{path}: "{entry}" differs along a dimension that the model expands from one entry; give the model a '
                "tensor of its own there, with .clone()"
            )
        first = tied.setdefault(place(mine), entry) if mine.numel() else entry
        if first != entry and not same(loaded[first], value):
            raise FormatError(
                f'{path}: "{first}" and "{entry}" differ, the model ties them to one tensor; untie them before loading'
            )


def check_copied(path: str | Path, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raises FormatError where memory that two entries have in common could not take both."""
    for entry, value in loaded.items():
        if not holds(own[entry], value):
            other = overlapping(entry, own)
            both = f'"{entry}" and "{other}" share' if other else f'the numbers of "{entry}" share'
            raise FormatError(
                f"{path}: {both} memory in the model, where the file has different numbers; give the model a tensor "
                "of its own there, with .clone()"
            )
