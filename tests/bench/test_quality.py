"""The texts that whole-model tuning learns from, and the check that nothing it did broke a mask."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch
from torch import nn

import sparsecomp as sc
from bench.pruning import quality
from sparsecomp.errors import SparsecompError

TEXTS = ["one two three four five six seven eight nine", "alpha beta gamma delta", "red green blue yellow black white"]


def test_mixed_texts_are_made_of_the_given_words_and_the_seed() -> None:
    made, again, other = (list(islice(quality._mixed(TEXTS, random.Random(seed)), 200)) for seed in (0, 0, 1))
    assert made == again != other
    words = {word for text in TEXTS for word in text.split()}
    assert {word for text in made for word in text.split()} == words
    whole = sum(text in TEXTS for text in made)
    assert 0.2 * len(made) < whole < 0.6 * len(made)
    longest = quality._MIXED_WORDS[1]
    assert all(1 <= len(text.split()) <= longest for text in made)


def test_a_weight_that_a_mask_drops_must_stay_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    report = sc.prune(model, "2:4", show_progress=False)
    quality._require_pattern(model, report)
    with torch.no_grad():
        model[0].weight[~report.masks["0"]] += 1e-3
    with pytest.raises(SparsecompError, match="0: tuning has changed weights that the mask drops"):
        quality._require_pattern(model, report)
