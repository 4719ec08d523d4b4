"""Results of runs as small files in a folder: written once, read back, and which rate validation chose.

Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.finetune.runs import Run
from sparsecomp.errors import SparsecompError
from sparsecomp.reporting.writing import whole_file

# the seed on which all rates are tried; the others take the one that did best there
CHOOSING_SEED = 0
Row = dict[str, Any]


class Results:
    """The results in a folder."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when the first result is written."""
        self.folder = folder

    def read(self, run: Run, seed: int, rate: float) -> Row | None:
        """A result, or None if there is none yet."""
        path = self._path(run, seed, rate)
        if not path.exists():
            return None
        row: Row = json.loads(path.read_text())
        return row

    def write(self, run: Run, seed: int, rate: float, row: Row) -> None:
        """Keep a result; the file is whole or not there."""
        path = self._path(run, seed, rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(row) + "\n")

    def rate(self, run: Run) -> float:
        """The rate with the highest accuracy on validation on the first seed, the lowest of equal ones.

        Raises SparsecompError if one was not tried.
        """
        rows = {rate: self.read(run, CHOOSING_SEED, rate) for rate in run.rates}
        missing = [f"{rate:g}" for rate, row in rows.items() if row is None]
        if missing:
            raise SparsecompError(
                f"{run.name}: no result on seed {CHOOSING_SEED} at the rate {' and '.join(missing)}, so that none can "
                f"be chosen; run it with --seeds {CHOOSING_SEED}"
            )
        return max(run.rates, key=lambda rate: (_validation(rows[rate]), -rate))

    def chosen(self, run: Run, seeds: Iterable[int]) -> list[Row]:
        """What there is of a run at its chosen rate, by seed; nothing while its rates are still being tried."""
        try:
            rate = self.rate(run)
        except SparsecompError:
            return []
        return [row for seed in seeds for row in [self.read(run, seed, rate)] if row is not None]

    def tried(self, run: Run) -> list[Row]:
        """What there is of a run on the first seed, by rate."""
        rows = [self.read(run, CHOOSING_SEED, rate) for rate in run.rates]
        return [row for row in rows if row is not None]

    def _path(self, run: Run, seed: int, rate: float) -> Path:
        return self.folder / f"{file_name(run.name, seed, rate)}.json"


def _validation(row: Row | None) -> float:
    assert row is not None
    return float(row["validation"])


def file_name(run: str, seed: int, rate: float) -> str:
    """A name for files of a run, without the ending."""
    return f"{run.replace('/', '-').replace(':', 'of')}-seed{seed}-rate{rate:g}"
