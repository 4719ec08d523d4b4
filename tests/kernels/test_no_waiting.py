"""What a CUDA graph demands of a call, seen on the CPU: no number comes back to Python, memory is torch's alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.gpu_cases import random_case

pytest.importorskip("triton", reason="triton is not installed")

from sparsecomp.kernels import launching, sparse_mma, sparse_wgmma
from sparsecomp.kernels.sparse_mma_config import CONFIGS, SPLIT_CONFIGS, Config
from sparsecomp.kernels.sparse_wgmma_config import CONFIGS as WGMMA_CONFIGS
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.packing.quantize import quantize
from tests.kernels.gluon_simulator import Simulator

pytestmark = pytest.mark.usefixtures("own_cache")

# these neither read a tensor's numbers into Python nor take memory but from torch's allocator, which graphs know
QUEUED = {"empty", "view", "detach", "clone", "constant_pad_nd", "fill_", "copy_", "slice"}


class Operations(TorchDispatchMode):
    """Notes the name of every torch operation, but not those between ``pause`` and ``resume``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """The operations of calls, those of the simulator left out."""
    operations, simulator = Operations(), Simulator()

    def launch(*arguments: Any) -> None:
        operations.paused = True
        simulator.launch(*arguments)
        operations.paused = False

    monkeypatch.setattr(launching, "launch", launch)
    return operations


@pytest.mark.parametrize("columns", [256, 203], ids=["aligned", "copied"])
@pytest.mark.parametrize("config", [CONFIGS[7], SPLIT_CONFIGS[1]], ids=str)
@pytest.mark.parametrize(
    ("pattern", "dtype", "quantized"),
    [("2:4", torch.bfloat16, False), ("2:4", torch.float16, True), ("1:2", torch.float32, False)],
    ids=["16 bits", "int8", "tf32"],
)
def test_mma_sp(
    pattern: str, dtype: torch.dtype, quantized: bool, config: Config, columns: int, noted: Operations
) -> None:
    case = random_case(pattern, 72, columns, 5, dtype)
    packed = pack(case.weight, pattern)
    packed = quantize(packed) if quantized else packed
    operands = to_fragments(packed)
    with noted:
        sparse_mma.sparse_mma_linear(case.x, *operands, case.bias, 72, "gelu", config, packed.scales)
    assert "empty" in noted.names and noted.names <= QUEUED


@pytest.mark.parametrize("columns", [256, 203], ids=["aligned", "copied"])
def test_wgmma_sp(columns: int, noted: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Tensor] = []
    monkeypatch.setattr(sparse_wgmma, "launch", lambda arguments, *others: launched.append(arguments[2]))
    case = random_case("2:4", 72, columns, 5, torch.bfloat16)
    operands = to_fragments(pack(case.weight, "2:4"))
    with noted:
        sparse_wgmma.sparse_wgmma_linear(case.x, *operands, case.bias, 72, "gelu", WGMMA_CONFIGS[-1])
    assert len(launched) == 1 and "empty" in noted.names and noted.names <= QUEUED


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.nonzero, lambda x: bool(x.any()), lambda x: x.to("meta")])
def test_waiting_is_noticed(wait: Any) -> None:
    x = torch.ones(1)
    with Operations() as noted:
        wait(x)
    assert not noted.names <= QUEUED
