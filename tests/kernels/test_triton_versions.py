"""The compile matrix, and some of every kernel's PTX executed, with the oldest and the newest Triton."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from sparsecomp.backends.gpu.cuda import MINIMUM_TRITON
from tests.kernels.triton_versions import EXPECTED, VERSIONS, Evidence

triton = pytest.importorskip("triton", reason="triton is not installed")

FEWEST_TESTS = 150


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", VERSIONS)
def test_the_evidence_holds(version: str, evidence: dict[str, Evidence]) -> None:
    found = evidence[version].result()
    if found is None:
        pytest.skip(f"Triton {version} is not installed beside {triton.__version__}; run make tritons with a network")
    status, passed, text = found
    assert status == 0, text[-6000:]
    assert passed >= FEWEST_TESTS and not re.search(r"\d+ skipped", text), text[-2000:]


@pytest.mark.every_triton
def test_it_is_this_triton() -> None:
    expected = os.environ.get(EXPECTED, triton.__version__)
    assert triton.__version__ == expected
    assert Path(triton.__file__).parents[1].name == expected or EXPECTED not in os.environ


@pytest.mark.exhaustive
def test_another_triton_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Evidence(VERSIONS[0])
    if not run.folder.is_dir():
        pytest.skip(
            f"Triton {VERSIONS[0]} is not installed beside {triton.__version__}; run make tritons with a network"
        )
    run.version = VERSIONS[-1]
    run.start("-k", "test_it_is_this_triton", __file__)
    found = run.result()
    run.stop()
    assert found is not None and found[:2] == (1, 0)


def test_the_oldest_is_the_one_that_backends_ask_for() -> None:
    numbers = [tuple(int(part) for part in version.split(".")) for version in VERSIONS]
    assert numbers == sorted(numbers) and numbers[0][:2] == MINIMUM_TRITON
    ours = re.findall(r"\d+", triton.__version__)[:2]
    assert numbers[0][:2] <= (int(ours[0]), int(ours[1])) <= numbers[-1][:2]
