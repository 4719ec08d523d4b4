"""Modules under the names they had when whole models were pickled by version 0.1.0, so that these files still load.

Takes an old name, gives a module that answers for its new place. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# of classes that a pickled model names: where they were -> where they are
MOVED = {
    "sparsecomp.pack": "sparsecomp.packing",
    "sparsecomp.pack.format": "sparsecomp.packing.format",
    "sparsecomp.cost": "sparsecomp.machine.bound",
    "sparsecomp.decision": "sparsecomp.planning.plan",
    "sparsecomp.device": "sparsecomp.machine.device",
}


class OldNames(MetaPathFinder, Loader):
    """Finds the modules of ``MOVED``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name, None for all other names."""
        return ModuleSpec(fullname, self, is_package=fullname == "sparsecomp.pack") if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """A plain new module will do."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module give what the one at the new place has."""
        target = import_module(MOVED[module.__name__])
        module.__dict__["__getattr__"] = lambda name: getattr(target, name)
