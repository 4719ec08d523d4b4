"""The wgmma.sp kernel: machine code for sm_90a, and the PTX of every configuration executed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from sparsecomp.activations import activate
from sparsecomp.backends.gpu.experimental import gluon_wgmma
from sparsecomp.backends.gpu.experimental.gluon_wgmma import FLAG, GluonWgmmaBackend
from sparsecomp.errors import BackendError
from sparsecomp.kernels import sparse_wgmma
from sparsecomp.kernels.sparse_mma import ACTIVATIONS
from sparsecomp.kernels.sparse_wgmma import constants
from sparsecomp.kernels.sparse_wgmma_config import CONFIGS, DEPTH, WgmmaConfig
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.patterns import parse
from tests.kernels import ptxsim
from tests.kernels.gluon_simulator import run
from tests.kernels.gpu_cases import UNIT_ROUNDOFF, Case, assert_close_to_float64, random_case
from tests.kernels.triton_compiler import machine_code

pytestmark = pytest.mark.usefixtures("own_cache")

HALF, BRAIN = torch.float16, torch.bfloat16
SHARED_BYTES = 232448


def compiled(given: dict[str, Any], warps: int) -> Any:
    pointer = "*bf16" if given["BF16"] else "*fp16"
    types = {"fragments": "*i32", "metadata": "*i32", "x": pointer, "bias": pointer, "y": pointer}
    names = sparse_wgmma.sparse_wgmma_kernel.arg_names
    signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name != "bias"}
    source = GluonASTSource(sparse_wgmma.sparse_wgmma_kernel, signature, given, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[str], str]]:
    """Runs launches on the CPU; what is put in the list changes the PTX first."""
    changes: list[Callable[[str], str]] = []

    def launch(arguments: tuple[Any, ...], given: dict[str, Any], blocks: int, warps: int) -> None:
        kernel = compiled(given, warps)
        ptx = kernel.asm["ptx"]
        for change in changes:
            assert change(ptx) != ptx
            ptx = change(ptx)
        report = run(ptx, arguments, blocks, warps, kernel.metadata.shared)
        assert report.races == ()

    monkeypatch.setattr(sparse_wgmma, "launch", launch)
    return changes


def product(case: Case, config: WgmmaConfig, activation: str = "none") -> torch.Tensor:
    fragments, metadata = to_fragments(pack(case.weight, "2:4"))
    out = case.weight.shape[0]
    return sparse_wgmma.sparse_wgmma_linear(case.x, fragments, metadata, case.bias, out, activation, config)


@pytest.mark.parametrize(("activation", "unit"), [("gelu", 8), ("silu", 1)])
@pytest.mark.parametrize("dtype", [HALF, pytest.param(BRAIN, marks=pytest.mark.every_triton)], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_machine_code(config: WgmmaConfig, dtype: torch.dtype, activation: str, unit: int, tmp_path: Path) -> None:
    code = machine_code(compiled(constants(config, dtype, True, activation, unit), config.warps), tmp_path)
    assert code.instructions["HGMMA.SP"] == DEPTH // 32
    assert code.instructions["HGMMA"] == code.instructions["HMMA"] == code.instructions["HMMA.SP"] == 0
    assert not code.spills and code.registers * 32 * config.warps <= 65536
    assert code.shared == config.shared_bytes <= SHARED_BYTES, "the descriptors take x to begin at 0"


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_configuration(simulated: list[Any], config: WgmmaConfig, dtype: torch.dtype, with_bias: bool) -> None:
    # two ragged blocks each way, more steps than stages, a last step of half its columns
    shape = 64 * config.groups + 40, 128 * (config.stages + 1) + 24
    case = random_case("2:4", *shape, config.tokens + 5, dtype, with_bias, row_gap=8)
    used = (case.weight != 0).view(-1, 4)
    assert len(torch.unique(used[used.sum(1) == 2], dim=0)) == 6
    assert_close_to_float64(product(case, config), case)


@pytest.mark.parametrize(("out", "columns"), [(1, 1), (16, 64), (65, 130), (333, 777)])
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.every_triton
def test_any_shape(simulated: list[Any], out: int, columns: int, tokens: int) -> None:
    case = random_case("2:4", out, columns, tokens, HALF, row_gap=3)
    assert_close_to_float64(product(case, CONFIGS[-1]), case)


# two warpgroups and one, the widest tile among them
@pytest.mark.parametrize("config", CONFIGS[1:3], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_fused(simulated: list[Any], activation: str, dtype: torch.dtype, config: WgmmaConfig) -> None:
    case = random_case("2:4", 72, 64, 24, dtype)
    # one weight a row: the product is exact, so that only the activation is judged
    weight = torch.zeros(72, 64, dtype=dtype)
    weight[:, 5] = torch.linspace(-14, 14, 72).to(dtype)
    got = product(replace(case, weight=weight, bias=torch.zeros(72, dtype=dtype)), config, activation).double()
    exact = activate(case.x.double()[:, 5:6] @ weight.double()[:, 5:6].T, activation)
    allowed = UNIT_ROUNDOFF[dtype] * exact.abs() + 2e-6 + 1e-6 * exact.abs()
    assert bool(((got - exact).abs() <= allowed).all())


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.every_triton
def test_the_bias_is_added_before_the_activation(simulated: list[Any], activation: str) -> None:
    case = replace(random_case("2:4", 72, 64, 24, HALF), x=torch.zeros(24, 64, dtype=HALF))
    assert case.bias is not None
    wanted = activate(case.bias.double(), activation).expand(24, 72)
    torch.testing.assert_close(product(case, CONFIGS[-1], activation).double(), wanted, rtol=2.0**-10, atol=3e-6)


FAULTS = {
    "the other selector": lambda ptx: ptx.replace(", 0, %a1, 1, 1, 0;", ", 1, %a1, 1, 1, 0;"),
    "other rows of x": lambda ptx: ptx.replace("0x4000004000010000", "0x4000008000010000"),
    "the next columns": lambda ptx: ptx.replace("add.s64 %x1, %x1, 4;", "add.s64 %x1, %x1, 2;"),
    "no sums": lambda ptx: ptx.replace("setp.ne.b32 %a1, 1, 0;", "setp.ne.b32 %a1, 0, 0;"),
    "no barriers": lambda ptx: ptx.replace("bar.sync", "// bar.sync"),
    "too weak a wait": lambda ptx: ptx.replace("cp.async.wait_group", "cp.async.wait_group 9; //"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(simulated: list[Any], fault: str) -> None:
    simulated.append(FAULTS[fault])
    case = random_case("2:4", 128, 1024, 40, HALF)
    with pytest.raises((AssertionError, ptxsim.SimulationError)):
        assert_close_to_float64(product(case, CONFIGS[-1]), case)


@pytest.mark.every_triton
def test_metadata_out_of_order_is_noticed(simulated: list[Any]) -> None:
    case = random_case("2:4", 64, 128, 8, HALF)
    fragments, metadata = to_fragments(pack(case.weight, "2:4"))
    with pytest.raises(ptxsim.SimulationError, match="metadata does not ascend"):
        sparse_wgmma.sparse_wgmma_linear(case.x, fragments, ~metadata, case.bias, 64, "none", CONFIGS[-1])


def _request(pattern: str = "2:4", dtype: torch.dtype = HALF, device: str = "cuda") -> Request:
    return Request(parse(pattern), (64, 64), dtype, device, 1)


def test_the_backend_is_off_without_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GluonWgmmaBackend()
    monkeypatch.delenv(FLAG, raising=False)
    assert backend.supports(_request()) == (
        "is an experiment that no GPU has certified; set SPARSECOMP_EXPERIMENTAL=gluon_wgmma to try it"
    )
    assert str(backend.supports(_request("4:8"))).startswith("has no kernel for 4:8")
    assert backend.supports(_request(dtype=torch.float32)) == (
        "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only"
    )
    assert backend.supports(_request(device="cpu")) == "runs on cuda, not on cpu"
    monkeypatch.setenv(FLAG, "something,gluon_wgmma")
    for name in ("missing_cuda", "missing_hopper", "missing_gluon"):
        monkeypatch.setattr(gluon_wgmma, name, lambda: None)
    monkeypatch.setattr(gluon_wgmma, "other_gpu", lambda device: "is another GPU")
    assert backend.missing() is None and backend.supports(_request()) == "is another GPU"
    monkeypatch.setattr(gluon_wgmma, "missing_hopper", lambda: "no Hopper")
    assert backend.missing() == "no Hopper"


def test_the_backend_packs_runs_and_gives_back(simulated: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_wgmma, "tuned", lambda key, options, run: options[-1])
    case = random_case("2:4", 72, 130, 5, BRAIN)
    packed, backend = pack(case.weight, "2:4"), GluonWgmmaBackend()
    kernel = backend.prepare(packed)
    restored = backend.restore(kernel)
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert_close_to_float64(backend.run(kernel, case.x, case.bias), case)
    assert backend.fuses_activations
    y = backend.run_activated(kernel, case.x, case.bias, "relu")
    assert torch.equal(y, torch.relu(backend.run(kernel, case.x, case.bias)))
    with pytest.raises(BackendError, match=r"the gluon_wgmma backend has no kernel for torch\.float32"):
        backend.prepare(pack(torch.zeros(4, 8), "2:4"))
