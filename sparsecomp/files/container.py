"""The file of a saved model: tensors, what they mean, and a checksum, as docs/format.md says.

Takes and gives tensors and PackedWeight values. Must not know models.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.errors import FormatError, ModelError, PatternError
from sparsecomp.nn import Choice
from sparsecomp.packing import PackedWeight
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import DTYPES, FLOAT, INT8, Numbers, parse_numbers
from sparsecomp.reporting.codec import decoded
from sparsecomp.reporting.writing import require_folder, whole_file

FORMAT_VERSION = "1"
# of files with layers that readers of version 1 would multiply otherwise, as they know no rounded activations
_ROUNDED_VERSION = "2"
_PREFIX = "sparsecomp."
_USER = "user."
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True, eq=False)
class Contents:
    """A file that has passed every check that needs no model."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    layers: dict[str, PackedWeight]
    biased: frozenset[str]
    activations: dict[str, str]
    choices: dict[str, Choice]
    format_version: str
    package_version: str
    metadata: dict[str, str]

    def state(self) -> dict[str, Tensor]:
        """Every tensor under every name it was saved under."""
        return {**self.tensors, **{alias: self.tensors[stored] for alias, stored in self.aliases.items()}}


@dataclass(frozen=True)
class LayerEntry:
    """What the header says of one sparse layer."""

    pattern: str
    shape: tuple[int, int]
    dtype: torch.dtype
    bias: bool
    activation: str
    numbers: Numbers
    backend: str | None
    dense_above: int | None


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerEntry],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
    """Write contiguous CPU tensors that share no memory, atomically: a reader sees the old file or the new one.

    Raises ModelError for metadata that is no text and for dtypes that safetensors does not have, FormatError for a
    file that cannot be written.
    """
    require_folder(path)
    described = {
        name: {
            "pattern": e.pattern,
            "shape": list(e.shape),
            "dtype": _dtype_name(e.dtype),
            "bias": e.bias,
            "activation": e.activation,
            "quantized": e.numbers.has_scales,
            "numbers": str(e.numbers),
        }
        for name, e in layers.items()
    }
    header = {
        f"{_PREFIX}format": _version_of(e.numbers for e in layers.values()),
        f"{_PREFIX}version": _package_version(),
        f"{_PREFIX}layers": json.dumps(described, sort_keys=True),
        f"{_PREFIX}aliases": json.dumps(dict(aliases), sort_keys=True),
    }
    planned = {name: {"backend": e.backend, "dense_above": e.dense_above} for name, e in layers.items()}
    if planned := {name: facts for name, facts in planned.items() if any(each is not None for each in facts.values())}:
        header[f"{_PREFIX}choices"] = json.dumps(planned, sort_keys=True)
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ModelError(f"metadata {name!r}: {text!r} is not text; convert keys and values to str")
        header[f"{_USER}{name}"] = text
    header[f"{_PREFIX}crc32"] = _checksum(tensors, header)
    try:
        with whole_file(path) as partial:
            save_file(dict(tensors), partial, metadata=header)
    except FormatError:
        raise
    except (KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"safetensors cannot hold this model ({error}); convert or remove that tensor") from error


def read(path: Path) -> Contents:
    """The file, once everything that can be checked without a model has been checked."""
    if not path.is_file():
        raise FormatError(f"{path} is not a file; give the path of a file written by sparsecomp.save")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{path} is no whole safetensors file ({error}); copy or save it again") from error
    written_as = header.get(f"{_PREFIX}format")
    if written_as is None:
        raise FormatError(f"{path} was not written by sparsecomp.save; its header has no {_PREFIX}format")
    if written_as not in (FORMAT_VERSION, _ROUNDED_VERSION):
        raise FormatError(
            f"{path} has format version {written_as}, this package reads {FORMAT_VERSION} and {_ROUNDED_VERSION}; "
            f"it was written by sparsecomp {header.get(f'{_PREFIX}version', '(unknown)')}"
        )
    if _checksum(tensors, header) != header.get(f"{_PREFIX}crc32"):
        raise FormatError(f"{path} does not match its checksum: it was damaged or edited; copy or save it again")
    try:
        described = json.loads(header[f"{_PREFIX}layers"])
        aliases = {str(alias): str(stored) for alias, stored in json.loads(header[f"{_PREFIX}aliases"]).items()}
        layers = {name: _packed(name, entry, tensors, aliases) for name, entry in described.items()}
        biased = frozenset(name for name, entry in described.items() if entry["bias"] is True)
        activations = {name: _activation(name, entry["activation"]) for name, entry in described.items()}
        choices = _choices(header.get(f"{_PREFIX}choices", "{}"), layers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise FormatError(f"{path}: {error}") from error
        raise FormatError(f"{path}: the header does not describe its layers ({error}); save it again") from error
    for name in biased:
        bias = tensors.get(_stored(key(name, "bias"), aliases))
        if bias is not None and (tuple(bias.shape) != layers[name].shape[:1] or bias.dtype != layers[name].dtype):
            raise FormatError(
                f'{path}: layer "{name}" has a bias of shape {tuple(bias.shape)}, {bias.dtype}; save it again'
            )
    user = {name.removeprefix(_USER): text for name, text in header.items() if name.startswith(_USER)}
    missing = [stored for stored in aliases.values() if stored not in tensors]
    missing += [key(name, "bias") for name in biased if _stored(key(name, "bias"), aliases) not in tensors]
    if missing:
        raise FormatError(f"{path}: tensors named in the header are missing: {some(missing)}; save it again")
    versions = written_as, header[f"{_PREFIX}version"]
    return Contents(tensors, aliases, layers, biased, activations, choices, *versions, user)


def _version_of(every: Iterable[Numbers]) -> str:
    return FORMAT_VERSION if all(each.activation_bits is None for each in every) else _ROUNDED_VERSION


def _activation(name: str, activation: object) -> str:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise FormatError(f'layer "{name}" has the activation {activation!r}; a file holds {", ".join(ACTIVATIONS)}')
    return activation


def _choices(text: str, layers: Mapping[str, PackedWeight]) -> dict[str, Choice]:
    """What was planned for each layer where the file was written; nothing for a layer of which it says nothing."""
    where = f"{_PREFIX}choices"
    planned = decoded(Mapping[str, Mapping[str, Any]], json.loads(text), where)
    if strange := [name for name in planned if name not in layers]:
        raise FormatError(f"{where} has layers that are not in the file: {some(strange)}; save it again")
    found = {name: Choice(packed.pattern, packed.numbers) for name, packed in layers.items()}
    for name, entry in planned.items():
        packed = layers[name]
        facts = {**entry, "pattern": str(packed.pattern), "numbers": str(packed.numbers), "pinned": False}
        found[name] = decoded(Choice, facts, f"{where}.{name}")
    return found


def _packed(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> PackedWeight:
    try:
        pattern = parse(entry["pattern"])
        # version 0.1.0 knew int8 weights alone, and said whether they are
        numbers = parse_numbers(entry.get("numbers", str(INT8 if entry["quantized"] is True else FLOAT)))
    except PatternError as error:
        raise FormatError(f'layer "{name}": {error}') from error
    out, columns = entry["shape"]
    if not isinstance(out, int) or not isinstance(columns, int) or min(out, columns) < 0:
        raise FormatError(f'layer "{name}" has shape {entry["shape"]}; a shape is [out, in]')
    found = []
    for part in numbers.part_names:
        stored = _stored(key(name, part), aliases)
        if stored not in tensors:
            raise FormatError(f'layer "{name}" has no tensor "{key(name, part)}" in the file')
        found.append(tensors[stored])
    dtype = _DTYPE_NAMES.get(entry["dtype"])
    if dtype is None or found[0].dtype != numbers.values_dtype(dtype):
        raise FormatError(f'layer "{name}" is said to be {entry["dtype"]}, its values are {found[0].dtype}')
    try:
        return PackedWeight.of(found, pattern, (out, columns), dtype, numbers).validate()
    except (FormatError, PatternError) as error:
        raise FormatError(f'layer "{name}": {error}') from error


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    crc = 0
    for name in sorted(header):
        if name != f"{_PREFIX}crc32":
            crc = zlib.crc32(f"{name}\0{header[name]}\0".encode(), crc)
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype, shape = _dtype_name(tensor.dtype), json.dumps(list(tensor.shape))
        crc = zlib.crc32(f"{name}\0{dtype}\0{shape}\0".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def key(name: str, part: str) -> str:
    """The state_dict key of a part of the layer of that name."""
    return f"{name}.{part}" if name else part


def _stored(key: str, aliases: Mapping[str, str]) -> str:
    return aliases.get(key, key)


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    shown = ", ".join(f'"{name}"' for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _package_version() -> str:
    try:
        return version("sparsecomp")
    except PackageNotFoundError:
        return "unknown"
