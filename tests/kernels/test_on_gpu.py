"""The GPU backends on a GPU: the same bound against float64, and strides."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparsecomp import SparseLinear
from sparsecomp.activations import activate
from sparsecomp.backends.base import Backend
from sparsecomp.backends.gpu.cusparselt import CusparseltBackend
from sparsecomp.backends.gpu.experimental.gluon_numbers import GluonInt8Backend, GluonTf32Backend
from sparsecomp.backends.gpu.experimental.gluon_wgmma import FLAG
from sparsecomp.backends.gpu.gluon import GluonBackend
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.backends.gpu.triton_block import TritonBlockBackend
from sparsecomp.backends.gpu.triton_vnm import TritonVnmBackend
from sparsecomp.backends.registry import backends
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SPLIT_CONFIGS, Config, configs
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse, row_nm
from tests.kernels.gpu_cases import (
    Case,
    assert_close_to_float64,
    assert_close_to_integer_product,
    moved,
    need,
    quantized_case,
    random_case,
    rounded_to_tf32,
    strided_columns,
)

pytestmark = pytest.mark.gpu

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def _run(backend: Backend, case: Case) -> torch.Tensor:
    packed = pack(case.weight.cuda(), case.pattern)
    packed = quantize(packed) if case.quantized else packed
    kernel = backend.prepare(packed)
    restored = backend.restore(kernel)
    assert all(torch.equal(restored.parts[name], packed.parts[name]) for name in packed.parts)
    return backend.run(kernel, moved(case.x), None if case.bias is None else case.bias.cuda())


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "8:16", "5:16", "16:16", "2:4@v4", "64:2:8"])
@pytest.mark.parametrize("batch", [0, 1, 17, 32, 129])
def test_triton_matches_float64(pattern: str, dtype: torch.dtype, batch: int) -> None:
    need(TritonBackend())
    case = random_case(pattern, 333, 777, batch, dtype, row_gap=3)
    assert_close_to_float64(_run(TritonBackend(), case), case)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("pattern", ["16:2:8", "32:2:16", "64:2:8", "64:2:16", "128:2:8", "256:2:8"])
@pytest.mark.parametrize("batch", [0, 1, 17, 32, 129])
def test_vnm_matches_float64(pattern: str, dtype: torch.dtype, batch: int) -> None:
    need(TritonVnmBackend())
    case = random_case(pattern, 333, 777, batch, dtype, row_gap=3)
    assert_close_to_float64(_run(TritonVnmBackend(), case), case)


@pytest.mark.parametrize(
    ("name", "pattern"), [("triton", "2:4"), ("triton_vnm", "64:2:8"), ("triton_block", "block32x32:0.5")]
)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("batch", [3, 70])
def test_activations_of_triton_kernels(name: str, pattern: str, activation: str, batch: int) -> None:
    backend = backends()[name]
    need(backend)
    case = random_case(pattern, 128, 256, batch, HALF)
    assert case.bias is not None
    kernel = backend.prepare(pack(case.weight.cuda(), pattern))
    y = backend.run_activated(kernel, case.x.cuda(), case.bias.cuda(), activation)
    exact = functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    # exp2 and the division are approximations of the hardware
    torch.testing.assert_close(y.cpu().double(), activate(exact, activation), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "4:8@v2", "5:16"])
@pytest.mark.parametrize("batch", [0, 1, 17, 129])
def test_triton_with_int8_weights_matches_float64(pattern: str, dtype: torch.dtype, batch: int) -> None:
    need(TritonBackend())
    case = quantized_case(pattern, 333, 777, batch, dtype)
    assert_close_to_float64(_run(TritonBackend(), case), case)


@pytest.mark.parametrize("batch", [1, 256])
def test_triton_on_a_large_layer(batch: int) -> None:
    need(TritonBackend())
    case = random_case("2:4", 4096, 4096, batch, BRAIN)
    assert_close_to_float64(_run(TritonBackend(), case), case)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (512, 1024), (130, 72)])
@pytest.mark.parametrize("batch", [0, 1, 17, 129])
def test_gluon_matches_float64(out: int, columns: int, dtype: torch.dtype, batch: int) -> None:
    need(GluonBackend())
    case = random_case("2:4", out, columns, batch, dtype, row_gap=3)
    assert_close_to_float64(_run(GluonBackend(), case), case)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("pattern", ["block16x16:0.5", "block32x64:0.3", "block64x64:0.5", "block128x128:0.5"])
@pytest.mark.parametrize("batch", [0, 1, 33, 129])
def test_blocks_match_float64(pattern: str, dtype: torch.dtype, batch: int) -> None:
    need(TritonBlockBackend())
    case = random_case(pattern, 333, 777, batch, dtype, row_gap=3)
    assert_close_to_float64(_run(TritonBlockBackend(), case), case)


STRIDED = {
    "triton": random_case("2:4", 96, 144, 7, BRAIN),
    "triton_vnm": random_case("32:2:8", 96, 144, 7, BRAIN),
    "triton_block": random_case("block32x32:0.5", 96, 144, 7, BRAIN),
    "cusparselt": random_case("2:4", 96, 144, 7, BRAIN),
    "gluon": random_case("2:4", 96, 144, 7, BRAIN),
    "gluon_int8": quantized_case("2:4", 96, 144, 7, BRAIN),
    "gluon_tf32": random_case("1:2", 96, 144, 7, SINGLE),
    "gluon_wgmma": random_case("2:4", 96, 144, 7, BRAIN),
    "cutlass": random_case("2:4", 96, 144, 7, BRAIN),
}


@pytest.mark.parametrize("name", STRIDED)
def test_columns_of_x_may_lie_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLAG, "gluon_wgmma")
    need(backends()[name])
    case = STRIDED[name]
    apart = strided_columns(case)
    assert apart.x.stride(1) != 1
    assert torch.equal(_run(backends()[name], apart), _run(backends()[name], case))


@pytest.mark.parametrize("config", (*CONFIGS, *SPLIT_CONFIGS), ids=str)
def test_every_gluon_configuration_sanitized(config: Config) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.sparse_mma import sparse_mma_linear

    major, minor = torch.cuda.get_device_capability()
    if config not in (*configs(10 * major + minor), *SPLIT_CONFIGS):
        pytest.skip(f"{config} does not fit this GPU's shared memory")
    steps = config.splits * (config.stages + 1)
    case = random_case("2:4", config.out + 40, config.depth * steps + 24, config.tokens + 5, BRAIN)
    assert case.bias is not None
    fragments, metadata = to_fragments(pack(case.weight.cuda(), "2:4"))
    x, bias, out = case.x.cuda(), case.bias.cuda(), case.weight.shape[0]
    assert_close_to_float64(sparse_mma_linear(x, fragments, metadata, bias, out, "none", config), case)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (1024, 4096)])
@pytest.mark.parametrize("batch", [0, 1, 17, 300])
def test_gluon_int8_matches_the_integer_product(out: int, columns: int, batch: int, dtype: torch.dtype) -> None:
    need(GluonInt8Backend())
    from sparsecomp.kernels.quantize_rows import quantize_rows, quantize_rows_slowly

    case = random_case("2:4", out, columns, batch, dtype, row_gap=3)
    packed = quantize(pack(case.weight.cuda(), "2:4"))
    kernel = GluonInt8Backend().prepare(packed)
    restored = GluonInt8Backend().restore(kernel)
    assert all(torch.equal(restored.parts[name], packed.parts[name]) for name in packed.parts)
    assert case.bias is not None
    y = GluonInt8Backend().run(kernel, moved(case.x), case.bias.cuda())
    integers, scales = quantize_rows_slowly(case.x)
    found, found_scales = quantize_rows(moved(case.x))
    assert torch.equal(found[:, :columns].cpu(), integers) and torch.equal(found_scales.cpu(), scales)
    assert_close_to_integer_product(y, case, integers, scales, packed.to("cpu"))


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (1024, 2048)])
@pytest.mark.parametrize("batch", [0, 1, 17, 300])
def test_gluon_tf32_matches_float64_of_tf32(out: int, columns: int, batch: int) -> None:
    need(GluonTf32Backend())
    case = random_case("1:2", out, columns, batch, SINGLE, row_gap=3)
    rounded = Case(rounded_to_tf32(case.weight), "1:2", rounded_to_tf32(case.x), case.bias)
    assert_close_to_float64(_run(GluonTf32Backend(), case), rounded)


@pytest.mark.parametrize("config", (*CONFIGS, *SPLIT_CONFIGS), ids=str)
def test_every_gluon_configuration_of_other_elements(config: Config) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.quantize_rows import quantize_rows_slowly
    from sparsecomp.kernels.sparse_mma import sparse_mma_linear

    major, minor = torch.cuda.get_device_capability()
    if config not in (*configs(10 * major + minor), *SPLIT_CONFIGS):
        pytest.skip(f"{config} does not fit this GPU's shared memory")
    case = random_case("2:4", config.out + 40, 2 * config.depth * (config.stages + 1) + 48, config.tokens + 5, BRAIN)
    packed = quantize(pack(case.weight.cuda(), "2:4"))
    assert case.bias is not None
    x, bias, out = case.x.cuda(), case.bias.cuda(), case.weight.shape[0]
    y = sparse_mma_linear(x, *to_fragments(packed), bias, out, "none", config, packed.scales)
    assert_close_to_integer_product(y, case, *quantize_rows_slowly(case.x), packed.to("cpu"))
    if config not in (*configs(10 * major + minor, SINGLE.itemsize), *SPLIT_CONFIGS):
        return
    case = random_case("1:2", config.out + 40, config.depth // 2 * (config.stages + 1) + 12, config.tokens + 5, SINGLE)
    assert case.bias is not None
    fragments, metadata = to_fragments(pack(case.weight.cuda(), "1:2"))
    y = sparse_mma_linear(case.x.cuda(), fragments, metadata, case.bias.cuda(), out, "none", config)
    assert_close_to_float64(y, Case(rounded_to_tf32(case.weight), "1:2", rounded_to_tf32(case.x), case.bias))


@pytest.mark.parametrize("config", (CONFIGS[0], CONFIGS[7], SPLIT_CONFIGS[3]), ids=str)
def test_other_elements_sanitized(config: Config) -> None:
    # racecheck takes its time, and the pipeline is that of the 16-bit types
    test_every_gluon_configuration_of_other_elements(config)


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_a_split_product_gives_the_same_bits_every_time(tokens: int) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.sparse_mma import sparse_mma_linear

    case = random_case("2:4", 1024, 4096, tokens, BRAIN)
    assert case.bias is not None
    fragments, metadata = to_fragments(pack(case.weight.cuda(), "2:4"))
    x, bias = case.x.cuda(), case.bias.cuda()
    for config in SPLIT_CONFIGS:
        results = [sparse_mma_linear(x, fragments, metadata, bias, 1024, "silu", config) for _ in range(20)]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", HALF), ("2:4", BRAIN), ("2:4@v4", BRAIN), ("2:4", torch.int8), ("1:2", SINGLE)],
)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (4096, 4096)])
def test_packing_kernels_match_torch(out: int, columns: int, pattern: str, dtype: torch.dtype) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.pack_fragments import pack_dense, pack_fragments

    weight = (random_case(pattern, out, columns, 1, SINGLE).weight * 10).to(dtype)
    packed = pack(weight, pattern)
    twin, nm = to_fragments(packed), row_nm(packed.pattern)
    assert nm is not None
    made = pack_fragments(packed.values.cuda(), packed.metadata.cuda(), nm, columns)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(made, twin, strict=True))
    if nm.mask_rows == 1:
        fragments, metadata, broken = pack_dense(weight.cuda())
        assert torch.equal(fragments.cpu(), twin[0]) and torch.equal(metadata.cpu(), twin[1])
        assert not broken.any()


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", HALF), ("2:4", BRAIN), ("2:4@v4", BRAIN), ("5:16", HALF), ("3:8", SINGLE), ("4:2:8", BRAIN)],
)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (4096, 4096)])
def test_packing_of_planes_matches_torch(out: int, columns: int, pattern: str, dtype: torch.dtype) -> None:
    need(TritonBackend())
    from sparsecomp.kernels.pack_planes import pack_planes, pack_planes_dense, unpack

    weight = random_case(pattern, out, columns, 1, dtype).weight
    packed = pack(weight, pattern)
    twin, nm = TritonBackend().prepare(packed).tensors, row_nm(packed.pattern)
    assert nm is not None
    on_gpu = packed.to("cuda")
    made = pack_planes(on_gpu.values, on_gpu.metadata, nm, columns)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(made, twin, strict=True))
    assert torch.equal(unpack(on_gpu.values, on_gpu.metadata, nm, columns).cpu(), weight)
    if nm.mask_rows == 1:
        planes, positions, broken = pack_planes_dense(weight.cuda(), nm)
        assert torch.equal(planes.cpu(), twin[0]) and torch.equal(positions.cpu(), twin[1])
        assert not broken.any()


def test_packing_sanitized() -> None:
    test_packing_kernels_match_torch(333, 777, "2:4", BRAIN)
    test_packing_of_planes_matches_torch(333, 777, "2:4", BRAIN)


def test_a_layer_moved_to_the_gpu_and_back_keeps_its_weight() -> None:
    need(GluonBackend())
    case = random_case("2:4", 200, 333, 4, BRAIN)
    layer = SparseLinear.from_packed(pack(case.weight, "2:4"), case.bias).cuda()
    assert layer.kernel.tensors[0].is_cuda and torch.equal(layer.weight.cpu(), case.weight)
    assert torch.equal(layer.cpu().weight, case.weight)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_gluon_activations(activation: str) -> None:
    need(GluonBackend())
    from sparsecomp.kernels.sparse_mma import sparse_mma_linear

    case = random_case("2:4", 128, 256, 40, HALF)
    assert case.bias is not None
    fragments, metadata = to_fragments(pack(case.weight.cuda(), "2:4"))
    y = sparse_mma_linear(case.x.cuda(), fragments, metadata, case.bias.cuda(), 128, activation)
    exact = functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    calls = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}
    wanted = functional.gelu(exact, approximate="tanh") if activation == "gelu_tanh" else calls[activation](exact)
    torch.testing.assert_close(y.cpu().double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(("out", "columns"), [(16, 16), (48, 2064), (512, 768)])
@pytest.mark.parametrize("batch", [0, 1, 9, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cusparselt_matches_float64(dtype: torch.dtype, out: int, columns: int, batch: int, with_bias: bool) -> None:
    backend = CusparseltBackend()
    need(backend)
    request = Request(parse("2:4"), (out, columns), dtype, "cuda", batch)
    assert backend.supports(request) is None
    case = random_case("2:4", out, columns, batch, dtype, with_bias, row_gap=2)
    assert_close_to_float64(_run(backend, case), case)
