"""Pruned models as files: dense weights with zeros, and beside them which layer was pruned to which pattern.

Takes models and reports, gives files and what they note. A file is complete or not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sparsecomp.cli import hub
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.reporting.terminal import counted
from sparsecomp.reporting.writing import telling, whole_file

if TYPE_CHECKING:
    from torch import nn

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
    from safetensors.torch import save_model

    if is_folder(output):
        folder = Path(output)
        with telling(folder):
            hub.save_folder(model, folder, Path(source) if Path(source).is_dir() else None)
            note = json.dumps({"patterns": dict(patterns)}, indent=1) + "\n"
            (folder / NOTE).write_text(note, encoding="utf-8")
        return sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    path = Path(output)
    metadata = {"format": "pt", KEY: json.dumps(dict(patterns))}
    with whole_file(path) as partial:
        save_model(model, str(partial), metadata=metadata)
    return path.stat().st_size


def recorded(model: str, weights: str | None) -> dict[str, str] | None:
    """Patterns by layer that prune noted in the weights or the model folder, or None where it noted none.

    Raises FormatError for a note that cannot be read.
    """
    if weights is not None:
        with safe_open(weights, framework="pt") as file:
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
    """FormatError, with the way on, for what is no packed file: a folder, an ONNX file, weights that are dense."""
    compiled = "sparsecomp compile writes packed files"
    if Path(path).is_dir():
        noted = recorded(path, None)
        if noted is None and not (Path(path) / "config.json").is_file():
            raise FormatError(f'"{path}" is a folder, not a packed model; name a file: {compiled}')
        held = f", {counted(len(noted), 'layer')} of it pruned" if noted is not None else ""
        pattern = "" if noted is not None else " --pattern 2:4 --method magnitude"
        raise FormatError(
            f'"{path}" is a model folder of dense weights{held}, not a packed model; pack it with: sparsecomp compile '
            f"{path}{pattern} -o packed.safetensors"
        )
    if Path(path).suffix.lower() == ".onnx":
        raise FormatError(f'"{path}" is an ONNX file already; name the file it was exported from: {compiled}')
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            count = len(list(file.keys()))
    except (SafetensorError, OSError):
        return  # who reads it says what is wrong
    if "sparsecomp.format" in header:
        return
    text = header.get(KEY)
    held = counted(count, "tensor") if text is None else counted(len(_patterns(text, path)), "pruned layer")
    beside = (Path(path).parent / "config.json").is_file()
    model = f"{Path(path).parent}/" if beside else f"MODEL --weights {path}"
    pattern = " --pattern 2:4 --method magnitude" if text is None and recorded(model, path) is None else ""
    raise FormatError(
        f'"{path}" holds dense weights with {held}, not a packed model; pack them with: sparsecomp compile {model}'
        f"{pattern} -o packed.safetensors"
    )


def _patterns(text: str, where: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise FormatError(f'"{where}" notes its patterns in a form that cannot be read; prune again')
    return {str(name): pattern for name, pattern in found.items()}
