"""Every GPU adapter makes its layout on the device, by kernels where there are some; they are executed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.base import Backend
from sparsecomp.backends.gpu import cuda, cusparselt, gluon, triton
from sparsecomp.backends.gpu.experimental.gluon_wgmma import GluonWgmmaBackend
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import INT8

HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Tensors count as being on a GPU, launches execute the compiled PTX, and torch's packers must not be called."""
    library = pytest.importorskip("triton", reason="triton is not installed")
    from sparsecomp.kernels import launching
    from tests.kernels.gluon_simulator import Simulator

    monkeypatch.setattr(launching, "launch", Simulator().launch)
    monkeypatch.setattr(cuda, "on_gpu", lambda tensor: True)
    for module, name in ((gluon, "to_fragments"), (triton, "_planes")):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("a torch packer was called"))
    with library.knobs.cache.scope():
        library.knobs.cache.dir = str(tmp_path)
        yield


def _weight(pattern: str, dtype: torch.dtype) -> Tensor:
    weight = torch.zeros(6, 80)
    for column in range(0, 80, 16):
        weight[:, column : column + 16 : 8] = torch.randn(6, 2)
        weight[:, column + 1 : column + 16 : 8] = torch.randn(6, 2)
    return weight.to(dtype) if pattern != "1:2" else (weight * (torch.arange(80) % 2 == 0)).to(dtype)


def _prepared_on_cpu(backend: Backend, weight: Tensor, pattern: str) -> tuple[Tensor, ...]:
    return backend.prepare(pack(weight, pattern)).tensors


@pytest.mark.parametrize(
    ("backend", "pattern", "dtype"),
    [
        (TritonBackend(), "2:4", BRAIN),
        (TritonBackend(), "2:4@v3", HALF),
        (TritonBackend(), "5:16", torch.float32),
        (GluonWgmmaBackend(), "2:4", BRAIN),
    ],
)
def test_layouts_are_made_by_kernels(
    backend: Backend, pattern: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    weight = _weight(pattern, dtype)
    twin = _prepared_on_cpu(backend, weight, pattern)
    packed = pack(weight, pattern)
    request.getfixturevalue("simulated")
    for kernel in (backend.prepare(packed), backend.prepare_dense(weight, parse(pattern))):
        assert (kernel.backend, kernel.pattern, kernel.shape, kernel.dtype) == (
            backend.name,
            parse(pattern),
            (6, 80),
            dtype,
        )
        assert all(torch.equal(one, other) for one, other in zip(kernel.tensors, twin, strict=True))


def test_int8_weights_keep_their_scales(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    packed = quantize(pack(_weight("2:4", BRAIN), "2:4"))
    twin = TritonBackend().prepare(packed)
    request.getfixturevalue("simulated")
    made = TritonBackend().prepare(packed)
    assert made.dtype == BRAIN and made.numbers == INT8
    assert all(torch.equal(one, other) for one, other in zip(made.tensors, twin.tensors, strict=True))


@pytest.mark.usefixtures("simulated")
def test_a_dense_weight_that_breaks_the_pattern_is_refused_as_pack_refuses_it() -> None:
    weight = _weight("2:4", HALF)
    weight[5, 8:11] = 1
    with pytest.raises(PatternError, match=r"row 5, group 2 .*at most 2 allowed"):
        TritonBackend().prepare_dense(weight, parse("2:4"))
    with pytest.raises(BackendError, match=r"no kernel for torch\.float64"):
        TritonBackend().prepare_dense(weight.double(), parse("2:4"))
    with pytest.raises(PatternError, match="pack takes a weight of shape"):
        TritonBackend().prepare_dense(weight[0], parse("2:4"))


def test_the_vendor_library_is_given_a_dense_weight_that_a_kernel_unpacked(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    weight = torch.cat([_weight("2:4", HALF)] * 3)[:16]
    packed = pack(weight, "2:4")
    request.getfixturevalue("simulated")
    given: list[Tensor] = []
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: given.append(dense) or dense)
    multiply = lambda compressed, x, bias=None, transpose_result=False: functional.linear(x.t(), compressed)  # noqa: E731
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(type(packed), "unpack", lambda self: pytest.fail("torch unpacked"))
    cusparselt.CusparseltBackend().prepare(packed)
    assert torch.equal(given[0], weight)


@pytest.mark.parametrize("name", [name for name in backends() if name not in ("cpu", "dense", "reference")])
def test_no_layout_leaves_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor would go to the host by one of these; a single number, read to refuse a weight, does not."""
    pytest.importorskip("triton", reason="triton is not installed")
    pattern = {"triton_block": "block16x16:0.5", "triton_vnm": "16:2:8", "gluon_tf32": "1:2"}.get(name, "2:4")
    dtype = torch.float32 if name == "gluon_tf32" else HALF
    weight = torch.zeros(32, 64, dtype=dtype)
    if name not in ("triton_block", "triton_vnm"):
        weight = torch.cat([_weight(pattern, dtype)] * 6)[:32, :64]
    packed = pack(weight, pattern)
    packed = quantize(packed) if name == "gluon_int8" else packed
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    multiply = lambda compressed, x, bias=None, transpose_result=False: functional.linear(x.t(), compressed)  # noqa: E731
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    for method in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(Tensor, method, lambda *arguments, **options: pytest.fail("a tensor went to the host"))
    backends()[name].prepare(packed)
