"""The machine code of every configuration of the mma.sp kernel, on every supported architecture. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from gluon_simulator import compile_kernel
from triton_compiler import machine_code

from sparsecomp.kernels.sparse_mma import constants
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SHARED_BYTES, Config, candidates, choose_config, configs

HALF, BRAIN = torch.float16, torch.bfloat16
WIDE = [config for config in CONFIGS if config.row_tiles * config.token_tiles == 32]
MATRIX = [
    # SiLU takes the most registers of all epilogues
    *((capability, config, BRAIN, "silu", 8) for capability in (80, 89) for config in CONFIGS),
    *((capability, config, BRAIN, "silu", 8) for capability in (86, 90) for config in WIDE),
    *((80, config, HALF, activation, 1) for config in WIDE for activation in ("none", "gelu")),
    *((80, WIDE[0], BRAIN, activation, 8) for activation in ("relu", "gelu", "gelu_tanh")),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize(("capability", "config", "dtype", "activation", "unit"), MATRIX, ids=str)
def test_machine_code(
    capability: int, config: Config, dtype: torch.dtype, activation: str, unit: int, tmp_path: Path
) -> None:
    compiled = compile_kernel(capability, constants(config, dtype, True, activation, unit), config.warps)
    code = machine_code(compiled, tmp_path)
    # the loop is there once: the tensor core instructions of one step, and no dense ones
    assert code.instructions["HMMA.SP"] == config.row_tiles * config.token_tiles * config.depth // 32
    assert code.instructions["HMMA"] == 0
    assert not code.spills
    assert code.registers * 32 * config.warps <= 65536
    assert code.shared == config.shared_bytes <= SHARED_BYTES[capability]
    # x by ldmatrix, each load four 8x8 matrices: 8 tokens by 32 columns
    assert code.instructions["LDSM"] >= config.token_tiles * config.depth // 32
    # the prologue copies STAGES - 1 steps and the loop one, 16 bytes for each of 128 threads or so at a time
    assert code.instructions["LDGSTS"] == config.shared_bytes // (16 * 32 * config.warps)


def test_wider_warps_would_spill(tmp_path: Path) -> None:
    config = Config(4, 16, 2, 1, 64, 3)
    code = machine_code(compile_kernel(80, constants(config, BRAIN, True, "none", 8), config.warps), tmp_path)
    assert code.spills


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_configurations_fit_the_shared_memory(capability: int) -> None:
    assert configs(capability)
    assert all(config.shared_bytes <= SHARED_BYTES[capability] for config in configs(capability))


def test_the_choice_follows_the_shape() -> None:
    # an A100: wide tiles for a large product, narrow ones for few tokens, and enough blocks for a small layer
    large = choose_config(11008, 8192, 80, 108)
    assert large.out * large.tokens >= 128 * 128
    assert choose_config(4096, 1, 80, 108).tokens == 8
    assert choose_config(4096, 16, 80, 108).tokens <= 16
    small = choose_config(768, 256, 80, 108)
    assert small.out * small.tokens < large.out * large.tokens


@pytest.mark.parametrize("tokens", [1, 16, 300, 8192])
def test_candidates_are_the_best_of_the_model_first(tokens: int) -> None:
    found = candidates(4096, tokens, 89, 128)
    assert len(found) == len(set(found)) == 4
    assert found[0] == choose_config(4096, tokens, 89, 128)
    assert set(found) <= set(configs(89))
