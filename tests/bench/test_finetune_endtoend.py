"""The end-to-end table: what is asked of engines, who is judged by whom, and a table of 80 columns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.finetune import endtoend
from bench.finetune.batches import Encoded
from bench.finetune.data import Part
from bench.finetune.endtoend import middling, summary
from bench.finetune.engines import Engine
from bench.finetune.judging import unpacked
from sparsecomp.engines.timing import Timing
from sparsecomp.errors import SparsecompError


class Counting:
    """An engine whose logits say whether the first word is odd, off by ``shift``; wrong ones say the contrary."""

    def __init__(self, shift: float = 0.0, wrong: bool = False) -> None:
        self.shift, self.sign, self.asked = shift, -1.0 if wrong else 1.0, 0
        self.name = "counting"

    def ask(self, method: str, *arguments: Any) -> Any:
        if method == "sample":
            return 1e-3
        self.asked += len(arguments[0]["input_ids"])
        odd = self.sign * np.where(arguments[0]["input_ids"][:, 0] % 2 == 1, 1.0, -1.0)
        return np.stack([-odd, odd], axis=1).astype(np.float32) + self.shift * np.array([0.0, 1.0], dtype=np.float32)


def texts(count: int) -> Encoded:
    chance = random.Random(0)
    ids = [[chance.randrange(1, 90) for _ in range(chance.randrange(1, 30))] for _ in range(count)]
    part = Part(tuple(" ".join(map(str, each)) for each in ids), tuple(each[0] % 2 for each in ids))
    return Encoded(part, lambda all_texts, longest: [[int(word) for word in text.split()] for text in all_texts], 30)


@pytest.mark.parametrize(("count", "size"), [(100, 1), (100, 32), (5, 32)])
def test_timed_texts_are_those_around_the_median_of_length(count: int, size: int) -> None:
    held = texts(count)
    lengths = sorted(int(batch.inputs["attention_mask"].sum()) for batch in held.in_order(1))
    picked = middling(held, size).inputs["attention_mask"].sum(dim=1).tolist()
    start = max(0, (count - size) // 2)
    assert sorted(picked) == lengths[start : start + size]


def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: dict[str, Counting]) -> list[dict[str, Any]]:
    """Rows of three engines, of which the first two have the same weights."""
    file = tmp_path / "model"
    file.write_bytes(b"12345")
    weights = {"one": "dense", "two": "dense", "other": "int8"}
    engines = [Engine(name, weights[name], file, lambda: None) for name in workers]  # type: ignore[arg-type, return-value]

    @contextmanager
    def started(*_: Any) -> Iterator[dict[str, Counting]]:
        yield workers

    monkeypatch.setattr(endtoend, "workers", started)
    monkeypatch.setattr(endtoend, "ask_all", lambda *_: None)
    monkeypatch.setattr(
        endtoend, "measure", lambda samplers, seconds: {name: Timing(2e-3, 1e-3, 3e-3, 11) for name in samplers}
    )
    return endtoend._asked(engines, texts(100))


def test_an_engine_with_the_weights_of_another_is_compared_on_few_texts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workers = {"one": Counting(), "two": Counting(0.005), "other": Counting(wrong=True)}
    rows = {row["name"]: row for row in asked(monkeypatch, tmp_path, workers)}
    assert (workers["two"].asked, workers["other"].asked) == (32, 100)
    assert [rows[name]["test"] for name in workers] == [1.0, 1.0, 0.0]
    assert rows["two"]["apart"] == pytest.approx(0.005, abs=1e-6)
    assert not unpacked(rows["other"]["right"], 100).any() and unpacked(rows["two"]["right"], 100).all()
    assert all(row["bytes"] == 5 and set(row["times"]) == {"1", "32"} for row in rows.values())


def test_an_engine_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SparsecompError, match=r"logits that are 0\.500 off"):
        asked(monkeypatch, tmp_path, {"one": Counting(), "two": Counting(0.5), "other": Counting()})


def test_the_table_fits_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = asked(monkeypatch, tmp_path, {"one": Counting(), "two": Counting(), "other": Counting(wrong=True)})
    names = {"one": "OpenVINO fp32", "two": "ORT int8 channel", "other": "16:16+int8@a8 torch"}
    result = {
        "date": "2026-12-01",
        "machine": {"cpu": "AMD EPYC"},
        "settings": {"run": endtoend.RUN, "beside": "movies/dense-again/2", "seed": 0, "threads": 2},
        "tests": 100,
        "tokens": {"1": 24, "32": 25},
        "notes": [],
        "rows": [{**row, "name": names[row["name"]]} for row in rows],
    }
    text = summary(result)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in names.values())


def test_a_run_whose_model_is_not_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsecompError, match=r"movies/8:16\+int8@a8-fast/2"):
        endtoend.run(tmp_path, "movies/dense", 0, 1)
