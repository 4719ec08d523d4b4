"""What is chosen, and what explain() says, on GPUs that are old, new, full or short of software; all are pretended."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecomp.backends import explain as report
from sparsecomp.backends import registry
from sparsecomp.backends.base import Kernel
from sparsecomp.backends.choice import Choice
from sparsecomp.backends.cpu import CpuBackend
from sparsecomp.backends.explain import Explanation, explain_kernel
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.registry import backends, choose, explain, prepared, sparse_backends
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.machine import bound as cost
from sparsecomp.machine.bound import Bound
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.native import native
from sparsecomp.machine.request import Request
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT

HALF = torch.float16
NM = parse("2:4")
Pretend = Callable[..., None]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cuda._missing_compiler.cache_clear()
    registry._warn_once.cache_clear()
    yield
    cuda._missing_compiler.cache_clear()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """GPUs of these capabilities, with a Triton of that version (None: absent) and, if asked for, cuSPARSELt."""

    def use(*capabilities: tuple[int, int], triton: str | None = "3.7.1", cusparselt: bool = False) -> None:
        def capability(device: Any) -> tuple[int, int]:
            return capabilities[torch.device(device).index or 0]

        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
        module = None if triton is None else SimpleNamespace(__version__=triton)
        monkeypatch.setitem(sys.modules, "triton", module)
        monkeypatch.setitem(sys.modules, "sparsecomp.kernels.gluon_compat", SimpleNamespace())
        monkeypatch.setattr(cuda, "_triton_starts", lambda: False)

    return use


def _request(device: str = "cuda:0") -> Request:
    return Request(NM, (64, 64), HALF, device, 1)


def _explained(backend: str, monkeypatch: pytest.MonkeyPatch, device: str = "cuda:0") -> Explanation:
    """explain() of a layer of that backend on that GPU, without the GPU's peaks."""
    major, minor = torch.cuda.get_device_capability(device)
    gpu = Device("cuda", "a GPU", f"sm_{major}{minor}", 100, None, 50 << 20, None, torch.device(device).index)
    monkeypatch.setattr(report, "detect", lambda place: gpu)
    monkeypatch.setattr(cost, "bound", lambda request, device, warm: Bound(1.5, "compute", 1.0, 1.0))
    return explain_kernel(_kernel(backend, device), 1, Choice(NM))


def _kernel(backend: str, device: str) -> Kernel:
    there: Any = SimpleNamespace(device=torch.device(device))
    return Kernel(backend, (there, there), NM, (64, 64), HALF, FLOAT)


def test_an_old_gpu_falls_back_to_dense_with_the_reason(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((7, 5), cusparselt=True)
    assert choose(_request()) == "dense"
    explanation = _explained("dense", monkeypatch)
    reasons = dict(explanation.rejected)
    for name in ("cusparselt", "triton", "gluon", "cutlass"):
        assert "a GPU has compute capability 7.5" in reasons[name]
    assert "compute capability 7.5; 8.0 (Ampere) or newer is needed" in str(explanation) and not explanation.notes


@pytest.mark.parametrize("cusparselt", [True, False])
def test_a_gpu_without_triton(pretend: Pretend, cusparselt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSPARSELt needs no Triton, so 2:4 goes there where torch has it; everything else runs dense."""
    pretend((9, 0), triton=None, cusparselt=cusparselt)
    assert choose(_request()) == ("cusparselt" if cusparselt else "dense")
    assert choose(replace(_request(), pattern=parse("8:16"))) == "dense"
    explanation = _explained("dense", monkeypatch)
    for name in ("triton", "gluon"):
        assert "Triton cannot be imported" in dict(explanation.rejected)[name]
    assert "install sparsecomp[triton]" in str(explanation)


@pytest.mark.parametrize("capability", [(8, 7), (10, 0), (12, 0)])
def test_untested_architectures_are_named(
    pretend: Pretend, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(capability)
    note = f"not certified on sm_{capability[0]}{capability[1]}: the kernels are compiled and checked for sm_80, sm_86"
    text = str(_explained("triton", monkeypatch))
    assert f"  note      {note}" in text
    assert not _explained("cusparselt", monkeypatch).notes  # the vendor's own
    pretend((9, 0))
    assert not _explained("triton", monkeypatch).notes


def test_the_gpu_of_the_weight_is_asked_not_the_current_one(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((7, 5), (8, 9))
    assert choose(_request("cuda:0")) == "dense" and choose(_request("cuda:1")) == "semi_structured"
    assert _explained("triton", monkeypatch, "cuda:1").request.device == "cuda:1"
    asked: list[str] = []

    def answer(request: Request) -> list[tuple[str, str | None]]:
        asked.append(request.device)
        return [("dense", "asked enough")]

    monkeypatch.setattr(registry, "explain", answer)
    weight: Any = SimpleNamespace(device=torch.device("cuda:1"), shape=(64, 64), dtype=HALF, numbers=FLOAT)
    with pytest.raises(BackendError, match="asked enough"):
        prepared(weight, Choice(NM))
    assert set(asked) == {"cuda:1"}


def test_devices_have_an_index(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((8, 0), (9, 0))
    facts = [
        SimpleNamespace(name=f"GPU {i}", major=8 + i, minor=0, multi_processor_count=9, L2_cache_size=1) for i in (0, 1)
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert (detect("cuda:0").isa, detect("cuda").isa, detect("cuda").place) == ("sm_80", "sm_90", "cuda:1")
    with pytest.raises(BackendError, match='"cuda:2" is not there; torch sees 2'):
        detect("cuda:2")


def test_a_gpu_without_memory_for_measuring_has_no_bound(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Bound:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pretend((9, 0))
    _explained("triton", monkeypatch)
    monkeypatch.setattr(cost, "bound", full)
    explanation = explain_kernel(_kernel("triton", "cuda:0"), 1, Choice(NM))
    assert explanation.bound is None and "the bound is unknown" in str(explanation)
    assert cost.known_bounds({1: _request()}, detect("cpu"), {1: True}) == {}


@pytest.mark.parametrize(
    ("capability", "path"),
    [((8, 0), "gluon"), ((8, 9), "gluon"), ((9, 0), "cutlass"), ((10, 0), None), ((12, 0), None)],
)
def test_one_way_to_the_sparse_tensor_cores_is_taken_unasked(
    pretend: Pretend, capability: tuple[int, int], path: str | None
) -> None:
    pretend(capability)
    assert backends()["cutlass"].by_name_only(_request()) is None, "it runs on no other architecture"
    for name in ("gluon", "gluon_wgmma"):
        reason = backends()[name].by_name_only(_request())
        if name == path:
            assert reason is None
        else:
            assert reason is not None and f'backend="{name}"' in reason and (path or "before hardware") in reason
    assert ("gluon" in sparse_backends(_request())) == (path == "gluon")


@pytest.mark.parametrize("cusparselt", [True, False])
def test_torchs_own_kernel_stands_in_where_there_is_no_cusparselt(pretend: Pretend, cusparselt: bool) -> None:
    pretend((8, 6), cusparselt=cusparselt)
    assert (backends()["semi_structured"].by_name_only(_request()) is None) == (not cusparselt)
    assert "semi_structured" not in sparse_backends(_request()) or not cusparselt


# --- Triton, its compiler and its versions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.5.1", "Triton 3.5.1 is too old; install 3.6 or newer"),
        ("main", 'Triton\'s version "main" cannot be read; install 3.6 or newer'),
        ("3.6.0+git12ab", None),
        ("4.0.0", None),
    ],
)
def test_versions_of_triton(pretend: Pretend, version: str, reason: str | None) -> None:
    pretend((8, 9), triton=version)
    assert cuda.missing_triton() == reason


def test_a_gluon_that_is_too_new_is_a_reason(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend((8, 9), triton="3.10.0")
    assert cuda.missing_triton() is None
    reason = dict(explain(_request()))["gluon"]
    assert reason == "Gluon of Triton 3.10.0 is newer than the kernels, which compile with 3.6 to 3.9; install 3.9"
    pretend((8, 9), triton="3.9.0")
    assert cuda.missing_gluon() is None
    monkeypatch.setitem(sys.modules, "sparsecomp.kernels.gluon_compat", None)
    assert str(cuda.missing_gluon()).startswith("Gluon of Triton 3.9.0 lacks what the kernels need (")


def test_a_machine_where_triton_can_build_nothing(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend((8, 9))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    expected = "Triton needs a C compiler to talk to the driver; install gcc or set CC"
    assert cuda.missing_triton() == expected and cuda.missing_gluon() == expected
    assert choose(replace(_request(), pattern=parse("8:16"))) == "dense"
    cuda._missing_compiler.cache_clear()
    monkeypatch.setenv("CC", "nothing-here")
    assert "CC names nothing-here" in str(cuda.missing_triton())
    cuda._missing_compiler.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert f"Triton needs {tmp_path / 'Python.h'} to talk to the driver" in str(cuda.missing_triton())
    cuda._missing_compiler.cache_clear()
    monkeypatch.setattr(cuda, "_triton_starts", lambda: True)  # built before, and kept
    assert cuda.missing_triton() is None
    cuda._missing_compiler.cache_clear()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(cuda, "_triton_starts", lambda: False)
    assert cuda.missing_triton() is None


def test_starting_triton_without_a_driver_fails_quietly() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert cuda._triton_starts() == torch.cuda.is_available()


# --- a backend that says yes and then fails ---------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(isinstance(native(), str), reason="needs the compiled extension")


def _weight() -> torch.Tensor:
    return torch.tensor([[1.0, 0.0, 2.0, 0.0]]).repeat(8, 4)


@needs_kernel
def test_the_next_backend_is_taken_and_the_reason_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(self: object, packed: object) -> Kernel:
        raise RuntimeError("Triton Error [CUDA]: no launch\nmore")

    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(CpuBackend, "prepare", fail)
    for _ in range(2):
        layer = SparseLinear.from_packed(pack(_weight(), NM))
    assert layer.kernel.backend == "dense"
    warned = [str(each.message) for each in recwarn if "could not prepare" in str(each.message)]
    assert len(warned) == 1 and warned[0].startswith("the cpu backend could not prepare a 2:4 weight (8, 16): Triton")
    reason = dict(layer.explain().rejected)["cpu"]
    assert reason == "could not prepare this weight (Triton Error [CUDA]: no launch)"
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), x @ _weight().T)
    with pytest.raises(RuntimeError, match="no launch"):
        SparseLinear.from_packed(pack(_weight(), NM), backend="cpu")


@needs_kernel
def test_errors_of_the_weight_and_of_our_own_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: object, packed: object) -> Kernel:
        raise TypeError("a bug")

    with pytest.raises(PatternError, match="row 0, group 0"):
        prepared(torch.ones(8, 16), Choice(NM))
    monkeypatch.setattr(CpuBackend, "prepare", bug)
    with pytest.raises(TypeError, match="a bug"):
        prepared(_weight(), Choice(NM))


def test_when_every_backend_fails_all_reasons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, weight: object, pattern: object) -> Kernel:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(registry, "_prepare", fail)
    with (
        pytest.raises(BackendError, match=r"no backend could prepare .*\(dense is broken\); reference could not"),
        pytest.warns(UserWarning, match="could not prepare"),
    ):
        prepared(_weight(), Choice(NM))
