"""Tables and progress, with and without the package that draws the bars."""

from __future__ import annotations

import sys

import pytest

from sparsecomp.display import progress, table


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


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_gives_every_item_without_rich(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(progress(iter("abc"), "counting", 3)) == ["a", "b", "c"]
