"""Digests of code: what was measured or computed by other code is not to be trusted.

Takes folders, gives text. Folders are searched to any depth, so that moving a file never hides it from a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

_GPU_PACKAGES = ("sparsecomp.kernels", "sparsecomp.backends")
_SUFFIXES = (".py", ".cu", ".cuh", ".h")
_PACKAGE = Path(__file__).parents[1]


def file_digest(path: Path) -> str:
    """Twelve hexadecimal digits of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def sources(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """(path below its folder, file) of each Python, CUDA and C header file under the folders, in a fixed order."""
    return [
        (path.relative_to(folder).as_posix(), path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in _SUFFIXES and path.is_file()
    ]


def digest(folders: Iterable[Path]) -> str:
    """Twelve hexadecimal digits of the sources under the folders: their names and their contents."""
    sha = hashlib.sha256()
    for name, path in sources(folders):
        sha.update(name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


@lru_cache(maxsize=1)
def package_digest() -> str:
    """The digest of this package's own Python files; that of nothing where it is installed without sources."""
    return digest([_PACKAGE])


def cuda_folder() -> Path:
    """Where csrc/cuda is: inside an installed package, or beside the package in a checkout."""
    installed = _PACKAGE / "cuda"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc" / "cuda"


def gpu_folders() -> list[Path]:
    """The folders that hold what kernels of a GPU are made of."""
    specs = [find_spec(name) for name in _GPU_PACKAGES]
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or []]
    return [*folders, cuda_folder()]
