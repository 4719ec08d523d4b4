"""The empirical Fisher matrix in blocks: what weights cost, and how the others make up for those that go.

Takes gradients and weights as blocks [blocks, width] of consecutive weights of a row. Knows no layer and no rule.
The formulas are those of oBERT (Kurtic et al. 2022, arXiv:2203.07259), there after Hassibi and Stork 1993.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.errors import MethodError

# matrix entries that are worked on at once, in float64
_ENTRIES = 1 << 18
# the damping where there are no gradients: far below any, and its inverse is finite
_LEAST_DAMP = 1e-30
# the least share of its damping alone that an entry of the inverse may have: what is smaller is rounding
_LEAST_REST = 1e-14


def block_width(columns: int, block: int, group: int) -> int:
    """The width of equal blocks that fill ``columns``, at most ``block``, which is a multiple of ``group``.

    It is one as well, so that no group of columns lies in two blocks.
    """
    parts = max(1, -(-columns // block))
    width = max(1, -(-columns // parts))
    return width + -width % group


def to_blocks(matrix: Tensor, width: int) -> Tensor:
    """[out, in] -> [out * ceil(in / width), width], zeros (False) behind the end of each row."""
    return functional.pad(matrix, (0, -matrix.shape[1] % width)).view(-1, width)


def from_blocks(blocks: Tensor, out: int, columns: int) -> Tensor:
    """The way back of ``to_blocks``."""
    return blocks.view(out, columns + -columns % blocks.shape[1])[:, :columns]


def fold(into: Tensor, gradients: Tensor) -> None:
    """Add the outer products of gradients [count, blocks, width] to sums [blocks, width, width], in place."""
    into.baddbmm_(gradients.permute(1, 2, 0), gradients.permute(1, 0, 2))


@dataclass(frozen=True, eq=False)
class Fisher:
    """F = damp * mean(diagonal) * I + the mean of g g^T, for each block of weights that are kept.

    ``gradients`` [n, blocks, width] are those that are not in ``folded`` [blocks, width, width], a sum of outer
    products; ``count`` is how many gradients there are in both. ``kept`` [blocks, width] are the weights that F speaks
    of. ``damp`` is relative to the mean of g^2 over the kept weights of all blocks.
    """

    gradients: Tensor
    folded: Tensor | None
    count: int
    kept: Tensor
    damp: float

    def diagonal(self) -> Tensor:
        """The mean of g^2, float64 [blocks, width], without damping; zero where nothing is kept."""
        total = torch.zeros(self.kept.shape, dtype=torch.float64, device=self.kept.device)
        for each in self.gradients:
            total += each.double().square()
        if self.folded is not None:
            total += self.folded.diagonal(dim1=1, dim2=2)
        return torch.where(self.kept, total / max(self.count, 1), 0.0)

    def damping(self) -> float:
        """What is added to the diagonal."""
        kept = int(self.kept.sum())
        mean = float(self.diagonal().sum()) / max(kept, 1)
        return max(self.damp * mean, _LEAST_DAMP)

    def saliency(self, weight: Tensor) -> Tensor:
        """w_i^2 / (2 [F^-1]_ii), what the loss rises by if w_i goes and the rest of its block makes up for it.

        ``weight`` is [blocks, width]; the answer is float64 of that shape, zero where nothing is kept.
        """
        found = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        for some, matrix in self._some(self.kept.any(dim=1)):
            cost = some.of(weight).double().square() / (2.0 * matrix.inverse_diagonal())
            some.write(found, torch.where(some.kept, cost, 0.0))
        return found

    def without(self, weight: Tensor, left: Tensor) -> Tensor:
        """The weights [blocks, width] after those in ``kept`` and not in ``left`` have gone, in float64.

        With S what goes and K what is left of a block, w_K becomes w_K + F_KK^-1 F_KS w_S: the least of the quadratic
        form of F over all changes of w that make w_S zero.
        """
        gone = self.kept & ~left
        found = torch.where(left, weight.double(), 0.0)
        for some, matrix in self._some(gone.any(dim=1) & left.any(dim=1)):
            going = torch.where(some.of(gone), some.of(weight).double(), 0.0)
            some.write(found, some.of(found) + matrix.answer(going, some.of(left) & some.kept))
        return found

    def _some(self, wanted: Tensor) -> Iterator[tuple[_Some, _Sum | _Few]]:
        """The wanted blocks, some at once, with what is kept moved together: few weights make small matrices."""
        counts = torch.where(wanted, self.kept.sum(dim=1), 0)
        order = counts.argsort(descending=True)
        sizes = counts[order].tolist()
        damp, begin = self.damping(), 0
        while begin < len(sizes) and sizes[begin]:
            size = sizes[begin]
            blocks = order[begin : begin + max(1, _ENTRIES // (size * size))]
            begin += len(blocks)
            kept = self.kept[blocks]
            columns = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
            some = _Some(blocks, columns, kept.gather(1, columns))
            gradients = some.gradients(self.gradients)
            if self.folded is None and self.count <= size:
                yield some, _Few(gradients, max(self.count, 1) * damp)
            else:
                yield some, _Sum(self._matrices(some, gradients, damp))

    def _matrices(self, some: _Some, gradients: Tensor, damp: float) -> Tensor:
        """F of these blocks [n, size, size], the unit matrix in the rows and columns that only fill up."""
        matrices = gradients.transpose(1, 2) @ gradients
        if self.folded is not None:
            matrices += some.square(self.folded)
        matrices /= self.count
        matrices.diagonal(dim1=1, dim2=2).add_(torch.where(some.kept, damp, 1.0))
        return matrices


@dataclass(frozen=True, eq=False)
class _Some:
    """Some blocks, ``size`` columns of each; ``kept`` [n, size] tells columns that count from those that fill up."""

    blocks: Tensor
    columns: Tensor
    kept: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same columns of a tensor [blocks, width]."""
        return whole[self.blocks].gather(1, self.columns)

    def gradients(self, whole: Tensor) -> Tensor:
        """The same columns of gradients [count, blocks, width]: float64 [n, count, size], zero where not kept."""
        columns = self.columns.expand(len(whole), -1, -1)
        found = whole[:, self.blocks].gather(2, columns).transpose(0, 1).contiguous()
        return (found * self.kept[:, None, :]).double()

    def square(self, whole: Tensor) -> Tensor:
        """The same rows and columns of matrices [blocks, width, width], zero where not kept."""
        rows = whole[self.blocks].gather(1, self.columns[:, :, None].expand(-1, -1, whole.shape[-1]))
        both = rows.gather(2, self.columns[:, None, :].expand(-1, self.columns.shape[1], -1))
        return both * (self.kept[:, :, None] & self.kept[:, None, :])

    def write(self, whole: Tensor, values: Tensor) -> None:
        """Write them back."""
        whole[self.blocks[:, None], self.columns] = values


@dataclass(frozen=True, eq=False)
class _Sum:
    """F as it is: ``matrices`` [n, size, size]."""

    matrices: Tensor

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of F^-1 [n, size]."""
        root = _root(self.matrices)
        one = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        # F^-1 = L^-T L^-1
        inverse: Tensor = torch.linalg.solve_triangular(root, one, upper=False)
        return inverse.square().sum(dim=1)

    def answer(self, going: Tensor, rest: Tensor) -> Tensor:
        """F_KK^-1 F_KS w_S [n, size], K being ``rest`` and w_S ``going``, zero elsewhere."""
        pull = (self.matrices @ going[..., None]) * rest[..., None]
        among = self.matrices * (rest[:, :, None] & rest[:, None, :])
        among.diagonal(dim1=1, dim2=2).add_(~rest)
        return torch.cholesky_solve(pull, _root(among)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class _Few:
    """F as X^T X / count + damp * I of fewer gradients X [n, count, size] than weights; ``damp`` times the count.

    All goes through the small matrix C = X X^T + damp * I [count, count] (Woodbury).
    """

    gradients: Tensor
    damp: float

    def inverse_diagonal(self) -> Tensor:
        """count / damp * (1 - the diagonal of X^T C^-1 X)."""
        image: Tensor = torch.linalg.solve_triangular(self._root(self.gradients), self.gradients, upper=False)
        count = self.gradients.shape[1]
        return (1.0 - image.square().sum(dim=1)).clamp_min(_LEAST_REST) * (max(count, 1) / self.damp)

    def answer(self, going: Tensor, rest: Tensor) -> Tensor:
        """As that of the sum: X_K^T (X_K X_K^T + damp * I)^-1 X_S w_S."""
        among = self.gradients * rest[:, None, :]
        moved = torch.cholesky_solve(self.gradients @ going[..., None], self._root(among))
        return (among.transpose(1, 2) @ moved).squeeze(-1)

    def _root(self, gradients: Tensor) -> Tensor:
        matrices = gradients @ gradients.transpose(1, 2)
        matrices.diagonal(dim1=1, dim2=2).add_(self.damp)
        return _root(matrices)


def _root(matrices: Tensor) -> Tensor:
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise MethodError("a block of the Fisher matrix is singular in float64; give a larger damp, as 1e-3")
    return root
