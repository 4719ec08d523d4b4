"""Dense engines of other libraries: each product against float64, its numbers, and what it says where it cannot run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsecomp.engines import onnx_runtime, openvino_cpu, pytorch
from sparsecomp.engines.base import Engine, Operands, quantized
from sparsecomp.engines.graphs import quantized_gemm
from sparsecomp.engines.registry import dense_engines, float_engines, int8_engines
from sparsecomp.patterns.numbers import FLOAT

ENGINES = {engine.name: engine for engine in dense_engines()}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What OpenVINO can is asked anew, and again afterwards."""
    cached = (openvino_cpu.precision_of, openvino_cpu._rounds_by_itself, openvino_cpu._largest_weight)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def inputs(batch: int, columns: int) -> torch.Tensor:
    """Random, but small where the weights of ``operands`` are largest: without VNNI pairs of 8 bits could saturate."""
    generator = torch.Generator("cpu").manual_seed(batch)
    x = torch.randn(batch, columns, generator=generator, device="cpu", dtype=torch.float32)
    x[:, 0] *= 0.1
    return x


def operands(out: int, columns: int, copies: int = 1, dtype: str = "fp32") -> Operands:
    generator = torch.Generator("cpu").manual_seed(out + columns)
    facts: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    weights = [torch.randn(out, columns, **facts) for _ in range(copies)]
    for each in weights:
        each[:, 0] *= 4
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Operands([each.to(kind).float() for each in weights], torch.randn(out, **facts).to(kind).float(), dtype)


def ready(name: str, dtype: str = "fp32") -> Engine:
    engine = ENGINES[name]
    if (reason := engine.missing(dtype)) is not None:
        pytest.skip(reason)
    return engine


def error(engine: Engine, given: Operands, x: torch.Tensor, copies: int = 1) -> float:
    """Relative distance of the product of the last copy to float64."""
    runner = engine.load(given).bind(x, 1, copies)
    runner.call()
    truth = x.double() @ given.weights[copies - 1].double().T + given.bias.double()
    return float((runner.result().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", ENGINES)
def test_a_product_is_that_of_float64_within_its_numbers(name: str) -> None:
    engine = ready(name)
    for out, columns, batch in ((24, 40, 5), (33, 100, 1), (7, 20, 3), (64, 256, 17)):
        given = operands(out, columns, 3)
        x = inputs(batch, columns)
        for copies in (1, 3):
            assert error(engine, given, x, copies) <= engine.tolerance("fp32"), (out, columns, batch, copies)


@pytest.mark.parametrize("name", [engine.name for engine in float_engines()])
def test_a_bf16_product_is_that_of_float64_within_bf16(name: str) -> None:
    engine = ready(name, "bf16")
    x = inputs(5, 40).bfloat16().float()
    assert error(engine, operands(24, 40, dtype="bf16"), x) <= engine.tolerance("bf16")


@pytest.mark.parametrize("name", [engine.name for engine in int8_engines()])
def test_int8_engines_round_activations(name: str) -> None:
    # int8 holds these weights, so that what differs are the activations
    engine = ready(name)
    weight = torch.randint(-31, 32, (32, 64), device="cpu").float()
    weight[:, 0] = 127
    exact = Operands([weight], torch.zeros(32, device="cpu", dtype=torch.float32), "fp32")
    assert 1e-4 < error(engine, exact, inputs(4, 64)) <= engine.tolerance("fp32")


def test_every_engine_says_its_numbers() -> None:
    assert [engine.computes("fp32") for engine in float_engines()] == ["fp32"] * 4
    assert ENGINES["torch fp32"].computes("bf16") == "fp32" and ENGINES["torch fp32"].title("bf16") == "torch fp32"
    assert ENGINES["torch"].computes("bf16") == "bf16"
    assert all(engine.numbers == FLOAT and engine.label is engine.pattern is None for engine in float_engines())
    assert {(engine.computes("fp32"), str(engine.numbers)) for engine in int8_engines()} == {("int8", "int8@a8")}
    assert len(ENGINES) == len(dense_engines())
    assert all(engine.tolerance("fp32") < 1e-4 for engine in float_engines())


def test_a_wrong_product_exceeds_the_tolerance_of_int8() -> None:
    given = operands(24, 40)
    x = inputs(5, 40)
    off = Operands(given.weights, given.bias + 1, "fp32")
    for engine in int8_engines():
        if engine.missing("fp32") is None:
            runner = engine.load(off).bind(x, 1, 1)
            runner.call()
            truth = x.double() @ given.weights[0].double().T + given.bias.double()
            assert float((runner.result().double() - truth).norm() / truth.norm()) > engine.tolerance("fp32")


def test_weights_are_rounded_to_rows_of_int8() -> None:
    weight = torch.randn(9, 33)
    weight[4] = 0
    integers, scales = quantized(weight)
    assert integers.dtype == torch.int8 and scales.shape == (9, 1) and int(integers.abs().max()) == 127
    assert bool(((integers * scales - weight).abs() <= scales / 2 * 1.001).all())


def test_the_int8_graph_is_that_of_onnxruntime_and_runs_as_one_node(tmp_path: Path) -> None:
    ready("onnxruntime int8")
    import onnx
    import onnxruntime
    from onnx import numpy_helper
    from onnxruntime.quantization import quantize_dynamic

    from sparsecomp.engines.graphs import gemm

    given = operands(24, 40, 2)
    rounded = [quantized(weight) for weight in given.weights]
    (tmp_path / "float.onnx").write_bytes(gemm(given, "batch", 1))
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "theirs.onnx", per_channel=True)
    theirs, ours = (
        onnx.load(tmp_path / "theirs.onnx"),
        onnx.load_from_string(quantized_gemm(rounded, given.bias, "batch", 1)),
    )
    assert sorted(node.op_type for node in theirs.graph.node) == sorted(node.op_type for node in ours.graph.node)
    stored = {each.name: numpy_helper.to_array(each) for each in theirs.graph.initializer}
    own = {each.name: numpy_helper.to_array(each) for each in ours.graph.initializer}
    assert abs(stored["w0_quantized"].astype(int) - own["w0"].astype(int)).max() <= 1  # halves round either way
    assert stored["w0_scale"] == pytest.approx(own["w_scale0"])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        quantized_gemm(rounded, given.bias, "batch", 2), options, providers=["CPUExecutionProvider"]
    )
    run = onnx.load(tmp_path / "run.onnx")
    assert [node.op_type for node in run.graph.node] == ["DynamicQuantizeMatMul"] * 2


@pytest.mark.parametrize(
    ("known", "dtype", "precision", "told"),
    [(["FP32", "BF16"], "bf16", "bf16", False), (["FP32"], "bf16", "f32", True), (["FP32"], "fp32", "f32", False)],
)
def test_openvino_emulates_no_bf16(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, known: list[str], dtype: str, precision: str, told: bool
) -> None:
    core = SimpleNamespace(get_property=lambda device, name: known if name == "OPTIMIZATION_CAPABILITIES" else None)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    engine = openvino_cpu.OpenVinoEngine()
    loaded = engine.load(Operands([], torch.zeros(1), dtype))
    assert isinstance(loaded, openvino_cpu.Floating)
    assert loaded.precision == precision
    assert (engine.remark(dtype) is not None) == told
    assert engine.computes(dtype) == ("bf16" if precision == "bf16" else "fp32")


def test_what_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    for module in (onnx_runtime, openvino_cpu):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(pytorch, "_FIRST", ())
    reasons = {engine.name: engine.missing("fp32") for engine in dense_engines()}
    assert reasons.pop("torch") is None
    assert "pip install 'sparsecomp[onnx]'" in str(reasons["onnxruntime"]) and reasons["onnxruntime int8"]
    assert "pip install" in str(reasons["openvino"]) and "pip install" in str(reasons["openvino int8 static"])
    assert "built without" in str(reasons["torch int8"])
    monkeypatch.setattr(torch.ao, "quantization", SimpleNamespace())
    assert "has no torch.ao.quantization.quantize_dynamic" in str(pytorch.TorchInt8Engine().missing("fp32"))


def test_an_openvino_that_cannot_be_imported_is_a_sentence(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    ready("openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)  # as an import that fails
    monkeypatch.setattr(openvino_cpu, "find_spec", lambda name: name)
    for engine in (openvino_cpu.OpenVinoEngine(), *map(openvino_cpu.OpenVinoInt8Engine, ("static", "dynamic"))):
        assert "openvino cannot be imported: import of openvino halted" in str(engine.missing("fp32"))


def test_openvino_without_vnni_says_that_it_rounds_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    ready("openvino")
    monkeypatch.setattr(openvino_cpu, "_rounds_by_itself", lambda: False)
    assert "needs VNNI" in str(openvino_cpu.OpenVinoInt8Engine("dynamic").missing("fp32"))
    assert openvino_cpu.OpenVinoInt8Engine("static").missing("fp32") is None


def test_openvino_takes_weights_of_7_bits_where_sums_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ready("openvino int8 static")
    for largest, told in ((127, None), (63, "weights of 7 bits")):
        monkeypatch.setattr(openvino_cpu, "_largest_weight", lambda largest=largest: largest)
        loaded = engine.load(operands(8, 16))
        assert isinstance(loaded, openvino_cpu._Integers)
        assert int(loaded.weights[0][0].abs().max()) == largest
        assert error(engine, operands(24, 40), inputs(5, 40)) <= engine.tolerance("fp32")
        assert (told is None) == (engine.remark("fp32") is None) and (told or "") in str(engine.remark("fp32"))


def test_the_library_that_torch_quantises_for_is_put_back() -> None:
    engine, before = ready("torch int8"), torch.backends.quantized.engine
    engine.load(operands(8, 16))
    assert torch.backends.quantized.engine == before
