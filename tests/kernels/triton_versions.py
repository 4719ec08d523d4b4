"""Runs the tests marked ``every_triton`` with another Triton than the environment's, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSIONS = tuple((HERE / "tritons.txt").read_text().split())
"""The oldest and the newest Triton that are supported; ``make tritons`` installs them."""

EXPECTED = "SPARSECOMP_TEST_TRITON"
"""The environment variable that tells a run which Triton it is to find."""


class Evidence:
    """One run. ``folder`` is where ``make tritons`` puts that version: nothing there, no run."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.folder = Path(sys.prefix, "tritons", version)
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop
        self._process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        """Begin, if the version is there; ``arguments`` are pytest's, by default all tests with the marker."""
        # such a run must start no other
        if EXPECTED in os.environ or not (self.folder / "triton").is_dir():
            return
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        chosen = arguments or ("-m", "every_triton", str(HERE))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", EXPECTED: self.version},
            cwd=HERE.parents[1],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self, timeout: float = 900) -> tuple[int, int, str] | None:
        """Exit status, how many tests passed, and the output, once it has ended; None if the version is not there."""
        if self._process is None:
            return None
        status = self._process.wait(timeout)
        self._output.seek(0)
        text = self._output.read()
        passed = re.search(r"(\d+) passed", text)
        return status, int(passed[1]) if passed else 0, text

    def stop(self) -> None:
        """End the run if nobody waited for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
