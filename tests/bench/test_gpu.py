"""The GPU sweep without a GPU: what it measures, how it times, what it refuses to time, and what it reports."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu import cases, compiled, report, sampler, sweep
from bench.gpu.cases import Case
from bench.gpu.engine import GpuEngine
from bench.gpu.engines import engines, pattern_of
from bench.gpu.machine import ranges
from bench.gpu.packing import packing_rows
from bench.gpu.supervise import Journal
from sparsecomp.engines.timing import Timing
from sparsecomp.packing.format import pack

CASE = Case(64, 32, 8, "somewhere")


def test_every_layer_is_measured_once_at_every_batch_size() -> None:
    found = cases.cases()
    keys = [(case.out, case.columns, case.tokens) for case in found]
    assert len(keys) == len(set(keys))
    for model, shapes in cases.MODELS.items():
        for out, columns in shapes:
            for tokens in cases.TOKENS:
                (case,) = [each for each in found if (each.out, each.columns, each.tokens) == (out, columns, tokens)]
                assert model in case.where or case.where == "square"
    assert {(4096, 4096, 4096), (8192, 8192, 8192)} <= set(keys)


def test_a_sweep_cut_short_has_seen_prefill_and_decoding() -> None:
    first = [case.tokens for case in cases.cases()][:40]
    assert 4096 in first and 1 in first
    assert [case.tokens for case in cases.cases(["BERT-base"], [5, 1])] == [4096, 8192, 1, 1, 1, 5, 5, 5]


@pytest.mark.parametrize("l2_mib", [40, 50, 60])
def test_operands_exceed_the_cache(l2_mib: int) -> None:
    for case in cases.cases():
        count = cases.copies(case, l2_mib << 20)
        each = case.out * case.columns * 2 * 9 // 16 + case.tokens * (case.out + case.columns) * 2
        assert count >= 2 and count * each >= 1.5 * (l2_mib << 20)


def test_a_sample_is_whole_rounds_and_long_enough() -> None:
    assert sampler.repetitions(1e-3, 3) == 3
    assert sampler.repetitions(1e-5, 3) == 201
    assert sampler.repetitions(0.0, 4) == 512
    assert sampler.repetitions(10.0, 2) == 2


def test_operands_fit_the_pattern_and_are_random() -> None:
    (first, x), (second, _) = sweep.random_operands(CASE, torch.bfloat16, 2, device="cpu")
    assert pack(first, "2:4").shape == (64, 32) and x.shape == (8, 32)
    assert not torch.equal(first, second)
    assert len(torch.unique(first.view(-1, 4) != 0, dim=0)) == 6


def test_operands_of_fp32_fit_what_tensor_cores_take_of_it() -> None:
    ((weight, x),) = sweep.random_operands(CASE, torch.float32, 1, device="cpu")
    assert weight.dtype == x.dtype == torch.float32 and pattern_of(torch.float32) == "1:2"
    assert pack(weight, "1:2").shape == (64, 32)
    assert bool(((weight.view(-1, 2) != 0).sum(1) == 1).all())


@pytest.mark.parametrize(("elements", "ours"), [("int8", "sparsecomp gluon_int8"), ("tf32", "sparsecomp gluon_tf32")])
def test_each_kind_of_elements_has_dense_engines_and_one_of_ours(elements: str, ours: str) -> None:
    offered = engines(elements)
    assert [engine.name for engine in offered if engine.sparse] == [ours]
    assert len(offered) == 3 and offered[0].name == "cublas"
    assert set(sweep.DTYPES) == set(sweep.TOLERANCE)


def test_the_int8_baseline_says_what_it_cannot_take() -> None:
    engine = engines("int8")[1]
    assert engine.refuses(Case(64, 32, 17, ""), torch.bfloat16) is None
    for case in (Case(64, 32, 16, ""), Case(60, 32, 17, ""), Case(64, 36, 17, "")):
        assert "takes more than 16 tokens" in str(engine.refuses(case, torch.bfloat16))


PACKING = {
    "side": 4096,
    "backend": "cusparselt",
    "default": 750.0,
    "planes": 15.0,
    "dense": 20.5,
    "canonical": 18.0,
    "torch": 900.0,
}


def test_packing_times_are_reported() -> None:
    result = {**_result(), "packing": [PACKING]}
    text = report.summary(result)
    assert "packing 4096x4096 bf16: 750 us for cusparselt, the backend a layer gets; 15 us for triton" in text
    assert "for gluon 20.5 us from dense, 18 us from the canonical form, 900 us from it by torch" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_packing_is_not_timed() -> None:
    assert packing_rows() == []


def test_the_distance_notices_errors_and_numbers_that_are_none() -> None:
    ((weight, x),) = sweep.random_operands(Case(64, 32, 600, ""), torch.float16, 1, device="cpu")
    y = (x.float() @ weight.float().T).half()
    assert sweep.distance(y, weight, x) < 1e-3
    assert sweep.distance(y * 1.1, weight, x) == pytest.approx(0.1, rel=0.01)
    y[1, 0] = torch.nan  # in a row that is not compared
    assert sweep.distance(y, weight, x) == float("inf")


class _Fake(GpuEngine):
    """torch on the CPU, with a fault if asked for."""

    def __init__(self, name: str, sparse: bool, fault: str = "") -> None:
        self.name, self.sparse, self._fault = name, sparse, fault

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        return "has no such shape" if self._fault == "refuses" else None

    def prepare(self, weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
        if self._fault == "raises":
            raise RuntimeError("no algorithm")
        return lambda: (x.float() @ weight.float().T * (1.2 if self._fault == "wrong" else 1)).to(x.dtype)

    def note(self, case: Case) -> str:
        return f"note of {self.name}"


class _FakeSampler:
    captured = True

    def __init__(self, calls: list[Callable[[], Tensor]]) -> None:
        self._calls = calls

    def __call__(self) -> float:
        self._calls[0]()
        return 2e-6


def _result() -> dict[str, Any]:
    return {"machine": {"gpu": "test"}, "rows": [], "refused": [], "failed": [], "missing": [], "not measured": []}


def _engines() -> list[GpuEngine]:
    return [
        _Fake("cublas", False),
        _Fake("sparsecomp good", True),
        _Fake("sparsecomp wrong", True, "wrong"),
        _Fake("picky", True, "refuses"),
        _Fake("broken", True, "raises"),
    ]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's process with a made-up GPU."""
    make = sweep.random_operands
    monkeypatch.setattr(sweep, "random_operands", lambda case, dtype, count: make(case, dtype, 2, "cpu"))
    monkeypatch.setattr(sweep, "GpuSampler", _FakeSampler)
    monkeypatch.setattr(sweep, "_require_context", lambda error: None)
    monkeypatch.setattr(sweep, "describe", lambda: {"gpu": "test", "l2_mib": 1})
    monkeypatch.setattr(sweep, "engines", lambda dtype: _engines())
    monkeypatch.setattr(sweep, "packing_rows", lambda: [PACKING])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("on_cpu")
def test_wrong_and_failing_engines_are_named_and_not_timed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    sweep.measure_case(CASE, "bf16", _engines(), 1 << 20, 0.0, journal)
    rows = journal.of("row")
    assert [row["engine"] for row in rows] == ["cublas", "sparsecomp good"]
    row = rows[1]
    assert row["us"] == 2.0 and row["note"] == "note of sparsecomp good" and row["graph"] and row["error"] < 1e-2
    assert row["dense_tflops"] == pytest.approx(2 * 64 * 32 * 8 / 2e-6 / 1e12, rel=1e-3)
    assert journal.of("refused") == ["picky, 64x32, 8 tokens: has no such shape"]
    failed = journal.of("failed")
    assert failed[0].startswith("sparsecomp wrong, 64x32, 8 tokens: relative error 2.0")
    assert failed[1] == "broken, 64x32, 8 tokens: RuntimeError: no algorithm"
    assert journal.of("at") == [
        [name, str(CASE)] for name in ("cublas", "sparsecomp good", "sparsecomp wrong", "broken", "")
    ]


@pytest.mark.usefixtures("on_cpu")
def test_a_process_goes_on_where_the_one_before_it_died(tmp_path: Path) -> None:
    other, never = Case(64, 32, 9, "somewhere"), Case(64, 32, 10, "somewhere")
    journal = Journal(tmp_path / "journal")
    sweep.work([CASE], "bf16", time.monotonic() + 60, 0.0, journal)
    journal.add(at=["sparsecomp good", str(other)])
    journal.add(banned="sparsecomp good")
    sweep.work([CASE, other], "bf16", time.monotonic() + 60, 0.0, journal)
    sweep.work([CASE, other, never], "bf16", time.monotonic() - 1, 0.0, journal)
    result = sweep.gathered(journal, [CASE, other, never], {"power, W": (1.0, 2.0)})
    assert [(row["engine"], row["tokens"]) for row in result["rows"]] == [
        ("cublas", 8),
        ("sparsecomp good", 8),
        ("cublas", 9),
    ]
    assert result["not measured"] == [str(never)] and result["packing"] == [PACKING]
    assert result["machine"] == {"gpu": "test", "l2_mib": 1, "during": {"power, W": (1.0, 2.0)}}
    assert len(journal.of("machine")) == 1
    assert "not measured: 1" in report.summary(result)


@pytest.mark.usefixtures("on_cpu")
def test_compiled_layers_are_compared_with_linear_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = compiled.random_operands
    monkeypatch.setattr(compiled, "GpuSampler", lambda calls, graphs: _FakeSampler(calls))
    journal = Journal(tmp_path / "journal")
    group = [Case(64, 32, tokens, "x") for tokens in (1, 8)]
    compiled.measure_layer(group, 1 << 20, 0.0, time.monotonic() + 60, journal, "cpu")
    rows = journal.of("row")
    assert [(row["tokens"], row["engine"]) for row in rows] == [
        (tokens, engine) for tokens in (1, 8) for engine in ("nn.Linear", "sparsecomp compiled")
    ]
    assert rows[1]["note"] and not rows[0]["note"] and journal.of("done") == [str(case) for case in group]
    (found, _) = report.compare(rows)
    assert found.speedup == 1.0
    # weights that the rows were not made of
    monkeypatch.setattr(compiled, "random_operands", lambda *given: [(-w, x) for w, x in make(*given)])
    monkeypatch.setattr(compiled, "distance", lambda y, weight, x: sweep.distance(y, -weight, x))
    compiled.measure_layer(group, 1 << 20, 0.0, time.monotonic() + 60, journal, "cpu")
    assert journal.of("failed")[0].startswith("sparsecomp compiled, 64x32, 1 tokens: relative error 2")
    assert len(journal.of("row")) == 4
    assert len(compiled.layer_cases()) == len(compiled.SHAPES) * len(cases.TOKENS)


def _row(engine: str, sparse: bool, us: float, tokens: int = 4096, out: int = 64) -> dict[str, Any]:
    timing = Timing(us * 1e-6, us * 0.9e-6, us * 1.1e-6, 9)
    return sweep.row(Case(out, 32, tokens, "x"), "bf16", engine, sparse, "", timing, 1e-3, False)


def test_ours_is_compared_with_the_best_dense_and_the_best_vendor_engine() -> None:
    rows = [
        _row("cublas", False, 10.0),
        _row("triton dense", False, 12.0),
        _row("cusparselt", True, 8.0),
        _row("torch semi-structured", True, 9.0),
        _row("sparsecomp gluon", True, 5.0),
        _row("sparsecomp triton", True, 20.0),
        _row("cublas", False, 10.0, tokens=1),
        _row("sparsecomp gluon", True, 20.0, tokens=1),
        _row("cublas", False, 10.0, out=128),
    ]
    prefill, decode = report.compare(rows)
    assert (prefill.speedup, prefill.to_vendor) == (2.0, 1.6)
    assert (decode.speedup, decode.to_vendor) == (0.5, None)
    result = {**_result(), "rows": rows, "failed": ["broken, 1x1: why"]}
    text = report.summary(result)
    assert "tokens >= 2048: geometric mean 2.00x, 1.60x to the vendor's 2:4; peak 2.00x at 64x32, 4096 tokens" in text
    assert "tokens <= 16: geometric mean 0.50x; peak" in text
    assert "all: geometric mean 1.00x" in text
    assert "slower than the best dense engine: 1 of 2 cases" in text
    assert "broken, 1x1: why" in text
    assert "  triton dense                 tokens >= 2048 0.83x, <= 16 -" in text
    assert "  sparsecomp gluon             tokens >= 2048 2.00x, <= 16 0.50x" in text
    assert f"{10:>10.2f} {5:>10.2f} {20:>6.1f}% {2:>7.2f}x {'1.60x':>9}  sparsecomp gluon; cublas" in text


def test_refusals_are_told_once_for_each_engine() -> None:
    refused = ["picky, 1x1, 1 tokens: small", "picky, 2x2, 1 tokens: small", "shy, 1x1, 1 tokens: busy"]
    text = report.summary({**_result(), "refused": refused})
    assert "refused: 3\n  picky, 1x1, 1 tokens: small (and 1 more)\n  shy, 1x1, 1 tokens: busy\n" in text


def test_an_empty_sweep_still_reports() -> None:
    assert report.geometric_mean([]) is None
    assert "nothing was measured" in report.summary(_result())


def test_a_result_is_written_one_row_to_a_line_and_read_back(tmp_path: Path) -> None:
    result = {**_result(), "rows": [_row("cublas", False, 10.0), _row("sparsecomp gluon", True, 5.0)]}
    text = sweep.write(result, tmp_path / "new")
    assert (tmp_path / "new" / "gpu.txt").read_text() == text
    written = (tmp_path / "new" / "gpu.json").read_text()
    assert json.loads(written) == result
    assert sum('"engine"' in line for line in written.splitlines()) == 2


def test_clocks_are_ranges_and_broken_lines_are_passed_over() -> None:
    lines = ["1980, 3201, 690.5, 60", "1200, 3201, [N/A], 55", "19", ""]
    assert ranges(lines) == {
        "SM clock, MHz": (1200.0, 1980.0),
        "memory clock, MHz": (3201.0, 3201.0),
        "power, W": (690.5, 690.5),
        "temperature, C": (55.0, 60.0),
    }
    assert ranges([]) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_every_engine_that_needs_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert {engine.name for engine in engines() if engine.missing() is None} == {"cublas", "triton dense"}


def test_the_script_is_valid_bash() -> None:
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
