"""What is trained and how: an encoder, mean pooling and a linear head; AdamW; distillation from a dense teacher.

Takes batches and settings, gives a trained classifier and how it did on the way. Knows nothing of sparsity: a run
hands in what is to happen around a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.finetune.batches import SIZE, Batch, Encoded

TEMPERATURE = 2.0
_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01
_WORD_EMBEDDINGS = "word_embeddings"


class Classifier(nn.Module):
    """A text encoder, the mean of its last hidden states over real tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, labels: int) -> None:
        """``encoder(input_ids=, attention_mask=)`` gives ``last_hidden_state`` [texts, tokens, width]."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, labels, device="cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float32 [texts, labels]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        logits: Tensor = self.head(mean)
        return logits.float()


@dataclass(frozen=True)
class Recipe:
    """How to train: peak rate of a linear warm-up over a tenth of the steps and a linear decay to 0, and how long.

    ``autocast`` multiplies in bfloat16; parameters and AdamW's state are float32 either way. ``seed`` makes the order
    of batches and the dropout.
    """

    epochs: float
    rate: float
    seed: int
    autocast: bool = True
    batch: int = SIZE
    exactly: int | None = None

    def steps(self, data: Encoded) -> int:
        """Steps of the whole training: ``exactly`` so many, or those of the epochs."""
        return self.exactly or max(1, round(self.epochs * data.steps(self.batch)))


@dataclass
class Trained:
    """How a training went: steps, processor seconds of training alone, (step, accuracy on validation) on the way."""

    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over all but the word embeddings, which stay as they were pre-trained; no decay of vectors."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_WORD_EMBEDDINGS not in name)
    learned = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in learned if each.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [each for each in learned if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Encoded,
    recipe: Recipe,
    *,
    teacher: Tensor | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train in place; the model ends in eval mode.

    ``teacher`` holds logits [texts, labels] of a dense model for every text: the loss is then half cross-entropy, half
    distillation. ``after_step`` gets the number of steps done.
    """
    steps = recipe.steps(data)
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
    )
    torch.manual_seed(recipe.seed)
    done = Trained()
    model.train()
    for batch in _endless(data, recipe):
        begin = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            logits = model(**batch.inputs)
        loss = loss_of(logits, batch, teacher)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        done.steps += 1
        done.seconds += time.process_time() - begin
        if after_step is not None:
            after_step(done.steps)
            model.train()
        if done.steps == steps:
            break
    model.eval()
    return done


def _endless(data: Encoded, recipe: Recipe) -> Iterator[Batch]:
    number = 0
    while True:
        yield from data.epoch(recipe.seed, number, recipe.batch)
        number += 1


def loss_of(logits: Tensor, batch: Batch, teacher: Tensor | None) -> Tensor:
    """Cross-entropy, or the mean of it and of distillation: T^2 KL(teacher || model) at temperature T = 2.

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    hard = nn.functional.cross_entropy(logits, batch.labels)
    if teacher is None:
        return hard
    wanted = (teacher[batch.index] / TEMPERATURE).log_softmax(dim=1)
    soft = nn.functional.kl_div(
        (logits / TEMPERATURE).log_softmax(dim=1), wanted, reduction="batchmean", log_target=True
    )
    return 0.5 * hard + 0.5 * TEMPERATURE**2 * soft


@torch.no_grad()
def logits_of(model: nn.Module, data: Encoded, autocast: bool = False) -> Tensor:
    """Logits [texts, labels] of all texts in their order; the model is put into eval mode."""
    model.eval()
    batches = data.in_order()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = [model(**batch.inputs).float() for batch in batches]
    return torch.cat(parts)[torch.cat([batch.index for batch in batches]).argsort()]
