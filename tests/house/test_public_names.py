"""The public names of the package and their signatures: what a user's code may rely on."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsecomp as sc

RECORD = Path(__file__).with_name("public_names.txt")


def lines() -> Iterator[str]:
    """One line for each public name, and for each public attribute of a class."""
    for name in sc.__all__:
        value = getattr(sc, name)
        if inspect.isclass(value):
            yield f"class {name}{inspect.signature(value)}"
            for attribute, member in sorted(inspect.getmembers_static(value)):
                if attribute.startswith("_") or not _ours(value, attribute):
                    continue
                inner = getattr(member, "__func__", member)
                yield f"  {name}.{attribute}{inspect.signature(inner) if callable(inner) else ''}"
        elif callable(value):
            yield f"def {name}{inspect.signature(value)}"
        else:
            yield f"module {name}: {', '.join(sorted(n for n in vars(value) if n.endswith('Error')))}"


def _ours(owner: type, attribute: str) -> bool:
    home = next(base for base in owner.__mro__ if attribute in vars(base))
    return home.__module__.startswith("sparsecomp")


def test_public_names_and_signatures_are_as_recorded() -> None:
    """SPARSECOMP_RECORD=1 writes the record anew; a change of it belongs into the changelog."""
    now = "\n".join(lines()) + "\n"
    if os.environ.get("SPARSECOMP_RECORD"):
        RECORD.write_text(now)
    assert now == RECORD.read_text()


@pytest.mark.slow
def test_no_module_hides_a_public_name() -> None:
    code = (
        "import pkgutil, sparsecomp as sc, types\n"
        "inner = {each.name for each in pkgutil.iter_modules(sc.__path__)}\n"
        "assert not inner & set(sc.__all__) - {'errors'}, inner & set(sc.__all__)\n"
        "bad = [n for n in sc.__all__ if isinstance(getattr(sc, n), types.ModuleType) and n != 'errors']\n"
        "assert not bad, bad\n"
        "assert sc.parse_pattern('2:4').density == 0.5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
