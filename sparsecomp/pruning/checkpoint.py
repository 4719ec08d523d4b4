"""Finished work on disk, so that an interrupted pruning goes on where it stopped.

One safetensors file a piece of work, named by the piece and trusted only if its key, a digest of everything that
the work depends on, the code included, is the same. Knows nothing of what the work is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsecomp.errors import FormatError
from sparsecomp.machine.sources import package_digest
from sparsecomp.reporting.writing import whole_file


def digest(*parts: object) -> str:
    """A SHA-256 of tensors (dtype, shape, bytes), None and values that print fully; equal parts, equal digest.

    Equal only under the same code: work of another version of the package, or of changed sources, is done again.
    """
    sha = hashlib.sha256(_code())
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().flatten()
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            if flat.numel():
                sha.update(flat.view(torch.uint8).numpy().data)
        else:
            sha.update(repr(part).encode())
        sha.update(b"\0")
    return sha.hexdigest()


def _code() -> bytes:
    """The versions of the package and of torch, and its sources."""
    from sparsecomp import __version__

    return f"{__version__} {torch.__version__} {package_digest()}".encode()


class Checkpoint:
    """A folder of finished pieces; with ``folder`` None nothing is kept and nothing found."""

    def __init__(self, folder: str | Path | None) -> None:
        """Make the folder. Raises FormatError where something else has its name."""
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(
                f'checkpoint "{folder}" is no folder that can be written ({error.strerror}); name another'
            ) from error

    def save(self, piece: str, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a finished piece; a crash in between leaves the old file or none."""
        if self.folder is None:
            return
        stored = {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()}
        with whole_file(self._path(piece)) as partial:
            save_file(stored, partial, {"key": key, "piece": piece, "facts": json.dumps(dict(facts))})

    def load(self, piece: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept for the piece under that key; None if nothing was, or the work has changed since."""
        if self.folder is None or not self._path(piece).is_file():
            return None
        try:
            with safe_open(self._path(piece), "pt") as file:
                facts = file.metadata() or {}
                if facts.get("key") != key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(facts["facts"])  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f'checkpoint file "{self._path(piece)}" cannot be read ({error}); delete it and run again'
            ) from error

    def _path(self, piece: str) -> Path:
        assert self.folder is not None
        # names of layers may hold anything; equal short names are told apart by the digest
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", piece)[:80] or "model"
        return self.folder / f"{plain}-{hashlib.sha256(piece.encode()).hexdigest()[:8]}.safetensors"
