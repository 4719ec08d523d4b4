"""The two moments around an optimizer's step, whoever calls it: a plain loop, a GradScaler, a loop with closures.

Takes an optimizer and two functions. Knows no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from sparsecomp.errors import ModelError


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside what Accelerate and Lightning put around it; ModelError for anything else."""
    seen = optimizer
    while not _is_plain(seen) and hasattr(seen, "optimizer"):
        seen = seen.optimizer
    if not isinstance(seen, torch.optim.Optimizer):
        raise ModelError(
            f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer that steps on the weights"
        )
    if isinstance(seen, torch.optim.LBFGS):
        raise ModelError("LBFGS calls the model several times within a step; sparse training takes other optimizers")
    return seen


def _is_plain(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


class StepHooks:
    """Calls ``before`` when gradients are complete and the optimizer is about to step, ``after`` when it has.

    ``before`` says whether the step may happen: where it returns False the parameters keep their values, as an
    optimizer passes over a parameter without a gradient, and ``after`` is not called. A closure is run first.
    """

    def __init__(  # noqa: D107  (the class says it)
        self, optimizer: torch.optim.Optimizer, before: Callable[[], bool], after: Callable[[], None]
    ) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._stepping = False
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for each in self._handles:
            each.remove()

    def _enter(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer itself
        if closure is None:
            self._begin()
            return None

        def closed() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._begin()
            return loss

        return ((args[0], closed, *args[2:]), {key: each for key, each in kwargs.items() if key != "closure"})

    def _begin(self) -> None:
        self._stepping = False
        scale, overflow = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if overflow is not None and bool(overflow):
            return  # the scaler has the optimizer pass over this step
        if scale is not None:
            # an optimizer that unscales gradients itself would do so after they are read here
            with torch.no_grad():
                for each in gradients(self._optimizer):
                    each.div_(scale.to(each.device))
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
        with torch.no_grad():
            self._stepping = self._before()
        if not self._stepping:
            for each in parameters(self._optimizer):
                each.grad = None

    def _leave(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping:
            self._stepping = False
            with torch.no_grad():
                self._after()


def parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    """All parameters that the optimizer holds."""
    return (each for group in optimizer.param_groups for each in group["params"])


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The gradients that there are."""
    return [each.grad for each in parameters(optimizer) if each.grad is not None]


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number of them is NaN or infinite; of a sparse tensor the values it holds."""
    for each in tensors:
        values = each._values() if each.is_sparse else each
        if not bool(torch.isfinite(values).all()):
            return False
    return True
