"""What writing a file needs: a folder that can be written, and a file that is whole or not there,

Takes paths, gives errors that name the file as the user did. Knows nothing of models.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from sparsecomp.errors import FormatError

# what a system says of a place that takes no more or nothing
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_SYSTEM = re.compile(r"\(os error \d+\)")


def require_folder(path: Path) -> None:
    """Raises FormatError, before any work, if ``path`` cannot be written: its folder is absent or closed, or it is."""
    if not path.name:
        raise FormatError(f'"{path}" cannot be written: it names a folder; add the name of a file')
    folder = path.parent
    if not folder.is_dir():
        raise FormatError(f'"{path}" cannot be written: there is no folder "{folder}"; make it first')
    if path.is_dir():
        _require_open(path, path)
    elif path.is_file() and not os.access(path, os.W_OK):
        raise FormatError(f'"{path}" cannot be written: it may not be changed; name another file, or allow it')
    _require_open(folder, path)
    try:
        # as it is named until it is whole
        unfinished(path).exists()
    except OSError as error:
        raise FormatError(f'"{path}" cannot be written ({error.strerror}); name another file') from error


def require_new_folder(path: Path) -> None:
    """Raises FormatError if the folder ``path``, which need not be there, cannot be made or written in."""
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir():
        raise FormatError(f'"{path}" cannot be a folder: "{nearest}" is a file; name another folder')
    _require_open(nearest, path)


def _require_open(folder: Path, path: Path) -> None:
    reason: str | None = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    if reason is None:
        try:
            # what may be allowed can still fail, as on a file system of another kind
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
    if reason is not None:
        raise FormatError(
            f'"{path}" cannot be written: no file can be made in the folder "{folder}" ({reason}); name another folder'
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the block a file is written under the name that is given; after it, it is in place of ``path``.

    It has the permissions that a file made by ``open`` has. If anything is raised nothing is left behind and ``path``
    is as it was. Raises FormatError, with the user's name, where the system refuses.
    """
    partial = unfinished(path)
    try:
        with telling(path):
            # what libraries write by way of a temporary file is closed to others
            partial.touch()
            mode = (path if path.is_file() else partial).stat().st_mode & 0o777
            yield partial
            partial.chmod(mode)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn what the system says against writing, such as a full disk, into a FormatError that names ``path``."""
    try:
        yield
    except OSError as error:
        beside = error.filename is not None and Path(os.fsdecode(error.filename)).parent == path.parent
        if error.errno not in _WRITING and not beside:
            raise
        raise FormatError(_refused(path, error.strerror or str(error))) from error
    except Exception as error:
        # safetensors has an error of its own for these
        if not _SYSTEM.search(str(error)):
            raise
        reason = _SYSTEM.sub("", str(error)).rpartition("I/O error:")[2]
        raise FormatError(_refused(path, " ".join(reason.split()))) from error


def _refused(path: Path, reason: str) -> str:
    return f'"{path}" cannot be written ({reason}); make room or name a file elsewhere, and run it again'


def unfinished(path: Path) -> Path:
    """The name beside ``path`` under which it is written until it is whole.

    It is this writer's alone: two that write the same file would publish each other's halves.
    """
    return path.with_name(f".{path.name}.{token_hex(4)}.partial")
