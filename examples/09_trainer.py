"""Fine-tune a Hugging Face model under masks with the Trainer of transformers: one line more, and a callback.

The model is a tiny BERT with random weights that learns to tell two made-up languages apart; nothing is downloaded.
Needs transformers and accelerate.
"""

import sys
import tempfile
from importlib.util import find_spec

import torch

import sparsecomp as sc

for package in ("transformers", "accelerate"):
    if find_spec(package) is None:
        sys.exit(f"skipped: {package} is not installed; pip install 'transformers[torch]'")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

WORDS, LENGTH = 64, 12


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts of two languages: one uses the lower half of the words more often."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=draw)
    halves = torch.rand(count, LENGTH, generator=draw) < 0.3 + 0.4 * labels[:, None]
    words = torch.randint(WORDS // 2, (count, LENGTH), generator=draw) + halves * (WORDS // 2)
    return [{"input_ids": ids, "labels": label} for ids, label in zip(words, labels, strict=True)]


def right(result: object) -> dict[str, float]:
    """The share of texts that are told right."""
    return {"right": float((result.predictions.argmax(-1) == result.label_ids).mean())}  # type: ignore[attr-defined]


torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, **sizes))

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=64,
        num_train_epochs=6,
        learning_rate=2e-3,
        logging_steps=64,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    training = texts(2048, seed=1)
    steps = 6 * (len(training) // 64)
    # the Trainer makes its optimizer later, and the callback attaches it
    sparse = sc.sparsify(model, "2:4", method="sr-ste", steps=steps, only="bert.encoder.*")
    trainer = Trainer(
        model,
        arguments,
        train_dataset=training,
        eval_dataset=texts(1024, seed=2),
        compute_metrics=right,
        callbacks=[sparse.callback()],
    )
    trainer.train()
    print(f"told right: {trainer.evaluate()['eval_right']:.1%}")
    logged = [each for each in trainer.state.log_history if "sparse_flip_rate" in each]
    print(f"density {logged[-1]['sparse_density']:.0%}, flip rate {logged[-1]['sparse_flip_rate']:.2%}")

# the callback has baked: plain layers that fit the pattern
sc.compile(model, "2:4", only="bert.encoder.*", where="everywhere")
print(f"packed {sum(isinstance(each, sc.SparseLinear) for each in model.modules())} layers")
