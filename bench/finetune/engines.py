"""The engines of the end-to-end table: each a classifier from a file, in a process of its own, and what it stands for.

Takes files, gives descriptions and factories. Times nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench import minilm
from bench.demo.embedding import (
    Arrays,
    Embedding,
    of_openvino,
    of_session,
    our_session,
    quantize_int8,
    stock_session,
)
from bench.finetune.task import Classifier

WIDTH = 384


@dataclass(frozen=True)
class Engine:
    """One way to run a classifier: whose ``weights`` it has, the file, and what builds it in its own process.

    ``openmp`` if its threads are libgomp's.
    """

    name: str
    weights: str
    file: Path
    make: Callable[[], Embedding]
    openmp: bool = False


def classifier(labels: int) -> Classifier:
    """A fresh one over all-MiniLM-L6-v2, in eval mode."""
    made = Classifier(minilm.load_model(), WIDTH, labels).eval()
    made.requires_grad_(False)
    return made


def dense_classifier(path: Path, labels: int) -> nn.Module:
    """A saved state dict in a fresh classifier."""
    model = classifier(labels)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def packed_classifier(path: Path, labels: int) -> nn.Module:
    """A file of ``sc.save`` in a fresh classifier."""
    return sc.load(path, into=classifier(labels))


def of_classifier(model: nn.Module, batch: Arrays) -> Callable[[], object]:
    """One forward pass."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    return lambda: model(**tensors)


def export(model: nn.Module, example: dict[str, Tensor], path: Path, form: Any) -> None:
    """Write the ONNX file of a classifier, for any number of texts and up to 512 tokens."""
    texts, tokens = torch.export.Dim("texts"), torch.export.Dim("tokens", max=512)
    sc.export_onnx(
        model.eval(),
        tuple(example.values()),
        path,
        form=form,
        input_names=list(example),
        output_names=["logits"],
        dynamic_shapes=({0: texts, 1: tokens}, {0: texts, 1: tokens}),
    )


def _without_shapes(source: Path, path: Path) -> None:
    """The same file without the shapes of values inside, which quantize_dynamic infers anew.

    It turns the head's Gemm round into a MatMul, and then takes the shape noted for its weight for a contradiction.
    """
    import onnx

    model = onnx.load(source)
    del model.graph.value_info[:]
    onnx.save(model, path)


def dense_engines(model: nn.Module, labels: int, example: dict[str, Tensor], folder: Path) -> list[Engine]:
    """A dense classifier in float32, and in ONNX Runtime's int8 by its defaults and with a scale for each output."""
    state, onnx = folder / "dense.pt", folder / "dense.onnx"
    torch.save(model.state_dict(), state)
    export(model, example, onnx, "dense")
    found = [
        Engine(
            "torch fp32",
            "dense",
            state,
            partial(Embedding, of_classifier, partial(dense_classifier, state, labels)),
            True,
        ),
        Engine("ORT fp32", "dense", onnx, partial(Embedding, of_session, partial(stock_session, onnx))),
        Engine("OpenVINO fp32", "dense", onnx, partial(Embedding, of_openvino, partial(Path, onnx))),
    ]
    plain = folder / "plain.onnx"
    _without_shapes(onnx, plain)
    for name, per_channel in (("ORT int8", False), ("ORT int8 channel", True)):
        path = folder / f"{name.replace(' ', '-')}.onnx"
        quantize_int8(plain, path, per_channel)
        found.append(Engine(name, name, path, partial(Embedding, of_session, partial(stock_session, path))))
    return found


def packed_engines(
    model: nn.Module, pattern: str, labels: int, example: dict[str, Tensor], folder: Path
) -> list[Engine]:
    """A compiled classifier in torch, and in ONNX Runtime with our operators.

    Each is judged by itself: what differs by rounding between them may fall into another integer.
    """
    stem = pattern.replace(":", "of")
    path, onnx = folder / f"{stem}.safetensors", folder / f"{stem}.onnx"
    sc.save(model, path)
    export(model, example, onnx, "packed")
    return [
        Engine(
            f"{pattern} torch",
            pattern,
            path,
            partial(Embedding, of_classifier, partial(packed_classifier, path, labels)),
            True,
        ),
        Engine(f"{pattern} ORT", f"{pattern} ORT", onnx, partial(Embedding, of_session, partial(our_session, onnx))),
    ]
