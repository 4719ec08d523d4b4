"""What a report says, as JSON, CSV and a page; and that finished layers are kept."""

from __future__ import annotations

import csv
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparsecomp.errors import FormatError, ModelError, PatternError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.models.calibration import calibrate
from sparsecomp.patterns import NM
from sparsecomp.planning.planner import plan
from sparsecomp.pruning import LayerReport, PruneReport, Stage, Tuning, checkpoint, prune, prune_blocks
from sparsecomp.pruning import solve as layerwise
from sparsecomp.pruning.checkpoint import Checkpoint, digest
from sparsecomp.pruning.page import page
from tests.pruning.block_models import encoder, token_batches
from tests.pruning.pages import Page


@pytest.fixture(scope="module")
def report() -> PruneReport:
    tuning = Tuning(steps=4)
    made = prune_blocks(encoder(), token_batches(3), {"*.up": "4:8", "*": "2:4"}, tuning=tuning, show_progress=False)
    stages = (Stage("plain", 1.0, {"cosine": 0.5, "rank": 0.25}), Stage("tuned", 2.0, {"cosine": 0.75}))
    return PruneReport(
        made.method, made.layers, made.skipped, made.masks, {"blocks.0.q": "a <reason>"}, made.tunings, stages
    )


def test_json_and_csv_say_the_same(report, tmp_path):
    for suffix in ("json", "csv"):
        report.save(tmp_path / f"report.{suffix}")
    told = json.loads((tmp_path / "report.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert [row["name"] for row in rows] == [layer["name"] for layer in told["layers"]] == list(report.layers)
    assert [float(row["error"]) for row in rows] == [layer.error for layer in report.layers.values()]
    assert rows[0]["shape"] == "16x16"
    assert told["stages"][1] == {"name": "tuned", "seconds": 2.0, "figures": {"cosine": 0.75}}
    assert told["tunings"][0]["held_out_after"] == report.tunings[0].held_out_after
    with pytest.raises(FormatError, match=r'a report is no "\.pdf" file'):
        report.save(tmp_path / "report.pdf")
    assert "Stage by stage" in str(report) and "tuned" in str(report) and "held out" in str(report)


def test_a_note_is_told_everywhere_and_a_figure_that_is_no_number_breaks_nothing(tmp_path):
    note = "the refit had not <converged>"
    layer = LayerReport("a", (4, 4), NM(2, 4), "fast", 0.5, 0.1, "gram", 0.0, notes=(note,))
    stages = [Stage(name, 1.0, {"cosine": math.nan, "rank": value}) for name, value in (("a", 0.5), ("b", math.inf))]
    report = PruneReport("fast", {"a": layer}, {}, stages=stages)
    for suffix in ("json", "csv", "html"):
        report.save(tmp_path / f"report.{suffix}")
    told = json.loads((tmp_path / "report.json").read_text())
    assert [each["figures"] for each in told["stages"]] == [
        {"cosine": None, "rank": 0.5},
        {"cosine": None, "rank": None},
    ]
    assert told["layers"][0]["notes"] == [note]
    seen = Page()
    seen.feed((tmp_path / "report.html").read_text())
    assert seen.open == [] and note in seen.text
    assert note in str(report) and note in (tmp_path / "report.csv").read_text()


def test_odd_reports_still_draw():
    layer = LayerReport("", (4, 0), NM(2, 4), "wanda", 0.0, math.inf, "gram", 0.0)
    empty = PruneReport("wanda", {"": layer}, {}, {"": torch.zeros(4, 0, dtype=torch.bool)})
    for each in (empty, PruneReport("wanda", {}, {})):
        seen = Page()
        seen.feed(page(each, "<&>"))
        assert seen.open == [] and "<&>" in seen.text
        assert each.to_csv().startswith("name")
    assert LayerReport.from_dict(layer.to_dict()) == layer


def test_work_of_other_code_is_not_taken_for_finished(tmp_path, monkeypatch):
    weight = torch.ones(2, 2)
    store = Checkpoint(tmp_path)
    store.save("a", digest(weight), {"weight": weight}, {})
    assert store.load("a", digest(weight)) is not None
    monkeypatch.setattr(checkpoint, "_code", lambda: b"another version")
    assert store.load("a", digest(weight)) is None
    store.save("a", digest(weight), {"weight": weight}, {})
    assert store.load("a", digest(weight)) is not None
    assert len(list(tmp_path.iterdir())) == 1, "it takes the place of the old work"


def test_threads_that_keep_one_piece_do_not_meet(tmp_path):
    store, weight = Checkpoint(tmp_path), torch.randn(64, 64)
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(store.save, "a", "key", {"weight": weight}, {}) for _ in range(30)]:
            done.result()
    kept = store.load("a", "key")
    assert kept is not None and torch.equal(kept[0]["weight"], weight) and len(list(tmp_path.iterdir())) == 1


def test_the_code_of_a_checkpoint_is_its_version_and_its_sources(monkeypatch):
    seen = set()
    for version, sources in (("1", "a"), ("1", "b"), ("2", "b")):
        monkeypatch.setattr("sparsecomp.__version__", version)
        monkeypatch.setattr(checkpoint, "package_digest", lambda sources=sources: sources)
        seen.add(digest("the same work"))
    assert len(seen) == 3


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_finished_layers_are_kept_and_used_again(tmp_path, monkeypatch):
    want, calls, real = small(), [], layerwise.prune_weight
    calibration = calibrate(want, [torch.randn(64, 16)], show_progress=False)
    expected = prune(want, "2:4", "wanda", calibration, show_progress=False)

    def counting(w, *rest):
        calls.append(tuple(w.shape))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(w, *rest)

    monkeypatch.setattr(layerwise, "prune_weight", counting)
    model = small()
    with pytest.raises(KeyboardInterrupt):
        prune(model, "2:4", "wanda", calibration, checkpoint=tmp_path / "work", show_progress=False)
    torch.testing.assert_close(model.state_dict(), small().state_dict(), rtol=0, atol=0)
    report = prune(model, "2:4", "wanda", calibration, checkpoint=tmp_path / "work", show_progress=False)
    assert calls == [(32, 16), (8, 32), (8, 32)]
    torch.testing.assert_close(model.state_dict(), want.state_dict(), rtol=0, atol=0)
    assert report.layers["0"].error == expected.layers["0"].error
    assert all(torch.equal(report.masks[name], mask) for name, mask in expected.masks.items())
    # another method, pattern or Gram is other work
    for changed in (("1:4", "wanda", calibration), ("2:4", "magnitude", calibration), ("2:4", "wanda", None)):
        before = len(calls)
        if changed[2] is None:
            changed = (*changed[:2], calibrate(small(), [torch.randn(64, 16)], show_progress=False))
        prune(small(), *changed, checkpoint=tmp_path / "work", show_progress=False)
        assert len(calls) == before + 2


def test_a_checkpoint_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match=r'checkpoint ".*file" is no folder'):
        prune(small(), "2:4", checkpoint=tmp_path / "file")
    kept = Checkpoint(tmp_path)
    kept.save("a/b*", "key", {"x": torch.arange(3)}, {"n": 1})
    tensors, facts = kept.load("a/b*", "key")
    assert facts == {"n": 1} and torch.equal(tensors["x"], torch.arange(3))
    assert kept.load("a/b*", "other") is None and kept.load("a_b_", "key") is None
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FormatError, match=r"cannot be read .*delete it"):
        kept.load("a/b*", "key")
    assert Checkpoint(None).load("a", "key") is None


def test_digests_tell_everything_apart():
    a = torch.randn(3, 4)
    parts = [a, a.t(), a.half(), a + 1, a.reshape(4, 3), torch.zeros(0, 3), torch.zeros(3, 0), None, "None", 1, "1"]
    assert len({digest(part) for part in parts}) == len(parts)
    assert digest("ab", "c") != digest("a", "bc")
    assert digest(a) == digest(a.clone())
    assert digest(a.bfloat16()) == digest(a.bfloat16())


def test_a_plan_is_followed():
    made = plan(small(), "2:4", measure=False)
    report = prune(small(), made, show_progress=False)
    assert set(report.layers) == set(made.sparse)
    for name, reason in made.stayed_dense.items():
        assert report.skipped[name] == f"the plan leaves it dense: {reason}"
    assert report.layers or report.skipped
    if made.sparse:
        with pytest.raises(ModelError, match="which this model lacks"):
            prune(nn.Sequential(nn.Linear(8, 8)), made)
    with pytest.raises(PatternError, match="pattern is a int"):
        prune(small(), 24)


def test_masks_go_in_and_come_out():
    model, first = small(), small()
    masks = prune(first, "2:4", show_progress=False).masks
    report = prune(model, "2:4", "magnitude", masks={"2": ~masks["2"]}, show_progress=False)
    assert torch.equal(report.masks["2"], ~masks["2"]) and torch.equal(report.masks["0"], masks["0"])
    want = prune_weight(small()[2].weight, "2:4", mask=~masks["2"]).weight
    assert torch.equal(model[2].weight, want)
    with pytest.raises(PatternError, match=r"2: the mask breaks 2:4"):
        prune(small(), "2:4", masks={"2": torch.ones(8, 32, dtype=torch.bool)})
    with pytest.raises(
        ModelError, match=r'a mask is given for "9", which is not pruned \(the model has no such layer\)'
    ):
        prune(small(), "2:4", masks={"9": masks["2"]})
    with pytest.raises(ModelError, match=r'for "2", which is not pruned \(excluded by skip "2"\)'):
        prune(small(), "2:4", masks=masks, skip="2")


def test_the_callers_random_numbers_are_left_alone():
    model, state = small(), torch.get_rng_state()
    prune(model, "2:4", seed=1, show_progress=False)
    assert torch.equal(torch.get_rng_state(), state)
