"""The two moments around a step, and the optimizer within what wraps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsecomp.errors import ModelError
from sparsecomp.training.hooks import StepHooks, finite, innermost


def watched(optimizer: torch.optim.Optimizer, happens: bool = True) -> tuple[StepHooks, list[str]]:
    calls: list[str] = []

    def before() -> bool:
        calls.append("before")
        return happens

    return StepHooks(optimizer, before, lambda: calls.append("after")), calls


def one() -> tuple[nn.Parameter, torch.optim.SGD]:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return parameter, torch.optim.SGD([parameter], lr=0.5)


def test_the_users_own_hooks_run_in_their_order() -> None:
    parameter, optimizer = one()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("mine before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("mine after"))
    hooks = StepHooks(optimizer, lambda: calls.append("before") is None, lambda: calls.append("after"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("later before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("later after"))
    optimizer.step()
    assert calls == ["mine before", "before", "later before", "mine after", "after", "later after"]
    calls.clear()
    hooks.remove()
    optimizer.step()
    assert calls == ["mine before", "later before", "mine after", "later after"]
    assert torch.equal(parameter.detach(), torch.zeros(3))


def test_a_pre_hook_may_still_change_the_arguments() -> None:
    parameter, optimizer = one()
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "closure": lambda: 7.0}))
    _, calls = watched(optimizer)
    optimizer.register_step_post_hook(lambda _, args, kwargs: seen.append(kwargs))
    assert optimizer.step() == 7.0
    assert calls == ["before", "after"] and torch.equal(parameter.detach(), torch.full((3,), 0.5))


def test_a_step_that_may_not_happen_leaves_parameters_and_has_no_after() -> None:
    parameter, optimizer = one()
    _, calls = watched(optimizer, happens=False)
    optimizer.step()
    assert calls == ["before"] and parameter.grad is None and torch.equal(parameter.detach(), torch.ones(3))


def test_the_closure_runs_first_with_gradients_on() -> None:
    parameter, optimizer = one()
    order: list[str] = []
    StepHooks(optimizer, lambda: order.append("before") is None, lambda: order.append("after"))

    def closure() -> float:
        order.append("closure")
        assert torch.is_grad_enabled()
        (parameter.sum() * 2).backward()
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert order == ["closure", "before", "after"]
    assert torch.equal(parameter.detach(), torch.full((3,), -0.5))


@pytest.mark.parametrize("overflows", [False, True])
def test_an_optimizer_that_unscales_gets_gradients_of_scale_one(overflows: bool) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen: list[torch.Tensor] = []

    def before() -> bool:
        assert parameter.grad is not None
        seen.append(parameter.grad.clone())
        return True

    StepHooks(optimizer, before, lambda: seen.append(parameter.detach().clone()))
    scaler.scale(parameter.sum() * (torch.inf if overflows else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.full((3,), 1.0 if overflows else 0.5))
    assert len(seen) == (0 if overflows else 2)
    assert overflows or torch.equal(seen[0], torch.ones(3))


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_the_innermost_optimizer_is_found() -> None:
    _, optimizer = one()
    assert innermost(optimizer) is optimizer
    assert innermost(Wrapper(Wrapper(optimizer))) is optimizer


@pytest.mark.parametrize("wrong", [None, "adam", Wrapper(None), torch.optim.SGD])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"pass the torch\.optim\.Optimizer that steps on the weights"):
        innermost(wrong)


def test_lbfgs_is_refused() -> None:
    parameter, _ = one()
    with pytest.raises(ModelError, match="LBFGS calls the model several times within a step"):
        innermost(torch.optim.LBFGS([parameter]))


def test_finite_numbers() -> None:
    sparse = torch.sparse_coo_tensor([[1]], [[torch.inf]], (3, 1))
    assert finite([]) and finite([torch.ones(2), torch.zeros(0)])
    assert not finite([torch.ones(2), torch.tensor([torch.nan])]) and not finite([sparse])
