"""Sparse training in transformers' Trainer: a callback that keeps a handle in step with it. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsecomp.errors import ModelError

if TYPE_CHECKING:
    from sparsecomp.training.handle import SparseTraining

# in a checkpoint folder, beside what the Trainer writes
FILE = "sparse_training.pt"


class MaskCallback(TrainerCallback):
    """Attaches a handle to the Trainer's optimizer, logs density and flip rate, saves and resumes, and bakes.

    Made by ``SparseTraining.callback``. The state lies in every checkpoint folder as sparse_training.pt, and is read
    from the one that ``train(resume_from_checkpoint=...)`` goes on from. The Trainer tells callbacks the step of that
    checkpoint and not its folder: it is looked for in the output folder, or is ``resume_from``.
    """

    def __init__(self, training: SparseTraining, *, bake: bool = True, resume_from: str | Path | None = None) -> None:
        """With ``bake`` the end of training bakes."""
        self.training, self.bake, self.resume_from = training, bake, resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Attach, and go on from a checkpoint. Raises ModelError if the checkpoint has no state of this training."""
        self.training.attach(others["optimizer"])
        if state.global_step:
            self.training.load_state_dict(_read(Path(self.resume_from or _folder(args, state))))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Add density and flip rate to what is logged."""
        now = {"sparse_density": self.training.density, "sparse_flip_rate": self.training.flip_rate}
        logs = others.get("logs")
        if isinstance(logs, dict):
            logs.update(now)
        if state.log_history:
            state.log_history[-1].update(now)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Write the state into the checkpoint folder, in one process of several."""
        if args.should_save:
            torch.save(self.training.state_dict(), _folder(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Bake, if asked to. Where the Trainer loaded its best checkpoint, the masks of that one come back first."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.training.load_state_dict(_read(Path(state.best_model_checkpoint)))
        if self.bake:
            self.training.bake()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise ModelError(
            f"{path} is not there, and the Trainer goes on from that checkpoint; take one that was written with this "
            "callback, and name its folder as resume_from where it lies elsewhere"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
