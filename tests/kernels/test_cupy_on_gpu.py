"""CuPy arrays in and out of the functional API on a GPU: the same memory and CuPy's own stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sparsecomp as sc
from sparsecomp.nn.arrays import as_tensor
from tests.kernels.gpu_cases import random_weight

pytestmark = pytest.mark.gpu

OUT, IN = 256, 512


@pytest.fixture
def cupy() -> Any:
    module = pytest.importorskip("cupy", reason="cupy is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return module


def _close(y: Any, x: Any, dense: np.ndarray[Any, Any], cupy: Any) -> None:
    exact = cupy.asnumpy(x).astype(np.float64) @ dense.astype(np.float64).T
    np.testing.assert_allclose(cupy.asnumpy(y).astype(np.float64), exact, rtol=4e-3, atol=4e-2)


@pytest.mark.parametrize("batch", [(0,), (1,), (33,), (2, 5)])
def test_cupy_in_and_cupy_out(cupy: Any, batch: tuple[int, ...]) -> None:
    dense = random_weight("2:4", OUT, IN, torch.float16, seed=1).numpy()
    kernel = sc.prepare(cupy.asarray(dense))
    assert kernel.tensors[0].is_cuda
    x = cupy.random.standard_normal((*batch, IN)).astype(cupy.float16)
    assert as_tensor(x, "x").data_ptr() == x.data.ptr or x.size == 0
    y = sc.linear(x, kernel, cupy.zeros(OUT, dtype=cupy.float16))
    assert isinstance(y, cupy.ndarray) and y.shape == (*batch, OUT)
    _close(y, x, dense, cupy)


def test_work_is_queued_on_cupys_stream(cupy: Any) -> None:
    dense = random_weight("2:4", OUT, IN, torch.float16, seed=2).numpy()
    weight = cupy.asarray(dense)
    filled = cupy.random.standard_normal((64, IN)).astype(cupy.float16)
    large = cupy.ones((4096, 4096), dtype=cupy.float32)
    cupy.cuda.Stream.null.synchronize()  # another stream reads these; what prepare makes must need no waiting
    kernel = sc.prepare(weight)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(4):
            large = large @ large * 1e-4  # keeps the stream busy while x is still empty
        x = cupy.zeros((64, IN), dtype=cupy.float16)
        x += filled
        y = sc.linear(x, kernel)
        doubled = y + y
    stream.synchronize()
    _close(doubled / 2, filled, dense, cupy)
    assert torch.cuda.current_stream().cuda_stream != stream.ptr, "torch's stream is its own again"


def test_a_weight_prepared_on_one_stream_is_used_on_another(cupy: Any) -> None:
    dense = random_weight("2:4", OUT, IN, torch.float16, seed=5).numpy()
    x = cupy.random.standard_normal((64, IN)).astype(cupy.float16)
    large = cupy.ones((4096, 4096), dtype=cupy.float32)
    cupy.cuda.Stream.null.synchronize()  # x and large are made on the default stream
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        for _ in range(4):
            large = large @ large * 1e-4  # the weight arrives late
        kernel = sc.prepare(cupy.asarray(dense))
    with second:
        y = sc.linear(x, kernel)
    second.synchronize()
    _close(y, x, dense, cupy)


def test_the_stream_that_an_interface_names_is_awaited(cupy: Any) -> None:
    dense = random_weight("2:4", OUT, IN, torch.float16, seed=6).numpy()
    kernel = sc.prepare(cupy.asarray(dense))
    filled = cupy.random.standard_normal((64, IN)).astype(cupy.float16)
    large = cupy.ones((4096, 4096), dtype=cupy.float32)
    cupy.cuda.Stream.null.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(4):
            large = large @ large * 1e-4
        x = cupy.zeros((64, IN), dtype=cupy.float16)
        x += filled
    interface = {**x.__cuda_array_interface__, "version": 3, "stream": stream.ptr}
    y = sc.linear(type("Late", (), {"__cuda_array_interface__": interface})(), kernel)
    _close(cupy.from_dlpack(y), filled, dense, cupy)


def test_arrays_that_speak_the_cuda_array_interface_alone(cupy: Any) -> None:
    class OnlyInterface:
        def __init__(self, array: Any) -> None:
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    dense = random_weight("2:4", OUT, IN, torch.float16, seed=3).numpy()
    x = cupy.random.standard_normal((3, IN)).astype(cupy.float16)
    assert as_tensor(OnlyInterface(x), "x").data_ptr() == x.data.ptr
    y = sc.linear(OnlyInterface(x), sc.prepare(cupy.asarray(dense)))
    assert isinstance(y, torch.Tensor)
    _close(cupy.from_dlpack(y), x, dense, cupy)


def test_another_device_is_named(cupy: Any) -> None:
    kernel = sc.prepare(random_weight("2:4", OUT, IN, torch.float16, seed=4).numpy())
    with pytest.raises(sc.errors.ModelError, match=r"on cuda:0; this weight takes .* on cpu"):
        sc.linear(cupy.zeros((2, IN), dtype=cupy.float16), kernel)
