"""The distillation loss against its formulas, written out row by row in float64."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.errors import MethodError, ModelError
from tests.small_models import ids, reals, small


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(each / temperature) for each in row]
    return [each / sum(powers) for each in powers]


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """T^2 KL(teacher || student), the mean over rows [rows, classes]."""
    total = 0.0
    for own, given in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        q, p = softmax(own, temperature), softmax(given, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def cross_entropy(student: torch.Tensor, labels: list[int]) -> float:
    counted = [(row, label) for row, label in zip(student.double().tolist(), labels, strict=True) if label >= 0]
    return sum(-math.log(softmax(row, 1.0)[label]) for row, label in counted) / len(counted)


def distance(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Squared error of rows [rows, features], relative to the teacher's around the mean of its rows."""
    student, teacher = student.double(), teacher.double()
    return float((student - teacher).square().sum() / (teacher - teacher.mean(dim=0)).square().sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_soft_targets(temperature):
    student, teacher = numbers(5, 7, seed=1), numbers(5, 7, seed=2)
    loss = sc.distillation_loss(student, teacher, temperature=temperature)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert float(loss) == pytest.approx(divergence(student, teacher, temperature), rel=1e-5)
    assert float(sc.distillation_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_hard_targets_leave_out_labels_that_do_not_count():
    student, teacher = numbers(4, 3, seed=1), numbers(4, 3, seed=2)
    labels = torch.tensor([2, -100, 0, 1])
    hard = cross_entropy(student, labels.tolist())
    assert float(sc.distillation_loss(student, teacher, labels, soft=0.0)) == pytest.approx(hard, rel=1e-5)
    soft = divergence(student, teacher, 2.0)
    both = sc.distillation_loss(student, teacher, labels, soft=0.25, hard=3.0)
    assert float(both) == pytest.approx(0.25 * soft + 3 * hard, rel=1e-5)
    assert float(sc.distillation_loss(student, teacher, labels * 0 - 100, soft=0.0)) == 0.0


def test_causal_labels_are_those_of_the_next_token():
    student, teacher = numbers(2, 4, 5, seed=1), numbers(2, 4, 5, seed=2)
    words = torch.tensor([[1, 2, 3, 4], [4, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss = sc.distillation_loss(student, teacher, words, soft=0.0, causal=True, mask=mask)
    rows = torch.cat([student[0, :3], student[1, :1]])
    assert float(loss) == pytest.approx(cross_entropy(rows, [2, 3, 4, 0]), rel=1e-5)


def test_hidden_states_are_compared_by_the_teachers_variance():
    states = [numbers(2, 3, 4, seed=each) for each in range(3)]
    given = [numbers(2, 3, 4, seed=10 + each) for each in range(3)]
    student, teacher = SimpleNamespace(hidden_states=tuple(states)), {"hidden_states": given}
    each = [distance(a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(states, given, strict=True)]
    every = sc.distillation_loss(student, teacher, soft=0.0, hidden=2.0)
    assert float(every) == pytest.approx(2 * sum(each) / 3, rel=1e-5)
    last = sc.distillation_loss(student, teacher, soft=0.0, hidden=1.0, states=[-1])
    assert float(last) == pytest.approx(each[2], rel=1e-5)
    shallow = SimpleNamespace(hidden_states=states[:2])
    crossed = sc.distillation_loss(shallow, teacher, soft=0.0, hidden=1.0, states=[(0, 0), (1, 2)])
    wanted = (each[0] + distance(states[1].flatten(0, 1), given[2].flatten(0, 1))) / 2
    assert float(crossed) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("integers", [False, True])
def test_padding_counts_in_no_part(integers):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).to(torch.int64 if integers else torch.bool)
    real = mask.bool()
    own, given = numbers(2, 4, 6, seed=1), numbers(2, 4, 6, seed=2)
    states, wanted = numbers(2, 4, 3, seed=3), numbers(2, 4, 3, seed=4)
    labels = torch.tensor([[1, 2, 3, 4], [5, 0, 1, 2]])
    own[~real], states[~real] = torch.nan, torch.inf  # as if what is there were anything
    own.requires_grad_()
    states.requires_grad_()
    student = SimpleNamespace(logits=own, hidden_states=[states])
    teacher = SimpleNamespace(logits=given, hidden_states=[wanted])
    loss = sc.distillation_loss(student, teacher, labels.masked_fill(~real, -100), hidden=1.0, mask=mask)
    parts = (
        divergence(own[real], given[real], 2.0),
        cross_entropy(own[real], labels[real].tolist()),
        distance(states[real].detach(), wanted[real]),
    )
    assert float(loss.detach()) == pytest.approx(sum(parts), rel=1e-5)
    loss.backward()
    for each in (own, states):
        assert bool((each.grad[~real] == 0).all()) and bool((each.grad[real] != 0).any())


def test_labels_of_padding_do_not_count_though_they_are_words():
    own, given = numbers(2, 3, 6, seed=1), numbers(2, 3, 6, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels = torch.tensor([[1, 2, 0], [5, 0, 0]])
    loss = sc.distillation_loss(own, given, labels, soft=0.0, mask=mask)
    assert float(loss) == pytest.approx(cross_entropy(own[mask.bool()], [1, 2, 5]), rel=1e-5)


def test_logits_of_whole_texts_have_no_padding():
    own, given = numbers(2, 6, seed=1), numbers(2, 6, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states, wanted = numbers(2, 3, 4, seed=3), numbers(2, 3, 4, seed=4)
    student = SimpleNamespace(logits=own, hidden_states=[states])
    loss = sc.distillation_loss(student, SimpleNamespace(logits=given, hidden_states=[wanted]), hidden=1.0, mask=mask)
    real = mask.bool()
    expected = divergence(own, given, 2.0) + distance(states[real], wanted[real])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_where_no_row_counts_the_loss_is_zero():
    own, given = numbers(1, 3, 6, seed=1).requires_grad_(), numbers(1, 3, 6, seed=2)
    student, teacher = (
        SimpleNamespace(logits=own, hidden_states=[own]),
        SimpleNamespace(logits=given, hidden_states=[given]),
    )
    labels = torch.zeros(1, 3, dtype=torch.int64)
    loss = sc.distillation_loss(student, teacher, labels, hidden=1.0, mask=torch.zeros(1, 3))
    loss.backward()
    assert float(loss.detach()) == 0.0 and bool((own.grad == 0).all())
    # a single row has no variance to compare with
    one = SimpleNamespace(hidden_states=[given[:, :1]])
    loss = sc.distillation_loss(SimpleNamespace(hidden_states=[own[:, :1]]), one, soft=0.0, hidden=1.0)
    assert float(loss.detach()) == pytest.approx(float((own[:, :1] - given[:, :1]).square().sum().detach()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    student, teacher = numbers(9, 200, seed=1, dtype=dtype) * 8, numbers(9, 200, seed=2, dtype=dtype) * 8
    state = numbers(9, 8, seed=3, dtype=dtype) * 200  # squares would be infinite in float16
    given = numbers(9, 8, seed=4, dtype=dtype) * 200
    own = SimpleNamespace(logits=student, hidden_states=[state])
    other = SimpleNamespace(logits=teacher, hidden_states=[given])
    with torch.autocast("cpu", torch.bfloat16):
        loss = sc.distillation_loss(own, other, hidden=1.0)
    expected = divergence(student, teacher, 2.0) + distance(state, given)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_goes_to_the_teacher():
    student, teacher = numbers(3, 4, seed=1).requires_grad_(), numbers(3, 4, seed=2).requires_grad_()
    sc.distillation_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0.0}, MethodError, "temperature=0.0 is not above zero"),
        ({"temperature": math.nan}, MethodError, "is not above zero"),
        ({"hidden": -1.0}, MethodError, "hidden=-1.0 is no weight"),
        ({"soft": 0.0}, MethodError, "nothing is learned"),
        ({"hidden": 1.0}, ModelError, "the student gave no hidden_states; call it with output_hidden_states=True"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ModelError, r"labels are torch.int64 of shape \(3,\)"),
        ({"labels": torch.zeros(2)}, ModelError, "labels are torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64), "causal": True}, ModelError, "causal=True reads logits"),
        ({"mask": torch.ones(3)}, ModelError, r"mask has shape \(3,\)"),
        ({"teacher": torch.zeros(2, 4)}, ModelError, "the student's logits have shape"),
        ({"teacher": torch.zeros(2, 3, dtype=torch.int64)}, ModelError, "the logits of the teacher are torch.int64"),
        ({"student": SimpleNamespace(last_hidden_state=0)}, ModelError, "the logits of the student are NoneType"),
    ],
)
def test_refusals(arguments, error, message):
    given = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=message):
        sc.distillation_loss(given.pop("student"), given.pop("teacher"), **given)


def test_hidden_states_that_do_not_go_together_are_refused():
    def result(*shapes):
        return SimpleNamespace(hidden_states=[torch.zeros(shape) for shape in shapes])

    def loss(student, teacher, **more):
        return sc.distillation_loss(student, teacher, soft=0.0, hidden=1.0, **more)

    with pytest.raises(ModelError, match="the student has 1 hidden states and the teacher 2; say with states"):
        loss(result((2, 3)), result((2, 3), (2, 3)))
    with pytest.raises(ModelError, match=r"states names \(1, 1\); the student has 1"):
        loss(result((2, 3)), result((2, 3), (2, 3)), states=[1])
    with pytest.raises(ModelError, match=r"has shape \(2, 3\) in the student and \(2, 4\) in the teacher"):
        loss(result((2, 3)), result((2, 4)))


@pytest.mark.slow
def test_it_trains_a_hugging_face_model_under_masks_and_distill_goes_on_from_there():
    teacher = small("llama")
    model = copy.deepcopy(teacher).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparse = sc.sparsify(model, "2:4", optimizer, steps=30, only="model.layers.*")
    torch.manual_seed(0)
    words, mask = ids(8, 12), reals(8, 12, 9)
    inputs = {"input_ids": words, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    losses = []
    for _ in range(30):
        with torch.no_grad():
            wanted = teacher(**inputs)
        loss = sc.distillation_loss(model(**inputs), wanted, hidden=1.0, mask=mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    sparse.bake()
    masks = sparse.masks
    batches = [{"input_ids": ids(4, 12), "attention_mask": reals(4, 12, 9)} for _ in range(4)]
    report = sc.distill(model, teacher, batches, masks=masks, tuning=sc.Tuning(steps=10), show_progress=False)
    assert report.held_out_after < report.held_out_before
    for name, each in masks.items():
        weight: nn.Linear = model.get_submodule(name)
        assert bool((weight.weight[~each] == 0).all())
