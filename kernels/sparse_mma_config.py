"""Which tiles the mma.sp kernel is compiled for, and which of them suits a product. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_VALUE = 2
SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory one block may have, by compute capability (CUDA C programming guide, table of technical figures)."""

_WIDE_RESULT_TILES = 16
"""Tiles of a warp above which results of 4 bytes, finished beside the sums, would not fit the registers."""

_UNKNOWN_SHARED_BYTES = 101376
_PRODUCTS_PER_BYTE = 128


@dataclass(frozen=True)
class Config:
    """What one program computes, and how.

    A warp holds ``row_tiles`` x ``token_tiles`` tiles of 16 outputs by 8 tokens; ``warps_out`` x ``warps_tokens`` of
    them make a block. ``depth`` input columns a step, ``stages`` steps in shared memory at once. Columns are those of
    16-bit elements: what counts is bytes, so a step takes twice as many columns of int8 and half as many of fp32.
    With several ``splits`` as many blocks share the columns of a tile, and a second kernel adds their sums in order.
    """

    row_tiles: int
    token_tiles: int
    warps_out: int
    warps_tokens: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def out(self) -> int:
        """Outputs of a block."""
        return 16 * self.row_tiles * self.warps_out

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 8 * self.token_tiles * self.warps_tokens

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warps_out * self.warps_tokens

    @property
    def shared_bytes(self) -> int:
        """Bytes of the pipeline: per stage half of the weight tile and the whole tile of x."""
        return self.stages * self.depth * BYTES_PER_VALUE * (self.out // 2 + self.tokens)

    def __str__(self) -> str:
        """Such as "128x128x64, 2x2 warps, 3 stages"."""
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        return (
            f"{self.out}x{self.tokens}x{self.depth}, {self.warps_out}x{self.warps_tokens} warps, "
            f"{self.stages} stages{splits}"
        )


# A warp's 4 x 8 tiles take 128 accumulators of a thread; 64x128 a warp would spill.
CONFIGS = (
    Config(4, 8, 2, 2, 64, 3),
    Config(4, 8, 2, 2, 64, 4),
    Config(4, 8, 4, 2, 64, 3),
    Config(4, 4, 2, 2, 64, 4),
    Config(4, 4, 4, 2, 64, 4),
    Config(4, 2, 2, 2, 64, 4),
    Config(2, 4, 2, 2, 128, 3),
    Config(2, 2, 2, 2, 128, 3),
    Config(2, 2, 2, 1, 128, 4),
    Config(2, 1, 2, 1, 128, 4),
    # decoding: blocks enough for every multiprocessor, each with 16 to 24 KB of copies on the way
    Config(1, 2, 2, 1, 128, 4),
    Config(1, 1, 2, 1, 128, 4),
    Config(1, 1, 2, 1, 256, 3),
)
"""Every configuration without splits that may be chosen; the tests compile and execute each."""

DECODE_TOKENS = 16
SPLIT_CONFIGS = (
    # Reading the weight is all the time there is when decoding. A block has 18 to 30 KB on the way, and one block for
    # each multiprocessor does not keep memory busy; outputs alone do not make more of them.
    Config(1, 1, 2, 1, 128, 4, 2),
    Config(1, 1, 2, 1, 128, 4, 4),
    Config(2, 1, 2, 1, 128, 4, 4),
    Config(2, 1, 2, 1, 128, 4, 8),
    Config(1, 2, 2, 1, 128, 4, 2),
    Config(1, 2, 2, 1, 128, 4, 4),
)
"""Those that split the columns, for up to ``DECODE_TOKENS`` tokens; the tests compile and execute each."""


def configs(capability: int, result_bytes: int = 2) -> tuple[Config, ...]:
    """Those that fit sm_<capability>: the pipeline its shared memory, and results of that many bytes the registers."""
    limit = SHARED_BYTES.get(capability, _UNKNOWN_SHARED_BYTES)
    fitting = (config for config in CONFIGS if config.shared_bytes <= limit)
    if result_bytes > BYTES_PER_VALUE:
        return tuple(config for config in fitting if config.row_tiles * config.token_tiles <= _WIDE_RESULT_TILES)
    return tuple(fitting)


def choose_config(out: int, tokens: int, capability: int, multiprocessors: int, result_bytes: int = 2) -> Config:
    """The configuration expected to be fastest, from a model of how many blocks run at once.

    Blocks a multiprocessor gets times the tensor work of one, padding included, or what one moves if that takes longer:
    wide tiles win where they fill the GPU, narrow ones where there are few outputs or tokens. A guess: measure.
    """
    offered = configs(capability, result_bytes)
    return min(offered, key=lambda config: _cost(config, out, tokens, multiprocessors))


def candidates(
    out: int, tokens: int, capability: int, multiprocessors: int, count: int = 4, result_bytes: int = 2
) -> tuple[Config, ...]:
    """The ``count`` most promising configurations, best first: what an autotuner measures.

    For up to ``DECODE_TOKENS`` tokens as many that split the columns follow; all of those fit every GPU.
    """

    def best(offered: tuple[Config, ...]) -> tuple[Config, ...]:
        return tuple(sorted(offered, key=lambda config: _cost(config, out, tokens, multiprocessors))[:count])

    return best(configs(capability, result_bytes)) + (best(SPLIT_CONFIGS) if tokens <= DECODE_TOKENS else ())


def _cost(config: Config, out: int, tokens: int, multiprocessors: int) -> float:
    blocks = -(-out // config.out) * -(-tokens // config.tokens) * config.splits
    # bytes a block moves a step for each of its products, against the products that take as long as a byte
    moved = _PRODUCTS_PER_BYTE * (config.out // 2 + config.tokens)
    return -(-blocks // multiprocessors) * max(config.out * config.tokens, moved) / config.splits
