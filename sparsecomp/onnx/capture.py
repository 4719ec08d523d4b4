"""torch's exporter, called so that a model of tensors comes out of it, and its failures in words.

Takes a model and its example inputs and gives torch's ONNXProgram. Knows nothing of sparse layers.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsecomp.errors import ModelError, SparsecompError

CACHE_NOTE = (
    "use_cache is off in this file, as ONNX has no form of the cache: each call computes all tokens it is given"
)
FIXED_AXIS = "trace with a batch of 2 or more, name the axes with dynamic_shapes, or pass dynamic_batch=False to fix it"
_MOST_TEXT = 300

# What torch says -> what it means and what to do. The first that is found counts.
_CAUSES = (
    (
        r"data-dependent|GuardOnDataDependent|Dynamic control flow",
        "its forward branches on the values of a tensor; choose the branch by shapes or by Python values, or use "
        "torch.where or torch.cond",
    ),
    (
        r"No ONNX function found for|No decompositions registered",
        "it uses an operator that torch has no ONNX form of; replace that operator",
    ),
    (
        r"mismatch between the structure of `?inputs|dynamic_shapes.{0,60}(must|should|does not|to be)|"
        r"the structure of `?dynamic_shapes",
        "dynamic_shapes does not have the structure of the inputs; name every input of kwargs, or give one entry "
        "for each of args, with None for what stays as it is",
    ),
    (
        r"[Cc]onstraints? violated|specialized|specialised|inferred to be a constant|not all values of|"
        r"Could not guard|marked.{0,30}dynamic",
        f"an axis that should take any size was fixed by the model; {FIXED_AXIS}",
    ),
)


@contextmanager
def without_caches(model: nn.Module, kwargs: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    """``use_cache`` off in every configuration of the model, nested ones too; gives notes on what that changes.

    A language model otherwise returns an object that holds its keys and values, which no ONNX file can.
    A ``use_cache`` among the caller's own arguments is left to the caller.
    """
    switched = [] if kwargs and kwargs.get("use_cache") is not None else list(_caching_configs(model))
    for config in switched:
        config.use_cache = False
    try:
        yield (CACHE_NOTE,) if switched else ()
    finally:
        for config in switched:
            config.use_cache = True


def _caching_configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()

    def within(config: Any) -> Iterator[Any]:
        if id(config) in seen or not hasattr(config, "__dict__"):
            return
        seen.add(id(config))
        # an encoder says that it is none of the others, and has no cache whatever use_cache says
        encoder = getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False)
        if getattr(config, "use_cache", None) is True and not encoder:
            yield config
        for value in list(vars(config).values()):
            if type(value).__name__.endswith("Config"):
                yield from within(value)

    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            yield from within(config)


def torch_export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Any:
    """torch's ONNXProgram of ``model(*args, **kwargs)``. Raises ModelError with the cause where it is recognised."""
    # the one warns of every torchvision operator that is not installed, the other of constants it does not fold
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message="# The axis name")  # inputs share an axis on purpose
            return torch.onnx.export(model, args, kwargs=kwargs or None, dynamo=True, verbose=False, **options)
    except Exception as error:  # besides its own error torch lets through what the model or the tracing raises
        raise ModelError(_in_words(error, model, args, kwargs)) from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _in_words(error: Exception, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, SparsecompError):
        return f"torch cannot export this model to ONNX ({_short(cause)}){_hooks(model)}"
    # what the model does without an exporter tells more than what the exporter stumbled over
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    except Exception as own:
        return (
            f"the model itself fails on these example inputs ({type(own).__name__}: {_short(own)}); "
            f"give args and kwargs as in a call model(*args, **kwargs)"
        )
    foreign = [leaf for leaf in pytree.tree_leaves(output) if not isinstance(leaf, Tensor | int | float | bool | str)]
    foreign = [leaf for leaf in foreign if leaf is not None]
    if foreign:
        kind = type(foreign[0]).__name__
        fix = 'kwargs={..., "use_cache": False}' if "Cache" in kind else "a wrapper whose forward returns tensors only"
        return (
            f"the model returns a {kind}, which ONNX has no form of, beside or instead of tensors; export it with {fix}"
        )
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if "Cache" in type(leaf).__name__]
    if given:
        return (
            f"the inputs hold a {type(given[0]).__name__}, which ONNX has no form of; leave past_key_values out and "
            f"pass use_cache=False"
        )
    text = " ".join(str(each) for each in _chain(error))
    for expression, advice in _CAUSES:
        if re.search(expression, text):
            return f"torch cannot export this model to ONNX ({_short(cause)}): {advice}{_hooks(model)}"
    return (
        f"torch cannot export this model to ONNX ({type(cause).__name__}: {_short(cause)}); "
        f"torch.export.export(model, args, kwargs) shows the line{_hooks(model)}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short(error: BaseException) -> str:
    # without the escape codes of torch's own report
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + "..."


def _hooks(model: nn.Module) -> str:
    hooked = [
        f'"{name}"' for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    if not hooked:
        return ""
    more = ", ..." if len(hooked) > 3 else ""
    return (
        f"; the hooks on {', '.join(hooked[:3])}{more} are traced as well, remove them if they are not to be exported"
    )
