"""Patterns with numbers on the command line: typed, noted beside pruned weights, packed, calibrated, shown."""

from __future__ import annotations

import pytest

from sparsecomp.cli.main import main
from sparsecomp.files.storage import inspect
from sparsecomp.machine.timings import DENSE, SPARSE, Measurement
from sparsecomp.planning import measure
from sparsecomp.planning.plan import Plan

PACK = ["--everywhere", "-o", "packed.safetensors"]


def packed() -> dict[str, str]:
    return {each.name: f"{each.pattern} {each.dtype}" for each in inspect("packed.safetensors").layers}


def test_compile_packs_integers_by_name() -> None:
    options = ["--pattern", "2=16:16+int8@a8", "--pattern", "8:16+int8@a8", "--method", "magnitude"]
    assert main(["compile", "shop:build", *options, *PACK]) == 0
    assert packed() == {"0": "8:16 int8@a8 weights, float32", "2": "16:16 int8@a8 weights, float32"}
    assert main(["inspect", "packed.safetensors"]) == 0


def test_prune_notes_numbers_and_compile_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pattern", "2=8:16+int8", "--pattern", "8:16+int8@a8", "-o", "pruned.safetensors"]
    assert main(["prune", "shop:build", *options]) == 0
    chain = ["compile", "shop:build", "--weights", "pruned.safetensors"]
    assert main([*chain, *PACK]) == 0
    assert packed() == {"0": "8:16 int8@a8 weights, float32", "2": "8:16 int8 weights, float32"}
    capsys.readouterr()
    assert main([*chain, "--pattern", "8:16", *PACK]) == 0
    assert packed() == {"0": "8:16 float32", "2": "8:16 float32"}
    assert "overrides" not in capsys.readouterr().err  # the weights are pruned to what was noted


def test_layers_step_back_by_a_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pattern", "16:16+int8@a8", "--calibration", "shop:spiked_batches", *PACK]
    assert main(["compile", "shop:spiked", *options]) == 0
    assert packed() == {"2": "16:16 int8@a8 weights, float32"}
    said = capsys.readouterr()
    assert "int8@a8 would move its output by" in said.err and 'left dense: "0"' in said.out


def test_a_plan_of_integers_is_written_and_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Measurement("cpu", {DENSE: 1.0, SPARSE: 0.5}, {DENSE: 0.0, SPARSE: 0.0}, False)
    monkeypatch.setattr(measure, "measure", lambda *facts, **options: times)
    monkeypatch.setattr("sparsecomp.backends.registry.sparse_backends", lambda request: ["cpu"])
    plan = ["plan", "shop:spiked", "--pattern", "8:16+int8@a8", "--batch", "1", "-o", "plan.json"]
    assert main(plan) == 0
    assert "taken to be normally distributed" in " ".join(capsys.readouterr().out.split())
    assert main([*plan, "--calibration", "shop:spiked_batches"]) == 0
    made = Plan.load("plan.json")
    reasons = {layer.name: layer.reason for layer in made}
    assert "int8@a8 would move its output by" in reasons["0"] and "would move" not in reasons["2"]
    assert main(["compile", "shop:spiked", "--plan", "plan.json", "--method", "magnitude", "-o", "m.safetensors"]) == 0


def test_a_calibration_that_nothing_looks_at_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    batches = ["--calibration", "shop:batches"]
    for verb in (["compile", "shop:build", "--pattern", "16:16+int8", *PACK], ["plan", "shop:build"]):
        assert main([*verb, *batches]) == 2
        assert "for patterns with @a8, whose inputs are rounded" in capsys.readouterr().err
    assert main(["plan", "shop:build", "--batch-item", "0"]) == 2
    assert "give --calibration as well" in capsys.readouterr().err


def test_numbers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "shop:build", "--pattern", "8:16+int3", *PACK]) == 2
    assert 'numbers "int3" have a width that is not known' in capsys.readouterr().err


def test_heads_that_lose_no_weight_need_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, noted in (("16:16+int8@a8", False), ("8:16+int8@a8", True)):
        options = ["--pattern", pattern, "--method", "magnitude", *PACK]
        assert main(["compile", "shop:headed", *options]) == 0
        assert ("the output head" in capsys.readouterr().err) == noted
