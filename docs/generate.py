"""Writes what the pages hold that nobody should type: the reference, and what code blocks print.

``make docs`` runs it. Takes the installed package, gives docs/reference/*.md and the outputs under the Python blocks of
docs and README; ``python docs/generate.py reference`` writes the first alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs import api, blocks, commands  # noqa: E402


def reference() -> dict[Path, str]:
    """The generated pages and their text."""
    return {ROOT / "docs/reference/api.md": api.page(), ROOT / "docs/reference/commands.md": commands.page()}


def pages() -> list[Path]:
    """README and every page that people read, the generated ones left out."""
    written = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "reference"]
    return [ROOT / "README.md", *sorted(written)]


def main(arguments: list[str]) -> int:
    """Write the reference; without arguments the outputs of all pages too, or of the pages named."""
    for path, text in reference().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    if arguments == ["reference"]:
        return 0
    for path in [Path(name).resolve() for name in arguments] or pages():
        text = path.read_text()
        if blocks.parse(text):
            path.write_text(blocks.with_outputs(text, blocks.run(text)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
