"""The experimental wgmma.sp kernel on a Hopper GPU, its flag being set: what would certify it."""

from __future__ import annotations

import pytest
import torch

from sparsecomp.backends.gpu.experimental.gluon_wgmma import FLAG, GluonWgmmaBackend
from sparsecomp.kernels.sparse_wgmma_config import CONFIGS, WgmmaConfig
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from tests.kernels.gpu_cases import assert_close_to_float64, random_case

pytestmark = pytest.mark.gpu

HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLAG, GluonWgmmaBackend.name)
    reason = GluonWgmmaBackend().missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_wgmma_configuration_sanitized(config: WgmmaConfig, dtype: torch.dtype) -> None:
    from sparsecomp.kernels.sparse_wgmma import sparse_wgmma_linear

    columns = 128 * (config.stages + 1) + 24
    case = random_case("2:4", 64 * config.groups + 40, columns, config.tokens + 5, dtype)
    assert case.bias is not None
    fragments, metadata = to_fragments(pack(case.weight.cuda(), "2:4"))
    y = sparse_wgmma_linear(case.x.cuda(), fragments, metadata, case.bias.cuda(), case.weight.shape[0], "none", config)
    assert_close_to_float64(y, case)


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (333, 777), (512, 1024), (4096, 4096)])
@pytest.mark.parametrize("batch", [0, 1, 129])
def test_wgmma_matches_float64(out: int, columns: int, batch: int) -> None:
    case = random_case("2:4", out, columns, batch, HALF)
    kernel = GluonWgmmaBackend().prepare(pack(case.weight.cuda(), "2:4"))
    assert case.bias is not None
    assert_close_to_float64(GluonWgmmaBackend().run(kernel, case.x.cuda(), case.bias.cuda()), case)
