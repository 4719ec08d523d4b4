"""Calibration: batches through a model once -> the Gram matrix of each layer's input.

Takes a model and an iterable of batches, gives a ``Calibration``. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import CalibrationError
from sparsecomp.models.batches import Forward, eager, entering, evaluating, fresh, require_batches, run_batch
from sparsecomp.models.convolutions import Windows
from sparsecomp.models.layers import Globs, LayerTable, find_layers, require_layers
from sparsecomp.models.reads import noting_reads
from sparsecomp.models.recorder import Recorder
from sparsecomp.models.rows import RowMask, RowMasks, RowSource
from sparsecomp.modules.snapshot import ModuleState
from sparsecomp.reporting.terminal import progress

# below that many rows for each input feature a layer is fitted to its calibration data rather than to its task
ENOUGH_ROWS = 4


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration knows of a layer: ``gram`` = X^T X [in, in], exactly symmetric, of its ``tokens`` input rows.

    ``rounding`` float64 [in] sums, for each input, the squares of what rounding these rows to int8 moves; None in
    statistics that were made without.
    """

    gram: Tensor
    tokens: int
    rounding: Tensor | None = None

    @property
    def rows_per_input(self) -> float:
        """Rows for each input feature: below 4 the error on these very rows looks better than it is."""
        return self.tokens / max(self.gram.shape[0], 1)


@dataclass(frozen=True, eq=False)
class Calibration(Mapping[str, LayerStatistics]):
    """Statistics by layer name. Layers that always saw the same input share one ``gram`` tensor.

    ``unreached`` names layers whose forward was never called, or that saw masked rows only; ``read`` those whose
    weight's values the model reads beside calling the layer.
    """

    layers: Mapping[str, LayerStatistics]
    unreached: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

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
    def thin(self) -> tuple[str, ...]:
        """The layers with fewer than 4 rows for each input feature, for which errors look better than they are."""
        return tuple(name for name, layer in self.layers.items() if layer.rows_per_input < ENOUGH_ROWS)

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


def require_statistics(what: str, statistics: object) -> None:
    """CalibrationError for what is neither None nor statistics by layer; ``what`` is its name."""
    if statistics is not None and not isinstance(statistics, Mapping):
        raise CalibrationError(
            f"{what} is a {type(statistics).__name__}, not statistics by layer; pass sc.calibrate(model, batches)"
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    only: Globs = None,
    skip: Globs = None,
    forward: Forward | None = None,
    mask: RowMask | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> Calibration:
    """Run ``batches`` through ``model`` once and sum X^T X over the input rows X [tokens, in] of every layer.

    Layers are the linear ones and convolutions of one group. The rows of a convolution are its windows, B*Hout*Wout of
    kh*kw*in numbers, for every kernel position the input channels; they are made a few at a time.

    A batch is a tensor (``model(batch)``), a tuple or list (``model(*batch)``) or a mapping (``model(**batch)``);
    ``forward(model, batch)`` replaces that call. The model runs in eval mode without gradients, without what
    torch.compile made of it and without a cache of keys and values. It gets its modes, buffers and attributes back;
    batches are not changed. Names are those of the eager module.

    Padding stays out of the sums: ``mask(batch)`` gives a tensor that is nonzero on real tokens, None to count
    every row, or a mapping from globs on layer names to these, of which the first that matches counts. It applies to
    inputs whose leading dimensions are the mask's, and to inputs [B*T, in] flattened from them; other inputs (a
    pooler's [B, in]) count whole. Of the input of a convolution, a mask [B] says which images count. Without it, a
    mapping's "attention_mask" [B, T] is used for inputs [B, T, in] and [T, B, in] made of its "input_ids" and its
    "decoder_attention_mask" for those of the decoder, so that an encoder's mask never lies over a decoder's rows. A
    decoder without a mask, and what is made of images and the like, count whole.

    Precision: activations are widened to ``dtype`` (float32 or float64) first. In float32, products of at most 2048
    rows are added to a running sum kept as pairs of floats (about 48 bits), so the error does not grow with the
    number of batches. The second floats live in the half of the symmetric matrix that is not stored: memory is one
    float32 Gram, plus ``in`` x 256 floats, for every distinct input. Layers called with the same tensor share one
    Gram until a batch parts them.

    Raises CalibrationError for no batches, a batch that cannot be passed or run, activations that are not finite
    (naming layer and batch), masks that fit nothing and attention masks that fit in more than one way; ModelError if
    no layer can be sparse or a glob matches none.
    """
    if dtype not in (torch.float32, torch.float64):
        raise CalibrationError(f"calibration cannot accumulate in {dtype}; use torch.float32 or torch.float64")
    require_batches(batches)
    model = eager(model)
    layers = require_layers(find_layers(model, only, skip))
    rows = RowMasks(model, mask, layers, layers.convolutions)
    total = len(batches) if isinstance(batches, Sized) else None
    shown = progress(batches, "calibrating", total) if show_progress else batches
    with entering(model), noting_reads({name: layer.module for name, layer in layers.items()}) as read:
        found = collect(model, layers, shown, rows, lambda batch, index: run_batch(model, batch, index, forward), dtype)
    if rows.useless:
        raise CalibrationError(
            "the mask fits no layer input; mask(batch) must have the leading dimensions [B, T] of the inputs"
        )
    return replace(found, read=tuple(name for name in layers if name in read))


def collect(
    model: nn.Module,
    layers: LayerTable,
    batches: Iterable[Any],
    rows: RowSource,
    run: Callable[[Any, int], object],
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """The statistics of ``layers`` of ``model`` while ``run(batch, index)`` runs it; ``entering`` it is the caller's.

    Raises what ``calibrate`` says of batches and activations.
    """
    recorder = Recorder(dtype, rows.of)
    count = 0
    with _recording(model, layers, recorder):
        state = ModuleState(model)
        for batch in batches:
            recorder.batch = count
            recorder.paused = True
            rows.learn(batch, lambda part, index=count: run(part, index))  # type: ignore[misc]
            recorder.paused = False
            own = fresh(batch)
            try:
                with rows.reading(count, own):
                    run(own, count)
            finally:
                state.restore()
            recorder.end_batch()
            count += 1
    if count == 0:
        raise CalibrationError("got no batches; pass at least one (an exhausted generator gives none: make a new one)")
    return _result(recorder, layers)


@contextmanager
def _recording(model: nn.Module, layers: LayerTable, recorder: Recorder) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    handles = [
        layer.module.register_forward_pre_hook(
            recorder.hook(
                name,
                layer.shape[1],
                Windows.of(layer.module) if isinstance(layer.module, nn.Conv2d) else None,
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        # a Gram of TF32 or bf16 products would lose what the sums keep
        torch.set_float32_matmul_precision("highest")
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        torch.set_float32_matmul_precision(precision)


def _result(recorder: Recorder, layers: LayerTable) -> Calibration:
    finished: dict[int, LayerStatistics] = {}
    statistics: dict[str, LayerStatistics] = {}
    for name in layers:
        total = recorder.sums(name)
        if total is None:
            continue
        if id(total) not in finished:
            finished[id(total)] = LayerStatistics(total.finish(), total.tokens, total.rounding)
            if not bool(torch.isfinite(finished[id(total)].gram).all()):
                raise CalibrationError(
                    f"{name or 'the model'}: its Gram matrix overflows float32; use dtype=torch.float64"
                )
        statistics[name] = finished[id(total)]
    unreached = tuple(name for name in layers if name not in statistics)
    if not statistics:
        names = ", ".join(name or "the model" for name in unreached[:3]) + (", ..." if len(unreached) > 3 else "")
        raise CalibrationError(
            f"no layer was reached by any batch ({names}); the forward must call them as modules, "
            "on rows that no mask hides; pass forward=... if the model is entered another way"
        )
    return Calibration(statistics, unreached)
