"""Models that keep keys and values from call to call, and what is said of models that cannot be exported."""

import numpy as np
import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.errors import ModelError
from sparsecomp.onnx import export_onnx, session
from sparsecomp.onnx.capture import CACHE_NOTE
from tests.onnx.onnx_models import assert_close, random_sparse_layer

pytestmark = pytest.mark.slow  # exports whole models

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SIZES))


def bart():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
    config = transformers.BartConfig(encoder_layers=1, decoder_layers=1, max_position_embeddings=64, **heads, **widths)
    return transformers.BartForConditionalGeneration(config)


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def two_models_in_one():
    decoder = transformers.BertConfig(is_decoder=True, add_cross_attention=True, **SIZES)
    encoder = transformers.BertConfig(**SIZES)
    return transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(encoder), decoder=transformers.BertLMHeadModel(decoder)
    )


def switches(model):
    """use_cache of every configuration in the model, nested ones too."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    configs += [value for config in configs for value in vars(config).values() if hasattr(value, "use_cache")]
    return [config.use_cache for config in configs if hasattr(config, "use_cache")]


def inputs(model, batch, tokens, generator):
    ids = torch.randint(1, 50, (batch, tokens), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(1, 50, (batch, tokens + 1), generator=generator)
    return given


@pytest.mark.parametrize("build", [llama, bart, t5, two_models_in_one], ids=lambda build: build.__name__)
def test_a_model_with_a_cache_is_exported_without_it(tmp_path, build):
    import onnxruntime

    torch.manual_seed(0)
    model, generator = build().eval(), torch.Generator().manual_seed(1)
    sc.compile(model, "2:4", method="magnitude", where="everywhere")
    example = inputs(model, 2, 8, generator)
    batch = torch.export.Dim("batch")
    axes = {name: {0: batch, 1: torch.export.Dim(f"length_{name}")} for name in example}
    axes["attention_mask"] = axes["input_ids"]
    before = switches(model)
    assert True in before
    report = export_onnx(model, (), tmp_path / "m.onnx", kwargs=example, dynamic_shapes=axes)
    assert report.notes == (CACHE_NOTE,)
    assert CACHE_NOTE in " ".join(str(report).split())
    assert switches(model) == before
    made = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    other = inputs(model, 3, 5, generator)
    feeds = {entry.name: other[entry.name].numpy() for entry in made.get_inputs()}
    with torch.no_grad():
        want = model(**other)
    assert want.past_key_values is not None
    assert_close(made.run(None, feeds)[0], want.logits.numpy())


def test_use_cache_is_back_after_an_error_and_the_users_own_is_kept(tmp_path):
    model = llama().eval()
    ids = torch.randint(0, 50, (2, 8))
    with pytest.raises(ModelError, match=r"the model returns a DynamicCache.*\"use_cache\": False"):
        export_onnx(model, (), tmp_path / "m.onnx", kwargs={"input_ids": ids, "use_cache": True}, dynamic_batch=False)
    assert set(switches(model)) == {True}
    report = export_onnx(
        model, (), tmp_path / "m.onnx", kwargs={"input_ids": ids, "use_cache": False}, dynamic_batch=False
    )
    assert report.notes == ()


def test_an_encoder_has_no_cache_to_speak_of(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    ids = torch.randint(0, 50, (2, 8))
    report = export_onnx(model, (), tmp_path / "m.onnx", kwargs={"input_ids": ids})
    assert report.notes == ()


class Foreign(nn.Module):
    """Gives back something that is no tensor."""

    class Box:
        def __init__(self, held):
            self.held = held

    def __init__(self):
        super().__init__()
        self.layer = random_sparse_layer(8, 16, "2:4")

    def forward(self, x):
        return Foreign.Box(self.layer(x))


class Branch(Foreign):
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class FixedBatch(Foreign):
    def forward(self, x):
        return self.layer(x).reshape(3, 8) + torch.zeros(3, 8)


class Unknown(Foreign):
    def forward(self, x):
        return torch.linalg.eigvals(self.layer(x)[:, :3].T @ self.layer(x)[:, :3]).real


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Foreign, {}, "the model returns a Box, which ONNX has no form of"),
        (Branch, {}, "branches on the values of a tensor"),
        (FixedBatch, {}, r'axis 0 of input "x" should take any size, but the model fixes it at 3; trace with a batch'),
        (Unknown, {}, "an operator that torch has no ONNX form of; replace that operator"),
        (Foreign, {"kwargs": {"y": torch.zeros(3, 16)}}, r"the model itself fails on these example inputs \(TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_cause_of_a_failed_export_is_named(tmp_path, build, options, message):
    args = () if options else (torch.randn(3, 16),)
    with pytest.raises(ModelError, match=message):
        export_onnx(build(), args, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_axes_that_do_not_fit_the_inputs_are_named(tmp_path):
    net = random_sparse_layer(8, 16, "2:4")
    with pytest.raises(ModelError, match="dynamic_shapes does not have the structure of the inputs"):
        export_onnx(net, (torch.randn(3, 16),), tmp_path / "m.onnx", dynamic_shapes={"x": {0: "a"}, "z": {0: "a"}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opset_version", "use opset"),
        ("dynamic_axes", "use dynamic_shapes"),
        ("f", "use path"),
        ("dynamo", "leave it out"),
        ("input_name", "did you mean one of input_names"),
        ("zzz", "did you mean one of model, args"),
    ],
)
def test_names_of_other_exporters_lead_to_ours(tmp_path, name, message):
    with pytest.raises(ModelError, match=f'no argument "{name}".*{message}'):
        export_onnx(random_sparse_layer(8, 16, "2:4"), (torch.randn(3, 16),), tmp_path / "m.onnx", **{name: 20})


def test_bfloat16_is_written_with_a_warning_where_a_cpu_cannot_run_it(tmp_path):
    net = nn.Sequential(random_sparse_layer(8, 16, "2:4", dtype=torch.bfloat16), nn.GELU())
    x = torch.randn(3, 16)
    with pytest.warns(RuntimeWarning, match=r"few CPU kernels for bfloat16; export model.float\(\) or model.half\(\)"):
        report = export_onnx(net, (x.bfloat16(),), tmp_path / "m.onnx")
    assert "bfloat16" in report.notes[0]
    with pytest.raises(sc.errors.FormatError, match=r"export model.float\(\) or model.half\(\) instead"):
        sc.onnx_session(tmp_path / "m.onnx", log_severity_level=4)
    # the ways out that are named
    for dtype in (torch.float16, torch.float32):
        assert export_onnx(net.to(dtype), (x.to(dtype),), tmp_path / "m.onnx").notes == ()
        made = sc.onnx_session(tmp_path / "m.onnx")
        got = made.run(None, {made.get_inputs()[0].name: x.to(dtype).numpy()})[0]
        assert_close(got, net(x.to(dtype)).detach().float().numpy(), dtype)
        assert got.dtype == (np.float16 if dtype == torch.float16 else np.float32)


@pytest.mark.skipif(session.library_path() is None, reason="the operator library is not built")
def test_bfloat16_that_only_our_library_runs_is_told(tmp_path):
    layer, x = random_sparse_layer(8, 16, "2:4", dtype=torch.bfloat16), torch.randn(3, 16).bfloat16()
    report = export_onnx(layer, (x,), tmp_path / "m.onnx")
    assert len(report.notes) == 1
    assert report.notes[0].startswith(
        "in bfloat16 this file runs on a CPU with sparsecomp.onnx_session, and not in ONNX"
    )
    assert sc.onnx_session(tmp_path / "m.onnx") is not None
    assert not session.runs_stock(tmp_path / "m.onnx")
    export_onnx(layer.float(), (x.float(),), tmp_path / "m.onnx")
    assert session.runs_stock(tmp_path / "m.onnx")
