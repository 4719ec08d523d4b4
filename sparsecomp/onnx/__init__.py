"""A model with sparse layers -> an ONNX file, the check of such a file, and a session that runs it fast.

Needs the ``onnx`` extra, imported when it is used. Must not know the backends: export runs without compiled code.
"""

from sparsecomp.onnx.export import ExportedLayer, ExportReport, export_onnx
from sparsecomp.onnx.session import onnx_session
from sparsecomp.onnx.verify import VerifiedWeight, VerifyReport, verify

__all__ = [
    "ExportReport",
    "ExportedLayer",
    "VerifiedWeight",
    "VerifyReport",
    "export_onnx",
    "onnx_session",
    "verify",
]
