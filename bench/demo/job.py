"""The whole job on a real model: calibrate, prune, pack, swap, save, reload, export, run, measure. ``make demo``.

Takes nothing but installed packages, prints a report and leaves it with the files in demo-out/. Other engines of the
machine are measured beside it, dense int8 too; one that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench import minilm
from bench.demo import integers
from bench.demo.engines import Contender, Files, contenders
from bench.demo.report import render
from bench.demo.result import DemoResult, LayerRow, Measured, to_dict
from sparsecomp.benchmark import machine
from sparsecomp.compiler import summary
from sparsecomp.engines.timing import Timing, measure
from sparsecomp.engines.worker import Worker, ask_all, workers
from sparsecomp.errors import PatternError, SparsecompError
from sparsecomp.patterns import parse, row_nm
from sparsecomp.planning.summary import Summary
from sparsecomp.pruning.report import PruneReport

METHOD = "fast"
# rows (tokens) of one text and of 32 texts of a typical paragraph's length
TOKENS = 64
BATCHES = (1, 32)
# seconds of timing by batch; slow machines take at least as many rounds as a median needs
_SECONDS = {1: 8.0, 32: 18.0}
# texts on which engines with the same weights are compared, and values of embeddings that are the same
_CHECKED_TEXTS, _SAME_EMBEDDING = 64, 1e-3


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


def run(folder: Path, pattern: str = "2:4") -> DemoResult:
    """Every step in turn. Raises SparsecompError for a wrong pattern or a file that gives back another model."""
    start = time.perf_counter()
    say = _Progress(start)
    if row_nm(parse(pattern)) is None:
        raise PatternError(
            f'pattern "{pattern}" cannot be packed; the demo takes patterns of N of M weights, such as "2:4" or "8:16"'
        )
    folder.mkdir(parents=True, exist_ok=True)

    say("loading all-MiniLM-L6-v2 and the texts")
    dense, texts = minilm.load_model(), minilm.load_texts()
    model = copy.deepcopy(dense)

    say(f"calibrating on {len(texts.calibration)} paragraphs of Python's documentation")
    batches = minilm.batches(texts.calibration)
    calibration = sc.calibrate(model, batches, only=minilm.ENCODER)

    say("asking the planner which layers this machine makes faster, before any weight is touched")
    rows = tuple(batch * TOKENS for batch in BATCHES)
    plan = sc.plan(model, pattern, batch=rows, only=minilm.ENCODER)

    say(f"pruning the encoder's linear layers to {pattern} with {METHOD}")
    pruned = sc.prune(model, pattern, method=METHOD, calibration=calibration, only=minilm.ENCODER)

    say("packing and swapping them, all of them, whatever the planner would leave dense")
    sc.compile(model, pattern, only=minilm.ENCODER, where="everywhere")
    layers = summary(model, batch=rows)

    say("saving, and reloading into a fresh dense model")
    files = Files.inside(folder, pattern)
    sc.save(model, files.packed)
    reloaded = sc.load(files.packed, into=minilm.load_model())
    _require_equal(reloaded, model, texts.held_out[:8])

    say("exporting ONNX, packed and, as the baseline, the dense original")
    example = minilm.tokens(texts.held_out[:2])
    export_embedder(model, example, files.onnx_packed, "packed")
    export_embedder(dense, example, files.onnx_dense, "dense")

    made, export = [], partial(_export_packed, example)
    missing = {name: why for name in integers.weights_names() for why in [integers.why_not_here(name)] if why}
    for name in integers.weights_names():
        if name not in missing:
            say(f"making {name}: int8 weights, multiplied with int8 activations")
            made.append(integers.make(dense, name, METHOD, calibration, folder, export))

    say("making ONNX Runtime's dynamic int8 of the dense file, and looking which engines run here")
    found, others = contenders(files, pattern, plan, made)
    missing |= others
    for name, reason in missing.items():
        say(f"without {name}: {reason}")

    dense_bytes = sum(tensor.nbytes for tensor in dense.state_dict().values())
    qualities, difference, times = _ask(found, texts.held_out, say)
    return DemoResult(
        pattern=pattern,
        method=METHOD,
        date=date.today().isoformat(),
        machine=machine.describe(plan.device, [torch.get_num_threads()]),
        device=plan.device.describe(),
        threads=torch.get_num_threads(),
        calibration=str(calibration),
        held_out=len(texts.held_out),
        tokens=TOKENS,
        folder=str(folder),
        layers=_layers(layers, pruned),
        stayed_dense=dict(plan.stayed_dense),
        dense_bytes=dense_bytes,
        file_bytes=files.packed.stat().st_size,
        engines=tuple(
            Measured(
                each.name,
                each.kind,
                each.what,
                dense_bytes if each.file is None else each.file.stat().st_size,
                qualities[each.name],
                times[each.name],
            )
            for each in found
        ),
        difference=difference,
        missing=missing,
        seconds=time.perf_counter() - start,
        integer_bytes={each.name: each.weight_bytes for each in made},
    )


class _Progress:
    """Says what comes next and when, on standard error."""

    def __init__(self, start: float) -> None:
        self._start = start

    def __call__(self, text: str) -> None:
        print(f"{time.perf_counter() - self._start:4.0f} s  {text}", file=sys.stderr, flush=True)


def _layers(layers: Summary, pruned: PruneReport) -> tuple[LayerRow, ...]:
    return tuple(
        LayerRow(
            name=row.name,
            shape=row.shape,
            error=pruned.layers[row.name].error,
            dense_bytes=row.dense_bytes,
            bytes=row.bytes,
            kernel=row.kernel,
            dense=dict(row.dense),
            sparse=dict(row.sparse),
            bound={rows: bound.value for rows, bound in row.bound.items()},
        )
        for row in layers.rows
    )


def _require_equal(reloaded: nn.Module, model: nn.Module, texts: Sequence[str]) -> None:
    if not torch.equal(minilm.embed(reloaded, texts), minilm.embed(model, texts)):
        raise SparsecompError("the reloaded model embeds differently from the one that was saved; the file is wrong")


def _export_packed(example: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    export_embedder(model, example, path, "packed")


def export_embedder(model: nn.Module, example: dict[str, Tensor], path: Path, form: Any) -> None:
    """Write the ONNX file of a transformer with its pooling, for any number of texts and up to 512 tokens."""
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


def _ask(
    found: Sequence[Contender], texts: Sequence[str], say: _Progress
) -> tuple[dict[str, minilm.Quality], dict[str, float], dict[str, dict[int, Timing]]]:
    """By engine, each in a process of its own: quality, difference to the first with the same weights, and times."""
    makes = {each.name: each.make for each in found}
    openmp = [each.name for each in found if each.openmp]
    times: dict[str, dict[int, Timing]] = {name: {} for name in makes}
    with workers(makes, torch.get_num_threads(), openmp) as started:
        say(f"embedding {len(texts)} held-out paragraphs with each")
        asked = {name: partial(minilm.embed_with, partial(_embedded, worker)) for name, worker in started.items()}
        qualities, difference = judge(found, asked, texts)
        for batch in BATCHES:
            say(f"timing batch {batch}, all engines in turn, each in its own process")
            ask_all(started.values(), "bind", _timed_batch(texts, batch))
            samplers = {name: partial(worker.ask, "sample") for name, worker in started.items()}
            for name, timing in measure(samplers, seconds=_SECONDS[batch]).items():
                times[name][batch] = timing
    return qualities, difference, times


def judge(
    found: Sequence[Contender], asked: Mapping[str, Callable[[Sequence[str]], Tensor]], texts: Sequence[str]
) -> tuple[dict[str, minilm.Quality], dict[str, float]]:
    """Quality by engine, and its largest difference to the first engine with the same weights; the first is the dense.

    An engine that agrees with that one on the first texts to a thousandth has its quality; another embeds them all.
    """
    firsts: dict[str, tuple[Tensor, minilm.Quality]] = {}
    qualities: dict[str, minilm.Quality] = {}
    difference: dict[str, float] = {}
    dense: Tensor | None = None
    for each in found:
        if each.weights in firsts:
            twin, quality = firsts[each.weights]
            few = asked[each.name](texts[:_CHECKED_TEXTS])
            difference[each.name] = float((few - twin[: len(few)]).abs().max())
            if difference[each.name] <= _SAME_EMBEDDING:
                qualities[each.name] = quality
                continue
        embedded = asked[each.name](texts)
        dense = embedded if dense is None else dense
        qualities[each.name] = minilm.compare(dense, embedded)
        firsts.setdefault(each.weights, (embedded, qualities[each.name]))
    return qualities, difference


def _embedded(worker: Worker, batch: Mapping[str, Tensor]) -> Tensor:
    return torch.from_numpy(worker.ask("embed", {name: value.numpy() for name, value in batch.items()}))


def _timed_batch(texts: Sequence[str], batch: int) -> dict[str, Any]:
    """So many texts of exactly TOKENS tokens each."""
    words = " ".join(texts).split()
    pieces = [" ".join(words[start : start + 2 * TOKENS]) for start in range(0, batch * 2 * TOKENS, 2 * TOKENS)]
    return {name: value[:, :TOKENS].numpy().copy() for name, value in minilm.tokens(pieces).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print its report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo-out", help="folder for the report and the files (default demo-out)")
    parser.add_argument("--pattern", default="2:4", help='of the encoder\'s layers, such as "8:16" (default 2:4)')
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output)
    try:
        result = run(folder, arguments.pattern)
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {error}; install what the demo needs: pip install 'sparsecomp[demo]'", file=sys.stderr)
        return 1
    text = render(result)
    (folder / "report.txt").write_text(text + "\n")
    (folder / "result.json").write_text(json.dumps(to_dict(result), indent=1, allow_nan=False) + "\n")
    print(text)
    return 0
