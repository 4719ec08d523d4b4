import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsecomp.errors import CalibrationError
from sparsecomp.models.calibration import calibrate
from sparsecomp.models.convolutions import Windows, matrix_of
from sparsecomp.models.layers import find_layers

SHAPES = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "replicate"},
]


def rows_twin(conv, x):
    """Every window of the padded input, number by number: rows [B*Hout*Wout, kh*kw*in] by the definition."""
    conv = nn.Conv2d(1, 1, **conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = []
    for image in x:
        for top in range(0, x.shape[2] - dh * (kh - 1), sh):
            for left in range(0, x.shape[3] - dw * (kw - 1), sw):
                places = itertools.product(range(kh), range(kw), range(len(image)))
                rows.append([float(image[c, top + i * dh, left + j * dw]) for i, j, c in places])
    return torch.tensor(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 5, 2048])
@pytest.mark.parametrize("images", [1, 3])
def test_rows_are_the_windows_of_the_definition_whatever_the_steps(shape, most, images):
    conv = nn.Conv2d(2, 5, **shape)
    windows = Windows.of(conv)
    x = torch.randn(images, 2, 7, 9)
    want = rows_twin(shape, x)
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        parts = list(windows.rows(given, most))
        assert all(len(part) <= most for part in parts)
        assert torch.equal(torch.cat(parts), want)
    y = want @ matrix_of(conv.weight).T + conv.bias
    torch.testing.assert_close(y.view(images, *windows.outputs(7, 9), 5).permute(0, 3, 1, 2), conv(x))


def test_a_wide_image_is_read_a_few_positions_at_a_time():
    windows = Windows.of(nn.Conv2d(3, 4, 3, padding=1))
    parts = list(windows.rows(torch.randn(2, 3, 5, 3000), 2048))
    assert max(map(len, parts)) == 2048
    assert sum(map(len, parts)) == 2 * 5 * 3000


@pytest.mark.parametrize(
    "shape", [{"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}, {"kernel_size": (3, 2)}]
)
def test_the_gram_of_a_convolution_is_that_of_unfold(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 4, **shape))
    batches = [torch.randn(3, 5, 11, 9), torch.randn(1, 5, 8, 13), torch.randn(5, 6, 7)]
    found = calibrate(model, batches, show_progress=False)["0"]
    rows = []
    for x in batches:
        settings = {"kernel_size": model[0].kernel_size, "stride": model[0].stride, "padding": model[0].padding}
        unfolded = functional.unfold(x if x.ndim == 4 else x[None], dilation=model[0].dilation, **settings)
        # unfold has the kernel positions of a channel side by side
        apart = unfolded.transpose(1, 2).unflatten(2, (5, -1)).transpose(2, 3)
        rows.append(apart.flatten(2).flatten(0, 1))
    x = torch.cat(rows).double()
    assert found.tokens == len(x)
    torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert found.rounding.shape == (found.gram.shape[0],)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.d(x), self.head(x.mean((2, 3)))


def test_convolutions_of_the_same_input_share_a_gram_where_their_windows_are_the_same():
    model = Branches()
    found = calibrate(model, [torch.randn(2, 4, 6, 5), torch.randn(1, 4, 9, 5)], show_progress=False)
    assert list(found) == ["a", "b", "c", "d", "head"]
    assert found["a"].gram is found["b"].gram
    assert len({id(each.gram) for each in found.layers.values()}) == 4
    assert [found[name].tokens for name in found] == [105, 105, 2 * 4 * 3 + 7 * 3, 105, 3]


def test_a_mask_of_images_picks_windows_and_no_mask_of_tokens_does():
    model, x = Branches(), torch.randn(4, 4, 6, 5)
    kept = torch.tensor([True, False, True, True])
    some = calibrate(model, [x], mask=lambda _: kept, show_progress=False)
    want = calibrate(model, [x[kept]], show_progress=False)
    for name in some:
        assert torch.equal(some[name].gram, want[name].gram)
    # [B, T] with as many tokens as channels speaks of no image
    tokens = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(CalibrationError, match="the mask fits no layer input"):
        calibrate(model, [x], only="d", mask=lambda _: tokens, show_progress=False)


def test_an_input_that_is_not_finite_names_the_convolution():
    x = torch.randn(1, 4, 6, 5)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="a: its input holds NaN or Inf in calibration batch 0"):
        calibrate(Branches(), [x], show_progress=False)


def test_windows_larger_than_the_image_do_not_fit():
    windows = Windows.of(nn.Conv2d(4, 3, 5))
    assert not windows.fit(torch.zeros(1, 4, 4, 9))
    assert not windows.fit(torch.zeros(1, 3, 9, 9))
    assert not windows.fit(torch.zeros(4, 9))
    assert windows.fit(torch.zeros(4, 5, 5))
    assert find_layers(nn.Sequential(nn.Conv2d(4, 3, 5))).convolutions == ("0",)
