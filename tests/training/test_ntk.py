"""The neural tangent kernel against its definition: one gradient for each example and output, of the whole batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import sparsecomp as sc
from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.models.layers import find_layers
from sparsecomp.training.ntk import NTK


def twin(model: nn.Module, outputs: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    """[B, B, C, C] in float64; ``outputs`` [B, ...] were computed with gradients by a model with masks applied."""
    kept = (
        {id(ref.parameter): ref.from_matrix(masks[name]) for name, ref in find_layers(model).items()} if masks else {}
    )
    parameters = [each for each in model.parameters() if each.requires_grad]
    flat = outputs.flatten(1)
    rows = []
    for i in range(flat.shape[0]):
        for c in range(flat.shape[1]):
            found = torch.autograd.grad(flat[i, c], parameters, retain_graph=True, allow_unused=True)
            parts = []
            for each, parameter in zip(found, parameters, strict=True):
                each = torch.zeros_like(parameter) if each is None else each
                parts.append((each * kept.get(id(parameter), 1)).flatten().double())
            rows.append(torch.cat(parts))
    jacobian = torch.stack(rows).view(*flat.shape, -1)
    return torch.einsum("icp,jdp->ijcd", jacobian, jacobian)


def mlp(width: int = 7) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def conv() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize(("rows", "chunk_size"), [(1, 1), (2, 100), (6, 400), (6, 2**20)])
def test_it_is_the_product_of_gradients_however_it_is_cut(rows, chunk_size):
    model, x = mlp(), torch.randn(rows, 5)
    want = twin(model, model(x))
    full = sc.ntk(model, x, full=True, chunk_size=chunk_size)
    trace = sc.ntk(model, x, chunk_size=chunk_size)
    assert full.kernel.dtype == trace.kernel.dtype == torch.float64
    torch.testing.assert_close(full.kernel, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.kernel, torch.einsum("ijcc->ij", want), rtol=1e-5, atol=1e-6)


def test_a_convolution_in_eval_mode_and_nothing_of_the_model_changes():
    model, x = conv().train(), torch.randn(4, 2, 4, 4)
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    want = twin(model, copy_of_eval(model)(x))
    got = sc.ntk(model, x, full=True).kernel
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert [each.training for each in model.modules()] == modes
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


def copy_of_eval(model):
    """The same parameters, in eval mode."""

    def run(x):
        modes = [(each, each.training) for each in model.modules()]
        model.eval()
        y = model(x)
        for each, mode in modes:
            each.training = mode
        return y

    return run


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (conv, (2, 4, 4))])
def test_dropped_weights_count_as_zero_and_do_not_learn(make, shape):
    model, x = make().eval(), torch.randn(3, *shape)
    masks = {name: torch.rand(ref.shape) < 0.4 for name, ref in find_layers(model).items()}
    got = sc.ntk(model, x, masks=masks, full=True, chunk_size=300)
    pruned = copy.deepcopy(model)
    for name, ref in find_layers(pruned).items():
        ref.set_weight(ref.get_weight() * masks[name])
    torch.testing.assert_close(got.kernel, twin(pruned, pruned(x), masks), rtol=1e-5, atol=1e-6)
    # of the pruned model without masks, the dropped weights learn
    torch.testing.assert_close(sc.ntk(pruned, x, full=True).kernel, twin(pruned, pruned(x)), rtol=1e-5, atol=1e-6)


def test_only_parameters_that_require_a_gradient_learn():
    model, x = mlp(), torch.randn(3, 5)
    model[2].requires_grad_(False)
    torch.testing.assert_close(sc.ntk(model, x, full=True).kernel, twin(model, model(x)), rtol=1e-5, atol=1e-6)


def test_tied_weights_are_counted_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(3, 4)
    torch.testing.assert_close(sc.ntk(model, x, full=True).kernel, twin(model, model(x)), rtol=1e-5, atol=1e-6)


class Tokens(nn.Module):
    """An embedding, attention over the tokens of each text, and a result that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = (
            nn.Embedding(11, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, ids, scale):
        h = self.embed(ids) * scale
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return {"logits": self.head(h.mean(dim=1))}


def test_a_batch_by_name_and_an_output_that_is_named():
    torch.manual_seed(0)
    model = Tokens().eval()
    batch = {"ids": torch.randint(0, 11, (3, 4)), "scale": torch.tensor(0.5)}
    got = sc.ntk(model, batch, output=lambda result, batch: result["logits"], full=True, chunk_size=1000)
    torch.testing.assert_close(got.kernel, twin(model, model(**batch)["logits"]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"output is a dict; .* output=lambda"):
        sc.ntk(model, batch)
    with pytest.raises(ModelError, match=r"torch\.int64"):
        sc.ntk(model, batch, output=lambda result, batch: result["logits"].argmax(dim=1))


def test_no_example_and_no_gradients_around_it():
    with torch.no_grad():
        assert sc.ntk(mlp(), torch.randn(0, 5)).kernel.shape == (0, 0)
        assert sc.ntk(mlp(), torch.randn(0, 5), full=True).kernel.shape == (0, 0, 3, 3)
        x = torch.randn(2, 5)
        got = sc.ntk(mlp(), x).kernel
    torch.testing.assert_close(got, sc.ntk(mlp(), x).kernel)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x):
        return self.linear(x - x.mean(dim=0))


def test_what_has_no_kernel_is_refused_in_a_sentence():
    x = torch.randn(3, 5)
    with pytest.raises(ModelError, match="example 0 alone is another"):
        sc.ntk(Mixing(), x)
    with pytest.raises(ModelError, match="no parameter of the model requires a gradient"):
        sc.ntk(mlp().requires_grad_(False), x)
    with pytest.raises(CalibrationError, match="batch 0"):
        sc.ntk(mlp(), torch.randn(3, 6))
    with pytest.raises(ModelError, match="output is a tuple"):
        sc.ntk(nn.LSTM(5, 2), x)
    with pytest.raises(ModelError, match=r"give torch\.bool"):
        sc.ntk(mlp(), x, masks={"0": torch.ones(7, 5)})
    with pytest.raises(ModelError, match="no layer with a matrix"):
        sc.ntk(mlp(), x, masks={"1": torch.ones(7, 5, dtype=torch.bool)})
    with pytest.raises(ModelError, match="gives \\(5,\\) for an example alone"):
        sc.ntk(mlp(), x, output=lambda result, batch: torch.ones(5) * result.sum())


def test_effective_rank_is_the_exponential_of_the_entropy():
    assert NTK(torch.eye(6, dtype=torch.float64)).effective_rank == pytest.approx(6.0)
    assert NTK(torch.ones(6, 6, dtype=torch.float64)).effective_rank == pytest.approx(1.0)
    three_to_one = NTK(torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)))
    assert three_to_one.effective_rank == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    with pytest.raises(ModelError, match="zero"):
        NTK(torch.zeros(2, 2, dtype=torch.float64)).effective_rank  # noqa: B018


def test_the_rank_of_a_full_kernel_is_that_of_its_matrix():
    found = sc.ntk(mlp(), torch.randn(4, 5), full=True)
    rows = torch.stack([torch.cat([found.kernel[i, j] for j in range(4)], dim=1) for i in range(4)]).flatten(0, 1)
    assert torch.equal(found.matrix, rows) and torch.allclose(rows, rows.t())
    values = torch.linalg.eigvalsh(rows).clamp_min(1e-300)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()))


@pytest.mark.parametrize("full", [False, True])
def test_alignment_is_a_cosine(full):
    x = torch.randn(5, 5)
    one, other = (sc.ntk(mlp(width), x, full=full) for width in (7, 9))
    a, b = one.kernel.flatten(), other.kernel.flatten()
    assert one.alignment(other) == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    assert one.alignment(one) == pytest.approx(1.0) and one.alignment(one, centred=True) == pytest.approx(1.0)
    centre = torch.eye(5, dtype=torch.float64) - 1 / 5
    mine, its = (torch.einsum("ij,jk...,kl->il...", centre, each.kernel, centre).flatten() for each in (one, other))
    assert one.alignment(other, centred=True) == pytest.approx(float(mine @ its / (mine.norm() * its.norm())))
    assert NTK(3 * one.kernel).alignment(one) == pytest.approx(1.0)


def test_kernels_that_cannot_be_compared():
    x = torch.randn(3, 5)
    with pytest.raises(ModelError, match="same batch"):
        sc.ntk(mlp(), x).alignment(sc.ntk(mlp(), x[:2]))
    constant = NTK(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ModelError, match="zero"):
        constant.alignment(sc.ntk(mlp(), x), centred=True)


def test_bfloat16_and_float64():
    x = torch.randn(4, 5)
    wide = sc.ntk(mlp().double(), x.double()).kernel
    torch.testing.assert_close(sc.ntk(mlp(), x).kernel, wide, rtol=1e-5, atol=1e-6)
    narrow = sc.ntk(mlp().bfloat16(), x.bfloat16()).kernel
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=0.2, atol=0.2)
