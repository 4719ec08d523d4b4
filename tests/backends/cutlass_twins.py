"""Puts the slow twin of the CUTLASS kernels (``cutlass_twin.cpp``) in their place: all but the launch is real."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.backend import CutlassBackend
from sparsecomp.backends.gpu.cutlass.config import Config
from sparsecomp.backends.gpu.cutlass.library import Place

_ELEMENTS = {"float16": 0, "bfloat16": 1, "float8_e4m3fn": 2}


class Twins:
    """Compiles a twin for each element type in ``folder``; gives them in place of the libraries, in a list too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[Config] = []

    def load(self, config: Config) -> ctypes.CDLL:
        """In place of ``cutlass_library.load``."""
        self.loaded.append(config)
        path = self.folder / f"twin-{config.element}.so"
        if not path.exists():
            here = Path(__file__).parent
            command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
            command += [f"-DELEMENT={_ELEMENTS[config.element]}", f"-I{here.parents[1] / 'csrc' / 'cuda'}"]
            subprocess.run([*command, str(here / "cutlass_twin.cpp"), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
        library.sparsecomp_wgmma_sp_error.restype = ctypes.c_char_p
        return library


@pytest.fixture(scope="session")
def twin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("twins")


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch, twin_folder: Path) -> Twins:
    if shutil.which("g++") is None:
        pytest.skip("the twin of the kernels needs g++")
    twins = Twins(twin_folder)
    tuning = cutlass_library._tuning()
    monkeypatch.setattr(cutlass_library, "load", twins.load)
    monkeypatch.setattr(cutlass_library, "where", lambda x: Place(0, 132, 0))
    monkeypatch.setattr(tuning, "tuned", lambda key, options, run: options[0])
    monkeypatch.setattr(CutlassBackend, "supports", lambda self, request: None)
    monkeypatch.setattr(CutlassBackend, "missing", lambda self: None)
    return twins
