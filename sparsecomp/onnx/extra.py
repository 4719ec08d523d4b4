"""Imports of the ``onnx`` extra at the moment they are needed, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from sparsecomp.errors import BackendError


def require(module: str) -> Any:
    """The module of that name, such as "onnx" or "onnxruntime".

    Raises BackendError, naming the extra, if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f'the package "{module}" cannot be imported ({error}); install it with: pip install "sparsecomp[onnx]"'
        ) from error
