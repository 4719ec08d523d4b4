"""A GPU that is too old, or no Triton that fits: dense products, each sparse backend's reason, and no traceback."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sparsecomp.backends import explain as report
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.dense import DenseBackend
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.experimental.gluon_numbers import GluonInt8Backend, GluonTf32Backend
from sparsecomp.backends.gpu.gluon import GluonBackend
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.backends.registry import choose, explain
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse

OURS = ("triton", "gluon")


def _machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)


def _triton(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = ModuleType("triton")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", module)


def _request(pattern: str = "2:4", dtype: torch.dtype = torch.float16) -> Request:
    return Request(parse(pattern), (64, 64), dtype, "cuda", 8)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "64:2:8", "block32x32:0.5"])
def test_a_turing_gpu_multiplies_dense(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, (7, 5))
    _triton(monkeypatch, "3.7.1")
    assert choose(_request(pattern)) == "dense"
    reasons = dict(explain(_request(pattern)))
    for name in (*OURS, "triton_block"):
        assert reasons[name] == "GPU has compute capability 7.5; 8.0 (Ampere) or newer is needed"
    assert all(reasons[name] is not None for name in ("cusparselt", "cutlass", "gluon_wgmma", "cpu"))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_a_gpu_without_triton_multiplies_dense(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, capability)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("PATH", "")  # nor a compiler for cutlass
    # what needs no Triton
    for backend in ("cutlass.backend.CutlassBackend", "semi_structured.SemiStructuredBackend"):
        monkeypatch.setattr(f"sparsecomp.backends.gpu.{backend}.missing", lambda self: "has no library here")
    assert choose(_request()) == "dense"
    reasons = dict(explain(_request()))
    for name in OURS:
        assert str(reasons[name]).startswith("Triton cannot be imported")
        assert str(reasons[name]).endswith("install sparsecomp[triton]")


class _OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_a_layer_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = DenseBackend().prepare(pack(torch.zeros(64, 64, dtype=torch.float16), "2:4"))
    tensors = tuple(tensor.as_subclass(_OnGpu) for tensor in kernel.tensors)  # type: ignore[no-untyped-call]
    _machine(monkeypatch, (7, 5))
    _triton(monkeypatch, "3.7.1")
    monkeypatch.setattr(report, "known_bound", lambda *arguments, **others: None)
    monkeypatch.setattr(report, "lookup", lambda *arguments, **others: None)
    monkeypatch.setattr(report, "detect", lambda device: SimpleNamespace(kind="cuda"))
    moved = Kernel("dense", tensors, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)
    text = str(report.explain_kernel(moved, 8, Choice(moved.pattern)))
    assert "on cuda" in text and "kernel    dense" in text
    for name in OURS:
        assert f"rejected  {name}: GPU has compute capability 7.5; 8.0 (Ampere) or newer is needed" in text


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.5.1", "Triton 3.5.1 is too old; install 3.6 or newer"),
        ("2.1", "Triton 2.1 is too old; install 3.6 or newer"),
        ("nightly", 'Triton\'s version "nightly" cannot be read; install 3.6 or newer'),
        ("3.6rc1", None),
        ("3.10.0+git1a2b", None),
        ("4.0", None),
    ],
)
def test_any_version_has_an_answer(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, (8, 9))
    _triton(monkeypatch, version)
    assert cuda.missing_triton() == reason
    assert TritonBackend().missing() == reason


def test_a_broken_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> str:
            raise RuntimeError("libtriton.so is truncated")

    monkeypatch.setitem(sys.modules, "triton", Broken())  # type: ignore[arg-type]
    assert cuda.missing_triton() == (
        "Triton cannot be imported (libtriton.so is truncated); install sparsecomp[triton]"
    )


@pytest.mark.parametrize("backend", [GluonBackend(), GluonTf32Backend(), GluonInt8Backend()], ids=lambda b: b.name)
def test_another_gluon_is_named(backend: GluonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, (8, 9))
    _triton(monkeypatch, "3.12.0")
    monkeypatch.delitem(sys.modules, "sparsecomp.kernels.gluon_compat", raising=False)
    assert backend.missing() == (
        "Gluon of Triton 3.12.0 is newer than the kernels, which compile with 3.6 to 3.9; install 3.9"
    )
    # what needs no Gluon goes on
    assert TritonBackend().missing() is None


def test_a_name_that_gluon_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.experimental.gluon import language

    _machine(monkeypatch, (8, 9))
    assert cuda.missing_gluon() is None
    monkeypatch.delitem(sys.modules, "sparsecomp.kernels.gluon_compat", raising=False)
    monkeypatch.delattr(language, "inline_asm_elementwise")
    assert cuda.missing_gluon() == (
        f"Gluon of Triton {triton.__version__} lacks what the kernels need (Gluon has no inline_asm_elementwise); "
        "install 3.9"
    )
