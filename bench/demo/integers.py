"""The encoder in int8 with int8 activations, at several patterns: pruned, packed, saved and exported.

Takes the dense model and its calibration, gives files. Measures nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import sparsecomp as sc
from bench import minilm
from sparsecomp.backends import registry
from sparsecomp.machine.request import Request
from sparsecomp.models.layers import find_linears
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import row_nm
from sparsecomp.patterns.numbers import parse_weights

NUMBERS = "int8@a8"
# dense int8 in the same kernel; about the quality of ONNX Runtime's int8; half of the weights
PATTERNS = ("16:16", "12:16", "8:16")


@dataclass(frozen=True)
class IntegerFile:
    """A saved model in the weights of that name, such as "8:16+int8@a8", and the same as an ONNX file.

    ``weight_bytes`` are those of the encoder's layers, ``in_others`` how many of ``layers`` did not bear these
    integers and are stored otherwise.
    """

    name: str
    path: Path
    onnx: Path
    weight_bytes: int
    layers: int
    in_others: int


def weights_names() -> tuple[str, ...]:
    """What is made, by name."""
    return tuple(f"{pattern}+{NUMBERS}" for pattern in PATTERNS)


def why_not_here(name: str) -> str | None:
    """Why this machine has no kernel for weights of that name, or None."""
    pattern, numbers = parse_weights(name)
    request = Request(pattern, (384, 384), torch.float32, "cpu", 1, numbers)
    return None if registry.sparse_backends(request) else registry.why_no_kernel(request)


def make(
    dense: nn.Module,
    name: str,
    method: str,
    calibration: sc.Calibration,
    folder: Path,
    export: Callable[[nn.Module, Path], None],
) -> IntegerFile:
    """The encoder of a copy of ``dense`` in these weights, pruned unless nothing goes, as two files in ``folder``."""
    model = copy.deepcopy(dense)
    nm = row_nm(parse_weights(name)[0])
    prune_by = None if nm is None or nm.n == nm.m else method
    with warnings.catch_warnings():
        # layers that step back are counted below
        warnings.simplefilter("ignore", UserWarning)
        sc.compile(model, name, only=minilm.ENCODER, where="everywhere", method=prune_by, calibration=calibration)
    path = folder / f"minilm-{name.partition('+')[0].replace(':', 'of')}-int8.safetensors"
    sc.save(model, path)
    export(model, path.with_suffix(".onnx"))
    made = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    others = find_linears(model, minilm.ENCODER)
    stored = sum(layer.packed().nbytes for layer in made)
    dense_bytes = sum(others[each].get_weight().nbytes for each in others)
    rounded = sum(str(layer.numbers) == NUMBERS for layer in made)
    layers = len(find_linears(dense, minilm.ENCODER))
    return IntegerFile(name, path, path.with_suffix(".onnx"), stored + dense_bytes, layers, layers - rounded)
