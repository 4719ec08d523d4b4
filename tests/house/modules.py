"""The Python files of the package and of bench/ and what each imports, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (("sparsecomp", "sparsecomp"), ("kernels", "sparsecomp.kernels"), ("bench", "bench"))


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python file that is installed or that maintainers run."""
    for folder, package in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, ``from a import b`` counting as both a and a.b.

    Imports inside functions count; those for type checkers alone do not.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for_types = _for_types(tree)
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def _for_types(tree: ast.Module) -> set[int]:
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"
    ]
    return {id(inner) for node in guarded for each in node.body for inner in ast.walk(each)}


def inside(name: str, prefix: str) -> bool:
    """Whether a dotted name is ``prefix`` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")
