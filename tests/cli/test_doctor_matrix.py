"""The support matrix of ``sparsecomp doctor``: what backends answer, at 80 columns, each reason in one footnote."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sparsecomp.backends.registry import backends
from sparsecomp.backends.support import PATTERNS, support
from sparsecomp.cli.main import main
from sparsecomp.cli.matrix import matrix
from sparsecomp.machine.device import Device
from sparsecomp.machine.request import Request
from sparsecomp.patterns import parse


def test_the_matrix_holds_what_backends_answer() -> None:
    rows = support("cpu")
    assert {row.backend for row in rows} == {name for name, each in backends().items() if each.missing() is None}
    for row in rows:
        for dtype in row.dtypes:
            for pattern, answer in zip(PATTERNS, row.answers, strict=True):
                if row.numbers == "float":
                    request = Request(parse(pattern), (1024, 1024), getattr(torch, dtype), "cpu", 16)
                    assert answer == backends()[row.backend].supports(request)
    dtypes = [dtype for row in rows if (row.backend, row.numbers) == ("dense", "float") for dtype in row.dtypes]
    assert sorted(dtypes) == ["bfloat16", "float16", "float32", "float64"]


def test_integers_are_refused_where_a_pattern_cannot_hold_them() -> None:
    [row] = [row for row in support("cpu") if (row.backend, row.numbers) == ("dense", "int8")]
    answers = dict(zip(PATTERNS, row.answers, strict=True))
    assert answers["2:4"] is None and "block16x16:0.5" in str(answers["block16x16:0.5"])


def test_doctor_prints_the_matrix_and_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setenv("SPARSECOMP_CACHE", "off")
    monkeypatch.setattr(Device, "pair_rate", lambda self, columns: columns * 1e9)  # as where AVX2 serves
    main(["doctor", "--quick"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    said = " ".join(out.split())
    assert (
        "cpu: what runs a 1024x1024 weight" in said and "OMP_PROC_BIND=true" in said and "SPARSECOMP_CACHE=off" in said
    )
    assert " dense float any yes yes yes yes yes yes yes" in said
    assert "10^9/s: groups of 4 4.0, groups of 8 8.0, groups of 16 16.0; multiply-adds alone 1.0" in said
    main(["doctor", "--quick", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["environment"]["OMP_PROC_BIND"] == "true"
    assert facts["devices"][0]["pairs_per_second"] == {"1": 1e9, "4": 4e9, "8": 8e9, "16": 16e9}
    assert len(facts["support"]["cpu"]) == len(support("cpu"))


def row(backend: str, answers: list[str | None], by_name_only: str | None = None) -> dict[str, Any]:
    return {
        "backend": backend,
        "numbers": "float",
        "dtypes": ["float16"],
        "answers": answers,
        "by_name_only": [by_name_only] * len(answers),
    }


def test_a_gpu_with_many_backends_fits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    count = len(PATTERNS)
    rows = [row(f"cutlass_fp8_tensor{i}", [None, *[f"reason {i}.{j}" for j in range(count - 1)]]) for i in range(5)]
    rows += [row("rounds_more", [None] * count, "computes in tf32"), row("cpu", ["runs on cpu, not on cuda:0"] * count)]
    lines = matrix("cuda", rows)
    text = "\n".join(lines)
    assert max(map(len, text.splitlines())) <= 80
    assert " a: cutlass_fp8_tensor0: reason 0.0" in lines and " ad: cutlass_fp8_tensor4: reason 4.5" in lines
    assert " ae: rounds_more: computes in tf32" in lines and "yes, ae" in text
    assert lines[-1] == " none of it: cpu: runs on cpu, not on cuda:0"
    assert "\n cpu " not in text
