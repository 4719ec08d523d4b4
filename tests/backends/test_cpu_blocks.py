"""Block-sparse weights on the cpu backend: layouts of the canonical size, products against float64, clear refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.activations import ACTIVATIONS, activate
from sparsecomp.backends.registry import backends
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.nn import SparseLinear
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import Block, parse
from sparsecomp.patterns.numbers import INT8
from sparsecomp.planning.measure import random_weight

CPU = backends()["cpu"]
pytestmark = pytest.mark.skipif(CPU.missing() is not None, reason=str(CPU.missing()))
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIDES = [(16, 16), (32, 32), (4, 4), (16, 1), (64, 64), (8, 8), (1, 16), (2, 8), (8, 2), (10, 10), (24, 5)]


def packed_blocks(rows: int, cols: int, keep: float, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    return random_weight(Block(rows, cols, keep), shape, dtype, seed=rows + cols)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sides=st.sampled_from(SIDES),
    keep=st.floats(0.01, 1.0),
    out=st.integers(1, 140),
    columns=st.integers(1, 200),
    batch=st.integers(0, 60),
    dtype=st.sampled_from(list(EPSILON)),
    has_bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_products(
    sides: tuple[int, int],
    keep: float,
    out: int,
    columns: int,
    batch: int,
    dtype: torch.dtype,
    has_bias: bool,
    activation: str,
) -> None:
    packed = packed_blocks(*sides, keep, (out, columns), dtype)
    kernel = CPU.prepare(packed)
    back = CPU.restore(kernel)
    assert back.values.equal(packed.values) and back.metadata.equal(packed.metadata)
    weight = packed.unpack()
    assert CPU.dense(kernel).equal(weight)
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype) if has_bias else None
    y = CPU.run_activated(kernel, x, bias, activation).double()
    want, scale = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    want = activate(want, activation)
    bound = 1.13 * scale * (2.0**-24 * (4 + columns**0.5)) + want.abs() * (EPSILON[dtype] * 1.01 + 2.0**-20) + 1e-7
    # 1.13: the steepest slope of an activation
    assert bool(((y - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", SIDES[:9], ids=str)
def test_a_layout_is_hardly_larger_than_the_canonical_form(sides: tuple[int, int], dtype: torch.dtype) -> None:
    packed = packed_blocks(*sides, 0.25, (512, 768), dtype)
    assert CPU.prepare(packed).nbytes <= 1.03 * packed.nbytes


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_a_layer_is_saved_loaded_copied_and_converted(keep: float) -> None:
    layer = SparseLinear.from_packed(packed_blocks(16, 16, keep, (96, 80), torch.float32), torch.randn(96))
    assert layer.kernel.backend == "cpu"
    x = torch.randn(5, 80)
    want = layer(x)
    loaded = SparseLinear(80, 96, layer.pattern)  # keeps no block until it is loaded
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want) and other.kernel.nbytes == layer.kernel.nbytes
    halved = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(halved.packed().unpack(), layer.packed().unpack().to(torch.bfloat16))


@pytest.mark.parametrize("pattern", ["block3x3:0.5", "block4x1:0.5", "block2x2:0.25"])
def test_blocks_that_leave_vectors_empty_are_refused_and_run_dense(pattern: str) -> None:
    reason = CPU.supports(Request(parse(pattern), (32, 32), torch.float32, "cpu", 1))
    assert reason is not None and "fills less than two thirds" in reason and "4x4" in reason
    layer = SparseLinear(32, 32, pattern)
    assert layer.kernel.backend == "dense" and reason in str(layer.explain())


def test_int8_blocks_are_refused() -> None:
    reason = CPU.supports(Request(parse("block16x16:0.5"), (32, 32), torch.float32, "cpu", 1, numbers=INT8))
    assert reason is not None and "int8 blocks" in reason and "N:M" in reason


def test_absurd_blocks_are_refused() -> None:
    reason = CPU.supports(Request(Block(2**40, 4, 0.5), (32, 32), torch.float32, "cpu", 1))
    assert reason is not None and "sides of a block are below" in reason


def test_a_layout_of_another_size_is_refused() -> None:
    kernel = CPU.prepare(packed_blocks(4, 4, 0.5, (16, 24), torch.float32))
    values, metadata = kernel.tensors
    for tensors in ((values[:-4], metadata), (values, metadata[:-1]), (values.repeat(9), metadata)):
        with pytest.raises(BackendError, match="layout of shape"):
            CPU.adopt(tensors, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)
    metadata[0] = 1  # blocks before the first block row
    with pytest.raises(RuntimeError, match="bitmap names as many as are kept"):
        CPU.run(kernel, torch.randn(2, 24), None)
