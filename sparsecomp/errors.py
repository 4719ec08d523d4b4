"""The errors a user can meet. Every message is one sentence: what was got, what is allowed, how to fix it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SparsecompError(Exception):
    """Base of every error this package raises on purpose."""


class PatternError(SparsecompError, ValueError):
    """A pattern that cannot be parsed, or a weight that does not fit its pattern."""


class FormatError(SparsecompError, ValueError):
    """A file or a packed tensor that is truncated, tampered with, of another version or of the wrong shape."""


class BackendError(SparsecompError, RuntimeError):
    """A kernel that cannot run this request on this machine, with the reason."""


class CalibrationError(SparsecompError, ValueError):
    """Calibration data that is missing, of the wrong size or not finite."""


class ModelError(SparsecompError, ValueError):
    """A model or layer that cannot be treated as asked."""


class MethodError(SparsecompError, ValueError):
    """A pruning method that does not exist, or that lacks what it needs."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a layer, "" being the model itself, before the message of an error raised within."""
    try:
        yield
    except SparsecompError as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error
