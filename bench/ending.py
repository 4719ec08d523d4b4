"""How programs that measure end: with a table and, if asked for, a file, or with an error in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsecomp.benchmark.sweep import write
from sparsecomp.errors import SparsecompError


def ended(measure: Callable[[], dict[str, Any]], summary: Callable[[dict[str, Any]], str], output: Path | None) -> int:
    """The exit status of a program: 0 after ``summary`` of what ``measure`` gave was printed, 1 after an error was."""
    try:
        result = measure()
    except SparsecompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(result))
    if output is not None:
        write(result, output)
    return 0
