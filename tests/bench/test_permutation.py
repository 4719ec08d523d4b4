"""The benchmark of "best" against "balanced": its errors are those of the layers as they were permuted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecomp as sc
from bench.pruning import permutation
from sparsecomp.models.layers import find_linears
from sparsecomp.patterns import parse
from sparsecomp.pruning.checkpoint import Checkpoint
from sparsecomp.pruning.model import permutable
from sparsecomp.pruning.solve import make_jobs, solve


def test_errors_are_those_of_the_permuted_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    # features of different worth, so that their order matters
    batches = [torch.randn(80, 16) * torch.linspace(0.1, 3, 16) for _ in range(3)]
    grams = {key: sc.calibrate(model, [x]) for key, x in zip(permutation.ERRORS, batches, strict=True)}
    found = find_linears(model)
    patterns = dict.fromkeys(found, parse("2:4"))
    hidden, fixed = permutable(model, batches[0], "best", found, patterns, {})
    assert set(fixed) == {"0"}
    jobs = make_jobs(found, patterns, "best", grams["error"], grams["held_out"], {})
    for _ in range(2):  # fresh, then out of the checkpoint
        solved = solve(jobs, hidden, Checkpoint(tmp_path), "best", show_progress=False)
        assert solved["2"].columns is not None
        assert torch.equal(solved["0"].rows, solved["2"].columns)
        for name, each in solved.items():
            row = permutation._row(name, "best", each, grams)
            assert row["error"] == pytest.approx(each.report.error, rel=1e-4)
            assert row["held_out"] == pytest.approx(each.report.held_out_error, rel=1e-4)
            assert row["permuted"] == (name == "2")
            assert row["notes"] == list(each.report.notes)


def test_the_summary_divides_layer_by_layer():
    errors = {"a": (0.2, 0.19), "b": (0.4, 0.36), "c": (0.1, 0.08)}
    rows = [
        {"layer": layer, "method": method, "permuted": method == "best" and layer != "a", "seconds": 1.0}
        | dict.fromkeys(permutation.ERRORS, pair[index])
        for index, method in enumerate(("balanced", "best"))
        for layer, pair in errors.items()
    ]
    result = {
        "rows": rows,
        "fixed": {"a": "its input is also read elsewhere"},
        "settings": {"pattern": "2:4", "threads": 1},
        "tokens": {"calibration": 10, "held_out": 20, "unseen": 30},
    }
    lines = [line.split() for line in permutation.summary(result).splitlines()]
    assert ["a", *["0.9500"] * 3] in lines
    assert ["b", "yes", *["0.9000"] * 3] in lines
    assert ["2", "free", "layers,", "median", *["0.8500"] * 3] in lines
    assert ["2", "free", "layers,", "worst", *["0.9000"] * 3] in lines
    assert ["all", "3", "layers,", "worst", *["0.9500"] * 3] in lines
    assert lines[-1] == ["Seconds:", "3", "balanced,", "3", "best;", "1", "thread(s)."]
