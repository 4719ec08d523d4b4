"""The triton adapter without a GPU: its layout, exactly undone, and its reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse, row_nm
from sparsecomp.patterns.numbers import INT8

PATTERNS = ("1:2", "2:2", "2:4", "1:4", "3:4", "4:8", "5:8", "8:16", "5:16", "16:16", "2:4@v4", "4:8@v3")


def _packed(pattern: str, out: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    nm = row_nm(parse(pattern))
    assert nm is not None
    tiles, groups = -(-out // nm.mask_rows), nm.groups(columns)
    order = torch.rand(tiles, groups, nm.m, generator=torch.Generator().manual_seed(out + columns)).argsort(dim=2)
    mask = (order < nm.n).repeat_interleave(nm.mask_rows, dim=0)[:out].flatten(1)[:, :columns]
    dense = torch.arange(1, out * columns + 1).view(out, columns) % 251 - 125
    return pack((dense * mask).to(dtype), pattern)


@pytest.fixture
def needs_triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (7, 33), (64, 128), (5, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_the_inverse_of_prepare(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = _packed(pattern, *shape, dtype)
    restored = TritonBackend().restore(TritonBackend().prepare(packed))
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert (restored.shape, restored.pattern, restored.dtype) == (packed.shape, packed.pattern, packed.dtype)


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("pattern", ["2:4", "5:16", "2:4@v4"])
def test_int8_weights_keep_their_scales(pattern: str) -> None:
    packed = quantize(_packed(pattern, 7, 33, torch.bfloat16))
    kernel = TritonBackend().prepare(packed)
    assert kernel.numbers == INT8 and kernel.tensors[0].dtype == torch.int8 and kernel.dtype == torch.bfloat16
    restored = TritonBackend().restore(kernel).validate()
    assert all(torch.equal(restored.parts[name], packed.parts[name]) for name in packed.parts)


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "5:16"])
def test_planes_hold_slot_by_slot(pattern: str) -> None:
    packed = _packed(pattern, 6, 100, torch.float32)
    nm = row_nm(packed.pattern)
    assert nm is not None
    values, metadata = TritonBackend().prepare(packed).tensors
    groups = nm.groups(100)
    bits = {4: 2, 8: 4, 16: 4}[nm.m]
    positions = packed.positions()
    for row in range(6):
        for slot in range(nm.n):
            for group in range(groups):
                assert values[row, slot, group] == packed.values[row, group * nm.n + slot]
                byte = int(metadata[row, slot, group * bits // 8])
                assert byte >> (group * bits % 8) & (1 << bits) - 1 == positions[row, group, slot]
    assert values.shape[2] % 8 == 0 and not values[:, :, groups:].any()


@pytest.mark.usefixtures("needs_triton")
def test_the_layout_is_as_small_as_the_canonical_form() -> None:
    packed = _packed("2:4", 128, 256, torch.bfloat16)
    assert TritonBackend().prepare(packed).nbytes == packed.nbytes


@pytest.mark.usefixtures("needs_triton")
def test_prepare_refuses_what_has_no_kernel() -> None:
    with pytest.raises(BackendError, match="no kernel for block"):
        TritonBackend().prepare(pack(torch.zeros(32, 32), "block16x16:0.5"))
    with pytest.raises(BackendError, match=r"no kernel for torch\.int8"):
        TritonBackend().prepare(pack(torch.zeros(8, 8, dtype=torch.int8), "2:4"))


def _request(pattern: str = "2:4", dtype: torch.dtype = torch.float16, device: str = "cuda") -> Request:
    return Request(parse(pattern), (64, 64), dtype, device, 1)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("block16x16:0.5"), "has no kernel for block16x16:0.5; N:M and V:N:M patterns only"),
        (_request("unstructured:0.5"), "has no kernel for unstructured:0.5; N:M and V:N:M patterns only"),
        (
            _request(dtype=torch.int8),
            "has no kernel for torch.int8; torch.float16, torch.bfloat16 and torch.float32 only",
        ),
        (_request(device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert TritonBackend().supports(request_) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    reason = TritonBackend().missing()
    assert reason is not None and ("CUDA" in reason or "ROCm" in reason)
    assert TritonBackend().supports(_request()) == reason


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, tuple[int, int]]) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, {"cuda:0": (7, 5)})
    expected = "GPU cuda:0 has compute capability 7.5; 8.0 (Ampere) or newer is needed"
    assert cuda.missing_cuda() == expected
    assert TritonBackend().missing() == expected


@pytest.mark.usefixtures("needs_triton")
def test_only_the_old_one_of_two_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, {"cuda:0": (7, 5), "cuda:1": (9, 0)})
    assert TritonBackend().missing() is None
    assert TritonBackend().supports(_request(device="cuda:1")) is None
    refused = TritonBackend().supports(_request(device="cuda:0"))
    assert refused is not None and "compute capability 7.5" in refused


@pytest.mark.parametrize(
    ("version", "hip", "available", "reason"),
    [
        (None, "6.4", True, "is built for ROCm"),
        (None, None, False, "is built without CUDA"),
        ("13.0", None, False, "torch sees no CUDA device; check the NVIDIA driver and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_each_way_to_lack_cuda(
    monkeypatch: pytest.MonkeyPatch, version: str | None, hip: str | None, available: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert reason in str(cuda.missing_cuda())


def test_triton_absent_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, {"cuda:0": (8, 9)})
    monkeypatch.setitem(sys.modules, "triton", None)
    absent = TritonBackend().missing()
    assert absent is not None and absent.endswith("install sparsecomp[triton]")
    old = type(sys)("triton")
    old.__version__ = "3.5.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert TritonBackend().missing() == "Triton 3.5.1 is too old; install 3.6 or newer"


@pytest.mark.slow
def test_the_adapter_does_not_import_triton() -> None:
    code = (
        "import sys, sparsecomp.backends.gpu.triton as t; t.TritonBackend().missing; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
