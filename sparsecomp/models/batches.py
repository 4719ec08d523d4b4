"""How batches enter a model and leave it: split, run in the plain eager model, caches off, with clear errors.

Takes any ``nn.Module`` and batches of any kind. Knows nothing of layers, statistics or pruning.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError, ModelError, SparsecompError
from sparsecomp.modules.snapshot import copied, outside_inference_mode

Forward = Callable[[Any, Any], object]
_CACHING = "use_cache"


def eager(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model itself: hooks and names are those of the eager module."""
    while isinstance(model, nn.Module) and type(model).__module__.startswith("torch."):
        inner = model._modules.get("_orig_mod")
        if inner is None:
            break
        model = inner
    return model


@contextmanager
def entering(model: nn.Module) -> Iterator[None]:
    """Calls of ``model`` and its parts repeat for a while, and their hooks run.

    Compiled code is left for the eager one, inference mode of the caller is off, fused encoder layers call their
    children, and Hugging Face models keep no keys and values of a call for the next (``use_cache`` of their configs).
    """
    with ExitStack() as stack:
        stack.enter_context(outside_inference_mode())
        # only where it was imported can anything be compiled; importing it takes a second
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fused = torch.backends.mha.get_fastpath_enabled()
        # fused encoder layers read weights without calling the layers, and would turn padded inputs into nested tensors
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for config in _caching_configs(model):
            before = getattr(config, _CACHING)
            with suppress(AttributeError, TypeError):  # of a frozen class
                setattr(config, _CACHING, False)
                stack.callback(setattr, config, _CACHING, before)
        yield


def _caching_configs(model: nn.Module) -> list[Any]:
    """The configs of the model's parts that have a cache on, those inside other configs as well."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting = [vars(part).get("config") for part in model.modules()]
    while waiting:
        config = waiting.pop()
        if not hasattr(config, "__dict__") or isinstance(config, nn.Module | type) or id(config) in seen:
            continue
        seen.add(id(config))
        if getattr(config, _CACHING, None):
            found[id(config)] = config
        waiting.extend(each for key, each in vars(config).items() if key.endswith("config"))
    return list(found.values())


def fresh(batch: Any) -> Any:
    """A copy of the batch for one call, which may change it, with ``use_cache`` off."""
    if isinstance(batch, Mapping) and batch.get(_CACHING):
        batch = {**batch, _CACHING: False}
    with suppress(ModelError):  # what cannot be copied, of a class of the caller's, is passed as it is
        if type(batch) is dict:
            # a tensor under two names becomes two, for each name is followed on its own
            return {key: copied(value) for key, value in batch.items()}
        return copied(batch)
    return batch


def require_batches(batches: object, what: str = "batches") -> None:
    """Raises CalibrationError for one batch in the place of many."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f"{what} is one {type(batches).__name__}, not an iterable of batches; pass [batch]")


def split(
    batches: Iterable[Any], held_out: Iterable[Any] | None, share: float
) -> tuple[list[Any], list[int], list[int]]:
    """All batches, the indices of those to train on, and of those to hold out: the given ones, or a share.

    A share is evenly spread over the batches; at least one is held out and one trained on. Raises CalibrationError
    where that cannot be.
    """
    require_batches(batches)
    batches = list(batches)
    count = len(batches)
    if held_out is not None:
        require_batches(held_out, "held_out")
        others = list(held_out)
        if not batches or not others:
            raise CalibrationError(f"got {count} batches and {len(others)} held out; both must hold at least one")
        return [*batches, *others], list(range(count)), list(range(count, count + len(others)))
    if count < 2:
        raise CalibrationError(
            f"tuning got {count} batch{'' if count == 1 else 'es'}; it needs at least 2, one to hold out: "
            "pass smaller batches"
        )
    number = min(max(1, round(count * share)), count - 1)
    chosen = {(2 * i + 1) * count // (2 * number) for i in range(number)}
    return batches, [i for i in range(count) if i not in chosen], sorted(chosen)


def arguments(batch: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a batch stands for; CalibrationError for a batch of another kind."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise CalibrationError(
        f"batch {index} is a {type(batch).__name__}; allowed are a tensor, a tuple or list and a mapping; "
        f"pass forward=lambda model, batch: ... for anything else"
    )


def run_batch(model: nn.Module, batch: Any, index: int, forward: Forward | None = None) -> object:
    """What ``model`` returns for a batch: ``forward(model, batch)``, or a call with the batch as ``arguments`` says.

    Raises CalibrationError, naming the batch, if it cannot be passed or anything but running out of memory goes wrong.
    """
    if forward is not None:
        with _telling(batch, index, "the function given as forward=", "repair the function or that batch"):
            return forward(model, batch)
    args, kwargs = arguments(batch, index)
    taken = _check_signature(model, batch, args, kwargs, index)
    who = f"{type(model).__name__}.forward{taken}"
    with _telling(batch, index, who, "repair that batch, or say with forward=lambda model, batch: ... how it is run"):
        return model(*args, **kwargs)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of what a block returns: the tensor, or the first of a tuple. Raises ModelError for others."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ModelError(
            f"a block returns a {type(value).__name__}, not hidden states as a tensor or first in a tuple; "
            "blocks of this model cannot be pruned one after the other"
        )
    return value


@contextmanager
def _telling(batch: Any, index: int, who: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (SparsecompError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code meets
        told = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"batch {index} ({describe(batch)}): {who} raised {type(error).__name__}: {told}; {remedy}"
        ) from error


def _check_signature(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> str:
    """The parameters of the model's forward in writing; CalibrationError if the batch has others."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return ""
    taken = f"({', '.join(map(_parameter, signature.parameters.values()))})"
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        advice = _advice(batch, signature)
        raise CalibrationError(
            f"batch {index} is {describe(batch)}, and {type(model).__name__}.forward takes {taken} ({error}); {advice}"
        ) from error
    return taken


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    star = stars[parameter.kind] if parameter.kind in stars else ""  # noqa: SIM401 (keys of a narrower type)
    optional = "" if star or parameter.default is inspect.Parameter.empty else "=..."
    return f"{star}{parameter.name}{optional}"


def _advice(batch: Any, signature: inspect.Signature) -> str:
    if isinstance(batch, Mapping):
        known = [key for key in batch if key in signature.parameters]
        passed = ", ".join(f'{key}=batch["{key}"]' for key in known) or f'batch["{next(iter(batch), "x")}"]'
    elif isinstance(batch, tuple | list):
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        count = sum(each.kind in positional for each in signature.parameters.values())
        passed = ", ".join(f"batch[{i}]" for i in range(max(1, min(count, len(batch) - 1))))
    else:
        passed = "batch, ..."
    return f"say what the model gets with forward=lambda model, batch: model({passed})"


def describe(batch: Any) -> str:
    """A batch in a few words: its class and the shapes in it."""
    kind = type(batch).__name__
    if isinstance(batch, Tensor):
        return _shape(batch)
    if isinstance(batch, Mapping):
        return f"a {kind} of " + (", ".join(f"{key}: {_shape(value)}" for key, value in batch.items()) or "nothing")
    if isinstance(batch, tuple | list):
        return f"a {kind} of {len(batch)} ({', '.join(map(_shape, batch[:6]))}{', ...' if len(batch) > 6 else ''})"
    return f"a {kind}"


def _shape(value: object) -> str:
    return f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every part gets its own mode back."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for each, training in modes:
            each.training = training
