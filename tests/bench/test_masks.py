"""The benchmark of mask search: ALPS is what it claims to be, and the summary divides the right numbers."""

from __future__ import annotations

import pytest
import torch

from bench.pruning import masks
from bench.pruning.alps import alps
from sparsecomp.methods.error import relative_error
from sparsecomp.methods.weight import prune_weight
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask


@pytest.mark.parametrize("name", ["2:4", "4:8", "unstructured:0.5"])
def test_alps_lies_between_sparsegpt_and_our_slower_schedule(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 96, generator=generator) @ (torch.randn(96, 96, generator=generator) / 10 + torch.eye(96))
    weight, gram = torch.randn(64, 96, generator=generator), x.T @ x
    pruned = alps(weight, gram, parse(name))
    check_mask(pruned != 0, parse(name))
    error = relative_error(weight, pruned, gram)
    assert error < 0.95 * prune_weight(weight, name, "sparsegpt", gram).error
    assert error < 1.05 * prune_weight(weight, name, "balanced", gram).error


def test_a_row_has_both_errors_of_the_method() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 16, generator=generator)
    first, second = (x.T @ x for x in (torch.randn(90, 16, generator=generator) for _ in range(2)))
    row = masks._row("layer", weight, "fast", parse("2:4"), first, second)
    result = prune_weight(weight, "2:4", "fast", first)
    assert row["error"] == pytest.approx(result.error, rel=1e-4)
    assert row["held_out"] == pytest.approx(relative_error(weight, result.weight, second), rel=1e-4)
    assert (row["layer"], row["out"], row["in"], row["method"]) == ("layer", 8, 16, "fast")


def test_the_summary_compares_layer_by_layer() -> None:
    errors = {"sparsegpt": (0.2, 0.4), "alps": (0.1, 0.4), "fast": (0.1, 0.1)}
    rows = [
        {
            "layer": f"l{index}",
            "method": method,
            "error": error,
            "held_out": 2 * error,
            "seconds": 1.5,
            "cpu_seconds": 1.0,
        }
        for method, each in errors.items()
        for index, error in enumerate(each)
    ]
    result = {
        "rows": rows,
        "settings": {"pattern": "2:4", "threads": 1},
        "tokens": {"calibration": 10, "held_out": 20},
    }
    line = next(line.split() for line in masks.summary(result).splitlines() if line.split()[:1] == ["fast"])
    # against SparseGPT: sqrt(1/2 * 1/4) and at worst 1/2; against ALPS: sqrt(1 * 1/4) and at worst 1
    assert line[1:] == ["0.1000", "0.2000", "0.354", "0.500", "0.354", "0.500", "1.000", "0.500", "3.0", "2.0"]
    alone = masks.summary({**result, "rows": [row for row in rows if row["method"] == "fast"]})
    assert " -  " in alone
