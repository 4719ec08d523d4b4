"""What writing a file needs beforehand: its folder, and the library of the safetensors format."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sparsecomp.errors import FormatError, ModelError


def require_folder(path: Path) -> None:
    """Raises FormatError if the folder that ``path`` is to be written in is not there."""
    if not path.parent.is_dir():
        raise FormatError(f'"{path}" cannot be written: there is no folder "{path.parent}"; make it first')


def safetensors(module: str = "") -> Any:
    """The package safetensors or a module of it. Raises ModelError, saying how to install it, if it is not there."""
    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError as error:
        raise ModelError(
            f"safetensors cannot be imported ({error}); install it with: pip install safetensors"
        ) from error
