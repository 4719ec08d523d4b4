"""The limit plot says which batch, machine and bound its figures are of, wastes no room, and covers no words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from sparsecomp.benchmark.plot import limit_plot

SHAPE = (64, 32)


def result_of(speedups: Mapping[str, Mapping[int, float]], bound: float = 2.0, spread: float = 1.02) -> dict[str, Any]:
    """A result in which patterns are so many times as fast as the one dense engine, by batch."""
    shared = {"out": 64, "in": 32, "dtype": "fp32", "threads": 1, "weights": "cold"}
    rows = []
    for batch in sorted({batch for line in speedups.values() for batch in line}):
        dense = {"engine": "torch", "pattern": None, "us": 100.0, "us_low": 100.0, "us_high": 100.0}
        rows.append(shared | dense | {"batch": batch})
        for pattern, line in speedups.items():
            if batch in line:
                us = 100.0 / line[batch]
                times = {"us": us, "us_low": us / spread, "us_high": us * spread}
                rows.append(shared | times | {"engine": "x", "pattern": pattern, "batch": batch, "bound": bound})
    return {"rows": rows, "machine": {"cpu": "A Processor", "isa": "avx2"}, "date": "2026-11-22"}


def texts(drawn: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', drawn)
    return {text: (float(x), float(y)) for x, y, text in found}


def test_labels_say_which_batch_and_machine_they_are_of():
    drawn = limit_plot(result_of({"2:4": {1: 1.8, 8: 1.5, 512: 1.75}}), SHAPE, "fp32", 1)
    said = texts(drawn)
    assert "1.75x of 2.00x at batch 512" in said and "2:4" in said
    assert "A Processor (avx2), weights from memory, 2026-11-22" in said


@pytest.mark.parametrize(("slowest", "lowest"), [(1.4, "dense 1x"), (0.8, "0.5x"), (0.3, "0x")])
def test_the_axis_begins_at_dense_or_below_the_slowest(slowest, lowest):
    drawn = limit_plot(result_of({"2:4": {1: 1.9, 2: 1.9, 8: slowest}}), SHAPE, "fp32", 1)
    marks = {text: y for text, (_, y) in texts(drawn).items() if re.fullmatch(r"(dense )?[\d.]+x", text)}
    assert max(marks, key=lambda text: marks[text]) == lowest and "dense 1x" in marks
    # a point lies where the axis says that it does
    unit = (marks["2x"] - marks["dense 1x"]) / 1.0
    circles = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    wanted = [marks["dense 1x"] - 4 + unit * (value - 1.0) for value in (1.9, 1.9, slowest)]
    assert circles == pytest.approx(wanted, abs=0.2)


def test_a_speedup_above_its_bound_gives_its_reason():
    line = dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 1.8) | {8: 3.0}
    said = texts(limit_plot(result_of({"2:4": line}), SHAPE, "fp32", 1))
    (x, y) = said["above the bound: there the best"]
    assert "dense engine is below its peak" in said
    assert x > said["8"][0] and abs(y - said["3x"][1]) < 20, "beside the point that is above"
    for line in ({1: 1.8, 8: 1.9, 64: 1.8}, {1: 1.8, 8: 2.01, 64: 1.8}):
        assert "above the bound" not in limit_plot(result_of({"2:4": line}), SHAPE, "fp32", 1)


def test_the_reason_stands_above_the_plot_where_lines_leave_no_room():
    speedups = {"2:4": dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), 2.2)}
    said = texts(limit_plot(result_of(speedups, spread=1.2), SHAPE, "fp32", 1))
    (_, y) = said["above the bound: there the best dense engine is below its peak"]
    assert y < min(y for text, (_, y) in said.items() if re.fullmatch(r"[\d.]+x", text)) + 1


def test_labels_of_equal_lines_do_not_cover_each_other():
    patterns = ("1:4", "2:4", "8:16", "4:8")
    for ends in ((1.5, 1.5, 1.5, 1.5), (1.05, 1.04, 1.0, 2.0), (2.4, 2.3, 2.5, 2.4)):
        lines = {pattern: {1: 1.8, 8: 1.8, 64: end} for pattern, end in zip(patterns, ends, strict=True)}
        said = texts(limit_plot(result_of(lines), SHAPE, "fp32", 1))
        places = sorted([*(said[pattern][1] for pattern in patterns), said["dashed: the bound"][1]])
        assert all(below - above >= 30 for above, below in pairwise(places))
        order = sorted(patterns, key=lambda pattern: said[pattern][1])
        assert [lines[each][64] for each in order] == sorted(ends, reverse=True)
