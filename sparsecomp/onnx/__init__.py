"""A model with sparse layers -> an ONNX file, the check of such a file, and a session that runs it fast.

Needs the ``onnx`` extra, imported when it is used. Must not know the backends: export runs without compiled code.
Each name is imported when it is first used, as only export needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsecomp.onnx.export import ExportReport, export_onnx
    from sparsecomp.onnx.session import onnx_session
    from sparsecomp.onnx.standin import ExportedLayer, exportable
    from sparsecomp.onnx.verification import VerifiedWeight, VerifyReport, verify
    from sparsecomp.onnx.verification import verify as verify_onnx
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
    "VerifiedWeight": "verification",
    "VerifyReport": "verification",
    "export_onnx": "export",
    "exportable": "standin",
    "onnx_session": "session",
    "verify": "verification",
    "verify_onnx": "verification",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsecomp.onnx' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"sparsecomp.onnx.{_HOME[name]}"), "verify" if name == "verify_onnx" else name)
    globals()[name] = value
    return value
