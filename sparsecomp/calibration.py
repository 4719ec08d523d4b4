"""Calibration: batches through a model once -> the Gram matrix of each layer's input.

Takes a model and an iterable of batches, gives a ``Calibration``. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.display import progress
from sparsecomp.errors import CalibrationError
from sparsecomp.gram import GramSum
from sparsecomp.layers import Globs, LayerTable, find_linears, require_layers


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration knows of a layer: ``gram`` = X^T X [in, in], exactly symmetric, of its ``tokens`` input rows."""

    gram: Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Calibration(Mapping[str, LayerStatistics]):
    """Statistics by layer name. Layers that always saw the same input share one ``gram`` tensor.

    ``unreached`` names layers whose forward was never called, or that saw masked rows only.
    """

    layers: Mapping[str, LayerStatistics]
    unreached: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistics of that layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names in the order of the model."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers have statistics."""
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct Gram matrices."""
        return sum({id(layer.gram): layer.gram.nbytes for layer in self.layers.values()}.values())

    def __repr__(self) -> str:
        """One line: layers, tokens, Gram matrices and their memory."""
        grams = len({id(layer.gram) for layer in self.layers.values()})
        tokens = max((layer.tokens for layer in self.layers.values()), default=0)
        missing = f", {len(self.unreached)} unreached" if self.unreached else ""
        memory = f"{grams} Gram matrices, {self.nbytes / 1e6:.1f} MB"
        return f"Calibration({len(self)} layers, {tokens:,} tokens, {memory}{missing})"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    only: Globs = None,
    skip: Globs = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> Calibration:
    """Run ``batches`` through ``model`` once and sum X^T X over the input rows X [tokens, in] of every linear layer.

    A batch is a tensor (``model(batch)``), a tuple or list (``model(*batch)``) or a mapping (``model(**batch)``);
    ``forward(model, batch)`` replaces that call. The model runs in eval mode without gradients and gets its modes back.

    Padding stays out of the sums: ``mask(batch)`` gives a tensor that is nonzero on real tokens, or None to count
    every row; without it, a mapping's "attention_mask" [B, T] is used. It applies to inputs whose leading dimensions
    are the mask's, and to inputs [B*T, in] flattened from them; other inputs (a pooler's [B, in]) count whole.

    Precision: activations are widened to ``dtype`` (float32 or float64) first. In float32, products of at most 2048
    rows are added to a running sum kept as pairs of floats (about 48 bits), so the error does not grow with the
    number of batches. The second floats live in the half of the symmetric matrix that is not stored: memory is one
    float32 Gram, plus ``in`` x 256 floats, for every distinct input. Layers called with the same tensor share one
    Gram until a batch parts them.

    Raises CalibrationError for no batches, a batch that cannot be passed, activations that are not finite (naming
    layer and batch) and masks that fit nothing; ModelError if no layer can be sparse or a glob matches none.
    """
    if dtype not in (torch.float32, torch.float64):
        raise CalibrationError(f"calibration cannot accumulate in {dtype}; use torch.float32 or torch.float64")
    require_batches(batches)
    layers = require_layers(find_linears(model, only, skip))
    recorder = _Recorder(dtype)
    count = 0
    total = len(batches) if isinstance(batches, Sized) else None
    with _calibrating(model, layers, recorder):
        for batch in progress(batches, "calibrating", total) if show_progress else batches:
            recorder.start_batch(count, row_mask(batch, mask))
            run_batch(model, batch, count, forward)
            recorder.end_batch()
            count += 1
    if count == 0:
        raise CalibrationError("got no batches; pass at least one (an exhausted generator gives none: make a new one)")
    if mask is not None and recorder.masks_seen and not recorder.mask_fitted:
        raise CalibrationError(
            "the mask fits no layer input; mask(batch) must have the leading dimensions [B, T] of the inputs"
        )
    return recorder.result(layers)


def require_batches(batches: object, what: str = "batches") -> None:
    """Raises CalibrationError for one batch in the place of many."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f"{what} is one {type(batches).__name__}, not an iterable of batches; pass [batch]")


@contextmanager
def _calibrating(model: nn.Module, layers: LayerTable, recorder: _Recorder) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    precision = torch.get_float32_matmul_precision()
    handles = [
        layer.module.register_forward_pre_hook(recorder.hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        model.eval()
        # fused encoder layers read weights without calling the layers, and would turn padded inputs into nested tensors
        torch.backends.mha.set_fastpath_enabled(False)
        # a Gram of TF32 or bf16 products would lose what the sums keep
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_float32_matmul_precision(precision)


def run_batch(
    model: Callable[..., object], batch: Any, index: int, forward: Callable[[Any, Any], object] | None = None
) -> object:
    """What ``model`` returns for a batch, passed as ``calibrate`` says; CalibrationError if it cannot be passed."""
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise CalibrationError(
        f"batch {index} is a {type(batch).__name__}; allowed are a tensor, a tuple or list and a mapping; "
        f"pass forward=lambda model, batch: ... for anything else"
    )


def row_mask(batch: Any, mask: Callable[[Any], Tensor | None] | None) -> Tensor | None:
    """True on the real tokens of a batch: what ``mask`` gives, else its "attention_mask"; None counts every row."""
    if mask is not None:
        rows = mask(batch)
        return None if rows is None else rows.bool()
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is None:
        return None
    attention = batch["attention_mask"]
    if not isinstance(attention, Tensor) or attention.ndim != 2:
        got = f"shape {tuple(attention.shape)}" if isinstance(attention, Tensor) else type(attention).__name__
        raise CalibrationError(
            f"attention_mask is of {got}; allowed is [B, T]; pass mask=lambda batch: ... to say which tokens are real"
        )
    return attention.bool()


@dataclass(frozen=True, eq=False)
class _Input:
    """A tensor some layer was called with in the current batch, and its product."""

    tensor: weakref.ref[Tensor]
    version: int
    product: GramSum

    def is_(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == _version(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass(eq=False)
class _Shared:
    """Layers that were called with the same tensors so far, and the sum over them.

    ``queue`` holds the inputs of this batch that not all members have seen; ``seen`` counts, for each member, how many
    of them it has. A layer may join while the first input ever is in the queue.
    """

    seen: dict[str, int]
    total: GramSum | None = None
    queue: list[_Input] = field(default_factory=list)
    inputs: int = 0

    def settle(self, everything: bool = False) -> None:
        """Move inputs that all members have seen from the queue into the sum."""
        joinable = self.inputs == 1 and not everything
        while self.queue and not joinable and min(self.seen.values()) > 0:
            product = self.queue.pop(0).product
            if self.total is None:
                self.total = product
            else:
                self.total.add_sum(product)
            self.seen = {name: count - 1 for name, count in self.seen.items()}

    def split(self, name: str) -> _Shared:
        """Take the layer out, with a copy of all that it has seen."""
        count = self.seen.pop(name)
        queue = [replace(entry, product=entry.product.clone()) for entry in self.queue[:count]]
        total = None if self.total is None else self.total.clone()
        leaving = _Shared({name: count}, total, queue, self.inputs)
        for shared in (self, leaving):
            shared.settle()
        return leaving


class _Recorder:
    """Sums layer inputs as hooks report them, one sum for all layers that see the same tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shared: dict[str, _Shared] = {}
        self.joinable: dict[int, _Shared] = {}
        self.batch = 0
        self.mask: Tensor | None = None
        self.masks_seen = False
        self.mask_fitted = False

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see(name, args[0] if args else next(iter(kwargs.values())))

        return record

    def start_batch(self, index: int, mask: Tensor | None) -> None:
        self.batch = index
        self.mask = mask
        self.masks_seen |= mask is not None

    def see(self, name: str, x: Tensor) -> None:
        shared = self.shared.get(name)
        if shared is None:
            shared = self.joinable.get(id(x))
            if shared is None or shared.inputs != 1 or not shared.queue or not shared.queue[0].is_(x):
                shared = _Shared({})
            shared.seen[name] = 0
            self.shared[name] = shared
        position = shared.seen[name]
        if position < len(shared.queue):
            if shared.queue[position].is_(x):
                shared.seen[name] += 1
                shared.settle()
                return
            shared = self.shared[name] = shared.split(name)
        rows = self._rows(name, x)
        shared.inputs += 1
        if shared.total is not None and not shared.queue and len(shared.seen) == 1:
            shared.total.add_rows(rows)
            return
        product = GramSum(x.shape[-1], self.dtype, x.device).add_rows(rows)
        shared.queue.append(_Input(weakref.ref(x), _version(x), product))
        shared.seen[name] += 1
        if shared.inputs == 1:
            self.joinable[id(x)] = shared
        shared.settle()

    def _rows(self, name: str, x: Tensor) -> Tensor:
        rows = x.detach()
        mask = self.mask
        if mask is not None and x.shape[:-1][: mask.ndim] == mask.shape:
            rows = rows[mask.to(x.device)]
            self.mask_fitted = True
        elif mask is not None and x.ndim == 2 and x.shape[0] == mask.numel():
            rows = rows[mask.flatten().to(x.device)]
            self.mask_fitted = True
        rows = rows.reshape(-1, x.shape[-1])
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                f"{name or 'the model'}: its input holds NaN or Inf in calibration batch {self.batch} "
                f"(counted from 0); repair that batch, or mask its padding with mask=..."
            )
        return rows

    def end_batch(self) -> None:
        for name, shared in list(self.shared.items()):
            if shared.seen[name] < len(shared.queue):
                self.shared[name] = shared.split(name)
        for shared in self.shared.values():
            shared.settle(everything=True)
        self.joinable.clear()

    def result(self, layers: LayerTable) -> Calibration:
        finished: dict[int, LayerStatistics] = {}
        statistics: dict[str, LayerStatistics] = {}
        for name in layers:
            shared = self.shared.get(name)
            if shared is None or shared.total is None or shared.total.tokens == 0:
                continue
            if id(shared) not in finished:
                finished[id(shared)] = LayerStatistics(shared.total.finish(), shared.total.tokens)
                if not bool(torch.isfinite(finished[id(shared)].gram).all()):
                    raise CalibrationError(
                        f"{name or 'the model'}: its Gram matrix overflows float32; use dtype=torch.float64"
                    )
            statistics[name] = finished[id(shared)]
        unreached = tuple(name for name in layers if name not in statistics)
        if not statistics:
            names = ", ".join(name or "the model" for name in unreached[:3]) + (", ..." if len(unreached) > 3 else "")
            raise CalibrationError(
                f"no layer was reached by any batch ({names}); the forward must call them as modules, "
                "on rows that no mask hides; pass forward=... if the model is entered another way"
            )
        return Calibration(statistics, unreached)
