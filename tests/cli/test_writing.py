"""Files that cannot be written are refused before the work, and told of in the user's words where it fails later."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsecomp as sc
from sparsecomp.cli.main import main
from sparsecomp.errors import FormatError
from sparsecomp.reporting import writing as files

PRUNE = ["prune", "shop:build", "--pattern", "2:4"]
PACK = ["compile", "shop:build", "--pattern", "2:4", "--method", "magnitude", "--everywhere"]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be written, for root as well."""
    folder = Path("closed").resolve()
    folder.mkdir()
    (folder / "old.json").write_text("{}")
    real = os.access

    def access(path: Any, mode: int) -> bool:
        return real(path, mode) and not (
            mode & os.W_OK and folder in (Path(path).resolve(), *Path(path).resolve().parents)
        )

    monkeypatch.setattr(os, "access", access)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [*PRUNE, "-o", "closed/x.safetensors"],
        [*PRUNE, "-o", "closed/"],
        [*PRUNE, "-o", "closed/folder/"],
        [*PRUNE, "-o", "x.safetensors", "--report", "closed/r.html"],
        [*PRUNE, "-o", "x.safetensors", "--report", "closed/old.json"],
        [*PRUNE, "-o", "x.safetensors", "--save-masks", "closed/m.safetensors"],
        [*PRUNE, "-o", "x.safetensors", "--checkpoint", "closed/a/b"],
        [*PACK, "-o", "closed/x.safetensors"],
        ["export", "x.safetensors", "--model", "shop:build", "-o", "closed/x.onnx"],
        ["bench", "--output", "closed/r.json"],
        ["bench", "--plot", "closed/r.svg"],
    ],
)
def test_a_closed_folder_is_named_before_any_work(
    arguments: list[str], closed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def working(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sparsecomp.cli.models.load_model", working)
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in error and "closed" in error and ".partial" not in error
    assert sorted(each.name for each in closed.iterdir()) == ["old.json"]


def test_a_checkpoint_in_a_file_and_a_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "-o", "x", "--checkpoint", "shop.py/a"]) == 2
    assert '"shop.py" is a file' in capsys.readouterr().err
    assert main([*PRUNE, "-o", "x" * 250]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device", ".x.safetensors.partial"),
        PermissionError(errno.EACCES, "Permission denied", ".x.safetensors.partial"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("verb", [PRUNE, PACK])
def test_a_disk_that_fails_is_told_of_with_the_users_name(
    verb: list[str], failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise failure

    for name in ("sparsecomp.files.container.save_file", "safetensors.torch.save_model"):
        monkeypatch.setattr(name, full)
    Path("x.safetensors").write_text("of before")
    assert main([*verb, "-o", "x.safetensors"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: "x.safetensors" cannot be written (')
    assert ("No space left on device)" in error) == ("denied" not in error) and "safetensors cannot hold" not in error
    assert Path("x.safetensors").read_text() == "of before" and not list(Path().glob(".*partial"))


def test_a_tensor_that_the_format_cannot_hold_is_still_called_so(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex32))
    with pytest.raises(sc.errors.ModelError, match="safetensors cannot hold this model"):
        sc.save(sc.compile(model, "2:4", method="magnitude", where="everywhere"), tmp_path / "x.safetensors")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_written_files_have_the_permissions_of_new_files(mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        assert main([*PRUNE, "-o", "pruned.safetensors", "--save-masks", "masks.safetensors"]) == 0
        assert main([*PACK, "-o", "packed.safetensors"]) == 0
    finally:
        os.umask(before)
    for name in ("pruned", "masks", "packed"):
        assert stat.S_IMODE(Path(f"{name}.safetensors").stat().st_mode) == mode, name


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    path.chmod(0o604)
    with files.whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o604
    with pytest.raises(FormatError, match=r"a.bin.* cannot be written"), files.telling(path):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".a.bin.partial"))
    with pytest.raises(FileNotFoundError), files.telling(path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/somewhere/else")
