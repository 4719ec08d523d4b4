"""A model with SparseLinear layers <-> one file, checked as a whole before a model is touched.

Knows SparseLinear and the contents of a file; must not know kernels or backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.batches import eager
from sparsecomp.container import FORMAT_VERSION, Contents, LayerEntry, key, read, some, write
from sparsecomp.display import label, listed, numbered, table, wrap
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.layers import LayerTable, find_linears, require_module
from sparsecomp.nn import SparseLinear
from sparsecomp.pack import PackedWeight
from sparsecomp.pack.format import part_names
from sparsecomp.swap import adopt, swap


@dataclass(frozen=True)
class SavedLayer:
    """What a file says of one sparse layer."""

    name: str
    pattern: str
    shape: tuple[int, int]
    dtype: str
    bias: bool
    activation: str
    nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class Summary:
    """What a file holds. ``nbytes`` counts all tensors, ``dense_nbytes`` the same model with dense layers."""

    path: Path
    format_version: str
    package_version: str
    layers: tuple[SavedLayer, ...]
    other_tensors: int
    nbytes: int
    dense_nbytes: int
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        """``text()`` for the terminal."""
        return self.text()

    def text(self, every: bool = False) -> str:
        """One line on the file and a table of its sparse layers, equal ones in one row unless ``every`` asks for each.

        Bytes are those of one layer.
        """
        rows: dict[tuple[object, ...], list[str]] = {}
        for w in self.layers:
            facts = w.pattern, f"{w.shape[0]}x{w.shape[1]}", w.dtype, "yes" if w.bias else "no", w.activation
            rows.setdefault((*facts, w.dense_nbytes, w.nbytes, w.name if every else ""), []).append(w.name)
        title = (
            f"{self.path}: format {self.format_version}, written by sparsecomp {self.package_version}; "
            f"{len(self.layers)} sparse layers, {self.other_tensors} other tensors, "
            f"{self.nbytes} bytes of weights ({self.dense_nbytes} dense)"
        )
        columns = ("layer", "pattern", ">out x in", "dtype", "?bias", "?activation", ">dense bytes", ">bytes")
        drawn = table(columns, [(label(names), *facts[:-1]) for facts, names in rows.items()], title=title)
        names = [wrap(f"{label(each)}: {listed(each)}") for each in rows.values() if len(numbered(each)) > 1]
        return "\n".join([drawn, *names, *(f"{name}: {text}" for name, text in self.metadata.items())])


def save(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's whole state_dict and its sparse layers' patterns to ``path``, through a temporary file.

    ``metadata`` is text of your own, which ``inspect`` gives back. Tensors that share memory are stored once.

    Raises ModelError for state_dict entries that are no tensors with content, FormatError for a missing folder.
    """
    require_module(model)
    model = eager(model)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            got = "on the meta device" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ModelError(f'state_dict entry "{name}" is {got}; a file holds tensors with content only')
    tensors, aliases = _without_aliases(state, _twins(model))
    layers = {
        name: LayerEntry(
            str(layer.pattern),
            (layer.out_features, layer.in_features),
            layer.dtype,
            layer.bias is not None,
            layer.activation,
            layer.quantized,
        )
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SparseLinear)
    }
    write(Path(path), tensors, layers, aliases, metadata or {})


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Load ``path`` into a model of the class that was saved, dense or sparse, and return it.

    The layers that were saved sparse become SparseLinear layers on the device of the layer they replace, with its hooks
    and attributes; all other tensors are copied in place. Any error leaves the model as it was.
    A layer saved with an activation replaces a SparseLinear with the same one only: a dense model that has an
    activation of its own behind the layer would otherwise apply it twice.
    If the model itself is one linear layer, it cannot change in place and the new layer is returned.

    Raises FormatError for a file that is truncated, damaged, of another version, or of another model than ``into``.
    """
    require_module(into)
    given, into = into, eager(into)
    contents = read(Path(path))
    state = contents.state()
    modules = dict(into.named_modules(remove_duplicate=False))
    linears = find_linears(into)
    layers: dict[str, SparseLinear] = {}
    made: set[int] = set()
    for name, packed in contents.layers.items():
        old = _replaceable(path, name, contents, modules.get(name), linears)
        if id(old) not in made:  # one module under two names is replaced once
            made.add(id(old))
            layers[name] = _new_layer(packed, state.get(key(name, "bias")), contents.activations[name], old)
    own, others = _rest(into, contents, state)
    _check_unknown(path, contents, state, own)
    _check_state(path, own, others)
    if "" in layers:
        adopt(into, layers[""], "")
    with _restoring(own, others):
        for entry, value in others.items():
            _copy(own[entry], value)
        swap(into, {name: layer for name, layer in layers.items() if name})
    return layers.get("", given)


def inspect(path: str | Path) -> Summary:
    """What a file holds, after the same checks of the file itself that ``load`` makes. Raises FormatError."""
    contents = read(Path(path))
    layers = tuple(
        SavedLayer(
            name,
            str(packed.pattern),
            packed.shape,
            ("int8 weights, " if packed.scales is not None else "") + str(packed.dtype).removeprefix("torch."),
            name in contents.biased,
            contents.activations[name],
            packed.nbytes,
            packed.dense_nbytes,
        )
        for name, packed in contents.layers.items()
    )
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    stored = {entry for entry in contents.tensors if entry.rpartition(".")[0] in contents.layers}
    saved_once = [layer for layer in layers if key(layer.name, "values") in stored]
    return Summary(
        Path(path),
        FORMAT_VERSION,
        contents.package_version,
        layers,
        len(contents.tensors) - len(stored),
        total,
        total + sum(layer.dense_nbytes - layer.nbytes for layer in saved_once),
        contents.metadata,
    )


# --- saving -----------------------------------------------------------------------------------------------------


def _twins(model: nn.Module) -> dict[str, str]:
    """{key: stored key} for a SparseLinear under several names: its canonical tensors are made anew for each."""
    first: dict[nn.Module, str] = {}
    twins: dict[str, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SparseLinear) and first.setdefault(layer, name) != name:
            twins |= {key(name, part): key(first[layer], part) for part in part_names(layer.quantized)}
    return twins


def _without_aliases(state: Mapping[str, Tensor], twins: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on the CPU that share no memory, and {key: stored key} for those that are the same tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for entry, value in state.items():
        place = _place(value)
        if entry in twins or (value.numel() and place in stored):
            aliases[entry] = twins.get(entry) or stored[place]
            continue
        stored[place] = entry
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in storages:
            plain = plain.clone()  # a view of a larger or shared storage becomes a tensor of its own
        storages.add(plain.untyped_storage().data_ptr())
        tensors[entry] = plain
    return tensors, aliases


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


# --- loading ----------------------------------------------------------------------------------------------------


def _replaceable(
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


def _new_layer(packed: PackedWeight, bias: Tensor | None, activation: str, old: nn.Module) -> SparseLinear:
    old_bias = old.bias
    assert old_bias is None or isinstance(old_bias, Tensor)
    if isinstance(old, SparseLinear):
        device = old.device
    else:
        weight = old.weight
        assert isinstance(weight, Tensor)
        device = weight.device
    layer = SparseLinear.from_packed(packed.to(device), bias, activation=activation)
    if layer.bias is not None and old_bias is not None:
        layer.bias.requires_grad_(old_bias.requires_grad)
    return layer.train(old.training)


def _check_state(path: str | Path, own: Mapping[str, Any], loaded: Mapping[str, Tensor]) -> None:
    """Raises FormatError unless ``loaded`` can be copied into ``own``, entry by entry."""
    missing, unexpected = sorted(set(own) - set(loaded)), sorted(set(loaded) - set(own))
    if missing or unexpected:
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(unexpected)} too many"] * bool(unexpected)
        raise FormatError(f"{path} {' and '.join(parts)} for this model; load it into the class that was saved")
    tied: dict[tuple[Any, ...], str] = {}
    for entry, value in loaded.items():
        mine = own[entry]
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
        part = _written(mine)
        alike = part.shape == value.shape or torch.equal(value, _leading(value, part.shape).expand_as(value))
        if not alike:
            raise FormatError(
                f'{path}: "{entry}" differs along a dimension that the model expands from one entry; give the model a '
                "tensor of its own there, with .clone()"
            )
        first = tied.setdefault(_place(mine), entry) if mine.numel() else entry
        if first != entry and not torch.equal(loaded[first], value):
            raise FormatError(
                f'{path}: "{first}" and "{entry}" differ, the model ties them to one tensor; untie them before loading'
            )


def _check_unknown(path: str | Path, contents: Contents, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Raises FormatError for tensors below a sparse layer that neither a SparseLinear nor the model's layer has."""
    within = tuple(key(name, "") for name in contents.layers)
    known = {key(name, part) for name, packed in contents.layers.items() for part in packed.parts}
    known |= {key(name, "bias") for name in contents.biased}
    unknown = sorted(each for each in state if each.startswith(within) and each not in known and each not in own)
    if unknown:
        raise FormatError(
            f"{path} has {some(unknown)} too many; a sparse layer has values, metadata, scales if quantised, and bias"
        )


def _rest(into: nn.Module, contents: Contents, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What remains of the model's and of the file's tensors beside the weights and biases of the sparse layers."""
    modules = dict(into.named_modules(remove_duplicate=False))
    replaced, loaded = set(), set()
    for name, packed in contents.layers.items():
        old = modules[name]
        parts = part_names(old.quantized) if isinstance(old, SparseLinear) else ("weight",)
        replaced |= {key(name, part) for part in (*parts, "bias")}
        loaded |= {key(name, part) for part in (*packed.parts, "bias")}
    own = {entry: value for entry, value in into.state_dict().items() if entry not in replaced}
    return own, {entry: value for entry, value in state.items() if entry not in loaded}


def _written(tensor: Tensor) -> Tensor:
    """The part of a tensor that holds all its numbers: of expanded dimensions, the first entry."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _leading(value: Tensor, shape: torch.Size) -> Tensor:
    return value[tuple(slice(size) for size in shape)]


def _copy(target: Tensor, value: Tensor) -> None:
    # a tensor made under inference_mode can be written under it only
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        part = _written(target.detach())
        part.copy_(_leading(value, part.shape))


@contextmanager
def _restoring(own: Mapping[str, Tensor], loaded: Iterable[str]) -> Iterator[None]:
    """Give the model's tensors their numbers back if anything is raised."""
    before = {entry: _written(own[entry].detach()).clone() for entry in loaded}
    try:
        yield
    except BaseException:
        for entry, value in before.items():
            _copy(own[entry], value)
        raise
