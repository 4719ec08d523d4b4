"""What a layer has beside its weight and bias, given to the layer that takes its place: hooks, attributes, buffers.

Knows modules of torch and nothing of packed weights. What cannot be given is named, and then the layer is to stay.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable

from torch import nn

from sparsecomp.errors import ModelError

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
COMPILED_CALL = "_compiled_call_impl"  # what nn.Module.compile leaves on a module is of the old layer's code
_OF_EVERY_MODULE = frozenset([*vars(nn.Module()), COMPILED_CALL])
_OF_EVERY_LINEAR = frozenset(["in_features", "out_features", "weight", "bias"])
_OF_EVERY_CONVOLUTION = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))) - _OF_EVERY_MODULE
# a subclass that has no more than these does what its base does
_HARMLESS = frozenset(
    [
        *("__init__", "reset_parameters", "extra_repr", "__repr__", "__constants__", "__slots__", "__dict__"),
        *("__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__classcell__"),
        *("__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl"),
        *("__type_params__", "__orig_bases__", "__parameters__", "__abstractmethods__"),
    ]
)
_FORWARDS: dict[type[nn.Module], object] = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}
_MADE_BY = {
    ("weight_orig", "weight_mask"): "torch.nn.utils.prune computes its weight; make it permanent first, with "
    'torch.nn.utils.prune.remove(layer, "weight")',
    ("weight_orig", "weight_u"): "spectral_norm computes its weight; make it permanent first, with "
    "torch.nn.utils.remove_spectral_norm(layer)",
    ("weight_g", "weight_v"): "weight_norm computes its weight; make it permanent first, with "
    "torch.nn.utils.remove_weight_norm(layer)",
}


def why_not_carried(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why a layer that stands in for ``module``, a ``base`` or a subclass of it, would not do the same; None if it can.

    Hooks, attributes, buffers and submodules of the object are carried over; what its class adds is not.
    """
    kind = type(module).__name__
    if "parametrizations" in module._modules:
        names = list(getattr(module, "parametrizations"))  # noqa: B009 (no attribute of nn.Module)
        return (
            f"its {' and '.join(names)} {'is' if len(names) == 1 else 'are'} computed by a parametrization; make it "
            f'permanent first, with torch.nn.utils.parametrize.remove_parametrizations(layer, "{names[0]}")'
        )
    if module._parameters.get("weight") is None:
        held = {*module._parameters, *module._buffers}
        known = next((reason for names, reason in _MADE_BY.items() if held.issuperset(names)), None)
        return known or "its weight is computed by a hook or another module; make it a Parameter of the layer first"
    if base.forward is not _FORWARDS.get(base, base.forward):
        return f"nn.{base.__name__}.forward was replaced, which a sparse layer would not repeat"
    if type(module).forward is not base.forward:
        return f"{kind} has a forward of its own, which a sparse layer would not repeat"
    if "forward" in module.__dict__:
        return "its forward was replaced on this one object, which a sparse layer would not repeat"
    own = {name for cls in type(module).__mro__ if cls not in base.__mro__ for name in vars(cls)} - _HARMLESS
    if own:
        return f"its class {kind} adds {_listed(own)}, which a sparse layer would not have"
    if "bias" not in module._parameters and getattr(module, "bias", None) is not None:
        if "bias_mask" in module._buffers:
            return 'torch.nn.utils.prune computes its bias; make it permanent first, with remove(layer, "bias")'
        return "its bias is no Parameter of its own; make it one first"
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        return "it has hooks on its state_dict, which expect the dense weight; remove them first"
    return None


def carry_over(old: nn.Module, new: nn.Module, reserved: Iterable[str], *, shared: bool) -> None:
    """Give ``new`` the hooks of ``old``, and every attribute, buffer, parameter and submodule beside weight and bias.

    With ``shared`` they are the very objects, as ``new`` takes the place of ``old``: a hook's handle goes on removing
    it. Otherwise tensors and submodules are copied. ``reserved`` are names that mean something else to ``new``.

    Raises ModelError for an attribute of a reserved name, a method bound to ``old``, and hooks on a state_dict of
    another form; ``new`` is then as it was.
    """
    taken = frozenset(reserved)
    facts = _OF_EVERY_LINEAR | (_OF_EVERY_CONVOLUTION if isinstance(old, nn.Conv2d) else frozenset())
    extra = set(vars(old)) - _OF_EVERY_MODULE - facts - _private(old)
    buffers = {name: each for name, each in old._buffers.items() if name not in _private(old)}
    parameters = {name: each for name, each in old._parameters.items() if name not in _OF_EVERY_LINEAR}
    clash = (extra | set(buffers) | set(parameters) | set(old._modules)) & taken
    if clash:
        raise ModelError(
            f"the layer has {_listed(clash)} of its own, a name that a sparse layer uses; rename it or leave the layer "
            "dense with skip=[...]"
        )
    bound = {name for name in extra if _is_bound(vars(old)[name], old)}
    if bound:
        raise ModelError(
            f"the layer has {_listed(bound)} as a method of its own, which would go on using the weight it has now; "
            "remove it or leave the layer dense with skip=[...]"
        )
    same_form = isinstance(new, type(old))
    if not same_form and any(getattr(old, name, None) for name in _STATE_HOOKS):
        raise ModelError("the layer has hooks on its state_dict, which expect its present form; remove them first")
    for name in (*_HOOKS, *_STATE_HOOKS) if same_form else _HOOKS:
        hooks = vars(old).get(name)
        new.__dict__[name] = hooks if shared else copy.copy(hooks)
    for name in extra:
        new.__dict__[name] = vars(old)[name]
    for name, tensor in buffers.items():
        kept = tensor if shared or tensor is None else tensor.detach().clone()
        new.register_buffer(name, kept, persistent=name not in old._non_persistent_buffers_set)
    for name, parameter in parameters.items():
        new._parameters[name] = parameter if shared else copy.deepcopy(parameter)
    for name, child in old._modules.items():
        new._modules[name] = child if shared else copy.deepcopy(child)


def _is_bound(value: object, module: nn.Module) -> bool:
    """Whether a function is, or calls, a method of that very object."""
    while isinstance(value, functools.partial):
        if any(each is module for each in (*value.args, *value.keywords.values())):
            return True
        value = value.func
    return getattr(value, "__self__", None) is module


def _private(module: nn.Module) -> frozenset[str]:
    """Names under which a sparse layer keeps its own affairs; none for a dense one."""
    return frozenset(getattr(module, "own_names", ()))


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(f'"{name}"' for name in ordered[:3]) + (", ..." if len(ordered) > 3 else "")
