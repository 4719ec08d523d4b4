"""The walls of the house beside the order of its rooms: headers, file sizes, nothing tied to one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.modules import ROOT

MAX_LINES = 420

HEAVY = ("triton", "cupy", "onnx", "onnxruntime", "onnxscript", "openvino", "transformers", "matplotlib")
FRAMEWORK_HEADER = re.compile(r'#\s*include\s*[<"]((torch|ATen|c10|pybind11|nanobind|onnxruntime)[/_.]|Python\.h)')


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


@pytest.mark.slow
def test_one_place_names_files_that_are_not_whole_yet() -> None:
    """A name of one's own making is met by whoever writes the same file at that moment."""
    named = re.compile(r"""with_(?:name|suffix)\(f["'][^"']*\.(?:partial|tmp|part)["']""")
    sources = sorted((ROOT / "sparsecomp").rglob("*.py"))
    found = [path.relative_to(ROOT).as_posix() for path in sources if named.search(path.read_text())]
    assert found == ["sparsecomp/reporting/writing.py"]


def test_import_is_light() -> None:
    code = (
        "import sys, sparsecomp; sparsecomp.SparseLinear; import torch;"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules];"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_says_what_there_is() -> None:
    import sparsecomp

    with pytest.raises(AttributeError, match="export_onnx"):
        sparsecomp.no_such_name  # noqa: B018
