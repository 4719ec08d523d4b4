"""SparseLinear saved, copied, converted and moved: always exact, and untouched by what cannot be."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.backends.base import Kernel
from sparsecomp.errors import ModelError
from sparsecomp.methods.weight import prune_weight
from sparsecomp.nn import SparseLinear
from sparsecomp.nn.eager.calls import EagerProduct, eager_product
from sparsecomp.packing.format import pack
from sparsecomp.patterns import parse
from tests.sparse_layers import PATTERNS, TOLERANCE, assert_right, expected, make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_state_dict_is_canonical_and_exact(pattern: str, dtype: torch.dtype) -> None:
    weight = prune_weight(torch.randn(17, 43), pattern).weight.to(dtype)
    packed = pack(weight, pattern)
    layer = SparseLinear.from_packed(packed, torch.randn(17))
    state = layer.state_dict()
    assert sorted(state) == ["bias", "metadata", "values"]
    assert torch.equal(state["values"], packed.values) and torch.equal(state["metadata"], packed.metadata)
    fresh = SparseLinear(43, 17, pattern, dtype=dtype)
    assert not fresh.packed().unpack().any()
    fresh.load_state_dict(state)
    x = torch.randn(4, 43).to(dtype)
    with torch.no_grad():
        assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.packed().unpack(), weight)


def test_weight_is_held_once() -> None:
    layer = make(64, 64, bias=False)
    held = sum(tensor.nbytes for tensor in layer.buffers()) + sum(p.nbytes for p in layer.parameters())
    assert held == layer.kernel.nbytes
    assert held <= 1.03 * layer.packed().nbytes


def _copy_by_torch(layer: SparseLinear) -> SparseLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: SparseLinear = torch.load(buffer, weights_only=False)
    return loaded


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": _copy_by_torch,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "4:2:8", "block4x4:0.5"])
def test_copies_are_exact_and_independent(how: str, pattern: str) -> None:
    layer = make(pattern=pattern, dtype=torch.bfloat16).eval()
    layer.dense_above = 100
    twin = COPIES[how](layer)
    assert not twin.training and twin.dense_above == 100 and twin.pattern == parse(pattern)
    assert torch.equal(twin.packed().values, layer.packed().values)
    assert torch.equal(twin.packed().metadata, layer.packed().metadata)
    if how != "copy":
        assert twin.kernel.tensors[0].data_ptr() != layer.kernel.tensors[0].data_ptr()
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(twin(x), layer(x))
    layer.load_state_dict(make(pattern=pattern, dtype=torch.bfloat16).state_dict())
    assert not torch.equal(twin.packed().values, layer.packed().values)


def test_copies_keep_a_pinned_backend_and_hooks() -> None:
    layer = make(backend="reference")
    layer.register_forward_hook(_double)
    twin = copy.deepcopy(layer)
    assert twin.kernel.backend == "reference"
    x = torch.randn(2, 40)
    torch.testing.assert_close(twin(x).double(), 2 * expected(layer, x), rtol=0, atol=1e-5)


def _double(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return 2 * y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "block4x4:0.5"])
def test_to_dtype_rounds_once(dtype: torch.dtype, pattern: str) -> None:
    layer = make(pattern=pattern)
    layer.dense_above = 5
    weight = layer.packed().unpack()
    model = nn.Sequential(layer).to(dtype)
    assert model[0] is layer and layer.dtype == dtype and layer.bias is not None and layer.bias.dtype == dtype
    assert torch.equal(layer.packed().unpack(), weight.to(dtype))
    assert layer.dense_above is None  # it was measured for another dtype
    assert_right(layer, torch.randn(3, 40).to(dtype))
    model.float()
    assert torch.equal(layer.packed().unpack(), weight.to(dtype).float())
    assert_right(layer, torch.randn(3, 40))


def test_conversions_that_cannot_be_leave_the_layer_untouched() -> None:
    layer = make()
    weight = layer.packed().unpack()
    with pytest.raises(ModelError, match=r"float8.*to_linear"):
        layer.to(torch.float8_e5m2)
    big = SparseLinear.from_packed(pack(torch.tensor([[1e30, 0, 0, 1.0]]), "2:4"))
    with pytest.raises(ModelError, match="overflow"):
        big.half()
    assert big.dtype == torch.float32 and big.packed().unpack()[0, 0] == 1e30
    assert layer.bias is not None and layer.bias.dtype == torch.float32 and torch.equal(layer.packed().unpack(), weight)


@pytest.mark.parametrize("pattern", ["2:4", "block4x4:0.5"])
def test_a_model_becomes_float64_as_a_whole(pattern: str) -> None:
    model = nn.Sequential(make(pattern=pattern), nn.LayerNorm(24), make(8, 24, pattern))
    weight = model[0].packed().unpack()
    model.double()
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    assert torch.equal(model[0].packed().unpack(), weight.double()) and model[0].kernel.backend == "dense"
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(model[0](x), expected(model[0], x), rtol=0, atol=1e-12)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    model.float()
    assert model[0].kernel.backend == "cpu" and torch.equal(model[0].packed().unpack(), weight)


def test_same_dtype_keeps_the_layout() -> None:
    layer = make()
    held = layer.kernel
    assert layer.to(torch.float32).cpu().kernel is held


def test_meta_device_and_back() -> None:
    layer = make()
    state = layer.state_dict()
    layer.to("meta")
    assert layer.device.type == "meta" and all(tensor.is_meta for tensor in layer.buffers())
    assert "none" in str(layer.explain())
    layer.to_empty(device="cpu")
    assert layer.device.type == "cpu" and layer.packed().validate()
    layer.load_state_dict(state)
    assert_right(layer, torch.randn(3, 40))
    fresh = SparseLinear(40, 24, device="meta")
    with pytest.warns(UserWarning, match="assign=True"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh.packed().unpack(), layer.packed().unpack())
    assert_right(fresh, torch.randn(3, 40))


def _send(layer: SparseLinear, x: Tensor, queue: multiprocessing.queues.SimpleQueue[list[list[float]]]) -> None:
    torch.set_num_threads(1)  # torch's own OpenMP pool does not survive a fork
    with torch.no_grad():
        queue.put(layer(x).tolist())


def _send_product(
    sent: SparseLinear | Tensor, x: Tensor, queue: multiprocessing.queues.SimpleQueue[list[list[float]]]
) -> None:
    with torch.no_grad():
        queue.put((sent(x) if isinstance(sent, SparseLinear) else x @ sent.t()).tolist())


def test_shared_memory_and_fork() -> None:
    layer, x = make(), torch.randn(2, 40)
    nn.Sequential(layer).share_memory()
    assert all(tensor.is_shared() for tensor in layer.buffers())
    assert_right(layer, x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_send, args=(layer, x, queue))
    child.start()
    got = queue.get()
    child.join()
    torch.testing.assert_close(torch.tensor(got).double(), expected(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["layer", "weight"])
def test_a_process_that_is_spawned_gets_it(what: str) -> None:
    layer, x = make(), torch.randn(2, 40)
    sent = layer if what == "layer" else layer.weight
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_send_product, args=(sent, x, queue))
    child.start()
    got = queue.get()
    child.join()
    assert layer.bias is not None
    want = expected(layer, x) - (0 if what == "layer" else layer.bias.detach().double())
    torch.testing.assert_close(torch.tensor(got).double(), want, rtol=0, atol=1e-5)


def test_a_layer_that_is_saved_stays_whole_for_others() -> None:
    seen = []

    class Asked(SparseLinear):
        def get_extra_state(self) -> None:  # asked in the middle of saving, where another thread may ask as well
            seen.append([name for name, _ in self.named_parameters()])

    layer = Asked(40, 24)
    assert sorted(layer.state_dict()) == ["_extra_state", "bias", "metadata", "values"]
    assert seen == [["weight", "bias"]]


def _broken_states() -> list[tuple[str, dict[str, Tensor]]]:
    torch.manual_seed(0)
    good = make().state_dict()
    other = make(pattern="4:8").state_dict()
    descending = good["metadata"].clone()
    descending[0, 0] = 0
    bad = good["values"].clone()
    bad[0, 0] = torch.nan
    return [
        ("another pattern", dict(other)),
        ("another shape", dict(make(24, 44).state_dict())),
        ("positions", {**good, "metadata": descending}),
        ("nan", {**good, "values": bad}),
        ("dtype", {**good, "metadata": good["metadata"].to(torch.int16)}),
        ("truncated", {**good, "values": good["values"][:, :-1]}),
        ("bias shape", {**good, "bias": torch.zeros(23)}),
        ("no metadata", {key: value for key, value in good.items() if key != "metadata"}),
        ("dense weight", {"weight": torch.zeros(24, 40), "bias": torch.zeros(24)}),
    ]


@pytest.mark.parametrize(("what", "state"), _broken_states(), ids=[what for what, _ in _broken_states()])
def test_broken_state_leaves_the_layer_untouched(what: str, state: dict[str, Tensor]) -> None:
    layer = make()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    held = layer.kernel
    with pytest.raises(RuntimeError, match="SparseLinear"):
        layer.load_state_dict({**state, "bias": state["bias"]})
    if what not in ("no metadata", "dense weight"):  # torch itself loads a bias beside missing keys
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert layer.kernel is held


def test_state_of_a_pattern_of_the_same_sizes_is_named() -> None:
    state = make(4, 4, "1:4").state_dict()
    layer = SparseLinear(4, 4, "1:8")
    assert state["values"].shape == layer.state_dict()["values"].shape
    assert state["metadata"].shape == layer.state_dict()["metadata"].shape
    with pytest.raises(RuntimeError, match="holds a 1:4 weight"):
        layer.load_state_dict(state)


def test_state_of_another_dtype_is_converted_as_linear_does() -> None:
    layer = make()
    half = SparseLinear(40, 24, dtype=torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.packed().unpack(), layer.packed().unpack().bfloat16())


def test_nobody_sees_a_kernel_before_its_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(backend="cpu")
    seen: list[bool] = []

    def product(kernel: Kernel, activation: str) -> EagerProduct:
        seen.extend(tensor.is_shared() for tensor in kernel.tensors)  # type: ignore[no-untyped-call]
        return eager_product(kernel, activation)

    monkeypatch.setattr("sparsecomp.nn.packed_module.eager_product", product)
    layer.share_memory()
    assert seen == [True, True]
