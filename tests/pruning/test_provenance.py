"""What a report says of its circumstances, in every form, and its text on a terminal of 80 columns."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from datetime import datetime, timedelta, timezone

import pytest
import torch
from torch import nn

import sparsecomp
from sparsecomp.patterns import parse
from sparsecomp.pruning import LayerReport, PruneReport, TuningReport, prune
from sparsecomp.pruning.provenance import ModelFacts, describe
from sparsecomp.reporting.figures import count_text, ratio_text, seconds_text, share_text


class Shop(nn.Module):
    """An embedding tied to the head, a convolution, and two layers of which one is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(2, 3, 5)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_json_and_csv_say_where_a_report_comes_from(tmp_path):
    report = prune(Shop(), "2:4", only="up", seed=5, show_progress=False)
    report = report.with_command(["sparsecomp", "prune", "a b:c"], data="news", batches=4)
    report.save(tmp_path / "r.json")
    report.save(tmp_path / "r.csv")
    told = json.loads((tmp_path / "r.json").read_text())["provenance"]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))
    made = datetime.fromisoformat(told["created"])
    assert timedelta() <= datetime.now(timezone.utc) - made < timedelta(minutes=5)
    assert told["model"]["name"] == row["model"] == "Shop"
    assert told["model"]["parameters"] == int(row["parameters"]) == 80 + 33 + 144 + 136
    assert told["versions"]["sparsecomp"] == row["sparsecomp"] == sparsecomp.__version__
    assert told["versions"]["torch"] == row["torch"] == torch.__version__
    assert told["seed"] == int(row["seed"]) == 5 and told["batches"] == int(row["batches"]) == 4
    assert shlex.split(told["command"]) == shlex.split(row["command"]) == ["sparsecomp", "prune", "a b:c"]
    assert told["data"] == row["data"] == "news" and told["processor"] == row["processor"] != ""
    assert row["name"] == "up" and row["pattern"] == "2:4"


def test_a_report_without_provenance_is_still_a_report():
    bare = PruneReport("wanda", {}, {})
    assert bare.with_command(["x"]) is bare and bare.to_dict()["provenance"] is None
    assert bare.to_csv().startswith("name,shape,pattern")


def test_model_facts_count_each_weight_once():
    facts = ModelFacts.of(Shop(), ["conv", "down", "head", "up.weight", "nowhere"])
    assert (facts.parameters, facts.matrix_weights, facts.embedding_weights) == (393, 80 + 30 + 128 + 128, 80)
    assert facts.left_dense == {"conv": 30, "down": 128, "head": 80, "up.weight": 128}
    hidden = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    assert ModelFacts.of(nn.Sequential(hidden), ["0"]).left_dense == {"0": 24 + 6}


@pytest.mark.parametrize(
    ("path", "source"),
    [("org/name", "org/name"), ("/a/secret/folder", "folder"), ("../b/there", "there"), ("", None), (None, None)],
)
def test_the_source_of_a_model_tells_nothing_of_the_disk(path, source):
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"_name_or_path": path})()
    assert ModelFacts.of(model).source == source


def test_a_command_of_bytes_that_are_no_text_can_be_written(tmp_path):
    report = prune(nn.Sequential(nn.Linear(4, 4)), "2:4", show_progress=False).with_command(["prune", "m\udcff"])
    for suffix in ("json", "csv", "html"):
        report.save(tmp_path / f"r.{suffix}")
    assert "m\ufffd" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_circumstances_depend_on_no_default(device):
    model = nn.Linear(4, 4, device=device)
    want = describe(model)
    with torch.device("meta"):
        got = describe(model)
    assert dataclasses.replace(got, created=want.created) == want
    assert describe(nn.Module()).model.parameters == 0


NAMES = [
    f"encoder.layer.{i}.{name}"
    for i in range(6)
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]


def report_on(names: list[str], **facts: object) -> PruneReport:
    made = LayerReport("", (11008, 4096), parse("2:4"), "balanced", 0.5, 0.1, "gram", 123.4, 0.2, True, (), 40960)
    layers = {name: dataclasses.replace(made, name=name, **facts) for name in names}
    return PruneReport("balanced", layers, {f"{name}.norm": "it is no linear layer" for name in names})


@pytest.mark.parametrize("names", [NAMES, [*NAMES, "pooler.dense"], NAMES[:3], ["x" * 70], ["a." * 40 + "b", "c"]])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.25"])
def test_the_table_fits_80_columns(names, pattern, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = dataclasses.replace(report_on(names, pattern=parse(pattern)), provenance=describe(Shop(), seed=3))
    lines = str(report).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("In all:"))]
    assert max(map(len, table)) <= 80
    assert pattern in "\n".join(table) and "50.0%" in "\n".join(table)


def test_equal_layers_of_many_blocks_share_a_line_with_their_worst(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report = report_on([*NAMES, "pooler.dense"])
    worst = dataclasses.replace(report.layers[NAMES[9]], error=0.7, held_out_error=0.9, rows=409)
    layers = {**report.layers, NAMES[9]: worst}
    shown = str(dataclasses.replace(report, layers=layers))
    (line,) = [each for each in shown.splitlines() if "6 x" in each and "attention.output.dense" in each]
    assert {"0.7000", "0.9000", "0.1!"} <= set(line.split())
    (other,) = [each for each in shown.splitlines() if "intermediate.dense" in each and "6 x" in each]
    assert {"0.1000", "0.2000", "10"} <= set(other.split())
    assert "pooler.dense" in shown and "equal layers share a line" in shown
    few = str(report_on(NAMES[:4]))
    assert all(name in few or name.removeprefix("encoder.layer.0.") in few for name in NAMES[:4])


def test_many_tunings_are_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made = TuningReport("", 40, 10, 0.3, 0.2, 0.4, 0.3, [(0, 0.4)], 3.0)
    tunings = [dataclasses.replace(made, name=f"encoder.layer.{i}", stopped=None if i else "nan") for i in range(9)]
    shown = str(dataclasses.replace(report_on(NAMES[:2]), tunings=tunings)).splitlines()
    rows = [line.split() for line in shown if line.startswith(" encoder.layer.") and "of 40" in line]
    assert rows == [[each.name, "0.4", "0.3", "-25%", "10", "of", "40", "3"] for each in tunings]
    assert "encoder.layer.0: nan" in shown
    few = str(dataclasses.replace(report_on(NAMES[:2]), tunings=tunings[1:3]))
    assert "encoder.layer.2: held-out loss 0.4 -> 0.3" in " ".join(few.split())


def test_figures_read_as_one_says_them():
    assert [count_text(each) for each in (999_999, 10_616_832, 8_030_261_248)] == [
        "999,999",
        "10.6 million",
        "8.03 billion",
    ]
    assert [share_text(*each) for each in ((0, 5), (1, 1000), (999, 1000), (5, 5), (1, 2), (1, 0))] == [
        "0%",
        "<1%",
        ">99%",
        "100%",
        "50%",
        "0%",
    ]
    assert [seconds_text(each) for each in (0.0, 0.5, 59.7, 200.0, 7000.0, float("inf"))] == [
        "<0.01 s",
        "0.5 s",
        "1 min 0 s",
        "3 min 20 s",
        "1 h 56 min",
        "?",
    ]
    assert [ratio_text(each) for each in (0.0156, 3.999, 12.9, 12345.6)] == ["0.016", "3.9", "12", "12,345"]
