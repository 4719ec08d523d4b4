"""Which packages are there, as an import tells: what is installed need not work.

Takes names, gives versions and reasons. Knows nothing of models; torch itself may be missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sparsecomp.errors import BackendError

_PATIENCE = 120.0


@dataclass(frozen=True)
class Found:
    """The version of a package (None: it is not installed), and why it cannot be imported (None: it can)."""

    version: str | None
    problem: str | None = None

    def __str__(self) -> str:
        """The state in a few words."""
        if self.version is None:
            return "not installed"
        return self.version if self.problem is None else f"{self.version}, but cannot be imported ({self.problem})"


def missing_torch() -> str | None:
    """Why torch cannot be imported, or None."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        # a broken library of torch raises an OSError
        return f"torch cannot be imported ({_told(error)}); install it with: pip install torch"
    return None


def require_torch() -> None:
    """BackendError, with the way to install it, where torch cannot be imported."""
    if reason := missing_torch():
        raise BackendError(reason)


def look(names: Iterable[str]) -> dict[str, Found]:
    """Each package as an import in a process of its own finds it, all at once: a crash there ends nothing here."""
    versions = {name: _version(name) for name in names}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"import {name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
        )
        for name, found in versions.items()
        if found is not None
    }
    return {name: Found(found, _problem(running[name]) if found else None) for name, found in versions.items()}


def _problem(process: subprocess.Popen[str]) -> str | None:
    try:
        _, error = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"its import takes longer than {_PATIENCE:.0f} s"
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"its import ends Python with signal {-process.returncode}"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"its import ends Python with code {process.returncode}"


def _version(package: str) -> str | None:
    if find_spec(package) is None:
        return None
    for distribution in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "installed"


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
