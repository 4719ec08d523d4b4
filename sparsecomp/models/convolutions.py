"""nn.Conv2d as a matrix: which convolutions have one, and how a weight [out, in, kh, kw] lies in it.

Takes modules and tensors. Knows nothing of patterns, masks or kernels.
"""

from __future__ import annotations

from torch import Tensor, nn

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
