"""The tensors that a model has now: which of them a file can be copied into, and giving all of them back on an error.

Takes models and tensors. Knows nothing of files and of how a layer computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.modules.readonly import ReadOnly
from sparsecomp.nn.packed_module import PackedModule

# each copies its entries, which it has under the same names; the rest of what they do is for files of old versions
_PLAIN = nn.Module, nn.BatchNorm1d, nn.InstanceNorm1d, PackedModule
_PLAIN_LOADING = frozenset(each._load_from_state_dict for each in _PLAIN)
_PLAIN_SAVING = frozenset(each._save_to_state_dict for each in (nn.Module, PackedModule))
_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def why_no_plain(value: object) -> str | None:
    """What ``value`` is if it is no strided tensor with numbers in memory, as "a str"; None for one."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "on the meta device"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.').removeprefix('_')}"
    if value.is_quantized:
        return f"a quantised tensor ({str(value.dtype).removeprefix('torch.')})"
    if hasattr(value, "__tensor_flatten__"):  # a class that wraps other tensors
        return f"a {type(value).__name__}"
    return None


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in the same memory."""
    views = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), *views


def same(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and all numbers are equal; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if not one.is_floating_point():
        return torch.equal(one, other)
    if one.dtype.itemsize == 1:  # torch compares no fp8
        one, other = one.float(), other.float()
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


# --- the model's entries ----------------------------------------------------------------------------------------


def has_own_way(module: nn.Module) -> bool:
    """Whether a module saves or loads otherwise than by copying its parameters and buffers, or has hooks there."""
    cls = type(module)
    return (
        cls._load_from_state_dict not in _PLAIN_LOADING
        or cls._save_to_state_dict not in _PLAIN_SAVING
        or cls.get_extra_state is not nn.Module.get_extra_state
        or cls.set_extra_state is not nn.Module.set_extra_state
        or cls.state_dict is not nn.Module.state_dict
        or cls.load_state_dict is not nn.Module.load_state_dict
        or not vars(module).keys().isdisjoint(["state_dict", "load_state_dict", "_load_from_state_dict"])
        or any(vars(module).get(name) for name in _HOOKS)
    )


def live_entries(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those ``entries`` of the state_dict that are parameters and buffers of modules without ways of their own.

    What is copied into these, the model has. The state_dict is to be made with ``keep_vars``.
    """
    held: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not has_own_way(module):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    held[f"{prefix}.{name}" if prefix else name] = tensor
    return {entry: held[entry] for entry, value in entries.items() if value is held.get(entry)}


# --- copying ----------------------------------------------------------------------------------------------------


def written(tensor: Tensor) -> Tensor:
    """The part of a tensor that holds all its numbers: of expanded dimensions, the first entry."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def leading(value: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of ``value``, as many as ``shape`` has."""
    return value[tuple(slice(size) for size in shape)]


def copy_into(target: Tensor, value: Tensor) -> None:
    """Write ``value``, of the shape of ``target`` or of its written part, into the memory of ``target``."""
    # a tensor made under inference_mode can be written under it only
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        part = written(target.detach())
        part.copy_(leading(value, part.shape))


def holds(target: Tensor, value: Tensor) -> bool:
    """Whether ``target`` has the numbers that ``copy_into`` was to write."""
    part = written(target.detach())
    return same(part, leading(value, part.shape))


def torch_copies(target: Tensor) -> bool:
    """Whether torch's own loading can write ``target``: it refuses expanded tensors and those of inference mode."""
    return not target.is_inference() and written(target.detach()).shape == target.shape


def overlapping(entry: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Another of ``tensors`` that has memory in common with the one of that name."""
    first, last = _span(tensors[entry])
    for name, tensor in tensors.items():
        if name != entry and tensor.numel() and tensor.device == tensors[entry].device:
            begin, end = _span(tensor)
            if begin < last and first < end:
                return name
    return None


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


# --- all or nothing ---------------------------------------------------------------------------------------------


@contextmanager
def restoring(model: nn.Module, tensors: Iterable[Tensor], *, own_ways: bool) -> Iterator[None]:
    """Give the model back if anything is raised: modules, attributes, and the numbers of ``tensors``.

    With ``own_ways`` code of the model's own runs inside: then all its tensors, its containers one level deep and the
    extra state of its modules come back as well.
    """
    modules = list(model.modules())
    tables = [(module, dict(vars(module)), _contents(module, deep=own_ways)) for module in modules]
    known = {id(each): each for each in tensors}
    extras: list[tuple[nn.Module, Any]] = []
    if own_ways:
        for module in modules:
            held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            for each in held:
                if isinstance(each, Tensor) and not isinstance(each, ReadOnly) and why_no_plain(each) is None:
                    known.setdefault(id(each), each)
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                extras.append((module, copy.deepcopy(module.get_extra_state())))
    before = [(each, each.detach(), written(each.detach()).clone()) for each in known.values()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in tables:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, items in contents:
                _refill(container, items)
        for tensor, alias, value in before:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
                tensor.data = alias
            copy_into(tensor, value)
        for module, state in extras:
            module.set_extra_state(state)
        raise


def _contents(module: nn.Module, *, deep: bool) -> list[tuple[Any, Any]]:
    tables = [vars(module)[name] for name in ("_parameters", "_buffers", "_modules")]
    if deep:
        tables = [each for each in vars(module).values() if isinstance(each, dict | list | set)]
    return [(each, copy.copy(each)) for each in tables]


def _refill(container: Any, items: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)
