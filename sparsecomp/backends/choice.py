"""How one layer is to run: pattern, numbers, backend, and from how many rows on by a dense product. Knows no backend.

A plan holds one for each layer, a packed layer follows one, a saved file keeps it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from sparsecomp.errors import ModelError
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import FLOAT, Numbers, weights_name


@dataclass(frozen=True)
class Choice:
    """The decision about a layer, whose weight is kept in ``pattern`` and stored in ``numbers``.

    ``backend`` is the name of the one to take, None for the first that runs the weight. Where it does not run, another
    one takes its place, unless it is ``pinned``: somebody asked for it by name. ``dense_above`` is the number of rows
    from which unpacking the weight for a dense product is faster than that backend's kernel, None for never.

    Raises ModelError for a ``dense_above`` that is neither None nor an int of 64 bits.
    """

    pattern: Pattern
    numbers: Numbers = FLOAT
    backend: str | None = None
    dense_above: int | None = None
    pinned: bool = False

    def __post_init__(self) -> None:
        """Make ``dense_above`` the int of 64 bits that the compiled product and files read; refuse what is none."""
        if self.dense_above is None:
            return
        try:
            rows = int(operator.index(self.dense_above))  # what NumPy and torch call an int is none in JSON
        except TypeError:
            rows = 1 << 63
        if abs(rows) < 1 << 63:
            object.__setattr__(self, "dense_above", rows)
            return
        raise ModelError(
            f"dense_above must be an int or None, got {self.dense_above!r}; set the number of rows from which the "
            "product is dense"
        )

    @property
    def weights(self) -> str:
        """The name of pattern and numbers, such as "2:4" or "8:16+int8@a8"."""
        return weights_name(self.pattern, self.numbers)

    @classmethod
    def asked(
        cls, pattern: Pattern, numbers: Numbers, backend: str | None = None, preferred: str | None = None
    ) -> Choice:
        """What a caller asks for who names a backend, which is then pinned, or one that is preferred, or neither."""
        return cls(pattern, numbers, preferred if backend is None else backend, pinned=backend is not None)


def unpacks(dense_above: int | None, batch: int) -> bool:
    """Whether a product of that many rows unpacks its weight. csrc/eager/product.cpp asks the same before a kernel."""
    return dense_above is not None and batch >= dense_above
