"""Makes what the list of runs says, one seed and rate at a time, and keeps each result.

A run whose result is there is not made again, so that the whole list can be built up over many sittings.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench.finetune.batches import Encode, Encoded
from bench.finetune.data import Task
from bench.finetune.judging import accuracy, macro_f1, packed
from bench.finetune.results import CHOOSING_SEED, Results, Row, file_name
from bench.finetune.runs import Run, Sparse
from bench.finetune.task import Classifier, Recipe, logits_of, optimizer_of, train
from sparsecomp.errors import SparsecompError
from sparsecomp.patterns.numbers import FLOAT, parse_weights
from sparsecomp.reporting.writing import whole_file
from sparsecomp.training import Schedule, SparseTraining
from sparsecomp.training.rules import get_rule

CALIBRATION_TEXTS = 2000


@dataclass(frozen=True)
class Bench:
    """What runs need: tasks by name, fresh pre-trained encoders, a tokeniser, and where things lie.

    ``encoder()`` gives a module ``width`` wide; ``only`` are globs of the layers of a Classifier that become sparse.
    ``checkpoints`` is a folder for dense models.
    """

    load: Callable[[str], Task]
    encoder: Callable[[], nn.Module]
    width: int
    encode: Encode
    only: tuple[str, ...]
    checkpoints: Path
    autocast: bool = True


@dataclass(frozen=True)
class Parts:
    """A task, tokenised."""

    task: Task
    train: Encoded
    validation: Encoded
    test: Encoded


class Runner:
    """Makes runs."""

    def __init__(self, bench: Bench, results: Results, runs: Mapping[str, Run]) -> None:
        """``runs`` are all there are, by name."""
        self._bench, self._results, self._runs = bench, results, runs
        self._parts: dict[str, Parts] = {}
        self._statistics: dict[Path, sc.Calibration] = {}

    def complete(self, runs: Sequence[Run], seeds: Sequence[int], rates: Collection[float] | None = None) -> None:
        """Make what is missing: all rates on the choosing seed, and on the others the rate that did best there.

        With ``rates`` the choosing seed tries no others in this sitting, but for the models that runs start from.
        """
        for seed in seeds:
            for run in runs:
                wanted = [rate for rate in run.rates if rates is None or run.base is None or rate in rates]
                for rate in wanted if seed == CHOOSING_SEED else [self._results.rate(run)]:
                    done = self._results.read(run, seed, rate) is not None
                    if not done or (run.keep and not self._checkpoint(run, seed, rate).exists()):
                        self._make(run, seed, rate)

    def parts(self, name: str) -> Parts:
        """The task of that name, tokenised once."""
        if name not in self._parts:
            task, encode = self._bench.load(name), self._bench.encode
            encoded = (Encoded(part, encode, task.max_tokens) for part in (task.train, task.validation, task.test))
            self._parts[name] = Parts(task, *encoded)
        return self._parts[name]

    def trained(self, run: Run, seed: int) -> Classifier:
        """The model that a run left, as it was before it was compiled; SparsecompError if it was not kept."""
        path = self._checkpoint(run, seed, self._results.rate(run))
        if not path.exists():
            raise SparsecompError(
                f"there is no model of {run.name} with seed {seed} in {path.parent}; run it with --only '{run.name}' "
                f"--seeds {CHOOSING_SEED},{seed}"
            )
        model = self._classifier(run.task)
        model.load_state_dict(_read(path)["model"])
        return model.eval()

    def _classifier(self, task: str) -> Classifier:
        return Classifier(self._bench.encoder(), self._bench.width, len(self.parts(task).task.labels))

    def _checkpoint(self, run: Run, seed: int, rate: float) -> Path:
        return self._bench.checkpoints / f"{file_name(run.name, seed, rate)}.pt"

    def _make(self, run: Run, seed: int, rate: float) -> None:
        print(f"{run.name}, seed {seed}, rate {rate:g}", file=sys.stderr, flush=True)
        parts = self.parts(run.task)
        recipe = Recipe(run.epochs, rate, seed, self._bench.autocast, exactly=run.steps)
        torch.manual_seed(seed)
        model = self._classifier(run.task)
        teacher = None
        if run.base is not None:
            kept = _read(self._base(run, seed))
            model.load_state_dict(kept["model"])
            teacher = kept["logits"]
        row = self._trained(run, model, parts, recipe, teacher)
        self._results.write(run, seed, rate, row)
        print(f"  validation {row['validation']:.4f}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)

    def _base(self, run: Run, seed: int) -> Path:
        """The checkpoint that a run starts from."""
        assert run.base is not None
        base = self._runs[run.base]
        return self._checkpoint(base, seed, self._results.rate(base))

    def _keep(self, path: Path, model: nn.Module, learned: Encoded | None) -> None:
        """Keep the model and, if it is to teach others, its logits on the texts it learned."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: dict[str, Any] = {"model": model.state_dict()}
        if learned is not None:
            kept["logits"] = logits_of(model, learned)
        with whole_file(path) as unfinished:
            torch.save(kept, unfinished)

    def _trained(
        self,
        run: Run,
        model: Classifier,
        parts: Parts,
        recipe: Recipe,
        teacher: Tensor | None,
    ) -> Row:
        """Train the model in place, and judge it."""
        optimizer, steps = optimizer_of(model, recipe), recipe.steps(parts.train)
        handle = None
        if run.sparse is not None:
            handle = self._sparsified(model, run.sparse, optimizer, steps, parts, self._base(run, recipe.seed))
        curve = [] if teacher is None else [(0, self._look(model, parts))]
        every = parts.train.steps(recipe.batch) // run.checks if run.checks else 0

        def look(step: int) -> None:
            if every and step % every == 0:
                curve.append((step, self._look(model, parts)))

        done = train(model, optimizer, parts.train, recipe, teacher=teacher, after_step=look)
        facts: Row = {}
        if handle is not None:
            facts = _baked(handle)
        if run.keep:
            path = self._checkpoint(run, recipe.seed, recipe.rate)
            self._keep(path, model, parts.train if run.base is None else None)
        if run.sparse is not None and parse_weights(run.sparse.pattern)[1] != FLOAT:
            facts["note"] = self._compiled(model, run.sparse.pattern)
        return {
            "run": run.name,
            "task": run.task,
            "seed": recipe.seed,
            "rate": recipe.rate,
            "epochs": recipe.epochs,
            "steps": done.steps,
            "seconds": round(done.seconds, 1),
            **self._scores(model, parts),
            "curve": curve,
            **facts,
            "settings": {
                "recipe": dataclasses.asdict(recipe),
                "sparse": None if run.sparse is None else dataclasses.asdict(run.sparse),
                "distilled": teacher is not None,
            },
        }

    def _sparsified(
        self,
        model: Classifier,
        sparse: Sparse,
        optimizer: torch.optim.Optimizer,
        steps: int,
        parts: Parts,
        checkpoint: Path,
    ) -> SparseTraining:
        needed = sparse.start not in (None, "magnitude")
        return sc.sparsify(
            model,
            sparse.pattern,
            optimizer,
            dataclasses.replace(get_rule(sparse.method), **sparse.rule),  # type: ignore[type-var]
            steps=steps,
            start=sparse.start,
            calibration=self._calibration(model, parts, checkpoint) if needed else None,
            schedule=_schedule(sparse.schedule, steps),
            scope=sparse.scope,  # type: ignore[arg-type]
            only=self._bench.only,
        )

    def _calibration(self, model: Classifier, parts: Parts, checkpoint: Path) -> sc.Calibration:
        """Statistics of the dense model on the first texts that are trained on; those of the last model are kept."""
        if checkpoint not in self._statistics:
            texts = range(min(CALIBRATION_TEXTS, len(parts.train)))
            batches = [parts.train.batch(texts[start : start + 32]).inputs for start in texts[::32]]
            found = sc.calibrate(model, batches, only=self._bench.only, show_progress=False)
            self._statistics = {checkpoint: found}
        return self._statistics[checkpoint]

    def _compiled(self, model: Classifier, pattern: str) -> str:
        """Put the layers into the numbers in which they would run; the layers that do not bear them, in words."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sc.compile(model, pattern, only=self._bench.only, where="everywhere")
        return "; ".join(str(each.message) for each in told)

    def _look(self, model: nn.Module, parts: Parts) -> float:
        """Accuracy on validation, on the way."""
        predicted = logits_of(model, parts.validation, self._bench.autocast).argmax(dim=1)
        return round(accuracy(predicted, parts.validation.labels), 4)

    def _scores(self, model: nn.Module, parts: Parts) -> Row:
        """In float32, or in the numbers of the layers: accuracies, macro-F1 and which texts of the test are right."""
        classes = len(parts.task.labels)
        seen, judged = (logits_of(model, part).argmax(dim=1) for part in (parts.validation, parts.test))
        return {
            "validation": accuracy(seen, parts.validation.labels),
            "test": accuracy(judged, parts.test.labels),
            "validation_f1": macro_f1(seen, parts.validation.labels, classes),
            "test_f1": macro_f1(judged, parts.test.labels, classes),
            "tests": len(parts.test),
            "right": packed(judged == parts.test.labels),
        }


def _read(path: Path) -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    return kept


def _schedule(settings: Mapping[str, Any], steps: int) -> Schedule | None:
    """A Schedule in which shares of all steps, which are floats, have become steps."""
    if not settings:
        return None
    steps_of: dict[str, Any] = {
        key: round(each * steps) if isinstance(each, float) else each for key, each in settings.items()
    }
    return Schedule(**steps_of)


def _baked(handle: SparseTraining) -> Row:
    flips = [each.flip_rate for each in handle.history]
    facts = {"flip_rate": sum(flips) / len(flips) if flips else 0.0, "changes": len(flips)}
    handle.bake()
    return {"density": handle.density, **facts}
