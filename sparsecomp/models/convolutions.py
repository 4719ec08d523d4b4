"""nn.Conv2d as a matrix: which convolutions have one, how the weight [out, in, kh, kw] lies in it, what it multiplies.

Takes modules and tensors. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

RUNS_DENSE = "a convolution whose kernel is larger than 1x1 stays dense in execution; sc.prune can give it zeros"
_PADDED = "a padded 1x1 convolution stays dense in execution; sc.prune can give it zeros"


def why_no_matrix(module: nn.Conv2d) -> str | None:
    """Why the weight of a convolution cannot be pruned as one matrix; None if it can."""
    if module.groups != 1:
        depthwise = module.groups == module.in_channels
        kind = "a depthwise convolution" if depthwise else "a convolution in groups"
        return f"{kind} (groups={module.groups}) stays dense: its weight is no one matrix over the input channels"
    return None


def why_runs_dense(module: nn.Conv2d) -> str | None:
    """Why a convolution of one group is no product of rows by a matrix; None for those of 1x1 without padding."""
    if tuple(module.kernel_size) != (1, 1):
        return RUNS_DENSE
    if any(amount for side in padding_of(module) for amount in side):
        return _PADDED
    return None


def padding_of(module: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows added at the top and the bottom, and columns added on the left and the right."""
    given = module.padding
    if isinstance(given, str):
        if given == "valid":
            return (0, 0), (0, 0)
        # "same": an odd one goes to the bottom and the right
        whole = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return (whole[0] // 2, whole[0] - whole[0] // 2), (whole[1] // 2, whole[1] - whole[1] // 2)
    return (int(given[0]), int(given[0])), (int(given[1]), int(given[1]))


def matrix_of(stored: Tensor) -> Tensor:
    """[out, in, kh, kw] -> [out, kh*kw*in]: for every kernel position, row by row, its input channels side by side."""
    return stored.permute(0, 2, 3, 1).reshape(stored.shape[0], -1)


def stored_of(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back of ``matrix_of`` to a tensor of ``shape`` [out, in, kh, kw]; a view where strides allow."""
    out, channels, height, width = shape
    return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Windows:
    """Where a convolution reads its input: a window of ``kernel`` positions, ``dilation`` apart, at every ``stride``.

    ``padding`` are rows at the top and bottom and columns on the left and right, filled as ``mode`` of
    torch.nn.functional.pad says. ``channels`` are the input's.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> Windows:
        """The windows of that module."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        kernel, stride, dilation = ((int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.dilation))
        return cls(module.in_channels, kernel, stride, padding_of(module), dilation, mode)

    @property
    def columns(self) -> int:
        """Numbers in a window."""
        return self.kernel[0] * self.kernel[1] * self.channels

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of output positions for an input of that size; 0 or less where no window fits."""
        sides = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        down, across = (
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in sides
        )
        return down, across

    def fit(self, x: Tensor) -> bool:
        """Whether ``x`` is [B, channels, H, W] or [channels, H, W] and some window lies within."""
        return x.ndim in (3, 4) and x.shape[-3] == self.channels and min(self.outputs(*x.shape[-2:])) > 0

    def rows(self, x: Tensor, most: int) -> Iterator[Tensor]:
        """What a convolution multiplies its matrix by: at most ``most`` rows [.., columns] at a time, one a position.

        Columns are in the order of ``matrix_of``, rows in that of the output [B, Hout, Wout]. Only the padded input and
        the rows of one step are in memory. ``x`` is one that ``fit`` says yes to.
        """
        images = x if x.ndim == 4 else x[None]
        down, across = self.outputs(*x.shape[-2:])
        (top, bottom), (left, right) = self.padding
        if any((top, bottom, left, right)):
            images = functional.pad(images, (left, right, top, bottom), mode=self.mode)
        apart = images.stride()
        windows = images.as_strided(
            (len(images), down, across, *self.kernel, self.channels),
            (
                *(apart[0], apart[2] * self.stride[0], apart[3] * self.stride[1]),
                *(apart[2] * self.dilation[0], apart[3] * self.dilation[1], apart[1]),
            ),
            images.storage_offset(),
        )
        many, lines = max(1, most // (down * across)), max(1, most // across)
        for first in range(0, len(images), many):
            for line in range(0, down, lines):
                part = windows[first : first + many, line : line + lines]
                for place in range(0, across, most):
                    yield part[:, :, place : place + most].reshape(-1, self.columns)
