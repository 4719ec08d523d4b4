"""What commands print beside their tables: where times come from, what overrides what, and equal layers once."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from sparsecomp.cli.main import main

PACK = ["compile", "shop:headed", "--skip", "classifier", "--everywhere", "-o", "packed.safetensors"]


def said(text: str) -> str:
    return " ".join(text.split())


def test_an_explicit_pattern_that_overrides_a_noted_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["prune", "shop:headed", "--skip", "classifier", "-o", "pruned.safetensors"]
    assert main([*base, "--pattern", "2:4"]) == 0
    capsys.readouterr()
    weights = [*PACK, "--weights", "pruned.safetensors"]
    assert main([*weights, "--pattern", "4:8"]) == 0
    error = capsys.readouterr().err
    assert "note: --pattern overrides what prune noted with the weights" in said(error)
    assert "4 x block*.*: 2:4, now 4:8" in said(error) and max(map(len, error.splitlines())) <= 80
    assert main([*weights, "--pattern", "4:8", "--method", "magnitude"]) == 0
    assert "overrides" in capsys.readouterr().err
    for options in ([], ["--pattern", "2:4"]):
        assert main([*weights, *options]) == 0
        assert "overrides" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["plan"], ["compile", "--method", "magnitude", "-o", "x.safetensors"]])
@pytest.mark.parametrize("cache", [True, False])
def test_where_times_come_from_is_said(
    verb: list[str], cache: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not cache:
        monkeypatch.setenv("SPARSECOMP_CACHE", "off")
    assert main([verb[0], "shop:build", "--pattern", "2:4", "--batch", "1", *verb[1:]]) == 0
    out = said(capsys.readouterr().out)
    assert ("to measure anew, set SPARSECOMP_CACHE=off" in out) == cache
    assert ("times were measured in this run" in out) == (not cache)
    assert main([verb[0], "--help"]) == 0
    assert "SPARSECOMP_CACHE=off measures anew" in said(capsys.readouterr().out)


def test_a_plan_without_sparse_layers_says_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecomp.machine.timings import DENSE, SPARSE, Measurement

    def measured(request: object, **_: object) -> Measurement:
        return Measurement("cpu", {DENSE: 1e-6, SPARSE: 2e-6}, {}, False)

    monkeypatch.setattr("sparsecomp.planning.measure.measure", measured)
    assert main(["plan", "shop:headed", "--pattern", "2:4", "--batch", "1"]) == 0
    out = said(capsys.readouterr().out)
    assert "in all: none of 5 layers goes sparse batch 1:" in out and "0.0%" not in out
    assert out.count("dense is faster at batch 1: 2:4 reaches 0.50x") <= 3


@pytest.mark.slow
def test_export_shows_equal_layers_once_and_says_when_none_is_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert main([*PACK, "--pattern", "2:4", "--method", "magnitude"]) == 0
    export = ["export", "packed.safetensors", "--model", "shop:headed", "--inputs", "shop:named_example"]
    capsys.readouterr()
    assert main([*export, "-o", "model.onnx"]) == 0
    out = capsys.readouterr().out
    assert out.count("48x32") == 1 and "2 x block*.0" in out and re.search(r"inputs: input \[\w+, 32\]", out)
    assert max(map(len, out.splitlines())) <= 80
    from sparsecomp import save
    from sparsecomp.cli.models import load_model

    save(load_model("shop:headed"), Path("packed.safetensors"))
    assert main([*export, "-o", "model.onnx"]) == 0
    assert "no layer is sparse: the file holds the dense model" in capsys.readouterr().out


@pytest.mark.parametrize(("batch", "told"), [("1", 0), ("1,8", 1)])
def test_a_narrow_plan_says_the_mean_once_and_only_where_the_table_has_none(
    batch: str, told: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecomp.machine.timings import DENSE, SPARSE, Measurement

    def measured(request: object, **_: object) -> Measurement:
        return Measurement("cpu", {DENSE: 3e-6, SPARSE: 2e-6}, {}, False)

    monkeypatch.setattr("sparsecomp.planning.measure.measure", measured)
    assert main(["plan", "shop:headed", "--pattern", "2:4", "--batch", batch]) == 0
    out = said(capsys.readouterr().out)
    assert out.count("1.50x in the mean") == out.count("speedup over the batches") == told


@pytest.mark.slow
def test_bench_leaves_out_cold_weights_that_would_take_thousands_of_copies(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsecomp.benchmark.limits import too_small
    from sparsecomp.benchmark.settings import Settings

    options = ["bench", "--shapes", "64x64", "--patterns", "2:4", "--batches", "1", "--dtypes", "fp32"]
    assert main([*options, "--threads", "1", "--seconds", "0.01", "--no-int8", "--output", "r.json"]) == 0
    result = json.loads(Path("r.json").read_text())
    assert {row["weights"] for row in result["rows"]} == {"warm"}
    assert "smaller than the 128 KiB" in result["missing"]["cold weights, 64x64, fp32"]
    assert "left out: cold weights, 64x64, fp32: a weight of 8.5 KiB is smaller" in said(capsys.readouterr().out)
    usual = Settings(patterns=("2:4", "8:16"))
    assert [too_small(usual, shape, dtype) for shape in usual.shapes for dtype in usual.dtypes] == [None] * 10
    assert too_small(Settings(cold_batches=()), (8, 8), "fp32") is None


@pytest.mark.parametrize("width", ["60", "80", "250"])
@pytest.mark.parametrize("batch", ["1", "1,8"])
def test_every_layer_of_a_row_of_several_kinds_is_named_once(
    width: str, batch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsecomp.machine.timings import DENSE, SPARSE, Measurement

    def measured(request: object, **_: object) -> Measurement:
        return Measurement("cpu", {DENSE: 3e-6, SPARSE: 2e-6}, {}, False)

    Path("kinds.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    parts = {name: nn.Linear(32, 16, device='cpu') for name in ('query', 'key', 'value', 'output')}\n"
        "    return nn.Sequential(nn.ModuleDict(parts))\n"
    )
    monkeypatch.setattr("sparsecomp.planning.measure.measure", measured)
    monkeypatch.delitem(sys.modules, "kinds", raising=False)
    monkeypatch.setenv("COLUMNS", width)
    assert main(["plan", "kinds:build", "--pattern", "2:4", "--batch", batch]) == 0
    out = said(capsys.readouterr().out)
    assert all(out.count(f"0.{name}") == 1 for name in ("key", "value", "output")), out
    assert "4 layers" in out


@pytest.mark.parametrize(
    ("experts", "router", "told"),
    [("experts", "gate", True), ("experts", "router", True), ("experts", "up", False), ("parts", "gate", False)],
)
def test_routers_of_a_mixture_are_advised_against(
    experts: str, router: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mixture.py").write_text(
        "from torch import nn\n\n\ndef block():\n    made = nn.Module()\n"
        f"    made.{router} = nn.Linear(32, 4, device='cpu')\n"
        f"    made.{experts} = nn.ModuleList([nn.Linear(32, 32, device='cpu') for _ in '1234'])\n    return made\n\n\n"
        "def build():\n    return nn.Sequential(block(), block())\n"
    )
    monkeypatch.delitem(sys.modules, "mixture", raising=False)
    base = ["mixture:build", "--pattern", "2:4"]
    for command in (
        ["prune", *base, "-o", "x.safetensors"],
        ["compile", *base, "--method", "magnitude", "--everywhere", "-o", "y.safetensors"],
    ):
        assert main(command) == 0
        error = said(capsys.readouterr().err)
        assert ("choose the experts of a mixture" in error) == told
        assert (f"--skip '*.{router}'" in error) == told
        assert main([*command, "--skip", f"*.{router}"]) == 0
        assert "experts of a mixture" not in capsys.readouterr().err
