"""Tables and progress, with and without the package that draws the bars."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios

import pytest

from sparsecomp.display import (
    by_reason,
    label,
    listed,
    numbered,
    progress,
    quoted,
    shorten,
    table,
    terminal_width,
    wrap,
)


def test_a_table_aligns_its_columns() -> None:
    drawn = table(("name", ">size"), [("a", 5), ("longer\nname", 12345)], title="title")
    assert drawn.splitlines() == [
        "title",
        "",
        " name           size",
        " " + "\u2500" * 20,
        " a                 5",
        " longer name   12345",
    ]


def test_a_table_without_rows_or_title() -> None:
    assert table(("a", ">bc"), []).splitlines() == [" a   bc", " " + "\u2500" * 7]


ROWS = [
    (
        f"bert.encoder.layer.{i}.attention.self.query",
        "384x384",
        1234.5,
        "onnxruntime",
        "it is faster there, for once " * 3,
    )
    for i in (0, 1, 10)
]
COLUMNS = ("layer", ">out x in", "?>us", "?by", "why")


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 400])
def test_a_table_is_no_wider_than_asked(width: int) -> None:
    lines = table(COLUMNS, ROWS, "a title that is long " * 8, width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert all("384x384" in line for line in lines if ".layer." in line or ".l." in line)
    # the layers can still be told apart, whatever their names have lost
    assert len({line.split()[0] for line in lines if "384x384" in line}) == 3
    assert ("left out" in text) == ("1234.5" not in text or "onnxruntime" not in text)


def test_optional_columns_go_from_the_right_and_are_named() -> None:
    rows = [("a" * 20, 12345678, 12345678, 12345678)]
    drawn = table(("name", ">kept", "?>first", "?>second"), rows, width=45)
    assert "first" in drawn.splitlines()[0] and "second" not in drawn.splitlines()[0]
    assert drawn.splitlines()[-1].strip() == "(left out at 45 columns: second)"
    assert "left out" not in table(("name", ">kept", "?>first", "?>second"), rows, width=100)


def test_names_that_would_read_the_same_stay_whole() -> None:
    rows = [(f"{'x' * 30}{middle}{'y' * 30}", 1) for middle in "ab"]
    drawn = table(("name", ">n"), rows, width=40)
    joined = "".join(line.strip().split(" ")[0] for line in drawn.splitlines()[2:])
    assert all(row[0] in joined for row in rows)


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("encoder.layer.0.attention.self.query", 40, "encoder.layer.0.attention.self.query"),
        ("encoder.layer.0.attention.self.query", 24, "encoder.l.0.a.self.query"),
        ("12 x bert.layers.*.attention.query", 26, "12 x bert.l.*.a.query"),
        ("12 x bert.layers.*.attention.query", 18, "12 x b.l.*.a.query"),
        ("encoder.layer.0.attention.self.query", 12, "\u2026self.query"),
        ("12 x bert.layers.*.attention.query +3", 19, "12 x \u2026query +3"),
        ("abcdefghijklmnop", 9, "ab\u2026klmnop"),
    ],
)
def test_the_middle_of_a_name_gives_way(name: str, width: int, short: str) -> None:
    assert shorten(name, width) == short and len(short) <= width


def test_names_that_differ_in_numbers_are_told_as_one() -> None:
    names = ["block.0.layer.1.up", "block.1.layer.1.up", "block.0.layer.1.down", "head"]
    assert numbered(names) == [("block.*.layer.1.up", 2), ("block.0.layer.1.down", 1), ("head", 1)]
    assert label(names) == "4 x block.*.layer.1.up +2" and label(["head"]) == "head" and label([""]) == "(the model)"
    assert listed(names) == "2 x block.*.layer.1.up, block.0.layer.1.down, head"
    assert listed(["0", "2.1", "up"]) == '"0", "2.1", up' and quoted("") == "the model"


def test_reasons_are_told_once_for_all_names_that_have_them() -> None:
    reasons = {"a.0": "is odd", "b": "is even", "a.1": "is odd"}
    assert by_reason("skipped", reasons) == ["skipped: a.0, a.1: is odd", "skipped: b: is even"]
    assert len(by_reason("skipped", reasons, every=True)) == 3


def test_the_width_is_columns_then_the_terminal_then_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal_width() == 100 and all(len(line) <= 100 for line in wrap("word " * 60).splitlines())
    monkeypatch.setenv("COLUMNS", "1")
    assert terminal_width() == 40  # no table has room in less
    monkeypatch.delenv("COLUMNS")
    first, second = os.openpty()
    fcntl.ioctl(second, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    with os.fdopen(second, "w") as terminal, os.fdopen(first):
        monkeypatch.setattr(sys, "__stdout__", terminal)
        assert terminal_width() == 132
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert terminal_width() == 80


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_gives_every_item_without_rich(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(progress(iter("abc"), "counting", 3)) == ["a", "b", "c"]
