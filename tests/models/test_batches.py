"""How batches enter models: plain eager calls that repeat, and one sentence where a batch does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecomp.errors import CalibrationError, MethodError
from sparsecomp.models.batches import eager, entering, fresh
from sparsecomp.models.calibration import calibrate
from sparsecomp.pruning import Tuning, distill, prune, prune_blocks
from tests.small_models import small, small_batches

QUICK = Tuning(steps=4, learning_rate=1e-3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Inference(Net):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def batches_of(count: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(40, 16) for _ in range(count)]


def tuned(model: nn.Module, batches=None) -> dict[str, torch.Tensor]:
    found = prune_blocks(model, batches or batches_of(), "2:4", "wanda", tuning=QUICK, show_progress=False)
    assert all(each.held_out_after < each.held_out_before for each in found.tunings)
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [NoGrad, Inference])
def test_a_model_whose_forward_takes_no_gradients_is_calibrated_and_its_blocks_tuned(kind):
    same(tuned(kind()), tuned(Net()))
    cal, plain = calibrate(kind(), batches_of(), show_progress=False), calibrate(Net(), batches_of())
    for name, statistics in plain.items():
        assert torch.equal(cal[name].gram, statistics.gram) and not cal[name].gram.is_inference()


@pytest.mark.parametrize("kind", [NoGrad, Inference])
def test_what_cannot_be_trained_says_so_and_stays_as_it_was(kind):
    model, dense = kind(), kind()
    masks = prune(model, "2:4", show_progress=False).masks
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match=r"no gradient reaches its weights, as where a forward runs under .*no_grad"):
        distill(model, dense, batches_of(), masks=masks, tuning=QUICK, show_progress=False)
    same(model.state_dict(), before)
    assert all(each.grad is None for each in model.parameters())

    def without(block):
        forward = block.forward
        block.forward = (torch.no_grad if kind is NoGrad else torch.inference_mode)()(forward)

    model = Net()
    without(model.blocks[1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match=r"blocks\.1: no gradient reaches its weights"):
        prune_blocks(model, batches_of(), tuning=QUICK, show_progress=False)
    same(model.state_dict(), before)
    prune_blocks(model, batches_of(), tuning=None, show_progress=False)
    assert float((model.blocks[2].a.weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_in_another_grad_mode_gets_the_same(mode):
    want, teacher = tuned(Net()), Net()
    with mode():
        batches = [each.clone() for each in batches_of()]
        built = Net()
        same(tuned(Net(), batches), want)
        same(tuned(built, batches), want)
        cal = calibrate(Net(), batches, show_progress=False)
        model = Net()
        report = prune(model, "2:4", "wanda", cal, show_progress=False)
        distill(model, teacher, batches, masks=report.masks, tuning=QUICK, show_progress=False)
        assert not torch.is_grad_enabled()
    outside = Net()
    report = prune(outside, "2:4", "wanda", cal, show_progress=False)
    distill(outside, teacher, batches_of(), masks=report.masks, tuning=QUICK, show_progress=False)
    same(outside.state_dict(), model.state_dict())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_tensor_written_in_place_in_inference_mode_is_not_taken_for_the_same():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        @torch.inference_mode()
        def forward(self, x):
            x = x + 0
            self.a(x)
            x.mul_(3)
            return self.b(x)

    cal = calibrate(InPlace(), [torch.randn(30, 3)], show_progress=False)
    torch.testing.assert_close(cal["b"].gram, 9 * cal["a"].gram)


def compiled_blocks(model: Net) -> Net:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model: Net) -> Net:
    model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    return model


def compiled_and_run(model: Net) -> nn.Module:
    made = torch.compile(model, backend="eager")
    made(batches_of(1)[0])
    return made


@pytest.mark.parametrize(
    "compiled",
    [lambda model: torch.compile(model, backend="eager"), compiled_and_run, compiled_in_place, compiled_blocks],
    ids=["wrapped", "run before", "in place", "blocks"],
)
def test_a_compiled_model_is_treated_as_the_eager_one(compiled):
    model = Net()
    same(tuned(compiled(model)), tuned(Net()))
    cal, plain = (calibrate(each, batches_of(), show_progress=False) for each in (compiled(Net()), Net()))
    assert cal.unreached == ()
    names = [name.replace("_orig_mod.", "") for name in cal]
    assert names == list(plain) and (compiled is compiled_blocks or list(cal) == names)
    for statistics, wanted in zip(cal.values(), plain.values(), strict=True):
        assert torch.equal(statistics.gram, wanted.gram)
    results = []
    for make in (lambda: compiled(Net()), Net):
        model = make()
        report = prune(model, "2:4", "best", calibrate(model, batches_of()), example=batches_of()[0])
        assert report.layers[next(name for name in report.layers if name.endswith("b"))].permuted
        for teacher in (Net(), compiled(Net())):
            distill(model, teacher, batches_of(), masks=report.masks, tuning=QUICK, show_progress=False)
        results.append(eager(model).state_dict())
    same(list(results[0].values()), list(results[1].values()))


def test_compiled_code_is_used_again_afterwards():
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    model = Net()
    made = torch.compile(model, backend=backend)
    calibrate(made, batches_of(), show_progress=False)
    assert calls == []
    made(batches_of()[0])
    assert calls


def test_caches_are_off_within_and_on_again_afterwards():
    model = small("t5")
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = {key: config.use_cache for key, config in configs.items()}
    assert any(before.values())
    with pytest.raises(KeyError), entering(model):
        assert not any(config.use_cache for config in configs.values())
        with torch.no_grad():
            assert model(**small_batches("t5")[0]).past_key_values is None
        raise KeyError
    assert {key: config.use_cache for key, config in configs.items()} == before


def test_the_copy_of_a_batch_is_apart_from_it():
    x = torch.randn(2)
    batch = {"x": x, "same": x, "more": [x, ("word", {"y": x})], "use_cache": True}
    copied = fresh(batch)
    copied["more"][1][1]["y"].zero_()
    copied["x"].zero_()
    assert bool((x != 0).all()) and bool((copied["same"] != 0).all())
    assert copied["more"][0] is copied["more"][1][1]["y"]
    assert copied["use_cache"] is False and batch["use_cache"] is True


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (
            (torch.ones(2, 16), torch.ones(2)),
            r"batch 1 is a tuple of 2 \(Tensor \[2, 16\], Tensor \[2\]\), and Net.forward takes \(x\) .*"
            r"forward=lambda model, batch: model\(batch\[0\]\)$",
        ),
        (
            {"x": torch.ones(2, 16), "label": torch.ones(2)},
            r"batch 1 is a dict of x: Tensor \[2, 16\], label: .* takes \(x\) .*model\(x=batch\[\"x\"\]\)$",
        ),
        ({"image": torch.ones(2, 16)}, r"Net.forward takes \(x\) .*model\(batch\[\"image\"\]\)$"),
        (torch.ones(2, 5), r"batch 1 \(Tensor \[2, 5\]\): Net.forward\(x\) raised RuntimeError: mat1 and mat2 shapes"),
        ([], r"batch 1 is a list of 0 \(\), and Net.forward takes \(x\)"),
        ("words", "batch 1 is a str; allowed are a tensor, a tuple or list and a mapping"),
    ],
)
def test_a_batch_that_does_not_fit_is_told_with_what_the_forward_takes(batch, told):
    good = batches_of(2)
    for call in (
        lambda batches: calibrate(Net(), batches, show_progress=False),
        lambda batches: prune_blocks(Net(), batches, show_progress=False),
    ):
        with pytest.raises(CalibrationError, match=told):
            call([good[0], batch, good[1]])
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=told):
        distill(
            model,
            Net(),
            [good[0], batch],
            held_out=good,
            masks={"blocks.0.a": torch.ones(24, 16, dtype=torch.bool)},
            tuning=QUICK,
            show_progress=False,
        )
    same(model.state_dict(), before)


def test_what_a_forward_raises_is_the_cause_and_its_batch_is_named():
    class Odd(Net):
        def forward(self, x):
            if bool((x == 7).any()):
                raise ZeroDivisionError("seven")
            return super().forward(x)

    batches = [torch.ones(4, 16), torch.full((4, 16), 7.0)]
    with pytest.raises(CalibrationError, match=r"batch 1 .*Odd.forward\(x\) raised ZeroDivisionError: seven") as caught:
        calibrate(Odd(), batches, show_progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(CalibrationError, match=r"batch 0 .*the function given as forward= raised KeyError: 'x'"):
        calibrate(Net(), [{"y": torch.ones(4, 16)}], forward=lambda model, batch: model(batch["x"]))

    def stopped(model, batch):
        raise KeyboardInterrupt

    def full(model, batch):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(KeyboardInterrupt):
        calibrate(Net(), batches, forward=stopped, show_progress=False)
    with pytest.raises(torch.OutOfMemoryError):
        calibrate(Net(), batches, forward=full, show_progress=False)


def test_few_rows_are_warned_of_and_many_are_not(recwarn):
    model = Net(1)
    few, many = (calibrate(model, [torch.randn(rows, 16)], show_progress=False) for rows in (5, 96))
    assert few.thin == ("blocks.0.a", "blocks.0.b") and few["blocks.0.a"].rows_per_input == 5 / 16
    assert many.thin == ()
    with pytest.warns(UserWarning, match=r'2 of 2 pruned layers have fewer than 4 .* \("blocks.0.b" has 5 for 24\)'):
        report = prune(copy.deepcopy(model), "2:4", "wanda", few, show_progress=False)
    assert report.layers["blocks.0.a"].rows == 5 and report.layers["blocks.0.a"].few_rows
    with pytest.warns(UserWarning, match="more batches"):
        prune_blocks(Net(), [torch.randn(3, 16) for _ in range(3)], tuning=None, show_progress=False)
    recwarn.clear()
    prune(copy.deepcopy(model), "2:4", "wanda", many, show_progress=False)
    prune(copy.deepcopy(model), "2:4", "magnitude", few, show_progress=False)
    assert not [each for each in recwarn if "calibration rows" in str(each.message)]
