"""What tests share that compile kernels, and run them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.triton_versions import VERSIONS, Evidence


@pytest.fixture(scope="module")
def evidence() -> Iterator[dict[str, Evidence]]:
    """The runs with other Tritons by version, all started at once."""
    runs = {version: Evidence(version) for version in VERSIONS}
    for run in runs.values():
        run.start()
    yield runs
    for run in runs.values():
        run.stop()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton compiles into a folder of the module's own."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch):
    """Executes what would be launched, and keeps the reports by kernel."""
    from sparsecomp.kernels import launching
    from tests.kernels.gluon_simulator import Simulator

    instead = Simulator()
    monkeypatch.setattr(launching, "launch", instead.launch)
    return instead
