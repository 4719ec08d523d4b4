"""The binding of the eager call: what it is given, what it hands on, references and errors."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsecomp.backends import cpu
from sparsecomp.backends.base import Kernel
from sparsecomp.nn.eager.probe import probe
from tests.sparse_layers import make

FOUND: Any = probe()
pytestmark = pytest.mark.skipif(isinstance(FOUND, str) or FOUND.extension is None, reason=str(FOUND))


# functions of torch by the names that these tests give them, in the order in which the extension takes them
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "get_num_threads": torch.get_num_threads,
    "is_grad_enabled": torch.is_grad_enabled,
    "is_neg": Tensor.is_neg,
    "new_empty": Tensor.new_empty,
    "contiguous": Tensor.contiguous,
}
LEVELS = vars(torch.autograd.forward_ad)


def functions(native: Any, *, watchers: Any = None, keys: Any = (), levels: Any = LEVELS, **replaced: Any) -> Any:
    """The extension's hold of torch, with some of its functions replaced."""
    table = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    watch = FOUND.watch
    keys = watchers or watch.watchers, *(keys or (watch.included, watch.raw, watch.plain))
    given = {**FUNCTIONS, **replaced}
    return native.torch_functions(table, Tensor, nn.Parameter, *keys, levels, *given.values())


def product_of(native: Any, kernel: Kernel, **replaced: Any) -> Any:
    """The product of an fp32 kernel that asks torch by the functions given."""
    return native.eager_product(functions(native, **replaced), False, kernel.arguments, 0, kernel.tensors, 0, None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_a_table_of_another_version_is_not_used(native: Any) -> None:
    class Table(ctypes.Structure):
        _fields_ = (
            ("version", ctypes.c_uint32 * 2),
            ("previous", ctypes.c_void_p),
            ("functions", ctypes.c_void_p * 5),
        )

    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    name = b"dlpack_exchange_api"
    true_table = pointer(torch.Tensor.__dlpack_c_exchange_api__, name)  # type: ignore[attr-defined]
    rest = (Tensor, nn.Parameter, (), None, None, (0, 0), {}, *[None] * 5)

    def functions_of(table: Table) -> object:
        return native.torch_functions(new_capsule(ctypes.addressof(table), name, None), *rest)

    newer = Table((2, 0), None, (ctypes.c_void_p * 5)())
    assert functions_of(newer) is None
    newer.previous = true_table
    assert functions_of(newer) is not None
    assert functions_of(Table((1, 3), None, (ctypes.c_void_p * 5)())) is None
    with pytest.raises(ValueError, match="PyCapsule"):
        native.torch_functions(new_capsule(true_table, b"another", None), *rest)


def test_what_torch_raises_is_heard(native: Any) -> None:
    kernel, watch = make(backend="cpu").kernel, FOUND.watch

    def bad(*_: object) -> None:
        raise KeyboardInterrupt

    x = torch.randn(40, 3).t()
    references = sys.getrefcount(x)
    replaced: list[dict[str, Any]] = [{name: bad} for name in FUNCTIONS]
    replaced += [{"watchers": (*watch.watchers, bad)}]
    replaced += [{"keys": (bad, watch.raw, watch.plain)}, {"keys": (watch.included, bad, watch.plain)}]
    for each in replaced:
        with pytest.raises(KeyboardInterrupt):
            product_of(native, kernel, **each)(x, None, None)
    for each in ({"levels": {"_current_level": "high"}}, {"keys": (watch.included, str, watch.plain)}):
        with pytest.raises(TypeError):
            product_of(native, kernel, **each)(x, None, None)
    assert product_of(native, kernel, levels={})(x, None, None) is None
    assert sys.getrefcount(x) == references


def test_keys_that_are_not_known_are_for_the_dispatcher(native: Any) -> None:
    kernel, x, watch = make(backend="cpu").kernel, torch.randn(3, 40), FOUND.watch
    for plain, runs in (((0, 1), False), ((0, watch.plain[0]), True), ((watch.plain[0], 2**64 - 1), True)):
        product = product_of(native, kernel, keys=(watch.included, watch.raw, plain))
        assert (product(x, None, None) is not None) is runs


@pytest.mark.usefixtures("native")
def test_gradients_and_dense_products_are_the_twins() -> None:
    kernel, bias = make(backend="cpu").kernel, torch.randn(24)
    calls: list[Any] = []
    product = backend_product(kernel, calls)
    x, wanting = torch.randn(3, 40), torch.randn(3, 40, requires_grad=True)
    assert product(wanting, bias, None) == "otherwise" and product(x, nn.Parameter(bias), 7) == "otherwise"
    assert calls == [(wanting, bias, None), (x, calls[1][1], 7)]
    with torch.no_grad():
        assert isinstance(product(wanting, nn.Parameter(bias), None), Tensor)
        assert isinstance(product(x, bias, 4), Tensor) and isinstance(product(x[None], bias, 4), Tensor)
        assert product(x, bias, 3) == "otherwise" and product(x[None], bias, 2) == "otherwise"
        with pytest.raises(TypeError):
            product(x, bias, "many")
        with pytest.raises(TypeError, match="x, bias and dense_above"):
            product(x, bias)
    assert not product(x, bias, None).requires_grad


def backend_product(kernel: Kernel, calls: list[Any]) -> Any:
    def otherwise(x: Tensor, bias: Tensor | None, dense_above: int | None) -> Any:
        calls.append((x, bias, dense_above))
        return "otherwise"

    return cpu.eager_product(FOUND.extension, kernel, "none", otherwise)


@pytest.mark.usefixtures("native")
def test_nothing_is_leaked() -> None:
    layer = make(backend="cpu")
    kernel, activation = layer.kernel, "gelu"
    x, strided, wanting = torch.randn(3, 40), torch.randn(40, 3).t(), torch.randn(3, 40, requires_grad=True)
    deep, sparse, bias = torch.randn(2, 3, 40), x.to_sparse(), torch.randn(24)
    watched = (x, strided, wanting, deep, sparse, bias, kernel, activation, *kernel.tensors, None, True, False)
    calls: list[Any] = []
    results: list[weakref.ref[Tensor]] = []

    def once() -> None:
        product = cpu.eager_product(FOUND.extension, kernel, activation, lambda *given: calls.append(given))
        assert product is not None
        with torch.no_grad():
            for given in (x, strided, deep, deep[:0], sparse, x.half(), None):
                y = product(given, bias, None)  # type: ignore[arg-type]
                results.extend([] if y is None else [weakref.ref(y)])
                product(given, None, None)  # type: ignore[arg-type]
        product(wanting, bias, None)
        with pytest.raises(TypeError):
            product(x, bias, "many")  # type: ignore[arg-type]
        for broken in ((), (kernel.tensors[0],), (*kernel.tensors, bias, bias)):
            with pytest.raises(TypeError):
                cpu.native().eager_product(  # type: ignore[union-attr]
                    FOUND.extension, False, kernel.arguments, 0, broken, 0, None
                )
        calls.clear()

    once()
    assert results and all(each() is None for each in results)
    gc.collect()
    before, objects = [sys.getrefcount(each) for each in watched], len(gc.get_objects())
    for _ in range(100):
        once()
        results.clear()
    gc.collect()
    assert len(gc.get_objects()) - objects < 100  # copies of x are among them
    after = [sys.getrefcount(each) for each in watched]
    assert before[:-3] == after[:-3]
    # None, True and False are counted for the whole process, in which other tests' objects end too; or not at all. One
    # left at each of these calls would be more than a thousand.
    assert all(late - early < 500 for early, late in zip(before[-3:], after[-3:], strict=True))


@pytest.mark.usefixtures("native")
def test_a_dropped_layer_frees_its_weight() -> None:
    layer = make(backend="cpu")
    with torch.no_grad():
        layer(torch.randn(3, 40))
    held = [weakref.ref(tensor) for tensor in layer.kernel.tensors]
    del layer
    assert [reference() for reference in held] == [None, None]


@pytest.mark.usefixtures("native")
def test_a_cycle_through_a_tensor_of_the_kernel_is_collected() -> None:
    layer = make(backend="cpu")
    layer.kernel.tensors[0].owner = layer  # type: ignore[attr-defined]
    held = weakref.ref(layer)
    del layer
    gc.collect()
    assert held() is None


def _changing(native: Any, kernel: Kernel, function: str, change: Callable[[], object]) -> Any:
    """A product where ``change`` happens while torch runs ``function``, as another thread could do it."""
    true = FUNCTIONS[function]
    return product_of(native, kernel, **{function: lambda *given: (true(*given), change())[0]})


@pytest.mark.parametrize("function", ["new_empty", "get_num_threads"])
def test_what_changes_during_the_call_is_read_as_it_is_then(native: Any, function: str) -> None:
    layer, other = make(backend="cpu"), make(backend="cpu")
    kernel, bias, x = layer.kernel, torch.zeros(24), torch.randn(3, 40)
    new_x, new_bias = torch.randn(3, 40), torch.randn(24)

    def change() -> None:
        x.data, bias.data = new_x.clone(), new_bias.clone()
        for tensor, new in zip(kernel.tensors, other.kernel.tensors, strict=True):
            tensor.data = new.clone()

    with torch.no_grad():
        got = _changing(native, kernel, function, change)(x, bias, None)
        assert torch.equal(got, cpu.CpuBackend().run(other.kernel, new_x, new_bias))


def test_calls_within_a_call_make_each_its_own_result(native: Any) -> None:
    kernel, x, inner = make(backend="cpu").kernel, torch.randn(3, 40), torch.randn(2, 5, 40)
    results: list[Tensor] = []

    def call_again() -> None:
        if not results:
            results.append(torch.empty(0))
            results[0] = product(inner, None, None)

    product = _changing(native, kernel, "new_empty", call_again)
    with torch.no_grad():
        results.append(product(x, None, None))
    for got, given in zip(results, (inner, x), strict=True):
        assert torch.equal(
            got, cpu.CpuBackend().run(kernel, given.reshape(-1, 40), None).reshape(*given.shape[:-1], 24)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_a_result_of_another_dtype_is_not_written(native: Any, dtype: torch.dtype) -> None:
    kernel = make(backend="cpu").kernel
    product = product_of(native, kernel, new_empty=lambda x, *sizes: x.new_empty(sizes, dtype=dtype))
    with torch.no_grad():
        assert product(torch.randn(3, 40), None, None) is None


@pytest.mark.parametrize("function", ["new_empty", "get_num_threads"])
@pytest.mark.parametrize("shape", [(2, 40), (4, 40), (3, 39), (120,), (3, 80)])
def test_an_input_that_no_longer_fits_is_not_read(native: Any, function: str, shape: tuple[int, ...]) -> None:
    kernel, x = make(backend="cpu").kernel, torch.randn(3, 40)

    def change() -> None:
        x.data = torch.randn(shape)[..., ::2] if shape[-1] == 80 else torch.randn(shape)

    with torch.no_grad():
        assert _changing(native, kernel, function, change)(x, None, None) is None


@pytest.mark.parametrize("function", ["new_empty", "get_num_threads"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_weight_or_bias_that_no_longer_fits_is_not_read(native: Any, function: str, part: int) -> None:
    kernel, bias, x = make(backend="cpu").kernel, torch.zeros(24), torch.randn(3, 40)
    tensor = (*kernel.tensors, bias)[part]

    def change() -> None:
        tensor.data = tensor[:-1].clone()

    with torch.no_grad():
        assert _changing(native, kernel, function, change)(x, bias, None) is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({0: object()}, ValueError),
        ({2: (24, 40)}, IndexError),
        ({2: (24, 40, 2, 4, 1, "fp32")}, TypeError),
        ({2: (24, 40, 5, 4, 1, 0)}, RuntimeError),
        ({2: [24, 40, 2, 4, 1, 0]}, TypeError),
        ({3: 3}, RuntimeError),
        ({3: "fp32"}, TypeError),
        ({4: (torch.zeros(1),)}, TypeError),
        ({4: (nn.Parameter(torch.zeros(1)), torch.zeros(1))}, TypeError),
        ({5: None}, TypeError),
    ],
)
def test_wrong_facts_are_refused(native: Any, change: dict[int, Any], error: type[Exception]) -> None:
    kernel = make(backend="cpu").kernel
    facts = [FOUND.extension, False, kernel.arguments, 0, kernel.tensors, 0, None]
    for index, value in change.items():
        facts[index] = value
    with pytest.raises(error):
        native.eager_product(*facts)
    with pytest.raises(TypeError, match="eager_product takes"):
        native.eager_product(*facts[:-1])
    with pytest.raises(TypeError, match="torch_functions takes"):
        native.torch_functions(1, 2)
    watch = FOUND.watch
    with pytest.raises(IndexError):
        functions(native, keys=(watch.included, watch.raw, ()))
    with pytest.raises(TypeError):
        functions(native, keys=(watch.included, watch.raw, ("none", 0)))
    with pytest.raises(OverflowError):
        functions(native, keys=(watch.included, watch.raw, (-1, 0)))


@pytest.mark.usefixtures("native")
def test_an_unknown_activation_is_an_error_of_the_library(native: Any) -> None:
    kernel, x = make(backend="cpu").kernel, torch.randn(3, 40)
    product = native.eager_product(FOUND.extension, False, kernel.arguments, 0, kernel.tensors, 99, None)
    references = sys.getrefcount(x)
    with torch.no_grad(), pytest.raises(RuntimeError):
        product(x, None, None)
    assert sys.getrefcount(x) == references
