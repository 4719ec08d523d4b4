"""What a sweep measures, as a value: shapes, batches, dtypes, patterns, threads, and which dense engines."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecomp.engines.base import Engine
from sparsecomp.engines.registry import float_engines, int8_engines


@dataclass(frozen=True)
class Settings:
    """What is measured: ``batches`` on warm weights, ``cold_batches`` on copies that exceed the cache, in turn.

    Dense int8 engines are measured beside the floating ones, unless ``int8`` leaves them out.
    """

    shapes: tuple[tuple[int, int], ...] = ((384, 384), (1536, 384), (768, 768), (3072, 768), (4096, 4096))
    batches: tuple[int, ...] = (1, 8, 32, 128)
    cold_batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    patterns: tuple[str, ...] = ("2:4", "8:16", "8:16+int8@a8")
    threads: tuple[int, ...] = (1,)
    seconds: float = 0.6
    int8: bool = True

    def dense(self) -> list[Engine]:
        """The dense engines, installed or not."""
        return [*float_engines(), *(int8_engines() if self.int8 else ())]
