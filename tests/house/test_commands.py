"""The commands that pages name: every ``make`` target of theirs exists, and ``make help`` tells all that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
# the changelog tells of older versions, whose targets may be gone
PAGES = [page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"]
PAGES += [*(ROOT / "docs").rglob("*.md"), ROOT / ".ci" / "run"]
SETTING = r"[A-Z_]+=(?:'[^']*'|\S*)"
COMMAND = rf"(?:{SETTING} )*make((?: (?:{SETTING}|\.?[a-z][a-z-]*))+)"


def targets(text: str) -> set[str]:
    """The targets of a Makefile that are words; files and patterns are none, but for hidden folders."""
    return set(re.findall(r"^(\.?[a-z][a-z-]*):(?!=)", text, re.MULTILINE))


def commands(text: str) -> list[str]:
    """The targets that a page names: a line that is such a command and no more, or the command as code."""
    found = re.findall(rf"^\s*{COMMAND}\s*(?:#.*)?$|`{COMMAND}`", text, re.MULTILINE)
    return [word for either in found for word in re.sub(SETTING, "", "".join(either)).split()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_targets_that_there_are(page: Path) -> None:
    assert sorted(set(commands(page.read_text())) - targets(MAKEFILE)) == []


def test_the_command_for_the_tests_is_one_line_of_the_readme() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "make test" in lines


def test_the_help_tells_every_target() -> None:
    told = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = [line.split()[1] for line in told.splitlines() if line.startswith("make ")]
    assert sorted(named) == sorted(targets(MAKEFILE) - {"help", ".PHONY"})


def test_the_scan_reads_lines_and_code() -> None:
    page = "say `make demo ARGS='--pattern 8:16'` and\n\n    make test  # slow\n    ISA=avx2 make lint\nmake it, too\n"
    assert commands(page) == ["demo", "test", "lint"]
    assert targets("a-b: c\n.hid: | x\nNAME := make\n$(V)/x: a\n") == {"a-b", ".hid"}
