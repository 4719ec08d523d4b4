"""Tests in a program whose default device and dtype are others: what the package makes must not follow them.

Under ``--other-defaults`` torch's defaults are the meta device and float64, as the package sees them. What the tests
themselves make, and the models in them, stays on the CPU in float32.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = tuple(str(_ROOT / folder) for folder in ("sparsecomp", "kernels"))
_STANDARD = str(Path(contextlib.__file__).parent)
_default_dtype = torch.get_default_dtype
# these look at the call that goes past torch's modes, and a default device is a mode
PAST_MODES = (
    *("nn/test_eager.py", "nn/test_eager_binding.py", "nn/test_eager_hidden.py", "nn/test_eager_probe.py"),
    *("nn/test_calls.py", "nn/test_traced.py", "nn/test_following.py", "nn/test_training.py"),
)
# strict export is TorchDynamo's, which cannot trace the mode
TRACED = ("test_export_with_dynamic_batch",)


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
        if _default_dtype() is not torch.float64:  # of a library that sets one for a while
            return func(*args, **kwargs)
        torch.set_default_dtype(torch.float32)
        try:
            return func(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float64)


def _from_the_package(frame: FrameType | None) -> bool:
    """Whether the nearest caller that is no library's is the package, not a test or a module that a test wrote."""
    while frame is not None:
        name = frame.f_code.co_filename
        mode = frame.f_code.co_name == "__torch_function__"  # of the package, which hands on what others call
        if not mode and not name.startswith((_STANDARD, "<")) and "site-packages" not in name:
            return name.startswith(_PACKAGE)
        frame = frame.f_back
    return False


def _not_traced(*args: Any, **kwargs: Any) -> Any:
    pytest.skip("TorchDynamo cannot trace the mode that makes the defaults others")


@contextmanager
def other_defaults() -> Iterator[None]:
    """The defaults are others while this lasts."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    # a new SparseLinear is to follow the defaults, as nn.Linear does; the tests' own are made for the CPU
    asked = mock.patch.multiple(
        "torch", get_default_device=lambda: torch.device("cpu"), get_default_dtype=lambda: torch.float32
    )
    compiled = mock.patch("torch.compile", _not_traced)
    try:
        with asked, compiled, torch.device("meta"), _OfTheTests():
            yield
    finally:
        torch.set_default_dtype(dtype)
