"""A model with sparse layers -> an ONNX file, the check of such a file, and a session that runs it fast.

Needs the ``onnx`` extra, imported when it is used. Must not know the backends: export runs without compiled code.
Each name is imported when it is first used, as only export needs torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomp.onnx.export import ExportReport, export_onnx
    from sparsecomp.onnx.session import onnx_session
    from sparsecomp.onnx.standin import ExportedLayer, exportable
    from sparsecomp.onnx.verify import VerifiedWeight, VerifyReport, verify
    from sparsecomp.onnx.verify import verify as verify_onnx
    from sparsecomp.onnx.walk import Unseen

__all__ = [
    "ExportReport",
    "ExportedLayer",
    "Unseen",
    "VerifiedWeight",
    "VerifyReport",
    "export_onnx",
    "exportable",
    "onnx_session",
    "verify",
    "verify_onnx",
]

_HOME = {
    "ExportReport": "export",
    "ExportedLayer": "standin",
    "Unseen": "walk",
    "VerifiedWeight": "verify",
    "VerifyReport": "verify",
    "export_onnx": "export",
    "exportable": "standin",
    "onnx_session": "session",
    "verify": "verify",
    "verify_onnx": "verify",
}


class _Package(ModuleType):
    """The module type of this package: the submodule ``verify`` never hides the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsecomp.onnx' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"sparsecomp.onnx.{_HOME[name]}"), "verify" if name == "verify_onnx" else name)
    globals()[name] = value
    return value
