"""The benchmark of sparse training on Fashion-MNIST, on made-up images: data, training, runs and what they say."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench.fetched import FOLDER
from bench.lottery import __main__, data, report
from bench.lottery.data import Data
from bench.lottery.results import CHOOSING_SEED, Results
from bench.lottery.runner import Runner
from bench.lottery.runs import RATES, SKIP, chosen, rate_name, registry
from bench.lottery.task import BATCH, Recipe, accuracy, made, optimizer_of, rate_at, train
from sparsecomp.errors import SparsecompError
from sparsecomp.models.layers import find_layers

PIXELS = 8


def pixels(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, with the square of the class brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (rows,), generator=generator)
    images = torch.randint(0, 100, (rows, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        images[row, label // 4 * 2 : label // 4 * 2 + 2, label % 4 * 2 : label % 4 * 2 + 2] += 120
    return images, labels


@pytest.fixture(scope="module")
def small() -> Data:
    return data.split(*pixels(800, 0), *pixels(100, 1), validation=100)


def idx(array: Tensor) -> bytes:
    """An IDX file of bytes."""
    head = [2049 if array.ndim == 1 else 2051, *array.shape]
    return b"".join(each.to_bytes(4, "big") for each in head) + bytes(array.flatten().to(torch.uint8).tolist())


def test_idx_files_are_read_and_others_refused():
    images, labels = pixels(5, 3)
    assert torch.equal(data.images(idx(images)), images) and torch.equal(data.labels(idx(labels)), labels)
    for read, content in ((data.images, idx(labels)), (data.labels, idx(images)), (data.images, idx(images)[:-1])):
        with pytest.raises(SparsecompError, match="no IDX file"):
            read(content)


def test_parts_share_no_image_and_are_scaled_by_what_is_trained_on(small):
    assert [len(each) for each in (small.train, small.validation, small.test)] == [700, 100, 100]
    assert float(small.train.images.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(small.train.images.std()) == pytest.approx(1.0, abs=1e-5)
    images, labels = pixels(800, 0)
    both = torch.cat([small.validation.images, small.train.images]).flatten(1)
    # scaling keeps the order of values, so that each is known by its rank
    ranks, original = (each.unique(return_inverse=True)[1] for each in (both, images.flatten(1)))
    assert sorted(ranks.tolist()) == sorted(original.tolist())
    again = data.split(images, labels, *pixels(100, 1), validation=100)
    assert torch.equal(again.validation.labels, small.validation.labels)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_the_archive_is_unpacked_and_checked(tmp_path, monkeypatch):
    inside = tmp_path / "tree"
    for name, rows, seed in (("train", 20, 0), ("t10k", 6, 1)):
        images, labels = pixels(rows, seed)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = inside / f"usr/share/datasets/fashion-mnist/{name}-{kind}-ubyte.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(idx(array)))
    control = inside / "DEBIAN/control"
    control.parent.mkdir()
    control.write_text("Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n")
    archive = tmp_path / data.ARCHIVE
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", inside, archive], check=True, capture_output=True)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(SparsecompError, match=r"another file than expected .* delete it"):
        data.load()
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "VALIDATION", 4)
    found = data.load()
    assert [len(each) for each in (found.train, found.validation, found.test)] == [16, 4, 6]
    assert torch.equal(found.test.labels, pixels(6, 1)[1])


def test_what_cannot_be_fetched_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SparsecompError, match="apt-get is not installed"):
        data.load()
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    assert data.folder() == tmp_path / "fashion-mnist"
    monkeypatch.setenv("SPARSECOMP_CACHE", "off")
    with pytest.raises(SparsecompError, match=FOLDER):
        data.folder()


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_nets_are_drawn_by_their_seed_and_name_what_stays_dense(net):
    one, same, other = (made(net, seed, PIXELS) for seed in (0, 0, 1))
    assert torch.equal(one[-1].weight, same[-1].weight) and not torch.equal(one[-1].weight, other[-1].weight)
    assert one(torch.randn(3, 1, PIXELS, PIXELS)).shape == (3, 10)
    found = find_layers(one, skip=SKIP[net])
    assert str(len(one) - 1) not in found and len(found) == 2
    assert all(found[name].channels % 4 == 0 for name in found)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[5:])) and rates[-1] < 0.001


def test_training_learns_and_goes_on_at_a_step_with_the_same_images(small):
    recipe = Recipe("mlp", "sgd", 0.1, 12)
    model = made("mlp", 0, PIXELS)
    before = accuracy(model, small.test)
    seen: list[tuple[int, float]] = []
    done = train(model, small, recipe, 0, lambda optimizer, steps: seen.append((steps, optimizer.defaults["lr"])))
    assert done.test > 0.9 > before and done.test == accuracy(model, small.test) and done.seconds >= 0
    steps = recipe.steps(small.train)
    assert seen == [(steps, 0.1)] and steps == 12 * (700 // BATCH)

    def states(first: int, model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        handle = model.register_forward_pre_hook(
            lambda module, args: found.append(args[0]) if module.training else None
        )
        train(model, small, recipe, 3, first=first)
        handle.remove()
        return found

    whole, rest = states(0, made("mlp", 0, PIXELS)), states(5, made("mlp", 0, PIXELS))
    assert len(whole) == steps and len(rest) == steps - 5
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_optimizers():
    sgd, adam = (optimizer_of(made("mlp", 0, PIXELS), Recipe("mlp", name, 0.1, 1)) for name in ("sgd", "adam"))
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.9
    assert type(adam) is torch.optim.Adam and adam.defaults["weight_decay"] == 0


def runner(small: Data, folder: Path) -> Runner:
    return Runner(small, Results(folder), rounds=2, early=2, epochs=2, images=6)


GLOBS = ["mlp/*", "conv/sgd/rate/*", "conv/sgd/2:4-sr-ste", "conv/ticket/weights"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Results:
    folder = tmp_path_factory.mktemp("lottery")
    runner(small, folder).complete(chosen(registry(), GLOBS), [0, 1])
    return Results(folder)


def test_every_run_is_made_once_and_keeps_its_result(small, finished, monkeypatch):
    runs = chosen(registry(), GLOBS)
    for run in runs:
        for seed in (0, 1):
            row = finished.read(run.name, seed)
            if run.kind == "rate" and seed != CHOOSING_SEED:
                assert row is None
                continue
            assert row is not None and (row["run"], row["seed"], row["epochs"]) == (run.name, seed, 2)
            if run.pattern is not None:
                assert row["density"] == pytest.approx(sc.parse_pattern(run.pattern).density, abs=0.01)
    monkeypatch.setattr(Runner, "_make", lambda *_: pytest.fail("it was made again"))
    runner(small, finished.folder).complete(runs, [0, 1])


def test_validation_of_the_dense_net_chooses_the_rate(finished):
    tried = {rate: finished.read(rate_name("mlp", "sgd", rate), CHOOSING_SEED) for rate in RATES["sgd"]}
    best = max(row["validation"] for row in tried.values())
    assert finished.rate("mlp", "sgd") == min(rate for rate, row in tried.items() if row["validation"] == best)
    assert finished.read("mlp/sgd/dense", 1)["rate"] == finished.rate("mlp", "sgd")
    with pytest.raises(SparsecompError, match=r"conv/adam/rate/0\.001 and"):
        finished.rate("conv", "adam")


def test_a_ticket_has_rounds_controls_and_a_kernel(finished, small):
    row = finished.read("mlp/ticket/weights", 1)
    assert [each["density"] for each in row["rounds"]] == pytest.approx([1.0, 0.1**0.5, 0.1])
    assert set(row["controls"]) == {"random", "reinitialised"}
    assert "controls" not in finished.read("mlp/ticket/learning-rate", 1)
    ticket = finished.ticket("mlp/ticket/weights", 1)
    assert list(ticket) == ["dense", "found", "random", "reinitialised"]
    dense, found = ticket["dense"], ticket["found"]
    for name, mask in found["masks"].items():
        weight = f"{name}.weight"
        assert torch.equal(found["state"][weight], dense["state"][weight] * mask) and bool(dense["masks"][name].all())
        assert torch.equal(ticket["reinitialised"]["masks"][name], mask)
        assert int(ticket["random"]["masks"][name].sum()) == int(mask.sum())
    kernels = finished.read("mlp/ticket/kernel", 1)["kernels"]
    assert list(kernels) == [*ticket, "untrained"] and kernels["dense"]["alignment"] == pytest.approx(1.0)
    images = small.validation.images[:6]
    assert kernels["untrained"]["trace"] == pytest.approx(float(sc.ntk(made("mlp", 1, PIXELS), images).kernel.trace()))
    model = made("mlp", 1, PIXELS)
    model.load_state_dict(found["state"])
    kernel = sc.ntk(model, images, masks=found["masks"])
    assert kernels["found"]["effective_rank"] == pytest.approx(kernel.effective_rank)
    with pytest.raises(SparsecompError, match="make it first"):
        finished.ticket("mlp/ticket/weights", 5)


def test_the_report_has_all_runs_and_says_which_bars_were_met(finished, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--work", str(finished.folder), "--seeds", "0,1", "--report"]
    assert __main__.main([*arguments, "--output", str(output)]) == 0
    told = capsys.readouterr().out
    for word in ("sgd/2:4-sr-ste", "grown/rigl-0.1", "random mask", "reinitialised", "effective rank", "bar -0.3"):
        assert word in told
    assert output.exists()
    result = report.collect(finished, registry(), [0, 1])
    assert report.default_path({**result, "machine": {"cpu": "Some CPU(R) 9"}}, tmp_path).name == (
        f"{result['date']}-some-cpu-r-9-lottery.json"
    )
    assert report.summary({**result, "rows": []}) == "no result yet"


def rows(**tests: list[float]) -> dict[str, list[dict[str, object]]]:
    return {
        name.replace("__", "/").replace("_", "-"): [{"seed": seed, "test": each} for seed, each in enumerate(values)]
        for name, values in tests.items()
    }


def test_gaps_are_means_over_the_seeds_that_both_have():
    found = rows(a=[0.9, 0.8, 0.7], b=[0.8, 0.8])
    assert report.gap_of(found, "a", "b") == pytest.approx(5.0) and report.gap_of(found, "a", "c") is None


def test_a_bar_that_is_missed_is_named():
    found = {
        "sgd/dense": [{"seed": 0, "test": 0.9}],
        "sgd/2:4-sr-ste": [{"seed": 0, "test": 0.89}],
        "sgd/4:8-sr-ste": [{"seed": 0, "test": 0.895}],
        "grown/rigl-0.1": [{"seed": 0, "test": 0.5}],
        "grown/static-0.1": [{"seed": 0, "test": 0.5}],
        "ticket/weights": [{"seed": 0, "test": 0.9, "controls": {"random": {"test": 0.88}}}],
    }
    assert [line.rpartition(" ")[2] for line in report.bars("mlp", found)] == ["MISSED", "met", "MISSED", "met"]


def test_names_are_listed_and_a_glob_that_matches_none_is_refused(capsys):
    assert __main__.main(["--list", "--only", "mlp/ticket/*"]) == 0
    assert capsys.readouterr().out.split() == ["mlp/ticket/weights", "mlp/ticket/learning-rate", "mlp/ticket/kernel"]
    assert __main__.main(["--list", "--only", "nothing"]) == 1
    assert 'no run matches "nothing"' in capsys.readouterr().err


def test_masks_that_never_change_and_masks_that_are_grown(small, finished):
    for left in ("0.1", "0.05"):
        static, grown = (finished.read(f"mlp/grown/{kind}-{left}", 0) for kind in ("static", "rigl"))
        assert set(static["flip_rates"]) == {0.0} and static["density"] == pytest.approx(grown["density"], abs=0.01)
