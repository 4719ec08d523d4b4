"""Results of runs as small files in a folder, and the tickets that were found, to be read back.

Knows nothing of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.lottery.runs import RATES, rate_name
from sparsecomp.errors import SparsecompError
from sparsecomp.reporting.writing import whole_file

# the seed on which rates are tried
CHOOSING_SEED = 0
Row = dict[str, Any]
# "dense", "found" and the controls -> the state in which training begins, and the masks by layer
Ticket = dict[str, dict[str, Any]]


class Results:
    """The results in a folder."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when the first result is written."""
        self.folder = folder

    def read(self, run: str, seed: int) -> Row | None:
        """A result, or None if there is none yet."""
        path = self._path(run, seed, "json")
        if not path.exists():
            return None
        row: Row = json.loads(path.read_text())
        return row

    def write(self, run: str, seed: int, row: Row, ticket: Ticket | None = None) -> None:
        """Keep a result, and the ticket it found; a file is whole or not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if ticket is not None:
            with whole_file(self._path(run, seed, "pt")) as unfinished:
                torch.save(ticket, unfinished)
        with whole_file(self._path(run, seed, "json")) as unfinished:
            unfinished.write_text(json.dumps(row) + "\n")

    def ticket(self, run: str, seed: int) -> Ticket:
        """What a run found; SparsecompError if it was not made."""
        path = self._path(run, seed, "pt")
        if not path.exists():
            raise SparsecompError(f"{run} has no result on seed {seed} yet, which another run needs; make it first")
        found: Ticket = torch.load(path, weights_only=True)
        return found

    def rate(self, net: str, optimizer: str) -> float:
        """The rate at which the dense net did best on validation, the lowest of equal ones.

        Raises SparsecompError if one was not tried.
        """
        rows = {rate: self.read(rate_name(net, optimizer, rate), CHOOSING_SEED) for rate in RATES[optimizer]}
        missing = [rate_name(net, optimizer, rate) for rate, row in rows.items() if row is None]
        if missing:
            raise SparsecompError(
                f"no result of {' and '.join(missing)}, so that no rate can be chosen; make them first"
            )
        return max(rows, key=lambda rate: ((rows[rate] or {})["validation"], -rate))

    def _path(self, run: str, seed: int, ending: str) -> Path:
        return self.folder / f"{run.replace('/', '-').replace(':', 'of')}-seed{seed}.{ending}"
