"""A module whose parameters can be tried with other values and learn from a loss, before any is written.

Takes a module, masks and a loss of its calls. Knows nothing of steps, batches and when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sparsecomp.errors import MethodError, ModelError
from sparsecomp.modules.snapshot import ModuleState, clone, copied, put

Call = Callable[..., Any]
Loss = Callable[[Call, int], Tensor]


def tunable(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that tuning may change, by name: those in ``masks``, biases and norms.

    Biases and norms are the floating-point parameters of at most one dimension.
    """
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if name in masks or (parameter.ndim <= 1 and parameter.is_floating_point() and parameter.numel() > 0)
    }


class Learner:
    """Parameters in float32 apart from the module's, so that nothing is half tuned if the work is interrupted.

    While a loss is made and followed back, leaves with these values stand in the places of the module's parameters:
    what is computed once more on the way back, as activation checkpointing does, meets them as well.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        autocast: torch.dtype | None,
    ) -> None:
        """``masks`` and ``parameters`` by name; ``autocast`` is the type of matrix products, or None."""
        self.module, self.parameters, self.autocast = module, parameters, autocast
        # made under inference mode they could not be saved for the way back
        self.masks = {name: clone(each) for name, each in masks.items()}
        self.values = {name: each.detach().float().clone().requires_grad_() for name, each in parameters.items()}
        # code that computes parts once more may follow only what its inputs ask for, so that until it is known that
        # there is none, everything asks
        self.recomputes = True
        self._device = next(iter(parameters.values())).device.type
        self._state = ModuleState(module)
        names = {id(each): name for name, each in parameters.items()}
        self._places = [
            (part._parameters, key, each, names.get(id(each)))
            for part in module.modules()
            for key, each in part._parameters.items()
            if each is not None
        ]
        self._others = {id(each): _trainable(each) for _, _, each, name in self._places if name is None}
        self._buffers = [
            (part._buffers, key, each, clone(each))
            for part in module.modules()
            for key, each in part._buffers.items()
            if each is not None and each.is_inference()
        ]

    def masked(self, name: str) -> Tensor:
        """The value of that parameter, with zeros where its mask has them."""
        value = self.values[name].detach()
        mask = self.masks.get(name)
        return value if mask is None else value * mask

    @contextmanager
    def placed(self, learning: bool) -> Iterator[dict[str, Tensor]]:
        """The values of now in the places of the parameters, as leaves by name."""
        leaves = {name: self.masked(name).to(each.dtype) for name, each in self.parameters.items()}
        for leaf in leaves.values():
            leaf.requires_grad_(learning)
        for other in self._others.values():
            other.grad = None
            other.requires_grad_(learning and self.recomputes and other.is_floating_point())
        try:
            for places, key, parameter, name in self._places:
                places[key] = self._others[id(parameter)] if name is None else leaves[name]  # type: ignore[assignment]
            for buffers, key, _, trainable in self._buffers:
                buffers[key] = trainable
            yield leaves
        finally:
            for places, key, parameter, _ in self._places:
                places[key] = parameter
            for buffers, key, buffer, _ in self._buffers:
                buffers[key] = buffer
            self._state.restore()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if self.recomputes and torch.is_grad_enabled():
            with suppress(ModelError):  # what cannot be copied asks for nothing
                args, kwargs = copied((args, kwargs), _asking)
        # an autocast around this one would keep the casts of every step's leaves
        with torch.autocast(self._device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            return self.module(*args, **kwargs)

    def evaluate(self, loss: Loss, batches: Sequence[int]) -> float:
        """The mean loss of these batches."""
        total = 0.0
        for index in batches:
            with torch.no_grad(), self.placed(learning=False):
                total += float(loss(self.call, index))
        return total / len(batches)

    def learn(self, name: str, loss: Loss, index: int) -> bool:
        """Give the values the gradients of the loss of a batch; False if the loss is not finite."""
        with torch.enable_grad(), self.placed(learning=True) as leaves:
            value = loss(self.call, index)
            if not bool(torch.isfinite(value)):
                return False
            if value.requires_grad:
                recomputes = self.recomputes and _runs_own_code(value)
                _follow_back(name, value)
                self.recomputes = recomputes
            watched = self.masks or leaves
            if all(leaves[each].grad is None for each in watched):
                raise MethodError(
                    f"{name}: no gradient reaches its weights, as where a forward runs under torch.no_grad or "
                    "torch.inference_mode, so that it cannot be tuned; take that off the forward, or leave tuning out"
                )
        for each, leaf in leaves.items():
            mask = self.masks.get(each)
            gradient = None if leaf.grad is None else leaf.grad.float()
            self.values[each].grad = gradient if gradient is None or mask is None else gradient * mask
        return True

    def write(self) -> None:
        """Put the values of now into the module."""
        for name, parameter in self.parameters.items():
            put(parameter, self.masked(name))


def _trainable(parameter: Tensor) -> Tensor:
    """The same numbers, apart from gradients that the caller may have; a copy if made under inference mode."""
    return clone(parameter) if parameter.is_inference() else parameter.detach()


def _follow_back(name: str, loss: Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MethodError(
            f"{name}: its gradient cannot be computed ({' '.join(str(error).split())[:160]}), so that it cannot be "
            "tuned; repair its forward, or leave tuning out"
        ) from error


def _asking(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # not itself a leaf, for a block may write into it
    return tensor.detach().requires_grad_().clone()


def _runs_own_code(value: Tensor) -> bool:
    """Whether the way back from ``value`` runs Python code of someone's own, such as a reentrant checkpoint's."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting.extend(each for each, _ in node.next_functions)
    return False
