"""Compiling on first use: what is looked for, what is kept, and what is said when it fails; nvcc is a shell script."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass.build import Toolchain, libraries, main, toolchain, why_not
from sparsecomp.errors import BackendError
from sparsecomp.machine.sources import cuda_folder
from tests.backends.cutlass_machine import ALL, ONE, Machine


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(tmp_path, monkeypatch)
    toolchain.cache_clear()


def test_a_library_is_compiled_once_and_kept(machine: Machine) -> None:
    assert why_not(ONE) is None
    with pytest.warns(UserWarning, match="compiling 1 CUTLASS kernels"):
        paths = libraries(ONE)
    path = paths[ONE[0]]
    assert path.read_text() == "library\n" and path.parent == machine.cache / "cutlass"
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing unfinished is left"
    machine.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert libraries(ONE) == paths
    assert len(machine.commands()) == 1
    command = machine.commands()[0].split()
    assert {"-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", "-DSC_TILE_OUT=128"} <= set(command)
    assert f"-I{machine.cutlass}/include" in command and str(cuda_folder() / "wgmma_sp.cu") in command


def test_every_configuration_has_a_library_of_its_own(machine: Machine) -> None:
    with pytest.warns(UserWarning, match=f"compiling {len(ALL)} CUTLASS kernels"):
        paths = libraries(ALL)
    assert len(set(paths.values())) == len(ALL) == len(machine.commands())


def test_other_tools_and_other_sources_compile_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning):
        first = libraries(ONE)
    machine.compiler("13.1")
    machine.forget()
    with pytest.warns(UserWarning):
        second = libraries(ONE)
    machine.headers("4", "3")
    machine.forget()
    with pytest.warns(UserWarning):
        third = libraries(ONE)
    monkeypatch.setattr(cutlass_build, "FLAGS", (*cutlass_build.FLAGS, "-lineinfo"))
    cutlass_build._source_key.cache_clear()
    with pytest.warns(UserWarning):
        fourth = libraries(ONE)
    monkeypatch.undo()
    cutlass_build._source_key.cache_clear()
    assert len({paths[ONE[0]] for paths in (first, second, third, fourth)}) == 4


def test_a_machine_without_tools_takes_what_another_compiled(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning):
        paths = libraries(ONE)
    monkeypatch.setattr(cutlass_build, "_nvcc", lambda: "finds no nvcc")
    machine.forget()
    assert why_not(ONE) is None and libraries(ONE) == paths
    assert why_not(ALL) == "finds no nvcc"
    with pytest.raises(BackendError, match="the cutlass backend finds no nvcc"):
        libraries(ALL)


def test_a_failure_is_named_and_not_tried_again(machine: Machine) -> None:
    machine.fail.touch()
    with (
        pytest.warns(UserWarning),
        pytest.raises(BackendError, match=r"could not compile bfloat16-128x128.*no room"),
    ):
        libraries(ONE)
    assert list((machine.cache / "cutlass").iterdir()) == []
    assert "error: no room" in str(why_not(ONE))
    with pytest.raises(BackendError, match="no room"):
        libraries(ONE)
    assert len(machine.commands()) == 1


def test_without_a_cache_the_process_keeps_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECOMP_CACHE", "off")
    with pytest.warns(UserWarning):
        paths = libraries(ONE)
    assert libraries(ONE) == paths and len(machine.commands()) == 1
    assert not machine.cache.exists()
    paths[ONE[0]].unlink()


@pytest.mark.parametrize(
    ("release", "reason"), [("12.2", "needs nvcc 12.3 or newer, and .* is release 12.2; set CUDA_HOME to a newer one")]
)
def test_an_old_compiler_is_named(machine: Machine, release: str, reason: str) -> None:
    machine.compiler(release)
    machine.forget()
    assert isinstance(toolchain(), str)
    with pytest.raises(BackendError, match=reason):
        libraries(ONE)


def test_a_broken_compiler_is_named(machine: Machine) -> None:
    (machine.cuda / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    assert str(why_not(ONE)).startswith(f"cannot run {machine.cuda}/bin/nvcc")


def test_old_or_missing_headers_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.headers("3", "5")
    assert "needs CUTLASS 4.2 or newer" in str(why_not(ONE)) and "holds 3.5" in str(why_not(ONE))
    machine.forget()
    monkeypatch.setenv("CUTLASS_PATH", str(machine.cache))
    assert "finds no CUTLASS headers; install them with: pip install --no-deps nvidia-cutlass" in str(why_not(ONE))


def test_the_headers_of_the_wheel_are_found(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = [str(tmp_path / "wheel")]  # noqa: RUF012

    (tmp_path / "wheel").mkdir()
    os.rename(machine.cutlass, tmp_path / "wheel" / "source")  # noqa: PTH104
    monkeypatch.setattr(cutlass_build, "find_spec", lambda name: Spec if name == "cutlass_library" else None)
    tools = toolchain()
    assert isinstance(tools, Toolchain) and tools.cutlass == tmp_path / "wheel" / "source" / "include"


def test_compiling_ahead(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning):
        assert main(["--types", "float16,fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and sum(line.startswith("float8_e4m3fn-bfloat16-") for line in lines) == 5
    machine.fail.touch()
    with pytest.warns(UserWarning):
        assert main(["--types", "bfloat16"]) == 1
    assert "no room" in capsys.readouterr().err
