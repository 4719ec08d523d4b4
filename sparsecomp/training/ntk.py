"""The empirical neural tangent kernel of a model on a batch: how alike its outputs change when its weights learn.

Takes a model and a batch, gives a frozen value. Trains nothing and leaves the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsecomp.errors import ModelError
from sparsecomp.models.batches import Forward, eager, entering, evaluating, fresh, run_batch
from sparsecomp.models.layers import find_layers
from sparsecomp.modules.snapshot import ModuleState

Output = Callable[[Any, Any], Tensor]
# entries of the Jacobian that are in memory at once, by default: 256 MiB in float32
_CHUNK = 2**26
# how far the outputs of an example alone may lie from those in the batch: of the largest one, times sqrt(epsilon)
_TOLERANCE = 4.0


@dataclass(frozen=True, eq=False)
class NTK:
    """The kernel of a batch of B examples, float64.

    ``kernel`` is [B, B], the trace over the model's C outputs, or [B, B, C, C] in full: entry [i, j, c, d] is the dot
    product of the gradients of output c of example i and output d of example j by the weights that learn.
    """

    kernel: Tensor

    @property
    def matrix(self) -> Tensor:
        """The kernel as a symmetric matrix: [B, B], or [B * C, B * C] in full."""
        if self.kernel.ndim == 2:
            return self.kernel
        examples, _, outputs, _ = self.kernel.shape
        return self.kernel.permute(0, 2, 1, 3).reshape(examples * outputs, examples * outputs)

    @property
    def effective_rank(self) -> float:
        """exp(-sum p ln p), p the eigenvalues of ``matrix`` over their sum (Roy and Vetterli, EUSIPCO 2007).

        It lies between 1, where one direction learns alone, and the number of rows, where all learn alike. Raises
        ModelError for a kernel that is zero.
        """
        values = torch.linalg.eigvalsh(self.matrix).clamp_min(0.0)
        total = float(values.sum())
        if total == 0.0:
            raise ModelError("the kernel is zero, so that it has no rank; no weight that learns moves an output")
        shares = values / total
        return math.exp(-float(torch.special.xlogy(shares, shares).sum()))

    def alignment(self, other: NTK, *, centred: bool = False) -> float:
        """<K1, K2> / (|K1| |K2|), Frobenius, with the kernel of another model on the same batch: 1 where they agree.

        ``centred`` takes the mean over examples off rows and columns first (Cortes et al. 2012, JMLR 13:795), which
        leaves out what all examples have in common. Raises ModelError for a kernel of another shape, and where one is
        zero.
        """
        if self.kernel.shape != other.kernel.shape:
            raise ModelError(
                f"a kernel of shape {tuple(self.kernel.shape)} is compared with one of {tuple(other.kernel.shape)}; "
                "take both of the same batch, and both in full or neither"
            )
        mine, its = (_centred(each.kernel) if centred else each.kernel for each in (self, other))
        its = its.to(mine.device)
        lengths = float(mine.norm()) * float(its.norm())
        if lengths == 0.0:
            raise ModelError("a kernel is zero, so that it is aligned with none; no weight that learns moves an output")
        return float((mine * its).sum()) / lengths


def ntk(
    model: nn.Module,
    batch: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    output: Output | None = None,
    forward: Forward | None = None,
    full: bool = False,
    chunk_size: int = _CHUNK,
) -> NTK:
    """The empirical neural tangent kernel of ``model`` on ``batch`` (Jacot et al. 2018, arXiv:1806.07572).

    K[i, j] = sum over outputs c of <d y[i, c] / d w, d y[j, c] / d w>, w being all parameters that require a gradient;
    ``full`` keeps the outputs apart. ``masks`` (bool [out, in], True = kept) by layer name make it the kernel of the
    pruned model: dropped weights count as zero and do not learn. ``output(result, batch)`` gives the tensor [B, ...] of
    what the model returns, where that is no tensor; what follows B is the C outputs. ``forward`` is as in
    ``calibrate``. Examples are the slices of the tensors in the batch whose first dimension is B.

    The model runs in eval mode, once for each example and each part of the weights. At most ``chunk_size`` entries of
    the Jacobian are in memory at once, B times C times the weights of a part. Nothing of the model is changed.

    Raises ModelError where the output is no tensor of real numbers, where an example's output depends on the others,
    where no parameter requires a gradient, and for masks that do not fit; CalibrationError for a batch that the model
    does not take.
    """
    model = eager(model)
    learning = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    if not learning:
        raise ModelError("no parameter of the model requires a gradient, so that nothing learns; call requires_grad_()")
    kept = _kept(model, masks)
    weights = {name: _masked(each, kept.get(name)) for name, each in model.named_parameters()}
    state = ModuleState(model)
    try:
        # the other kernels of attention have no backward pass for many outputs at once
        with entering(model), evaluating(model), sdpa_kernel(SDPBackend.MATH):
            runner = _Runner(model, weights, batch, forward, output)
            rows, outputs = runner.shape
            kernel = torch.zeros(
                (rows, outputs, rows, outputs) if full else (rows, rows), dtype=torch.float64, device=runner.device
            )
            if rows and outputs:
                for part in _parts(learning, kept, max(1, chunk_size // (rows * outputs))):
                    _add(kernel, torch.stack([runner.gradients(index, part) for index in range(rows)]))
    finally:
        state.restore()
    return NTK(kernel.permute(0, 2, 1, 3).contiguous() if full else kernel)


@dataclass(frozen=True)
class _Piece:
    """Entries ``start`` to ``end`` of a flat parameter; ``chosen``, of these, are the ones that learn (None: all)."""

    name: str
    start: int
    end: int
    chosen: Tensor | None


def _add(kernel: Tensor, jacobian: Tensor) -> None:
    """Add what a part of the weights gives, from its Jacobian [B, C, n]."""
    flat = jacobian.flatten(1) if kernel.ndim == 2 else jacobian.flatten(0, 1)
    kernel += (flat @ flat.t()).view(kernel.shape)


class _Runner:
    """The model as a function of parts of its weights, example by example."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        batch: Any,
        forward: Forward | None,
        output: Output | None,
    ) -> None:
        self._weights, self._forward, self._output = weights, forward, output
        self._entry = _Entry(model, forward)
        with torch.no_grad():
            whole = self._outputs(weights, batch)
        self.device = whole.device
        self._batch = batch
        self._whole = whole
        self._seen: set[int] = set()

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and outputs of each."""
        return self._whole.shape[0], math.prod(self._whole.shape[1:])

    def _outputs(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        own = fresh(batch)
        named = {f"model.{name}": each for name, each in weights.items()}
        result = functional_call(self._entry, named, (own,))
        made = result if self._output is None else self._output(result, batch)
        if not isinstance(made, Tensor) or not made.is_floating_point() or made.ndim == 0:
            got = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ModelError(
                f"the model's output is a {got}; the kernel takes real numbers as a tensor [examples, ...], so say "
                "with output=lambda result, batch: ... what is meant"
            )
        return made

    def gradients(self, index: int, part: list[_Piece]) -> Tensor:
        """d outputs / d weights of one example by a part of the weights: [C, n], float32 or wider."""
        example = _sliced(self._batch, index, self.shape[0])

        def outputs(pieces: list[Tensor]) -> Tensor:
            made = self._outputs({**self._weights, **self._joined(part, pieces)}, example)
            if made.shape != (1, *self._whole.shape[1:]):
                raise ModelError(
                    f"the model gives {tuple(made.shape)} for an example alone, and {tuple(self._whole.shape)} for the "
                    "batch; the kernel takes models whose outputs have the examples first"
                )
            return made.flatten()

        begin = [self._weights[each.name].flatten()[each.start : each.end] for each in part]
        made, pull, *_ = vjp(outputs, begin)
        if index not in self._seen:
            self._require_alone(index, made.detach())
        found = vmap(lambda each: pull(each)[0])(torch.eye(len(made), dtype=made.dtype, device=made.device))
        chosen = [
            each if piece.chosen is None else each.index_select(1, piece.chosen)
            for piece, each in zip(part, found, strict=True)
        ]
        rows = torch.cat([each.detach() for each in chosen], dim=1)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _joined(self, part: list[_Piece], pieces: list[Tensor]) -> dict[str, Tensor]:
        joined = {}
        for piece, values in zip(part, pieces, strict=True):
            whole = self._weights[piece.name]
            flat = whole.flatten()
            joined[piece.name] = torch.cat([flat[: piece.start], values, flat[piece.end :]]).view(whole.shape)
        return joined

    def _require_alone(self, index: int, made: Tensor) -> None:
        self._seen.add(index)
        apart = (made - self._whole[index].flatten()).abs()
        allowed = _TOLERANCE * math.sqrt(torch.finfo(made.dtype).eps) * float(self._whole.abs().max())
        if float(apart.max()) > allowed:
            raise ModelError(
                f"the output of example {index} alone is another than in the batch, so that no kernel of examples "
                "exists; give batches without padding, and models that do not mix examples"
            )


class _Entry(nn.Module):
    """A model called on a batch."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Any) -> object:
        return run_batch(self.model, batch, 0, self._forward)


def _parts(learning: Mapping[str, Tensor], kept: Mapping[str, Tensor], limit: int) -> Iterator[list[_Piece]]:
    """The weights that learn, cut and gathered into parts of at most ``limit`` entries."""
    part: list[_Piece] = []
    room = limit
    for name, weight in learning.items():
        mask = kept.get(name)
        start = 0
        while start < weight.numel():
            end = min(weight.numel(), start + room)
            chosen = None if mask is None else mask.flatten()[start:end].nonzero().flatten()
            part.append(_Piece(name, start, end, chosen))
            room -= end - start
            start = end
            if not room:
                yield part
                part, room = [], limit
    if part:
        yield part


def _sliced(batch: Any, index: int, rows: int) -> Any:
    """One example of a batch: of each tensor with ``rows`` slices one, all else as it is."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {key: _sliced(each, index, rows) for key, each in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_sliced(each, index, rows) for each in batch)
    return batch


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight.detach() if mask is None else weight.detach().masked_fill(~mask, 0.0)


def _kept(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The masks by the name of the parameter, in its shape."""
    if masks is None:
        return {}
    layers = find_layers(model)
    names = {id(each): name for name, each in model.named_parameters()}
    kept = {}
    for name, mask in masks.items():
        if name not in layers:
            raise ModelError(f'a mask is given for "{name}", which is no layer with a matrix; take it out of masks')
        ref = layers[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != ref.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(f'the mask of "{name}" is {got}; give torch.bool {ref.shape}, True where a weight is kept')
        kept[names[id(ref.parameter)]] = ref.from_matrix(mask.to(ref.device)).contiguous()
    return kept


def _centred(kernel: Tensor) -> Tensor:
    """Less the means over the examples of rows and of columns."""
    across, down = kernel.mean(dim=0, keepdim=True), kernel.mean(dim=1, keepdim=True)
    return kernel - across - down + across.mean(dim=1, keepdim=True)
