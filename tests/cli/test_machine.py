"""The command line on machines that lack something: torch, a package that works, or an encoding of its characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecomp.cli import packages
from sparsecomp.cli.main import VERBS, main

_WITHOUT_TORCH = """\
import json, sys
sys.modules["torch"] = None
from sparsecomp.cli.main import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT_TORCH, json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", ["", *(module.__name__.rpartition(".")[2] for module in VERBS)])
def test_help_needs_no_torch(verb: str) -> None:
    done = without_torch(*([verb] if verb else []), "--help")
    assert done.returncode == 0 and "usage: sparsecomp" in done.stdout and not done.stderr


def test_a_verb_without_torch_says_how_to_install_it() -> None:
    done = without_torch("plan", "shop:build")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torch cannot be imported (") and "pip install torch" in done.stderr


@pytest.mark.slow
def test_doctor_without_torch_says_what_is_missing() -> None:
    done = without_torch("doctor")
    said = " ".join(done.stdout.split())
    assert done.returncode == 1 and not done.stderr and "no torch" in said
    assert "Nothing can run here: torch cannot be imported" in said and "optional package" in said
    facts = json.loads(without_torch("doctor", "--json").stdout)
    assert facts["torch"] is None and "pip install torch" in facts["refused"] and facts["devices"] == []


@pytest.mark.slow
def test_doctor_tries_packages_and_does_not_believe_their_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.13 is nowhere')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    main(["doctor", "--quick", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["cupy"] is None
    assert "cannot be imported (ImportError: libcudart.so.13 is nowhere)" in facts["package_problems"]["cupy"]
    main(["doctor", "--quick"])
    assert "libcudart.so.13" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", None),
        ("import os\nos.kill(os.getpid(), 11)\n", "ends Python with signal 11"),
        ("raise SystemExit(3)\n", "ends Python with code 3"),
    ],
)
def test_a_package_that_crashes_does_so_in_a_process_of_its_own(
    source: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = packages.look(["crashing", "absent_package"])
    assert found["absent_package"] == packages.Found(None) and str(found["absent_package"]) == "not installed"
    assert (found["crashing"].problem or "").endswith(problem or "") and bool(found["crashing"].problem) == bool(
        problem
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_are_drawn_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.ModuleDict({'\u5c42' * 4: nn.Linear(32, 16, device='cpu')}))\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "sparsecomp", "prune", "named:build", "--pattern", "2:4", "-o", "x.safetensors"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    said = done.stdout.decode(encoding)
    assert done.returncode == 0, done.stderr
    rule = "\u2500" if encoding == "utf-8" else "-"
    assert (
        rule * 20 in said and ("\u5c42" in said) == (encoding == "utf-8") and ("?" * 4 in said) == (encoding != "utf-8")
    )
