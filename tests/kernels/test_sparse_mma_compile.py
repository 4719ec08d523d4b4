"""The machine code of every configuration of the mma.sp kernel, on every supported architecture. No GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.kernels.sparse_mma import constants
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SHARED_BYTES, Config, candidates, choose_config, configs
from tests.kernels.gluon_simulator import compile_sparse_mma
from tests.kernels.gpu_cases import with_every_triton
from tests.kernels.triton_compiler import machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CAPABILITIES = (80, 86, 89, 90)
WIDE = [config for config in CONFIGS if config.row_tiles * config.token_tiles == 32]
# Every configuration that may be chosen, with the epilogues that take the most registers. sm_86 and 89 run the same PTX
# as sm_80: of them the configurations with the most registers.
MATRIX = [
    *(
        (capability, config, BRAIN, "silu", 8)
        for capability in CAPABILITIES
        for config in configs(capability)
        if capability in (80, 90) or config in WIDE
    ),
    *((80, config, HALF, activation, 1) for config in WIDE for activation in ("none", "gelu")),
    *((80, WIDE[0], BRAIN, activation, 8) for activation in ("relu", "gelu", "gelu_tanh")),
]


@pytest.mark.parametrize(
    ("capability", "config", "dtype", "activation", "unit"),
    with_every_triton(MATRIX, lambda capability, config, *others: config == WIDE[0]),
    ids=str,
)
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


WIDEST_OF_32_BITS = [config for config in configs(90, 4) if config.row_tiles * config.token_tiles == 16]
# int8 weights with results of 16 and 32 bits, and fp32 as tf32
OTHER_KINDS = [
    *(
        (capability, config, dtype, out, "gelu", 8)
        for capability in CAPABILITIES
        for dtype, out in ((torch.int8, BRAIN), (torch.int8, SINGLE), (SINGLE, SINGLE))
        for config in configs(capability, out.itemsize)
        if capability in (80, 90) or config in (WIDE if out.itemsize == 2 else WIDEST_OF_32_BITS)
    ),
    *((89, config, torch.int8, HALF, "silu", 1) for config in WIDE),
    *((90, config, SINGLE, SINGLE, "gelu_tanh", 1) for config in WIDEST_OF_32_BITS),
]


@pytest.mark.parametrize(
    ("capability", "config", "dtype", "out", "activation", "unit"),
    with_every_triton(OTHER_KINDS, lambda capability, config, *others: config in (WIDE[0], WIDEST_OF_32_BITS[0])),
    ids=str,
)
def test_machine_code_of_other_elements(
    capability: int, config: Config, dtype: torch.dtype, out: torch.dtype, activation: str, unit: int, tmp_path: Path
) -> None:
    variant = constants(config, dtype, True, activation, unit)
    code = machine_code(compile_sparse_mma(capability, variant, config.warps, out), tmp_path)
    opcode = "IMMA.SP" if dtype == torch.int8 else "HMMA.SP"
    assert code.instructions[opcode] == config.row_tiles * config.token_tiles * config.depth // 32
    assert not any(code.instructions[dense] for dense in ("HMMA", "IMMA"))
    assert not code.spills
    assert code.registers * 32 * config.warps <= 65536
    assert code.shared == config.shared_bytes
    assert code.instructions["LDGSTS"] == config.shared_bytes // (16 * 32 * config.warps)


@pytest.mark.parametrize("dtype", [BRAIN, torch.int8, SINGLE], ids=str)
def test_numbers_are_loaded_once_for_all_that_need_them(dtype: torch.dtype) -> None:
    out = BRAIN if dtype == torch.int8 else dtype
    config = configs(80, out.itemsize)[0]
    ptx = compile_sparse_mma(80, constants(config, dtype, True, "none", 8), config.warps, out).asm["ptx"]
    # metadata ahead of the loop and in it, 16 bytes each, and two biases for each row tile
    wanted = 2 + 2 * config.row_tiles
    if dtype == torch.int8:
        # a word serves one slice, so there is one more; and the scales of rows, and of tokens
        wanted += 1 + 2 * config.row_tiles + 2 * config.token_tiles
    assert len(re.findall(r"ld\.global", ptx)) == wanted


@pytest.mark.every_triton
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


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_results_of_32_bits_have_no_wide_tiles(capability: int) -> None:
    # finished beside 128 sums they lack a register or two, on one architecture or another
    assert set(configs(capability, 4)) == set(configs(capability)) - set(WIDE)
    for tokens in (1, 300, 8192):
        assert not set(candidates(4096, tokens, capability, 128, result_bytes=4)) & set(WIDE)
        assert choose_config(4096, tokens, capability, 128, result_bytes=4) not in WIDE


@pytest.mark.parametrize("tokens", [1, 16, 300, 8192])
def test_candidates_are_the_best_of_the_model_first(tokens: int) -> None:
    found = candidates(4096, tokens, 89, 128)
    whole = [config for config in found if config.splits == 1]
    assert len(whole) == len(set(whole)) == 4 and whole == list(found[:4])
    assert found[0] == choose_config(4096, tokens, 89, 128)
    assert set(whole) <= set(configs(89))
