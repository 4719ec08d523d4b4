"""The V:N:M GPU adapter without a GPU: its layout, exactly undone, its reasons, and its place before triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsecomp.backends.gpu import cuda, triton, triton_vnm
from sparsecomp.backends.gpu.triton_vnm import TritonVnmBackend
from sparsecomp.backends.registry import backends, choose
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.methods.weight import prune_weight
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, Numbers


def _packed(pattern: str, out: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    dense = torch.randn(out, columns, generator=torch.Generator().manual_seed(out + columns))
    return pack(prune_weight(dense, pattern, method="magnitude").weight.to(dtype), pattern)


def _request(
    pattern: str, dtype: torch.dtype = torch.float16, device: str = "cuda", numbers: Numbers = FLOAT
) -> Request:
    return Request(parse(pattern), (128, 128), dtype, device, 1, numbers)


@pytest.fixture
def needs_triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("pattern", ["16:2:8", "48:2:16", "64:2:8", "128:2:16"])
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (150, 75)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_restore_is_the_inverse_of_prepare(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = _packed(pattern, *shape, dtype)
    kernel = TritonVnmBackend().prepare(packed)
    assert kernel.numbers == FLOAT
    restored = TritonVnmBackend().restore(kernel).validate()
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert torch.equal(TritonVnmBackend().dense(kernel), packed.unpack())


@pytest.mark.usefixtures("needs_triton")
def test_the_layout_is_no_larger_than_the_canonical_form() -> None:
    # 2 bits in place of 3 for each position; half a byte for each group and row of the tile
    packed = _packed("64:2:8", 128, 256, torch.bfloat16)
    assert TritonVnmBackend().prepare(packed).nbytes <= packed.nbytes


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("2:4"), "has no kernel for 2:4; V:N:M patterns only"),
        (_request("8:2:16"), "has no kernel for 8:2:16; V must be a multiple of 16, such as 64"),
        (
            _request("64:2:8", torch.float32),
            "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only",
        ),
        (
            _request("64:2:8", numbers=INT8),
            "has no kernel for torch.int8; torch.float16 and torch.bfloat16 only",
        ),
        (_request("64:2:8", device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert TritonVnmBackend().supports(request_) == reason


def test_prepare_refuses_what_has_no_kernel() -> None:
    with pytest.raises(BackendError, match="the triton_vnm backend has no kernel for 2:4"):
        TritonVnmBackend().prepare(pack(torch.zeros(32, 32), "2:4"))


@pytest.mark.usefixtures("needs_triton")
def test_only_what_it_takes_is_taken_from_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton, triton_vnm):
        monkeypatch.setattr(module, "missing_cuda", lambda: None)
        monkeypatch.setattr(module, "too_old", lambda device: None)
    monkeypatch.setattr(cuda, "missing_cuda", lambda: "no GPU for the others")
    for pattern, dtype, numbers, name in (
        ("64:2:8", torch.bfloat16, FLOAT, "triton_vnm"),
        ("64:2:8", torch.float32, FLOAT, "triton"),
        ("64:2:8", torch.bfloat16, INT8, "triton"),
        ("8:2:8", torch.bfloat16, FLOAT, "triton"),
        ("2:4", torch.bfloat16, FLOAT, "triton"),
    ):
        assert choose(_request(pattern, dtype, numbers=numbers)) == name
    assert backends()["triton_vnm"].fuses_activations


@pytest.mark.slow
def test_the_adapter_does_not_import_triton() -> None:
    code = (
        "import sys, sparsecomp.backends.gpu.triton_vnm as t; t.TritonVnmBackend(); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
