"""Hugging Face folders on the command line: which class, which weights, which example inputs, how they are written.

Takes and gives models of transformers, which is imported only here and only when a folder is named.
"""

from __future__ import annotations

import difflib
import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecomp.errors import ModelError
from sparsecomp.reporting.terminal import listed
from sparsecomp.reporting.writing import unfinished

if TYPE_CHECKING:
    import torch
    from torch import nn

# files that hold weights, which the written model has anew
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
    ".index.json",
    ".partial",
)
_OTHER_FORMS = ("onnx", "openvino", "coreml", "gguf", "original")
# settings that pruning does not touch, and a model made of other weights does not know
_KEPT = ("generation_config.json",)
_BATCH, _TOKENS, _ANSWER = 2, 8, 6
_SHOWN = 3


@dataclass(frozen=True)
class Call:
    """One forward call to trace a model with, and its axes of any size as ``export_onnx`` takes them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axes: Any


def is_hub_name(name: str) -> bool:
    """Whether a name that is neither a folder nor a factory looks like one on the Hugging Face hub."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts
    )


def load_folder(folder: Path, auto_class: str | None, weights: Path | None) -> nn.Module:
    """The model of a folder in the class of its config.json or of ``auto_class``; says on standard error which it is.

    ``weights`` is a safetensors file that is read instead of the folder's own. Raises ModelError for a folder that is
    none of transformers', a class that does not exist, and weights that do not fill the model.
    """
    import torch

    config = _config(folder)
    transformers = _transformers(folder)
    made, reason = _class(transformers, config, auto_class)
    state = None if weights is None else _state(weights)
    # a default device of the program's own is not where weights are read to
    with _quiet(transformers), torch.device("cpu"):
        try:
            model, info = made.from_pretrained(
                None if state is not None else folder,
                **({} if state is None else {"config": _made_config(transformers, folder), "state_dict": state}),
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ModelError(
                f'model folder "{folder}" cannot be loaded as {made.__name__} ({type(error).__name__}: {text}); '
                "check its files, or name another class with --auto-class"
            ) from error
    assert isinstance(model, torch.nn.Module)
    print(f'model "{folder}": {type(model).__name__}{reason}', file=sys.stderr)
    _check_loaded(folder, weights, model, info)
    return model


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within the block no configuration in the model asks for the cache of keys and values."""
    asking = [config for config in _configs(model) if getattr(config, "use_cache", None)]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


def writes_folders(model: nn.Module) -> bool:
    """Whether the model is one of transformers, which writes itself as a folder."""
    return callable(getattr(model, "save_pretrained", None)) and getattr(model, "config", None) is not None


def save_folder(model: nn.Module, folder: Path, source: Path | None) -> None:
    """Write the model as a folder that ``from_pretrained`` reads, with what else lies in the folder it came from.

    Files are complete before any of them is in place.
    """
    transformers = _transformers(folder)
    partial = unfinished(folder)
    try:
        with _quiet(transformers):
            model.save_pretrained(partial)  # type: ignore[operator]
        mode = (partial / "config.json").stat().st_mode & 0o777
        for each in partial.glob("*.safetensors"):
            # these alone are closed to others, whatever a new file may be here
            each.chmod(mode)
        if source is not None:
            _copy_beside(source, partial)
        if folder.exists():
            for each in [each for each in folder.iterdir() if each.name.endswith((".safetensors", ".index.json"))]:
                if not (partial / each.name).exists():
                    each.unlink()
            for each in sorted(each for each in partial.rglob("*") if each.is_file()):
                place = folder / each.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                each.replace(place)
        else:
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_beside(source: Path, target: Path) -> None:
    """What lies beside the weights: tokenizer, card, further modules; not the same weights in other forms."""
    for each in sorted(source.iterdir()):
        if each.name.startswith("."):
            continue
        if each.is_dir():
            if each.name not in _OTHER_FORMS:
                shutil.copytree(each, target / each.name, dirs_exist_ok=True)
        elif not each.name.endswith(_WEIGHTS) and (each.name in _KEPT or not (target / each.name).exists()):
            shutil.copy2(each, target / each.name)


def example_call(model: nn.Module) -> Call:
    """Inputs of a model of transformers by what its forward takes first: token ids or pixels.

    Raises ModelError for a model that takes anything else.
    """
    import torch

    kind, config = type(model).__name__, getattr(model, "config", None)
    first = getattr(model, "main_input_name", None)
    mixed = getattr(config, "text_config", None) is not None and getattr(config, "vision_config", None) is not None
    batch = torch.export.Dim("batch")
    if first == "pixel_values" and not mixed:
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, list | tuple) else (size or 224, size or 224)
        pixels = torch.zeros(_BATCH, channels, height, width, dtype=_dtype(model), device="cpu")
        return Call((), {"pixel_values": pixels}, {"pixel_values": {0: batch}})
    if first != "input_ids" or mixed:
        what = "text and pixels" if mixed else str(first or "inputs of its own")
        raise ModelError(
            f"{kind} takes {what}, for which there are no example inputs; name a factory that returns them as a dict "
            "of its arguments: --inputs module:function"
        )
    ids = _ids(config, _TOKENS)
    axes = {0: batch, 1: torch.export.Dim("tokens")}
    inputs, shapes = (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": axes, "attention_mask": axes},
    )
    if _takes(model, "token_type_ids") and (getattr(config, "type_vocab_size", None) or 0) > 1:
        # without them in the file a tokenizer's pairs of sentences could not be told apart
        inputs["token_type_ids"], shapes["token_type_ids"] = torch.zeros_like(ids), axes
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, _ANSWER)
        shapes["decoder_input_ids"] = {0: batch, 1: torch.export.Dim("decoder_tokens")}
    return Call((), inputs, shapes)


def output_names(model: nn.Module, call: Call) -> list[str] | None:
    """Names of the outputs where the call returns a plain mapping of tensors, such as ["logits"]; else None."""
    import torch

    with torch.no_grad():
        result = model(*call.args, **call.kwargs)
    if isinstance(result, Mapping) and result and all(isinstance(each, torch.Tensor) for each in result.values()):
        return [str(name) for name in result]
    return None


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _ids(config: Any, length: int) -> torch.Tensor:
    import torch

    words = min(getattr(config, "vocab_size", None) or 16, 16)
    count = torch.arange(_BATCH * length, dtype=torch.int64, device="cpu")
    return (count % words).view(_BATCH, length)


def _dtype(model: nn.Module) -> torch.dtype:
    import torch

    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f'folder "{folder}" holds an adapter alone; merge it into its model first, with merge_and_unload() of '
                "the package peft, and save that"
            )
        raise ModelError(f'folder "{folder}" has no config.json; it must be a Hugging Face model folder')
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f'"{path}" is no JSON ({error}); download the folder again') from error
    if not isinstance(config, dict):
        raise ModelError(f'"{path}" holds a {type(config).__name__}, not the settings of a model; download it again')
    return config


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f'model folder "{folder}" needs the package transformers; install it with: pip install transformers'
        ) from error
    return transformers


def _class(transformers: Any, config: Mapping[str, Any], auto_class: str | None) -> tuple[Any, str]:
    """The class to load, and in words where its name comes from."""
    if auto_class is not None:
        made = getattr(transformers, auto_class, None)
        model = isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)
        if not model and not (auto_class.startswith("AutoModel") and made is not None):
            near = difflib.get_close_matches(
                auto_class, [each for each in dir(transformers) if "Model" in each or "For" in each]
            )
            hint = f"the nearest are {', '.join(near)}" if near else "such as AutoModelForSequenceClassification"
            raise ModelError(f'--auto-class "{auto_class}" is no model class of transformers; {hint}')
        return made, ", by --auto-class"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    made = getattr(transformers, str(name), None)
    if name is not None and isinstance(made, type) and issubclass(made, transformers.PreTrainedModel):
        return made, ", by its config.json"
    why = (
        "names no architecture"
        if name is None
        else f'names "{name}", which transformers {transformers.__version__} lacks'
    )
    return transformers.AutoModel, f": its config.json {why}, so a head is not loaded; name the class with --auto-class"


def _made_config(transformers: Any, folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _check_loaded(folder: Path, weights: Path | None, model: nn.Module, info: Mapping[str, Any]) -> None:
    """ModelError where weights leave most linear layers of the model random; a sentence where they leave some."""
    kind = type(model).__name__
    missing, extra = (sorted(map(str, info.get(each) or ())) for each in ("missing_keys", "unexpected_keys"))
    wrong = [str(each[0] if isinstance(each, tuple) else each) for each in info.get("mismatched_keys") or ()]
    if weights is not None and (missing or extra or wrong):
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
        parts += [f"has another size of {_some(wrong)}"] * bool(wrong)
        raise ModelError(f'dense weights "{weights}" do not fit {kind}: the file {" and ".join(parts)}')
    absent = {*missing, *wrong}
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    random = [name for name in layers if f"{name}.weight" in absent]
    if 2 * len(random) > len(layers):
        names = _config(folder).get("architectures")
        saved = f"it was saved as {names[0]}" if isinstance(names, list) and names else "it is another model's"
        raise ModelError(
            f'"{folder}" has no weights for {len(random)} of the {len(layers)} linear layers of {kind}, which would be '
            f"random; {saved}, so leave out --auto-class or name a class of that model"
        )
    if absent:
        what = f"{_some([*missing, *wrong])} of {kind}: they are random"
        if random:
            what += f", and so is what is pruned or packed of the layer{'s' * (len(random) > 1)} {listed(random)}"
        print(
            f'warning: "{folder}" has no weights for {what}; name the class that was saved with --auto-class',
            file=sys.stderr,
        )
    if extra:
        print(f'warning: {kind} has no place for {_some(extra)} of "{folder}": they are left out', file=sys.stderr)


def _is_layer(module: nn.Module) -> bool:
    """Whether it multiplies by a weight, as nn.Linear and the Conv1D of GPT-2 do."""
    from torch import nn

    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f'"{name}"' for name in names[:_SHOWN]) + more


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model, those inside others too."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        inner = (
            [each for each in vars(config).values() if hasattr(each, "to_dict")] if hasattr(config, "to_dict") else []
        )
        found.update({id(each): each for each in (config, *inner) if hasattr(each, "to_dict")})
    return list(found.values())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' bars and tables of loaded weights to itself; what matters in them is said in a sentence."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
