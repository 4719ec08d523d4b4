"""sparsecomp: a hardware-aware semi-structured sparsity compiler.

The public names and nothing else. Each is imported when it is first used, so that ``import sparsecomp`` stays light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from sparsecomp import errors

if TYPE_CHECKING:
    from sparsecomp.calibration import Calibration, calibrate
    from sparsecomp.compiler import compile
    from sparsecomp.interchange import linear, prepare
    from sparsecomp.nn import SparseLinear
    from sparsecomp.onnx import export_onnx, onnx_session, verify_onnx
    from sparsecomp.pack import PackedWeight, pack, quantize
    from sparsecomp.patterns import parse as parse_pattern
    from sparsecomp.plan import Plan, plan
    from sparsecomp.prune import Tuning, distill, prune, prune_blocks, prune_weight
    from sparsecomp.storage import load, save

__all__ = [
    "Calibration",
    "PackedWeight",
    "Plan",
    "SparseLinear",
    "Tuning",
    "calibrate",
    "compile",
    "distill",
    "errors",
    "export_onnx",
    "linear",
    "load",
    "onnx_session",
    "pack",
    "parse_pattern",
    "plan",
    "prepare",
    "prune",
    "prune_blocks",
    "prune_weight",
    "quantize",
    "save",
    "verify_onnx",
]

try:
    __version__ = version("sparsecomp")
except PackageNotFoundError:
    __version__ = "0+uninstalled"

_HOME = {
    "Calibration": "calibration",
    "PackedWeight": "pack",
    "Plan": "plan",
    "SparseLinear": "nn",
    "Tuning": "prune",
    "calibrate": "calibration",
    "compile": "compiler",
    "distill": "prune",
    "export_onnx": "onnx",
    "linear": "interchange",
    "load": "storage",
    "onnx_session": "onnx",
    "pack": "pack",
    "parse_pattern": "patterns",
    "plan": "plan",
    "prepare": "interchange",
    "prune": "prune",
    "prune_blocks": "prune",
    "prune_weight": "prune",
    "quantize": "pack",
    "save": "storage",
    "verify_onnx": "onnx",
}


class _Package(ModuleType):
    """The module type of this package: a submodule never hides the public function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # importing sparsecomp.plan, .prune or .pack would otherwise replace the function by the module
        if name in _HOME and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsecomp' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = import_module(f"sparsecomp.{_HOME[name]}")
    value = getattr(home, "parse" if name == "parse_pattern" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
