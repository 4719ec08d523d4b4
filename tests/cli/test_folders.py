"""Hugging Face folders on the command line: their class, their head, their cache, and folders written again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.cli import hub
from sparsecomp.cli.main import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _own_defaults(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--other-defaults"):
        pytest.skip("transformers sets the default dtype itself while it loads; the last test has a process for it")


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    )


def clip() -> nn.Module:
    vision = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = transformers.CLIPConfig(
        text_config=dict(SMALL, bos_token_id=0, eos_token_id=1),
        vision_config=dict(vision, image_size=16, patch_size=8),
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def folder(make: Callable[[], nn.Module], name: str = "model") -> nn.Module:
    """Save a model as a folder of that name, with a tokenizer beside it; the model."""
    torch.manual_seed(0)
    model = make().eval()
    with hub._quiet(transformers):
        model.save_pretrained(name)  # type: ignore[operator]
    Path(name, "tokenizer_config.json").write_text('{"model_max_length": 8}')
    return model


COMPILE = ["compile", "model", "--pattern", "2:4", "--method", "magnitude", "--everywhere", "-o", "packed.safetensors"]


@pytest.mark.parametrize(("make", "head"), [(bert, "classifier"), (llama, "lm_head"), (vit, "classifier")])
def test_the_head_of_a_folder_is_kept(
    make: Callable[[], nn.Module], head: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = folder(make)
    assert main(COMPILE) == 0
    said = capfd.readouterr()
    assert f'model "model": {type(model).__name__}, by its config.json' in said.err
    assert "Loading weights" not in said.err + said.out and "UNEXPECTED" not in said.err + said.out
    loaded = sc.load("packed.safetensors", into=make())
    assert isinstance(loaded.get_submodule(head), sc.SparseLinear)
    want = sc.prune_weight(model.get_parameter(f"{head}.weight").detach(), "2:4").weight
    assert torch.equal(loaded.get_submodule(head).weight, want)


def feeds(kind: str, batch: int) -> dict[str, Tensor]:
    """Inputs of another size than those that were traced."""
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    ids = torch.randint(2, 50, (batch, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "bert":
        inputs["token_type_ids"] = torch.ones_like(ids)
    return inputs | ({"decoder_input_ids": torch.randint(2, 50, (batch, 3))} if kind == "t5" else {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
def test_a_folder_is_exported_without_inputs_and_without_its_cache(kind: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    make = {"bert": bert, "llama": llama, "t5": t5, "vit": vit}[kind]
    folder(make)
    assert main(COMPILE) == 0
    assert main(["export", "packed.safetensors", "--model", "model", "-o", "model.onnx"]) == 0
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    given = feeds(kind, 3)
    known = {each.name for each in session.get_inputs()}
    assert known == set(given), "what a tokenizer of this kind gives is what the file takes"
    got = session.run(None, {name: value.numpy() for name, value in given.items() if name in known})
    model = sc.load("packed.safetensors", into=make()).eval()
    with torch.no_grad():
        want = model(**given, **({"use_cache": False} if kind in ("llama", "t5") else {}))
    names = [each.name for each in session.get_outputs()]
    assert names == list(want) and names[0] == "logits"
    torch.testing.assert_close(torch.from_numpy(got[0]), want.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_says_which_axes_of_a_factorys_inputs_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "calls.py").write_text(
        "import torch\n\n\ndef call():\n    ids = torch.ones(2, 7, dtype=torch.int64, device='cpu')\n"
        "    return {'input_ids': ids, 'decoder_input_ids': ids[:, :5]}\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "calls", raising=False)
    folder(t5)
    assert main(COMPILE) == 0
    export = ["export", "packed.safetensors", "--model", "model", "-o", "model.onnx"]
    assert main([*export, "--inputs", "calls:call"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "inputs: input_ids [batch, 7], decoder_input_ids [batch, 5]; an axis with a name" in said
    assert main(export) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "decoder_input_ids [batch, decoder_tokens]" in said and "an axis with a name" not in said


def test_a_model_of_text_and_pixels_needs_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    folder(clip)
    assert main(COMPILE) == 0
    assert main(["export", "packed.safetensors", "--model", "model", "-o", "model.onnx"]) == 1
    assert "CLIPModel takes text and pixels" in capsys.readouterr().err


def test_prune_writes_a_folder_that_transformers_reads() -> None:
    model = folder(llama)
    Path("out").mkdir()
    Path("out", "model-00001-of-00002.safetensors").write_text("of a model that was there before")
    for name in ("2_Dense/model.safetensors", "onnx/model.onnx", ".cache/lock"):
        Path("model", name).parent.mkdir()
        Path("model", name).write_text(name)
    assert main(["prune", "model", "--pattern", "2:4", "--skip", "lm_head", "-o", "out"]) == 0
    assert Path("out/2_Dense/model.safetensors").read_text() == "2_Dense/model.safetensors"
    assert not Path("out/onnx").exists() and not Path("out/.cache").exists()
    assert not Path("out", "model-00001-of-00002.safetensors").exists() and not list(Path().glob(".*partial"))
    with hub._quiet(transformers):
        read, told = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(read) is type(model) and torch.equal(read.lm_head.weight, model.get_parameter("lm_head.weight"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(read.get_parameter(name), sc.prune_weight(model.get_parameter(name).detach(), "2:4").weight)
    assert Path("out/tokenizer_config.json").read_text() == '{"model_max_length": 8}'
    # the cache was off while it was pruned, and is asked for as before
    assert json.loads(Path("out/config.json").read_text()) == json.loads(Path("model/config.json").read_text())
    assert main(["compile", "out", "--everywhere", "-o", "packed.safetensors"]) == 0
    loaded = sc.load("packed.safetensors", into=llama())
    assert isinstance(loaded.get_submodule("lm_head"), nn.Linear)
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.up_proj"), sc.SparseLinear)


@pytest.mark.parametrize("weights", ["model/model.safetensors", "other/model.safetensors"])
def test_weights_of_a_folder_go_into_their_own_class(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder(bert)
    with hub._quiet(transformers):
        transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained("other")
    code = main(["prune", "model", "--weights", weights, "--pattern", "2:4", "-o", "pruned.safetensors"])
    assert code == (0 if weights.startswith("model") else 1)
    if code:
        error = capsys.readouterr().err
        assert (
            'do not fit BertForSequenceClassification: the file lacks "classifier.bias", "classifier.weight"' in error
        )
        return
    from safetensors.torch import load_file

    want = load_file("model/model.safetensors")["classifier.weight"]
    assert torch.equal(load_file("pruned.safetensors")["classifier.weight"], sc.prune_weight(want, "2:4").weight)


@pytest.mark.parametrize(
    ("change", "options", "code", "says"),
    [
        ({"architectures": None}, [], 0, "BertModel: its config.json names no architecture, so a head is not loaded"),
        ({"architectures": ["Mine"]}, [], 0, 'names "Mine", which transformers'),
        ({}, ["--auto-class", "BertModel"], 0, 'has no place for "classifier.bias", "classifier.weight"'),
        ({}, ["--auto-class", "AutoModelForTokenClassification"], 0, "BertForTokenClassification, by --auto-class"),
        ({}, ["--auto-class", "BertForSequenceClasification"], 1, "the nearest are BertForSequenceClassification"),
        ({}, ["--auto-class", "BertConfig"], 1, "is no model class of transformers"),
        ({"model_type": "nothing", "architectures": None}, [], 1, "cannot be loaded as AutoModel"),
    ],
)
def test_which_class_is_loaded_is_said(
    change: dict[str, Any], options: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(bert)
    config = json.loads(Path("model/config.json").read_text()) | change
    Path("model/config.json").write_text(json.dumps(config))
    assert main(["prune", "model", *options, "--pattern", "2:4", "-o", "x.safetensors"]) == code
    assert says in capsys.readouterr().err


def test_a_head_without_weights_is_called_random(capsys: pytest.CaptureFixture[str]) -> None:
    with hub._quiet(transformers):
        transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained("model")
    options = ["--auto-class", "BertForSequenceClassification", "--pattern", "2:4", "-o", "x.safetensors"]
    assert main(["prune", "model", *options]) == 0
    error = capsys.readouterr().err
    assert 'has no weights for "classifier.bias", "classifier.weight"' in error
    assert "they are random, and so is what is pruned or packed of the layer classifier;" in error


@pytest.mark.parametrize(("other", "count"), [(llama, "8 of the 8"), (vit, "6 of the 7")])
def test_a_class_of_another_model_is_refused(
    other: Callable[[], nn.Module], count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(bert)
    named = ["--auto-class", type(other()).__name__]
    assert main(["prune", "model", *named, "--pattern", "2:4", "-o", "x.safetensors"]) == 1
    error = capsys.readouterr().err
    assert f"no weights for {count} linear layers of {named[1]}, which would be random" in error
    assert "it was saved as BertForSequenceClassification" in error and not Path("x.safetensors").exists()


def test_folders_that_are_no_model_and_outputs_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    folder(bert)
    shutil.copytree("model", "broken")
    Path("broken/config.json").write_text("{")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("there").mkdir()
    for model, output, says in (
        ("broken", "x.safetensors", "is no JSON"),
        ("adapter", "x.safetensors", "holds an adapter alone"),
        ("model", "model/", "is the folder the model comes from"),
        ("shop:build", "there", "only Hugging Face models are written as folders"),
        ("shop:build", "new/", "only Hugging Face models are written as folders"),
    ):
        assert main(["prune", model, "--pattern", "2:4", "-o", output]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and says in error


def test_the_cache_is_off_within_the_block_only() -> None:
    model: Any = llama()
    seen = [config.use_cache for config in hub._configs(model)]
    with hub.without_cache(model):
        assert model(torch.ones(1, 4, dtype=torch.int64)).past_key_values is None
    assert [config.use_cache for config in hub._configs(model)] == seen and any(seen)


@pytest.mark.slow
def test_a_folder_is_loaded_as_it_was_saved_whatever_the_defaults() -> None:
    folder(bert)
    code = (
        "import torch\n"
        "from sparsecomp.cli.models import load_model\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\n"
        "for weights in (None, 'model/model.safetensors'):\n"
        "    model = load_model('model', weights)\n"
        "    print({(each.dtype, each.device.type) for each in model.parameters()})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{(torch.float32, 'cpu')}"] * 2
