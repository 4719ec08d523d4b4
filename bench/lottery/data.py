"""Fashion-MNIST: the archive of Debian's package of it, its checksum pinned, and its images as tensors.

apt fetches the archive into a folder of the user's and dpkg unpacks it in memory; none is kept with the sources.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.fetched import data_folder
from sparsecomp.errors import SparsecompError

PACKAGE = "dataset-fashion-mnist"
ARCHIVE = "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
VALIDATION, SPLIT_SEED = 5000, 20261201
_INSIDE = "./usr/share/datasets/fashion-mnist/{}-{}-ubyte.gz"
_IMAGE_MAGIC, _LABEL_MAGIC = 2051, 2049


@dataclass(frozen=True)
class Part:
    """``images`` float32 [n, 1, height, width], ``labels`` int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Three parts that share no image: ``validation`` chooses settings, ``test`` is what figures are told of."""

    train: Part
    validation: Part
    test: Part


def folder() -> Path:
    """Where the archive lies: $SPARSECOMP_DATA, or "fashion-mnist" in the user's cache directory."""
    return data_folder("fashion-mnist")


def load() -> Data:
    """The data set; the archive is fetched if it is not there yet.

    Raises SparsecompError for an archive that cannot be fetched or unpacked, and one that is not the expected file.
    """
    place = folder() / ARCHIVE
    if not place.exists():
        _fetch(place)
    content = place.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise SparsecompError(
            f"{place} is another file than expected (sha256 {found[:12]}, not {SHA256[:12]}); delete it, and it is "
            "fetched again"
        )
    files = _unpacked(place)
    parts = [
        (images(files[_INSIDE.format(name, "images-idx3")]), labels(files[_INSIDE.format(name, "labels-idx1")]))
        for name in ("train", "t10k")
    ]
    return split(*parts[0], *parts[1], validation=VALIDATION)


def split(pixels: Tensor, classes: Tensor, test_pixels: Tensor, test_classes: Tensor, validation: int) -> Data:
    """Pixels uint8 [n, height, width] and their classes as data; the first ``validation`` of a fixed order are apart.

    Pixels are scaled by the mean and the standard deviation of those that are trained on.
    """
    generator = torch.Generator(device="cpu").manual_seed(SPLIT_SEED)
    order = torch.randperm(len(classes), generator=generator, device="cpu")
    apart, rest = order[:validation], order[validation:]
    learned = pixels[rest].double()
    mean, deviation = float(learned.mean()), float(learned.std())

    def part(each: Tensor, labels: Tensor) -> Part:
        return Part(((each.float() - mean) / deviation).unsqueeze(1), labels)

    return Data(part(pixels[rest], classes[rest]), part(pixels[apart], classes[apart]), part(test_pixels, test_classes))


def images(content: bytes) -> Tensor:
    """An IDX file of images: uint8 [n, height, width]. Raises SparsecompError for another file."""
    magic, count, height, width = (int.from_bytes(content[at : at + 4], "big") for at in (0, 4, 8, 12))
    if magic != _IMAGE_MAGIC or len(content) != 16 + count * height * width:
        raise SparsecompError(f"a file of {len(content)} bytes is no IDX file of images; fetch the archive again")
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(count, height, width)


def labels(content: bytes) -> Tensor:
    """An IDX file of labels: int64 [n]. Raises SparsecompError for another file."""
    magic, count = (int.from_bytes(content[at : at + 4], "big") for at in (0, 4))
    if magic != _LABEL_MAGIC or len(content) != 8 + count:
        raise SparsecompError(f"a file of {len(content)} bytes is no IDX file of labels; fetch the archive again")
    return torch.frombuffer(bytearray(content[8:]), dtype=torch.uint8).to(torch.int64)


def _fetch(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", PACKAGE], place.parent)
    if not place.exists():
        raise SparsecompError(f"apt-get fetched another version than {ARCHIVE}; put that file into {place.parent}")


def _unpacked(place: Path) -> dict[str, bytes]:
    """The data files by name, decompressed."""
    with tarfile.open(fileobj=io.BytesIO(_run(["dpkg-deb", "--fsys-tarfile", str(place)], place.parent))) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith("-ubyte.gz") else None
            if file is not None:
                found[member.name] = gzip.decompress(file.read())
        return found


def _run(command: list[str], where: Path) -> bytes:
    try:
        return subprocess.run(command, cwd=where, capture_output=True, check=True).stdout
    except FileNotFoundError:
        reason = f"{command[0]} is not installed"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"])[-1]
    raise SparsecompError(
        f"{' '.join(command)} failed ({reason}); run it where Debian's archive can be reached, and put {ARCHIVE} into "
        f"{where}"
    )
