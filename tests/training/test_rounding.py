"""Integers in the loop: the model under training computes with what is deployed, weights and inputs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsecomp as sc
from sparsecomp.errors import ModelError, PatternError
from sparsecomp.patterns import NM, parse, row_nm
from sparsecomp.patterns.numbers import parse_weights
from sparsecomp.patterns.project import project
from sparsecomp.patterns.rounding import rounded_rows
from sparsecomp.training.rounding import RoundedInput, kept_columns

A8 = "8:16+int8@a8"
NAMES = (
    A8,
    "8:16+int8",
    "2:4+int8@a8",
    "12:16+int8@a8",
    "16:16+int8@a8",
    "1:2+int8@a8",
    "4:2:8+int8@a8",
    "2:4@v4+int8",
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def slowly(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The weight [out, in] that is deployed, by way of the packed form."""
    pattern, numbers = parse_weights(name)
    packed = sc.pack(weight, pattern)
    return sc.quantize(packed, None if numbers.activation_bits is None else "int8").unpack()


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 33)).to(dtype)


def sgd(model: nn.Module, lr: float = 0.1, **more: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(16, 40, generator=generator).to(weight.dtype)
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- weights ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    out=st.integers(0, 20),
    columns=st.integers(1, 90),
    same_sign=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_weights_are_those_of_the_packed_form(name, out, columns, same_sign, dtype, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(columns, out, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.abs() if same_sign else linear.weight)
        # zeros among what is kept, of both signs
        linear.weight.masked_fill_(torch.rand(out, columns) < 0.1, -0.0)
    model = nn.Sequential(linear)
    original = linear.weight.detach().clone()
    sparse = sc.sparsify(model, name, sgd(model), steps=1)
    kept = torch.where(sparse.masks["0"], original, 0)
    assert torch.equal(bits(linear.weight.detach()), bits(slowly(kept, name)))


@pytest.mark.parametrize("method", ["fixed", "sr-ste", "rigl"])
@pytest.mark.parametrize("name", [A8, "2:4+int8"])
def test_they_are_after_every_step_and_learned_ones_stay_floats(name, method):
    model = net()
    optimizer = sgd(model, 0.5, momentum=0.9, weight_decay=0.1)
    sparse = sc.sparsify(model, name, optimizer, method, steps=8)
    before = {key: each.dense.clone() for key, each in sparse._layers.items()}
    for number in range(8):
        step(model, optimizer, number)
        for key, layer in sparse._layers.items():
            kept = torch.where(sparse.masks[key], layer.dense, 0)
            assert torch.equal(bits(layer.parameter.detach()), bits(slowly(kept, name)))
            assert bool((layer.dense[~sparse.masks[key]] == 0).all()) == (method != "sr-ste")
    for key, layer in sparse._layers.items():
        assert not torch.equal(layer.dense, before[key]) and not torch.equal(layer.dense, layer.parameter)


def test_momentum_from_before_moves_no_dropped_weight():
    model = net()
    optimizer = sgd(model, 0.5, momentum=0.9)
    step(model, optimizer, 0)
    sparse = sc.sparsify(model, A8, optimizer, steps=3)
    step(model, optimizer, 1)
    for key, layer in sparse._layers.items():
        assert bool((layer.dense[~sparse.masks[key]] == 0).all())


def test_gradients_go_straight_to_the_learned_weights():
    model = net()
    optimizer = sgd(model, 0.25)
    sparse = sc.sparsify(model, "8:16+int8@a8", optimizer, steps=3)
    layer = sparse._layers["2"]
    learned, computed = layer.dense.clone(), layer.parameter.detach().clone()
    x = torch.randn(7, 40)
    hidden = nn.functional.gelu(model[0](x)).detach()
    integers, zeros, steps = rounded_rows(hidden)
    rounded = (integers - zeros) * steps
    y = rounded @ computed.T + model[2].bias.detach()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    optimizer.step()
    expected = learned - 0.25 * ((2 * y).T @ rounded) * sparse.masks["2"]
    torch.testing.assert_close(layer.dense, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sr-ste", "gradual", "obs", "movement"])
def test_gradual_masks_are_rounded_as_what_they_are_then(method):
    model = net()
    optimizer = sgd(model)
    sparse = sc.sparsify(model, "2:16+int8@a8", optimizer, method, steps=20, schedule="linear")
    seen = set()
    for number in range(20):
        step(model, optimizer, number)
        for key, layer in sparse._layers.items():
            kept = torch.where(sparse.masks[key], layer.dense, 0)
            most = int(
                nn.functional.pad(sparse.masks[key], (0, -kept.shape[1] % 16)).unflatten(1, (-1, 16)).sum(2).max()
            )
            seen.add(most)
            assert torch.equal(bits(layer.parameter.detach()), bits(slowly(kept, f"{max(most, 2)}:16+int8@a8")))
    assert len(seen) > (5 if method == "sr-ste" else 1) and min(seen) == 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(["2:4", "8:16", "1:8", "4:2:8", "3:4"]),
    out=st.integers(0, 9),
    columns=st.integers(0, 50),
    dropped=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_columns_of_kept_weights(pattern, out, columns, dropped, seed):
    generator = torch.Generator().manual_seed(seed)
    nm = row_nm(parse(pattern))
    mask = project(torch.rand(out, columns, generator=generator), parse(pattern))
    mask &= torch.rand(out, columns, generator=generator) >= dropped * (seed % 2)
    now, found = kept_columns(mask, nm)
    assert (now.n, now.m) == (nm.n, nm.m)
    groups = -(-columns // nm.m)
    assert found.shape == (out, groups * nm.n)
    for row in range(out):
        per_group = found[row].view(groups, nm.n)
        for group in range(groups):
            places = per_group[group].tolist()
            assert len(set(places)) == nm.n and all(group * nm.m <= each < (group + 1) * nm.m for each in places)
        assert set(mask[row].nonzero().flatten().tolist()) <= set(found[row].tolist())


def test_more_than_the_goal_keeps_is_found():
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, :5] = False
    assert kept_columns(mask, NM(4, 8))[0] == NM(8, 8)


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_rounded_row_by_row_in_training_and_evaluation():
    model = net()
    sc.sparsify(model, A8, sgd(model), steps=1)
    seen = []
    model[0].register_forward_hook(
        lambda module, args, named, output: seen.append([*args, *named.values()][0]), with_kwargs=True
    )
    x = torch.randn(2, 3, 40)
    x[0, 1, 4], x[1, 0, 0] = torch.nan, torch.inf
    integers, zeros, steps = rounded_rows(x.view(6, 40))
    for training in (True, False):
        model.train(training)
        model(x)
        assert torch.equal(seen[-1].view(6, 40).nan_to_num(9.0), ((integers - zeros) * steps).nan_to_num(9.0))
        assert seen[-1].isnan().all(dim=2).tolist() == [[False, True, False], [True, False, False]]
    model[0](input=x[0, 0])
    assert seen[-1].ndim == 1 and not torch.equal(seen[-1], x[0, 0])


def test_only_layers_with_integer_inputs_have_them_rounded_and_bake_ends_it():
    model = net()
    sparse = sc.sparsify(model, {"0": A8, "2": "8:16+int8"}, sgd(model), steps=1)
    assert [len(each._forward_pre_hooks) for each in model] == [1, 0, 0]
    again = copy.deepcopy(model)
    sparse.bake()
    assert [len(each._forward_pre_hooks) for each in model] == [0, 0, 0]
    # a copy keeps rounding, once, until a training of its own ends
    other = sc.sparsify(again, A8, sgd(again), steps=1)
    assert [len(each._forward_pre_hooks) for each in again] == [1, 0, 1]
    other.bake()
    assert [len(each._forward_pre_hooks) for each in again] == [0, 0, 0]


def test_models_can_be_copied_and_pickled_meanwhile():
    model = net().eval()
    sc.sparsify(model, A8, sgd(model), steps=1)
    x = torch.randn(5, 40)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert isinstance(next(iter(other[0]._forward_pre_hooks.values())), RoundedInput)
        assert torch.equal(other(x), model(x))
    assert list(model.state_dict()) == list(net().state_dict())


def test_a_layer_that_gets_no_rows_gives_none():
    model = net()
    sc.sparsify(model, A8, sgd(model), steps=1)
    assert model(torch.randn(0, 40)).shape == (0, 33)


def test_checkpointing_and_autocast_see_the_same_numbers():
    x = torch.randn(6, 40, requires_grad=True)
    model = net()
    sc.sparsify(model, A8, sgd(model), steps=1)

    def gradients(run):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [x.grad, *(each.grad for each in model.parameters())]

    plain = gradients(model)
    for one, other in zip(plain, gradients(lambda x: checkpoint(model, x, use_reentrant=False)), strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    for one, other in zip(plain, mixed, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.05 * float(one.abs().max()))


@pytest.mark.slow
def test_torch_compile_takes_the_hook_whole():
    model = net()
    optimizer = sgd(model)
    sc.sparsify(model, A8, optimizer, steps=9)
    compiled = torch.compile(model, fullgraph=True)
    for number in range(2):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        plain = [each.grad.clone() for each in model.parameters()]
        model.zero_grad()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        compiled(x).square().mean().backward()
        for one, other in zip(plain, model.parameters(), strict=True):
            torch.testing.assert_close(one, other.grad, rtol=1e-3, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()


# --- to the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [A8, "8:16+int8", "12:16+int8@a8"])
@pytest.mark.parametrize("method", ["fixed", "sr-ste"])
def test_the_compiled_model_does_what_the_trained_one_did(name, method):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = sc.sparsify(model, name, optimizer, method, steps=10)
    for number in range(10):
        step(model, optimizer, number)
    model.eval()
    x = torch.randn(50, 40)
    trained, weights = model(x).detach(), {key: each.parameter.detach().clone() for key, each in sparse._layers.items()}
    sparse.bake()
    assert not torch.equal(model(x), trained)
    sc.compile(model, name, where="everywhere")
    for key, weight in weights.items():
        layer = model.get_submodule(key)
        assert str(layer.numbers) == name.partition("+")[2]
        assert torch.equal(layer.packed().unpack(), weight)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fixed", "gradual", "movement", "sr-ste"])
def test_an_earlier_model_that_is_loaded_is_what_is_baked(method):
    model = net().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = sc.sparsify(model, A8, optimizer, method, steps=8)
    for number in range(6):
        step(model, optimizer, number)
    best = copy.deepcopy(model.state_dict())
    for number in range(6, 8):
        step(model, optimizer, number)
    model.load_state_dict(best)
    masks = sparse.masks
    sparse.bake()
    for key, value in model.state_dict().items():
        mask = masks.get(key.removesuffix(".weight"))  # those of now, of which an earlier model may know nothing
        assert torch.equal(value, best[key] if mask is None else best[key].masked_fill(~mask, 0.0))


def test_what_nobody_wrote_stays_learned_in_floats():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = sc.sparsify(model, A8, optimizer, "sr-ste", steps=4)
    learned = [each.dense.clone() for each in sparse._layers.values()]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    step(model, optimizer, 0)
    for each, before in zip(sparse._layers.values(), learned, strict=True):
        assert torch.equal(each.dense, before)


def test_training_goes_on_bit_for_bit():
    def begun():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, sc.sparsify(model, A8, optimizer, "sr-ste", steps=8)

    model, optimizer, sparse = begun()
    for number in range(4):
        step(model, optimizer, number)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), sparse.state_dict()], file)
    file.seek(0)
    for number in range(4, 8):
        step(model, optimizer, number)

    other, optimizer, resumed = begun()
    for each, state in zip((other, optimizer, resumed), torch.load(file), strict=True):
        each.load_state_dict(state)
    for number in range(4, 8):
        step(other, optimizer, number)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(one.detach()), bits(two.detach()))
    for one, two in zip(sparse._layers.values(), resumed._layers.values(), strict=True):
        assert torch.equal(bits(one.dense), bits(two.dense))


def test_an_encoder_of_torch_goes_through_its_layers_in_evaluation_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    optimizer = sgd(model)
    sparse = sc.sparsify(model, A8, optimizer, steps=2)
    x, padding = torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    for _ in range(2):
        model(x, src_key_padding_mask=padding).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(x, src_key_padding_mask=padding).detach()[~padding]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding)[~padding], trained)
        sparse.bake()
        assert model.use_nested_tensor
        sc.compile(model, A8, where="everywhere")
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], trained, rtol=1e-4, atol=1e-4)


def test_a_state_of_other_numbers_is_refused():
    states = {}
    for name in ("8:16", A8):
        model = net()
        states[name] = sc.sparsify(model, name, sgd(model), steps=3)
    with pytest.raises(ModelError, match=r'has it in 8:16, .* "0" in 8:16\+int8@a8'):
        states[A8].load_state_dict(states["8:16"].state_dict())


def test_a_convolution_in_integers_is_refused():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 16))
    with pytest.raises(PatternError, match='"0" is a convolution, and int8@a8 is for linear layers; give it'):
        sc.sparsify(model, A8, sgd(model), steps=1)
    assert not any(each._forward_pre_hooks for each in model)
    sparse = sc.sparsify(model, {"0": "8:16", "2": A8}, sgd(model), steps=1)
    assert sorted(sparse.patterns) == ["0", "2"]


def test_conv1d_of_hugging_face():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(24, 32))
    original = model[0].weight.detach().clone()
    sparse = sc.sparsify(model, A8, sgd(model), steps=1)
    kept = torch.where(sparse.masks["0"], original.T, 0)
    assert torch.equal(model[0].weight.detach(), slowly(kept, A8).T)
