"""The pruning report as a page: what it says first, what it draws and leaves out, and that it is safe to send."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from sparsecomp.models.calibration import calibrate
from sparsecomp.patterns import parse
from sparsecomp.pruning import LayerReport, PruneReport, Stage, Tuning, TuningReport, prune, prune_blocks
from sparsecomp.pruning.page import page
from sparsecomp.pruning.provenance import ModelFacts, Provenance
from sparsecomp.reporting.markup import Axes, ticks
from tests.pruning.block_models import encoder, token_batches
from tests.pruning.pages import Page


def layer(name: str = "a", pattern: str = "2:4", **facts: object) -> LayerReport:
    made = LayerReport(name, (8, 16), parse(pattern), "balanced", 0.5, 0.1, "gram", 0.25)
    return dataclasses.replace(made, **facts)


def report_of(*layers: LayerReport, **facts: object) -> PruneReport:
    made = PruneReport(layers[0].method if layers else "balanced", {each.name: each for each in layers}, {})
    return dataclasses.replace(made, **facts)


def provenance(**facts: object) -> Provenance:
    model = ModelFacts("Shop", "shop/small", 1000, 900, 400, {"head": 123})
    made = Provenance("2026-11-30T15:24:05+00:00", model, {"sparsecomp": "9.8.7"}, "A Processor", "avx2", 2, "Linux")
    return dataclasses.replace(made, **facts)


@pytest.fixture(scope="module")
def pruned() -> PruneReport:
    tuning = Tuning(steps=4)
    made = prune_blocks(encoder(), token_batches(3), {"*.up": "4:8", "*": "2:4"}, tuning=tuning, show_progress=False)
    stages = (Stage("plain", 1.0, {"cosine": 0.5, "rank": 0.25}), Stage("tuned", 2.0, {"cosine": 0.75}))
    return dataclasses.replace(made, stages=stages, unpermuted={"blocks.0.q": "a <reason>"})


def test_the_page_stands_alone_and_shows_everything(pruned, tmp_path):
    pruned.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    seen = Page(text)
    assert not re.search(r"\b(src|href)=|@import|url\(", text)
    # the only addresses are names of the SVG language
    assert set(re.findall(r"https?://[^\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    for name, each in pruned.layers.items():
        assert name in seen.text and f"{each.error:.4f}" in seen.text and f"{each.held_out_error:.4f}" in seen.text
    assert "a <reason>" in seen.text and "it is in none of the blocks" in seen.text
    assert "0.7500" in seen.text and "cosine" in seen.text and "blocks.1: held-out loss" in seen.text
    assert seen.count("svg") == 1 + 2, "a figure that two stages have, two tunings; no mask and no flat curve"


def test_verdict_and_totals_come_before_the_table_and_charts_after_it(pruned):
    headings = re.findall(r"<h2>(.*?)</h2>", page(pruned))
    wanted = ["Verdict", "Totals", "Stage by stage", "What the figures mean", "Layers"]
    assert headings[: len(wanted)] == wanted
    assert headings.index("Tuning") > headings.index("Left dense") > headings.index("Layers")
    assert headings[-1] == "How this was made"


def test_the_head_names_model_date_method_and_version():
    made = report_of(layer("a"), layer("b", "4:8"), provenance=provenance())
    text = page(made)
    head = Page(re.search(r"<header>.*?</header>", text, re.DOTALL)[0]).text
    for word in ("Shop, pruned to 2:4 and 4:8", "shop/small", "2026-11-30 15:24 UTC", "balanced", "sparsecomp 9.8.7"):
        assert word in head
    assert "<title>Shop, pruned to 2:4 and 4:8</title>" in text
    assert "<h1>of mine</h1>" in page(made, "of mine")


def test_the_page_says_how_it_was_made():
    told = provenance(seed=17, batches=3, held_out_batches=1, data="news", command="sparsecomp prune a:b")
    text = Page(page(report_of(layer(rows=640), provenance=told))).text
    for word in ("17", "news, 3 batches, 1 held out, up to 640 rows", "A Processor, avx2, 2 threads", "prune a:b"):
        assert word in text
    assert "How this was made" not in page(report_of(layer()))


@pytest.mark.parametrize(
    ("error", "word"), [(0.03, "small"), (0.1, "moderate"), (0.2, "large"), (0.3, "very large"), (2.0, "very large")]
)
def test_the_verdict_gives_the_mean_a_word(error, word):
    text = Page(page(report_of(layer(error=error)))).text
    assert f"The mean error of a layer is {error:.4f}: {word}." in text
    assert f"{error:.1%} of that output" in text and f"{error**2:.1%} of its energy" in text
    assert "all-MiniLM-L6-v2" in text and "do not add up to the quality of a task" in text


def test_the_verdict_judges_by_rows_the_method_has_not_seen():
    made = report_of(layer("a", error=0.01, held_out_error=0.4), layer("b", error=0.02, held_out_error=0.1))
    text = Page(page(made)).text
    assert "The mean error of a layer is 0.2000: large." in text and "had not seen" in text
    assert "the worst is a with 0.4000" in text
    assert "had not seen" not in Page(page(report_of(layer()))).text


def test_the_verdict_promises_nothing_that_was_not_measured():
    weights = Page(page(report_of(layer(measured_on="weight", error=0.25)))).text
    assert "25% of the weights" in weights and "no calibration data" in weights and "large" not in weights
    odd = Page(page(report_of(layer("x", error=math.inf), layer("b")))).text
    assert "1 layer without a finite error, such as x" in odd
    assert 'the worst is "7" with' in Page(page(report_of(layer("7")))).text, "a number would read as a figure"
    assert "No layer was pruned." in Page(page(report_of())).text
    assert "answer as before" in Page(page(report_of(layer(error=0.0)))).text
    tuned = TuningReport("a", 40, 10, 0.3, 0.2, 0.4, 0.3, [(0, 0.4), (10, 0.3)], 3.0)
    text = Page(page(report_of(layer(error=0.2), tunings=[tuned]))).text
    assert "from before tuning" in text and "Without tuning" not in text


def test_totals_add_up():
    made = report_of(
        layer("a", error=0.1), layer("b", density=0.25, error=0.4), skipped={"head": "why"}, provenance=provenance()
    )
    text = " ".join(Page(page(made)).text.split())
    assert "2, 1 left dense" in text and "37.5% of 256" in text and "26% of 1,000 parameters" in text
    assert "Embeddings hold 400 of the parameters; of all other matrices 51% were pruned" in text
    assert "0.2000 (0.4000)" in text and "(1 layer, 123 weights)" in text


@pytest.mark.parametrize(
    ("method", "rows", "flagged"), [("sparsegpt", 63, True), ("sparsegpt", 64, False), ("magnitude", 4, False)]
)
def test_few_rows_are_flagged_where_a_method_looked_at_them(method, rows, flagged):
    made = report_of(layer(method=method, rows=rows), layer("b"))
    text = page(made)
    assert ("Too little calibration" in text) == flagged == ('class="n few"' in text)
    assert (f"{rows:,} rows for 16 inputs" in text) == flagged
    shown = str(made)
    assert (f'("a": {rows} rows, 16 inputs)' in " ".join(shown.split())) == flagged
    assert "rows/in" in shown and (f"{rows / 16:.1f}"[:3] in shown or f"{rows / 16:.2g}" in shown)


@pytest.mark.parametrize(("held_out", "rows"), [(None, 20), (math.inf, 20), (0.3, 20), (None, 64)])
def test_an_error_on_few_rows_gets_no_word_and_no_advice(held_out, rows):
    made = report_of(layer(method="sparsegpt", error=0.02, rows=rows, held_out_error=held_out), layer("b", rows=640))
    text = page(made)
    told = rows == 20 and held_out != 0.3
    assert ("cannot be told" in text) == told == ('class="scale"' not in text)
    advice = ("may do as it is", "differently", "differ plainly", "little use")
    assert any(each in text for each in advice) == (not told)
    assert ("Too little calibration" in text) == (rows == 20)


def test_pruning_counts_the_rows_of_each_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    statistics = calibrate(model, [torch.randn(7, 16), torch.randn(3, 2, 16)], show_progress=False)
    assert [each.rows for each in prune(model, "2:4", "wanda", statistics).layers.values()] == [13, 13]
    assert [each.rows for each in prune(model, "2:4").layers.values()] == [None, None]
    batches = token_batches(3)
    made = prune_blocks(encoder(), batches, tuning=None, held_out=batches[2:], show_progress=False)
    tokens = sum(int(each["attention_mask"].sum()) for each in batches)
    assert {each.rows for each in made.layers.values()} == {tokens}
    assert made.provenance.batches == 3 and made.provenance.held_out_batches == 1 and made.provenance.seed == 0


def test_the_table_sorts_from_the_keyboard_and_leaves_out_what_says_nothing():
    text = page(report_of(layer("a"), layer("b", error=0.3)))
    table = re.search(r'<table class="sortable">.*?</table>', text, re.DOTALL)[0]
    heads = re.findall(r"<th scope=\"col\"([^>]*)><button type=\"button\">(.*?)</button></th>", table)
    assert [head for _, head in heads] == ["#", "layer", "out x in", "error", "seconds"]
    assert [("aria-sort" in more) for more, _ in heads] == [True, False, False, False, False]
    assert "All layers: pattern 2:4, 50.0% kept." in text
    assert re.findall(r'data-v="([^"]*)"', table) == ["128", "0.1", "128", "0.3"]
    mixed = page(report_of(layer("a"), layer("b", "1:4", density=0.25, permuted=True, held_out_error=0.2, rows=99)))
    heads = re.findall(r"<button type=\"button\">(.*?)</button>", mixed)
    assert heads[2:] == ["out x in", "pattern", "kept", "error", "held out", "rows/input", "seconds", "permuted"]
    assert '.sortable td:nth-child(4)::before { content: "pattern" }' in mixed, "cards on narrow screens name it"


def test_names_cannot_break_the_page():
    name = "a<script>alert(1)</script>&\"'\x00.\ud800"
    told = provenance(model=ModelFacts("</title><b>", '"<i>', 10, 10, 0), data="<u>", command="'<s>'")
    tuned = TuningReport(name, 4, 1, 0.3, 0.2, 0.4, 0.3, [(0, 0.4), (1, 0.3)], 3.0, "</td>")
    made = report_of(
        layer(name, method="<m>", notes=("</li>",), rows=3),
        skipped={name: "</ul>"},
        unpermuted={name: "&lt;"},
        tunings=[tuned],
        stages=[Stage("<x>", 1.0, {"<y>": 0.5}), Stage("b", 1.0, {"<y>": 0.6})],
        provenance=told,
    )
    text = page(made, "<&>")
    seen = Page(text)
    assert "<&>" in seen.text and "a<script>alert(1)</script>&\"'" in seen.text and "&lt;" in seen.text
    assert {tag for tag, _ in seen.tags}.isdisjoint({"b>", "i", "u", "s", "x", "y", "m"})
    assert seen.count("script") == 1 and "\x00" not in text
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 0.3, ["0.0", "0.1", "0.2", "0.3"]),
        (0.000012, 0.000015, ["0.000012", "0.000013", "0.000014", "0.000015"]),
        (1.2e-9, 1.5e-9, ["12e-10", "13e-10", "14e-10", "15e-10"]),
        (0.0, 3e-8, ["0", "1e-8", "2e-8", "3e-8"]),
        (0.0, 3e6, ["0", "1000000", "2000000", "3000000"]),
    ],
)
def test_figures_of_an_axis_differ_and_have_room_beside_its_name(low, high, labels):
    axes = Axes((0, 1), ticks(low, high, 3), "step", "loss")
    assert axes.y_labels == labels
    drawn = "".join(axes.drawn([]))
    ends = [float(each) for each in re.findall(r'<text x="([0-9.]+)"[^>]*text-anchor="end"', drawn)]
    # 11 pixels high, a figure is 6.2 wide; the name stands upright in the first 16
    assert len(ends) == len(labels) and min(ends) - 6.2 * max(map(len, labels)) >= 16


def test_narrow_screens_show_tables_of_tunings_and_stages_as_cards(pruned):
    text = page(pruned)
    assert text.count('<table class="stack">') == 2
    assert re.findall(r'data-h="([^"]*)"', text[text.index('id="tuning"') :])[:5] == [
        "held-out loss",
        "change",
        "trained-on loss",
        "kept step",
        "time",
    ]
    assert "content: attr(data-h)" in text[text.index("@media (max-width: 640px)") :]


def test_a_page_of_many_layers_stays_small_and_draws_no_noise():
    torch.manual_seed(0)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{kind}" for i in range(56) for kind in kinds]
    masks = {name: torch.zeros(16, 64).scatter_(1, torch.rand(16, 64).argsort()[:, :32], 1.0) > 0 for name in names}
    errors = torch.linspace(0.1, 0.3, len(names)).tolist()
    layers = [layer(name, error=error, held_out_error=error * 1.1) for name, error in zip(names, errors, strict=True)]
    tunings = [TuningReport(f"model.layers.{i}", 9, 1, 1, 1, 1, 1, [(0, 1.0), (9, 0.5)], 1.0) for i in range(56)]
    text = page(report_of(*layers, masks=masks, tunings=tunings))
    assert len(text) < 400_000
    assert text.count("<svg") == len(kinds) + 56 and "<summary>56 curves</summary>" in text
    assert 'class="map"' not in text and "Positions" not in text


def test_notes_that_differ_in_figures_only_are_told_together():
    notes = [f"damping 0.0{i} gave the least error, {i}e-05" for i in range(1, 8)]
    layers = [layer(f"h.{i}", notes=(note,)) for i, note in enumerate(notes)]
    made = report_of(*layers, layer("x", notes=("it had not settled in 40 steps",)))
    text = Page(page(made)).text
    assert all(note in text for note in notes) and "damping … gave the least error, …" in text
    assert "it had not settled in 40 steps" in text and page(made).count("<details>") == 1
    shown = str(made)
    assert notes[3] in shown and notes[4] not in shown and "and 3 more such notes" in shown
    assert "x: it had not settled in 40 steps" in shown


def test_error_by_depth_draws_each_layer_where_it_stands():
    errors = [0.1, 0.2, 0.4, 0.1, 0.3]
    text = page(report_of(*(layer(f"h.{i}.up", error=error) for i, error in enumerate(errors)), layer("head")))
    drawn = re.search(r"<title>Error by depth, h\.\*\.up</title>.*?</svg>", text)[0]
    dots = re.findall(r'<circle class="a" cx="([\d.]+)" cy="([\d.]+)".*?<title>(.*?)</title>', drawn)
    assert [tip for _, _, tip in dots] == [f"h.{i}.up: {error:.4f}" for i, error in enumerate(errors)]
    across = [float(x) for x, _, _ in dots]
    assert across == pytest.approx([across[0] + (across[-1] - across[0]) * i / 4 for i in range(5)], abs=0.1)
    grid = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([\d.]+)H', drawn)]
    marks = [float(value) for value in re.findall(r'text-anchor="end">([\d.]+)</text>', drawn)]
    scale = (grid[-1] - grid[0]) / (marks[-1] - marks[0])
    for (_, y, _), error in zip(dots, errors, strict=True):
        assert float(y) == pytest.approx(grid[0] + scale * (error - marks[0]), abs=0.2)
    flat = page(report_of(*(layer(f"h.{i}.up", error=0.2) for i in range(6))))
    assert "Error by depth" not in flat


def test_axes_have_round_figures_that_hold_all_values():
    for low, high in ((0.0, 0.31), (0.0639, 0.0771), (5.0, 5.0), (0.0, 0.0), (-3.0, 40000.0), (1e-9, 2e-9)):
        marks = ticks(low, high)
        assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 2 <= len(marks) <= 7
        steps = {float(f"{b - a:.6g}") for a, b in pairwise(marks)}
        assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"


def test_a_tuning_curve_says_what_it_draws():
    tuned = TuningReport("t", 40, 20, 0.3, 0.2, 0.4, 0.3, [(0, 0.4), (20, 0.3), (40, 0.35)], 75.0)
    text = page(report_of(layer(), tunings=[tuned]))
    drawn = re.search(r"<title>t: held-out loss</title>.*?</svg>", text)[0]
    for word in (">step<", ">held-out loss<", ">0.30<", ">0.40<", ">20<", ">40<", "step 20 was kept"):
        assert word in drawn
    assert "-25%" in text and "1 min 15 s" in text and "20 of 40" in text


def map_cells(text: str, name: str) -> torch.Tensor:
    """The cells of the mask map of that layer, 0 where nothing is drawn and else the shade."""
    drawn = re.search(rf'viewBox="0 0 (\d+) (\d+)" role="img"><title>{name}: mask</title>(.*?)</svg>', text)
    cells = torch.zeros(int(drawn[2]), int(drawn[1]), dtype=torch.long)
    for shade, path in re.findall(r'class="m(\d)" d="([^"]*)"', drawn[3]):
        for column, row, length in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path):
            cells[int(row), int(column) : int(column) + int(length)] = int(shade)
    return cells


def test_a_map_of_blocks_draws_exactly_the_kept_ones():
    torch.manual_seed(0)
    blocks = torch.rand(6, 10) > 0.5
    mask = blocks.repeat_interleave(4, 0).repeat_interleave(8, 1)
    made = report_of(layer("w", "block4x8:0.5", shape=(24, 80)), masks={"w": mask})
    assert torch.equal(map_cells(page(made), "w"), 4 * blocks.long())
    # ragged edges, and more blocks than cells: shares are averaged
    large = torch.zeros(1030, 520, dtype=torch.bool)
    large[:, 260:] = True
    cells = map_cells(page(report_of(layer("w", "block2x2:0.5", shape=(1030, 520)), masks={"w": large})), "w")
    assert cells.shape[0] <= 32 and cells.shape[1] <= 64
    assert int(cells[:, 0].max()) == 0 and int(cells[:, -1].min()) == 4


def test_unstructured_masks_are_drawn_where_they_have_a_structure():
    torch.manual_seed(0)
    noise = torch.rand(256, 512) > 0.5
    columns = torch.rand(256, 512) < torch.linspace(0.1, 0.9, 512)
    made = report_of(layer("a.x", "unstructured:0.5"), layer("a.y", "unstructured:0.5"))
    text = page(dataclasses.replace(made, masks={"a.x": noise, "a.y": columns}))
    assert "a.x: mask" not in text and "a.y: mask" in text
    cells = map_cells(text, "a.y").double().mean(dim=0)
    assert float(cells[:8].mean()) < 1.0 and float(cells[-8:].mean()) > 3.0


def test_positions_are_shown_where_masks_prefer_some():
    torch.manual_seed(0)
    even = torch.zeros(64, 64, 4).scatter_(2, torch.rand(64, 64, 4).argsort(-1)[..., :2], 1.0).bool().reshape(64, 256)
    assert "Positions" not in page(report_of(layer("a"), masks={"a": even}))
    uneven = torch.tensor([True, True, False, False]).repeat(64, 48)
    uneven[:, 100:] = even[:, 100:192]
    text = page(report_of(layer("a", shape=(64, 192)), masks={"a": uneven}))
    drawn = re.search(r"<title>Kept positions, 2:4</title>(.*?)</svg>", text)[1]
    shares = uneven.reshape(-1, 4).double().mean(dim=0)
    assert [int(each) for each in re.findall(r">(\d+)%<", drawn)] == [round(100 * float(share)) for share in shares]


def test_the_page_does_not_depend_on_the_default_device():
    mask = torch.ones(8, 16, dtype=torch.bool, device="cpu")
    mask[:4] = False
    made = report_of(layer("w", "block4x4:0.5"), masks={"w": mask})
    want = page(made)
    with torch.device("meta"):
        assert page(made) == want and 'class="map"' in want
