"""A file is whole or not there, also where several write it at once; what cannot be written is refused before."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecomp.errors import FormatError
from sparsecomp.reporting.writing import require_folder, whole_file


def test_two_who_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with whole_file(path) as first:
        first.write_text("all of the first")
        with whole_file(path) as second:
            second.write_text("half of")
            assert first.read_text() == "all of the first"
            second.write_text("all of the second")
        assert path.read_text() == "all of the second"
    assert path.read_text() == "all of the first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_folder_is_no_name_of_a_file(name: str) -> None:
    with pytest.raises(FormatError, match="it names a folder; add the name of a file"):
        require_folder(Path(name))
