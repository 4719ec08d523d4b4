"""On a GPU: torch's kernel and fp8 against their twins, the choice of a plan, x on another GPU than the weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.backends.gpu.cutlass.e4m3 import CutlassFp8Backend, CutlassFp8TensorBackend
from sparsecomp.backends.gpu.semi_structured import SemiStructuredBackend
from sparsecomp.backends.registry import sparse_backends
from sparsecomp.errors import ModelError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse
from tests.kernels.gpu_cases import assert_close_to_float64, random_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 9, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_semi_structured_matches_float64(dtype: torch.dtype, batch: int, with_bias: bool) -> None:
    backend = SemiStructuredBackend()
    if reason := backend.missing():
        pytest.skip(reason)
    case = random_case("2:4", 96, 192, batch, dtype, with_bias, row_gap=2)
    kernel = backend.prepare(pack(case.weight.cuda(), case.pattern))
    bias = None if case.bias is None else case.bias.cuda()
    assert_close_to_float64(backend.run(kernel, case.x.cuda(), bias), case)


@pytest.mark.parametrize("backend", [CutlassFp8Backend(), CutlassFp8TensorBackend()], ids=lambda each: each.name)
@pytest.mark.parametrize("batch", [0, 1, 17, 300])
def test_fp8_matches_its_twin(backend: CutlassFp8Backend, batch: int) -> None:
    if reason := backend.missing():
        pytest.skip(reason)
    case = random_case("2:4", 333, 777, batch, torch.bfloat16)
    kernel = backend.prepare(pack(case.weight.cuda(), case.pattern))
    assert case.bias is not None
    x, bias = case.x.cuda(), case.bias.cuda()
    twin = backend.run_slowly(kernel, x, bias, "silu")
    torch.testing.assert_close(backend.run_activated(kernel, x, bias, "silu"), twin, rtol=1.6e-2, atol=2e-2)


def test_a_plan_measures_every_backend() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    net = nn.Sequential(nn.Linear(1024, 1024)).to("cuda", torch.bfloat16)
    layer = sc.plan(net, "2:4", batch=(1, 256))["0"]
    names = sparse_backends(Request(parse("2:4"), (1024, 1024), torch.bfloat16, "cuda:0", 1))
    assert {layer.backend, *layer.others} == set(names)


def test_x_on_another_gpu_is_named() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer = sc.SparseLinear(64, 64, device="cuda:0", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"input is on cuda:1 and the layer on cuda:0"):
        layer(torch.randn(2, 64, device="cuda:1", dtype=torch.bfloat16))
