"""How a model, its calibration batches and its example inputs are named on the command line.

Takes names, gives objects. A name is a Python factory ``module:function`` or a local Hugging Face folder.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sparsecomp.cli import hub
from sparsecomp.cli.hub import Call
from sparsecomp.cli.parser import output_file, words
from sparsecomp.errors import CalibrationError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from sparsecomp.models.calibration import Calibration

MODEL_HELP = (
    "a Python factory module:function that takes no argument and returns an nn.Module (the current folder is on the "
    "import path), or a local Hugging Face folder (needs transformers)"
)
_WEIGHT_FILES = (".safetensors", ".st", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5")


def add_model(parser: ArgumentParser, flag: str = "model", weights: bool = True) -> None:
    """Add the argument that names a model, --auto-class, and --weights unless the verb reads weights itself."""
    if flag.startswith("-"):
        parser.add_argument(flag, required=True, metavar="MODEL", help=MODEL_HELP)
    else:
        parser.add_argument(flag, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--auto-class",
        metavar="NAME",
        help="transformers class for a folder (default: the one in its config.json, with its head)",
    )
    if weights:
        parser.add_argument(
            "--weights", metavar="FILE", help="load these dense weights (safetensors) into the model first"
        )


def add_pruning(parser: ArgumentParser) -> None:
    """Add --calibration, --batch-item, --only and --skip."""
    parser.add_argument("--calibration", metavar="FACTORY", help="module:function giving an iterable of batches")
    parser.add_argument(
        "--batch-item",
        metavar="ITEM",
        type=lambda text: ",".join(words(text)),
        help="what the model takes of each batch: 0 for batches (x, label), 0,1 for the first two, keys for dicts",
    )
    add_selection(parser)


def add_selection(parser: ArgumentParser) -> None:
    """Add --only and --skip."""
    parser.add_argument("--only", metavar="GLOB", action="append", help="only layers of these names (may be repeated)")
    parser.add_argument(
        "--skip", metavar="GLOB", action="append", help="leave layers of these names dense (may be repeated)"
    )


def add_output(parser: ArgumentParser, kind: str, *endings: str) -> None:
    """Add --output, for a file of that kind and those endings in a folder that is there."""
    check = output_file(*endings)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", type=check, help=f"{kind} file to write")


def call_factory(name: str, what: str) -> Any:
    """The result of ``module:function``, called without arguments. Raises ModelError, saying what went wrong."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ModelError(_no_factory(name, what))
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ModelError(f'module "{module_name}" of "{name}" cannot be imported: {error}') from error
    except Exception as error:
        raise ModelError(f'module "{module_name}" of "{name}" cannot be imported, it raises {_told(error)}') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelError(f'module "{module_name}" has no function "{function_name}"; "{name}" needs one')
    _require_no_arguments(name, function)
    try:
        return function()
    except Exception as error:
        raise ModelError(f'factory "{name}" raised {_told(error)}') from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (add --debug for the traceback)"


def _require_no_arguments(name: str, function: Callable[..., Any]) -> None:
    try:
        needed = [
            each.name
            for each in inspect.signature(function).parameters.values()
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        return  # built in, without a signature; the call will tell
    if needed:
        raise ModelError(
            f'factory "{name}" wants {", ".join(needed)}; it must take no argument, so name a function that calls it: '
            "def build(): return ..."
        )


def _no_factory(name: str, what: str) -> str:
    """Why a name without a function behind it is no factory, and what to write."""
    path = Path(name)
    if "model" in what and path.is_file() and (path.parent / "config.json").is_file():
        return f'"{name}" is a file of the model folder "{path.parent}"; name the folder: {path.parent}/'
    write = "write it as module:function, such as shop.models:build"
    if path.suffix.lower() in _WEIGHT_FILES:
        there = "is a file of weights" if path.is_file() else "looks like a file of weights"
        load = "" if path.suffix.lower() in (".safetensors", ".st") else " (wrap torch.load in it)"
        extra = "" if load else ", and give the file with --weights"
        return (
            f'"{name}" {there}, which does not name {what}; name a factory that builds the model{load}{extra}: {write}'
        )
    if path.is_file():
        return f'"{name}" is a file, which does not name {what}; {write}'
    if "model" in what and name.count("/") == 1 and hub.is_hub_name(name) and not path.parent.is_dir():
        return (
            f'"{name}" is no folder here; if it is a Hugging Face id, download it first, with: hf download {name} '
            f"--local-dir FOLDER, and name the folder; or {write}"
        )
    if "/" in name or name.startswith("."):
        return f'"{name}" does not name {what}: there is no such folder; {write}'
    return f'"{name}" does not name {what}; {write}, or download a Hugging Face id first and name its folder'


def load_model(name: str, weights: str | None = None, auto_class: str | None = None) -> nn.Module:
    """The model of that name in eval mode, with the dense weights of the file if one is given.

    Raises ModelError for a name that is neither a factory nor a Hugging Face folder, or weights that do not fit.
    """
    from torch import nn

    path = None if weights is None else _readable(Path(weights))
    if Path(name).is_dir():
        return hub.load_folder(Path(name), auto_class, path).eval()
    if auto_class is not None:
        raise ModelError(f'--auto-class is the class of a Hugging Face folder, and "{name}" is none; leave it out')
    model = call_factory(name, "a model or a model folder")
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else _a(type(model).__name__)
        hint = "call it in the factory" if isinstance(model, type) else "build the model in it"
        raise ModelError(f'"{name}" returned {kind}; the factory must return an nn.Module, so {hint}')
    _require_shapes(name, model)
    if path is not None:
        _load_dense(model, path)
    return model.eval()


def _require_shapes(name: str, model: nn.Module) -> None:
    from torch import nn

    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ModelError(
                f'"{name}" returned a model whose "{key}" has no shape yet; run it on one batch in the factory'
            )


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def load_calibration(arguments: Namespace, model: nn.Module) -> Calibration | None:
    """The statistics of ``model`` on the batches that --calibration names, or None without one."""
    from sparsecomp.models.calibration import calibrate

    if arguments.calibration is None:
        return None
    batches = load_batches(arguments.calibration, arguments.batch_item)
    return calibrate(model, batches, only=arguments.only, skip=arguments.skip)


def load_batches(name: str, item: str | None = None) -> Iterable[Any]:
    """The batches that a factory gives, or that item of each. Raises ModelError for what is no iterable of batches."""
    from torch import Tensor

    batches = call_factory(name, "calibration batches")
    if isinstance(batches, Tensor):
        # a tensor is iterable, row by row
        raise ModelError(f'"{name}" gave one tensor, of shape {tuple(batches.shape)}; return a list: [batch]')
    if not isinstance(batches, Iterable) or isinstance(batches, str | dict):
        raise ModelError(f'"{name}" returned {_a(type(batches).__name__)}; return an iterable of batches')
    return batches if item is None else _items(batches, item)


def _items(batches: Iterable[Any], items: str) -> Iterator[Any]:
    """Of each batch the one item, or several as a batch of the same kind."""
    from torch import Tensor

    names = words(items)
    for number, batch in enumerate(batches):
        if isinstance(batch, Tensor):
            raise CalibrationError(
                f"batch {number} is a tensor, of which --batch-item {items} would take rows; leave out --batch-item"
            )
        try:
            found = [batch[name] if isinstance(batch, Mapping) else batch[int(name)] for name in names]
        except (KeyError, IndexError, ValueError, TypeError):
            raise CalibrationError(
                f"--batch-item {items} is not in batch {number} (counted from 0), which {_has(batch)}; give positions "
                "counted from 0 for tuples, keys for dicts, or leave it out"
            ) from None
        if len(found) == 1:
            yield found[0]
        else:
            yield dict(zip(names, found, strict=True)) if isinstance(batch, Mapping) else tuple(found)


def _has(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"has the keys {', '.join(map(str, batch))}"
    return f"has {len(batch)} items" if isinstance(batch, tuple | list) else f"is {_a(type(batch).__name__)}, one input"


def load_call(name: str | None, model_name: str, model: nn.Module) -> Call:
    """The forward call to export with. From a factory it has the batch of any size (axes None).

    A factory gives a tuple of arguments, a dict of keyword arguments, or the only argument. For a Hugging Face folder
    they are token ids and a mask of any batch and length, or pixels of any batch.
    Raises ModelError where there is nothing to take them from.
    """
    if name is not None:
        inputs = call_factory(name, "example inputs")
        if isinstance(inputs, Mapping):
            return Call((), dict(inputs), None)
        return Call(inputs if isinstance(inputs, tuple) else (inputs,), {}, None)
    if not Path(model_name).is_dir():
        raise ModelError(f'exporting "{model_name}" needs example inputs; name a factory: --inputs module:function')
    return hub.example_call(model)


def _readable(path: Path) -> Path:
    """The path of a safetensors file that can be read. Raises ModelError for any other."""
    if not path.exists():
        raise ModelError(f'dense weights "{path}" cannot be read: there is no such file')
    if path.is_dir():
        raise ModelError(f'dense weights "{path}" is a folder; name a safetensors file in it, or the folder as MODEL')
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        hint = (
            "save the weights with safetensors.torch.save_file" if path.suffix in _WEIGHT_FILES[2:] else "save it again"
        )
        raise ModelError(
            f'dense weights "{path}" cannot be read, so they do not fit the model: this is no whole safetensors file '
            f"({' '.join(str(error).split())}); {hint}"
        ) from error
    if "sparsecomp.format" in metadata:
        raise ModelError(
            f'"{path}" holds a packed model, and --weights takes dense weights; name the weights it was packed from'
        )
    return path


def _load_dense(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_model

    try:
        load_model(model, path)
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f'dense weights "{path}" do not fit the model: {reason}') from error


def count_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers that the model would save."""
    from torch import Tensor

    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
