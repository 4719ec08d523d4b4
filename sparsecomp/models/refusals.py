"""What a module multiplies by, and why it cannot be pruned or replaced, in words.

Takes modules, gives kinds and reasons. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from sparsecomp.models.convolutions import why_no_matrix
from sparsecomp.modules.carry import why_not_carried
from sparsecomp.patterns.numbers import LAYER_DTYPES, PART_NAMES

Kind = Literal["linear", "conv1d", "conv2d"]

_OTHER_MATMULS = (
    *(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNBase, nn.RNNCellBase, nn.Bilinear),
)
_OF_THE_FILE = frozenset(PART_NAMES)


def _conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    for base in type(module).__mro__:
        if base.__name__ == "Conv1D" and base.__module__.partition(".")[0] == "transformers":
            return base
    return None


def kind_of(module: nn.Module) -> Kind | None:
    """How a module stores its weight; None for one that has none to prune."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return "conv1d" if _conv1d_class(module) is not None else None


def why_not(
    name: str, module: nn.Module, owners: Mapping[object, list[str]], elsewhere: Mapping[int, str]
) -> str | None:
    """Why a module of some kind cannot be pruned or replaced; None if it can."""
    if getattr(type(module), "_sparsecomp_packed", False):
        return "already sparse"
    bases = (each for each in (nn.Linear, nn.Conv2d) if isinstance(module, each))
    base = next(bases, None) or _conv1d_class(module)
    assert base is not None
    parameter = module._parameters.get("weight")
    if isinstance(parameter, nn.UninitializedParameter):
        return "its weight has no shape yet; run the model on one batch first"
    if isinstance(module, nn.Conv2d) and (reason := why_no_matrix(module)) is not None:
        return reason
    if (reason := why_not_carried(module, base)) is not None:
        return reason
    assert parameter is not None
    if type(parameter) is not nn.Parameter:
        return f"its weight is a {type(parameter).__name__}, not a plain Parameter (quantised or distributed)"
    if parameter.dtype not in LAYER_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in LAYER_DTYPES)
        return f"its weight is {str(parameter.dtype).removeprefix('torch.')}; allowed are {allowed}"
    if parameter.device.type == "meta":
        return "its weight is on the meta device and has no values; load the model first"
    sharing = owners[_storage(parameter)]
    if len(sharing) > 1:
        own = f"{name}.weight" if name else "weight"
        return "its weight is shared with " + ", ".join(f'"{other}"' for other in sharing if other != own)
    saved = {**module._parameters, **module._buffers}.keys() - module._non_persistent_buffers_set
    if clash := sorted(saved & _OF_THE_FILE):
        kind = "buffer" if clash[0] in module._buffers else "Parameter"
        return f'it has a {kind} "{clash[0]}" of its own, a name that the file uses'
    if id(module) in elsewhere:
        where = elsewhere[id(module)]
        return f"the model also reaches it past its modules, through {where}; a packed layer would not be called there"
    return None


def why_other(module: nn.Module) -> str | None:
    """Why a module of no kind, which multiplies by a weight all the same, stays dense; None for any other."""
    kind = type(module).__name__
    if getattr(type(module), "_sparsecomp_packed", False):
        return "already sparse"
    if isinstance(module, _OTHER_MATMULS):
        return f"{kind} layers stay dense"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return f"{type(module).__module__}.{kind} is not an nn.Linear (quantised or custom)"
    return None


def _storage(parameter: nn.Parameter) -> object:
    """Equal for two Parameters that start at the same memory, tied as one object or as two views."""
    if type(parameter) is not nn.Parameter or parameter.device.type == "meta" or parameter.numel() == 0:
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def weight_owners(modules: Iterable[nn.Module], names: Mapping[int, list[str]]) -> dict[object, list[str]]:
    """The names of all Parameters that start at the same memory."""
    owners: dict[object, list[str]] = {}
    for module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                prefix = names[id(module)][0]
                owners.setdefault(_storage(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    return owners
