"""Measuring: what is measured, what is remembered, and that a damaged memory is measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsecomp
from sparsecomp.backends.registry import backends, choose
from sparsecomp.machine import cache, sources, timings
from sparsecomp.machine.device import Device, detect
from sparsecomp.machine.request import Request
from sparsecomp.machine.sources import file_digest
from sparsecomp.machine.timings import DENSE, SPARSE, UNPACKED, WIDENED, Measurement, keep, lookup
from sparsecomp.patterns import Block, parse
from sparsecomp.patterns.project import project
from sparsecomp.planning import measure as tune
from sparsecomp.planning.measure import measure, random_weight

REQUEST = Request(parse("2:4"), (24, 40), torch.float32, "cpu", 3)


def known(request: Request, device: Device | None = None) -> Measurement | None:
    """What is remembered of the backend that is taken without asking."""
    return lookup(request, choose(request), device)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSECOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(timings, "_known", {})
    monkeypatch.setattr(timings, "_STEADY", float("inf"))
    monkeypatch.setattr(tune, "_COPIES_BYTES", 1 << 16)
    return tmp_path


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "block8x8:0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_is_measured(pattern: str, dtype: torch.dtype) -> None:
    request = replace(REQUEST, pattern=parse(pattern), dtype=dtype)
    got = measure(request, budget=0.0)
    assert got.kernel == choose(request)
    widened = {WIDENED} if dtype == torch.bfloat16 else set()
    unpacked = set() if got.kernel == "dense" else {UNPACKED}
    assert set(got.seconds) == {SPARSE, DENSE} | unpacked | widened
    assert set(got.spread) == set(got.seconds)
    assert all(seconds > 0 for seconds in got.seconds.values())
    assert got.speedup == min(got.seconds[each] for each in {DENSE} | widened) / got.seconds[SPARSE]


def test_dense_is_the_fastest_product_of_this_process() -> None:
    def timed(**seconds: float) -> Measurement:
        return Measurement("cpu", {SPARSE: 1.0, DENSE: 4.0, **seconds}, {}, False)

    alone, both = timed(), timed(**{WIDENED: 3.0})
    assert (alone.dense, alone.speedup, alone.baseline(torch.float16)) == (4.0, 4.0, "torch fp16")
    assert (both.dense, both.speedup, both.baseline(torch.bfloat16)) == (3.0, 3.0, "torch fp32")
    assert both.dense_ways(torch.bfloat16) == {"torch bf16": 4.0, "torch fp32": 3.0}
    assert timed(**{WIDENED: 5.0}).baseline(torch.bfloat16) == "torch bf16"


def test_the_product_in_float32_takes_and_gives_the_dtype_of_the_layer() -> None:
    layer = torch.nn.Linear(16, 8, device="cpu", dtype=torch.float32)
    x = torch.randn(3, 16, device="cpu", dtype=torch.float32).bfloat16()
    y = tune._widened(layer, x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.float()).bfloat16())


def test_measurements_are_remembered_by_request_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known(REQUEST) is None
    first = measure(REQUEST, budget=0.0)
    assert known(REQUEST) is first and measure(REQUEST) is first
    timings._known.clear()
    cache._memory.clear()
    assert known(REQUEST) == first  # from the file
    for other in (
        replace(REQUEST, batch=4),
        replace(REQUEST, pattern=parse("1:4")),
        replace(REQUEST, dtype=torch.bfloat16),
        replace(REQUEST, shape=(40, 24)),
    ):
        assert known(other) is None
    assert known(REQUEST, replace(detect("cpu"), isa="another")) is None
    monkeypatch.setattr(timings, "_versions", lambda: "later")
    assert known(REQUEST) is None


def test_times_are_remembered_by_the_name_of_the_backend(kept: Path) -> None:
    first = measure(REQUEST, budget=0.0)
    assert measure(REQUEST, backend=choose(REQUEST)) is first  # named or not, it is the same product
    assert lookup(REQUEST, "reference") is None
    other = measure(REQUEST, budget=0.0, backend="reference")
    assert other.kernel == "reference" and lookup(REQUEST, "reference") is other and known(REQUEST) is first
    keys = json.loads((kept / "tune.json").read_text())
    assert sorted(key.rpartition(" by ")[2] for key in keys) == sorted([choose(REQUEST), "reference"])


def test_entries_without_the_name_of_a_backend_are_not_read(kept: Path) -> None:
    """Such as version 0.1.0 wrote, whose backend was the one that was chosen then."""
    keep(Measurement("dense", {SPARSE: 1e-9, DENSE: 1.0}, {SPARSE: 0.0}, False), REQUEST, detect("cpu"))
    ((key, entry),) = json.loads((kept / "tune.json").read_text()).items()
    (kept / "tune.json").write_text(json.dumps({key.rpartition(" by ")[0]: entry}))
    timings._known.clear()
    cache._memory.clear()
    assert all(lookup(REQUEST, name) is None for name in backends())


def test_measurements_of_a_busy_machine_are_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "_STEADY", -1.0)
    first = measure(REQUEST, budget=0.0)
    assert known(REQUEST) is first  # good enough for this process
    assert not (kept / "tune.json").exists()


def test_other_kernels_are_other_measurements(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


def test_on_a_gpu_triton_and_the_sources_belong_to_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = replace(detect("cpu"), kind="cuda", isa="sm_90")
    request = replace(REQUEST, device="cuda:0")
    keys = [timings._key(request, gpu, "triton")]
    for folder, text in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.py").write_text(text)
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / folder)])
        monkeypatch.setattr(sources, "find_spec", lambda name, spec=spec: spec)
        timings._gpu_versions.cache_clear()
        keys.append(timings._key(request, gpu, "triton"))
    before = timings._key(REQUEST, detect("cpu"), "cpu")
    monkeypatch.setattr(timings, "version", lambda package: "99.0")
    timings._gpu_versions.cache_clear()
    keys.append(timings._key(request, gpu, "triton"))
    assert len(set(keys)) == 4
    assert timings._key(REQUEST, detect("cpu"), "cpu") == before  # a CPU's times do not age with Triton
    monkeypatch.undo()
    timings._gpu_versions.cache_clear()
    assert timings._key(request, gpu, "triton") == keys[0]


def test_the_sources_of_the_gpu_kernels_are_found() -> None:
    names = {name for name, _ in sources.sources(sources.gpu_folders())}
    assert {"sparse_mma_kernel.py", "nm_decompress.py", "wgmma_sp.cu", "gpu/cutlass/config.py"} <= names


def test_a_digest_sees_names_and_contents_at_any_depth(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c.py"
    deep.parent.mkdir(parents=True)
    deep.write_text("x = 1\n")
    seen = [sources.digest([tmp_path])]
    deep.write_text("x = 2\n")
    seen.append(sources.digest([tmp_path]))
    deep.rename(tmp_path / "c.py")
    seen.append(sources.digest([tmp_path]))
    assert len(set(seen)) == 3
    assert sources.package_digest() == sources.digest([Path(sparsecomp.__file__).parent])


def test_other_thread_counts_are_other_measurements() -> None:
    measure(REQUEST, budget=0.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert known(REQUEST) is None
    finally:
        torch.set_num_threads(threads)


def test_measuring_again_replaces_what_was_known() -> None:
    first = measure(REQUEST, budget=0.0)
    assert measure(REQUEST, budget=0.0, again=True) is not first
    assert known(REQUEST) is not first


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"kernel": "cpu"},
        {"kernel": 1, "seconds": {"sparse": 1.0, "dense": 1.0}, "spread": {}},
        {"kernel": "cpu", "seconds": {"sparse": 1.0}, "spread": {}},
        {"kernel": "cpu", "seconds": {"sparse": -1.0, "dense": 1.0}, "spread": {}},
        {"kernel": "cpu", "seconds": {"sparse": "fast", "dense": 1.0}, "spread": {}},
    ],
)
def test_entries_nobody_wrote_are_ignored(kept: Path, entry: object) -> None:
    measure(REQUEST, budget=0.0)
    (key,) = json.loads((kept / "tune.json").read_text())
    (kept / "tune.json").write_text(json.dumps({key: entry}))
    timings._known.clear()
    cache._memory.clear()
    assert known(REQUEST) is None


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "8:16", "2:4@v4", "64:2:8", "block8x4:0.4"])
@pytest.mark.parametrize("shape", [(70, 130), (600, 64), (3, 5), (1, 1), (0, 8), (4, 0)])
def test_random_weights_fit_their_pattern(pattern: str, shape: tuple[int, int]) -> None:
    weight = random_weight(parse(pattern), shape, torch.float32).validate()
    if isinstance(weight.pattern, Block):
        assert weight.values.shape[0] == weight.pattern.kept_blocks(*shape)
    else:
        assert int((weight.unpack() != 0).sum()) == int(project(torch.rand(shape), weight.pattern).sum())
    assert torch.equal(weight.values, random_weight(parse(pattern), shape, torch.float32).values)


def test_rotation_exceeds_the_cache_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    device = replace(detect("cpu"), l3_bytes=1 << 20)
    monkeypatch.setattr(tune, "_COPIES_BYTES", 64 << 20)
    request = replace(REQUEST, shape=(256, 256))
    copies, cold = tune.rotation(request, device)
    assert cold and copies * 256 * 256 * 2 > 1 << 20
    monkeypatch.setattr(tune, "_COPIES_BYTES", 1)
    assert tune.rotation(request, device) == (1, False)


def test_hopeless_candidates_are_not_measured_on() -> None:
    calls = {SPARSE: 0, UNPACKED: 0}
    clock = iter(range(10**6))

    def counting(name: str) -> tune.Callable[[torch.Tensor], object]:
        def call(x: torch.Tensor) -> None:
            calls[name] += 1
            for _ in range(0 if name == SPARSE else 200000):
                next(clock, None)

        return call

    samples = tune._interleaved({SPARSE: [counting(SPARSE)], UNPACKED: [counting(UNPACKED)]}, torch.zeros(1), 0.0)
    assert calls[UNPACKED] == 2 and len(samples[UNPACKED]) == 1
    assert len(samples[SPARSE]) == 3
