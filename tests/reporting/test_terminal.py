"""Tables and progress, with and without the package that draws the bars."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios

import pytest

from sparsecomp.reporting.letters import fold, span
from sparsecomp.reporting.terminal import (
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
    legend = next((i for i, line in enumerate(lines) if line.startswith(" (names are shortened: ")), None)
    whole = {row[0] for row in ROWS} == {line.split()[0] for line in lines if " 384x384 " in line}
    assert (legend is None) == whole
    lines = lines if legend is None else [*lines[:legend], *(line for line in lines[legend:] if "left out" in line)]
    text = " ".join(" ".join(lines).split())
    assert all("384x384" in line for line in lines if ".layer." in line or ".l." in line)
    # the layers can still be told apart, whatever their names have lost
    assert len({line.split()[0] for line in lines if "384x384" in line}) == 3
    assert ("left out" in text) == ("1234.5" not in text or "onnxruntime" not in text)


def test_a_shortened_name_is_read_out_once_under_the_table() -> None:
    rows = [(f"4 x bert.encoder.layer.*.attention.{part}", 1, "because " * 9) for part in ("query", "key")]
    drawn = table(("layer", ">n", "why"), rows, width=60)
    text = " ".join(drawn.split())
    assert "(names are shortened: bert.e.l.*.a.query is bert.encoder.layer.*.attention.query)" in text
    assert text.count("names are shortened") == 1 and "4 x bert.e.l.*.attention.key" in drawn
    assert "shortened" not in table(("layer", ">n", "why"), rows, width=200)


def test_a_count_of_layers_is_never_cut_into_that_of_others() -> None:
    names = [f"decoder.block.{i}.{part}" for i in range(4) for part in ("attention.query", "attention.key", "mlp.up")]
    for width in range(40, 120):
        drawn = table(("layer", ">n", "why"), [(label(names), 1, "because it is so " * 9)], width=width)
        first = drawn.splitlines()[2]
        assert "12 layers" in first and ("2 other kinds" in drawn or "3 kinds" in first), drawn


@pytest.mark.parametrize("width", [40, 60, 80])
def test_wide_letters_take_two_columns(width: int) -> None:
    rows = [("\u5c42" * 30, 5, "\u56e0\u4e3a" * 20), ("e\u0301clair", 12, "narrow")]
    lines = table(("layer", ">n", "why"), rows, width=width).splitlines()
    assert max(map(span, lines)) <= width
    ends = [span(found[0]) for line in lines[2:] if (found := re.match(r".*? (5|12) ", line))]
    assert len(ends) == 2 and ends[0] == ends[1], "numbers end in one column"
    assert max(map(span, wrap("\u5c42\u5c42 " * 40, width).splitlines())) <= width


def test_folded_text_says_all_of_it() -> None:
    text = "\u5c42\u5c42\u5c42\u5c42 a bc " * 3
    assert "".join("".join(fold(text, 7, break_words=True)).split()) == "".join(text.split())
    assert max(map(span, fold(text, 7, break_words=True))) <= 7 and fold("\u5c42", 1, break_words=True) == ["\u5c42"]


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
        (
            "12 layers: bert.layers.*.attention.query and 3 other kinds",
            44,
            "12 layers: b.l.*.a.query and 3 other kinds",
        ),
        ("12 layers: bert.layers.*.attention.query and 1 other kind", 34, "12 layers: \u2026query and 1 other kind"),
        ("12 layers: bert.layers.*.attention.query and 3 other kinds", 24, "12 layers, 4 kinds"),
        ("12 layers: bert.layers.*.attention.query and 3 other kinds", 12, "12 layers\u2026"),
        ("4 x thisverylongname", 7, "4 x th\u2026"),
        ("\u5c42" * 6, 9, "\u5c42\u2026\u5c42\u5c42\u5c42"),
        ("abcdefghijklmnop", 9, "ab\u2026klmnop"),
    ],
)
def test_the_middle_of_a_name_gives_way(name: str, width: int, short: str) -> None:
    assert shorten(name, width) == short and span(short) <= width


def test_names_that_differ_in_numbers_are_told_as_one() -> None:
    names = ["block.0.layer.1.up", "block.1.layer.1.up", "block.0.layer.1.down", "head"]
    assert numbered(names) == [("block.*.layer.1.up", 2), ("block.0.layer.1.down", 1), ("head", 1)]
    assert (
        label(names) == "4 layers: block.*.layer.1.up and 2 other kinds"
        and label(["head"]) == "head"
        and label([""]) == "(the model)"
    )
    assert label(names[:3]) == "3 layers: block.*.layer.1.up and 1 other kind"
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
