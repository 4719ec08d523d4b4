"""Models and values that version 0.1.0 pickled name classes by their old places."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import sparsecomp as sc
from sparsecomp.moved import MOVED
from sparsecomp.nn.packed_module import _parameter_of


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sparsecomp.pack.format", "PackedWeight"),
        ("sparsecomp.patterns", "NM"),
        ("sparsecomp.patterns", "VNM"),
        ("sparsecomp.patterns", "Block"),
        ("sparsecomp.cost", "Bound"),
        ("sparsecomp.decision", "LayerPlan"),
        ("sparsecomp.decision", "Plan"),
        ("sparsecomp.device", "Device"),
        ("sparsecomp.nn", "SparseLinear"),
        ("sparsecomp.calibration", "Calibration"),
        ("sparsecomp.calibration", "LayerStatistics"),
        ("sparsecomp.report", "Summary"),
        ("sparsecomp.prune.report", "PruneReport"),
        ("sparsecomp.prune.report", "LayerReport"),
        ("sparsecomp.prune.provenance", "Provenance"),
        ("sparsecomp.prune.tuning", "Tuning"),
        ("sparsecomp.prune.weight", "PrunedWeight"),
        ("sparsecomp.packed_module", "_parameter_of"),
    ],
)
def test_a_class_is_found_at_its_old_place(module: str, name: str) -> None:
    found = pickle.loads(f"c{module}\n{name}\n.".encode())
    assert found.__name__ == name and found.__module__.startswith("sparsecomp.")


def test_a_parameter_saved_before_is_read_with_weights_only() -> None:
    allowed = torch.serialization.get_safe_globals()
    assert (_parameter_of, "sparsecomp.packed_module._parameter_of") in allowed and _parameter_of in allowed


@pytest.mark.slow
def test_a_process_that_imported_nothing_finds_them() -> None:
    code = "import pickle; print(pickle.loads(b'csparsecomp.pack.format\\nPackedWeight\\n.').__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "sparsecomp.packing.format", done.stderr


def test_verify_is_a_function_and_can_be_imported_by_its_old_place() -> None:
    from sparsecomp.onnx.verify import verify

    assert verify is sc.verify_onnx is sc.onnx.verify


def test_an_old_name_never_hides_a_public_function() -> None:
    import_module("sparsecomp.pack.format")
    assert callable(sc.pack) and inspect.getmodule(sc.pack) is import_module("sparsecomp.packing.format")


def test_other_old_names_are_not_there() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("sparsecomp.tune")
    with pytest.raises(AttributeError, match="no_such"):
        pickle.loads(b"csparsecomp.cost\nno_such\n.")
    assert all(new.startswith("sparsecomp.") and import_module(new) for new in MOVED.values())
