"""Makes what the list of runs says, one seed at a time, and keeps each result.

A run whose result is there is not made again, so that the whole list can be built up over many sittings.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import sparsecomp as sc
from bench.lottery.data import Data
from bench.lottery.results import CHOOSING_SEED, Results, Row, Ticket
from bench.lottery.runs import EARLY, KERNEL_IMAGES, LEFT, ROUNDS, SKIP, Run
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
        images: int = KERNEL_IMAGES,
    ) -> None:
        """All but the first two are smaller in tests; ``epochs`` None are those of the run."""
        self._data, self._results = data, results
        self._rounds, self._early, self._epochs, self._images = rounds, early, epochs, images

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
        ticket: Ticket | None = None
        match run.kind:
            case "rate" | "plain":
                found = self._plain(run, recipe, seed)
            case "ticket":
                found, ticket = self._ticket(run, recipe, seed)
            case "kernel":
                found = self._kernel(run, seed)
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
                    schedule=_schedule(run.every, steps),
                    scope=run.scope,
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

    def _ticket(self, run: Run, recipe: Recipe, seed: int) -> tuple[Row, Ticket]:
        model = self._net(run, seed)

        def loop(model: nn.Module, now: Round) -> Trained:
            done = train(model, self._data, recipe, seed, lambda o, n: now.sparsify(o, steps=n), now.step)
            print(f"  round {now.number}, {now.density:.1%}: {done}", file=sys.stderr, flush=True)
            return done

        drop = 1.0 - LEFT ** (1.0 / self._rounds)
        report = sc.rewind(
            model, loop, rounds=self._rounds, drop=drop, to=run.to, early=self._early, skip=SKIP[run.net]
        )
        row: Row = {
            **_row(report.rounds[-1].result),
            "early": self._early,
            "rounds": [{"density": each.density, **_row(each.result)} for each in report.rounds],
        }
        if run.to == "learning-rate":
            return row, {}
        ticket: Ticket = {
            "dense": _start(report.begin(model, number=0), model),
            "found": _start(report.begin(model), model),
        }
        row["controls"] = {}
        for control in CONTROLS:
            ticket[control] = _start(report.begin(model, control, seed=1000 + seed), model)
            row["controls"][control] = _row(report.train(model, loop, control, seed=1000 + seed).result)
        return row, ticket

    def _kernel(self, run: Run, seed: int) -> Row:
        """What the kernel of a ticket and of its controls is like where training begins, on images of validation."""
        assert run.needs is not None
        images, kernels, row = self._data.validation.images[: self._images], {}, {}
        # beside them the dense net before its first step, which the re-initialised ticket is to be compared with
        starts: Ticket = {**self._results.ticket(run.needs, seed), "untrained": {}}
        for kind, start in starts.items():
            model = self._net(run, seed)
            model.load_state_dict(start.get("state", model.state_dict()))
            kernels[kind] = sc.ntk(model, images, masks=start.get("masks"))
            row[kind] = {
                "effective_rank": kernels[kind].effective_rank,
                "alignment": kernels["dense"].alignment(kernels[kind]),
                "centred_alignment": kernels["dense"].alignment(kernels[kind], centred=True),
                "trace": float(kernels[kind].kernel.trace()),
            }
        return {"images": len(images), "kernels": row}


def _schedule(every: int | None, steps: int) -> sc.Schedule | None:
    """Masks that change until three quarters of the steps are done, or not at all."""
    if every is None:
        return None
    return sc.Schedule(cool_down=steps // 4, every=every) if every else sc.Schedule(cool_down=steps - 1)


def _row(done: Trained) -> Row:
    return {"validation": done.validation, "test": done.test, "seconds": done.seconds}


def _start(now: Round, model: nn.Module) -> dict[str, Any]:
    """The state in which a round begins, and its masks."""
    return {"state": copy.deepcopy(model.state_dict()), "masks": dict(now.masks)}
