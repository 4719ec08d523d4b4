"""Small models and loops for the tests of rules."""

import copy
import itertools

import torch
from torch import nn

from sparsecomp.patterns.check import check_mask
from sparsecomp.training import sparsify
from sparsecomp.training.schedule import pattern_at


def toy(seed=0, sizes=(24, 40, 20), dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(each for layer in layers for each in (layer, nn.Tanh())))


def batch(step, model, rows=16):
    generator = torch.Generator().manual_seed(1000 + step)
    dtype = model[0].weight.dtype
    x = torch.randn(rows, model[0].in_features, generator=generator, dtype=dtype)
    return x, torch.randn(rows, model[-2].out_features, generator=generator, dtype=dtype)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def train(model, optimizer, first, last, parts=1, scaler=None, after=None):
    """Steps ``first`` to ``last - 1``; the batch comes in ``parts`` backward passes."""
    for step in range(first, last):
        for x, y in zip(*(each.chunk(parts) for each in batch(step, model)), strict=True):
            loss = loss_of(model, x, y) / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if after is not None:
            after(step + 1)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def started(pattern, method, steps, dtype=torch.float32, **settings):
    model = toy(dtype=dtype)
    optimizer = adamw(model)
    return model, optimizer, sparsify(model, pattern, optimizer, method, steps=steps, **settings)


def weights(model):
    return [each.detach().clone() for each in model.parameters()]


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def resumes_bit_for_bit(pattern, method, steps, at, **settings):
    """Whether a run that is stopped after ``at`` steps, saved and made anew ends as one that was not."""
    model, optimizer, handle = started(pattern, method, steps, **settings)
    train(model, optimizer, 0, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    train(model, optimizer, at, steps)
    other, resumed, again = started(pattern, method, steps, **settings)
    for each, state in zip((other, resumed, again), saved, strict=True):
        each.load_state_dict(state)
    train(other, resumed, at, steps)
    states = [each.state_dict()["layers"] for each in (handle, again)]
    for name in states[0]:
        for key, value in states[0][name]["state"].items():
            assert torch.equal(value, states[1][name]["state"][key]), (name, key)
    assert handle.history == again.history
    return same(weights(handle.bake()), weights(again.bake()))


def fits_after_every_step(pattern, method, steps, **settings):
    """Train, and check after every step that the weights fit what the schedule asked for at the last choice."""
    model, optimizer, handle = started(pattern, method, steps, **settings)
    schedule = handle._progress.schedule
    goals = handle.patterns
    now = {name: pattern_at(goal, schedule.density(0, steps, goal.density)) for name, goal in goals.items()}
    seen = {str(each) for each in now.values()}

    def check(step):
        if schedule.acts(step, steps):
            for name, goal in goals.items():
                now[name] = pattern_at(goal, schedule.density(step, steps, goal.density))
        for name, mask in handle.masks.items():
            weight = dict(model.named_modules())[name].weight
            assert not weight[~mask].any()
            seen.add(str(now[name]))
            if now[name] is None:
                assert mask.all()
            else:
                check_mask(mask, now[name])

    train(model, optimizer, 0, steps, after=check)
    handle.bake()
    return seen


def one_way_or_another(pattern, method, steps, **settings):
    """Whether masks are the same with batches in parts, and weights, bit for bit, with a scaler."""
    runs = []
    for parts, scaled in ((1, False), (1, True), (4, False), (4, True)):
        # in float64 the last bit changes no choice
        model, optimizer, handle = started(pattern, method, steps, torch.float64, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        train(model, optimizer, 0, steps, parts=parts, scaler=scaler)
        masks = list(handle.masks.values())
        runs.append((masks, weights(handle.bake())))
    assert all(same(runs[0][0], masks) for masks, _ in runs)
    assert not any(mask.all() for mask in runs[0][0])
    return same(runs[0][1], runs[1][1]) and same(runs[2][1], runs[3][1])
