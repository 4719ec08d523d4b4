"""Which layers of a model can be sparse, and swapping one layer for another.

Takes any ``nn.Module`` and gives ``LinearRef`` values and reasons. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsecomp.errors import ModelError
from sparsecomp.models.convolutions import matrix_of, stored_of, why_runs_dense
from sparsecomp.models.matrices import bare_matrices
from sparsecomp.models.refusals import Kind, kind_of, weight_owners, why_not, why_other
from sparsecomp.modules.bypaths import bypaths


@dataclass(frozen=True, eq=False)
class LinearRef:
    """One layer of a model that multiplies by a matrix, whichever way it stores it.

    ``kind`` is "linear" for nn.Linear (weight [out, in]), "conv1d" for the Conv1D of Hugging Face (weight [in, out]),
    "conv2d" for nn.Conv2d of one group (weight [out, in, kh, kw]). ``aliases`` are further names under which the model
    reaches the same module.

    Masks, Grams and patterns speak of the matrix [out, in]. That of a convolution is [out, kh*kw*in]: for every kernel
    position, row by row, its input channels lie side by side, so that groups of a pattern run along input channels.
    """

    name: str
    module: nn.Module
    kind: Kind
    aliases: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight, in the orientation of the module."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [out], or None."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the matrix."""
        first, *rest = self.parameter.shape
        return (rest[0], first) if self.kind == "conv1d" else (first, math.prod(rest))

    @property
    def channels(self) -> int:
        """Columns that lie side by side at one kernel position, where no group of a pattern may cross; else all."""
        return int(self.parameter.shape[1]) if self.kind == "conv2d" else self.shape[1]

    @property
    def runs_dense(self) -> bool:
        """Whether it is a convolution that no sparse product runs, so that zeros make it no faster."""
        return isinstance(self.module, nn.Conv2d) and why_runs_dense(self.module) is not None

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weight."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.parameter.device

    def get_weight(self) -> Tensor:
        """The weight [out, in], detached; it may share memory with the layer and is for reading only."""
        return self.to_matrix(self.parameter.detach())

    def to_matrix(self, stored: Tensor) -> Tensor:
        """A tensor of the Parameter's shape (weight, mask, gradient) as a matrix [out, in], a view where it can be one.

        Raises ModelError for another shape.
        """
        if stored.shape != self.parameter.shape:
            raise ModelError(
                f"{self.name}: got a tensor of shape {tuple(stored.shape)}; the layer stores its weight as "
                f"{tuple(self.parameter.shape)}"
            )
        match self.kind:
            case "linear":
                return stored
            case "conv1d":
                return stored.t()
            case "conv2d":
                return matrix_of(stored)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the shape of the Parameter, a view where it can be one: the way back of ``to_matrix``.

        Raises ModelError for another shape.
        """
        if tuple(matrix.shape) != self.shape:
            raise ModelError(
                f"{self.name}: got a matrix of shape {tuple(matrix.shape)}; the layer takes [out, in] = {self.shape}"
            )
        match self.kind:
            case "linear":
                return matrix
            case "conv1d":
                return matrix.t()
            case "conv2d":
                return stored_of(matrix, tuple(self.parameter.shape))

    def set_weight(self, weight: Tensor) -> None:
        """Write ``weight`` [out, in] into the layer in place; the Parameter, its dtype and requires_grad stay.

        Raises ModelError for another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ModelError(
                f"{self.name}: got a weight of shape {tuple(weight.shape)}; the layer takes [out, in] = {self.shape}"
            )
        # a Parameter made under inference_mode can be written under it only
        with torch.inference_mode(self.parameter.is_inference()), torch.no_grad():
            self.parameter.copy_(self.from_matrix(weight))

    def as_linear(self, weight: Tensor | None = None) -> nn.Linear:
        """This layer as nn.Linear: the module itself, or for others a new module on the same memory where it can be.

        With ``weight`` [out, in], a new module that has it in the place of the layer's own, and the same bias. What
        nn.Conv2d does beside the product, such as its stride, is not in it.
        """
        if weight is None and isinstance(self.module, nn.Linear):
            return self.module
        out, columns = self.shape
        linear = nn.Linear(columns, out, bias=self.bias is not None, device="meta")
        values = self.get_weight() if weight is None else weight
        linear.weight = nn.Parameter(values, requires_grad=self.parameter.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.module.training)


@dataclass(frozen=True, eq=False)
class LayerTable(Mapping[str, LinearRef]):
    """Layers that can be sparse, by name in the order of the model, and the reason for each that cannot."""

    found: Mapping[str, LinearRef]
    skipped: Mapping[str, str]

    @property
    def convolutions(self) -> tuple[str, ...]:
        """The names of those that are convolutions."""
        return tuple(name for name, layer in self.found.items() if layer.kind == "conv2d")

    def __getitem__(self, name: str) -> LinearRef:
        """The layer of that name."""
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the model."""
        return iter(self.found)

    def __len__(self) -> int:
        """How many layers were found."""
        return len(self.found)


Globs = str | Sequence[str] | None


def require_module(model: object) -> None:
    """Raises ModelError for a model that is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; allowed is an nn.Module, so pass the model itself")


def find_linears(model: nn.Module, only: Globs = None, skip: Globs = None) -> LayerTable:
    """The layers of ``model`` that can run sparse: those of ``find_layers`` without the convolutions that cannot.

    A convolution of 1x1 without padding is a product of rows and is found; others are in ``skipped`` with the reason.
    Raises as ``find_layers``.
    """
    return _find(model, only, skip, runnable=True)


def find_layers(model: nn.Module, only: Globs = None, skip: Globs = None) -> LayerTable:
    """The linear layers and convolutions of ``model`` that can be pruned in place, whatever runs them afterwards.

    ``only`` and ``skip`` are globs (fnmatch) on dotted names such as "encoder.*.query"; ``skip`` wins. A module that is
    reachable under several names is found once, under the first. Everything that multiplies by a weight and is
    not found is in ``skipped`` with the reason, also what ``only`` and ``skip`` left out.

    Raises ModelError for a model that is no nn.Module and a glob that matches no layer, naming the nearest names.
    """
    return _find(model, only, skip, runnable=False)


def _find(model: nn.Module, only: Globs, skip: Globs, *, runnable: bool) -> LayerTable:
    require_module(model)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    owners = weight_owners(modules.values(), names)
    elsewhere = bypaths(modules.values(), names)
    inside_attention = {
        id(child): names[id(module)][0]
        for module in modules.values()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }

    total = sum(each.numel() for each in model.parameters() if not isinstance(each, nn.UninitializedParameter))
    candidates: dict[str, tuple[LinearRef | None, str]] = {}
    seen: set[int] = set()
    for key, module in modules.items():
        name, aliases = names[key][0], tuple(names[key][1:])
        if isinstance(module, nn.MultiheadAttention):
            reason = "its in_proj is used inside a fused kernel of nn.MultiheadAttention, not through a linear layer"
            candidates[f"{name}.in_proj_weight" if name else "in_proj_weight"] = (None, reason)
        elif key in inside_attention and isinstance(module, nn.Linear):
            where = inside_attention[key] or "the model"
            candidates[name] = (None, f"nn.MultiheadAttention ({where}) reads its weight and never calls it")
        elif (kind := kind_of(module)) is not None:
            refusal = why_not(name, module, owners, elsewhere)
            if refusal is None and runnable and isinstance(module, nn.Conv2d):
                refusal = why_runs_dense(module)
            candidates[name] = (LinearRef(name, module, kind, aliases), "") if refusal is None else (None, refusal)
            for alias in aliases:
                candidates[alias] = (None, f'the same layer as "{name}"')
        elif (refusal := why_other(module)) is not None:
            candidates[name] = (None, refusal)
        for bare, reason in bare_matrices(name, module, total, seen).items():
            candidates.setdefault(bare, (None, reason))
    return _filter(candidates, _globs(only), _globs(skip))


def require_layers(table: LayerTable) -> LayerTable:
    """The table itself; raises ModelError, with the reasons, when it holds no layer."""
    if table.found:
        return table
    reasons = [f"{name or 'the model'}: {reason}" for name, reason in list(table.skipped.items())[:3]]
    why = "; ".join(reasons) if reasons else "it has no nn.Linear, Conv1D or nn.Conv2d"
    raise ModelError(
        f"the model has no layer that can be sparse ({why}); allowed are nn.Linear, Hugging Face Conv1D and nn.Conv2d "
        "of one group"
    )


def check_globs(globs: Iterable[str], names: Collection[str], what: str) -> None:
    """Raises ModelError for the first glob that matches none of ``names``, naming the nearest."""
    for glob in globs:
        if any(fnmatchcase(name, glob) for name in names):
            continue
        if any(name.startswith(f"{glob}.") for name in names):
            hint = f'did you mean "{glob}.*"?'
        else:
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
            hint = "the nearest are " + ", ".join(f'"{name}"' for name in near) if near else _some(names)
        raise ModelError(f'{what} "{glob}" matches no layer; {hint}')


def replace_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the layer ``name``, under every name that reaches the old one.

    Inside an nn.TransformerEncoderLayer the fused path, which reads the weights of its children, is turned
    off for that layer, and nested tensors for the nn.TransformerEncoder around it: the layer then calls its children.

    Raises ModelError for a name that is not there, for the model itself, and inside nn.MultiheadAttention.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if name == "":
        raise ModelError(
            "the model itself is the layer and cannot be swapped in place; use SparseLinear.from_linear on it"
        )
    if name not in known:
        check_globs([name], [known_name for known_name in known if known_name], "layer")
        raise ModelError(f'layer "{name}" is a glob; give the exact name of one layer')
    old = known[name]
    places = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in places):
        raise ModelError(f"{name}: nn.MultiheadAttention reads its weight and never calls it; leave this layer dense")
    module.train(old.training)
    fused = []
    for parent, key in places:
        parent._modules[key] = module
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
            fused.append(parent)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(child in fused for child in encoder.modules()):
            encoder.use_nested_tensor = False


def _filter(
    candidates: Mapping[str, tuple[LinearRef | None, str]], only: list[str] | None, skip: list[str] | None
) -> LayerTable:
    check_globs(only or (), candidates.keys(), "only")
    check_globs(skip or (), candidates.keys(), "skip")
    found: dict[str, LinearRef] = {}
    skipped: dict[str, str] = {}
    for name, (layer, reason) in candidates.items():
        if layer is None:
            skipped[name] = reason
            continue
        reached = (name, *layer.aliases)
        excluding = next((glob for glob in skip or () if any(fnmatchcase(each, glob) for each in reached)), None)
        if excluding is not None:
            skipped[name] = f'excluded by skip "{excluding}"'
        elif only is not None and not any(fnmatchcase(each, glob) for glob in only for each in reached):
            skipped[name] = "not selected by only"
        else:
            found[name] = layer
    return LayerTable(found, skipped)


def _globs(globs: Globs) -> list[str] | None:
    if globs is None:
        return None
    return [globs] if isinstance(globs, str) else list(globs)


def _some(names: Collection[str]) -> str:
    if not names:
        return "the model has no linear layers"
    return "there are " + ", ".join(f'"{name}"' for name in list(names)[:3]) + (", ..." if len(names) > 3 else "")
