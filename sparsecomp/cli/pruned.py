"""Pruned models as files: dense weights with zeros, and beside them which layer was pruned to which pattern.

Takes models and reports, gives files and what they note. A file is complete or not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sparsecomp.cli import hub
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.files import safetensors

# where a safetensors file, and a model folder, note the patterns by layer
KEY = "sparsecomp.patterns"
NOTE = "sparsecomp.json"


def is_folder(output: str) -> bool:
    """Whether -o asks for a model folder: it ends in a slash or is a folder."""
    return output.endswith("/") or Path(output).is_dir()


def check_output(output: str, model: nn.Module, source: str) -> None:
    """ModelError for a folder that this model cannot be written as, and for its own, which is named ``source``."""
    if is_folder(output) and Path(source).is_dir() and Path(output).exists() and Path(output).samefile(source):
        raise ModelError(f'-o "{output}" is the folder the model comes from; name another one, or its weights are lost')
    if is_folder(output) and not hub.writes_folders(model):
        raise ModelError(
            f'-o "{output}" is a folder, and only Hugging Face models are written as folders; name a file in it, such '
            f"as {Path(output) / 'pruned.safetensors'}"
        )


def save(model: nn.Module, output: str, patterns: Mapping[str, str], source: str) -> int:
    """Write the weights as a file, or as a model folder if ``output`` is one; the bytes of weights written.

    ``source`` is the name of the model: what lies in its folder, such as a tokenizer, goes along.
    """
    if is_folder(output):
        folder = Path(output)
        hub.save_folder(model, folder, Path(source) if Path(source).is_dir() else None)
        (folder / NOTE).write_text(json.dumps({"patterns": dict(patterns)}, indent=1) + "\n", encoding="utf-8")
        return sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    path = Path(output)
    partial = path.with_name(f".{path.name}.partial")
    try:
        metadata = {"format": "pt", KEY: json.dumps(dict(patterns))}
        safetensors("torch").save_model(model, str(partial), metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def recorded(model: str, weights: str | None) -> dict[str, str] | None:
    """Patterns by layer that prune noted in the weights or the model folder, or None where it noted none.

    Raises FormatError for a note that cannot be read.
    """
    if weights is not None:
        with safetensors().safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
        if text is not None:
            return _patterns(text, weights)
        note = Path(weights).with_name(NOTE) if Path(weights).name == "model.safetensors" else None
    else:
        note = Path(model) / NOTE if Path(model).is_dir() else None
    if note is None or not note.is_file():
        return None
    try:
        return _patterns(json.dumps(json.loads(note.read_text(encoding="utf-8"))["patterns"]), str(note))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f'"{note}" is no note of patterns ({error!r}); delete it, or prune again') from error


def require_packed(path: str) -> None:
    """FormatError, with the way on, for weights that prune wrote where a packed file is wanted."""
    base = safetensors()
    try:
        with base.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (base.SafetensorError, OSError):
        return  # who reads it says what is wrong
    if text is not None:
        raise FormatError(
            f'"{path}" holds dense weights with {len(_patterns(text, path))} pruned layers, not a packed model; pack '
            f"them with: sparsecomp compile MODEL --weights {path} -o packed.safetensors"
        )


def _patterns(text: str, where: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise FormatError(f'"{where}" notes its patterns in a form that cannot be read; prune again')
    return {str(name): pattern for name, pattern in found.items()}
