"""The engines that the demo compares: what each is, from which file, and what is not to be had on this machine.

Takes files, gives descriptions and factories of embeddings. Times nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.demo.embedding import (
    Embedding,
    dense_model,
    of_model,
    of_openvino,
    of_session,
    our_session,
    quantize_int8,
    sparse_model,
    stock_session,
)
from bench.demo.integers import IntegerFile
from bench.demo.result import DENSE, INT8, OUR_INT8, SPARSE
from sparsecomp.planning.planner import Plan

TORCH = "torch fp32"
_OPENVINO = "OpenVINO fp32"
_INT8 = {"ORT int8": False, "ORT int8 channel": True}


@dataclass(frozen=True)
class Files:
    """Where the demo's files lie."""

    packed: Path
    onnx_packed: Path
    onnx_dense: Path
    int8: Path
    int8_channel: Path

    @classmethod
    def inside(cls, folder: Path, pattern: str) -> Files:
        """Names in a folder for weights at a pattern."""
        stem = f"minilm-{pattern.replace(':', 'of')}"
        return cls(
            packed=folder / f"{stem}.safetensors",
            onnx_packed=folder / f"{stem}.onnx",
            onnx_dense=folder / "minilm-dense.onnx",
            int8=folder / "minilm-int8.onnx",
            int8_channel=folder / "minilm-int8-channel.onnx",
        )


@dataclass(frozen=True)
class Contender:
    """An engine to measure; ``openmp`` if its threads are libgomp's, ``file`` None for torch's own dense weights.

    ``what`` explains a name that does not speak for itself.
    """

    name: str
    kind: str
    what: str
    file: Path | None
    make: Callable[[], Embedding]
    openmp: bool = False

    @property
    def weights(self) -> str:
        """Engines with the same weights give the same embeddings but for rounding."""
        return self.name if self.kind in (INT8, OUR_INT8) else self.kind


def sparse_names(pattern: str) -> tuple[str, str, str, str]:
    """Names of SparseLinears in torch, all or as planned, and of ONNX Runtime with our operators and as it comes."""
    return f"{pattern} torch", f"{pattern} planned", f"{pattern} ORT ours", f"{pattern} ORT stock"


def contenders(
    files: Files, pattern: str, plan: Plan, integers: Sequence[IntegerFile] = ()
) -> tuple[list[Contender], dict[str, str]]:
    """Those that run here, and by name why the others do not. Writes ONNX Runtime's int8 files."""
    missing: dict[str, str] = {}
    found = [Contender(TORCH, DENSE, "", None, partial(Embedding, of_model, dense_model), True)]
    found.append(_session("ORT fp32", DENSE, "", files.onnx_dense))
    why = _fails(lambda: _try_openvino(files.onnx_dense))
    if why is None:
        openvino = partial(Embedding, of_openvino, partial(Path, files.onnx_dense))
        found.append(Contender(_OPENVINO, DENSE, "", files.onnx_dense, openvino))
    else:
        missing[_OPENVINO] = why
    for (name, per_channel), path in zip(_INT8.items(), (files.int8, files.int8_channel), strict=True):
        why = _fails(partial(_try_int8, files.onnx_dense, path, per_channel))
        if why is None:
            what = "with per_channel=True" if per_channel else "quantize_dynamic of the dense ONNX file"
            found.append(_session(name, INT8, what, path))
        else:
            missing[name] = why
    for each in integers:
        found += _integers(each, missing)
    return found + _sparse(files, pattern, plan, missing), missing


def _integers(made: IntegerFile, missing: dict[str, str]) -> list[Contender]:
    pattern = made.name.partition("+")[0]
    what = "dense int8 in our kernel, activations too" if pattern == "16:16" else "SparseLinear, int8 times int8"
    if made.in_others:
        what += f", but for {made.in_others} of {made.layers} layers, which do not bear it"
    make = partial(Embedding, of_model, partial(sparse_model, made.path))
    found = [Contender(made.name, OUR_INT8, what, made.path, make, True)]
    name, why = f"{pattern} int8 ORT", _without_ours(made.onnx)
    if why is None:
        make = partial(Embedding, of_session, partial(our_session, made.onnx))
        found.append(Contender(name, OUR_INT8, "", made.onnx, make))
    else:
        missing[name] = why
    return found


def _sparse(files: Files, pattern: str, plan: Plan, missing: dict[str, str]) -> list[Contender]:
    everywhere, planned, ours, stock = sparse_names(pattern)
    make = partial(Embedding, of_model, partial(sparse_model, files.packed))
    found = [Contender(everywhere, SPARSE, "SparseLinear", files.packed, make, True)]
    if plan.stayed_dense or any(decision.dense_above is not None for decision in plan.sparse.values()):
        choices = {name: decision.dense_above for name, decision in plan.sparse.items()}
        model = partial(sparse_model, files.packed, dense=tuple(plan.stayed_dense), dense_above=choices)
        what = "SparseLinear where the planner measured a gain, dense elsewhere"
        found.append(Contender(planned, SPARSE, what, files.packed, partial(Embedding, of_model, model), True))
    why = _without_ours(files.onnx_packed)
    if why is None:
        make = partial(Embedding, of_session, partial(our_session, files.onnx_packed))
        what = "the packed ONNX file in sc.onnx_session"
        found.append(Contender(ours, SPARSE, what, files.onnx_packed, make))
    else:
        missing[ours] = why
    what = "the same file without our operators, which multiplies the zeros"
    return [*found, _session(stock, SPARSE, what, files.onnx_packed)]


def _session(name: str, kind: str, what: str, path: Path) -> Contender:
    return Contender(name, kind, what, path, partial(Embedding, of_session, partial(stock_session, path)))


def _fails(attempt: Callable[[], object]) -> str | None:
    """None, or in one line why this engine cannot run here: the demo then goes on without it."""
    try:
        attempt()
    except Exception as error:  # whatever keeps another engine from running is its own affair, and worth a line
        first: Sequence[str] = str(error).splitlines()
        return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    return None


def _try_openvino(path: Path) -> None:
    ids = np.full((1, 4), 101, dtype=np.int64)
    of_openvino(path, {"input_ids": ids, "attention_mask": np.ones_like(ids)})()


def _try_int8(dense: Path, path: Path, per_channel: bool) -> None:
    quantize_int8(dense, path, per_channel)
    stock_session(path)


def _without_ours(path: Path) -> str | None:
    """Why our operators are not there, if so. That they fail would be our fault, and is raised."""
    with warnings.catch_warnings():
        # where the operator library is missing this is the stock session once more, and says nothing new
        warnings.simplefilter("error", RuntimeWarning)
        try:
            our_session(path)
        except RuntimeWarning as reason:
            return str(reason)
    return None
