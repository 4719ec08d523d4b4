"""What is told of this machine, and how peaks and measurements are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsecomp.errors import BackendError, PatternError
from sparsecomp.machine import cache, device
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.native import native

CPU = Device("cpu", "a processor", "avx512_bf16", 2, 49152, 1 << 20, 32 << 20)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(device, "_peaks", {})
    return tmp_path


class Rates:
    """An extension that permutes groups of 4, 8 and 16 columns so many times a nanosecond."""

    def __init__(self, *rates: float) -> None:
        self._rates = dict(zip((4, 8, 16), rates, strict=True))

    def pair_rate(self, columns: int) -> float:
        return self._rates[columns] * 1e9


NONE, ZEN3, ZEN5 = (0.0, 0.0, 0.0), (2.95, 1.5, 0.8), (5.7, 5.1, 2.7)


@pytest.mark.parametrize(
    ("kind", "isa", "rates", "pattern"),
    [
        ("cpu", "avx512_bf16", NONE, "8:16"),
        ("cpu", "avx512", NONE, "8:16"),
        ("cpu", "avx2", ZEN5, "4:8"),
        ("cpu", "avx2_vnni", ZEN5, "4:8"),
        ("cpu", "avx2", ZEN3, "2:4"),
        ("cpu", "avx2", NONE, "2:4"),
        ("cpu", "neon", NONE, "2:4"),
        ("cpu", "reference", NONE, "2:4"),
        ("cuda", "sm_90", ZEN5, "2:4"),
    ],
)
def test_natural_pattern_follows_the_register_and_what_was_measured(
    kept: Path, monkeypatch: pytest.MonkeyPatch, kind: str, isa: str, rates: tuple[float, ...], pattern: str
) -> None:
    monkeypatch.setattr(device, "native", lambda: Rates(*rates))
    assert str(replace(CPU, kind=kind, isa=isa).natural_pattern()) == pattern


def test_natural_pattern_at_other_densities(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "native", lambda: Rates(*ZEN5))
    assert str(CPU.natural_pattern(3 / 16)) == "3:16"
    assert str(replace(CPU, isa="avx2").natural_pattern(0.75)) == "6:8"
    with pytest.raises(PatternError, match="1/4"):
        replace(CPU, isa="neon").natural_pattern(0.3)
    with pytest.raises(PatternError, match="1/16"):
        CPU.natural_pattern(0.0)


def test_rates_are_kept_and_the_highest_ever_seen_counts(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(CPU, isa="avx2")
    monkeypatch.setattr(device, "native", lambda: Rates(*ZEN5))
    assert here.pair_rate(4) == 5.7e9 and here.pair_rate(8) == 5.1e9
    for busy in ((5.6, 0.5, 0.8), NONE):  # another process, in a busy moment; one that measures nothing
        monkeypatch.setattr(device, "_peaks", {})
        monkeypatch.setattr(device, "native", lambda rates=busy: Rates(*rates))
        assert here.pair_rate(8) == (5.1e9 if busy != NONE else None)
    assert replace(CPU, isa="avx512").pair_rate(4) is None and replace(here, kind="cuda").pair_rate(4) is None
    monkeypatch.setattr(device, "native", lambda: "there is no extension")
    assert here.pair_rate(4) is None and str(here.natural_pattern()) == "2:4"


def test_rates_of_this_machine_are_measured_where_avx2_serves() -> None:
    code = "from sparsecomp.machine.device import detect; here = detect('cpu'); print(here.isa, here.pair_rate(4))"
    module = native()
    if isinstance(module, str) or "avx2" not in module.isa_available().split(","):
        pytest.skip("AVX2 does not run here")
    environment = {**os.environ, "SPARSECOMP_ISA": "avx2", "SPARSECOMP_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    isa, rate = done.stdout.split()
    assert isa == "avx2" and float(rate) > 0


def test_this_machine_is_described() -> None:
    here = detect("cpu")
    assert here.kind == "cpu" and here.cores >= 1 and here.threads == torch.get_num_threads()
    assert here.name in here.describe() and here.isa in here.describe() and f"{here.cores} cores" in here.describe()
    assert detect("cpu").fingerprint == here.fingerprint
    assert replace(here, isa="another").fingerprint != here.fingerprint


def test_unknown_devices_are_named() -> None:
    with pytest.raises(BackendError, match="cpu"):
        detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA GPU"):
            detect("cuda")
        assert detect("auto").kind == "cpu"


def test_cache_sizes_are_read_per_level(tmp_path: Path) -> None:
    for index, (kind, level, size) in enumerate(
        [("Data", "1", "48K"), ("Instruction", "1", "32K"), ("Unified", "2", "1024K"), ("Unified", "3", "32M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()
    assert device._cache_sizes(tmp_path) == {1: 48 << 10, 2: 1 << 20, 3: 32 << 20}
    assert device._cache_sizes(tmp_path / "absent") == {}


def test_the_highest_peak_ever_seen_counts(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([2e11, 1e11, 3e11])
    monkeypatch.setattr(device, "_measure_flops", lambda kind, dtype, threads: next(seen))
    monkeypatch.setattr(device, "_measure_bandwidth", lambda kind, threads: 4e10)
    for expected in (2e11, 2e11, 3e11):  # the second process meets a busy machine
        for _ in range(2):
            assert CPU.flops(torch.float32, 1) == expected  # one look per process
        device._peaks.clear()
    assert CPU.bandwidth(1) == 4e10
    assert sorted(json.loads((kept / "peaks.json").read_text()).values()) == [4e10, 3e11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_peaks_are_plausible(kept: Path, dtype: torch.dtype) -> None:
    assert 1e8 < detect("cpu").flops(dtype, 1) < 1e14


def test_cache_survives_damage_and_can_be_off(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store("some", "a", 1)
    cache._memory.clear()
    assert cache.read("some") == {"a": 1}
    (kept / "some.json").write_text("{broken")
    with pytest.warns(UserWarning, match="delete the file"):
        assert cache.read("some") == {}
    cache.store("some", "b", 2)
    cache._memory.clear()
    assert cache.read("some") == {"b": 2}
    (kept / "some.json").write_text("[1]")
    with pytest.warns(UserWarning, match="no JSON object"):
        assert cache.read("some") == {}
    assert sorted(path.name for path in kept.iterdir()) == ["some.json"]
    monkeypatch.setenv("SPARSECOMP_CACHE", "off")
    cache.store("some", "c", 3)
    assert cache.read("some") == {} and cache.directory() is None


def test_cache_directory_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSECOMP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "sparsecomp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "sparsecomp"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cache, "_memory", {})
    with pytest.warns(UserWarning, match="SPARSECOMP_CACHE"):
        cache.store("some", "a", 1)


@pytest.mark.slow
def test_import_creates_no_cuda_context() -> None:
    code = (
        "import torch, sys, sparsecomp.machine.device, sparsecomp.planning.planner, sparsecomp.compiler; "
        "sys.exit(torch.cuda.is_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_peak_of_integers_is_that_of_the_kernels(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension(ModuleType):
        def measure_flops(self, code: int, threads: int, microseconds: int) -> float:
            return 1e9 * threads if code == 4 else 0.0

    monkeypatch.setattr(device, "native", lambda: Extension("extension"))
    assert CPU.integer_flops(3) == 3e9
    assert replace(CPU, kind="cuda").integer_flops(3) is None
    monkeypatch.setattr(device, "native", lambda: "there is no extension")
    assert replace(CPU, cores=3).integer_flops(3) is None
