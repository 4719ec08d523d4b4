"""What the demo says of its figures, both ways, at 80 columns."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import pytest

from bench.demo.report import render
from bench.demo.result import DENSE, INT8, OUR_INT8, SPARSE, DemoResult, LayerRow, Measured, to_dict
from bench.demo.verdict import compare, dense_side, held_to, int8_side, next_steps, sparse_side, verdict
from bench.minilm import Quality
from sparsecomp.engines.timing import Timing


def timing(ms: float, spread: float = 0.01) -> Timing:
    return Timing(ms / 1e3, ms / 1e3 * (1 - spread), ms / 1e3 * (1 + spread), 11)


def engine(name: str, kind: str, mb: float, ms: tuple[float, float], cosine: float, what: str = "") -> Measured:
    quality = Quality(cosine, cosine, 1.0 if cosine == 1 else cosine - 0.1)
    return Measured(name, kind, what, int(mb * 1e6), quality, {1: timing(ms[0]), 32: timing(ms[1])})


def layer(name: str, shape: tuple[int, int], error: float) -> LayerRow:
    times = {64: 1e-4, 2048: 1e-2}
    bound = dict.fromkeys(times, 2.0)
    return LayerRow(name, shape, error, 4000, 2125, "cpu", times, {k: v / 2.5 for k, v in times.items()}, bound)


def result(*engines: Measured, **changes: Any) -> DemoResult:
    shapes = {"attention.self.query": (384, 384), "attention.output.dense": (384, 384), "output.dense": (384, 1536)}
    layers = [
        layer(f"encoder.layer.{block}.{name}", shape, 0.01 * block + 0.1)
        for block in range(6)
        for name, shape in shapes.items()
    ]
    values: dict[str, Any] = {
        "pattern": "2:4",
        "method": "fast",
        "date": "2026-11-30",
        "machine": {"packages": {"torch": "2.13.0+cpu", "onnxruntime": "1.31.1", "openvino": None}},
        "device": "cpu: A Processor With A Very Long Name @ 2.50GHz, avx512_bf16, 128 cores, 128 threads, L1 48 KB",
        "threads": 2,
        "calibration": "Calibration(36 layers, 38,835 tokens, 24 Gram matrices, 67.2 MB)",
        "held_out": 451,
        "tokens": 64,
        "folder": "demo-out",
        "layers": layers,
        "stayed_dense": {},
        "dense_bytes": 90_850_000,
        "file_bytes": 70_970_000,
        "engines": engines or INT8_AHEAD,
        "difference": {"2:4 ORT ours": 2e-7},
        "missing": {},
        "seconds": 100.0,
    }
    return DemoResult(**values | changes)


FP32 = (
    engine("torch fp32", DENSE, 90.9, (12.0, 249.0), 1.0),
    engine("ORT fp32", DENSE, 91.0, (6.0, 146.0), 1.0),
    engine("OpenVINO fp32", DENSE, 91.0, (5.0, 150.0), 1.0),
)
DEFAULT = engine("ORT int8", INT8, 23.3, (3.0, 75.0), 0.958, "quantize_dynamic")
CHANNEL = engine("ORT int8 channel", INT8, 23.4, (3.1, 76.0), 0.993, "with per_channel=True")
SPARSE_TORCH = engine("2:4 torch", SPARSE, 71.0, (4.6, 108.0), 0.923)
SPARSE_ORT = engine("2:4 ORT ours", SPARSE, 71.0, (4.0, 117.0), 0.923)
OURS = (
    engine("16:16+int8@a8", OUR_INT8, 59.0, (3.0, 74.0), 0.998, "dense int8 in our kernel"),
    engine("12:16+int8@a8", OUR_INT8, 60.0, (2.4, 60.0), 0.992, "SparseLinear with int8 weights and activations"),
    engine("8:16+int8@a8", OUR_INT8, 56.0, (2.0, 45.0), 0.948, "SparseLinear with int8 weights and activations"),
)
INT8_AHEAD = (*FP32, DEFAULT, CHANNEL, SPARSE_TORCH, SPARSE_ORT)


def text_of(found: DemoResult) -> str:
    return " ".join(render(found).split())


def test_int8_that_is_ahead_is_said_to_be_faster_smaller_and_closer() -> None:
    text = text_of(result())
    assert (
        "ONNX Runtime's dynamic int8 is faster (1.29x at batch 1, 1.42x at batch 32), smaller (23 MB against 71 MB) "
        "and closer to the dense model (cosine 0.993 against 0.923, same neighbour 0.893 against 0.823) than sparse "
        "fp32 on this machine."
    ) in text
    assert "Sparse fp32 is faster (1.25x at batch 1, 1.35x at batch 32) and smaller (71 MB against 91 MB) than" in text
    assert "the best dense fp32 (OpenVINO and ORT) on this machine, but farther from the dense model" in text
    assert "take dense int8 today:" in text
    assert "all similarities: ORT int8 0.958, ORT int8 channel 0.993, 2:4 torch 0.923." in text
    assert "do NOT replace the dense model's" in text


def test_sparse_that_is_ahead_is_said_to_be_so_by_the_same_rules() -> None:
    sparse = engine("2:4 torch", SPARSE, 15.0, (2.0, 50.0), 0.996)
    text = text_of(result(*FP32, CHANNEL, sparse))
    assert (
        "ONNX Runtime's dynamic int8 is slower (1.55x at batch 1, 1.52x at batch 32), larger (23 MB against 15 MB) and "
        "farther from the dense model (cosine 0.993 against 0.996, same neighbour 0.893 against 0.896) than sparse fp32"
    ) in text
    assert "take sparse fp32:" in text
    assert "take dense int8" not in text
    assert "close to the dense model's" in text
    assert "bench.pruning.quality" not in text  # nothing is left to repair


def test_a_mixed_outcome_names_both_sides_and_the_leaders() -> None:
    sparse = engine("2:4 torch", SPARSE, 71.0, (2.0, 90.0), 0.9)
    text = text_of(result(*FP32, CHANNEL, sparse))
    assert "dynamic int8 is faster (1.18x at batch 32), smaller" in text
    assert "on this machine, but slower (1.55x at batch 1)." in text
    assert "the fastest is at batch 1 2:4 torch (cosine 0.900), at batch 32 ORT int8 channel (cosine 0.993)" in text
    assert "the smallest file is that of ORT int8 channel" in text


def test_our_int8_is_recommended_where_it_is_faster_and_as_close() -> None:
    found = result(*FP32, DEFAULT, CHANNEL, *OURS, SPARSE_TORCH)
    (step, typed), *_ = next_steps(found)
    # 8:16 is faster still, and farther from the dense model; 16:16 is as fast as ONNX Runtime's
    assert step == (
        "For this model on this machine, take 12:16+int8@a8, which is faster than ONNX Runtime's dynamic int8 and as "
        "close to the dense model, though its file is larger (60 MB against 23 MB):"
    )
    assert 'sc.compile(model, "12:16+int8@a8", where="everywhere",' in typed
    text = text_of(found)
    assert "12:16+int8@a8 is faster (1.29x at batch 1, 1.27x at batch 32) than ONNX Runtime's dynamic int8" in text
    assert "8:16+int8@a8 is faster (1.55x at batch 1, 1.69x at batch 32) than ONNX Runtime's dynamic int8" in text
    slower = dataclasses.replace(OURS[1], times={1: timing(2.4), 32: timing(90.0)})
    assert "take dense int8 today:" in text_of(result(*FP32, DEFAULT, CHANNEL, slower, OURS[2], SPARSE_TORCH))


def test_two_ways_to_run_the_same_weights_are_one_side() -> None:
    in_ort = engine("12:16 int8 ORT", OUR_INT8, 60.0, (2.0, 70.0), 0.992)
    text = text_of(result(*FP32, CHANNEL, *OURS, in_ort, SPARSE_TORCH))
    # the fastest way at each batch: ONNX Runtime at 1, torch at 32
    assert "12:16+int8@a8 is faster (1.55x at batch 1, 1.27x at batch 32) than ONNX Runtime's dynamic int8" in text
    assert text.count("than ONNX Runtime's dynamic int8 on this machine") == 3


def test_dense_int8_in_our_kernel_is_recommended_without_a_method() -> None:
    fast = dataclasses.replace(OURS[0], times={1: timing(2.0), 32: timing(50.0)})
    (step, typed), *_ = next_steps(result(*FP32, CHANNEL, fast, SPARSE_TORCH))
    assert "take 16:16+int8@a8" in step
    assert "method" not in "".join(typed)


def test_ratios_that_int8_is_held_to_are_printed_with_the_outcome() -> None:
    assert held_to(result(*FP32, CHANNEL, *OURS, SPARSE_TORCH)) == [
        "8:16+int8@a8: 6.00x at batch 1, 5.53x at batch 32 over torch fp32 (2.4x is wanted: reached); 2.30x at "
        "batch 1, 2.40x at batch 32 over 2:4 torch (1.6x is wanted: reached)."
    ]
    slow = dataclasses.replace(OURS[2], times={1: timing(3.0), 32: timing(110.0)})
    (sentence,) = held_to(result(*FP32, slow, SPARSE_TORCH))
    assert "over torch fp32 (2.4x is wanted: missed)" in sentence
    assert "1.53x at batch 1, 0.98x at batch 32 over 2:4 torch (1.6x is wanted: missed)" in sentence
    assert held_to(result()) == []


def test_int8_that_loses_to_dense_fp32_is_not_recommended_without_a_word() -> None:
    slow = engine("ORT int8", INT8, 23.0, (7.0, 80.0), 0.99)
    sparse = engine("2:4 torch", SPARSE, 71.0, (9.0, 200.0), 0.9)
    steps = next_steps(result(*FP32, slow, sparse))
    assert "take dense int8 today (though the best dense fp32 (OpenVINO and ORT) is faster at batch 1)" in steps[0][0]


def test_times_within_each_others_spread_are_level() -> None:
    wide = dataclasses.replace(CHANNEL, times={1: timing(5.0, 0.5), 32: timing(80.0, 0.5)})
    found = compare(int8_side([wide]), sparse_side([SPARSE_TORCH]))  # type: ignore[arg-type]
    assert found.level == ("their speed at batch 1 and 32 is too near to tell",)
    assert found.better[0].startswith("smaller")
    near = dataclasses.replace(CHANNEL, times={1: timing(4.5, 0.001), 32: timing(106.0, 0.001)})
    assert compare(int8_side([near]), sparse_side([SPARSE_TORCH])).level == found.level  # type: ignore[arg-type]


def test_equal_sides_are_level() -> None:
    one = sparse_side([SPARSE_TORCH])
    assert str(compare(one, one)) == "Sparse fp32 and sparse fp32 are level on this machine."


def test_the_int8_of_a_comparison_is_the_closest_one() -> None:
    assert int8_side(INT8_AHEAD).quality == CHANNEL.quality  # type: ignore[union-attr]
    steps = next_steps(result())
    assert steps[0][1][-1].endswith("per_channel=True)")
    better = dataclasses.replace(DEFAULT, quality=Quality(0.999, 0.999, 0.99))
    assert "per_channel" not in next_steps(result(*FP32, better, CHANNEL, SPARSE_TORCH))[0][1][-1]


def test_the_best_dense_engine_may_differ_by_batch() -> None:
    side = dense_side(FP32)
    assert {batch: time.median for batch, time in side.times.items()} == {1: 5e-3, 32: 146e-3}


@pytest.mark.parametrize("pattern", ["2:4", "12:16"])
@pytest.mark.parametrize("slow", [1, 40])
def test_the_report_fits_80_columns(pattern: str, slow: int) -> None:
    def scaled(each: Measured) -> Measured:
        return dataclasses.replace(
            each,
            name=each.name.replace("2:4", pattern),
            times={batch: timing(time.median * 1e3 * slow) for batch, time in each.times.items()},
        )

    extra = (
        engine("2:4 planned", SPARSE, 71.0, (4.6, 108.0), 0.923, "SparseLinear where the planner measured a gain"),
        engine("2:4 ORT stock", SPARSE, 71.0, (6.6, 148.0), 0.923, "multiplies the zeros"),
    )
    reason = (
        "torch's dense product is faster: 130 us against 150 us at 64 rows, and there is nothing to be done about it"
    )
    found = result(
        *map(scaled, (*INT8_AHEAD, *OURS, *extra)),
        integer_bytes={each.name: 10_000_000 for each in OURS},
        pattern=pattern,
        missing={"OpenVINO fp32": "ModuleNotFoundError: No module named 'openvino' in any of the places looked at"},
        stayed_dense={"encoder.layer.0.attention.self.query": reason, "encoder.layer.1.output.dense": reason},
    )
    report = render(found, 80)
    assert [line for line in report.splitlines() if len(line) > 80] == []
    assert "left out" not in report  # no column
    assert "Missing here: OpenVINO fp32 (ModuleNotFoundError" in report


def test_layers_of_one_kind_are_one_row_with_their_errors() -> None:
    lines = render(result(), 80).splitlines()
    rows = [line.split() for line in lines if " x " in line and "384x" in line]
    assert [row[:5] for row in rows] == [
        ["12", "x", "attention", "384x384", "0.10-0.15"],
        ["6", "x", "output", "384x1536", "0.10-0.15"],
    ]
    assert any("5.attention.self.query 0.150" in line for line in lines)


def test_the_best_of_each_column_has_a_star() -> None:
    table = render(result(), 80).split("The whole model:")[1].split("* best")[0]
    rows = {line[:18].strip(): line[18:].split() for line in table.splitlines() if line[:18].strip()}
    assert rows["ORT int8"][0] == "23.3*"
    starred = {name: [i for i, cell in enumerate(cells) if cell.endswith("*")] for name, cells in rows.items()}
    # MB, ms, ratio, ms, ratio, cosine, neighbour: the default is smallest and fastest, by channel is closest
    assert starred["ORT int8"] == [0, 1, 3]
    assert starred["ORT int8 channel"] == [5, 6]
    assert not any(starred[name] for name in ("torch fp32", "OpenVINO fp32", "2:4 torch"))
    assert rows["2:4 torch"][2] == "1.09x"  # 5.0 ms of the fastest dense over 4.6 ms
    assert rows["2:4 torch"][4] == "1.35x"


def test_without_int8_the_report_says_that_the_rival_is_missing() -> None:
    found = result(*FP32, SPARSE_TORCH, missing={"ORT int8": "ImportError: nothing there"})
    text = text_of(found)
    assert "Missing here: ORT int8 (ImportError: nothing there)." in text
    assert "Dense int8, the rival to beat, could not be measured here." in verdict(found)
    assert "Measure dense int8 before you decide" in text


def test_the_result_is_json_with_every_time() -> None:
    values = json.loads(json.dumps(to_dict(result()), allow_nan=False))
    times = {each["name"]: each["times"]["32"] for each in values["engines"]}
    assert times["2:4 torch"] == pytest.approx({"median": 0.108, "low": 0.10692, "high": 0.10908, "samples": 11})
    assert len(values["layers"]) == 18


def test_what_the_next_steps_tell_to_type_is_understood() -> None:
    from sparsecomp.cli.main import parser

    steps = [*next_steps(result()), *next_steps(result(*FP32, CHANNEL, *OURS, SPARSE_TORCH))[:1]]
    typed = ["\n".join(lines).replace("\\\n", " ") for _, lines in steps if lines]
    commands = [line for text in typed for line in text.splitlines() if line.startswith(".venv/bin/sparsecomp ")]
    assert len(commands) == 2
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
    for text in typed:
        if text.startswith((".venv", "make", "pip")):
            continue
        compile(text, "typed", "exec")
