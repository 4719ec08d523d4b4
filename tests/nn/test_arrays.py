"""Arrays of other libraries in and out: no copies, the same library back, and a sentence for what cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import sparsecomp as sc
from sparsecomp.backends import registry
from sparsecomp.errors import ModelError, PatternError
from sparsecomp.nn import arrays as interchange
from sparsecomp.nn.arrays import as_tensor, like

OUT, IN = 24, 36


def _weight(seed: int = 0) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    mask = generator.random((OUT, IN // 4, 4)).argsort(axis=2) < 2
    return (generator.standard_normal((OUT, IN)) * mask.reshape(OUT, IN)).astype(np.float32)


class OnlyDLPack:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.asked = tensor, 0

    def __dlpack__(self, **options: Any) -> Any:
        self.asked += 1
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_numpy_in_and_numpy_out(batch: tuple[int, ...], activation: str, with_bias: bool) -> None:
    generator = np.random.default_rng(1)
    dense = _weight()
    x = generator.standard_normal((*batch, IN)).astype(np.float32)
    bias = generator.standard_normal(OUT).astype(np.float32) if with_bias else None
    y = sc.linear(x, sc.prepare(dense), bias, activation)
    exact = functional.linear(*(None if each is None else torch.tensor(each).double() for each in (x, dense, bias)))
    if activation == "gelu":
        exact = functional.gelu(exact)
    assert type(y) is np.ndarray and y.dtype == np.float32 and y.shape == (*batch, OUT)
    np.testing.assert_allclose(y, exact.numpy(), rtol=1e-5, atol=1e-5)


def test_strides_and_readonly_memory_are_read_in_place() -> None:
    dense = _weight()
    kernel = sc.prepare(dense)
    wide = np.random.default_rng(2).standard_normal((8, 2 * IN)).astype(np.float32)
    wide.flags.writeable = False
    for x in (wide[:, :IN], wide[::2, IN:], wide[:, ::2], np.broadcast_to(wide[0, :IN], (3, IN))):
        assert as_tensor(x, "x").data_ptr() == x.__array_interface__["data"][0]
        np.testing.assert_allclose(sc.linear(x, kernel), x @ dense.T, rtol=1e-5, atol=1e-5)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    kernel = sc.prepare(_weight())
    apply = interchange.operators.apply

    def watched(kernel: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x)
        seen.append(apply(kernel, x, *rest))
        return seen[-1]

    monkeypatch.setattr(interchange.operators, "apply", watched)
    x = np.ones((4, IN), dtype=np.float32)
    y = sc.linear(x, kernel)
    assert seen[0].data_ptr() == x.__array_interface__["data"][0]
    assert seen[1].data_ptr() == y.__array_interface__["data"][0]


def test_torch_tensors_stay_torch_tensors_with_gradients() -> None:
    dense = torch.tensor(_weight())
    kernel = sc.prepare(dense)
    x, bias = torch.randn(3, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
    y = sc.linear(x, kernel, bias)
    torch.testing.assert_close(y, functional.linear(x, dense, bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, IN))
    torch.testing.assert_close(bias.grad, torch.full((OUT,), 3.0))


def test_libraries_may_be_mixed() -> None:
    dense, x = _weight(), torch.randn(3, IN)
    bias = np.ones(OUT, dtype=np.float32)
    y = sc.linear(x.numpy(), sc.prepare(torch.tensor(dense)), torch.tensor(bias))
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, x.numpy() @ dense.T + 1, rtol=1e-5, atol=1e-5)


def test_a_library_without_a_way_in_gets_a_torch_tensor() -> None:
    dense = _weight()
    x = OnlyDLPack(torch.randn(3, IN))
    y = sc.linear(x, sc.prepare(dense))
    assert type(y) is torch.Tensor and x.asked == 1
    torch.testing.assert_close(y, x.tensor @ torch.tensor(dense).T, rtol=1e-5, atol=1e-5)


def test_the_library_of_an_array_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somearrays")
    module.from_dlpack = lambda tensor: ("its own", tensor)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somearrays", module)
    array = type("Array", (OnlyDLPack,), {"__module__": "somearrays.core"})(torch.randn(2, IN))
    y = torch.randn(2, OUT)
    assert like(y, array) == ("its own", y)
    array = type("Array", (OnlyDLPack,), {"__array_namespace__": lambda self: module})(torch.randn(2, IN))
    assert like(y, array) == ("its own", y)


def test_a_gradient_that_the_array_cannot_carry_is_named() -> None:
    kernel, x = sc.prepare(_weight()), np.ones((2, IN), dtype=np.float32)
    bias = torch.ones(OUT, requires_grad=True)
    with pytest.raises(ModelError, match=r"bias requires a gradient, which a ndarray like x cannot carry; .*detach"):
        sc.linear(x, kernel, bias)
    assert type(sc.linear(x, kernel, bias.detach())) is np.ndarray
    with torch.no_grad():
        assert type(sc.linear(x, kernel, bias)) is np.ndarray
    assert sc.linear(OnlyDLPack(torch.ones(2, IN)), kernel, bias).requires_grad  # y stays a tensor


class Stream:
    """A CUDA stream that notes what is asked of it."""

    def __init__(self, pointer: int, device: Any = None) -> None:
        self.cuda_stream = self.ptr = pointer
        self.device, self.awaited, self.synchronized = device, [], 0

    def wait_stream(self, other: Stream) -> None:
        self.awaited.append(other.cuda_stream)

    def synchronize(self) -> None:
        self.synchronized += 1


class CupyDevice:
    """A GPU of CuPy's, current while it is entered."""

    current = 0

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> None:
        self.before, CupyDevice.current = CupyDevice.current, self.id

    def __exit__(self, *_: object) -> None:
        CupyDevice.current = self.before


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """torch's current stream, number 7; streams of others are of this module's class."""
    stream = Stream(7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    return stream


@pytest.mark.parametrize(("pointers", "taken"), [((11, 22), 22), ((11, 0), "default of 1")])
def test_cupys_stream_is_that_of_the_arrays_gpu(
    pointers: tuple[int, int], taken: object, current: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = ModuleType("cupy")
    cupy.cuda = ModuleType("cupy.cuda")  # type: ignore[attr-defined]
    cupy.cuda.get_current_stream = lambda: Stream(pointers[CupyDevice.current])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream(0, f"default of {device}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    array = type("ndarray", (), {"__module__": "cupy", "device": CupyDevice(1)})()
    chosen: Any = interchange._stream(array)
    assert taken == (chosen.ptr or chosen.device) and CupyDevice.current == 0


@pytest.mark.parametrize(
    ("entry", "awaited"),
    [({}, []), ({"stream": None}, []), ({"stream": 7}, []), ({"stream": 1}, [1]), ({"stream": 99}, [99])],
)
def test_the_stream_an_interface_names_is_awaited(
    entry: dict[str, Any], awaited: list[int], current: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.ones(3, IN)
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: memory)
    interface = {"data": (memory.data_ptr(), False), "version": 3, **entry}
    array = type("Array", (), {"__cuda_array_interface__": interface})()
    assert as_tensor(array, "x") is memory and current.awaited == awaited


def test_the_memory_of_another_gpu_is_not_copied(current: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: torch.ones(3, IN))
    array = type("Array", (), {"__cuda_array_interface__": {"data": (1 << 20, False), "version": 3}})()
    with pytest.raises(ModelError, match=r"x is not in the memory of cpu; .* torch\.cuda\.device"):
        as_tensor(array, "x")


def test_a_weight_is_prepared_on_its_arrays_stream_and_then_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []

    @contextmanager
    def stream(array: Any) -> Iterator[None]:
        noted.append("entered")
        yield
        noted.append("left")

    monkeypatch.setattr(interchange, "_stream", stream)
    prepared = registry.prepared
    monkeypatch.setattr(registry, "prepared", lambda *given: noted.append("prepared") or prepared(*given))
    monkeypatch.setattr(interchange, "_finish", lambda tensor: noted.append("finished"))
    sc.prepare(_weight())
    assert noted == ["entered", "prepared", "finished", "left"]


def test_finishing_waits_for_the_gpu_alone(current: Stream) -> None:
    interchange._finish(torch.ones(1))
    assert current.synchronized == 0
    with FakeTensorMode():
        interchange._finish(torch.ones(1, device="cuda:0"))
    assert current.synchronized == 1


def test_packed_weights_bf16_and_other_patterns() -> None:
    dense = torch.tensor(_weight()).to(torch.bfloat16)
    kernel = sc.prepare(sc.pack(dense, "2:4"))
    x = OnlyDLPack(torch.randn(4, IN).to(torch.bfloat16))
    torch.testing.assert_close(sc.linear(x, kernel), functional.linear(x.tensor, dense), rtol=2e-2, atol=2e-2)
    assert str(sc.prepare(_weight(), "4:8").pattern) == "4:8"
    assert sc.prepare(_weight(), backend="reference").backend == "reference"


class NoGpu:
    """What a CUDA array looks like to a torch that sees no GPU."""

    __cuda_array_interface__ = {"shape": (3, IN), "typestr": "<f4", "data": (1 << 20, False), "version": 3}  # noqa: RUF012


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], "x is a list; allowed are torch tensors and arrays with __dlpack__"),
        (np.ones((2, IN), dtype=np.float32)[::-1], "x runs backwards in memory"),
        (
            np.ones((2, IN), dtype=">f4"),
            "torch cannot read .DLPack only supports native byte order",
        ),
        (np.array(["a"]), "x is a ndarray that torch cannot read"),
        (np.ones((2, IN)), r"x is \(2, 36\) of torch.float64 on cpu; this weight takes \[..., 36\] of torch.float32"),
        (np.ones((2, IN + 1), dtype=np.float32), r"x is \(2, 37\) of torch.float32"),
        (np.ones((), dtype=np.float32), r"x is \(\) of torch.float32"),
    ],
)
def test_what_cannot_be_read_is_named(x: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sc.linear(x, sc.prepare(_weight()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_array_without_a_gpu_is_named() -> None:
    with pytest.raises(ModelError, match=r"x is a NoGpu that torch cannot read .*on a device that torch sees"):
        sc.linear(NoGpu(), sc.prepare(_weight()))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.ones(OUT + 1, dtype=np.float32), r"bias is \(25,\) of torch.float32 on cpu; this weight takes \(24,\)"),
        (np.ones(OUT), r"bias is \(24,\) of torch.float64"),
        ("b", "bias is a str"),
    ],
)
def test_a_wrong_bias_is_named(bias: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sc.linear(np.ones((2, IN), dtype=np.float32), sc.prepare(_weight()), bias)


def test_wrong_weights_are_named() -> None:
    x = np.ones((2, IN), dtype=np.float32)
    with pytest.raises(ModelError, match="linear takes a weight that prepare made, got a ndarray; call prepare first"):
        sc.linear(x, _weight())  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="weight breaks 2:4 in row 0"):
        sc.prepare(np.ones((4, 8), dtype=np.float32))
    with pytest.raises(ModelError, match="weight is a list"):
        sc.prepare([[1.0]])
    with pytest.raises(ModelError, match="is not known; use one of"):
        sc.prepare(_weight(), backend="nothing")
    with pytest.raises(ModelError, match="activation='tanh' is not known"):
        sc.linear(x, sc.prepare(_weight()), activation="tanh")
