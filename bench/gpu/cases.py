"""What the GPU sweep measures: linear layers of real models at batch sizes from decoding to prefill. Pure values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# out x in of each kind of linear layer, from the models' published configurations
MODELS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Qwen2.5-14B": ((5120, 5120), (1024, 5120), (13824, 5120), (5120, 13824)),
    "BERT-base": ((768, 768), (3072, 768), (768, 3072)),
    "ViT-L": ((1024, 1024), (4096, 1024), (1024, 4096)),
}
TOKENS = (1, 8, 16, 64, 256, 1024, 2048, 4096, 8192)
SQUARES = (4096, 8192)
# in which order batch sizes are measured, so that a sweep cut short has seen prefill and decoding
_FIRST = (4096, 1, 2048, 16, 8192, 8, 1024, 256, 64)


@dataclass(frozen=True)
class Case:
    """One product y [tokens, out] = x [tokens, in] W^T, and where it occurs."""

    out: int
    columns: int
    tokens: int
    where: str

    def __str__(self) -> str:
        """Such as "4096x11008, 16 tokens"."""
        return f"{self.out}x{self.columns}, {self.tokens} tokens"


def cases(models: Sequence[str] = tuple(MODELS), tokens: Sequence[int] = TOKENS) -> list[Case]:
    """Every distinct product, the most telling batch sizes first; shapes that models share are measured once."""
    where: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for shape in MODELS[model]:
            where.setdefault(shape, []).append(model)
    found = [Case(side, side, side, "square") for side in SQUARES]
    ordered = sorted(tokens, key=lambda count: _FIRST.index(count) if count in _FIRST else len(_FIRST))
    for count in ordered:
        found += [Case(*shape, count, ", ".join(names)) for shape, names in where.items()]
    distinct: dict[tuple[int, int, int], Case] = {}
    for case in found:
        distinct.setdefault((case.out, case.columns, case.tokens), case)
    return list(distinct.values())


def copies(case: Case, l2_bytes: int, bytes_per_value: int = 2, most: int = 160, memory: int = 8 << 30) -> int:
    """Weights and inputs to rotate over, so that none is left in L2 when its turn comes again: 3 times its size.

    The compressed weight is 9/16 of the dense one and sets the count, which is the same for every engine.
    """
    weight = case.out * case.columns * bytes_per_value * 9 // 16
    activations = case.tokens * (case.columns + case.out) * bytes_per_value
    wanted = -(-3 * l2_bytes // max(weight + activations, 1))
    # dense and sparse forms of each copy are held by six engines or so
    affordable = memory // max(6 * case.out * case.columns * bytes_per_value + activations, 1)
    return max(2, min(wanted, most, affordable))
