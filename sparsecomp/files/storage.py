"""A model with SparseLinear layers <-> one file, checked as a whole before a model is touched.

Knows SparseLinear and the contents of a file; must not know kernels or backends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecomp.errors import FormatError, ModelError, SparsecompError
from sparsecomp.files.container import Contents, LayerEntry, key, read, some, write
from sparsecomp.files.fitting import check_copied, check_entries, check_state, check_unknown, replaceable
from sparsecomp.files.live import copy_into, has_own_way, live_entries, place, restoring, torch_copies, why_no_plain
from sparsecomp.models.batches import eager
from sparsecomp.models.layers import find_linears, require_module
from sparsecomp.modules.carry import COMPILED_CALL
from sparsecomp.nn import Choice, SparseConv2d, SparseLinear
from sparsecomp.packing import PackedWeight
from sparsecomp.patterns.numbers import PART_NAMES
from sparsecomp.reporting.terminal import label, listed, numbered, table, wrap
from sparsecomp.swap import adopt, share_bias, swap


@dataclass(frozen=True)
class SavedLayer:
    """What a file says of one sparse layer. ``backend`` and ``dense_above`` are what a plan had found, if any."""

    name: str
    pattern: str
    shape: tuple[int, int]
    dtype: str
    bias: bool
    activation: str
    nbytes: int
    dense_nbytes: int
    backend: str | None = None
    dense_above: int | None = None


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

        Bytes are those of one layer. What a plan had found for layers is shown where the file has it: the kernel to
        prefer, and the rows of input from which the product is dense.
        """
        rows: dict[tuple[object, ...], list[str]] = {}
        planned = any(map(_runs, self.layers))
        for w in self.layers:
            facts = w.pattern, f"{w.shape[0]}x{w.shape[1]}", w.dtype, "yes" if w.bias else "no", w.activation
            sizes = (w.dense_nbytes, w.nbytes)
            runs = (_runs(w),) if planned else ()
            rows.setdefault((*facts, *sizes, *runs, w.name if every else ""), []).append(w.name)
        title = (
            f"{self.path}: format {self.format_version}, written by sparsecomp {self.package_version}; "
            f"{len(self.layers)} sparse layers, {self.other_tensors} other tensors, "
            f"{self.nbytes} bytes of weights ({self.dense_nbytes} dense)"
        )
        columns = ["layer", "pattern", ">out x in", "dtype", "?bias", "?activation", ">dense bytes", ">bytes"]
        columns += ["?kernel"] if planned else []
        drawn = table(columns, [(label(names), *facts[:-1]) for facts, names in rows.items()], title=title)
        names = [wrap(f"{label(each)}: {listed(each)}") for each in rows.values() if len(numbered(each)) > 1]
        return "\n".join([drawn, *names, *(f"{name}: {text}" for name, text in self.metadata.items())])


def _runs(layer: SavedLayer) -> str:
    """What a plan had found for a layer, in words; "" for nothing."""
    rows = "" if layer.dense_above is None else f"dense from {layer.dense_above} rows"
    return ", ".join(filter(None, (layer.backend, rows)))


def save(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's whole state_dict and its sparse layers' patterns to ``path``, through a temporary file.

    What a plan had found for a layer, the backend to prefer and ``dense_above``, is kept; one pinned by name is not.

    ``metadata`` is text of your own, which ``inspect`` gives back. Tensors that share memory are stored once.

    Raises ModelError for state_dict entries that are no tensors with content (sparse, nested and quantised tensors
    are none either) and for a sparse layer with an entry of the user's in the place of its weight, FormatError for a
    missing folder.
    """
    require_module(model)
    model = eager(model)
    state = model.state_dict()
    for name, value in state.items():
        if (got := why_no_plain(value)) is not None:
            raise ModelError(
                f'state_dict entry "{name}" is {got}; a file holds plain tensors with content, so convert or remove it'
            )
    for name, layer in model.named_modules(remove_duplicate=False):
        clash = sorted({*layer._parameters, *layer._buffers}.intersection(PART_NAMES))
        if isinstance(layer, SparseLinear) and clash:
            raise ModelError(
                f'sparse layer "{name}" has an entry "{clash[0]}" of its own, a name that the file uses; rename it'
            )
    tensors, aliases = _without_aliases(state, _twins(model))
    layers = {
        name: LayerEntry(
            str(layer.pattern),
            (layer.out_features, layer.in_features),
            layer.dtype,
            layer.bias is not None,
            layer.activation,
            layer.numbers,
            None if layer.choice.pinned else layer.choice.backend,
            None if layer.choice.pinned else layer.choice.dense_above,
        )
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SparseLinear)
    }
    write(Path(path), tensors, layers, aliases, metadata or {})


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Load ``path`` into a model of the class that was saved, dense or sparse, and return it.

    The layers that were saved sparse become SparseLinear layers on the device of the layer they replace, with its hooks
    and attributes; all other tensors are copied in place, the biases of these layers too. They prefer the backend that
    a plan had found the fastest, where it runs here, unless they replace a SparseLinear with a choice of its own. Any
    error leaves the model as it was. Where modules have hooks on loading, extra state, or their own ways of saving and
    loading, the model's ``load_state_dict`` is called as well, with every entry, so that these have their say.
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
    made: dict[int, SparseLinear] = {}
    kept: set[str] = set()
    for name, packed in contents.layers.items():
        old = replaceable(path, name, contents, modules.get(name), linears)
        if id(old) not in made:  # one module under two names is replaced once
            made[id(old)] = layers[name] = _new_layer(path, name, packed, contents, state, old)
        if made[id(old)].bias is not None and made[id(old)].bias is old.bias:
            kept.add(key(name, "bias"))
    own_ways = any(has_own_way(module) for module in modules.values())
    entries = into.state_dict(keep_vars=True)
    own, others = _rest(modules, entries, contents, state, kept)
    live = {entry: value for entry, value in live_entries(into, entries).items() if entry in own}
    check_unknown(path, contents, state, own)
    check_entries(path, own, live, others, own_ways)
    plain = {entry: others[entry] for entry in live}
    check_state(path, live, plain)
    if "" in layers:
        adopt(into, layers[""], "")
    with restoring(into, (live[entry] for entry in plain), own_ways=own_ways):
        for entry, value in plain.items():
            copy_into(live[entry], value)
        check_copied(path, live, plain)
        swap(into, {name: layer for name, layer in layers.items() if name})
        if own_ways:
            _load_by_torch(path, layers.get("", into), state, live)
    return layers.get("", given)


def inspect(path: str | Path) -> Summary:
    """What a file holds, after the same checks of the file itself that ``load`` makes. Raises FormatError."""
    contents = read(Path(path))
    layers = tuple(
        SavedLayer(
            name,
            str(packed.pattern),
            packed.shape,
            packed.numbers.in_words(packed.dtype),
            name in contents.biased,
            contents.activations[name],
            packed.nbytes,
            packed.dense_nbytes,
            contents.choices[name].backend,
            contents.choices[name].dense_above,
        )
        for name, packed in contents.layers.items()
    )
    total = sum(tensor.nbytes for tensor in contents.tensors.values())
    stored = {entry for entry in contents.tensors if entry.rpartition(".")[0] in contents.layers}
    saved_once = [layer for layer in layers if key(layer.name, "values") in stored]
    return Summary(
        Path(path),
        contents.format_version,
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
            twins |= {key(name, part): key(first[layer], part) for part in layer.numbers.part_names}
    return twins


def _without_aliases(state: Mapping[str, Tensor], twins: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on the CPU that share no memory, and {key: stored key} for those that are the same tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for entry, value in state.items():
        where = place(value)
        if entry in twins or (value.numel() and where in stored):
            aliases[entry] = twins.get(entry) or stored[where]
            continue
        stored[where] = entry
        # a view that conjugates or negates says so beside its memory, which a file does not hold
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in storages:
            plain = plain.clone()  # a view of a larger or shared storage becomes a tensor of its own
        storages.add(plain.untyped_storage().data_ptr())
        tensors[entry] = plain
    return tensors, aliases


# --- loading ----------------------------------------------------------------------------------------------------


def _new_layer(
    path: str | Path, name: str, packed: PackedWeight, contents: Contents, state: Mapping[str, Tensor], old: nn.Module
) -> SparseLinear:
    """The saved layer, of the class and with the choice of backend and the bias Parameter of the one it replaces."""
    old_bias = old.bias
    assert old_bias is None or isinstance(old_bias, nn.Parameter)
    bias, activation = state.get(key(name, "bias")), contents.activations[name]
    choice = contents.choices[name]
    if isinstance(old, SparseLinear):
        weight = packed.to(old.device)
        if old.choice != Choice(old.pattern, old.numbers):
            alike = (old.pattern, old.numbers) == (packed.pattern, packed.numbers)
            own = replace(old.choice, pattern=packed.pattern, numbers=packed.numbers)
            choice = own if alike else replace(own, dense_above=None)
        try:
            layer = type(old).of_choice(weight, choice, bias, activation)
        except SparsecompError as error:  # a backend that was pinned need not run every pattern
            raise type(error)(f'{path}: sparse layer "{name}": {error}') from error
        _keep_own(old, layer)
    else:
        dense = old.weight
        assert isinstance(dense, Tensor)
        if isinstance(old, nn.Conv2d):
            layer = SparseConv2d.of_choice(packed.to(dense.device), choice, bias, activation)
            assert isinstance(layer, SparseConv2d)
            layer.read_as(old)
        else:
            layer = SparseLinear.of_choice(packed.to(dense.device), choice, bias, activation)
    if layer.bias is not None and old_bias is not None:
        layer.bias.requires_grad_(old_bias.requires_grad)
        if name:
            share_bias(old, layer)  # the values are copied with those of all other tensors
    return layer.train(old.training)


def _keep_own(old: SparseLinear, layer: SparseLinear) -> None:
    """What a subclass has under names that its class declares; the rest is carried over in the swap."""
    for name, value in vars(old).items():
        if name not in vars(layer) and name != COMPILED_CALL:
            layer.__dict__[name] = value
    for name, buffer in old._buffers.items():
        if name not in layer._buffers and name not in old._layout:
            layer.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, parameter in old._parameters.items():
        layer._parameters.setdefault(name, parameter)


def _load_by_torch(path: str | Path, model: nn.Module, state: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Let modules load in their own ways. Raises FormatError for what torch reports."""
    apart = {entry for entry, tensor in live.items() if not torch_copies(tensor)}  # copied already
    # a module may keep what it is given; no two get the same tensor
    given = OrderedDict((entry, value.clone()) for entry, value in state.items() if entry not in apart)
    given._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    try:
        report = model.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise FormatError(f"{path}: the model does not load it ({error}); load it into the class saved") from error
    if report is not None:  # of a class that loads in its own way
        missing, unexpected = sorted(set(report.missing_keys) - apart), sorted(report.unexpected_keys)
        if missing or unexpected:
            parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(unexpected)} too many"] * bool(unexpected)
            raise FormatError(f"{path} {' and '.join(parts)} for this model; load it into the class that was saved")


def _rest(
    modules: Mapping[str, nn.Module],
    entries: Mapping[str, Any],
    contents: Contents,
    state: Mapping[str, Tensor],
    kept: Collection[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What remains of the model's and of the file's tensors beside the sparse layers' weights and biases not kept."""
    replaced: set[str] = set()
    loaded: set[str] = set()
    for name, packed in contents.layers.items():
        old = modules[name]
        parts = old.numbers.part_names if isinstance(old, SparseLinear) else ("weight",)
        replaced |= {key(name, part) for part in (*parts, "bias")}
        loaded |= {key(name, part) for part in (*packed.parts, "bias")}
    replaced, loaded = replaced - set(kept), loaded - set(kept)
    own = {entry: value for entry, value in entries.items() if entry not in replaced}
    return own, {entry: value for entry, value in state.items() if entry not in loaded}
