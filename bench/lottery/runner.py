"""Makes what the list of runs says, one seed at a time, and keeps each result.

A run whose result is there is not made again, so that the whole list can be built up over many sittings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import sparsecomp as sc
from bench.lottery.data import Data
from bench.lottery.results import CHOOSING_SEED, Results, Row
from bench.lottery.runs import EARLY, LEFT, ROUNDS, SKIP, Run
from bench.lottery.task import Recipe, Trained, made, train
from sparsecomp.training.rewind import CONTROLS, Round


class Runner:
    """Makes runs."""

    def __init__(
        self,
        data: Data,
        results: Results,
        *,
        rounds: int = ROUNDS,
        early: int = EARLY,
        epochs: int | None = None,
    ) -> None:
        """``rounds``, ``early`` and ``epochs`` (None: those of the run) are smaller in tests."""
        self._data, self._results = data, results
        self._rounds, self._early, self._epochs = rounds, early, epochs

    def complete(self, runs: Sequence[Run], seeds: Sequence[int]) -> None:
        """Make what is missing: the rates first, then all runs seed by seed."""
        rates = [(run, CHOOSING_SEED) for run in runs if run.kind == "rate"]
        for run, seed in [*rates, *((run, seed) for seed in seeds for run in runs if run.kind != "rate")]:
            if self._results.read(run.name, seed) is None:
                print(f"{run.name}, seed {seed}", file=sys.stderr, flush=True)
                self._make(run, seed)

    def _make(self, run: Run, seed: int) -> None:
        rate = self._results.rate(run.net, run.optimizer) if run.rate is None else run.rate
        recipe = Recipe(run.net, run.optimizer, rate, self._epochs or run.epochs)
        facts = {"run": run.name, "seed": seed, "rate": rate, "epochs": recipe.epochs}
        ticket = None
        match run.kind:
            case "rate" | "plain":
                found = self._plain(run, recipe, seed)
            case "ticket":
                found, ticket = self._ticket(run, recipe, seed)
        self._results.write(run.name, seed, {**facts, **found}, ticket)
        told = {name: value for name, value in found.items() if isinstance(value, float)}
        print(f"  {told}", file=sys.stderr, flush=True)

    def _net(self, run: Run, seed: int) -> nn.Module:
        return made(run.net, seed, self._data.train.images.shape[-1])

    def _plain(self, run: Run, recipe: Recipe, seed: int) -> Row:
        model = self._net(run, seed)
        handles: list[sc.SparseTraining] = []

        def attach(optimizer: torch.optim.Optimizer, steps: int) -> None:
            if run.pattern is not None:
                handle = sc.sparsify(
                    *(model, run.pattern, optimizer, run.method),
                    steps=steps,
                    start=run.start,
                    seed=seed,
                    skip=SKIP[run.net],
                )
                handles.append(handle)

        row = _row(train(model, self._data, recipe, seed, attach))
        for handle in handles:
            row["density"] = handle.density
            row["flip_rates"] = [round(each.flip_rate, 6) for each in handle.history][
                :: max(1, len(handle.history) // 50)
            ]
            handle.bake()
        return row

    def _ticket(self, run: Run, recipe: Recipe, seed: int) -> tuple[Row, dict[str, Any]]:
        model = self._net(run, seed)

        def loop(model: nn.Module, now: Round) -> Trained:
            done = train(model, self._data, recipe, seed, lambda o, n: now.sparsify(o, steps=n), now.step)
            print(f"  round {now.number}, {now.density:.1%}: {done}", file=sys.stderr, flush=True)
            return done

        drop = 1.0 - LEFT ** (1.0 / self._rounds)
        report = sc.rewind(
            model, loop, rounds=self._rounds, drop=drop, to=run.to, early=self._early, skip=SKIP[run.net]
        )
        last = report.rounds[-1]
        row: Row = {
            **_row(last.result),
            "early": self._early,
            "rounds": [{"density": each.density, **_row(each.result)} for each in report.rounds],
        }
        if run.to == "weights":
            row["controls"] = {
                control: _row(report.train(model, loop, control, seed=1000 + seed).result) for control in CONTROLS
            }
        return row, {"state": dict(report.state), "masks": last.masks}


def _row(done: Trained) -> Row:
    return {"validation": done.validation, "test": done.test, "seconds": done.seconds}
