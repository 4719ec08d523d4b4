"""Prune a language model in one shot and distil it from the dense one, for so many minutes, in as many sittings.

Takes a model, batches of token ids and settings, and keeps what is done in a folder. The loop is a user's own: the
masks are kept by ``sparsify``, the loss is ``distillation_loss``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsecomp as sc
from bench.language.judging import judge, logits_of
from sparsecomp.errors import SparsecompError
from sparsecomp.reporting.writing import whole_file

_WARM_UP = 0.05
_LAST_RATE = 0.05
_CALIBRATION_BATCH = 4
# masks of "fixed" stay whatever the step, so that any bound above the steps made will do
_STEPS = 10**7


def processor_seconds() -> float:
    """Seconds that the processor has worked for this program, by thread: other programs do not count."""
    return time.process_time() / torch.get_num_threads()


@dataclass(frozen=True)
class Settings:
    """How to recover: minutes of training in all, and the rate of AdamW, which warms up and falls with their share.

    ``autocast`` multiplies in bfloat16; parameters and AdamW's state are float32 either way. Held-out
    blocks are looked at ``looks`` times on the way, and a state is saved every ``save`` minutes of training.
    """

    minutes: float = 60.0
    rate: float = 2e-4
    autocast: bool = True
    looks: int = 6
    save: float = 5.0

    def share_of_rate(self, share: float) -> float:
        """The share of the rate at a share of the time: up in a line, down in a line to a twentieth."""
        falling = _LAST_RATE + (1 - _LAST_RATE) * max(0.0, 1 - share) / (1 - _WARM_UP)
        return min(share / _WARM_UP + 1e-2, falling)


@dataclass
class Recovery:
    """How far a training has come: steps, tokens, seconds of training alone, and (minutes, log-perplexity) on the way.

    Seconds and minutes are those of the processor, by thread.
    The log-perplexities of ``curve`` are of a part of the held-out blocks, in the numbers trained in.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)


def one_shot(dense: nn.Module, pattern: str, calibration: sc.Calibration, only: str) -> nn.Module:
    """A copy of ``dense`` that "fast" pruned."""
    model = copy.deepcopy(dense)
    sc.prune(model, pattern, "fast", calibration, only=only)
    return model


def calibrated(dense: nn.Module, blocks: Tensor, only: str) -> sc.Calibration:
    """The Gram matrices of the layers on these blocks [blocks, tokens]."""
    return sc.calibrate(dense, torch.split(blocks, _CALIBRATION_BATCH), only=only, forward=logits_of)


class Training:
    """A pruned model that is distilled from the dense one; it goes on from ``file`` if that is there."""

    def __init__(
        self, dense: nn.Module, pruned: nn.Module, pattern: str, only: str, settings: Settings, file: Path
    ) -> None:
        """``pruned`` is trained in place. Embeddings, and what is tied to them, stay as they are."""
        self.dense = dense.eval().requires_grad_(False)
        self.model, self.settings, self.done = pruned.train(), settings, Recovery()
        self._file = file
        for module in pruned.modules():
            if isinstance(module, nn.Embedding):
                module.weight.requires_grad_(False)
        learned = [each for each in pruned.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(learned, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.sparse = sc.sparsify(pruned, pattern, self._optimizer, "fixed", start="zeros", steps=_STEPS, only=only)
        if file.exists():
            self._load()

    @property
    def share(self) -> float:
        """The share of the time that is used up."""
        return self.done.seconds / (60 * self.settings.minutes)

    def run(
        self,
        batches: Callable[[int], Tensor],
        held_out: Mapping[str, Tensor],
        sitting: float,
        tell: Callable[[str], None],
        clock: Callable[[], float] = processor_seconds,
    ) -> Recovery:
        """Train for so many minutes at most, or to the end, and save. What ``clock`` counts is time of training."""
        begun = self.done.seconds
        if not self.done.curve:
            self._look(held_out, tell)
        checked = saved = self.done.seconds
        while self.share < 1 and self.done.seconds - begun < 60 * sitting:
            begin = clock()
            self.step(batches(self.done.steps))
            self.done.seconds += clock() - begin
            if self.done.seconds - checked >= 60 * self.settings.minutes / self.settings.looks and self.share < 1:
                self._look(held_out, tell)
                checked = self.done.seconds
            if self.done.seconds - saved >= 60 * self.settings.save:
                self.save()
                saved = self.done.seconds
        self._look(held_out, tell)
        self.save()
        return self.done

    def step(self, ids: Tensor) -> None:
        """One step on blocks [blocks, tokens]."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate * self.settings.share_of_rate(self.share)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.autocast):
            with torch.no_grad():
                wanted = logits_of(self.dense, ids)
            made = logits_of(self.model, ids)
        sc.distillation_loss(made, wanted, temperature=1.0).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_((each for each in self.model.parameters() if each.grad is not None), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done.steps += 1
        self.done.tokens += ids.numel()

    def save(self) -> None:
        """Keep all that is needed to go on; the file is whole or not there."""
        state = {
            "settings": vars(self.settings),
            "model": {name: each for name, each in self.model.named_parameters() if each.requires_grad},
            "optimizer": self._optimizer.state_dict(),
            "sparse": self.sparse.state_dict(),
            "done": vars(self.done),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._file) as unfinished:
            torch.save(state, unfinished)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        if state["settings"] != vars(self.settings):
            raise SparsecompError(
                f"{self._file} is a training with {state['settings']}, asked for is {vars(self.settings)}; use the "
                "same settings, or another --work folder"
            )
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, each in state["model"].items():
                parameters[name].copy_(each)
        self._optimizer.load_state_dict(state["optimizer"])
        self.sparse.load_state_dict(state["sparse"])
        done = state["done"]
        self.done = Recovery(done["steps"], done["tokens"], done["seconds"], [tuple(each) for each in done["curve"]])

    def _look(self, held_out: Mapping[str, Tensor], tell: Callable[[str], None]) -> None:
        minutes = self.done.seconds / 60
        found = judge(self.model, held_out, autocast=self.settings.autocast).log_perplexity
        self.done.curve.append((minutes, found))
        tell(f"{minutes:.1f} min, {self.done.steps} steps, {self.done.tokens} tokens: log-perplexity {found:.4f}")
