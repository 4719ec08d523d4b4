"""What every linear layer of the encoder is given, batch by batch. Takes a model and texts, calls a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench import minilm
from bench.int8.ranges import Calibrated
from sparsecomp.models.layers import find_linears
from sparsecomp.reporting.terminal import progress

# name of the layer, its input [texts, tokens, in], and which tokens are words, bool [texts, tokens]
Visit = Callable[[str, Tensor, Tensor], None]


@torch.inference_mode()
def visit_inputs(model: nn.Module, texts: Sequence[str], visit: Visit, size: int = 32) -> None:
    """Call ``visit`` with the input of each layer, for texts in batches of ``size``."""
    real = [torch.empty(0)]

    def seen(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        visit(name, args[0], real[0])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(seen, name))
        for name in find_linears(model, minilm.ENCODER)
    ]
    try:
        batches = minilm.batches(texts, size)
        for batch in progress(batches, "batches", len(batches)):
            real[0] = batch["attention_mask"].bool()
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def calibrate_ranges(model: nn.Module, texts: Sequence[str]) -> dict[str, Calibrated]:
    """The range of every layer's input over these texts, and what parts of it would move."""
    found: dict[str, Calibrated] = {}
    visit_inputs(model, texts, lambda name, x, real: found.setdefault(name, Calibrated()).see(x[real]))
    visit_inputs(model, texts, lambda name, x, real: found[name].try_parts(x[real]))
    return found
