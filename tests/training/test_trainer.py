"""The callback in a Trainer of transformers: masks after every step, logs, a resume bit for bit, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsecomp as sc
from sparsecomp.errors import MethodError, ModelError
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_weight

pytestmark = pytest.mark.slow
LAYER = "bert.encoder.layer.0.attention.self.query"


def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=32, hidden_dropout_prob=0.1, **sizes)
    return transformers.BertForSequenceClassification(config)


def texts() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(32, (64, 8), generator=draw)
    return [{"input_ids": each, "labels": (each.float().mean() > 16).long()} for each in ids]


def trainer(model: Any, folder: Path, callbacks: list[Any], steps: int = 8, **settings: Any) -> Any:
    import transformers

    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=callbacks)


def watching(obeyed: list[int]) -> Any:
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            check_weight(others["model"].get_submodule(LAYER).weight.detach(), parse("2:4"))
            obeyed.append(state.global_step)

    return Watch()


@pytest.mark.parametrize("method", ["fixed", "sr-ste"])
def test_masks_hold_after_every_step_and_are_logged(method: str, tmp_path: Path) -> None:
    model = tiny()
    sparse = sc.sparsify(model, "2:4", method=method, steps=8, only="bert.encoder.*")
    obeyed: list[int] = []
    made = trainer(model, tmp_path, [sparse.callback(), watching(obeyed)], save_strategy="no")
    made.train()
    assert obeyed == list(range(1, 9))
    logged = [each for each in made.state.log_history if "sparse_density" in each]
    assert logged and all(each["sparse_density"] == 0.5 for each in logged)
    assert "baked" in repr(sparse)
    sc.compile(model, "2:4", only="bert.encoder.*", where="everywhere")
    assert isinstance(model.get_submodule(LAYER), sc.SparseLinear)


@pytest.mark.parametrize("method", ["fixed", "sr-ste", "movement"])
def test_a_checkpoint_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole = tiny()
    sparse = sc.sparsify(whole, "2:4", method=method, steps=8, only="bert.encoder.*")
    trainer(whole, tmp_path, [sparse.callback()], save_strategy="steps", save_steps=4).train()
    resumed = tiny()
    again = sc.sparsify(resumed, "2:4", method=method, steps=8, only="bert.encoder.*")
    made = trainer(resumed, tmp_path, [again.callback()], save_strategy="no")
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, want), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(want, got), name


def test_a_checkpoint_without_a_state_is_refused(tmp_path: Path) -> None:
    plain = tiny()
    trainer(plain, tmp_path, [], save_strategy="steps", save_steps=4).train()
    model = tiny()
    sparse = sc.sparsify(model, "2:4", steps=8, only="bert.encoder.*")
    made = trainer(model, tmp_path, [sparse.callback()], save_strategy="no")
    with pytest.raises(ModelError, match=r"sparse_training\.pt is not there.*resume_from"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    sparse = sc.sparsify(model, "2:4", steps=1)
    monkeypatch.delitem(sys.modules, "sparsecomp.training.trainer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MethodError, match=r"transformers is not installed; pip install"):
        sparse.callback()
