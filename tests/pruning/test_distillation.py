"""Whole-model distillation: nearer to the dense model where it was not trained, masks obeyed, refusals clear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecomp.errors import CalibrationError, ModelError
from sparsecomp.patterns import parse
from sparsecomp.patterns.check import check_mask
from sparsecomp.pruning import Tuning, distill, prune
from tests.pruning.block_models import encoder, token_batches

SETTINGS = Tuning(steps=40, learning_rate=3e-3)


def logits(result, batch):
    return result.logits


@pytest.mark.parametrize("output", [None, logits])
def test_the_pruned_model_comes_nearer_to_its_teacher_on_text_it_has_not_seen(output):
    model, teacher = encoder(), encoder().train()
    report = prune(model, "2:4", skip="head", show_progress=False)
    unseen = token_batches(2, seed=5)

    def distance() -> float:
        with torch.no_grad():
            pairs = [(model(**batch), teacher.eval()(**batch), batch["attention_mask"].bool()) for batch in unseen]
        return sum(float((a.hidden - b.hidden)[mask].square().sum()) for a, b, mask in pairs)

    before = distance()
    teacher.train()
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    tuned = distill(
        model,
        teacher,
        token_batches(20),
        masks=report.masks,
        held_out=token_batches(2, seed=7),
        output=output,
        tuning=SETTINGS,
        show_progress=False,
    )
    assert teacher.training
    assert tuned.held_out_after < 0.8 * tuned.held_out_before
    assert distance() < 0.8 * before
    for name, mask in report.masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())
        check_mask(model.get_submodule(name).weight != 0, parse("2:4"))
    torch.testing.assert_close(teacher.state_dict(), weights, rtol=0, atol=0)


def test_a_model_without_blocks_is_matched_by_its_output():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    model.load_state_dict(teacher.state_dict())
    masks = prune(model, "2:4", show_progress=False).masks
    batches = [torch.randn(64, 16) for _ in range(8)]
    with pytest.raises(ModelError, match=r"no repeated blocks .* pass output="):
        distill(model, teacher, batches, masks=masks)
    tuned = distill(
        model, teacher, batches, masks=masks, output=lambda result, _: result, tuning=SETTINGS, show_progress=False
    )
    assert tuned.held_out_after < 0.8 * tuned.held_out_before
    # the batch may be run in a way of one's own
    half = distill(
        model,
        teacher,
        batches,
        masks=masks,
        output=lambda result, _: result,
        forward=lambda model, batch: model[2](model[1](model[0](batch))),
        tuning=Tuning(steps=3),
        show_progress=False,
    )
    assert half.held_out_before == pytest.approx(tuned.held_out_after, rel=1e-4)


def test_what_does_not_fit_is_refused():
    model = encoder()
    with pytest.raises(ModelError, match=r'a mask is given for "nope", which is no linear layer'):
        distill(model, encoder(), token_batches(2), masks={"nope": torch.ones(1, 1, dtype=torch.bool)})
    masks = prune(model, "2:4", show_progress=False).masks
    with pytest.raises(CalibrationError, match="at least 2"):
        distill(model, encoder(), token_batches(1), masks=masks)
    with pytest.raises(ModelError, match="teacher shares weights with the model"):
        distill(model, model, token_batches(2), masks=masks)
    with pytest.raises(ModelError, match=r'the teacher has no block "blocks\.0", which the model has'):
        distill(model, nn.Sequential(nn.Linear(4, 4)), token_batches(2), masks=masks)
    with pytest.raises(ModelError, match=r"output\(result, batch\) gave a Result; it must give numbers"):
        distill(model, encoder(), token_batches(2), masks=masks, output=lambda result, _: result)
    with pytest.raises(ModelError, match=r'the mask of "blocks.0.q" has shape \(1, 16\), its weight \(16, 16\)'):
        distill(model, encoder(), token_batches(2), masks=masks | {"blocks.0.q": masks["blocks.0.q"][:1]})


def test_padding_does_not_count_in_an_output_of_every_token():
    def noisy(result, batch):
        padding = (batch["attention_mask"] == 0)[..., None]
        return torch.where(padding, 1e6 * torch.rand_like(result.logits), result.logits)

    losses = []
    for output in (noisy, logits):
        model = encoder()
        masks = prune(model, "2:4", show_progress=False).masks
        report = distill(
            model,
            encoder(),
            token_batches(4),
            masks=masks,
            output=output,
            tuning=Tuning(steps=1),
            show_progress=False,
        )
        losses.append(report.held_out_before)
    assert losses[0] == losses[1]
