"""Only nn/eager names what torch keeps to itself: names it promises nobody, and the inside of a module's call."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.house.modules import inside, modules

HOME = "sparsecomp.nn.eager"
# of any object: what nn.Module.__call__ consists of, and the level of forward-mode differentiation
INNER = {"__call__", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "_slow_forward", "_current_level"}
# module -> what it may name, and why
ALLOWED: Mapping[str, tuple[str, ...]] = {
    # products of the vendors, which have no other name
    "sparsecomp.backends.gpu.cusparselt": ("torch._cslt_compress", "torch._cslt_sparse_mm"),
    "sparsecomp.backends.gpu.semi_structured": (
        "torch._sparse_semi_structured_mm",
        "torch._sparse_semi_structured_addmm",
    ),
    "sparsecomp.modules.carry": ("_compiled_call_impl",),  # the one place for it, for all who swap layers
    "sparsecomp.models.batches": ("torch._dynamo",),  # whether it was imported
    "sparsecomp.modules.readonly": ("torch.utils._pytree",),  # what a function is given
    "sparsecomp.modules.unpacked": ("torch.utils._python_dispatch",),  # does without it
    # torch.export gives out trees, and traces under modes
    "sparsecomp.onnx.capture": ("torch.utils._pytree",),
    "sparsecomp.onnx.export": ("torch.utils._pytree",),
    "sparsecomp.onnx.standin": ("torch.utils._python_dispatch",),
}


def _is_internal(name: str) -> bool:
    """Whether a dotted name is torch's and begins, in a module's name or right within a module, with an underscore.

    What classes have inside, such as ``nn.Module._save_to_state_dict``, is for those who derive from them.
    """
    modules = itertools.takewhile(lambda part: not part[:1].isupper(), name.split("."))
    return inside(name, "torch") and any(part.startswith("_") and not part.endswith("__") for part in modules)


def _dotted(node: ast.AST, known: Mapping[str, str]) -> str | None:
    """The dotted name that an expression stands for; ``known`` has what local names were imported as."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, known)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def _imported(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, local name, dotted name) of everything imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def _texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that are no documentation."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node


def internals(module: str, path: Path) -> list[str]:
    """What a file names of torch's inside and may not, each as a sentence."""
    if inside(module, HOME):
        return []
    tree = ast.parse(path.read_text())
    imported = list(_imported(tree))
    # "import torch.nn" makes torch known, not torch.nn
    known = {local: local if "." in name and local == name.split(".")[0] else name for _, local, name in imported}
    found = [(line, name) for line, _, name in imported if _is_internal(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node, known)
            if name is not None and _is_internal(name):
                found.append((node.lineno, name))
            elif node.attr in INNER:
                found.append((node.lineno, node.attr))
    for text in _texts(tree):
        value = str(text.value)
        if value in INNER or (" " not in value and _is_internal(value)):
            found.append((text.lineno, value))
    allowed = ALLOWED.get(module, ())
    return sorted(
        f"{module}:{line} names {name}, which torch promises nobody; only {HOME} may"
        for line, name in found
        if not any(inside(name, each) for each in allowed)
    )


FILES = [pytest.param(m, p, id=m) for m, p in modules() if inside(m, "sparsecomp")]


@pytest.mark.parametrize(("module", "path"), FILES)
def test_no_file_names_what_torch_keeps_to_itself(module: str, path: Path) -> None:
    assert internals(module, path) == []


def test_nothing_is_allowed_that_nobody_names() -> None:
    texts = {module: path.read_text() for module, path in modules()}
    unused = [
        (module, name)
        for module, names in ALLOWED.items()
        for name in names
        if name.rpartition(".")[2] not in texts.get(module, "")
    ]
    assert unused == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._is_tracing()",
        "import torch._dynamo",
        "import torch\ndef f():\n    return torch._dynamo.reset",
        "from torch import _C",
        "from torch._functorch import apis",
        "from torch import _functorch as inner\ninner.peek",
        "import torch.nn as layers\nlayers.modules._functions",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.autograd import forward_ad\nvars(forward_ad)['_current_level']",
        "from torch.autograd import forward_ad as ad\ngetattr(ad, '_current_level')",
        "from torch import nn\nnn.Module.__call__",
        "from torch import nn\nnn.Module._call_impl = None",
        "def f(layer):\n    return layer._wrapped_call_impl",
        "import importlib\nimportlib.import_module('torch._C')",
        "from torch.nn.modules.conv import _ConvNd",
    ],
)
def test_the_scan_sees_an_internal_name(source: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert internals("sparsecomp.nn.linear", path)
    assert internals(f"{HOME}.watch", path) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.__version__",
        "from torch import nn\nclass Layer(nn.Module):\n    def __call__(self): ...",
        '"""Why torch._C is not named here."""',
        "raise ValueError('torch._C is not for you')",
        "import numpy\nnumpy._globals",
        "from torch import nn\nnn.Module._save_to_state_dict",
    ],
)
def test_the_scan_passes_what_is_promised(source: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert internals("sparsecomp.nn.linear", path) == []
