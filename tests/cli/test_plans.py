"""A plan goes from one command to the other as a file; what is no plan of this model or this machine is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsecomp as sc
from sparsecomp.cli.main import main
from sparsecomp.machine.device import detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.timings import DENSE, SPARSE, UNPACKED, Measurement
from sparsecomp.nn import SparseLinear

COMPILE = ["compile", "shop:headed", "--plan", "plan.json", "--method", "magnitude", "-o", "packed.safetensors"]


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> sc.Plan:
    """A plan in plan.json: layers of 48x32 stay dense, those of 32x48 unpack from 8 rows on; the head is left out."""

    def measured(request: Request, backend: str, **_: object) -> Measurement:
        if request.shape == (48, 32):
            return Measurement(backend, {DENSE: 2e-5, SPARSE: 4e-5}, {}, False)
        sparse = 0.5e-5 if request.batch == 1 else 1e-5
        return Measurement(backend, {DENSE: 2e-5, SPARSE: sparse, UNPACKED: 0.9e-5}, {}, False)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the plan was not followed: a layer was measured")

    monkeypatch.setattr("sparsecomp.planning.measure.measure", measured)
    arguments = ["plan", "shop:headed", "--pattern", "2:4", "--batch", "1,8", "--skip", "classifier"]
    assert main([*arguments, "--output", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == 'wrote plan.json, which "sparsecomp compile --plan plan.json" follows'
    monkeypatch.setattr("sparsecomp.planning.measure.measure", again)
    return sc.Plan.load("plan.json")


def change(**facts: object) -> None:
    plan = json.loads(Path("plan.json").read_text())
    plan["machine"].update(facts)
    Path("plan.json").write_text(json.dumps(plan))


def test_a_plan_is_followed_by_compile_and_by_what_loads_the_file(
    planned: sc.Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(planned.sparse) == ["block0.2", "block1.2"] and planned["block0.2"].dense_above == 8
    assert main(COMPILE) == 0
    captured = capsys.readouterr()
    out = said(captured.out)
    assert captured.err == "" and max(map(len, captured.out.splitlines())) <= 80
    assert "the plan and its times are those of plan.json packed 2 of 5 layers" in out
    assert 'skipped: classifier: excluded by skip "classifier"' in out and " 9 us " in out
    from shop import headed  # type: ignore[import-not-found]

    model = sc.load("packed.safetensors", into=headed())
    choices = {name: each.choice for name, each in model.named_modules() if isinstance(each, SparseLinear)}
    assert choices == {name: layer.choice for name, layer in planned.sparse.items()}
    assert main(["inspect", "packed.safetensors", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {(layer["backend"], layer["dense_above"]) for layer in layers} == {(planned["block0.2"].backend, 8)}


def test_the_json_that_is_printed_is_a_plan_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "shop:build", "--pattern", "2:4", "--batch", "1", "--json", "-o", "plan.json"]
    assert main(arguments) == 0
    Path("printed.json").write_text(capsys.readouterr().out)
    assert sc.Plan.load("printed.json") == sc.Plan.load("plan.json")


def test_layers_that_are_left_out_here_are_said(planned: sc.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPILE, "--skip", "block1.*", "--skip", "classifier"]) == 0
    out = said(capsys.readouterr().out)
    assert 'block1.0, block1.2: excluded by skip "block1.*"' in out and "packed 1 of 5 layers" in out
    assert "in all: 1 of 2 layers goes sparse" in out


def test_layers_that_the_plan_lacks_stay_dense(planned: sc.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    facts = planned.to_dict()
    del facts["skipped"]["classifier"]
    Path("plan.json").write_text(json.dumps(facts))
    assert main(COMPILE) == 0
    assert "skipped: classifier: the plan does not have it" in said(capsys.readouterr().out)


def test_a_plan_of_another_model_is_an_error(planned: sc.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([COMPILE[0], "shop:build", *COMPILE[2:]]) == 1
    error = capsys.readouterr().err
    assert 'a layer "block0.0" of shape (48, 32)' in error and "plan this model" in error and error.count("\n") == 1
    assert not Path("packed.safetensors").exists()


@pytest.mark.parametrize(("kind", "unit"), [("cpu", "cores"), ("cuda", "SMs")])
def test_a_plan_of_another_machine_is_a_warning_that_names_both(
    kind: str, unit: str, planned: sc.Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    change(kind=kind, name="An Older One", isa="sm_80", cores=108)
    assert main(COMPILE) == 0
    error = capsys.readouterr().err
    assert error.startswith(
        f"warning: the plan was made on another machine, An Older One (sm_80, 108 {unit}), and this"
    )
    assert detect("cpu").name in error and error.rstrip().endswith("plan on this machine") and error.count("\n") == 1
    assert Path("packed.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pattern", "2:4"], "--pattern decides what --plan has decided; leave one of them out"),
        (["--batch", "1"], "--batch decides what --plan has decided; leave one of them out"),
        (["--everywhere"], "--everywhere decides what --plan has decided; leave one of them out"),
    ],
)
def test_options_that_a_plan_has_decided_are_wrong_usage(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMPILE, *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {says}"


def test_files_that_are_no_plan_are_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def working(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sparsecomp.cli.models.load_model", working)
    for content, says in ((None, "No such file"), ("", "it is no JSON"), ("{}", "this is no plan")):
        if content is not None:
            Path("plan.json").write_text(content)
        assert main(COMPILE) == 1
        error = capsys.readouterr().err
        assert "plan.json" in error and says in error and "sparsecomp plan ... --output FILE" in error
    for wrong in ("plan.txt", "none/plan.json"):
        assert main(["plan", "shop:headed", "-o", wrong]) == 2
        assert wrong in capsys.readouterr().err


def test_weights_that_were_pruned_otherwise_are_told(planned: sc.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["prune", "shop:headed", "--pattern", "4:8", "--skip", "classifier", "-o", "pruned.safetensors"]
    assert main(base) == 0
    capsys.readouterr()
    weights = ["--weights", "pruned.safetensors"]
    assert main([*COMPILE, *weights]) == 0
    assert "note: --plan overrides what prune noted with the weights" in said(capsys.readouterr().err)
    assert main([*[each for each in COMPILE if each not in ("--method", "magnitude")], *weights]) == 1
    assert "do not fit their pattern" in capsys.readouterr().err
