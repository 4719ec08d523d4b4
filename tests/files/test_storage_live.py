"""What a file is copied into: tensors that the model has, all or none of them; what is the model's own stays."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsecomp.backends.choice import Choice
from sparsecomp.errors import FormatError, ModelError
from sparsecomp.files import storage
from sparsecomp.files.storage import load, save
from sparsecomp.nn import SparseLinear
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT
from tests.files.saved_models import Beside, assert_refused, packed

NAN = float("nan")


# --- memory that entries have in common -----------------------------------------------------------------------------


def views(make):
    base = torch.zeros(8)
    return Beside(**make(base))


@pytest.mark.parametrize(
    ("make", "values", "names"),
    [
        (lambda b: {"x": b[0:4], "y": b[2:6]}, {"x": torch.ones(4), "y": torch.zeros(4)}, '"x" and "y" share'),
        (
            lambda b: {"x": b[:4].view(2, 2), "y": b[:4].view(2, 2).t()},
            {"x": torch.tensor([[1.0, 2], [3, 4]]), "y": torch.tensor([[1.0, 2], [3, 4]])},
            '"x" and "y" share',
        ),
        (lambda b: {"x": b.as_strided((3, 2), (1, 1))}, {"x": torch.arange(6.0).view(3, 2)}, 'numbers of "x" share'),
        (lambda b: {"x": b[:4], "y": b[:4]}, {"x": torch.ones(4), "y": torch.zeros(4)}, '"x" and "y" differ'),
        (lambda b: {"x": b[:1].expand(4)}, {"x": torch.arange(4.0)}, "expands from one entry"),
    ],
)
def test_values_that_memory_in_common_cannot_hold_are_refused(tmp_path, make, values, names):
    save(Beside(True, **values), tmp_path / "m")
    assert_refused(tmp_path / "m", views(make), names)


@pytest.mark.parametrize(
    "make",
    [
        lambda b: {"x": b[0:4], "y": b[2:6]},
        lambda b: {"x": b[:4].view(2, 2), "y": b[:4].view(2, 2).t()},
        lambda b: {"x": b.as_strided((3, 2), (1, 1))},
        lambda b: {"x": b, "y": b},
        lambda b: {"x": b[:1].expand(4), "y": b[2:3].expand(3)},
    ],
)
def test_numbers_that_fit_memory_in_common_come_back_nan_among_them(tmp_path, make):
    saved, fresh = views(make), views(make)
    saved.x.untyped_storage().copy_(torch.tensor([NAN, 1, NAN, NAN, 4, 5, 6, 7]).untyped_storage())
    save(saved, tmp_path / "m")
    load(tmp_path / "m", into=fresh)
    for name, value in saved.named_buffers():
        torch.testing.assert_close(dict(fresh.named_buffers())[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.bool])
def test_tied_buffers_of_other_number_types_come_back(tmp_path, dtype):
    both = torch.ones(3).to(dtype)
    save(Beside(x=both, y=both), tmp_path / "m")
    zero = torch.zeros(3).to(dtype)
    fresh = load(tmp_path / "m", into=Beside(x=zero, y=zero))
    assert fresh.y.to(torch.complex64).real.tolist() == [1, 1, 1]


# --- views and kinds of tensors -------------------------------------------------------------------------------------


def test_conjugated_and_negated_views_are_stored_as_what_they_are(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    save(Beside(a=z, b=z.conj(), im=torch.view_as_real(z)[:, 1], neg=z.conj().imag), tmp_path / "m")
    fresh = Beside(a=torch.zeros(2) * 0j, b=torch.zeros(2) * 0j, im=torch.zeros(2), neg=torch.zeros(2))
    load(tmp_path / "m", into=fresh)
    assert fresh.a.tolist() == [1 + 2j, 3 - 4j]
    assert fresh.b.tolist() == [1 - 2j, 3 + 4j]
    assert fresh.im.tolist() == [2, -4]
    assert fresh.neg.tolist() == [-2, 4]


def test_a_conjugated_view_in_the_model_is_written_through(tmp_path):
    z = torch.zeros(2) * 0j
    save(Beside(a=torch.tensor([1 + 2j, 3j]), b=torch.tensor([1 - 2j, -3j])), tmp_path / "m")
    fresh = load(tmp_path / "m", into=Beside(a=z, b=z.conj()))
    assert fresh.b.tolist() == [1 - 2j, -3j]
    save(Beside(a=torch.tensor([1 + 2j, 3j]), b=torch.tensor([1 + 2j, 3j])), tmp_path / "m")
    assert_refused(tmp_path / "m", Beside(a=z, b=z.conj()), '"a" and "b" share memory')


KINDS = [
    (lambda: torch.eye(3).to_sparse(), "a tensor of layout sparse_coo"),
    (lambda: torch.eye(3).to_sparse_csr(), "a tensor of layout sparse_csr"),
    (lambda: torch.eye(3).to_mkldnn(), "a tensor of layout mkldnn"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested tensor"),
    (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), r"a quantised tensor \(qint8\)"),
]


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested", "ignore:Sparse CSR", "ignore:.*quantize", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize(("make", "text"), KINDS)
def test_tensors_without_plain_memory_are_named(tmp_path, make, text):
    with pytest.raises(ModelError, match=f'state_dict entry "odd" is {text}; a file holds plain tensors'):
        save(Beside(True, odd=make()), tmp_path / "m")
    save(Beside(True, odd=torch.eye(3)), tmp_path / "m")
    model = Beside(odd=make())
    with pytest.raises(FormatError, match=f'"odd" is {text} in the model'):
        load(tmp_path / "m", into=model)
    assert type(model.lin) is nn.Linear


# --- what belongs to the model --------------------------------------------------------------------------------------


class Scaled(SparseLinear):
    gain: float = 1.0

    def forward(self, x):
        return self.gain * super().forward(x)


def test_a_packed_layer_keeps_its_class_its_attributes_and_its_backend(tmp_path):
    save(nn.Sequential(packed(1)), tmp_path / "m")
    old = packed(2, cls=Scaled, backend="reference")
    old.gain, old.note, old.dense_above = 2.0, "mine", 64
    old.register_buffer("step", torch.ones(1), persistent=False)
    model = load(tmp_path / "m", into=nn.Sequential(old))
    new = model[0]
    assert type(new) is Scaled
    assert (new.gain, new.note, new.dense_above) == (2.0, "mine", 64)
    assert new.step is old.step
    assert new.kernel.backend == "reference" and new.choice.pinned
    x = torch.randn(3, 16)
    torch.testing.assert_close(new(x), 2 * packed(1)(x))


def test_a_preferred_backend_goes_on_being_preferred(tmp_path):
    save(nn.Sequential(packed(1)), tmp_path / "m")
    linear = nn.Linear(16, 4)
    linear.weight.data = packed(2).weight.clone()
    model = nn.Sequential(SparseLinear.from_linear(linear, "2:4", preferred="reference"))
    load(tmp_path / "m", into=model)
    assert model[0].choice == Choice(parse("2:4"), FLOAT, "reference") and model[0].kernel.backend == "reference"


class Head(nn.Module):
    """A bias that the model holds under two names, as the heads of BERT do."""

    def __init__(self, sparse=False):
        super().__init__()
        self.decoder = packed(1) if sparse else nn.Linear(16, 4)
        self.bias = self.decoder.bias


@pytest.mark.parametrize("sparse", [False, True])
def test_the_bias_stays_the_parameter_that_it_was(tmp_path, sparse):
    save(saved := Head(True), tmp_path / "m")
    model = Head()
    if sparse:
        model.decoder = packed(2)
        model.bias = model.decoder.bias
    bias = model.bias
    bias.note = "mine"
    bias.requires_grad_(False)
    optimizer = torch.optim.SGD([bias.requires_grad_(True)], lr=0.5)
    load(tmp_path / "m", into=model)
    assert model.decoder.bias is model.bias is bias
    assert bias.note == "mine"
    assert torch.equal(bias, saved.bias)
    model.decoder(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.decoder.bias, saved.bias - 0.5)


def test_a_failed_load_gives_the_bias_its_values_back(tmp_path, monkeypatch):
    save(Head(True), tmp_path / "m")
    for error in (KeyboardInterrupt, MemoryError):

        def stop(*args, error=error):
            raise error("stop")

        monkeypatch.setattr(storage, "swap", stop)
        assert_refused(tmp_path / "m", Head(), "stop", error)


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_layers_are_put_in_leaves_the_model_as_it_was(tmp_path, monkeypatch, after):
    save(nn.Sequential(packed(1), nn.BatchNorm1d(4)), tmp_path / "m")
    whole = storage.swap

    def interrupted(model, layers):
        if after:
            whole(model, layers)
        model._modules["0"] = nn.Identity()
        raise KeyboardInterrupt("stop")

    monkeypatch.setattr(storage, "swap", interrupted)
    assert_refused(tmp_path / "m", nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)), "stop", KeyboardInterrupt)


def test_a_bias_that_cannot_stay_is_replaced(tmp_path):
    save(saved := nn.Sequential(packed(1)), tmp_path / "m")
    model = nn.Sequential(nn.Linear(16, 4))
    wide = nn.Parameter(torch.zeros(8)[::2], requires_grad=False)
    model[0].bias = wide
    load(tmp_path / "m", into=model)
    assert torch.equal(model[0].bias, saved[0].bias)
    assert not model[0].bias.requires_grad
    assert wide.tolist() == [0, 0, 0, 0]


def test_an_entry_in_the_place_of_a_packed_weight_is_refused(tmp_path):
    model = nn.Sequential(packed(1))
    model[0].register_buffer("values", torch.zeros(4, 8))
    with pytest.raises(ModelError, match='sparse layer "0" has an entry "values" of its own'):
        save(model, tmp_path / "m")


def test_a_layer_whose_names_clash_with_the_file_is_no_place_for_a_sparse_one(tmp_path):
    save(nn.Sequential(packed(1)), tmp_path / "m")
    model = nn.Sequential(nn.Linear(16, 4))
    model[0].register_buffer("values", torch.zeros(3))
    assert_refused(tmp_path / "m", model, 'no place in the model: it has a buffer "values" of its own')


def test_a_pinned_backend_that_does_not_run_the_file_is_named_with_the_layer(tmp_path):
    save(nn.Sequential(packed(1)), tmp_path / "m")
    old = packed(1)
    old.choice = replace(old.choice, backend="none such", pinned=True)
    assert_refused(tmp_path / "m", nn.Sequential(old), 'sparse layer "0": .*none such', ModelError)


@pytest.mark.parametrize("copied", [0, 1, 3])
def test_an_interrupt_between_copies_leaves_the_model_as_it_was(tmp_path, monkeypatch, copied):
    save(Beside(True, a=torch.ones(2), b=torch.ones(2), c=torch.ones(2)), tmp_path / "m")
    whole, calls = storage.copy_into, []

    def interrupted(target, value):
        calls.append(target)
        if len(calls) > copied:
            raise KeyboardInterrupt("stop")
        whole(target, value)

    monkeypatch.setattr(storage, "copy_into", interrupted)
    model = Beside(a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(2))
    assert_refused(tmp_path / "m", model, "stop", KeyboardInterrupt)
    assert len(calls) == copied + 1
