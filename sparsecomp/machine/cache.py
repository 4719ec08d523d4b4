"""Small JSON files in the user's cache directory: what was measured on this machine, nothing that matters if lost.

``SPARSECOMP_CACHE`` names another directory, or "off" for none; otherwise ``XDG_CACHE_HOME`` is followed.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

_memory: dict[str, dict[str, Any]] = {}


def directory() -> Path | None:
    """Where the files are, or None if nothing is kept."""
    chosen = os.environ.get("SPARSECOMP_CACHE", "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsecomp"


def read(name: str) -> dict[str, Any]:
    """The entries of one file: those on disk, then those of this process. A damaged file is ignored with a warning."""
    place = directory()
    if place is None:
        return {}
    path = place / f"{name}.json"
    kept = _memory.get(str(path), {})
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return dict(kept)
    except (OSError, ValueError) as error:
        warnings.warn(f"measurements in {path} are ignored: {error}; delete the file", stacklevel=2)
        return dict(kept)
    return {**stored, **kept}


def store(name: str, key: str, value: Any) -> None:
    """Add one entry; the file is replaced in one step, so that a reader never sees half of it."""
    place = directory()
    if place is None:
        return
    path = place / f"{name}.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file was named when it was read
        entries = {**read(name), key: value}
    _memory.setdefault(str(path), {})[key] = value
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        warnings.warn(
            f"measurements cannot be kept in {place}: {error}; set SPARSECOMP_CACHE to another directory or to off",
            stacklevel=2,
        )
