"""The whole job on a real model: calibrate, prune, pack, swap, save, reload, export, run, measure. ``make demo``.

Takes nothing but installed packages, prints a report and leaves it with the files in demo-out/.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.compiler import summary
from sparsecomp.display import progress
from sparsecomp.errors import SparsecompError
from sparsecomp.plan import Plan

from . import minilm
from .demo_report import DemoResult, Latency, render
from .embedding import Embedding, dense_model, of_model, of_session, our_session, sparse_model, stock_session
from .harness import measure
from .worker import ask_all, workers

PATTERN, METHOD = "2:4", "fast"
# rows (tokens) of one text and of 32 texts of a typical paragraph's length
TOKENS = 64
BATCHES = (1, 32)
_ORT_DENSE, _ORT_STOCK = "onnxruntime dense", "onnxruntime packed, stock"
_ORT_OURS = "onnxruntime packed, our operators"


class Embedder(nn.Module):
    """Token ids and mask, int64 [texts, tokens] -> sentence embeddings [texts, 384]; what is exported."""

    def __init__(self, model: nn.Module) -> None:
        """An embedder over a transformer that gives ``last_hidden_state``."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean-pooled embeddings of length 1."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return minilm.pool(hidden, attention_mask)


def run(folder: Path) -> DemoResult:
    """Every step in turn. Raises SparsecompError if a file does not give back what was saved in it."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    _say("loading all-MiniLM-L6-v2 and the texts")
    dense, texts = minilm.load_model(), minilm.load_texts()
    model = copy.deepcopy(dense)

    _say(f"calibrating on {len(texts.calibration)} paragraphs of Python's documentation")
    batches = minilm.batches(texts.calibration)
    calibration = sc.calibrate(model, batches, only=minilm.ENCODER)

    _say("asking the planner which layers this machine makes faster, before any weight is touched")
    rows = tuple(batch * TOKENS for batch in BATCHES)
    plan = sc.plan(model, PATTERN, batch=rows, only=minilm.ENCODER)

    _say(f"pruning the encoder's linear layers to {PATTERN} with {METHOD}")
    pruned = sc.prune(model, PATTERN, method=METHOD, calibration=calibration, only=minilm.ENCODER)

    _say("packing and swapping them, all of them, whatever the planner would leave dense")
    sc.compile(model, PATTERN, only=minilm.ENCODER, where="everywhere")
    layers = summary(model, batch=rows)

    _say("saving, and reloading into a fresh dense model")
    files = {name: folder / name for name in ("minilm-2of4.safetensors", "minilm-2of4.onnx", "minilm-dense.onnx")}
    packed_file, onnx_packed, onnx_dense = files.values()
    sc.save(model, packed_file)
    reloaded = sc.load(packed_file, into=minilm.load_model())
    _require_equal(reloaded, model, texts.held_out[:8])

    _say("exporting ONNX, packed and, as the baseline, the dense original")
    example = minilm.tokens(texts.held_out[:2])
    _export(model, example, onnx_packed, "packed")
    _export(dense, example, onnx_dense, "dense")

    _say(f"embedding {len(texts.held_out)} held-out paragraphs with each of them")
    sessions = _sessions(onnx_packed, onnx_dense)
    reference = minilm.embed(dense, texts.held_out)
    sparse = minilm.embed(model, texts.held_out)
    from_onnx = {name: _embed_onnx(session, texts.held_out) for name, session in sessions.items() if name != _ORT_DENSE}

    _say("measuring latency, all engines in turn, each in its own process (some 30 s)")
    latencies = _latencies(_engines(packed_file, onnx_packed, onnx_dense, plan, tuple(sessions)), texts.held_out)

    return DemoResult(
        method=METHOD,
        device=plan.device,
        calibration=str(calibration),
        held_out=len(texts.held_out),
        plan=plan,
        pruned=pruned,
        layers=layers,
        rows=rows,
        dense_bytes=sum(tensor.nbytes for tensor in dense.state_dict().values()),
        file_bytes=packed_file.stat().st_size,
        quality=minilm.compare(reference, sparse),
        onnx_error={name: float((each - sparse).abs().max()) for name, each in from_onnx.items()},
        onnx_bytes={path.name: path.stat().st_size for path in (onnx_packed, onnx_dense)},
        latencies=latencies,
        seconds=time.perf_counter() - start,
    )


def _say(text: str) -> None:
    print(f"- {text}", file=sys.stderr, flush=True)


def _require_equal(reloaded: nn.Module, model: nn.Module, texts: Sequence[str]) -> None:
    if not torch.equal(minilm.embed(reloaded, texts), minilm.embed(model, texts)):
        raise SparsecompError("the reloaded model embeds differently from the one that was saved; the file is wrong")


def _export(model: nn.Module, example: dict[str, Tensor], path: Path, form: Any) -> None:
    texts, tokens = torch.export.Dim("texts"), torch.export.Dim("tokens", max=512)
    sc.export_onnx(
        Embedder(model).eval(),
        tuple(example.values()),
        path,
        form=form,
        input_names=list(example),
        output_names=["sentence_embedding"],
        dynamic_shapes=({0: texts, 1: tokens}, {0: texts, 1: tokens}),
    )


def _sessions(packed: Path, dense: Path) -> dict[str, Any]:
    """The packed file in stock ONNX Runtime and with our operators, and the dense baseline."""
    sessions = {_ORT_DENSE: stock_session(dense), _ORT_STOCK: stock_session(packed)}
    with warnings.catch_warnings():
        # where the operator library is missing this is the stock session once more, and says nothing new
        warnings.simplefilter("error", RuntimeWarning)
        try:
            sessions[_ORT_OURS] = our_session(packed)
        except RuntimeWarning as reason:
            _say(f"without our ONNX Runtime operators: {reason}")
    return sessions


def _embed_onnx(session: Any, texts: Sequence[str], size: int = 32) -> Tensor:
    parts = []
    starts = range(0, len(texts), size)
    for first in progress(starts, "onnxruntime", len(starts)):
        batch = minilm.tokens(texts[first : first + size])
        parts.append(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])
    return torch.from_numpy(np.concatenate(parts))


def _engines(
    packed_file: Path, onnx_packed: Path, onnx_dense: Path, plan: Plan, onnx: Sequence[str]
) -> dict[str, Callable[[], Embedding]]:
    """What builds each engine from the saved files; those of ONNX Runtime that ``onnx`` names."""
    torch_engines: dict[str, Callable[[], object]] = {
        "torch dense": dense_model,
        "sparsecomp, all sparse": partial(sparse_model, packed_file),
    }
    if plan.stayed_dense or any(decision.dense_above is not None for decision in plan.sparse.values()):
        choices = {name: decision.dense_above for name, decision in plan.sparse.items()}
        torch_engines["sparsecomp, as planned"] = partial(
            sparse_model, packed_file, dense=tuple(plan.stayed_dense), dense_above=choices
        )
    sessions: dict[str, Callable[[], object]] = {
        _ORT_DENSE: partial(stock_session, onnx_dense),
        _ORT_STOCK: partial(stock_session, onnx_packed),
        _ORT_OURS: partial(our_session, onnx_packed),
    }
    return {
        **{name: partial(Embedding, of_model, make) for name, make in torch_engines.items()},
        **{name: partial(Embedding, of_session, sessions[name]) for name in onnx},
    }


def _latencies(engines: Mapping[str, Callable[[], Embedding]], texts: Sequence[str]) -> list[Latency]:
    """Time each engine, in a process of its own, on texts of exactly TOKENS tokens."""
    words = " ".join(texts).split()
    latencies = []
    openmp = [name for name in engines if not name.startswith("onnxruntime")]
    with workers(engines, torch.get_num_threads(), openmp) as started:
        for batch in BATCHES:
            pieces = [" ".join(words[start : start + 2 * TOKENS]) for start in range(0, batch * 2 * TOKENS, 2 * TOKENS)]
            encoded = {name: value[:, :TOKENS].numpy().copy() for name, value in minilm.tokens(pieces).items()}
            ask_all(started.values(), "bind", encoded)
            samplers = {name: partial(worker.ask, "sample") for name, worker in started.items()}
            latencies.append(Latency(batch, TOKENS, measure(samplers, seconds=6.0 if batch == 1 else 12.0)))
    return latencies


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo-out", help="folder for the report and the files (default demo-out)")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output)
    try:
        result = run(folder)
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {error}; install what the demo needs: pip install 'sparsecomp[demo]'", file=sys.stderr)
        return 1
    text = render(result)
    (folder / "report.txt").write_text(text + "\n")
    print(text)
    print(f"\nThis report and the files are in {folder}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
