"""Libraries built with the package: which are taken, which are ignored and why, and what CMake does to build them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsecomp
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.build import Toolchain, file_name, libraries, main, toolchain, why_not
from sparsecomp.errors import BackendError
from tests.backends.cutlass_machine import ALL, ONE, Machine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(tmp_path, monkeypatch)
    toolchain.cache_clear()


@pytest.fixture
def package(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package that CMake fills, still empty."""
    folder = tmp_path / "package" / "cutlass_libraries"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cutlass_build, "_PREBUILT", folder.name)
    monkeypatch.setattr(sparsecomp, "__path__", [str(Path(sparsecomp.__file__).parent), str(folder.parent)])
    return folder


def _name() -> str:
    tools = toolchain()
    assert isinstance(tools, Toolchain)
    return file_name(ONE[0], tools)


def test_what_was_built_with_the_package_is_taken_first(
    machine: Machine, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning):
        compiled = libraries(ONE)
    built = package / _name()
    built.write_text("built")
    assert libraries(ONE) == {ONE[0]: built} != compiled
    # whatever tools built it, and where there are none
    other = built.rename(package / f"{built.stem[:-8]}00000000.so")
    monkeypatch.setattr(cutlass_build, "_nvcc", lambda: "finds no nvcc")
    machine.forget()
    assert why_not(ONE) is None and libraries(ONE) == {ONE[0]: other}
    assert why_not(ALL) == "finds no nvcc"


def test_what_was_built_of_other_sources_is_ignored_and_named(
    machine: Machine, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = cutlass_build._source_key(ONE[0])
    stale = package / _name().replace(key, key[::-1])
    stale.write_text("built")
    with pytest.warns(
        UserWarning, match=f"compiling 1 .*being built of other sources than this package's: {stale.name}"
    ):
        assert libraries(ONE)[ONE[0]].parent == machine.cache / "cutlass"
    shutil.rmtree(machine.cache)
    monkeypatch.setattr(cutlass_build, "_nvcc", lambda: "finds no nvcc")
    machine.forget()
    reason = str(why_not(ONE))
    assert reason.startswith("finds no nvcc (ignored, being built of other sources") and stale.name in reason
    assert reason.endswith("reinstall sparsecomp)")


def test_a_damaged_library_is_named(machine: Machine, package: Path) -> None:
    (package / _name()).write_text("built")
    cutlass_library.load.cache_clear()
    with pytest.raises(BackendError, match=rf"{_name()} cannot be loaded .*; delete the file"):
        cutlass_library.load(ONE[0])


def test_the_plan_names_tools_and_files(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--types", "bfloat16,fp8", "--plan"]) == 0
    nvcc, headers, *lines = capsys.readouterr().out.splitlines()
    assert (nvcc, headers) == (str(machine.cuda / "bin" / "nvcc"), str(machine.cutlass / "include"))
    assert len(lines) == 10 and lines[0] == f"{ONE[0]} {_name()}"
    assert machine.commands() == []
    for arguments, message in (
        (
            ["--types", "bfloat17"],
            "there are no CUTLASS kernels for the type 'bfloat17'; use one of bfloat16, float16, fp8, fp8-fast",
        ),
        (["--compile", "other", "file"], "other is no configuration; use one of bfloat16-128x128-2x1"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def _cmake() -> str:
    path = Path(sys.executable).parent
    found = shutil.which("cmake", path=str(path)) or shutil.which("cmake")
    if found is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    return found


def _configured(build: Path, *definitions: str) -> subprocess.CompletedProcess[str]:
    wanted = [f"-D{each}" for each in ("SPARSECOMP_ORT=OFF", f"Python_EXECUTABLE={sys.executable}", *definitions)]
    command = [_cmake(), "-S", str(ROOT), "-B", str(build), "-G", "Unix Makefiles", *wanted]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _made(build: Path) -> subprocess.CompletedProcess[str]:
    command = [_cmake(), "--build", str(build), "--target", "sparsecomp_cutlass", "--parallel", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_cmake_builds_what_the_loader_looks_for(machine: Machine, tmp_path: Path, package: Path) -> None:
    build = tmp_path / "build"
    done = _configured(build, "SPARSECOMP_CUTLASS_TYPES=bfloat16,float16")
    assert done.returncode == 0 and "CUTLASS kernels: 10 libraries (bfloat16,float16) with" in done.stdout, done.stderr
    done = _made(build)
    assert done.returncode == 0 and len(machine.commands()) == 10, done.stdout + done.stderr
    done = _made(build)
    assert done.returncode == 0 and len(machine.commands()) == 10, "nothing is compiled twice"
    install = [_cmake(), "--install", str(build), "--component", "cutlass", "--prefix", str(package.parent)]
    subprocess.run(install, check=True, capture_output=True)
    machine.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {path.parent for path in libraries((*ONE, *ALL)).values()} == {package}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_compiler_that_fails_costs_the_build_only_where_it_was_asked_for(machine: Machine, tmp_path: Path) -> None:
    machine.fail.touch()
    assert _configured(tmp_path / "auto", "SPARSECOMP_CUTLASS=AUTO").returncode == 0
    done = _made(tmp_path / "auto")
    assert done.returncode == 0 and "warning: " in done.stderr and "error: no room" in done.stderr
    assert list((tmp_path / "auto" / "cutlass_libraries").iterdir()) == []
    assert _configured(tmp_path / "on", "SPARSECOMP_CUTLASS=ON").returncode == 0
    done = _made(tmp_path / "on")
    assert done.returncode != 0 and "error: no room" in done.stderr


@pytest.mark.slow
def test_cmake_without_tools(machine: Machine, tmp_path: Path) -> None:
    machine.headers("3", "5")
    done = _configured(tmp_path / "build")
    reason = "the cutlass backend needs CUTLASS 4.2 or newer"
    assert done.returncode == 0 and f"-- CUTLASS kernels: not built, {reason}" in done.stdout
    done = _configured(tmp_path / "build", "SPARSECOMP_CUTLASS=ON")
    assert done.returncode != 0 and f"SPARSECOMP_CUTLASS=ON, but {reason}" in " ".join(done.stderr.split())
    assert done.stderr.count("CMake Error") == 1
    done = _configured(tmp_path / "build", "SPARSECOMP_CUTLASS=OFF")
    assert done.returncode == 0 and "CUTLASS kernels: not built (SPARSECOMP_CUTLASS=OFF)" in done.stdout
    done = _configured(tmp_path / "build", "SPARSECOMP_CUTLASS=perhaps")
    assert done.returncode != 0 and "SPARSECOMP_CUTLASS is perhaps; set it to AUTO, ON or OFF" in done.stderr
    machine.headers("4", "2")
    other = f"CUTLASS_PATH={machine.cutlass}"
    done = _configured(tmp_path / "build", "SPARSECOMP_CUTLASS=ON", other, "SPARSECOMP_CUTLASS_TYPES=fp8")
    assert done.returncode == 0 and "CUTLASS kernels: 5 libraries (fp8)" in done.stdout
