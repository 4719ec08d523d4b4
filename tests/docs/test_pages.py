"""What the pages say is so: their code runs and prints what they show, their links and paths lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from docs import blocks, generate

ROOT = generate.ROOT
PAGES = [*generate.pages(), *generate.reference(), ROOT / "examples/README.md", ROOT / "CONTRIBUTING.md"]
WITH_CODE = [path for path in generate.pages() if any(not each.not_run for each in blocks.parse(path.read_text()))]
FOLDERS = "sparsecomp|csrc|kernels|bench|tests|docs|examples|cmake"
_CODE = re.compile(r"^```.*?^```$|^(?: {4}.*\n)+|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", generate.reference(), ids=name)
def test_the_reference_is_what_the_docstrings_say(path: Path) -> None:
    if path.name == "commands.md" and sys.version_info >= (3, 13):
        pytest.skip("argparse words its help differently from Python 3.13 on")
    assert path.read_text() == generate.reference()[path], "run: make docs"


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_code_runs_and_prints_what_the_page_shows(path: Path) -> None:
    pytest.importorskip("onnxscript")
    text = path.read_text()
    for block, printed in zip(blocks.parse(text), blocks.run(text), strict=True):
        if block.not_run or block.output is None:
            continue
        if block.measured:
            assert outline(printed) == outline(block.output)
        else:
            assert blocks.skeleton(printed) == blocks.skeleton(block.output)


def outline(output: str) -> set[str]:
    """Of an output with measured times, what no machine changes: that it has a table of layers, and their shapes."""
    shapes = set(re.findall(r"\b\d+x\d+\b", output))
    assert re.search(r"^ layer +out x in +runs ", output, re.MULTILINE) and shapes
    return shapes


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    bad = []
    for link in _LINK.findall(_CODE.sub("", text)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            bad.append(link)
    bad += [each for each in _PATH.findall(text) if not (ROOT / each).exists() and not made(each)]
    assert bad == []


def made(path: str) -> bool:
    """Whether a path stands for several, or is made by a command that the page tells of."""
    return any(word in path for word in ("FILE", "DATE", "OTHER", "NAME"))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def test_every_page_is_in_the_map() -> None:
    index = (ROOT / "docs/index.md").read_text()
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in _LINK.findall(index)}
    pages = {path for path in PAGES if path.is_relative_to(ROOT / "docs") and "notes" not in path.parts}
    assert pages - linked - {ROOT / "docs/index.md"} == set()


def test_every_public_name_is_in_the_reference() -> None:
    import sparsecomp as sc
    from docs import api

    assert {name for _, names in api.SECTIONS for name in names} | {"errors"} == set(sc.__all__)


def test_a_page_is_read_as_it_is_written() -> None:
    page = "<!-- not run: no -->\n```python\na\n```\n\n"
    page += "<!-- run first\nx = 1\n-->\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    first, second = blocks.parse(page)
    assert first.not_run == "no" and first.output is None
    assert second.code == "x = 1\nprint(x)\n" and second.output == "2\n" and not second.measured
    assert blocks.run(page) == ["", "1\n"]
    assert "```text\n1\n```" in blocks.with_outputs(page, ["", "1\n"])
    assert blocks.skeleton("a  1.25 s\n ──\nb 3") == ["a # s", "--", "b 3"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        blocks.run("```python\n1 / 0\n```\n")


def test_troubleshooting_quotes_errors_that_there_are() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    sources = "".join(path.read_text() for path in (ROOT / "sparsecomp").rglob("*.py"))
    assert len(quoted) > 5 and [text for text in quoted if text not in sources] == []


def test_every_environment_variable_is_told() -> None:
    sources = [
        p for folder in ("sparsecomp", "csrc") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp")
    ]
    read = {name for path in sources for name in re.findall(r'"(SPARSECOMP_[A-Z]+)"', path.read_text())}
    told = (ROOT / "docs/stability.md").read_text()
    assert len(read) >= 4 and [name for name in read if f"`{name}`" not in told] == []
