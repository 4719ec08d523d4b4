"""The benchmark's own arithmetic: quantiles, the best dense engine, verdicts, and what it refuses to time."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecomp.benchmark import limits, report, settings, sweep
from sparsecomp.benchmark.sparse import SparseEngine
from sparsecomp.engines import timing
from sparsecomp.engines.base import Engine, Loaded, Operands
from sparsecomp.engines.product import Product
from sparsecomp.engines.pytorch import TorchEngine
from sparsecomp.engines.worker import ask_all, workers
from sparsecomp.errors import FormatError, PatternError, SparsecompError
from sparsecomp.machine.bound import bound, packed_nbytes
from sparsecomp.machine.device import Device
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.patterns import parse


def row(engine: str, us: float, pattern: str | None = None, **facts: Any) -> dict[str, Any]:
    case = {"out": 8, "in": 16, "batch": 1, "dtype": "fp32", "threads": 1, "weights": "warm"}
    times = {"us": us, "us_low": us * 0.9, "us_high": us * 1.1}
    bound = {} if pattern is None else {"bound": 2.0, "bound_by": "compute"}
    return case | {"engine": engine, "pattern": pattern} | times | bound | facts


def test_median_and_quantiles() -> None:
    found = timing._timing([float(value) for value in (*range(101), 1e9)][:101][::-1])
    assert (found.median, found.low, found.high, found.samples) == (50.0, 10.0, 90.0, 101)


def test_every_call_is_timed_equally_often() -> None:
    counts = {"a": 0, "b": 0}

    def call(name: str) -> None:
        counts[name] += 1
        torch.randn(200, 200) @ torch.randn(200, 200)

    samplers = {name: timing.Sampler(partial(call, name)) for name in counts}
    timings = timing.measure(samplers, seconds=0.02)
    assert timings["a"].samples == timings["b"].samples >= timing.MIN_REPETITIONS
    assert counts["a"] > timings["a"].samples
    for each in timings.values():
        assert 0 < each.low <= each.median <= each.high


def test_calls_after_a_sleep_are_untimed_for_a_while() -> None:
    begun: list[float] = []

    def call() -> None:
        begun.append(time.perf_counter())
        time.sleep(1e-3)

    sampler = timing.Sampler(call, after_sleep=True)
    sampler()
    begun.clear()
    start = time.perf_counter()
    assert sampler() >= 1e-3
    # the timed call is the last one
    assert begun[-1] - start >= timing.AFTER_SLEEP_S


def test_threads_and_cores_come_back() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(KeyError), timing.use_threads(1):
        assert (torch.get_num_threads(), len(os.sched_getaffinity(0))) == (1, 1)
        raise KeyError
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)


def test_a_sparse_row_is_compared_with_the_best_dense_row_of_its_case() -> None:
    rows = [row("torch", 30.0), row("openvino", 20.0), row("sparsecomp 2:4", 10.0, "2:4")]
    rows += [row("torch", 5.0, batch=2), row("sparsecomp 2:4", 10.0, "2:4", batch=2)]
    first, second = report.comparisons({"rows": rows})
    assert (first.dense["engine"], first.speedup, first.torch_us, first.verdict) == ("openvino", 2.0, 30.0, "wins")
    assert first.spread == pytest.approx((18 / 11, 22 / 9))
    assert (second.dense["engine"], second.speedup, second.verdict) == ("torch", 0.5, "loses")


def test_a_case_that_is_measured_again_is_compared_within_its_own_turn() -> None:
    turns = [[row("torch", dense), row("sparsecomp 2:4", 10.0, "2:4")] for dense in (20.0, 40.0, 30.0)]
    between = [row("torch", 5.0, batch=2), row("sparsecomp 2:4", 10.0, "2:4", batch=2)]
    found = list(report.comparisons({"rows": [*turns[0], *between, *turns[1], *turns[2]]}))
    assert [each.speedup for each in found] == [2.0, 0.5, 4.0, 3.0]
    assert [each.torch_us for each in found] == [20.0, 5.0, 40.0, 30.0]
    assert list(report.comparisons({"rows": []})) == []
    twice = [*turns[0], turns[0][-1]]  # of a pattern that was named twice
    assert [each.speedup for each in report.comparisons({"rows": twice})] == [2.0, 2.0]


@pytest.mark.parametrize(("us", "verdict"), [(9.6, "wins"), (9.8, "even"), (10.2, "even"), (10.4, "loses")])
def test_verdicts(us: float, verdict: str) -> None:
    dense, sparse = row("torch", 10.0), row("sparsecomp 2:4", us, "2:4")
    steady = [each | {"us_low": each["us"], "us_high": each["us"]} for each in (dense, sparse)]
    (found,) = report.comparisons({"rows": steady})
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("us", "low", "high", "verdict"),
    [(5.0, 4.0, 9.0, "wins"), (5.0, 4.0, 12.0, "unclear"), (20.0, 12.0, 30.0, "loses"), (20.0, 8.0, 30.0, "unclear")],
)
def test_a_verdict_needs_the_whole_spread(us: float, low: float, high: float, verdict: str) -> None:
    dense = row("torch", 10.0, us_low=10.0, us_high=10.0)
    (found,) = report.comparisons({"rows": [dense, row("sparsecomp 2:4", us, "2:4", us_low=low, us_high=high)]})
    assert found.verdict == verdict


def test_our_engines_agree_with_float64_and_rotate_over_copies() -> None:
    weights = [torch.randn(24, 40) for _ in range(3)]
    fitting = [prune_weight(weight, "2:4").weight for weight in weights]
    x, bias = torch.randn(5, 40), torch.randn(24)
    for engine in [SparseEngine("2:4"), SparseEngine("2:4+int8")]:
        if engine.missing("fp32") is not None:
            continue
        loaded = engine.load(Operands(fitting, bias, "fp32"))
        for copies in (1, 3):
            runner = loaded.bind(x, 1, copies)
            runner.call()
            truth = x.double() @ engine.effective(fitting[copies - 1]).double().T + bias.double()
            torch.testing.assert_close(runner.result().double().detach(), truth, rtol=1e-4, atol=1e-4)


def test_remarks_are_printed() -> None:
    rows = [row("openvino", 20.0, dtype="bf16"), row("sparsecomp 2:4", 10.0, "2:4", dtype="bf16")]
    machine = {"cpu": "a cpu", "isa": "avx512", "cores": 1, "packages": {}, "peaks": {}}
    result = {"machine": machine, "missing": {}, "remarks": {"openvino, bf16": "computes in fp32"}, "rows": rows}
    assert report.render(result).endswith("openvino, bf16: computes in fp32")


class WrongEngine(TorchEngine):
    name = "wrong"

    def load(self, operands: Operands) -> Loaded:
        return super().load(Operands(operands.weights, operands.bias + 1, operands.dtype))


class FailingEngine(TorchEngine):
    name = "failing"

    def load(self, operands: Operands) -> Loaded:
        raise ValueError("out of luck")


@dataclass
class Mortal:
    """Ends its process as a crash in compiled code does."""

    born: bool = True

    def __post_init__(self) -> None:
        if not self.born:
            self.die()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.slow
def test_engines_in_their_own_processes_multiply_the_same_numbers() -> None:
    listed: list[Engine] = [TorchEngine(), SparseEngine("2:4"), WrongEngine()]
    ready = [engine for engine in listed if engine.missing("fp32") is None]
    with workers({engine.name: partial(Product, engine, 2) for engine in ready}, 2) as started:
        ask_all(started.values(), "load", (24, 40), "fp32", 3)
        for copies in (1, 3):
            errors = ask_all(started.values(), "bind", 5, copies)
            assert all((error > 0.1) == (name == "wrong") for name, error in errors.items())
        timings = timing.measure({name: partial(each.ask, "sample") for name, each in started.items()}, 0.01)
        assert all(each.samples >= timing.MIN_REPETITIONS and each.low > 0 for each in timings.values())


@pytest.mark.slow
def test_an_error_in_a_process_names_the_engine_and_leaves_the_process_usable() -> None:
    with workers({"unlucky": partial(Product, FailingEngine(), 2)}, 2) as started:
        for _ in range(2):
            with pytest.raises(SparsecompError, match="unlucky failed in its process: ValueError: out of luck"):
                ask_all(started.values(), "load", (8, 16), "fp32", 1)


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_and_the_others_end_with_the_block() -> None:
    with workers({"one": Mortal, "other": Mortal}, 1) as started:
        pid = started["other"].ask("pid")
        for _ in range(2):  # while it is asked, and when it is long gone
            with pytest.raises(SparsecompError, match="the process of one ended with exit code -9"):
                started["one"].ask("die")
        assert started["other"].ask("pid") == pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(SparsecompError, match="stillborn ended"), workers({"stillborn": partial(Mortal, False)}, 1):
        pass


def test_what_is_left_out_is_named_and_ours_or_the_last_dense_one_ends_the_run() -> None:
    ours, torch_engine, wrong = SparseEngine("2:4"), TorchEngine(), WrongEngine()
    ready: dict[str, tuple[Engine, str]] = {each.name: (each, "fp32") for each in (torch_engine, wrong, ours)}
    asked: Any = dict.fromkeys(ready)
    missing: dict[str, str] = {}
    sweep._leave_out({}, asked, ready, "fp32", missing)
    assert asked.keys() == ready.keys() and missing == {}
    sweep._leave_out({"wrong": "wrong is wrong"}, asked, ready, "bf16", missing)
    assert list(asked) == ["torch", "sparsecomp 2:4"] and missing == {"wrong, bf16": "wrong is wrong"}
    with pytest.raises(SparsecompError, match="ours is wrong"):
        sweep._leave_out({"sparsecomp 2:4": "ours is wrong"}, dict(asked), ready, "fp32", missing)
    with pytest.raises(SparsecompError, match="no dense engine is left to compare with in fp32: out of memory"):
        sweep._leave_out({"torch": "out of memory"}, asked, ready, "fp32", missing)


@pytest.mark.slow
def test_a_dense_engine_that_is_wrong_or_fails_is_left_out_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := SparseEngine("2:4").missing("fp32")) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(settings, "float_engines", lambda: [TorchEngine(), WrongEngine(), FailingEngine()])
    part = settings.Settings(((24, 40),), (2,), (), ("fp32",), ("2:4",), (1,), 0.01, int8=False)
    result = sweep.sweep(part)
    assert [(each["engine"], each["numbers"]) for each in result["rows"]] == [
        ("torch", "fp32"),
        ("sparsecomp 2:4", "fp32"),
    ]
    assert "wrong is wrong at 24x40, batch 2, 1 threads: relative error" in result["missing"]["wrong, fp32"]
    assert result["missing"]["failing, fp32"].endswith("ValueError: out of luck")


def dense(engine: str, us: float, numbers: str, **facts: Any) -> dict[str, Any]:
    return row(engine, us, None, numbers=numbers, **facts)


def test_int8_stands_beside_int8_and_floats_beside_floats() -> None:
    ours = [row("sparsecomp 2:4", 10.0, "2:4", numbers="fp32"), row("sparsecomp", 4.0, "8:16+int8@a8", numbers="int8")]
    peers = [dense("torch", 30.0, "fp32"), dense("openvino", 20.0, "fp32"), dense("onnxruntime int8", 8.0, "int8")]
    floating, integer = report.comparisons({"rows": [*peers, dense("torch int8", 9.0, "int8"), *ours]})
    assert (floating.dense["engine"], floating.speedup, floating.beside) == ("openvino", 2.0, 0.8)
    assert (integer.dense["engine"], integer.speedup, integer.beside) == ("onnxruntime int8", 2.0, 5.0)
    assert floating.other is not None and floating.other["engine"] == "onnxruntime int8"
    # without a dense int8 engine int8 is compared with floats, and nothing is beside it
    alone = list(report.comparisons({"rows": [*peers[:2], *ours]}))
    assert [(each.speedup, each.beside) for each in alone] == [(2.0, None), (5.0, None)]
    machine = {"cpu": "a cpu", "isa": "avx512", "cores": 1, "packages": {}, "peaks": {}}
    facts = {"machine": machine, "missing": {}, "remarks": {}}
    text = report.render(facts | {"rows": [*peers, *ours]})
    assert "beside" in text and "0.80x" in text and "5.00x" in text
    assert "beside" not in report.render(facts | {"rows": [*peers[:2], ours[0]]})
    assert list(report.comparisons({"rows": [ours[0]]})) == []


def test_the_bound_of_int8_is_that_over_dense_int8() -> None:
    device = FixedPeaks("cpu", "a cpu", "avx512", 2, None, None, 32 << 20)
    shape = (4096, 4096)
    ours = SparseEngine("8:16+int8@a8")
    warm = limits.limit_of(ours, shape, "fp32", 1, device, 1, True)
    assert (warm.value, warm.limited_by) == (2.0, "compute")
    cold = limits.limit_of(ours, shape, "fp32", 1, device, 1, False)
    packed = packed_nbytes(parse("8:16"), shape, torch.float32, ours.numbers)
    assert cold.limited_by == "memory" and cold.value == pytest.approx(4096**2 / packed, rel=0.01)
    assert limits.limit_of(ours, shape, "fp32", 512, device, 1, False).value == 2.0
    assert limits.limit_of(SparseEngine("16:16+int8@a8"), shape, "fp32", 512, device, 1, True).value == 1.0
    floats = SparseEngine("8:16")
    request = Request(parse("8:16"), shape, torch.float32, "cpu", 8)
    assert limits.limit_of(floats, shape, "fp32", 8, device, 1, False) == bound(request, device, 1, False)


class FixedPeaks(Device):
    """A hundred thousand million operations and ten thousand million bytes a second."""

    def flops(self, dtype: torch.dtype, threads: int | None = None) -> float:
        return 1e11

    def integer_flops(self, threads: int | None = None) -> float | None:
        return 4e11

    def bandwidth(self, threads: int | None = None) -> float:
        return 1e10


@pytest.mark.parametrize("text", ["", "[]", '{"format": 3, "kind": "gemm", "rows": []}', '{"rows": []}'])
def test_a_file_that_is_no_result(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FormatError, match=r"r\.json"):
        report.load_result(tmp_path / "r.json")


class Place:
    """Tells the placement its process was given for libgomp's threads."""

    def bound(self) -> str | None:
        return os.environ.get("OMP_PROC_BIND")


@pytest.mark.slow
def test_only_libgomp_teams_are_bound_and_only_where_there_is_one() -> None:
    with workers({"torch": Place, "other": Place}, 2, openmp=["torch"]) as started:
        assert ask_all(started.values(), "bound") == {"torch": "true", "other": None}
    with workers({"torch": Place}, 1, openmp=["torch"]) as started:
        assert started["torch"].ask("bound") is None
    assert "OMP_PROC_BIND" not in os.environ


@pytest.mark.parametrize("width", [80, 120, 160])
def test_a_report_fits_the_terminal_and_names_what_it_leaves_out(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = []
    for weights in ("warm", "cold"):
        shape = {"out": 11008, "in": 4096, "batch": 2048, "weights": weights}
        rows += [row("torch", 176123.0, **shape), row("onnxruntime", 17612.0, **shape)]
        rows += [row(f"sparsecomp {n}:16", 9082.0, f"{n}:16", **shape) for n in range(1, 9)]
    packages = {"torch": "2.13.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1", "numpy": "2.4.6"}
    machine = {"cpu": "a processor of a long name", "isa": "avx512_bf16", "cores": 1, "packages": packages, "peaks": {}}
    missing = {"openvino, fp32": "it is not there " * 8}
    text = report.render({"machine": machine, "missing": missing, "remarks": {}, "rows": rows})
    assert max(map(len, text.splitlines())) <= width
    assert "fp32, 1 thread, pinned, warm weights" in text and "fp32, 1 thread, pinned, cold weights" in text
    assert text.count("onnxruntime") >= 16 and text.count("1.94x") == 16 + 8  # rows, and means of patterns
    assert ("left out at" in text) == (width < 120)


def test_patterns_are_checked_with_and_without_int8() -> None:
    for label in ("2:4", "2:4+int8", "8:16+int8@a8", "block16x16:0.5"):
        sweep.check_pattern(label)
    for label in ("2:5", "2:4+int4", ""):
        with pytest.raises(PatternError):
            sweep.check_pattern(label)
