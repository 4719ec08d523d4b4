"""Other engines beside torch: what each takes, what is remembered, and that one which fails stops nobody else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecomp.engines import peers as module
from sparsecomp.engines.base import Engine, Loaded, Operands
from sparsecomp.engines.peers import Peers
from sparsecomp.engines.pytorch import TorchEngine
from sparsecomp.errors import SparsecompError
from sparsecomp.machine import cache
from sparsecomp.machine.device import detect
from sparsecomp.patterns.numbers import INT8_A8


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(module, "_STEADY", float("inf"))
    return tmp_path


class Other(Engine):
    """Computes with torch, under another name, in fp32 alone."""

    name = "other"

    def missing(self, dtype: str) -> str | None:
        return None if dtype == "fp32" else "it takes fp32"

    def load(self, operands: Operands) -> Loaded:
        return TorchEngine().load(operands)


class Wrong(Other):
    name = "openvino wrong"
    numbers = INT8_A8

    def load(self, operands: Operands) -> Loaded:
        return TorchEngine().load(Operands(operands.weights, operands.bias + 1, operands.dtype))


class Failing(Other):
    name = "failing"

    def load(self, operands: Operands) -> Loaded:
        raise ValueError("out of luck")


class Absent(Other):
    name = "onnxruntime"

    def missing(self, dtype: str) -> str | None:
        return "it is not installed"


@pytest.mark.slow
def test_engines_are_timed_and_those_that_cannot_be_are_named(kept: Path) -> None:
    listed = [Other(), Wrong(), Failing(), Absent(), TorchEngine()]
    with Peers(detect("cpu"), listed) as peers:
        for dtype in (torch.bfloat16, torch.float32):  # what takes no bf16 is given fp32
            found = peers.seconds((24, 40), dtype, (1, 5), 3)
            assert found.keys() == {"other fp32"} and found["other fp32"].keys() == {1, 5}
            assert all(seconds > 0 for seconds in found["other fp32"].values())
    assert peers.missing.keys() == {"OpenVINO wrong", "failing fp32", "ONNX Runtime"}
    assert "in int8; its time would mean nothing" in peers.missing["OpenVINO wrong"]
    assert peers.missing["failing fp32"].endswith("failed in its process: ValueError: out of luck")
    assert peers.missing["ONNX Runtime"] == "it is not installed"
    # known times start no process
    with Peers(detect("cpu"), [Other()]) as again:
        again._start = None  # type: ignore[assignment,method-assign]
        assert again.seconds((24, 40), torch.float32, (1, 5), 3) == found
        with pytest.raises(TypeError):
            again.seconds((24, 40), torch.float32, (1, 5), 2)


def test_a_damaged_or_older_entry_is_measured_again(kept: Path) -> None:
    peers = Peers(detect("cpu"), [Other()])
    key = peers._key((24, 40), torch.float32, 1, 3)
    ready = {"other fp32": None}
    for entry in (None, [], {}, {"other fp32": 0.0}, {"other fp32": "fast"}, {"other fp32": 1e-5, "gone": 1e-5}):
        cache.store("engines", key, entry)
        assert module._known(key, ready) is None
    cache.store("engines", key, {"other fp32": 1e-5})
    assert module._known(key, ready) == {"other fp32": 1e-5}


@dataclass
class Fake:
    """A worker that fails when it is told or when it is asked."""

    fails: str = ""

    def tell(self, method: str, *arguments: Any) -> None:
        if self.fails == "tell":
            raise SparsecompError("its process has ended")

    def answer(self) -> str:
        if self.fails == "answer":
            raise SparsecompError("it failed")
        return "yes"


def test_answers_are_kept_where_another_fails() -> None:
    asked: Any = {name: (Fake(name), ()) for name in ("fine", "tell", "answer")}
    given, failed = module.answers(asked, "load")
    assert given == {"fine": "yes"} and failed == {"tell": "its process has ended", "answer": "it failed"}


@pytest.mark.slow
def test_a_program_is_not_run_again_by_the_processes_it_starts(tmp_path: Path) -> None:
    """Nobody guards a script that plans with ``if __name__ == "__main__"``."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom sparsecomp.engines.worker import workers\nprint('once')\n"
        "with workers({'one': dict}, 1) as started:\n    print(started['one'].ask('get', 'x'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "once\nNone\n"), done.stderr
