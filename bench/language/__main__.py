"""SmolLM2-135M pruned in one shot, then distilled for so many minutes. ``python -m bench.language --minutes 60``.

Say ``--sitting 20`` to stop after 20 minutes of training; the same command goes on later. Needs no network after the
first call.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.ending import ended
from bench.finetune import data
from bench.language import smollm2, sources
from bench.language.judging import closed, judge
from bench.language.recovery import Settings, Training, calibrated, one_shot
from sparsecomp.benchmark.machine import describe
from sparsecomp.machine.device import detect
from sparsecomp.reporting.terminal import table
from sparsecomp.reporting.writing import whole_file

FORMAT = 1
DENSE = "dense"
# blocks of each source: to prune by, to judge by, and to look at on the way
CALIBRATION, HELD_OUT, ON_THE_WAY = 48, 32, 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Language:
    """What is pruned, and its text: tests put small ones in the place of the real ones."""

    name: str
    only: str
    load: Callable[[], nn.Module]
    encode: sources.Encode
    separator: Callable[[], int]
    texts: Callable[[], Sequence[sources.Source]]
    length: int = sources.CONTEXT


SMOLLM2 = Language(smollm2.NAME, smollm2.LAYERS, smollm2.load, smollm2.encode, smollm2.separator, sources.load)


class Bench:
    """Stages whose results lie in a folder, so that none is made twice."""

    def __init__(self, language: Language, work: Path) -> None:
        """``work`` is made when the first result is written."""
        self._language, self._work = language, work

    @cached_property
    def dense(self) -> nn.Module:
        """The model as it came."""
        return self._language.load().requires_grad_(False)

    @cached_property
    def _sources(self) -> Sequence[sources.Source]:
        return self._language.texts()

    def _blocks(self, documents: Sequence[str]) -> Tensor:
        language = self._language
        return sources.blocks(documents, language.encode, language.separator(), language.length)

    @cached_property
    def train(self) -> Mapping[str, Tensor]:
        """Blocks to train on and to calibrate with, by source."""
        return {each.name: self._blocks(each.train) for each in self._sources}

    @cached_property
    def held_out(self) -> Mapping[str, Tensor]:
        """Blocks to judge by, by source."""
        return {each.name: self._blocks(each.held_out)[:HELD_OUT] for each in self._sources}

    def dense_row(self) -> Row:
        """How the dense model does."""
        return self._kept(DENSE, lambda: dataclasses.asdict(judge(self.dense, self.held_out)))

    def one_shot_row(self, pattern: str) -> Row:
        """How a model does that ``fast`` pruned, which is kept beside."""
        return self._kept(f"{pattern} one-shot", lambda: self._judged(self.pruned(pattern)))

    def pruned(self, pattern: str) -> nn.Module:
        """The model that ``fast`` pruned."""
        file = self._file(f"{pattern} start", "pt")
        if file.exists():
            model = self._language.load()
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            return model.requires_grad_(True)
        tell(f"pruning to {pattern}")
        model = one_shot(self.dense, pattern, self._calibration, self._language.only)
        with whole_file(self._made(file)) as unfinished:
            torch.save(model.state_dict(), unfinished)
        return model.requires_grad_(True)

    @cached_property
    def _calibration(self) -> Any:
        blocks = torch.cat([each[:CALIBRATION] for each in self.train.values()])
        return calibrated(self.dense, blocks, self._language.only)

    def recovered_row(self, pattern: str, settings: Settings, sitting: float) -> Row:
        """How it does after distillation, as far as that has come; None of the figures before its time is up."""
        file = self._file(f"{pattern} training", "pt")
        training = Training(self.dense, self.pruned(pattern), pattern, self._language.only, settings, file)
        on_the_way = {name: each[:ON_THE_WAY] for name, each in self.held_out.items()}
        done = training.run(sources.Batches(self.train), on_the_way, sitting, tell)
        training.sparse.bake()
        return {**self._judged(training.model), **dataclasses.asdict(done), "settings": vars(settings)}

    def _judged(self, model: nn.Module) -> Row:
        return dataclasses.asdict(judge(model, self.held_out, self.dense))

    def text(self) -> dict[str, Any]:
        """What the text was: documents, tokens and digests by source."""
        return {
            each.name: {
                "documents": [len(each.train), len(each.held_out)],
                "train_tokens": self.train[each.name].numel(),
                "held_out_tokens": self.held_out[each.name].numel(),
                "sha256": each.digest,
            }
            for each in self._sources
        }

    def _kept(self, name: str, make: Callable[[], Row]) -> Row:
        file = self._file(name, "json")
        if file.exists():
            found: Row = json.loads(file.read_text())
            return found
        row = {"name": name, **make()}
        with whole_file(self._made(file)) as unfinished:
            unfinished.write_text(json.dumps(row) + "\n")
        tell(f"{name}: log-perplexity {row['log_perplexity']:.4f}")
        return row

    def _file(self, name: str, ending: str) -> Path:
        return self._work / f"{name.replace(':', '-').replace(' ', '-')}.{ending}"

    def _made(self, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def tell(line: str) -> None:
    """A line on standard error, with the time of day."""
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def run(bench: Bench, patterns: Sequence[str], recover: str | None, settings: Settings, sitting: float) -> Row:
    """Rows of the dense model, of each pattern in one shot, and of the recovered one."""
    dense = bench.dense_row()
    rows = [dense, *(bench.one_shot_row(each) for each in patterns)]
    if recover is not None:
        start = bench.one_shot_row(recover)
        row = {"name": f"{recover} recovered", **bench.recovered_row(recover, settings, sitting)}
        row["closed"] = closed(*(each["log_perplexity"] for each in (dense, start, row)))
        rows.append(row)
    return {
        "format": FORMAT,
        "kind": "language",
        "machine": describe(detect("cpu"), []),
        "threads": torch.get_num_threads(),
        "text": bench.text(),
        "rows": rows,
    }


def summary(result: Row) -> str:
    """A table; for a recovered model also how much of the gap is closed."""
    rows = []
    for row in result["rows"]:
        compared = row["divergence"] is not None
        rows.append(
            (
                row["name"],
                f"{row['log_perplexity']:.4f}",
                *(f"{each:.3f}" for each in row["by_source"].values()),
                f"{row['divergence']:.4f}" if compared else "",
                f"{row['agreement']:.3f}" if compared else "",
            )
        )
    head = ("model", "log-perplexity", *result["text"], "KL to dense", "same token")
    lines = [table(head, rows)]
    for row in result["rows"]:
        if "closed" in row:
            lines.append(
                f"{row['name']}: {row['closed']:.1%} of the gap in log-perplexity closed after "
                f"{row['seconds'] / 60:.1f} min, {row['steps']} steps, {row['tokens']} tokens"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, language: Language = SMOLLM2) -> int:
    """Judge, prune, recover as far as asked, and tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.language", description=__doc__)
    parser.add_argument("--patterns", default="2:4,8:16", help="one-shot patterns, comma-separated (default 2:4,8:16)")
    parser.add_argument("--recover", metavar="PATTERN", help="distil this one (default: none)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training in all (default 60)")
    parser.add_argument(
        "--sitting", type=float, help="stop after so many minutes of training; the same command goes on"
    )
    parser.add_argument(
        "--rate", type=float, default=Settings().rate, help="of AdamW at its peak (default %(default)g)"
    )
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--work", type=Path, help="folder of unfinished work (default: beside the archives)")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.minutes, arguments.rate)

    def measure() -> Row:
        work = arguments.work if arguments.work is not None else data.folder() / "language"
        patterns = [each for each in arguments.patterns.split(",") if each]
        sitting = arguments.minutes if arguments.sitting is None else arguments.sitting
        return run(Bench(language, work), patterns, arguments.recover, settings, sitting)

    return ended(measure, summary, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
