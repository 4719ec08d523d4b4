"""The benchmark of language models, on a tiny one with random weights and made-up text."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc
from bench.language import __main__ as language
from bench.language import sources
from bench.language.judging import closed, judge, logits_of
from bench.language.recovery import Settings, Training, calibrated, one_shot
from sparsecomp.errors import SparsecompError
from tests.small_models import WORDS, small

LAYERS = "model.layers.*"


def documents(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choice("abcdefg ") for _ in range(chance.randint(30, 200))) for _ in range(count)]


def encode(text: str) -> list[int]:
    return [4 + ord(each) % 50 for each in text]


def tiny() -> nn.Module:
    return small("llama")


def made_up() -> list[sources.Source]:
    return [sources.split(name, documents(12, seed)) for seed, name in enumerate(("dialogue", "tales", "manual"))]


def words(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, WORDS, (count, 16), generator=torch.Generator().manual_seed(seed))


def test_documents_are_held_out_as_a_whole_and_repeats_go():
    texts = documents(20, 3)
    source = sources.split("tales", [*texts, texts[0], "  "])
    assert sorted((*source.train, *source.held_out)) == sorted({each.strip() for each in texts})
    assert len(source.held_out) == 4 and not set(source.train) & set(source.held_out)
    assert source == sources.split("tales", texts) and source != sources.split("manual", texts)
    assert source.digest != sources.Source("tales", source.held_out, source.train).digest


def test_rows_of_tables_and_speeches_of_episodes():
    table = (
        'Season & Episode\tAuthor\tQuote\nd\tstring\tstring\n\t\t\n0101\tA\t Yes!  No\n0102\tB\t"Why"\n0101\tB\tWell\n'
    )
    assert sources.rows(table)[1]["Author"] == "B"
    assert sources.episodes(table) == ["A: Yes! No\nB: Well", "B: Why"]


def test_blocks_are_documents_behind_separators():
    found = sources.blocks(["abc", "d"], lambda text: [ord(each) for each in text], 7, length=3)
    assert found.tolist() == [[7, 97, 98], [99, 7, 100]]
    assert sources.blocks(["a"], encode, 7, length=3).shape == (0, 3)


def test_batches_have_so_many_blocks_of_each_source_and_every_block_its_turn():
    train = {"dialogue": torch.arange(8).view(8, 1), "tales": torch.arange(100, 103).view(3, 1)}
    batches = sources.Batches(train)
    found = [batches(step).flatten().tolist() for step in range(12)]
    assert all(sum(each < 100 for each in batch) == 2 and len(batch) == 3 for batch in found)
    epochs = [sorted(each for batch in found[start : start + 4] for each in batch[:2]) for start in (0, 4, 8)]
    assert epochs == [list(range(8))] * 3
    again = sources.Batches(train)
    assert again(7).flatten().tolist() == found[7]
    with pytest.raises(SparsecompError, match="the source tales has no block to train on"):
        sources.Batches({"tales": torch.zeros(0, 4)})


def test_judging_against_the_definition():
    model, other = tiny(), small("llama", seed=1)
    held_out = {"a": words(5), "b": words(3, seed=1)}
    found = judge(other, held_out, model)
    means = []
    for name, blocks in held_out.items():
        with torch.no_grad():
            own, given = (logits_of(each, blocks)[:, :-1].double().softmax(dim=2) for each in (other, model))
        likelihood = -own.gather(2, blocks[:, 1:, None]).log().mean()
        divergence = (given * (given / own).log()).sum(dim=2).mean()
        same = (own.argmax(dim=2) == given.argmax(dim=2)).double().mean()
        means.append([float(each) for each in (likelihood, divergence, same)])
        assert found.by_source[name] == pytest.approx(means[-1][0], rel=1e-5)
    expected = [sum(each) / 2 for each in zip(*means, strict=True)]
    assert [found.log_perplexity, found.divergence, found.agreement] == pytest.approx(expected, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.log_perplexity))
    alone = judge(model, held_out)
    assert alone.divergence is None and judge(model, held_out, model).divergence == pytest.approx(0.0, abs=1e-6)


def test_what_is_closed():
    assert closed(dense=3.0, start=3.4, now=3.1) == pytest.approx(0.75)
    assert closed(dense=3.0, start=3.4, now=3.5) == pytest.approx(-0.25)


def test_the_rate_warms_up_and_falls():
    settings = Settings()
    shares = [settings.share_of_rate(each / 100) for each in range(101)]
    assert 0.0 < shares[0] < 0.05 and max(shares) > 0.9 and shares[-1] == pytest.approx(0.05)
    assert shares[10:] == sorted(shares[10:], reverse=True) and max(shares) <= 1.0


def begun(file: Path, minutes: float = 1.0) -> Training:
    dense = tiny().requires_grad_(False)
    pruned = one_shot(dense, "2:4", calibrated(dense, words(8), LAYERS), LAYERS).requires_grad_(True)
    return Training(dense, pruned, "2:4", LAYERS, Settings(minutes, rate=1e-3, autocast=False), file)


class Clock:
    """Every step takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.mark.slow
def test_training_in_sittings_is_training_at_once(tmp_path):
    def batches(step: int) -> torch.Tensor:
        return words(4, seed=step)

    held_out = {"a": words(4, seed=99)}
    whole, lines = begun(tmp_path / "whole.pt"), []
    embedding = whole.model.get_input_embeddings().weight.detach().clone()
    done = whole.run(batches, held_out, 5.0, lines.append, Clock(3.0))
    assert (done.steps, done.tokens, done.seconds) == (20, 20 * 64, 60.0)
    assert [minutes for minutes, _ in done.curve] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert done.curve[-1][1] < done.curve[0][1] and len(lines) == 6
    assert torch.equal(whole.model.get_input_embeddings().weight, embedding)

    first = begun(tmp_path / "parts.pt")
    assert first.run(batches, held_out, 0.4, lines.append, Clock(3.0)).steps == 8
    second = begun(tmp_path / "parts.pt")
    assert second.done.steps == 8 and second.run(batches, held_out, 5.0, lines.append, Clock(3.0)).steps == 20
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    model = second.sparse.bake()
    for name, mask in second.sparse.masks.items():
        sc.pack(model.get_submodule(name).weight.detach(), "2:4")
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())
    with pytest.raises(SparsecompError, match="use the same settings, or another --work folder"):
        begun(tmp_path / "parts.pt", minutes=2.0)


@pytest.mark.slow
def test_the_program(tmp_path, capsys):
    small_one = language.Language("tiny", LAYERS, tiny, encode, lambda: 3, made_up, length=16)
    options = ["--threads", "1", "--patterns", "2:4", "--work", str(tmp_path / "work"), "--minutes", "0.01"]
    output = tmp_path / "result.json"
    threads = torch.get_num_threads()
    try:
        assert language.main(options, small_one) == 0
        assert language.main([*options, "--recover", "2:4", "--output", str(output)], small_one) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert "2:4 recovered" in said.out and "of the gap in log-perplexity closed" in said.out
    assert said.err.count("pruning to 2:4") == 1
    result = json.loads(output.read_text())
    assert [row["name"] for row in result["rows"]] == ["dense", "2:4 one-shot", "2:4 recovered"]
    assert set(result["text"]) == {"dialogue", "tales", "manual"}
    dense, start, now = (row["log_perplexity"] for row in result["rows"])
    assert result["rows"][2]["closed"] == pytest.approx((start - now) / (start - dense))
