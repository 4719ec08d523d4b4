"""sparsecomp: a hardware-aware semi-structured sparsity compiler.

The public names and nothing else. Each is imported when it is first used, so that ``import sparsecomp`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from sparsecomp import errors
from sparsecomp.moved import answer_for_old_names

if TYPE_CHECKING:
    from sparsecomp.compiler import compile
    from sparsecomp.files.storage import load, save
    from sparsecomp.methods.weight import prune_weight
    from sparsecomp.models.calibration import Calibration, calibrate
    from sparsecomp.nn import SparseConv2d, SparseLinear
    from sparsecomp.nn.arrays import linear, prepare
    from sparsecomp.onnx import export_onnx, onnx_session, verify_onnx
    from sparsecomp.packing import PackedWeight, pack, quantize
    from sparsecomp.patterns import parse as parse_pattern
    from sparsecomp.planning.plan import Plan
    from sparsecomp.planning.planner import plan
    from sparsecomp.pruning import Tuning, distill, prune, prune_blocks
    from sparsecomp.training import Schedule, SparseTraining, distillation_loss, masks, sparsify
    from sparsecomp.training.ntk import ntk
    from sparsecomp.training.rewind import rewind

__all__ = [
    "Calibration",
    "PackedWeight",
    "Plan",
    "Schedule",
    "SparseConv2d",
    "SparseLinear",
    "SparseTraining",
    "Tuning",
    "calibrate",
    "compile",
    "distill",
    "distillation_loss",
    "errors",
    "export_onnx",
    "linear",
    "load",
    "masks",
    "ntk",
    "onnx_session",
    "pack",
    "parse_pattern",
    "plan",
    "prepare",
    "prune",
    "prune_blocks",
    "prune_weight",
    "quantize",
    "rewind",
    "save",
    "sparsify",
    "verify_onnx",
]

try:
    __version__ = version("sparsecomp")
except PackageNotFoundError:
    __version__ = "0+uninstalled"

# folders are nouns and public functions verbs, so that no module ever hides a function of the same name
_HOME = {
    "Calibration": "models.calibration",
    "PackedWeight": "packing",
    "Plan": "planning.plan",
    "Schedule": "training",
    "SparseConv2d": "nn",
    "SparseLinear": "nn",
    "SparseTraining": "training",
    "Tuning": "pruning",
    "calibrate": "models.calibration",
    "compile": "compiler",
    "distill": "pruning",
    "distillation_loss": "training",
    "export_onnx": "onnx",
    "linear": "nn.arrays",
    "load": "files.storage",
    "masks": "training",
    "ntk": "training.ntk",
    "onnx_session": "onnx",
    "pack": "packing",
    "parse_pattern": "patterns",
    "plan": "planning.planner",
    "prepare": "nn.arrays",
    "prune": "pruning",
    "prune_blocks": "pruning",
    "prune_weight": "methods.weight",
    "quantize": "packing",
    "rewind": "training.rewind",
    "save": "files.storage",
    "sparsify": "training",
    "verify_onnx": "onnx",
}

answer_for_old_names()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsecomp' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = import_module(f"sparsecomp.{_HOME[name]}")
    value = getattr(home, "parse" if name == "parse_pattern" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
