"""The machine code of every configuration of the mma.sp kernel, on every supported architecture. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gluon_simulator import compile_sparse_mma
from triton_compiler import machine_code

from sparsecomp.kernels.sparse_mma import constants
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SHARED_BYTES, Config, candidates, choose_config, configs

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN = torch.float16, torch.bfloat16
WIDE = [config for config in CONFIGS if config.row_tiles * config.token_tiles == 32]
MATRIX = [
    # SiLU takes the most registers of all epilogues
    *((capability, config, BRAIN, "silu", 8) for capability in (80, 89) for config in CONFIGS),
    *((capability, config, BRAIN, "silu", 8) for capability in (86, 90) for config in WIDE),
    *((80, config, HALF, activation, 1) for config in WIDE for activation in ("none", "gelu")),
    *((80, WIDE[0], BRAIN, activation, 8) for activation in ("relu", "gelu", "gelu_tanh")),
]


@pytest.mark.parametrize(("capability", "config", "dtype", "activation", "unit"), MATRIX, ids=str)
def test_machine_code(
    capability: int, config: Config, dtype: torch.dtype, activation: str, unit: int, tmp_path: Path
) -> None:
    variant = constants(config, dtype, True, activation, unit)
    compiled = compile_sparse_mma(capability, variant, config.warps, dtype)
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


# int8 weights with every dtype of x and y, and fp32 as tf32
OTHER_KINDS = [
    *((80, config, torch.int8, out, "gelu", 8) for config in CONFIGS for out in (BRAIN, torch.float32)),
    *((80, config, torch.float32, torch.float32, "gelu", 8) for config in CONFIGS),
    *((89, config, torch.int8, out, "silu", 8) for config in WIDE for out in (HALF, torch.float32)),
    *((90, config, torch.float32, torch.float32, "gelu_tanh", 1) for config in WIDE),
]


@pytest.mark.parametrize(("capability", "config", "dtype", "out", "activation", "unit"), OTHER_KINDS, ids=str)
def test_machine_code_of_other_elements(
    capability: int, config: Config, dtype: torch.dtype, out: torch.dtype, activation: str, unit: int, tmp_path: Path
) -> None:
    variant = constants(config, dtype, True, activation, unit)
    code = machine_code(compile_sparse_mma(capability, variant, config.warps, out), tmp_path)
    opcode = "IMMA.SP" if dtype == torch.int8 else "HMMA.SP"
    assert code.instructions[opcode] == config.row_tiles * config.token_tiles * config.depth // 32
    assert not any(code.instructions[dense] for dense in ("HMMA", "IMMA"))
    # the epilogue of the widest tiles lacks up to ten registers where it scales or stores fp32, the loop none
    assert not code.spills_among(opcode)
    assert code.stack <= (40 if config in WIDE else 0)
    assert code.registers * 32 * config.warps <= 65536
    assert code.shared == config.shared_bytes
    assert code.instructions["LDGSTS"] == config.shared_bytes // (16 * 32 * config.warps)


def test_wider_warps_would_spill(tmp_path: Path) -> None:
    config = Config(4, 16, 2, 1, 64, 3)
    code = machine_code(compile_sparse_mma(80, constants(config, BRAIN, True, "none", 8), config.warps), tmp_path)
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
    whole = [config for config in found if config.splits == 1]
    assert len(whole) == len(set(whole)) == 4 and whole == list(found[:4])
    assert found[0] == choose_config(4096, tokens, 89, 128)
    assert set(whole) <= set(configs(89))
