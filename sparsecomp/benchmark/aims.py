"""What the CPU kernels are held to, on each kind of machine: the least ratio to the best dense engine, as a list.

For each precision, pattern and size. Knows nothing of engines and measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Shapes = tuple[tuple[int, int], ...]

LARGE: Shapes = ((4096, 4096),)
LARGEST: Shapes = ((4096, 4096), (11008, 4096))
SMALL: Shapes = ((768, 768), (3072, 768), (384, 1536))
WIDE_SHAPES: Shapes = ((3072, 768),)
TINY: Shapes = ((384, 384),)
INT8_SHAPES: Shapes = ((384, 384), (768, 768), (3072, 768))
MANY = (8, 32, 128, 512)

# kinds of machines, by what dense and sparse kernels both can use
ANY, WIDE, AVX2, VNNI = "any machine", "all but AVX2 alone", "AVX2 without VNNI", "AVX-512 with VNNI"


def kinds(isa: str, vnni: bool) -> tuple[str, ...]:
    """The kinds that a machine is of whose kernels use ``isa``; a processor with VNNI held to AVX2 is of no own kind.

    There the dense engines would go on using what ours are kept from.
    """
    if isa == "avx2":
        return (ANY,) if vnni else (ANY, AVX2)
    return (ANY, WIDE, VNNI) if isa.startswith("avx512") and vnni else (ANY, WIDE)


@dataclass(frozen=True)
class Goal:
    """Rows of one kind: ``least`` is what each must reach over the best dense engine, ``aim`` what is hoped for.

    ``weights`` are "cold" where a dense weight does not fit the last-level cache of the machines aimed at (32 MB).
    ``pattern`` may be several, "2:4 or 4:8", of which the fastest counts in each case. ``over`` is "same" where the
    dense engine multiplies the same numbers, "other" where int8 stands against floats. ``counted`` is the bound that
    counting instructions gives, where the one by bytes and products says too much; ``kind`` is a kind of machine.
    """

    dtype: str
    pattern: str
    shapes: Shapes
    batches: tuple[int, ...]
    weights: str
    least: float
    aim: float
    kind: str = WIDE
    over: Literal["same", "other"] = "same"
    counted: float | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of which the fastest counts."""
        return tuple(self.pattern.split(" or "))

    def covers(self, row: dict[str, Any]) -> bool:
        """Whether a row of a result is one of these."""
        fits = row["pattern"] in self.patterns and (row["dtype"], row["weights"]) == (self.dtype, self.weights)
        return fits and (row["out"], row["in"]) in self.shapes and row["batch"] in self.batches


def _both(
    dtype: str, pattern: str, batches: tuple[int, ...], largest: tuple[int, ...], least: float, aim: float
) -> tuple[Goal, ...]:
    """3072x768, which fits the cache, and 4096x4096, which does not, up to the ``largest`` batches."""
    wide = Goal(dtype, pattern, WIDE_SHAPES, batches, "warm", least, aim)
    return wide, Goal(dtype, pattern, LARGE, largest, "cold", least, aim)


def _avx2(
    dtype: str, batches: tuple[int, ...], least: float, aim: float, counted: float | None = None
) -> tuple[Goal, ...]:
    """Small layers and a large one in 2:4 or 4:8, where AVX2 is all there is."""
    facts = dtype, "2:4 or 4:8"
    warm = Goal(*facts, SMALL + TINY, batches, "warm", least, aim, AVX2, counted=counted)
    return warm, Goal(*facts, LARGE, batches, "cold", least, aim, AVX2, counted=counted)


def _int8(
    pattern: str,
    batches: tuple[int, ...],
    least: float,
    aim: float,
    kind: str,
    over: Literal["same", "other"] = "same",
    counted: float | None = None,
) -> tuple[Goal, ...]:
    """int8 weights and activations in layers of 384x384 to 4096x4096, the largest from memory."""
    facts = "fp32", f"{pattern}+int8@a8"
    warm = Goal(*facts, INT8_SHAPES, batches, "warm", least, aim, kind, over, counted)
    return warm, Goal(*facts, LARGE, batches, "cold", least, aim, kind, over, counted)


GOALS = (
    Goal("fp32", "2:4", LARGEST, (1,), "cold", 1.7, 1.85),
    Goal("fp32", "2:4", LARGE, (2, 4, 8, 16), "cold", 1.7, 2.0),
    Goal("fp32", "2:4", SMALL, (1, 4, 16), "warm", 1.25, 1.6),
    *_both("fp32", "2:4", (32, 64), (32, 64), 1.35, 1.7),
    *_both("fp32", "2:4", (128, 512, 2048), (128, 512), 1.5, 1.8),
    *_both("fp32", "2:4@v4", (64, 128, 512, 2048), (64, 128, 512), 1.5, 1.8),
    Goal("bf16", "2:4", LARGEST, (1, 2, 4), "cold", 1.6, 1.75),
    *_both("bf16", "2:4", (8, 16, 32, 64), (8, 16, 32, 64), 1.35, 1.7),
    *_both("bf16", "2:4", (128, 512, 2048), (128, 512), 1.1, 1.6),
    *_both("bf16", "2:4@v4", (128, 512, 2048), (128, 512), 1.4, 1.6),
    Goal("fp32", "2:4+int8", LARGE, (1,), "cold", 3.0, 5.0),
    Goal("fp32", "8:16", LARGEST, (1,), "cold", 1.65, 1.8),
    Goal("fp32", "8:16", SMALL + TINY, (1,), "warm", 1.65, 1.8),
    Goal("fp32", "8:16", LARGE, (2, 4, 8, 16, 32, 64, 128, 512), "cold", 1.4, 1.6),
    Goal("fp32", "8:16", WIDE_SHAPES, (4, 16, 32, 64, 128, 512, 2048), "warm", 1.4, 1.6),
    Goal("fp32", "8:16", ((768, 768), (384, 1536), (384, 384)), (4, 16, 128), "warm", 1.4, 1.6),
    Goal("fp32", "4:16", SMALL + TINY, (128,), "warm", 2.5, 3.2),
    Goal("fp32", "4:16", LARGE, (128,), "cold", 2.5, 3.2),
    Goal("fp32", "12:16", SMALL + TINY, (128,), "warm", 0.97, 1.1),
    Goal("fp32", "12:16", LARGE, (128,), "cold", 0.97, 1.1),
    Goal("fp32", "1:4", WIDE_SHAPES, (128,), "warm", 2.2, 3.0),
    Goal("fp32", "block16x16:0.25", WIDE_SHAPES, (128,), "warm", 2.2, 3.0),
    # AVX2 alone: a permutation of floats costs more than what it saves at few columns, bytes are shuffled at once
    Goal("fp32", "2:4 or 4:8", LARGEST, (1,), "cold", 1.65, 1.8, AVX2),
    *_avx2("fp32", (2, 4, 7), 1.0, 1.3),
    *_avx2("fp32", (8, 16, 24), 1.15, 1.5),
    *_avx2("fp32", (32, 64), 1.4, 1.6, counted=1.6),
    *_avx2("fp32", (128, 512), 1.5, 1.78, counted=1.78),
    *_avx2("bf16", (8, 16, 32, 64, 128, 512), 1.0, 1.3),
    *_int8("8:16", (1,), 2.0, 2.4, AVX2),
    *_int8("8:16", MANY, 1.6, 1.85, AVX2, counted=2.1),
    *_int8("12:16", MANY, 1.15, 1.3, AVX2, counted=1.3),
    *_int8("4:16", MANY, 2.7, 3.5, AVX2, counted=3.5),
    *_int8("8:16", MANY, 3.2, 3.8, AVX2, over="other", counted=3.8),
    *_int8("8:16", (1,), 1.3, 1.6, VNNI)[1:],
    *_int8("8:16", MANY, 1.15, 1.24, VNNI, counted=1.24),
    *_int8("16:16", MANY, 0.95, 1.0, ANY),
)
