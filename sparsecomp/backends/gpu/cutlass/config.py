"""The configurations in which csrc/cuda/wgmma_sp.cu is compiled, and a guess at which of them suit a product.

Knows nothing of compilers, tensors or layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

DEPTH = 128
"""Columns of one step of every configuration: the metadata layout depends on it."""

_TRIED = 3
_TYPES = {
    "float16": "cutlass::half_t",
    "bfloat16": "cutlass::bfloat16_t",
    "float8_e4m3fn": "cutlass::float_e4m3_t",
}


@dataclass(frozen=True)
class Config:
    """What one shared library is compiled for.

    A block computes ``out`` x ``tokens`` results; ``cluster_out`` x ``cluster_tokens`` blocks share what they read.
    ``pingpong``: two groups of warps work on a tile each in turn instead of together. ``element`` is torch's name for
    the type of weight and x, ``output`` that of y and bias. fp8 has scales; ``fast`` sums it as the tensor
    cores do (about 14 bits) instead of in fp32 after every step.
    """

    out: int
    tokens: int
    cluster_out: int = 1
    cluster_tokens: int = 1
    pingpong: bool = False
    element: str = "bfloat16"
    output: str = "bfloat16"
    fast: bool = False

    @property
    def scaled(self) -> bool:
        """Whether the epilogue has scales."""
        return self.element == "float8_e4m3fn"

    def __str__(self) -> str:
        """A name for files and reports, such as bfloat16-128x256-2x1."""
        types = self.element if self.element == self.output else f"{self.element}-{self.output}"
        marks = ("-pingpong" if self.pingpong else "") + ("-fast" if self.fast else "")
        return f"{types}-{self.out}x{self.tokens}-{self.cluster_out}x{self.cluster_tokens}{marks}"

    def definitions(self) -> list[str]:
        """The macros of csrc/cuda/wgmma_sp.cu, as compiler options."""
        values = {
            "ELEMENT": _TYPES[self.element],
            "OUTPUT": _TYPES[self.output],
            "SCALED": int(self.scaled),
            "FAST_ACCUMULATION": int(self.fast),
            "PINGPONG": int(self.pingpong),
            "TILE_OUT": self.out,
            "TILE_TOKENS": self.tokens,
            "CLUSTER_OUT": self.cluster_out,
            "CLUSTER_TOKENS": self.cluster_tokens,
        }
        return [f"-DSC_{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Choice:
    """A configuration and how many tiles neighbouring blocks go across before they go on (``swizzle``)."""

    config: Config
    swizzle: int = 1

    def __str__(self) -> str:
        """Such as bfloat16-128x256-2x1, swizzle 4."""
        return f"{self.config}, swizzle {self.swizzle}"


_TILES = (
    Config(128, 128, 2, 1),
    Config(256, 128, 2, 1),
    Config(128, 256, 2, 1),
    Config(64, 128, 2, 1, pingpong=True),
    Config(64, 32, pingpong=True),
)


@cache
def configs(element: str, output: str, fast: bool = False) -> tuple[Config, ...]:
    """Everything that is compiled for one pair of types."""
    return tuple(replace(tile, element=element, output=output, fast=fast) for tile in _TILES)


def candidates(options: tuple[Config, ...], out: int, tokens: int, multiprocessors: int) -> list[Choice]:
    """The few that are worth measuring for a product, the likeliest first."""
    ranked = sorted(options, key=lambda config: clocks(config, out, tokens, multiprocessors))
    choices: list[Choice] = []
    for config in ranked[:_TRIED]:
        tiles = -(-out // config.out) * -(-tokens // config.tokens)
        # which tiles share the cache matters only once they do not all run at the same time
        choices.extend(Choice(config, swizzle) for swizzle in ((1, 4) if tiles > 2 * multiprocessors else (1,)))
    return choices


def clocks(config: Config, out: int, tokens: int, multiprocessors: int) -> float:
    """A guess at the clocks of one weight column.

    An instruction m64nNk32 (16-bit) takes N/2 clocks for its products and 16 for reading the sparse operand
    from shared memory; a multiprocessor gets 64 bytes a clock from L2, shared within a cluster.
    """
    scale = 0.5 if config.scaled else 1.0  # of bytes and of clocks for each product
    multiply = config.out / 64 * (config.tokens / 2 + 16) / 32 * scale
    read = (2 * 9 / 16 * config.out / config.cluster_tokens + 2 * config.tokens / config.cluster_out) / 64 * scale
    tiles = -(-out // config.out) * -(-tokens // config.tokens)
    waves = -(-tiles // multiprocessors)
    return waves * max(multiply, read)
