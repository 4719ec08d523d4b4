"""Where a pruning report comes from: model, time, versions, machine, data, command.

Takes a model as it stands, gives frozen facts. Knows nothing of what was pruned in it.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from sparsecomp.errors import SparsecompError
from sparsecomp.reporting.codec import plain


@dataclass(frozen=True)
class ModelFacts:
    """What a model is and how large.

    ``name`` is its class, ``source`` what it was loaded from where it says so. ``parameters`` counts every parameter
    once, ``matrix_weights`` those of two dimensions and more, ``embedding_weights`` the part of these in embeddings.
    ``left_dense`` has the matrix weights of each layer that was left dense.
    """

    name: str
    source: str | None
    parameters: int
    matrix_weights: int
    embedding_weights: int
    left_dense: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, skipped: Iterable[str] = ()) -> ModelFacts:
        """The facts of this model; ``skipped`` are names of modules or parameters in it, others count nothing."""
        matrices = {id(each): each.numel() for each in model.parameters() if each.ndim >= 2}
        tables = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and isinstance(module.weight, nn.Parameter)
        }
        return cls(
            type(model).__name__,
            _source(model),
            sum(each.numel() for each in model.parameters()),
            sum(matrices.values()),
            sum(matrices.get(each, 0) for each in tables),
            _weights(model, skipped),
        )


@dataclass(frozen=True)
class Provenance:
    """The circumstances of a pruning; what is not known is None.

    ``created`` is UTC in ISO 8601, ``versions`` are by package, ``processor`` and ``isa`` are those the model was on.
    ``data`` says in the caller's words what was calibrated on, ``batches`` how many batches that were,
    ``held_out_batches`` how many it was judged by. ``command`` is the command line.
    """

    created: str
    model: ModelFacts
    versions: Mapping[str, str]
    processor: str
    isa: str | None
    threads: int
    os: str
    seed: int | None = None
    batches: int | None = None
    held_out_batches: int | None = None
    data: str | None = None
    command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        facts: dict[str, Any] = plain(self)
        return facts

    def flat(self) -> dict[str, object]:
        """The facts in one row, as columns of a table."""
        named: dict[str, object] = {"model": self.model.name, "parameters": self.model.parameters}
        rest = {key: value for key, value in vars(self).items() if key not in ("model", "versions")}
        return {"created": rest.pop("created"), **named, **self.versions, **rest}

    def with_command(
        self,
        command: Sequence[str],
        *,
        data: str | None = None,
        batches: int | None = None,
        held_out_batches: int | None = None,
    ) -> Provenance:
        """These facts with the words of the command line, quoted as a shell reads them, and of its data."""
        # words of the command line may hold bytes that are no UTF-8, and no file can be written with those
        words = [os.fsencode(word).decode("utf-8", "replace") for word in command]
        return replace(
            self,
            command=shlex.join(words),
            data=self.data if data is None else data,
            batches=self.batches if batches is None else batches,
            held_out_batches=self.held_out_batches if held_out_batches is None else held_out_batches,
        )


def describe(
    model: nn.Module,
    skipped: Iterable[str] = (),
    *,
    seed: int | None = None,
    batches: int | None = None,
    held_out_batches: int | None = None,
) -> Provenance:
    """The circumstances of now. Measures nothing and creates no CUDA context that the model does not have."""
    from sparsecomp import __version__

    processor, isa = _processor(next((each.device for each in model.parameters()), torch.device("cpu")))
    return Provenance(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ModelFacts.of(model, skipped),
        {"sparsecomp": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        processor,
        isa,
        torch.get_num_threads(),
        platform.system(),
        seed,
        batches,
        held_out_batches,
    )


def _processor(device: torch.device) -> tuple[str, str | None]:
    from sparsecomp.machine.device import detect

    if device.type not in ("cpu", "cuda"):
        return device.type, None
    try:
        found = detect(str(device))
    except SparsecompError:
        return device.type, None
    return found.name, found.isa


def _source(model: nn.Module) -> str | None:
    """The name a Hugging Face model was loaded by; of a folder only its own name, for the rest is the user's disk."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(source, str) or not source:
        return None
    path = PurePath(source)
    return path.name if path.is_absolute() or path.parts[0] in ("..", "~") else source


def _weights(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    counts = {}
    for name in names:
        if name in parameters:
            found = [parameters[name]]
        elif name in modules:
            module = modules[name]
            found = list(module.parameters(recurse=False))
            if isinstance(under := getattr(module, "parametrizations", None), nn.Module):
                found += under.parameters()
        else:
            continue
        counts[name] = sum(each.numel() for each in found if each.ndim >= 2)
    return counts
