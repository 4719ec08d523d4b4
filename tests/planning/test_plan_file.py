"""A plan as JSON values and as a file: it comes back exactly, and what is no plan is refused with the way out."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import FormatError
from sparsecomp.machine.bound import Bound
from sparsecomp.machine.device import Device, detect
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8
from sparsecomp.planning.plan import LayerPlan, Plan

TIMES = {1: 1.1e-5, 128: 2 / 3}
BOUND = {1: Bound(1.5, "memory", 3e-6, 2e-6), 128: Bound(2.0, "compute", 1e-3, 5e-4)}
CHOICE = Choice(parse("8:16"), FLOAT, "cpu", 128)
WAYS = {"torch bf16": {1: 1.1e-5, 128: 1.0}, "torch fp32": {1: 2e-5, 128: 2 / 3}}
BESIDE = {"OpenVINO bf16": TIMES, "ONNX Runtime int8": {1: 1e-5}}
SPARSE = LayerPlan(
    "up", (48, 32), CHOICE, "2.00x", CHOICE, TIMES, TIMES, BOUND, 0.25, {"triton": TIMES}, None, WAYS, BESIDE
)
TRIED = replace(CHOICE, pattern=parse("2:4@v4"), dense_above=None)
DENSE = LayerPlan("down", (32, 48), None, "dense is faster", TRIED, TIMES, {}, {})
UNTRIED = LayerPlan("head", (8, 48), None, "no kernel", None, {}, {}, {})
MISSING = {"OpenVINO int8 dynamic": "it needs VNNI"}
GPU = Device("cuda", "a GPU", "sm_90", 132, None, 50 << 20, None, 1)


def plan_of(device: Device) -> Plan:
    return Plan(device, (1, 128), (SPARSE, DENSE, UNTRIED), {"conv": "Conv1d layers stay dense"}, 12345, MISSING)


@pytest.mark.parametrize("device", [detect("cpu"), GPU], ids=["cpu", "gpu"])
def test_a_plan_comes_back_exactly(device: Device, tmp_path: Path) -> None:
    made = plan_of(device)
    assert Plan.from_dict(made.to_dict()) == made
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    made.save(tmp_path / "plan.json")
    again = Plan.load(str(tmp_path / "plan.json"))
    assert again == made and again.to_dict() == made.to_dict() and str(again) == str(made)
    stored = replace(CHOICE, numbers=INT8)
    assert Plan.from_dict(replace(made, layers=(replace(SPARSE, choice=stored),)).to_dict())["up"].choice == stored
    pinned = replace(made, layers=(replace(SPARSE, choice=replace(CHOICE, pinned=True)),), weights=None)
    assert Plan.from_dict(pinned.to_dict()) == pinned


def test_keys_of_before_are_still_there() -> None:
    facts = plan_of(GPU).to_dict()
    assert facts["device"] == "cuda: a GPU, sm_90, 132 SMs, L2 50 MB"
    up, down, head = facts["layers"]
    assert (up["pattern"], up["backend"], up["dense_above"], up["error"]) == ("8:16", "cpu", 128, 0.25)
    assert up["dense_seconds"] == {"1": 1.1e-5, "128": 2 / 3} and up["bound"] == {"1": 1.5, "128": 2.0}
    assert (down["pattern"], down["backend"], down["dense_above"]) == (None, "cpu", None)
    assert (head["pattern"], head["backend"]) == (None, None)


def test_a_plan_names_its_baseline_also_in_a_file_of_before() -> None:
    facts = plan_of(GPU).to_dict()
    assert facts["layers"][0]["baseline"] == {"1": "torch bf16", "128": "torch fp32"}
    for layer in facts["layers"]:
        for key in ("baseline", "dense_ways", "engines"):
            del layer[key]
    del facts["engines_missing"]
    old = Plan.from_dict(facts)
    assert old["up"].baseline == {1: "torch", 128: "torch"} and old["up"].engines == old.engines_missing == {}
    assert old["up"].planned == TIMES and "in dense torch," in old.text(300) and "torch b128" in old.text(300)


def test_further_keys_do_not_matter() -> None:
    made = plan_of(GPU)
    facts = made.to_dict()
    facts["layers"][0]["later"] = facts["totals"] = made.totals()
    assert Plan.from_dict(facts) == made


def _with(path: tuple[str | int, ...], value: Any) -> Any:
    facts = json.loads(json.dumps(plan_of(GPU).to_dict()))
    place: Any = facts
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return facts


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("plan_version",), ..., "this is no plan, for it has no plan_version"),
        (("plan_version",), 2, "this plan has version 2, and this package reads 1"),
        (("layers",), {}, "this plan has no list of layers"),
        (("layers",), [3], "this plan has no list of layers"),
        (("layers", 1, "name"), "up", 'this plan decides layer "up" twice'),
        (("machine",), ..., 'it has no "machine"'),
        (("machine", "cores"), "many", "machine.cores is 'many', where a whole number belongs"),
        (("batches",), [1.5], r"batches\[0\] is 1.5, where a whole number belongs"),
        (("skipped",), None, "skipped is None, where an object belongs"),
        (("layers", 0, "name"), ..., r'layers\[0\] has no "name"'),
        (("layers", 0, "shape"), [1, 2, 3], r"layers\[0\].shape is \[1, 2, 3\], where a list of 2 belongs"),
        (("layers", 0, "pattern"), "4:2", r"layers\[0\].pattern: .*4:2"),
        (("layers", 0, "numbers"), "int5", r"layers\[0\].numbers: .*int5"),
        (("layers", 0, "numbers"), 8, r"layers\[0\].numbers is 8, where the name of numbers"),
        (("layers", 0, "dense_above"), "8", r"layers\[0\].dense_above is '8', where a whole number belongs"),
        (("layers", 1, "tried"), "2:4", r"layers\[1\].tried is '2:4', where an object belongs"),
        (("layers", 1, "dense_seconds", "1"), "fast", r"layers\[1\].dense_seconds.1 is 'fast', where a number belongs"),
        (("layers", 0, "limits", "1"), {}, r'layers\[0\].limits.1 has no "value"'),
        (("layers", 0, "pattern"), ..., r'layers\[0\] has no "pattern"'),
        (("machine", "kind"), "tpu", 'machine.kind is \'tpu\', where "cpu" or "cuda" belongs'),
        (("layers", 0, "shape", 1), 10**400, r"layers\[0\].shape\[1\] is 1000.*, where a number of 64 bits belongs"),
        (("layers", 0, "error"), float("nan"), r"layers\[0\].error is nan, where a finite number belongs"),
        (("layers", 0, "sparse_seconds", "128"), 0, r"layers\[0\] takes 0.0 seconds at batch 128 \(sparse_seconds\)"),
        (("layers", 0, "other_backends", "triton", "1"), -1.0, r"layers\[0\] takes -1.0 seconds at batch 1 \(triton\)"),
        (("layers", 0, "dense_ways", "torch bf16", "1"), 0, r"layers\[0\] takes 0.0 seconds at batch 1 \(torch bf16\)"),
        (("layers", 0, "engines", "OpenVINO bf16"), 3, r"layers\[0\].engines.OpenVINO bf16 is 3, where an object"),
        (("layers", 0, "dense_seconds", "1"), ..., r"layers\[0\] has sparse_seconds of batch 1, and no dense_seconds"),
    ],
)
def test_what_is_no_plan_is_refused(path: tuple[str | int, ...], value: Any, says: str, tmp_path: Path) -> None:
    facts = _with(path, value)
    with pytest.raises(FormatError, match=f"{says}.*; make it again with sparsecomp.plan"):
        Plan.from_dict(facts)
    (tmp_path / "plan.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=f"^{tmp_path / 'plan.json'}: {says}"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "it is no JSON"),
        (b"\xff\xfe{}", "it is no JSON"),
        (b"[]", "this is no plan"),
        (b"3", "this is no plan"),
        (b"[" * 200_000, "it is no JSON"),
        (json.dumps(plan_of(GPU).to_dict()).encode()[:-9], "it is no JSON"),
    ],
)
def test_files_that_hold_no_plan_are_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=f"plan.json.*{says}.*make it again with"):
        Plan.load(path)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_of(GPU).save(path)
    before = path.read_bytes()
    broken = replace(plan_of(GPU), weights=float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON"):
        broken.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FormatError, match="there is no folder"):
        plan_of(GPU).save(tmp_path / "none" / "plan.json")


def test_a_plan_pickled_before_it_held_choices_is_read() -> None:
    """Models that version 0.1.0 pickled whole hold the plan that they were compiled by."""
    for layer in (SPARSE, DENSE, UNTRIED):
        facts = dict(vars(layer))
        chosen, tried = facts.pop("choice"), facts.pop("tried")
        facts |= {"pattern": chosen and chosen.pattern, "tried": tried and tried.pattern}
        facts |= {"backend": tried and tried.backend, "dense_above": chosen and chosen.dense_above}
        facts = {name: value for name, value in facts.items() if name not in ("dense_ways", "engines")}
        old = LayerPlan.__new__(LayerPlan)
        old.__setstate__(facts)
        assert old == replace(layer, dense_ways={}, engines={}) and pickle.loads(pickle.dumps(old)) == old
    before = {name: value for name, value in vars(plan_of(GPU)).items() if name != "engines_missing"}
    plan = Plan.__new__(Plan)
    plan.__setstate__(before)
    assert plan == replace(plan_of(GPU), engines_missing={})


def test_the_error_says_whose_it_is() -> None:
    assert "whatever method prunes it" in " ".join(plan_of(GPU).text(80).split())
    assert "whatever method" not in str(replace(plan_of(GPU), layers=(DENSE,)))
