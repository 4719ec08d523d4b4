"""Tests in a program whose default device and dtype are others: what the package makes must not follow them.

Under ``--other-defaults`` torch's defaults are the meta device and float64, as the package sees them. What the tests
themselves make, and the models in them, stays on the CPU in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_ROOT = str(Path(__file__).resolve().parents[1])
_TESTS = str(Path(__file__).resolve().parent)
# these look at the call that goes past torch's modes, and a default device is a mode
PAST_MODES = ("test_eager.py", "test_eager_binding.py", "test_layer_call.py", "test_layer_call_traced.py")


class _OfTheTests(TorchFunctionMode):
    """Calls that tests make, or that come from outside the package, see the usual defaults."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _from_the_package(sys._getframe(1)):
            return func(*args, **kwargs)
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)


def _from_the_package(frame: FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ROOT) and "site-packages" not in name:
            return not name.startswith(_TESTS)
        frame = frame.f_back
    return False


@contextmanager
def other_defaults() -> Iterator[None]:
    """The defaults are others while this lasts."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), _OfTheTests():
            yield
    finally:
        torch.set_default_dtype(dtype)
