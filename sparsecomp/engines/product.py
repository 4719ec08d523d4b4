"""One engine's part of a sweep, run in the engine's own process: operands from seeds, a checked product, timed samples.

Takes an engine and a case, gives errors and seconds. Knows nothing of the other engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

import sparsecomp as sc
from sparsecomp.engines.base import DTYPES, Engine, Loaded, Operands, Runner
from sparsecomp.engines.timing import Sampler, wait_until_idle


class Product:
    """y = x W^T + b by one engine on ``threads`` threads; the same case has the same operands in every process."""

    def __init__(self, engine: Engine, threads: int) -> None:
        """Nothing is loaded yet."""
        self._engine, self._threads = engine, threads
        self._checked: dict[int, Tensor] = {}  # weights by the number of copies that ends with them
        self._bias: Tensor | None = None
        self._dtype = ""
        self._loaded: Loaded | None = None
        self._runner: Runner | None = None
        self._sampler: Sampler | None = None

    @torch.inference_mode()
    def load(self, shape: tuple[int, int], dtype: str, copies: int) -> None:
        """Draw ``copies`` weights and a bias of values that the dtype holds exactly, and bring them into its form."""
        self.clear()  # what was loaded before would double the memory
        generator = torch.Generator(device="cpu").manual_seed(shape[0] * 31 + shape[1])
        weights = [self._fitting(_random(shape, dtype, generator, shape[1] ** -0.5)) for _ in range(copies)]
        bias = _random(shape[:1], dtype, generator, 1.0)
        self._loaded = self._engine.load(Operands(weights, bias, dtype))
        # the others would double the memory where the engine has a form of its own
        self._checked, self._bias, self._dtype = {1: weights[0], copies: weights[-1]}, bias, dtype

    def _fitting(self, weight: Tensor) -> Tensor:
        pattern = self._engine.pattern
        return weight if pattern is None else sc.prune_weight(weight, pattern).weight

    def clear(self) -> None:
        """Forget what was loaded."""
        self._bias = self._loaded = self._runner = self._sampler = None
        self._checked = {}

    @torch.inference_mode()
    def bind(self, batch: int, copies: int) -> float:
        """Bind an input of so many rows to the first ``copies`` weights: one, or as many as were loaded.

        Returns the relative Frobenius distance of the last product to float64.
        """
        assert self._bias is not None and self._loaded is not None
        self._runner = self._sampler = None
        weight, bias = self._checked[copies], self._bias
        x = _random((batch, weight.shape[1]), self._dtype, torch.Generator(device="cpu").manual_seed(batch), 1.0)
        self._runner = runner = self._loaded.bind(x, self._threads, copies)
        self._sampler = Sampler(runner.call, after_sleep=self._threads > 1)
        runner.call()
        truth = x.double() @ self._engine.effective(weight).double().T + bias.double()
        error = float((runner.result().double() - truth).norm() / truth.norm())
        self._settle()
        return error

    @torch.inference_mode()
    def sample(self) -> float:
        """Seconds of one call, by this process's own clock; it returns when the engine's threads have gone to sleep."""
        assert self._sampler is not None
        seconds = self._sampler()
        self._settle()
        return seconds

    def _settle(self) -> None:
        if self._threads > 1:
            wait_until_idle()


def _random(shape: tuple[int, ...], dtype: str, generator: torch.Generator, scale: float) -> Tensor:
    return (
        (torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * scale).to(DTYPES[dtype]).float()
    )
