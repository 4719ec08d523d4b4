"""Patterns by layer from prune to compile: typed, noted beside the weights, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.cli import choices
from sparsecomp.cli.main import main
from sparsecomp.cli.models import _items, call_factory
from sparsecomp.machine.device import detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import DENSE, SPARSE, Measurement


def packed(path: str) -> dict[str, str]:
    from sparsecomp.files.storage import inspect

    return {layer.name: layer.pattern for layer in inspect(path).layers}


def prune(*options: str, model: str = "shop:headed", out: str = "pruned.safetensors") -> None:
    assert main(["prune", model, *options, "-o", out]) == 0


COMPILE = ["compile", "shop:headed", "--everywhere", "-o", "packed.safetensors"]
BLOCKS = ["block0.0", "block0.2", "block1.0", "block1.2"]


@pytest.mark.parametrize("order", [["block0.*=1:4", "2:4"], ["2:4", "block0.*=1:4"]])
def test_compile_takes_a_pattern_for_each_layer(order: list[str]) -> None:
    options = [word for text in order for word in ("--pattern", text)]
    assert main([*COMPILE, *options, "--method", "magnitude", "--skip", "classifier"]) == 0
    assert packed("packed.safetensors") == dict(zip(BLOCKS, ["1:4", "1:4", "2:4", "2:4"], strict=True))


def test_a_layers_own_name_wins_over_a_glob() -> None:
    options = ["--pattern", "block*=2:4", "--pattern", "block1.2=4:8"]
    assert main([*COMPILE, *options, "--method", "magnitude"]) == 0
    assert packed("packed.safetensors") == dict(zip(BLOCKS, ["2:4", "2:4", "2:4", "4:8"], strict=True))


def test_two_patterns_for_one_glob_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--pattern", "2:4", "--pattern", "8:16", "--method", "magnitude"]) == 2
    assert 'two patterns are given for "*"' in capsys.readouterr().err


@pytest.mark.parametrize("pattern", [[], ["--pattern", "2:4"]])
def test_what_prune_left_dense_stays_dense(pattern: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prune("--pattern", "2:4", "--blocks", "--method", "wanda", "--calibration", "shop:batches")
    chain = ["--weights", "pruned.safetensors", *pattern, "-o", "packed.safetensors"]
    assert main([*COMPILE[:3], *chain]) == 0
    assert packed("packed.safetensors") == dict.fromkeys(BLOCKS, "2:4")
    out = capsys.readouterr().out
    assert "left dense by prune: classifier" in out and "packed 4 of 5 layers" in out
    assert main(["compile", "shop:headed", *chain]) == 0
    assert "skipped: classifier: prune left it dense" in capsys.readouterr().out


def test_each_layer_is_packed_in_the_pattern_that_prune_noted() -> None:
    prune("--pattern", "block0.*=1:4", "--pattern", "block1.0=2:4", "--pattern", "classifier=4:8")
    assert main([*COMPILE, "--weights", "pruned.safetensors"]) == 0
    want = {"block0.0": "1:4", "block0.2": "1:4", "block1.0": "2:4", "classifier": "4:8"}
    assert packed("packed.safetensors") == want
    # a glob that is typed counts before what was noted; 1:4 fits 2:4
    assert main([*COMPILE, "--weights", "pruned.safetensors", "--pattern", "block0.2=2:4"]) == 0
    assert packed("packed.safetensors") == want | {"block0.2": "2:4"}
    loaded = sc.load("packed.safetensors", into=model())
    dense = model()
    from safetensors.torch import load_model

    load_model(dense, "pruned.safetensors")
    x = torch.randn(3, 32)
    torch.testing.assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-5)


def model() -> nn.Module:
    made: nn.Module = call_factory("shop:headed", "a model")
    return made


def test_names_that_look_like_globs_stand_for_themselves() -> None:
    prune("--pattern", "a[[]0]=2:4", "--pattern", "a[*]=4:8", model="shop:bracketed")
    chain = ["compile", "shop:bracketed", "--weights", "pruned.safetensors", "-o", "packed.safetensors"]
    assert main([*chain, "--everywhere"]) == 0
    assert packed("packed.safetensors") == {"a[0]": "2:4", "a*": "4:8"}
    assert main([*chain, "--batch", "1"]) == 0
    assert main(["plan", "shop:bracketed", "--batch", "1"]) == 0


def test_weights_without_a_note_need_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_model

    save_model(model(), "plain.safetensors")
    assert main([*COMPILE, "--weights", "plain.safetensors"]) == 2
    assert "--pattern is missing, and the weights do not note any" in capsys.readouterr().err
    assert main([*COMPILE, "--weights", "plain.safetensors", "--pattern", "2:4"]) == 1
    assert "--skip 'block0.0'" in capsys.readouterr().err


def test_a_damaged_note_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_model

    save_model(model(), "plain.safetensors", metadata={"sparsecomp.patterns": "[1]"})
    assert main([*COMPILE, "--weights", "plain.safetensors"]) == 1
    assert "prune again" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["prune", "compile"])
def test_auto_is_the_pattern_that_suits_this_machine(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    natural = str(detect("cpu").natural_pattern())
    prune("--pattern", "auto") if verb == "prune" else None
    typed = ["--weights", "pruned.safetensors"] if verb == "prune" else ["--pattern", "auto", "--method", "magnitude"]
    assert main([*COMPILE, *typed]) == 0
    assert set(packed("packed.safetensors").values()) == {natural}
    assert f'pattern "auto" is {natural} here' in capsys.readouterr().err
    assert main([verb, "--help"]) == 0
    assert '"auto"' in capsys.readouterr().out


def test_packing_nothing_is_said_and_can_be_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", "shop:double", "--pattern", "2:4", "--method", "magnitude", "--batch", "1"]
    assert main([*arguments, "-o", "dense.safetensors"]) == 0
    out = capsys.readouterr()
    assert "packed 0 of 2 layers: the model runs dense, as before" in out.out and "UserWarning" not in out.err
    assert main([*arguments, "--require-sparse", "-o", "none.safetensors"]) == 1
    error = capsys.readouterr().err
    assert "none of 2 layers is packed (float64 has no sparse kernel" in error
    assert Path("dense.safetensors").is_file() and not Path("none.safetensors").exists()


def test_python_warns_where_nothing_was_packed() -> None:
    with pytest.warns(UserWarning, match=r"packed 0 of 5 layers, the first because float64 has no sparse kernel"):
        sc.compile(model().double(), "2:4", method="magnitude", batch=1)


def test_python_takes_a_mapping_as_prune_does() -> None:
    made = model()
    sc.compile(made, {"block0.*": "2:4", "classifier": "1:4"}, method="magnitude", where="everywhere")
    found = {name: str(each.pattern) for name, each in made.named_modules() if isinstance(each, sc.SparseLinear)}
    assert found == {"block0.0": "2:4", "block0.2": "2:4", "classifier": "1:4"}
    with pytest.raises(sc.errors.ModelError, match="auto"):
        sc.compile(model(), {"*": "auto"}, method="magnitude", where="everywhere")


class Tied(nn.Module):
    """A model that says itself what its head is, under a name that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"head": nn.Linear(8, 8)})])
        self.out_of_here = nn.Linear(8, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.out_of_here


def test_output_heads_are_known_by_the_models_word_or_by_name() -> None:
    assert choices.heads(Tied(), ["layers.0.head", "out_of_here"]) == ["out_of_here"]
    names = ["lm_head", "model.score", "classifier.out_proj", "layers.3.head", "encoder.fc"]
    assert choices.heads(nn.Module(), names) == ["lm_head", "model.score", "classifier.out_proj"]


def test_a_head_pruned_without_data_is_named_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pattern", "2:4", "--method", "magnitude"]
    assert main([*COMPILE, *options]) == 0
    assert "the output head (classifier) is pruned by magnitude" in capsys.readouterr().err
    assert main(["prune", "shop:headed", *options, "-o", "x.safetensors"]) == 0
    assert "--skip 'classifier'" in capsys.readouterr().err
    for quiet in (["--skip", "classifier"], ["--calibration", "shop:batches"]):
        assert main([*COMPILE, *options, *quiet]) == 0
        assert "output head" not in capsys.readouterr().err


@pytest.mark.parametrize(("factory", "item"), [("shop:pairs", "0"), ("shop:dicts", "pixels")])
def test_the_part_of_a_batch_that_the_model_takes(factory: str, item: str) -> None:
    options = ["--pattern", "2:4", "--method", "wanda"]
    prune(*options, "--calibration", "shop:batches", out="plain.safetensors")
    prune(*options, "--calibration", factory, "--batch-item", item, out="item.safetensors")
    from safetensors.torch import load_file

    plain, taken = load_file("plain.safetensors"), load_file("item.safetensors")
    assert plain.keys() == taken.keys() and all(torch.equal(plain[name], taken[name]) for name in plain)
    arguments = [*options, "--calibration", factory, "--batch-item", item]
    assert main([*COMPILE, *arguments]) == 0


def test_several_parts_of_a_batch_make_a_batch_of_their_kind() -> None:
    triples = [(1, 2, 3), (4, 5, 6)]
    assert list(_items(triples, "0,2")) == [(1, 3), (4, 6)] and list(_items(triples, "1")) == [2, 5]
    assert list(_items([{"ids": 1, "mask": 2, "label": 3}], "ids, mask")) == [{"ids": 1, "mask": 2}]


def test_a_batch_that_does_not_fit_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", "shop:headed", "--pattern", "2:4", "--method", "wanda", "-o", "x.safetensors"]
    for factory, option in (("shop:pairs", "--batch-item 0"), ("shop:dicts", "--batch-item pixels")):
        assert main([*arguments, "--calibration", factory]) == 1
        error = capsys.readouterr().err
        assert option in error and "lambda" not in error


@pytest.mark.parametrize(
    ("factory", "item", "says"),
    [
        ("shop:pairs", "2", "which has 2 items"),
        ("shop:pairs", "x", "which has 2 items"),
        ("shop:dicts", "0", "which has the keys pixels, label"),
    ],
)
def test_a_part_that_no_batch_has_is_named(
    factory: str, item: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", "shop:headed", "--pattern", "2:4", "--method", "wanda", "--calibration", factory]
    assert main([*arguments, "--batch-item", item, "-o", "x.safetensors"]) == 1
    assert says in capsys.readouterr().err


def measured(request: Request, **longer: object) -> Measurement:
    """Times that differ between shapes, so that no two kinds of layers share a sentence."""
    return Measurement("cpu", {DENSE: 1e-6 * request.shape[0], SPARSE: 2e-5}, {}, False)


def test_plan_is_a_verb_with_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecomp.planning.measure.measure", measured)
    arguments = ["plan", "shop:headed", "--pattern", "2:4", "--batch", "1,4", "--skip", "classifier"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count(" 48x32 ") == 1 and "2 x block*.0" in out and "block0.0, block1.0" in " ".join(out.split())
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == "shop:headed" and plan["batches"] == [1, 4] and plan["class"] == "Sequential"
    assert [layer["name"] for layer in plan["layers"]] == BLOCKS
    facts = {"name", "shape", "pattern", "backend", "reason", "dense_seconds", "sparse_seconds"}
    facts |= {"other_backends", "bound", "dense_above", "error", "numbers", "pinned", "tried", "limits"}
    facts |= {"baseline", "dense_ways", "engines", "rounding"}
    for layer in plan["layers"]:
        assert layer.keys() == facts
        assert layer["dense_seconds"].keys() == layer["sparse_seconds"].keys() == {"1", "4"}
        assert layer["baseline"] == {"1": "torch fp32", "4": "torch fp32"} and layer["engines"] == {}
    assert plan["totals"]["layers"] == 4 and plan["totals"]["torch_seconds"].keys() == {"1", "4"}
    assert plan["skipped"] == {"classifier": 'excluded by skip "classifier"'}
    assert not list(Path().glob("*.safetensors"))


@pytest.mark.slow
def test_doctor_and_inspect_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--quick", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == [
        "sparsecomp",
        "python",
        "torch",
        "devices",
        "backends",
        "onnxruntime_operators",
        "compiled",
        "refused",
        "eager_calls",
        "support",
        "packages",
        "package_problems",
        "environment",
    ]
    assert facts["sparsecomp"] == sc.__version__ and facts["devices"][0]["kind"] == "cpu"
    assert facts["backends"]["dense"] == {"ready": True, "reason": None}
    assert facts["devices"][0]["natural_pattern"] == str(detect("cpu").natural_pattern())
    assert facts["devices"][0]["flops"] is None and set(facts["packages"]) >= {"onnx", "transformers"}
    assert main([*COMPILE, "--pattern", "2:4", "--method", "magnitude", "--skip", "classifier"]) == 0
    capsys.readouterr()
    assert main(["inspect", "packed.safetensors", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in held["layers"]] == BLOCKS and held["other_tensors"] == 2
    assert held["layers"][0] == {
        "name": "block0.0",
        "pattern": "2:4",
        "shape": [48, 32],
        "dtype": "float32",
        "bias": True,
        "activation": "none",
        "nbytes": held["layers"][0]["nbytes"],
        "dense_nbytes": 48 * 32 * 4,
        "backend": None,
        "dense_above": None,
    }


def test_inspect_of_an_onnx_file_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    assert main([*COMPILE, "--pattern", "2:4", "--method", "magnitude"]) == 0
    export = ["export", "packed.safetensors", "--model", "shop:headed", "--inputs", "shop:named_example"]
    assert main([*export, "--form", "dense", "-o", "model.onnx"]) == 0
    capsys.readouterr()
    assert main(["inspect", "model.onnx", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["fits"] is True and verified["pattern"] == "2:4" and len(verified["weights"]) == 5


def test_inspect_tells_equal_layers_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--pattern", "2:4", "--method", "magnitude"]) == 0
    capsys.readouterr()
    assert main(["inspect", "packed.safetensors"]) == 0
    short = capsys.readouterr().out
    assert main(["inspect", "packed.safetensors", "--all"]) == 0
    full = capsys.readouterr().out
    assert short.count("48x32") == 1 and full.count("48x32") == 2 and all(name in full for name in BLOCKS)
    assert max(map(len, (short + full).splitlines())) <= 80
