"""Every kernel captured in a CUDA graph and replayed with other numbers in x, on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.base import Backend
from sparsecomp.backends.gpu.experimental.gluon_numbers import GluonInt8Backend, GluonTf32Backend
from sparsecomp.backends.gpu.experimental.gluon_wgmma import FLAG, GluonWgmmaBackend
from sparsecomp.backends.gpu.gluon import GluonBackend
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.backends.gpu.triton_block import TritonBlockBackend
from sparsecomp.backends.gpu.triton_vnm import TritonVnmBackend
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SPLIT_CONFIGS, Config
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.packing.quantize import quantize
from tests.kernels.gpu_cases import (
    Case,
    assert_close_to_float64,
    assert_close_to_integer_product,
    need,
    random_case,
    rounded_to_tf32,
)

pytestmark = pytest.mark.gpu

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def _replayed(run: Callable[[Tensor], Tensor], xs: list[Tensor]) -> list[Tensor]:
    """What the graph of ``run`` gives for each x [tokens, in]; it is captured on zeros."""
    place = torch.zeros_like(xs[0], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # compiles and tunes, neither of which a capture allows
    with torch.cuda.stream(stream):
        run(place)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = run(place)
    results = []
    for x in xs:
        place.copy_(x)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        results.append(y.cpu())
    return results


def _other(case: Case) -> Case:
    """The same product of another x, a hundred times as large, so that scales of the first one do not fit it."""
    return Case(case.weight, case.pattern, case.x.flip(0) * 100, case.bias)


@pytest.mark.parametrize(
    ("backend", "pattern"),
    [
        (TritonBackend(), "2:4"),
        (TritonBackend(), "64:2:8"),
        (TritonVnmBackend(), "64:2:8"),
        (TritonBlockBackend(), "block32x32:0.5"),
        (GluonBackend(), "2:4"),
    ],
    ids=lambda value: value.name if isinstance(value, Backend) else value,
)
@pytest.mark.parametrize("columns", [512, 333])
def test_a_backend_replays(backend: Backend, pattern: str, columns: int) -> None:
    need(backend)
    first = random_case(pattern, 256, columns, 4, HALF)
    assert first.bias is not None
    kernel, bias = backend.prepare(pack(first.weight.cuda(), pattern)), first.bias.cuda()
    cases = [first, _other(first), first]
    for y, case in zip(
        _replayed(lambda x: backend.run(kernel, x, bias), [each.x for each in cases]), cases, strict=True
    ):
        assert_close_to_float64(y, case)


def _check_int8(y: Tensor, case: Case, packed: PackedWeight) -> None:
    from sparsecomp.kernels.quantize_rows import quantize_rows_slowly

    assert_close_to_integer_product(y, case, *quantize_rows_slowly(case.x), packed)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize(("columns", "tokens"), [(512, 4), (333, 40)])
def test_int8_replays(columns: int, tokens: int, dtype: torch.dtype) -> None:
    backend = GluonInt8Backend()
    need(backend)
    first = random_case("2:4", 256, columns, tokens, dtype)
    assert first.bias is not None
    packed = quantize(pack(first.weight, "2:4"))
    kernel, bias = backend.prepare(packed.to("cuda")), first.bias.cuda()
    cases = [first, _other(first), first]
    for y, case in zip(
        _replayed(lambda x: backend.run(kernel, x, bias), [each.x for each in cases]), cases, strict=True
    ):
        _check_int8(y, case, packed)


@pytest.mark.parametrize(("columns", "tokens"), [(512, 4), (333, 40)])
def test_tf32_replays(columns: int, tokens: int) -> None:
    backend = GluonTf32Backend()
    need(backend)
    first = random_case("1:2", 256, columns, tokens, SINGLE)
    assert first.bias is not None
    kernel, bias = backend.prepare(pack(first.weight.cuda(), "1:2")), first.bias.cuda()
    cases = [first, _other(first), first]
    for y, case in zip(
        _replayed(lambda x: backend.run(kernel, x, bias), [each.x for each in cases]), cases, strict=True
    ):
        assert_close_to_float64(y, Case(rounded_to_tf32(case.weight), "1:2", rounded_to_tf32(case.x), case.bias))


@pytest.mark.parametrize("kind", ["16 bits", "int8", "tf32"])
@pytest.mark.parametrize("config", (CONFIGS[7], *SPLIT_CONFIGS), ids=str)
def test_every_split_replays(config: Config, kind: str) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.sparse_mma import sparse_mma_linear

    pattern, dtype = ("1:2", SINGLE) if kind == "tf32" else ("2:4", BRAIN)
    first = random_case(pattern, config.out + 40, 1111, config.tokens + 3, dtype)
    assert first.bias is not None
    packed = pack(first.weight, pattern)
    packed = quantize(packed) if kind == "int8" else packed
    on_gpu, bias, out = packed.to("cuda"), first.bias.cuda(), first.weight.shape[0]
    operands = to_fragments(on_gpu)
    cases = [first, _other(first), first]

    def run(x: Tensor) -> Tensor:
        return sparse_mma_linear(x, *operands, bias, out, "none", config, on_gpu.scales)

    for y, case in zip(_replayed(run, [each.x for each in cases]), cases, strict=True):
        if kind == "int8":
            _check_int8(y, case, packed)
        elif kind == "tf32":
            assert_close_to_float64(y, Case(rounded_to_tf32(case.weight), "1:2", rounded_to_tf32(case.x), case.bias))
        else:
            assert_close_to_float64(y, case)


def test_activations_replay_in_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GluonWgmmaBackend()
    monkeypatch.setenv(FLAG, backend.name)
    need(backend)
    case = random_case("2:4", 256, 333, 40, HALF)
    assert case.bias is not None
    kernel, bias = backend.prepare(pack(case.weight.cuda(), "2:4")), case.bias.cuda()
    for y, x in zip(
        _replayed(lambda x: backend.run_activated(kernel, x, bias, "silu"), [case.x, case.x.flip(0)]),
        (case.x, case.x.flip(0)),
        strict=True,
    ):
        exact = functional.linear(x.double(), case.weight.double(), case.bias.double())
        torch.testing.assert_close(y.double(), functional.silu(exact), rtol=2e-3, atol=2e-3)
