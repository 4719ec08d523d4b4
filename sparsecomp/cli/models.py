"""How a model, its calibration batches and its example inputs are named on the command line.

Takes names, gives objects. A name is a Python factory ``module:function`` or a local Hugging Face folder.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecomp.calibration import Calibration, calibrate
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.files import require_folder, safetensors

MODEL_HELP = (
    "a Python factory module:function that takes no argument and returns an nn.Module (the current folder is on the "
    "import path), or a local Hugging Face folder (needs transformers)"
)


def add_model(parser: ArgumentParser, flag: str = "model") -> None:
    """Add the argument that names a model, and --weights."""
    if flag.startswith("-"):
        parser.add_argument(flag, required=True, metavar="MODEL", help=MODEL_HELP)
    else:
        parser.add_argument(flag, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--weights", metavar="FILE", help="load these dense weights (safetensors) into the model first")


def add_pruning(parser: ArgumentParser) -> None:
    """Add --calibration, --only and --skip."""
    parser.add_argument("--calibration", metavar="FACTORY", help="module:function giving an iterable of batches")
    parser.add_argument("--only", metavar="GLOB", action="append", help="only layers of these names (may be repeated)")
    parser.add_argument("--skip", metavar="GLOB", action="append", help="leave layers of these names dense")


def add_output(parser: ArgumentParser, kind: str) -> None:
    """Add --output, for a file of that kind in a folder that is there."""
    parser.add_argument("-o", "--output", required=True, metavar="FILE", type=output_path, help=f"{kind} file to write")


def output_path(text: str) -> str:
    """The path of a file to write, for argparse: its folder is there."""
    try:
        require_folder(Path(text))
    except FormatError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def numbers(text: str) -> tuple[int, ...]:
    """The whole numbers of a list such as "1,8,128". Raises ModelError for anything else."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise ModelError(f'"{text}" is no list of whole numbers; write it like 1,8,128') from None


def call_factory(name: str, what: str) -> Any:
    """The result of ``module:function``, called without arguments. Raises ModelError, saying what went wrong."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ModelError(f'"{name}" does not name {what}; write it as module:function, such as shop.models:build')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ModelError(f'module "{module_name}" of "{name}" cannot be imported: {error}') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f'module "{module_name}" has no function "{function_name}"; "{name}" needs one')
    return function()


def load_model(name: str, weights: str | None = None) -> nn.Module:
    """The model of that name in eval mode, with the dense weights of the file if one is given.

    Raises ModelError for a name that is neither a factory nor a Hugging Face folder, or weights that do not fit.
    """
    model = _from_folder(Path(name)) if Path(name).is_dir() else call_factory(name, "a model or a model folder")
    if not isinstance(model, nn.Module):
        raise ModelError(f'"{name}" returned a {type(model).__name__}; the factory must return an nn.Module')
    if weights is not None:
        _load_dense(model, Path(weights))
    return model.eval()


def load_calibration(arguments: Namespace, model: nn.Module) -> Calibration | None:
    """The statistics of ``model`` on the batches that --calibration names, or None without one."""
    if arguments.calibration is None:
        return None
    return calibrate(model, load_batches(arguments.calibration), only=arguments.only, skip=arguments.skip)


def load_batches(name: str) -> Iterable[Any]:
    """The batches that a factory gives. Raises ModelError for what is no iterable of batches."""
    batches = call_factory(name, "calibration batches")
    if not isinstance(batches, Iterable) or isinstance(batches, str | dict):
        raise ModelError(f'"{name}" returned a {type(batches).__name__}; return an iterable of batches')
    return batches


def load_inputs(name: str | None, model_name: str) -> tuple[tuple[Any, ...], Any]:
    """Example inputs for export and their dynamic axes as export_onnx takes them (None: the batch).

    They come from a factory; for a Hugging Face folder they are token ids and a mask of any batch and length.
    Raises ModelError where there is nothing to take them from.
    """
    if name is not None:
        inputs = call_factory(name, "example inputs")
        return inputs if isinstance(inputs, tuple) else (inputs,), None
    if not Path(model_name).is_dir():
        raise ModelError(f'exporting "{model_name}" needs example inputs; name a factory: --inputs module:function')
    import torch

    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    return (ids, torch.ones_like(ids)), (axes, axes)


def _from_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ModelError(f'folder "{folder}" has no config.json; it must be a Hugging Face model folder')
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ModelError(
            f'model folder "{folder}" needs the package transformers; install it with: pip install transformers'
        ) from error
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(model, nn.Module)
    return model


def _load_dense(model: nn.Module, path: Path) -> None:
    base, torch_io = safetensors(), safetensors("torch")
    try:
        torch_io.load_model(model, path)
    except (RuntimeError, OSError, base.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f'dense weights "{path}" do not fit the model: {reason}') from error


def count_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers that the model would save."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
