"""The summary of a compiled model as text: as wide as asked, equal layers once, the totals those of all rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsecomp.compiler import compile, summary
from sparsecomp.machine.bound import Bound
from sparsecomp.planning.overview import Row, grouped
from sparsecomp.planning.summary import Summary, SummaryRow
from sparsecomp.reporting.figures import microseconds


def rows(layers: int) -> tuple[SummaryRow, ...]:
    """Rows of layers of two shapes, with times that make the sums easy."""
    limit = {batch: Bound(2.0, "compute", 2.0, 1.0) for batch in (1, 32)}
    found = []
    for i in range(layers):
        for name, shape in (("up", (48, 32)), ("down", (32, 48))):
            times = {1: 2e-6, 32: 4e-6}, {1: 1e-6, 32: 1e-6}, limit
            facts = "2:4", "float32", 6144, 3264, "cpu", "sparse kernel runs it"
            found.append(SummaryRow(f"encoder.layers.{i}.mlp.{name}", shape, *facts, *times))
    return tuple(found)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
@pytest.mark.parametrize("every", [True, False])
def test_a_summary_fits_its_width_and_adds_up(width: int, every: bool) -> None:
    device = summary_of_here().device
    made = Summary(device, (1, 32), rows(12), {"lm_head": "dense is faster", "7": "dense is faster"})
    text = made.text(width, every)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("48x32") == (12 if every else 1)
    total = next(line for line in text.splitlines() if line.split()[:1] == ["total"]).split()
    assert "48" in total and "24" in total  # 24 layers of 2 us in dense torch, and of 1 us, in all
    assert ('stayed dense: lm_head, "7": dense is faster' in text) == (not every)
    assert ('stayed dense: "7": dense is faster' in text) == every
    assert "weights: 147.5 KB dense, 78.3 KB packed" in text
    assert "4.00x*" in text and "above its bound" in text


def summary_of_here() -> Summary:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    compile(net, "2:4", method="magnitude", where="everywhere")
    return summary(net, batch=(1,))


def test_the_text_of_a_summary_follows_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = summary_of_here()
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert str(made) == made.text(int(columns))


def test_rows_are_grouped_only_if_nothing_but_the_name_differs() -> None:
    times = {1: 2e-6}, {1: 1e-6}, {1: Bound(2.0, "compute", 2.0, 1.0)}
    first = Row(("a",), (8, 8), "2:4", "cpu", *times, "why")
    alike = Row(("b",), (8, 8), "2:4", "cpu", *times, "why")
    others = [
        Row(("c",), (8, 16), "2:4", "cpu", *times, "why"),
        Row(("d",), (8, 8), "1:4", "cpu", *times, "why"),
        Row(("e",), (8, 8), "2:4", "cpu", *times, "another why"),
        Row(("f",), (8, 8), "2:4", "cpu", times[0], {1: 1.1e-6}, times[2], "why"),
        Row(("g",), (8, 8), "2:4", "cpu", *times, "why", {">error": "0.1"}),
    ]
    found = grouped([first, *others, alike])
    assert [row.names for row in found] == [("a", "b"), ("c",), ("d",), ("e",), ("f",), ("g",)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234e-6, "1.23 us"), (998e-6, "998 us"), (0.01234, "12.3 ms"), (12.34, "12.3 s")]
)
def test_times_are_written_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert microseconds(seconds) == text


def test_a_summary_names_the_product_it_compares_with(monkeypatch: pytest.MonkeyPatch) -> None:
    made = summary_of_here()
    assert {way for row in made.rows for way in row.baseline.values()} == {"torch fp32"}
    assert "torch fp32" in made.text(80) and "torch fp32 b1" in made.text(300)
    assert made.to_dict()["layers"][0]["baseline"] == {"1": "torch fp32"}
    old = SummaryRow.__new__(SummaryRow)
    old.__setstate__({name: value for name, value in vars(made.rows[0]).items() if name != "baseline"})
    assert old == replace(made.rows[0], baseline={})


def test_a_summary_names_integers_however_narrow_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    compile(net, {"0": "8:16+int8@a8", "1": "2:4"}, method="magnitude", where="everywhere")
    made = summary(net, batch=(1,))
    assert [(row.pattern, row.numbers) for row in made.rows] == [("8:16", "int8@a8"), ("2:4", "float")]
    assert "8:16+int8@a8" in made.text(80) and "2:4+" not in made.text(80)
    assert [layer["numbers"] for layer in made.to_dict()["layers"]] == ["int8@a8", "float"]
    old = SummaryRow.__new__(SummaryRow)
    old.__setstate__({name: value for name, value in vars(made.rows[1]).items() if name != "numbers"})
    assert old == made.rows[1]
