"""Matrices that a model holds outside its layers, by which it may multiply all the same.

Takes modules and gives names and sentences. Knows nothing of patterns, masks and kernels.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsecomp.modules.readonly import PackedParameter

# what modules of torch.nn hold under these names they use themselves: it is looked up, normalises, or is named already
_OF_TORCH = frozenset(
    [
        *("weight", "bias", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_orig", "weight_g", "weight_v"),
        *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"),
    ]
)
_NUMBERED = ("weight_ih_l", "weight_hh_l", "weight_hr_l", "original")
_BYTES = (torch.int8, torch.uint8, torch.int16)


def bare_matrices(name: str, module: nn.Module, total: int, seen: set[int]) -> dict[str, str]:
    """{name: sentence} for the matrices that ``module`` itself holds as Parameters and that are no layer's weight.

    ``total`` is how many weights the model has; ``seen`` holds ids of Parameters that were named before, and these
    are added. What belongs to a module of torch.nn is not named; what a subclass adds to it is.
    """
    named: dict[str, str] = {}
    own: dict[str, nn.Parameter] = {}
    for key, each in module._parameters.items():
        if each is not None and id(each) not in seen and _is_matrix(each) and not _of_torch(module, key):
            seen.add(id(each))
            own[key] = each
    # the experts of a mixture are often one Parameter [experts, out, in]
    stacks = {key: each for key, each in own.items() if each.ndim >= 3 and min(each.shape[-3:]) > 1}
    if stacks:
        share = _share(sum(each.numel() for each in stacks.values()), total)
        kind, keys = type(module).__name__, ", ".join(stacks)
        named[name] = (
            f"{kind} holds stacks of matrices ({keys}; {share}); if it multiplies by them, it does so outside "
            "linear layers"
        )
    for key, each in own.items():
        if each.ndim == 2 and min(each.shape) > 1:
            size = "x".join(map(str, each.shape))
            dtype = "" if each.is_floating_point() else f"{str(each.dtype).removeprefix('torch.')} "
            named[f"{name}.{key}" if name else key] = (
                f"a bare {dtype}Parameter {size} ({_share(each.numel(), total)}), no layer; the model may multiply "
                "by it outside a layer"
            )
    return named


def _is_matrix(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.UninitializedParameter | PackedParameter):
        return False
    return parameter.is_floating_point() or parameter.is_complex() or parameter.dtype in _BYTES


def _of_torch(module: nn.Module, key: str) -> bool:
    """Whether the Parameter is what a class of torch.nn, or Conv1D of transformers, has under that name."""
    for base in type(module).__mro__:
        library, _, rest = base.__module__.partition(".")
        if base is nn.Module or (library == "torch" and rest.endswith("container")):
            continue
        if library == "torch" or hasattr(module, "in_features") or base.__name__ == "Conv1D":
            return key in _OF_TORCH or key.startswith(_NUMBERED)
    return False


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f}% of the model's weights"
