"""A machine with a CUDA compiler and CUTLASS, both made up; nvcc is a shell script that keeps a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass.build import toolchain
from sparsecomp.backends.gpu.cutlass.config import configs

ONE = configs("bfloat16", "bfloat16")[:1]
ALL = configs("float16", "float16")

NVCC = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;; esac
echo "$@" >> "{log}"
if [ -e "{fail}" ]; then echo "first line"; echo "error: no room"; exit 2; fi
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


class Machine:
    """A machine with a compiler and CUTLASS, both made up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.fail, self.cache = folder / "log", folder / "fail", folder / "cache"
        self.cuda, self.cutlass = folder / "cuda", folder / "cutlass"
        self.compiler("13.0")
        headers = self.cutlass / "include" / "cutlass"
        headers.mkdir(parents=True)
        (headers / "cutlass.h").touch()
        self.headers("4", "2")
        monkeypatch.setenv("CUDA_HOME", str(self.cuda))
        monkeypatch.setenv("CUTLASS_PATH", str(self.cutlass))
        monkeypatch.setenv("SPARSECOMP_CACHE", str(self.cache))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setattr(cutlass_build, "find_spec", lambda name: None)
        monkeypatch.setattr(cutlass_build, "_failed", {})
        # what this machine's package was really built with
        monkeypatch.setattr(cutlass_build, "_PREBUILT", "no_such_folder")
        self.forget()

    def forget(self) -> None:
        """What a new process knows."""
        toolchain.cache_clear()
        cutlass_build._failed.clear()

    def compiler(self, release: str) -> None:
        path = self.cuda / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NVCC.format(release=release, log=self.log, fail=self.fail))
        path.chmod(0o755)

    def headers(self, major: str, minor: str) -> None:
        text = f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 0\n"
        (self.cutlass / "include" / "cutlass" / "version.h").write_text(text)

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []
