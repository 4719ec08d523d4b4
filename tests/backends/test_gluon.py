"""The gluon adapter without a GPU: layout and reasons, and SparseLinear through it, its kernel executed on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsecomp import SparseLinear
from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.experimental.gluon_numbers import GluonInt8Backend, GluonTf32Backend
from sparsecomp.backends.gpu.gluon import GluonBackend
from sparsecomp.backends.registry import choose, explain
from sparsecomp.errors import BackendError, PatternError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, Numbers

HALF, BRAIN = torch.float16, torch.bfloat16


def _weight(out: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out + columns)
    mask = torch.rand(out, -(-columns // 4), 4, generator=generator).argsort(dim=2) < 2
    return (torch.randn(out, columns, generator=generator) * mask.flatten(1)[:, :columns]).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (100, 250)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_restore_is_the_inverse_of_prepare(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = pack(_weight(*shape, dtype), "2:4")
    kernel = GluonBackend().prepare(packed)
    restored = GluonBackend().restore(kernel)
    assert torch.equal(restored.values, packed.values) and torch.equal(restored.metadata, packed.metadata)
    assert torch.equal(GluonBackend().dense(kernel), packed.unpack())


def test_other_weights_are_refused() -> None:
    with pytest.raises(BackendError, match=r"the gluon backend has no kernel for 1:4; 2:4 only"):
        GluonBackend().prepare(pack(torch.zeros(8, 8, dtype=HALF), "1:4"))


def test_quantised_weights_are_refused() -> None:
    quantized = quantize(pack(_weight(64, 64, HALF), "2:4"))
    with pytest.raises(BackendError, match=r"has no kernel for torch\.int8"):
        GluonBackend().prepare(quantized)


def _request(
    pattern: str = "2:4", dtype: torch.dtype = HALF, device: str = "cuda", numbers: Numbers = FLOAT
) -> Request:
    return Request(parse(pattern), (64, 64), dtype, device, 1, numbers)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("4:8"), "has no kernel for 4:8; 2:4 only"),
        (
            _request(dtype=torch.float32),
            "has no kernel for torch.float32; torch.float16 and torch.bfloat16 only",
        ),
        (_request(numbers=INT8), "has no kernel for torch.int8; torch.float16 and torch.bfloat16 only"),
        (_request(device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_supports_says_why_not(request_: Request, reason: str) -> None:
    assert GluonBackend().supports(request_) == reason


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("2:4", torch.float32), "has no kernel for 2:4 in torch.float32; 1:2 only"),
        (_request("1:2", HALF), "has no kernel for torch.float16; torch.float32 only"),
        (_request("1:2", torch.float32, device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_tf32_says_why_not(request_: Request, reason: str) -> None:
    assert GluonTf32Backend().supports(request_) == reason


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request(), 'has no kernel for torch.float16 weights without row scales; quantise them with quantize="int8"'),
        (_request("4:8", numbers=INT8), "has no kernel for 4:8; 2:4 only"),
        (_request(numbers=INT8, device="cpu"), "runs on cuda, not on cpu"),
    ],
)
def test_int8_says_why_not(request_: Request, reason: str) -> None:
    assert GluonInt8Backend().supports(request_) == reason


def test_int8_weights_without_scales_are_refused() -> None:
    with pytest.raises(BackendError, match=r"the gluon_int8 backend has no kernel for torch\.int8 weights without row"):
        GluonInt8Backend().prepare(pack(torch.zeros(8, 8, dtype=torch.int8), "2:4"))


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (100, 250)])
def test_the_other_backends_restore_exactly(shape: tuple[int, int]) -> None:
    quantized = quantize(pack(_weight(*shape, BRAIN), "2:4"))
    kernel = GluonInt8Backend().prepare(quantized)
    assert kernel.numbers == INT8 and kernel.dtype == BRAIN
    restored = GluonInt8Backend().restore(kernel).validate()
    assert all(torch.equal(restored.parts[name], quantized.parts[name]) for name in quantized.parts)
    assert torch.equal(GluonInt8Backend().dense(kernel), quantized.unpack())
    halves = torch.randn(*shape) * (torch.arange(shape[1]) % 2 == torch.randint(2, (shape[0], 1)))
    single = pack(halves, "1:2")
    kernel = GluonTf32Backend().prepare(single)
    assert kernel.numbers == FLOAT
    restored = GluonTf32Backend().restore(kernel).validate()
    assert torch.equal(restored.values, single.values) and torch.equal(restored.metadata, single.metadata)


@pytest.mark.parametrize(
    ("request_", "name"),
    [(_request("1:2", torch.float32), "gluon_tf32"), (_request(numbers=INT8), "gluon_int8")],
)
def test_what_rounds_more_is_taken_by_name_only(request_: Request, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch)
    from sparsecomp.backends.registry import backends

    assert backends()[name].supports(request_) is None
    reason = dict(explain(request_))[name]
    assert reason is not None and f'taken by name only: backend="{name}"' in reason
    assert choose(request_) != name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_named() -> None:
    reason = GluonBackend().missing()
    assert reason is not None and ("CUDA" in reason or "ROCm" in reason)
    assert dict(explain(_request()))["gluon"] == reason


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_a_gpu_that_is_new_enough_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch)
    assert GluonBackend().supports(_request()) is None


@pytest.mark.slow
def test_the_adapter_does_not_import_triton() -> None:
    code = "import sys, sparsecomp.backends.gpu.gluon as g; g.GluonBackend(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All but the launch is as on a GPU: the layer, its operator, its state; the compiled PTX runs on the CPU."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from sparsecomp.kernels import launching, sparse_mma
    from tests.kernels.gluon_simulator import Simulator

    monkeypatch.setattr(launching, "launch", Simulator().launch)
    monkeypatch.setattr(sparse_mma, "gpu", lambda index: (80, 108))
    monkeypatch.setattr(sparse_mma, "tuned", lambda key, options, run: options[0])
    for backend in (GluonBackend, GluonInt8Backend):
        monkeypatch.setattr(backend, "supports", lambda self, request: None)
    monkeypatch.setattr(GluonBackend, "missing", lambda self: None)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def _linear(dtype: torch.dtype) -> torch.nn.Linear:
    linear = torch.nn.Linear(72, 40, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(_weight(40, 72, dtype))
    return linear


@pytest.mark.usefixtures("simulated")
def test_a_layer_runs_through_it() -> None:
    linear = _linear(HALF)
    layer = SparseLinear.from_linear(linear, backend="gluon")
    assert layer.kernel.backend == "gluon" and torch.equal(layer.weight, linear.weight)
    x = torch.randn(2, 3, 72, dtype=HALF)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 3, 72), rtol=1e-2, atol=1e-2)
    assert layer(x[:0]).shape == (0, 3, 40)
    fused = SparseLinear.from_linear(linear, activation="gelu", backend="gluon")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), torch.nn.functional.gelu(linear(x)), rtol=2e-3, atol=2e-3)
    from sparsecomp.kernels import sparse_mma

    assert set(sparse_mma.ACTIVATIONS) == set(ACTIVATIONS)
    fresh = SparseLinear(72, 40, dtype=HALF, backend="gluon")
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.kernel.tensors, layer.kernel.tensors, strict=True))


@pytest.mark.usefixtures("simulated")
def test_a_layer_of_int8_weights_and_activations() -> None:
    linear = _linear(BRAIN)
    layer = SparseLinear.from_linear(linear, quantized=True, backend="gluon_int8")
    assert layer.quantized and layer.kernel.backend == "gluon_int8" and layer.dtype == BRAIN
    x = torch.randn(2, 3, 72, dtype=BRAIN)
    with torch.no_grad():
        got, exact = layer(x), linear(x)
    assert got.dtype == BRAIN and got.shape == (2, 3, 40)
    # on either side integers are off by half, of 127 that stand for the largest of a token, or of a row of weights
    rows, tokens = linear.weight.float().abs(), x.float().abs()
    allowed = (
        tokens.amax(-1, keepdim=True) * rows.sum(1) / 254 + (tokens.sum(-1, keepdim=True) + 1) * rows.amax(1) / 254
    )
    assert bool(((got.float() - exact.float()).abs() <= 1.1 * allowed + 2.0**-7 * exact.float().abs()).all())
    assert layer(x[:0]).shape == (0, 3, 40)
    fresh = SparseLinear(72, 40, dtype=BRAIN, quantized=True, backend="gluon_int8")
    fresh.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.kernel.tensors, layer.kernel.tensors, strict=True))


@pytest.mark.usefixtures("simulated")
def test_a_layer_of_fp32_in_tf32() -> None:
    linear = torch.nn.Linear(72, 40)
    with torch.no_grad():
        linear.weight.mul_(torch.arange(72) % 2 == 0)
    layer = SparseLinear.from_linear(linear, pattern="1:2", backend="gluon_tf32")
    x = torch.randn(5, 72)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x), rtol=2e-3, atol=2e-3)
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", HALF), ("2:4@v4", BRAIN), ("1:2", torch.float32)])
def test_on_a_gpu_the_layout_is_made_by_a_kernel(
    pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecomp.backends.gpu import gluon

    backend = GluonTf32Backend() if dtype == torch.float32 else GluonBackend()
    weight = _weight(40, 72, dtype)
    if pattern != "2:4":
        weight = weight[:1].expand(40, 72) * (torch.arange(72) % 2 == 0)
    twin = backend.prepare(pack(weight, pattern))
    monkeypatch.setattr(cuda, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gluon, "to_fragments", lambda packed: pytest.fail("the torch packer was called"))
    for kernel in (backend.prepare(pack(weight, pattern)), backend.prepare_dense(weight, parse(pattern))):
        assert (kernel.backend, kernel.pattern, kernel.shape, kernel.dtype) == (
            backend.name,
            parse(pattern),
            (40, 72),
            dtype,
        )
        assert all(torch.equal(one, other) for one, other in zip(kernel.tensors, twin.tensors, strict=True))


@pytest.mark.usefixtures("simulated")
def test_a_dense_weight_that_breaks_the_pattern_is_refused_as_pack_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(cuda, "on_gpu", lambda tensor: True)
    weight = _weight(40, 72, HALF)
    weight[7, 8:11] = 1
    with pytest.raises(PatternError, match=r"row 7, group 2 .*at most 2 allowed"):
        GluonBackend().prepare_dense(weight, parse("2:4"))
    weight[7, 8:12] = torch.tensor([torch.nan, 0, 0, 0])
    with pytest.raises(PatternError, match=r"weight\[7, 8\] is nan"):
        GluonBackend().prepare_dense(weight, parse("2:4"))
    with pytest.raises(BackendError, match=r"has no kernel for torch\.float32; "):
        GluonBackend().prepare_dense(weight.float(), parse("2:4"))


def test_a_dense_weight_on_the_cpu_is_packed_by_torch() -> None:
    weight = _weight(40, 72, HALF)
    for backend, twin in (
        (GluonBackend(), GluonBackend().prepare(pack(weight, "2:4"))),
        (GluonInt8Backend(), GluonInt8Backend().prepare(quantize(pack(weight, "2:4")))),
    ):
        made = backend.prepare_dense(weight, parse("2:4"))
        assert all(torch.equal(one, other) for one, other in zip(made.tensors, twin.tensors, strict=True))
