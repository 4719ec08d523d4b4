"""English for a language model: dialogue, tales and a manual, whole documents either trained on or held out.

Episodes and tales come from an archive with a pinned checksum, the manual from Python's own documentation. Gives
blocks of token ids. Knows no model.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.finetune import data
from sparsecomp.errors import SparsecompError

CONTEXT = 256
# one document of so many is held out
_HELD_OUT = 6
# blocks of a batch that each source gives; the small ones more than their share
_IN_A_BATCH = {"dialogue": 2, "tales": 1, "manual": 1}
_TABLE = "orangecontrib/text/datasets/{}.tab"
_HEADER_LINES = 3

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Source:
    """Documents of one kind: those to train on, and those held out."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The first 16 digits of the sha256 of all documents, in order: two runs of one digest saw the same text."""
        whole = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                whole.update(document.encode("utf-8") + b"\0")
        return whole.hexdigest()[:16]


def split(name: str, documents: Sequence[str]) -> Source:
    """Documents apart: one of every six, drawn by a fixed seed, is held out. No text is in both parts."""
    order = list(dict.fromkeys(each.strip() for each in documents if each.strip()))
    random.Random(f"{name} {data.SPLIT_SEED}").shuffle(order)
    cut = -(-len(order) // _HELD_OUT)
    return Source(name, tuple(order[cut:]), tuple(order[:cut]))


def load() -> list[Source]:
    """The three sources. Fetches their archive if it is not there yet."""
    with zipfile.ZipFile(io.BytesIO(data.fetched(data.REUTERS))) as archive:
        tables = {
            name: archive.read(_TABLE.format(name)).decode("utf-8")
            for name in ("friends-transcripts", "grimm-tales", "andersen")
        }
    tales = [row["Content"] for name in ("grimm-tales", "andersen") for row in rows(tables[name])]
    return [
        split("dialogue", episodes(tables["friends-transcripts"])),
        split("tales", tales),
        split("manual", manual()),
    ]


def rows(table: str) -> list[dict[str, str]]:
    """The rows of a tab-separated table whose first line names columns and whose next two describe them."""
    csv.field_size_limit(sys.maxsize)
    lines = list(csv.reader(io.StringIO(table.replace("\r\n", "\n")), delimiter="\t"))
    return [dict(zip(lines[0], each, strict=False)) for each in lines[_HEADER_LINES:] if each]


def episodes(table: str) -> list[str]:
    """One text for each episode, a line for each speech."""
    found: dict[str, list[str]] = {}
    for row in rows(table):
        speech = " ".join(row["Quote"].split())
        found.setdefault(row["Season & Episode"], []).append(f"{row['Author']}: {speech}")
    return ["\n".join(each) for each in found.values()]


def manual() -> list[str]:
    """The topics of Python's reference manual, which this Python brings along."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def blocks(documents: Sequence[str], encode: Encode, separator: int, length: int = CONTEXT) -> Tensor:
    """Token ids int64 [blocks, length]: documents one after the other, each behind a separator, the rest cut off."""
    stream = [token for document in documents for token in (separator, *encode(document))]
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64, device="cpu").view(count, length)


class Batches:
    """Batches of blocks, a fixed number of each source, by the number of the step: the same ones in every sitting."""

    def __init__(self, train: Mapping[str, Tensor], seed: int = 0) -> None:
        """``train`` has blocks [blocks, length] by source."""
        for name, each in train.items():
            if not len(each):
                raise SparsecompError(f"the source {name} has no block to train on; its documents are too short")
        self._train, self._seed = dict(train), seed

    def __call__(self, step: int) -> Tensor:
        """The blocks of step 0, 1, ...: each source in a new order whenever all of its blocks had their turn."""
        parts = []
        for name, source in self._train.items():
            count = _IN_A_BATCH.get(name, 1)
            parts += [self._block(name, source, step * count + i) for i in range(count)]
        return torch.stack(parts)

    def _block(self, name: str, source: Tensor, turn: int) -> Tensor:
        epoch, place = divmod(turn, len(source))
        order = list(range(len(source)))
        random.Random(f"{name} {self._seed} {epoch}").shuffle(order)
        return source[order[place]]
