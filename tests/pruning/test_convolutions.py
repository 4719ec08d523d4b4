import copy

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.errors import CalibrationError, ModelError, PatternError
from sparsecomp.models.layers import find_layers
from sparsecomp.patterns import NM, VNM, Block, parse
from sparsecomp.patterns.check import breach
from sparsecomp.patterns.positions import pad_positions
from sparsecomp.pruning import prune_blocks


def prune(model, *arguments, **settings):
    return sc.prune(model, *arguments, show_progress=False, **settings)


def breaks(weight, pattern):
    """Whether a stored weight [out, in, kh, kw] breaks an N:M or V:N:M pattern, group by group at each position."""
    out, channels, height, width = weight.shape
    for y in range(height):
        for x in range(width):
            for start in range(0, channels, pattern.m):
                group = weight[:, start : start + pattern.m, y, x] != 0
                rows = pattern.v if isinstance(pattern, VNM) else 1
                if any(int(row.sum()) > pattern.n for row in group):
                    return True
                if rows > 1 and any(int(group[i : i + rows].any(0).sum()) > 4 for i in range(0, out, rows)):
                    return True
                if isinstance(pattern, NM) and pattern.transposable:
                    tiles = [group[i : i + pattern.m] for i in range(0, out, pattern.m)]
                    if any(int(tile.sum(0).max()) > pattern.n for tile in tiles):
                        return True
    return False


@pytest.mark.parametrize("name", ["2:4", "1:2", "2:4@t", "8:16", "16:2:8", "2:4@v2"])
@pytest.mark.parametrize(
    ("channels", "out", "kernel"), [(16, 8, (3, 3)), (17, 9, (2, 1)), (23, 16, (1, 1)), (18, 5, 3)]
)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs"])
def test_groups_run_along_input_channels_and_cross_no_kernel_position(name, channels, out, kernel, method):
    torch.manual_seed(0)
    pattern, model = parse(name), nn.Sequential(nn.Conv2d(channels, out, kernel))
    calibration = sc.calibrate(model, [torch.randn(2, channels, 7, 6)], show_progress=False)
    with pytest.warns(UserWarning) if method == "obs" else _quiet():
        report = prune(model, name, method, calibration)
    assert not breaks(model[0].weight.detach(), pattern)
    assert bool((model[0].weight != 0).any())
    layer = find_layers(model)["0"]
    assert report.masks["0"].shape == layer.shape
    assert not bool(layer.get_weight()[~report.masks["0"]].any())
    # what was kept is at least what the pattern gives to whole groups
    assert report.layers["0"].density >= pattern.density


def _quiet():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
def test_a_magnitude_mask_keeps_the_largest_of_each_group_by_the_definition(kernel):
    model = nn.Sequential(nn.Conv2d(6, 5, kernel))
    dense = model[0].weight.detach().clone()
    prune(model, "2:4")
    for out in range(5):
        for y in range(kernel[0]):
            for x in range(kernel[1]):
                for start in (0, 4):
                    group = dense[out, start : start + 4, y, x]
                    kept = set(group.abs().argsort(descending=True)[:2].tolist())
                    want = [float(w) if i in kept else 0.0 for i, w in enumerate(group)]
                    assert model[0].weight[out, start : start + 4, y, x].tolist() == want


@pytest.mark.parametrize("channels", [16, 20])
def test_blocks_lie_within_a_kernel_position(channels):
    model, pattern = nn.Sequential(nn.Conv2d(channels, 16, 3)), Block(8, 8, 0.5)
    prune(model, pattern)
    weight = model[0].weight.detach()
    used = 0
    for y in range(3):
        for x in range(3):
            for top in (0, 8):
                used += sum(bool(weight[top : top + 8, i : i + 8, y, x].any()) for i in range(0, channels, 8))
    assert used == pattern.kept_blocks(16, 9 * (-(-channels // 8) * 8))


def test_unstructured_counts_the_whole_row():
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    report = prune(model, "unstructured:0.5")
    assert (model[0].weight != 0).flatten(1).sum(1).tolist() == [14] * 5
    assert report.layers["0"].shape == (5, 27)


def test_padding_for_the_solver_changes_no_figure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    dense = copy.deepcopy(model)
    batches = [torch.randn(4, 6, 9, 9)]
    calibration = sc.calibrate(model, batches, show_progress=False)
    held_out = sc.calibrate(model, [torch.randn(4, 6, 9, 9)], show_progress=False)
    report = prune(model, "2:4", "fast", calibration, held_out=held_out)
    weights = [find_layers(each)["0"].get_weight().double() for each in (dense, model)]

    def error(gram):
        parts = [((each @ gram.double()) * each).sum() for each in (weights[0] - weights[1], weights[0])]
        return float((parts[0] / parts[1]).sqrt())

    assert report.layers["0"].error == pytest.approx(error(calibration["0"].gram), rel=1e-6)
    assert report.layers["0"].held_out_error == pytest.approx(error(held_out["0"].gram), rel=1e-6)
    x = batches[0]
    measured = (dense(x) - model(x)).norm() / (dense(x) - dense[0].bias[:, None, None]).norm()
    assert report.layers["0"].error == pytest.approx(float(measured.detach()), rel=1e-4)
    assert report.layers["0"].rows == 4 * 7 * 7


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.wide = nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.depthwise(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


def images(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.randn(count, 3, 5, 5, generator=generator), size=12, mode="bicubic")
    return smooth + 0.1 * torch.randn(count, 3, 12, 12, generator=generator)


def test_a_small_network_pruned_with_fast_is_nearer_to_the_dense_one_than_by_magnitude():
    torch.manual_seed(0)
    dense = Small().eval()
    calibration = sc.calibrate(dense, [images(1), images(2)], show_progress=False)
    errors = {}
    for method in ("magnitude", "fast"):
        model = copy.deepcopy(dense)
        report = prune(model, "2:4", method, calibration)
        assert list(report.layers) == ["point", "wide", "head"]
        with torch.no_grad():
            errors[method] = float((model(images(3)) - dense(images(3))).norm() / dense(images(3)).norm())
    assert errors["fast"] < 0.8 * errors["magnitude"]


def test_the_report_says_what_was_left_out_and_what_stays_dense_in_execution():
    report = prune(Small(), "2:4")
    assert "fewer than the 4 columns that 2:4 judges side by side" in report.skipped["stem"]
    assert "a depthwise convolution (groups=16) stays dense" in report.skipped["depthwise"]
    assert [name for name, each in report.layers.items() if each.runs_dense] == ["wide"]
    assert "1 of 3 stays dense in execution: convolutions larger than 1x1" in " ".join(str(report).split())
    assert "runs dense" in report.to_html()
    assert [each["runs_dense"] for each in report.to_dict()["layers"]] == [False, True, False]
    assert "dense in execution" not in str(prune(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1)), "2:4"))


@pytest.mark.parametrize("channels", [8, 6])
def test_masks_are_taken_as_matrices_and_as_they_are_stored(channels):
    chosen = prune(nn.Sequential(nn.Conv2d(channels, 8, 3)), "2:4").masks["0"]
    made = []
    for stored in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(channels, 8, 3))
        mask = find_layers(model)["0"].from_matrix(chosen) if stored else chosen
        report = prune(model, "2:4", masks={"0": mask})
        assert torch.equal(report.masks["0"], chosen)
        made.append(model[0].weight.detach())
    assert torch.equal(*made)


@pytest.mark.parametrize("channels", [8, 6])
def test_what_does_not_fit_a_convolution_is_refused(channels):
    model = nn.Sequential(nn.Conv2d(channels, 8, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(PatternError, match=r"0: mask has shape \(8, 8\); the weight has"):
        prune(model, "2:4", masks={"0": torch.ones(8, 8, dtype=torch.bool)})
    with pytest.raises(PatternError, match=r"0: mask is torch.float32"):
        prune(model, "2:4", masks={"0": torch.ones(8, 9 * channels)})
    with pytest.raises(PatternError, match=r"0: the mask breaks 2:4"):
        prune(model, "2:4", masks={"0": torch.ones(8, 9 * channels, dtype=torch.bool)})
    with pytest.raises(ModelError, match=r"0: got a tensor of shape \(1, 2, 3, 4\)"):
        prune(model, "2:4", masks={"0": torch.ones(1, 2, 3, 4, dtype=torch.bool)})
    other = sc.calibrate(nn.Sequential(nn.Conv2d(3, 4, 2)), [torch.randn(1, 3, 5, 5)], show_progress=False)
    with pytest.raises(CalibrationError, match=r"0: gram has shape \(12, 12\)"):
        prune(model, "2:4", "wanda", other)
    assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        model[0].weight[3, 1, 0, 2] = torch.nan
    with pytest.raises(PatternError, match=rf"0: weight.3, {2 * channels + 1}. is nan"):
        prune(model, "2:4")


def test_a_second_call_goes_on_from_the_checkpoint_and_other_channels_are_other_work(tmp_path):
    first = prune(nn.Sequential(nn.Conv2d(6, 4, (1, 2))), "2:4", checkpoint=tmp_path)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(6, 4, (1, 2))), nn.Sequential(nn.Conv2d(4, 4, (1, 3)))]
    models[1][0].weight = nn.Parameter(
        find_layers(models[1])["0"].from_matrix(find_layers(models[0])["0"].get_weight()).contiguous()
    )
    reports = [prune(each, "2:4", checkpoint=tmp_path) for each in models]
    assert [each.masks["0"].shape for each in (first, *reports)] == [(4, 12)] * 3
    for each, report in zip(models, reports, strict=True):
        layer = find_layers(each)["0"]
        assert breach(pad_positions(layer.get_weight() != 0, layer.channels, NM(2, 4)), NM(2, 4)) is None
        assert report.layers["0"].shape == (4, 12)


class Block3(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


def test_blocks_of_convolutions_are_pruned_and_tuned_one_after_the_other():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block3() for _ in range(3))).eval()
    batches = [torch.randn(2, 8, 8, 8) for _ in range(6)]
    report = prune_blocks(model, batches, "2:4", "wanda", tuning=sc.Tuning(steps=4), show_progress=False)
    assert list(report.layers) == ["0.conv", "1.conv", "2.conv"]
    for block in model:
        assert not breaks(block.conv.weight.detach(), NM(2, 4))
    assert len(report.tunings) == 3


def test_the_whole_network_is_tuned_with_the_masks_of_its_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block3() for _ in range(2))).eval()
    dense = copy.deepcopy(model)
    report = prune(model, "2:4")
    before = model[0].conv.weight.detach().clone()
    batches = [torch.randn(2, 8, 8, 8) for _ in range(6)]
    sc.distill(model, dense, batches, masks=report.masks, tuning=sc.Tuning(steps=4), show_progress=False)
    assert not torch.equal(model[0].conv.weight, before)
    assert not any(breaks(block.conv.weight.detach(), NM(2, 4)) for block in model)


def test_best_does_not_permute_convolutions_and_says_so():
    torch.manual_seed(0)
    model, batch = Small().eval(), images(1)
    calibration = sc.calibrate(model, [batch], show_progress=False)
    report = prune(model, "2:4", "best", calibration, example=batch, only=["point", "head"])
    assert report.unpermuted["point"] == "input channels of convolutions are not permuted"
    assert not breaks(model.point.weight.detach(), NM(2, 4))
