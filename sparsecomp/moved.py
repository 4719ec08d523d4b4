"""Modules under the names they had when models and values were pickled by version 0.1.0, so that they still load.

Takes old names, gives modules that answer for their new places. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

# of what a pickled model, parameter, calibration, plan or report names: where it was -> where it is
MOVED = {
    "sparsecomp.pack": "sparsecomp.packing",
    "sparsecomp.pack.format": "sparsecomp.packing.format",
    "sparsecomp.packed_module": "sparsecomp.nn.packed_module",
    "sparsecomp.calibration": "sparsecomp.models.calibration",
    "sparsecomp.cost": "sparsecomp.machine.bound",
    "sparsecomp.decision": "sparsecomp.planning.plan",
    "sparsecomp.device": "sparsecomp.machine.device",
    "sparsecomp.report": "sparsecomp.planning.summary",
    "sparsecomp.prune.provenance": "sparsecomp.pruning.provenance",
    "sparsecomp.prune.report": "sparsecomp.pruning.report",
    "sparsecomp.prune.tuning": "sparsecomp.pruning.tuning",
    "sparsecomp.prune.weight": "sparsecomp.methods.weight",
    # a module that programs imported by its place
    "sparsecomp.onnx.verify": "sparsecomp.onnx.verification",
}


class Moved(ModuleType):
    """A module that looks its names up in another."""

    def __getattr__(self, name: str) -> object:
        """What the module at the new place has under that name."""
        if name.startswith("__"):  # whoever walks over all modules asks for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(MOVED[self.__name__]), name)


def answer_for_old_names() -> None:
    """Put the modules in their old places; they never become attributes, so that ``sparsecomp.pack`` stays itself."""
    for name in MOVED:
        sys.modules.setdefault(name, Moved(name))
