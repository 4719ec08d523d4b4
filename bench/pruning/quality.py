"""How good a whole model is after pruning, stage by stage: all 36 encoder linears of MiniLM, held-out paragraphs.

Takes nothing but installed packages, prints a table and writes JSON and an HTML page.
``python -m bench.pruning.quality``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench import minilm
from sparsecomp.benchmark import machine
from sparsecomp.errors import SparsecompError
from sparsecomp.machine.device import detect
from sparsecomp.pruning import PruneReport, Stage, Tuning, distill, prune_blocks

HELD_OUT_TEXTS = 400
BATCH = 16
# the last tenth of the calibration paragraphs, nearly all from documents of their own, guards against overfitting
_GUARD_SHARE = 10
_MIXED_SHARE = 0.6
_MIXED_WORDS = (8, 90)
_PIECE_WORDS = (4, 25)
_SWAPPED_WORDS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print what each gained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--method", default="balanced", help="method for the masks (default balanced)")
    parser.add_argument("--block-steps", type=int, default=60, help="steps of tuning a block (0: none)")
    parser.add_argument("--steps", type=int, default=900, help="steps of tuning the whole model (0: none)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument(
        "--baselines", default="magnitude,wanda,sparsegpt", help="methods to show beside (may be empty)"
    )
    parser.add_argument(
        "--final-only", action="store_true", help="leave out blocks without tuning, shown for comparison"
    )
    parser.add_argument("--numbers", help='also judge the result stored in these numbers, such as "int8@a8"')
    parser.add_argument("--checkpoint", help="folder in which finished blocks are kept")
    parser.add_argument("--output", default=".", help="folder for quality-PATTERN.json and .html (default: this one)")
    arguments = parser.parse_args(argv)
    try:
        result, report = run(arguments)
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"quality-{arguments.pattern.replace(':', 'of')}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    report.save(folder / f"{name}.html")
    print(f"wrote {folder / name}.json and .html")
    return 0


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], PruneReport]:
    """Every stage, each measured; the JSON of it and the report with its stages."""
    texts = minilm.load_texts()
    judged = texts.held_out[:HELD_OUT_TEXTS]
    guard = texts.calibration[-(len(texts.calibration) // _GUARD_SHARE) :]
    train = texts.calibration[: -len(guard)]
    batches, guard_batches = minilm.batches(train, BATCH), minilm.batches(guard, BATCH)
    dense = minilm.load_model()
    reference = minilm.embed(dense, judged)
    stages: list[Stage] = []

    def measure(name: str, model: nn.Module, begin: float) -> None:
        seconds = time.perf_counter() - begin
        quality = dataclasses.asdict(minilm.compare(reference, minilm.embed(model, judged)))
        stages.append(Stage(name, seconds, quality))
        _say(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in quality.items())}, {seconds:.0f} s")

    chosen = arguments.method
    begin = time.perf_counter()
    calibration = sc.calibrate(dense, batches, only=minilm.ENCODER)
    calibrated = time.perf_counter() - begin
    for method in dict.fromkeys([*filter(None, arguments.baselines.split(",")), chosen]):
        model, begin = copy.deepcopy(dense), time.perf_counter() - calibrated
        sc.prune(model, arguments.pattern, method, calibration, only=minilm.ENCODER)
        measure(f"{method}, layer by layer", model, begin)

    if arguments.block_steps and not arguments.final_only:
        model, begin = copy.deepcopy(dense), time.perf_counter()
        prune_blocks(
            model, batches, arguments.pattern, chosen, tuning=None, held_out=guard_batches, only=minilm.ENCODER
        )
        measure(f"{chosen}, block by block", model, begin)

    model, used = copy.deepcopy(dense), time.process_time()
    start = begin = time.perf_counter()
    autocast = torch.bfloat16 if "bf16" in detect("cpu").isa else None
    settings = Tuning(learning_rate=arguments.learning_rate, autocast=autocast)
    block = dataclasses.replace(settings, steps=arguments.block_steps) if arguments.block_steps else None
    report = prune_blocks(
        model,
        batches,
        arguments.pattern,
        chosen,
        tuning=block,
        held_out=guard_batches,
        only=minilm.ENCODER,
        checkpoint=arguments.checkpoint,
    )
    measure(f"{chosen}, block by block" + (", each tuned" if block else ""), model, begin)
    tunings = list(report.tunings)
    if arguments.steps:
        begin = time.perf_counter()
        settings = dataclasses.replace(settings, steps=arguments.steps)
        more = mixed_batches(train, arguments.steps)
        tunings.append(
            distill(model, dense, more, masks=report.masks, held_out=guard_batches, output=_embedding, tuning=settings)
        )
        measure("whole model tuned", model, begin)
    if arguments.numbers:
        stored, begin = copy.deepcopy(model), time.perf_counter()
        weights = f"{arguments.pattern}+{arguments.numbers}"
        sc.compile(stored, weights, only=minilm.ENCODER, where="everywhere", calibration=calibration)
        measure(f"the last one, stored as {weights}", stored, begin)
    total, processor = time.perf_counter() - start, time.process_time() - used
    report = dataclasses.replace(report, tunings=tuple(tunings), stages=tuple(stages))
    _require_pattern(model, report)
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(detect("cpu"), []),
        "threads": torch.get_num_threads(),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("output", "checkpoint")},
        "autocast": str(autocast),
        "paragraphs": {"calibration": len(train), "guard": len(guard), "judged": len(judged)},
        "seconds": total,
        "processor_seconds": processor,
        "report": report.to_dict(),
    }
    return result, report


def _embedding(result: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return minilm.pool(result.last_hidden_state, batch["attention_mask"])


def mixed_batches(texts: Sequence[str], count: int, seed: int = 0) -> list[minilm.Batch]:
    """Batches of paragraphs and of new texts put together from pieces of them, in random order, each of one length."""
    generator = random.Random(seed)
    stream = _mixed(texts, generator)
    batches: list[minilm.Batch] = []
    while len(batches) < count:
        pool = sorted((next(stream) for _ in range(16 * BATCH)), key=len)
        parts = [minilm.tokens(pool[start : start + BATCH]) for start in range(0, len(pool), BATCH)]
        generator.shuffle(parts)
        batches.extend(parts)
    return batches[:count]


def _mixed(texts: Sequence[str], generator: random.Random) -> Iterator[str]:
    """Endless texts. The dense model says what a text means, so any text can be learnt from; all words are of texts."""
    words = [text.split() for text in texts]
    known = sorted({word for each in words for word in each})
    while True:
        for index in generator.sample(range(len(texts)), len(texts)):
            if generator.random() >= _MIXED_SHARE:
                yield texts[index]
                continue
            left, parts = generator.randint(*_MIXED_WORDS), []
            while left > 0:
                source = generator.choice(words)
                length = min(generator.randint(*_PIECE_WORDS), len(source), left)
                first = generator.randint(0, len(source) - length)
                parts += source[first : first + length]
                left -= length
            yield " ".join(generator.choice(known) if generator.random() < _SWAPPED_WORDS else word for word in parts)


def _require_pattern(model: nn.Module, report: PruneReport) -> None:
    """Every mask is still obeyed, and every weight packs."""
    for name, layer in report.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if bool((weight.detach()[~report.masks[name]] != 0).any()):
            raise SparsecompError(f"{name}: tuning has changed weights that the mask drops")
        sc.pack(weight.detach(), layer.pattern)


def _say(text: str) -> None:
    print(f"- {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
