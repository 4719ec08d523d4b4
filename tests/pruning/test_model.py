import copy
import json
import math
import re

import pytest
import torch
from torch import nn

from sparsecomp.errors import CalibrationError, MethodError, ModelError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.calibration import calibrate
from sparsecomp.patterns import NM
from sparsecomp.pruning import LayerReport, PruneReport, prune


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Conv1d(8, 8, 1))


@pytest.fixture
def model():
    return make()


@pytest.fixture
def calibration(model):
    return calibrate(model, [torch.randn(64, 16)], forward=lambda model, batch: model[:3](batch))


def test_every_layer_is_pruned_in_place_and_reported(model, calibration):
    dense = copy.deepcopy(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = prune(model, "2:4", "wanda", calibration)
    assert list(report.layers) == ["0", "2"]
    for name, layer in report.layers.items():
        want = prune_weight(dense[int(name)].weight, "2:4", "wanda", calibration[name].gram)
        assert torch.equal(model[int(name)].weight, want.weight)
        assert (layer.error, layer.density, layer.measured_on) == (want.error, 0.5, "gram")
        assert layer.pattern == NM(2, 4)
        assert torch.equal(model[int(name)].bias, dense[int(name)].bias)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())
    errors = [layer.error for layer in report.layers.values()]
    assert report.mean_error == pytest.approx(math.sqrt(errors[0] * errors[1]))
    assert report.density == 0.5
    assert report.skipped == {"3": "Conv1d layers stay dense"}


def test_a_mapping_gives_a_pattern_per_layer_and_the_first_match_wins(model):
    report = prune(model, {"2": "1:4", "?": NM(2, 4)}, skip="3")
    assert {name: str(layer.pattern) for name, layer in report.layers.items()} == {"0": "2:4", "2": "1:4"}
    partly = prune(make(), {"2": "1:4"})
    assert list(partly.layers) == ["2"]
    assert partly.skipped["0"] == "no pattern was given for it"
    with pytest.raises(ModelError, match=r'pattern for "nothing\.\*" matches no layer'):
        prune(model, {"nothing.*": "2:4"})


@pytest.mark.parametrize(
    ("mapping", "want"),
    [
        ({"?": "2:4", "2": "1:4"}, {"0": "2:4", "2": "1:4"}),  # a name wins wherever it stands
        ({"[02]": "2:4", "2*": "2:4"}, {"0": "2:4", "2": "2:4"}),  # equal patterns contradict nothing
        ({"0": "2:4", "2": "1:4", "*": "4:8"}, {"0": "2:4", "2": "1:4"}),  # a rest that is empty
        ({"2*": "1:4", "*": "4:8"}, {"0": "4:8", "2": "1:4"}),
    ],
)
def test_names_come_before_globs_and_the_rest_may_be_empty(model, mapping, want):
    report = prune(model, mapping)
    assert {name: str(layer.pattern) for name, layer in report.layers.items()} == want


@pytest.mark.parametrize(("mapping", "only"), [({"*": "2:4", "2*": "1:4"}, None), ({"[02]": "2:4", "2*": "1:4"}, None),
                                               ({"*": "2:4", "2*": "1:4"}, "2")])  # fmt: skip
def test_a_glob_behind_a_broader_one_is_refused(model, mapping, only):
    first = next(iter(mapping))
    message = f'"2*" decides for no layer: "{first}" comes before it and gives "2" the pattern 2:4; put "2*" before'
    with pytest.raises(ModelError, match=re.escape(message)):
        prune(model, mapping, only=only)


def test_if_one_layer_fails_no_layer_is_touched(model):
    with torch.no_grad():
        model[2].weight[3, 4] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError, match=r"2: weight\[3, 4\] is nan"):
        prune(model, "2:4")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_calibration_that_is_missing_or_does_not_fit(model, calibration):
    with pytest.raises(CalibrationError, match=r'"wanda" needs calibration data and got none; pass calibration=sc\.'):
        prune(model, "2:4", "wanda")
    partial = {"0": calibration["0"]}
    with pytest.raises(CalibrationError, match=r"for 1 of 2 layers that have none \(2\).*skip=\[...\]"):
        prune(model, "2:4", "wanda", partial)
    with pytest.raises(CalibrationError, match=r"2: gram has shape \(16, 16\)"):
        prune(model, "2:4", "wanda", {"0": calibration["0"], "2": calibration["0"]})
    with pytest.raises(CalibrationError, match=r"held_out is a list, not statistics.*pass sc\.calibrate"):
        prune(model, "2:4", "wanda", calibration, held_out=[torch.randn(4, 16)])
    report = prune(model, "2:4", "magnitude", partial)
    assert [layer.measured_on for layer in report.layers.values()] == ["gram", "weight"]
    assert "*: ||W-V|| / ||W||" in str(report)


def test_unknown_methods_patterns_and_empty_models(model):
    with pytest.raises(MethodError, match="unknown pruning method"):
        prune(model, "2:4", "sparse")
    with pytest.raises(PatternError, match="not understood"):
        prune(model, "two of four")
    with pytest.raises(ModelError, match="no layer that can be sparse"):
        prune(nn.Sequential(nn.ReLU()), "2:4")
    with pytest.raises(ModelError, match='skip "nope" matches no layer'):
        prune(model, "2:4", skip="nope")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model = make().to(dtype)
    report = prune(model, "2:4")
    assert model[0].weight.dtype == dtype
    assert report.layers["0"].density == 0.5
    assert int((model[0].weight != 0).sum()) <= 16 * 32 // 2


def test_conv1d_is_pruned_along_its_inputs():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    want = prune_weight(conv1d.weight.detach().T, "2:4").weight
    prune(nn.Sequential(conv1d), "2:4")
    assert torch.equal(conv1d.weight, want.T)


def test_a_shared_layer_is_pruned_once():
    shared = nn.Linear(8, 8)
    report = prune(nn.ModuleDict({"a": shared, "b": shared}), {"b": "1:4"})
    assert list(report.layers) == ["a"]
    assert str(report.layers["a"].pattern) == "1:4"


def test_transformer_encoder_gives_the_pruned_output_on_its_fused_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    report = prune(model, "2:4")
    assert list(report.layers) == ["linear1", "linear2"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x))


def report_of(*errors, measured_on="gram"):
    layers = {
        f"block.{i}": LayerReport(f"block.{i}", (8, 16), NM(2, 4), "wanda", 0.5, error, measured_on, 0.25)
        for i, error in enumerate(errors)
    }
    return PruneReport("wanda", layers, {f"conv.{i}": "Conv2d layers stay dense" for i in range(5)})


def test_the_printed_report():
    lines = [line.rstrip() for line in str(report_of(0.25, 0.01)).splitlines()]
    assert lines[0] == 'Pruned 2 layers with "wanda"'
    assert [line.split() for line in lines if line.lstrip().startswith("block.")] == [
        ["block.0", "8", "x", "16", "2:4", "50.0%", "0.2500", "0.25"],
        ["block.1", "8", "x", "16", "2:4", "50.0%", "0.0100", "0.25"],
    ]
    assert lines[-4:] == [
        "In all: 50.0% of the weights kept, mean error 0.0500 (geometric), 0.5 s",
        "Error: ||(W-V)X|| / ||WX|| on the calibration data.",
        "Left dense: 5",
        "  conv.0, conv.1, conv.2 and 2 more: Conv2d layers stay dense",
    ]
    assert "of the weights alone" in str(report_of(0.1, measured_on="weight"))


def test_the_dictionary_is_json_and_says_what_the_table_says(model, calibration):
    report = prune(model, "2:4", "wanda", calibration)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["method"] == "wanda"
    assert told["mean_error"] == report.mean_error
    assert told["skipped"] == {"3": "Conv1d layers stay dense"}
    assert told["layers"][0]["name"] == "0"
    assert told["layers"][0]["shape"] == [32, 16]
    assert told["layers"][0]["pattern"] == "2:4"
    assert told["layers"][0]["error"] == report.layers["0"].error
    odd = report_of(math.inf, 0.0)
    assert json.loads(json.dumps(odd.to_dict(), allow_nan=False))["layers"][0]["error"] is None
    assert report_of(0.0, 0.04).mean_error == pytest.approx(0.04)
    assert report_of(0.0).mean_error == 0.0
