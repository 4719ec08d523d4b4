import pytest
import torch

from sparsecomp.patterns import parse
from sparsecomp.patterns.positions import cut_positions, group_columns, pad_gram, pad_positions


@pytest.mark.parametrize(
    ("name", "columns"),
    [("2:4", 4), ("8:16@v2", 16), ("2:4@t", 4), ("64:2:8", 8), ("block16x8:0.5", 8), ("unstructured:0.5", 1)],
)
def test_columns_that_a_pattern_judges_side_by_side(name, columns):
    assert group_columns(parse(name)) == columns


@pytest.mark.parametrize("channels", [4, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("name", ["2:4", "8:16", "16:2:8", "block4x8:0.5", "unstructured:0.5"])
def test_zeros_stand_behind_each_kernel_position_and_are_cut_off_again(channels, positions, name):
    pattern, columns = parse(name), positions * channels
    matrix = torch.rand(3, columns) + 1
    padded = pad_positions(matrix, channels, pattern)
    # a linear layer and a 1x1 convolution have one position, whose last group the pattern itself cuts short
    width = channels if positions == 1 else -(-channels // group_columns(pattern)) * group_columns(pattern)
    assert padded.shape == (3, positions * width)
    for row in range(3):
        for position in range(positions):
            run = padded[row, position * width : (position + 1) * width]
            assert torch.equal(run[:channels], matrix[row, position * channels : (position + 1) * channels])
            assert not bool(run[channels:].any())
    assert torch.equal(cut_positions(padded, channels, pattern, columns), matrix)
    x = torch.randn(20, columns)
    wide = pad_positions(x, channels, pattern)
    torch.testing.assert_close(pad_gram(x.T @ x, channels, pattern), wide.T @ wide)


def test_a_mask_is_padded_with_what_is_not_kept_and_no_rows_are_no_rows():
    pattern = parse("2:4")
    padded = pad_positions(torch.ones(2, 10, dtype=torch.bool), 5, pattern)
    assert padded.tolist() == [([True] * 5 + [False] * 3) * 2] * 2
    empty = pad_positions(torch.zeros(0, 10), 5, pattern)
    assert empty.shape == (0, 16)
    assert cut_positions(empty, 5, pattern, 10).shape == (0, 10)
