"""The eager call of the extension against its twin in Python: identical bits, and refusal of what is not plain."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsecomp.activations import ACTIVATIONS
from sparsecomp.backends import cpu
from sparsecomp.backends.base import Kernel
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.nn.eager.calls import EagerProduct, _Product, eager_product
from sparsecomp.nn.eager.probe import probe
from sparsecomp.packing.quantize import quantize
from tests.sparse_layers import PATTERNS, TOLERANCE, assert_right, make

pytestmark = pytest.mark.skipif(isinstance(cpu.native(), str), reason=str(cpu.native()))
FOUND: Any = probe()
past_the_dispatcher = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
CASES = 12  # random ones of every pattern, dtype and activation


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["no table", "another extension"])
def without_functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with a torch that has no DLPack table, or an extension that was built from other sources."""
    if request.param == "no table":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    else:
        monkeypatch.setattr(cpu.native(), "torch_functions", lambda table, tensor: None)
    probe.cache_clear()
    yield
    probe.cache_clear()


def _is_native(product: EagerProduct) -> bool:
    return type(product).__name__ == "builtin_function_or_method"


def _native_and_twin(kernel: Kernel, activation: str) -> tuple[Any, Any]:
    native, twin = eager_product(kernel, activation), _Product(kernel, activation, FOUND)
    assert _is_native(native) and not _is_native(twin)
    return native, twin


def _inputs(columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Every number of dimensions, no row, and strides of all kinds."""
    sizes = [random.randrange(1, 6) for _ in range(3)]
    shapes = [(), (1,), (0,), (sizes[0],), (2, 0), tuple(sizes[:2]), (sizes[0], 1), (1, sizes[0]), tuple(sizes)]
    inputs = [torch.randn(*shape, columns) for shape in shapes]
    inputs += [torch.randn(columns, 5).t(), torch.randn(3, 2 * columns)[:, ::2], torch.randn(4, columns + 3)[:, 2:-1]]
    inputs += [torch.randn(6, columns)[::2], torch.randn(1, columns).expand(4, columns), torch.randn(4, columns)[2:3]]
    inputs += [torch.randn(2, 5, columns)[:, 1:4], torch.randn(3, 2, columns).transpose(0, 1)]
    inputs += [torch.randn(2, 4, 3, columns)[:, ::2], torch.randn(4, 6, columns)[::2].unsqueeze(1)]
    inputs += [torch.randn(2, 3, columns).expand(2, 3, columns), torch.randn(2, 1, columns).expand(2, 3, columns)]
    return [x.to(dtype) for x in inputs]


def _assert_same_bits(native: Any, twin: Any, x: Tensor, bias: Tensor | None) -> None:
    with torch.inference_mode(random.random() < 0.5), torch.no_grad():
        first, got, want = native(x, bias, None), native(x, bias, None), twin(x, bias, None)
    assert torch.equal(first, got) and (first.data_ptr() != got.data_ptr() or got.numel() == 0)
    assert got.stride() == want.stride()
    assert got.shape == want.shape == (*x.shape[:-1], want.shape[-1])
    assert got.dtype == want.dtype and got.is_contiguous() and got.is_inference() == want.is_inference()
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("pattern", "quantized"),
    [*((pattern, False) for pattern in PATTERNS), *((pattern, True) for pattern in PATTERNS if "block" not in pattern)],
)
@pytest.mark.usefixtures("native")
def test_native_and_twin_give_the_same_bits(pattern: str, dtype: torch.dtype, quantized: bool) -> None:
    random.seed(f"{pattern} {dtype} {quantized}")
    for _ in range(CASES):
        out, columns = random.choice([1, 5, 24, 33]), random.choice([1, 3, 16, 40, 65])
        layer = make(out, columns, pattern, dtype, backend="cpu")
        if quantized:
            layer = SparseLinear.from_packed(quantize(layer.packed()), layer.bias, backend="cpu")
        native, twin = _native_and_twin(layer.kernel, random.choice(ACTIVATIONS))
        for x in _inputs(columns, dtype):
            _assert_same_bits(native, twin, x, random.choice([None, layer.bias]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 40), (24, 0), (0, 0)])
@pytest.mark.usefixtures("native")
def test_weights_without_rows_or_columns(shape: tuple[int, int], activation: str) -> None:
    layer = SparseLinear(shape[1], shape[0], backend="cpu", activation=activation)
    native, twin = _native_and_twin(layer.kernel, activation)
    for x in (torch.randn(shape[1]), torch.randn(3, shape[1]), torch.randn(2, 0, shape[1])):
        _assert_same_bits(native, twin, x, layer.bias)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rows", [(2**58,), (3, 2**56), (3, 2**51), (3, 2**52, 5), (2**29, 2**28)])
def test_a_result_beyond_all_memory_is_refused(rows: tuple[int, ...]) -> None:
    layer = make(4096, 16, backend="cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="overflow"):
        layer(torch.zeros(16).expand(*rows, 16))
    with torch.no_grad():
        assert layer(torch.zeros(2, 16)).shape == (2, 4096)


@pytest.mark.usefixtures("native")
def test_two_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    layer = make(768, 512, backend="cpu")
    native, twin = _native_and_twin(layer.kernel, "gelu")
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _assert_same_bits(native, twin, torch.randn(9, 512), layer.bias)
    finally:
        torch.set_num_threads(before)


@past_the_dispatcher
@pytest.mark.usefixtures("without_functions")
def test_a_torch_without_the_functions_takes_the_twin() -> None:
    layer, found = make(backend="cpu"), probe()
    assert not isinstance(found, str) and found.extension is None and found.in_python
    assert not _is_native(layer._eager) and isinstance(layer._eager, _Product)
    for x in (torch.randn(40), torch.randn(3, 40), torch.randn(2, 3, 40), torch.randn(0, 40), torch.randn(40, 3).t()):
        assert_right(layer, x)
    with pytest.raises(ModelError, match="dtype"):
        layer(torch.randn(3, 40).half())


class _Odd(Tensor):
    pass


def _leaked(transform: Callable[..., Any]) -> Tensor:
    """The tensor a transform of torch.func gave its function, kept beyond its end."""
    seen: list[Tensor] = []
    transform(lambda x: (seen.append(x), x.sum())[1])(torch.randn(3, 40))
    return seen[0]


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(3, 40)


def _emptied() -> Tensor:
    x = torch.randn(3, 40)
    x.untyped_storage().resize_(0)
    return x


_ODD: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "list": lambda: [1.0],
    "array": lambda: torch.randn(3, 40).numpy(),
    "scalar": lambda: torch.tensor(1.0),
    "narrow": lambda: torch.randn(3, 39),
    "double": lambda: torch.randn(3, 40).double(),
    "half": lambda: torch.randn(3, 40).half(),
    "integers": lambda: torch.ones(3, 40, dtype=torch.int32),
    "complex": lambda: torch.randn(3, 40, dtype=torch.complex64),
    "subclass": lambda: torch.randn(3, 40).as_subclass(_Odd),
    "parameter": lambda: nn.Parameter(torch.randn(3, 40), requires_grad=False),
    "negated": lambda: torch._neg_view(torch.randn(3, 40)),
    "zeros": lambda: torch._efficientzerotensor((3, 40)),
    "sparse": lambda: torch.randn(3, 40).to_sparse(),
    "csr": lambda: torch.randn(3, 40).to_sparse_csr(),
    "meta": lambda: torch.empty(3, 40, device="meta"),
    "fake": _fake,
    "functional": lambda: torch._to_functional_tensor(torch.randn(3, 40)),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3, 40), torch.randn(2, 40)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(3, 40)], layout=torch.jagged),
    "leaked from vmap": lambda: _leaked(torch.func.vmap),
    "leaked from grad": lambda: _leaked(torch.func.grad),
    "emptied": _emptied,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", _ODD)
def test_inputs_that_are_not_plain_are_left_to_the_dispatcher(name: str) -> None:
    product = make(backend="cpu")._eager
    assert _is_native(product)
    with torch.no_grad():
        assert product(_ODD[name](), None, None) is None


@pytest.mark.usefixtures("native")
def test_a_negated_input_is_not_read_raw() -> None:
    layer, x = make(backend="cpu"), torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("native")
def test_modes_transforms_and_levels_are_seen() -> None:
    layer, x = make(backend="cpu").requires_grad_(False), torch.randn(3, 40)
    answers: list[object] = []

    def ask(rows: Tensor) -> Tensor:
        answers.append(layer._eager(x, layer.bias, None))
        assert not FOUND.watch.nobody()
        return rows

    for mode in (_Functions(), _Dispatch(), torch.autocast("cpu", torch.bfloat16), FakeTensorMode()):
        with mode:
            ask(x)
    with torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.PreDispatch):
        ask(x)  # of a mode that nobody lists
    torch.func.vmap(ask)(x)
    torch.func.functionalize(ask)(x)
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    assert answers and answers == [None] * len(answers)
    assert FOUND.watch.nobody() and layer._eager(x, layer.bias, None) is not None


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(lambda old: old[:-1].clone(), id="short"),
        pytest.param(lambda old: torch.empty(0, dtype=old.dtype), id="empty"),
        pytest.param(lambda old: old.repeat(2)[::2], id="strided"),
        pytest.param(lambda old: old[:1].expand(len(old)), id="expanded"),
    ],
)
@pytest.mark.usefixtures("native")
def test_a_weight_replaced_by_hand_is_not_read(part: int, replaced: Any) -> None:
    layer = SparseLinear.from_packed(quantize(make(backend="cpu").packed()), backend="cpu")
    x = torch.randn(3, 40)
    tensor = layer.kernel.tensors[part]
    tensor.data = replaced(tensor)
    with torch.no_grad():
        assert layer._eager(x, None, None) is None
        with pytest.raises(BackendError, match="contiguous tensors of"):
            layer(x)


@pytest.mark.usefixtures("native")
def test_scales_of_another_type_are_not_read() -> None:
    layer = SparseLinear.from_packed(quantize(make(backend="cpu").packed()), backend="cpu")
    layer.kernel.tensors[2].data = torch.ones(24, dtype=torch.int32)
    with torch.no_grad():
        assert layer._eager(torch.randn(3, 40), None, None) is None
        with pytest.raises(BackendError, match=r"scales in torch\.float32, got .*int32"):
            layer(torch.randn(3, 40))


@past_the_dispatcher
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(lambda old: old[:-1].clone(), id="short"),
        pytest.param(lambda old: old.repeat(2)[::2], id="strided"),
        pytest.param(lambda old: old.to("meta"), id="meta"),
        pytest.param(lambda old: old.view(torch.int32) if old.dtype is torch.float32 else old[1:], id="type"),
    ],
)
def test_a_weight_replaced_by_hand_is_refused_wherever_it_is_read(part: int, replaced: Any) -> None:
    layer = SparseLinear.from_packed(quantize(make(backend="cpu").packed()), torch.zeros(24), backend="cpu")
    tensors, x = list(layer.kernel.tensors), torch.randn(3, 40)
    tensors[part] = replaced(tensors[part])
    kernel = dataclasses.replace(layer.kernel, tensors=tuple(tensors))
    backend, twin, wanting = cpu.CpuBackend(), _Product(kernel, "none", FOUND), nn.Parameter(torch.zeros(24))
    reads: list[Callable[[], object]] = [
        lambda: backend.run(kernel, x, None),
        lambda: backend.dense(kernel),
        lambda: backend.restore(kernel),
    ]
    if kernel.tensors[0].is_cpu:  # else the twin leaves it to the dispatcher
        reads += [lambda: twin(x, wanting, None), lambda: twin(x, None, 2)]
    for read in reads:
        with pytest.raises(BackendError, match="contiguous tensors of"):
            read()


def _without_memory(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["values", "metadata", "scales", "bias", "x"])
def test_elements_without_memory_are_refused(name: str, gradients: bool) -> None:
    layer = SparseLinear.from_packed(quantize(make(backend="cpu").packed()), torch.randn(24), backend="cpu")
    values, metadata, scales = layer.kernel.tensors
    x = torch.randn(3, 40)
    tensors = {"values": values, "metadata": metadata, "scales": scales, "bias": layer.bias, "x": x}
    _without_memory(tensors[name])  # type: ignore[arg-type]
    with torch.set_grad_enabled(gradients), pytest.raises(BackendError, match=f"^{name} has shape .* no memory"):
        layer(x)
    if name in ("values", "metadata"):
        for read in (layer.packed, layer.to_linear):
            with pytest.raises(BackendError, match=f"^{name} has shape .* no memory"):
                read()


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(torch.zeros(23), id="short"),
        pytest.param(torch.zeros(24, 1), id="matrix"),
        pytest.param(torch.zeros(24).half(), id="half"),
        pytest.param(torch.zeros(48)[::2], id="strided"),
        pytest.param(torch.zeros(24, device="meta"), id="meta"),
        pytest.param(torch._neg_view(torch.zeros(24)), id="negated"),
        pytest.param(torch.zeros(24).as_subclass(_Odd), id="subclass"),
        pytest.param([0.0] * 24, id="list"),
    ],
)
@pytest.mark.usefixtures("native")
def test_a_bias_that_does_not_fit_is_left_to_the_dispatcher(bias: Any) -> None:
    layer, x = make(backend="cpu"), torch.randn(3, 40)
    with torch.no_grad():
        assert layer._eager(x, bias, None) is None
    if isinstance(bias, Tensor):
        assert layer._eager(x, bias.detach().requires_grad_(), None) is None


@pytest.mark.parametrize("gradients", [False, True])
def test_a_negated_bias_is_added_negated(gradients: bool) -> None:
    layer, x, bias = make(backend="cpu"), torch.randn(3, 40), torch.randn(24)
    layer.bias = nn.Parameter(-bias)
    want = layer(x)
    layer.bias = nn.Parameter(torch._neg_view(bias))
    with torch.set_grad_enabled(gradients):
        assert torch.equal(layer(x), want)


@pytest.mark.usefixtures("native")
def test_results_are_ordinary_tensors() -> None:
    layer, x = make(backend="cpu"), torch.randn(3, 40)
    with torch.no_grad():
        y = layer(x)
    assert type(y) is Tensor and not y._is_view() and y._base is None and y.is_leaf  # type: ignore[no-untyped-call]
    assert y.untyped_storage().resizable() and y.untyped_storage().nbytes() == y.nbytes
    assert y.resize_(50, 24).shape == (50, 24)


@pytest.mark.usefixtures("native")
def test_copies_have_a_product_of_their_own() -> None:
    layer, x = make(backend="cpu"), torch.randn(3, 40)
    layer.activation = "relu"
    copies = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), make(24, 40).to(torch.half)]
    with torch.no_grad():
        assert (layer(x) >= 0).all()
        for each in copies[:3]:
            assert torch.equal(each(x), layer(x))
            assert _is_native(each._eager) and each._eager is not layer._eager
        assert copies[3](x.half()).dtype == torch.half
        layer.activation = "none"
        assert (layer(x) < 0).any()
