"""The walls of the house: edges that must never exist, headers, file sizes, and nothing tied to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 420

# module prefix -> prefixes it may not import, at any depth of the file
FORBIDDEN = {
    "sparsecomp.patterns": ["torch", "sparsecomp.backends", "sparsecomp.nn", "sparsecomp.onnx", "sparsecomp.plan"],
    "sparsecomp.pack": [
        "sparsecomp.backends",
        "sparsecomp.nn",
        "sparsecomp.onnx",
        "sparsecomp.plan",
        "sparsecomp.prune",
        "sparsecomp._native",
    ],
    "sparsecomp.prune": ["sparsecomp.pack", "sparsecomp.backends", "sparsecomp._native"],
    "sparsecomp.backends": ["sparsecomp.nn", "sparsecomp.plan", "sparsecomp.prune"],
    "sparsecomp.onnx": ["sparsecomp.backends", "sparsecomp._native"],
    "sparsecomp": ["sparsecomp.bench"],
}
MAY_IMPORT_BENCH = {"sparsecomp.cli.bench"}
KERNELS_MAY_IMPORT = {"sparsecomp.patterns", "sparsecomp.kernels"}
HEAVY = ("triton", "cupy", "onnx", "onnxruntime", "onnxscript", "openvino", "transformers", "matplotlib")
FRAMEWORK_HEADER = re.compile(r'#\s*include\s*[<"]((torch|ATen|c10|pybind11|nanobind|onnxruntime)[/_.]|Python\.h)')


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python file that is installed."""
    for folder, package in (
        ("sparsecomp", "sparsecomp"),
        ("kernels", "sparsecomp.kernels"),
        ("bench", "sparsecomp.bench"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, ``from a import b`` counting as both a and a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
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


def inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def broken_edges(module: str, path: Path) -> list[str]:
    broken = []
    for line, name in imports(path, module):
        if inside(module, "sparsecomp.kernels"):
            if (
                inside(name, "sparsecomp")
                and name != "sparsecomp"
                and not any(inside(name, ok) for ok in KERNELS_MAY_IMPORT)
            ):
                broken.append(f"{path.name}:{line} imports {name}; kernels/ may only know sparsecomp.patterns")
            continue
        for prefix, walls in FORBIDDEN.items():
            for wall in walls:
                crosses = inside(module, prefix) and inside(name, wall)
                allowed = inside(wall, "sparsecomp.bench") and (
                    module in MAY_IMPORT_BENCH or inside(module, "sparsecomp.bench")
                )
                if crosses and not allowed:
                    broken.append(f"{module} imports {name} in line {line}; {prefix} must not know {wall}")
    return broken


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_edges(module: str, path: Path) -> None:
    assert broken_edges(module, path) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparsecomp.pack.format", "from sparsecomp.backends.registry import Kernel"),
        ("sparsecomp.pack.format", "from ..backends import registry"),
        ("sparsecomp.pack.format", "def f():\n    from sparsecomp import backends"),
        ("sparsecomp.prune.scores", "import sparsecomp.pack.bits"),
        ("sparsecomp.onnx.export", "import importlib\nimportlib.import_module('sparsecomp.backends.cpu')"),
        ("sparsecomp.nn", "import sparsecomp.bench.harness"),
        ("sparsecomp.kernels.decode", "from sparsecomp.pack import bits"),
    ],
)
def test_the_scan_sees_a_broken_edge(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(source)
    assert broken_edges(module, path)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_kernel_sources_know_no_framework() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in ("csrc/cpu", "csrc/cuda", "csrc/include")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".cpp", ".hpp", ".h", ".inl", ".cu", ".cuh")
        for match in FRAMEWORK_HEADER.finditer(path.read_text())
    ]
    assert found == []
    assert FRAMEWORK_HEADER.search('#include "onnxruntime_c_api.h"')
    assert FRAMEWORK_HEADER.search("#include <torch/extension.h>")


def test_files_stay_small() -> None:
    sources = [path for path in tracked() if path.suffix in (".py", ".cpp", ".hpp", ".h", ".cu", ".cuh")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert long == {}, "a file that grows past some 400 lines is usually two rooms"


def test_nothing_ties_the_project_to_one_machine() -> None:
    banned = re.compile(
        "|".join(
            [
                r"/(?:wor" + r"k|ro" + r"ot|ho" + r"me)/",
                "py" + r"pi\.org",
                "files\\.python" + "hosted",
                r"--(?:extra-)?index" + "-url",
                "--find" + "-links",
            ]
        )
    )
    found = []
    for path in tracked():
        if path.suffix in (".json", ".svg", ".png", ".safetensors", ".onnx"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if banned.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_import_is_light() -> None:
    code = (
        "import sys, sparsecomp; sparsecomp.SparseLinear; import torch;"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules];"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_no_module_hides_it() -> None:
    code = (
        "import types, sparsecomp as sc\n"
        "import sparsecomp.plan, sparsecomp.pack.format, sparsecomp.prune\n"
        "names = {name: getattr(sc, name) for name in sc.__all__}\n"
        "bad = [n for n, v in names.items() if isinstance(v, types.ModuleType) and n != 'errors']\n"
        "assert not bad, bad\n"
        "assert sc.parse_pattern('2:4').density == 0.5\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_says_what_there_is() -> None:
    import sparsecomp

    with pytest.raises(AttributeError, match="export_onnx"):
        sparsecomp.no_such_name  # noqa: B018
