"""The reference of ``sc.*`` in Markdown, from signatures and docstrings alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import sparsecomp as sc

SECTIONS = (
    ("Prune", ("calibrate", "Calibration", "prune", "prune_blocks", "distill", "Tuning", "prune_weight")),
    (
        "Train",
        (
            "sparsify",
            "distillation_loss",
            "masks",
            "SparseTraining",
            "Schedule",
            "rewind",
            "ntk",
        ),
    ),
    ("Plan and compile", ("plan", "Plan", "compile")),
    ("Layers and weights", ("SparseLinear", "SparseConv2d", "parse_pattern", "pack", "PackedWeight", "quantize")),
    ("Files", ("save", "load")),
    ("ONNX", ("export_onnx", "onnx_session", "verify_onnx")),
    ("Arrays without torch modules", ("prepare", "linear")),
)
_OPENING = """\
# The API

Written by `make docs` from the docstrings. These names are public, and so are the [errors](#errors); what is not here
may change in any version ([stability](../stability.md)).

    import sparsecomp as sc
"""
_WIDTH = 100


def page() -> str:
    """The page in Markdown."""
    names = {name for _, group in SECTIONS for name in group}
    given = sorted(_returned(names), key=lambda each: each.__name__)
    contents = [f"- {title}: {', '.join(_link(f'sc.{name}') for name in group)}" for title, group in SECTIONS]
    contents.append(f"- [Values that are given back](#values-that-are-given-back): {', '.join(map(_to_value, given))}")
    parts = [_OPENING, "\n".join(contents) + "\n"]
    for title, group in SECTIONS:
        parts.append(f"## {title}\n")
        parts += [_entry(f"sc.{name}", getattr(sc, name)) for name in group]
    parts.append("## Values that are given back\n\nNobody makes these; functions above return them.\n")
    parts += [_entry(each.__name__, each) for each in given]
    return "\n".join([*parts, _errors()])


def _link(name: str) -> str:
    return f"[`{name}`](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"


def _to_value(value: type) -> str:
    return _link(value.__name__)


def _entry(name: str, value: Any) -> str:
    """A function, or a class with its public members."""
    if not inspect.isclass(value):
        return f"### {name}\n\n{_code(f'def {name}', value)}\n{_prose(value)}\n"
    made = name.startswith("sc.") and name not in ("sc.Calibration", "sc.Plan")
    parts = [f"### {name}\n", *([_code(f"class {name}", value)] if made else []), _prose(value)]
    fields = {each.name: each for each in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    shown = [f"`{each.name}: {each.type}`" for each in fields.values() if not each.name.startswith("_")]
    if shown:
        parts.append(f"Fields: {', '.join(shown)}.\n")
    for member, inner in _members(value):
        if member in fields or not inspect.getdoc(inner):
            continue
        if isinstance(inner, property):
            parts.append(f"**`.{member}`**: {_prose(inner)}")
        elif callable(function := getattr(inner, "__func__", inner)):
            parts.append(f"{_code(f'def {member}', function)}\n{_prose(function)}")
    return "\n".join(parts)


def _members(value: type) -> Iterator[tuple[str, Any]]:
    for name, member in inspect.getmembers_static(value):
        home = next((base for base in value.__mro__ if name in vars(base)), object)
        if not name.startswith("_") and home.__module__.startswith("sparsecomp"):
            yield name, member


def _code(head: str, function: Callable[..., Any]) -> str:
    """A signature in a code block, one parameter a line where it is long."""
    signature = inspect.signature(function)
    parameters, starred = [], False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred = starred or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        kind = "" if each.annotation is each.empty else f": {_type(each.annotation)}"
        default = "" if each.default is each.empty else f"{' = ' if kind else '='}{_default(each.default)}"
        parameters.append(f"{stars}{each.name}{kind}{default}")
    result = signature.return_annotation
    gives = "" if result is signature.empty or inspect.isclass(function) else f" -> {_type(result)}"
    line = f"{head}({', '.join(parameters)}){gives}"
    if len(line) > _WIDTH:
        inside = "".join(f"    {each},\n" for each in parameters)
        line = f"{head}(\n{inside}){gives}"
    return f"```text\n{line}\n```\n"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value == type(value)():
        return f"{type(value).__name__}()"
    return repr(value)


def _prose(value: Any) -> str:
    """A docstring as Markdown: literals in single backticks, lists and code as they are."""
    text = inspect.getdoc(value) or ""
    return textwrap.dedent(text).replace("``", "`").rstrip() + "\n"


def _returned(public: set[str]) -> set[type]:
    """Classes of this package that public functions and methods return, and those that these give back in turn.

    Public names are left out.
    """
    bases = {base for name in public if inspect.isclass(value := getattr(sc, name)) for base in value.__mro__}
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("sparsecomp.")]
    found: set[type] = set()
    waiting = [getattr(sc, name) for name in sorted(public)]
    while waiting:
        value = waiting.pop()
        functions = [getattr(each, "__func__", each) for _, each in _members(value)] if inspect.isclass(value) else []
        for function in [value, *functions]:
            function = function.fget if isinstance(function, property) else function
            annotation = getattr(function, "__annotations__", {}).get("return", "")
            for word in re.findall(r"\w+", str(annotation)):
                for module in ours:
                    result = vars(module).get(word)
                    if inspect.isclass(result) and result.__module__ == module.__name__ and result not in bases | found:
                        found.add(result)
                        waiting.append(result)
    return {each for each in found if each.__name__ not in public}


def _errors() -> str:
    lines = ["## Errors\n", "All are in `sc.errors`, and each is a `SparsecompError`.\n", "| error | what is wrong |"]
    lines.append("| --- | --- |")
    for name, value in sorted(vars(sc.errors).items()):
        if name.endswith("Error"):
            lines.append(f"| `{name}` | {' '.join(_prose(value).split())} |")
    return "\n".join(lines) + "\n"
