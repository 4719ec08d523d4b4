"""What a language model is worth on held-out blocks: log-perplexity, and how far it is from the dense model.

Takes models and blocks of token ids, gives numbers. Knows no training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

_BATCH = 4


@dataclass(frozen=True)
class Judged:
    """Means over the predicted tokens of each source, then over sources, which weigh the same.

    ``log_perplexity`` in nats, of all and ``by_source``; ``divergence`` is KL(dense || model) in nats, ``agreement``
    how often the most likely token is the dense model's; both are None where there is nothing to compare with.
    """

    log_perplexity: float
    by_source: Mapping[str, float]
    divergence: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the log-perplexity."""
        return math.exp(self.log_perplexity)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [blocks, tokens, words] of ``ids`` [blocks, tokens]."""
    return cast(Tensor, model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def judge(
    model: nn.Module, held_out: Mapping[str, Tensor], dense: nn.Module | None = None, autocast: bool = False
) -> Judged:
    """``model`` on blocks [blocks, tokens] by source: each token but a block's first is predicted from those before it.

    Models run in eval mode, and in bfloat16 where ``autocast`` says so; the rest is float32.
    """
    training = model.training
    model.eval()
    likelihoods, divergences, agreements = {}, [], []
    for name, blocks in held_out.items():
        sums = torch.zeros(3, dtype=torch.float64, device="cpu")
        for ids in torch.split(blocks, _BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                own = logits_of(model, ids)
                given = None if dense is None else logits_of(dense, ids)
            sums += _sums(own, ids, given)
        means = (sums / max(blocks.shape[0] * (blocks.shape[1] - 1), 1)).tolist()
        likelihoods[name] = means[0]
        divergences.append(means[1])
        agreements.append(means[2])
    model.train(training)
    found = Judged(_mean(likelihoods.values()), likelihoods)
    return found if dense is None else replace(found, divergence=_mean(divergences), agreement=_mean(agreements))


def _sums(own: Tensor, ids: Tensor, given: Tensor | None) -> Tensor:
    """Sums over predicted tokens: -log p of what came, KL(given || own), and where the most likely tokens agree."""
    own = own[:, :-1].float().log_softmax(dim=2)
    likelihood = -own.gather(2, ids[:, 1:, None]).double().sum()
    if given is None:
        return torch.stack([likelihood, likelihood.new_zeros(()), likelihood.new_zeros(())])
    given = given[:, :-1].float().log_softmax(dim=2)
    divergence = nn.functional.kl_div(own, given, reduction="none", log_target=True).sum(dim=2).double().sum()
    agreement = (own.argmax(dim=2) == given.argmax(dim=2)).sum().double()
    return torch.stack([likelihood, divergence, agreement])


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def closed(dense: float, start: float, now: float) -> float:
    """The share of the gap in log-perplexity between ``start`` and ``dense`` that ``now`` has closed."""
    return (start - now) / (start - dense)
