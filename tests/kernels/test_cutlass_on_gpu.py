"""The CUTLASS backend on a Hopper GPU: every configuration against float64, strides, activations, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from sparsecomp.activations import ACTIVATIONS, activate
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.backend import CutlassBackend
from sparsecomp.backends.gpu.cutlass.config import Choice, Config, configs
from sparsecomp.backends.gpu.cutlass.fp8 import fp8_linear, fp8_why_not, prepare_fp8, scaled
from sparsecomp.backends.gpu.cutlass.library import Scales
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.wgmma import to_wgmma
from tests.kernels.gpu_cases import assert_close_to_float64, random_case

pytestmark = pytest.mark.gpu

HALF, BRAIN = torch.float16, torch.bfloat16
CONFIGS = [*configs("bfloat16", "bfloat16"), *configs("float16", "float16")]


@pytest.fixture(autouse=True)
def hopper() -> None:
    reason = CutlassBackend().missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("swizzle", [1, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config: Config, swizzle: int) -> None:
    dtype = getattr(torch, config.element)
    # more tiles than one wave of a cluster, ragged on every side, rows of x apart
    case = random_case("2:4", 2 * config.out + 40, 4 * 128 + 24, 2 * config.tokens + 5, dtype, row_gap=8)
    assert case.bias is not None
    values, metadata = to_wgmma(pack(case.weight.cuda(), "2:4"))
    x, bias, out = case.x.cuda(), case.bias.cuda(), case.weight.shape[0]
    choice = Choice(config, swizzle)
    y = cutlass_library.product(x, values, metadata, bias, out, (config,), choice=choice)
    assert_close_to_float64(y, case)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (512, 1024), (130, 72)])
@pytest.mark.parametrize("batch", [0, 1, 17, 129])
def test_cutlass_matches_float64(out: int, columns: int, dtype: torch.dtype, batch: int) -> None:
    case = random_case("2:4", out, columns, batch, dtype, row_gap=3)
    packed = pack(case.weight.cuda(), "2:4")
    kernel = CutlassBackend().prepare(packed)
    restored = CutlassBackend().restore(kernel)
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    bias = None if case.bias is None else case.bias.cuda()
    # as a view of the wider rows: what lies between them is NaN and must not be read
    wide = torch.full((batch, columns + 3), torch.nan, dtype=dtype, device="cuda")
    wide[:, :columns] = case.x.cuda()
    assert_close_to_float64(CutlassBackend().run(kernel, wide[:, :columns], bias), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cutlass_activations(activation: str) -> None:
    case = random_case("2:4", 192, 256, 40, HALF)
    assert case.bias is not None
    kernel = CutlassBackend().prepare(pack(case.weight.cuda(), "2:4"))
    y = CutlassBackend().run_activated(kernel, case.x.cuda(), case.bias.cuda(), activation)
    exact = activate(functional.linear(case.x.double(), case.weight.double(), case.bias.double()), activation)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tokens", [1, 70, 300])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("config", configs("float8_e4m3fn", "bfloat16"), ids=str)
def test_fp8(config: Config, rows: bool, tokens: int) -> None:
    case = random_case("2:4", 200, 1000, tokens, BRAIN)
    assert case.bias is not None
    packed = pack(case.weight, "2:4")
    weight = prepare_fp8(packed, rows)
    x, x_scales = scaled(case.x, rows)
    # the weight that the fp8 values stand for, in the canonical form's places
    narrow = replace(packed, values=weight.values[:, : packed.values.shape[1]].float()).unpack()
    narrow = narrow.double() * weight.scales.double()[:, None]
    exact = functional.linear(x.double() * x_scales.double()[:, None], narrow, case.bias.double())
    operands = (each.cuda() for each in (x, weight.values, weight.metadata, case.bias))
    scales = Scales(weight.scales.cuda(), x_scales.cuda())
    y = cutlass_library.product(*operands, 200, (config,), "none", scales, Choice(config))
    # between two additions in fp32 the tensor cores keep about 14 bits of sums around 50
    torch.testing.assert_close(y.cpu().double(), exact, rtol=8e-3, atol=5e-2)


def test_fp8_by_its_function() -> None:
    packed = pack(random_case("2:4", 256, 512, 1, BRAIN).weight.cuda(), "2:4")
    x, x_scales = scaled(torch.randn(64, 512, device="cuda"))
    assert fp8_why_not() is None
    y = fp8_linear(x, x_scales, prepare_fp8(packed), activation="relu")
    wanted = torch.relu(functional.linear(x.float() * x_scales[:, None], packed.unpack().float()))
    assert ((y.float() - wanted).norm() / wanted.norm()).item() < 0.05


def test_cutlass_replays_in_a_cuda_graph() -> None:
    case = random_case("2:4", 256, 512, 4, HALF)
    assert case.bias is not None
    kernel = CutlassBackend().prepare(pack(case.weight.cuda(), "2:4"))
    x, bias = torch.zeros(4, 512, dtype=HALF, device="cuda"), case.bias.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        CutlassBackend().run(kernel, x, bias)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = CutlassBackend().run(kernel, x, bias)
    x.copy_(case.x)
    graph.replay()
    torch.cuda.synchronize()
    assert_close_to_float64(y, case)
