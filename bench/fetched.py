"""Where what benchmarks fetch is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from sparsecomp.errors import SparsecompError
from sparsecomp.machine.cache import directory

FOLDER = "SPARSECOMP_DATA"


def data_folder(name: str) -> Path:
    """$SPARSECOMP_DATA, or the folder ``name`` in the user's cache directory; SparsecompError if there is neither."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    cache = directory()
    if cache is None:
        raise SparsecompError(f"there is no cache directory to keep data in; set {FOLDER} to a folder")
    return cache / name
