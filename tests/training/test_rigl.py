import math

import pytest
import torch

from sparsecomp.errors import MethodError, PatternError
from sparsecomp.training import Schedule, sparsify
from sparsecomp.training.rules.rigl import RigL, erdos_renyi, exchanged, from_groups, to_groups
from tests.training.toys import (
    adamw,
    batch,
    fits_after_every_step,
    loss_of,
    one_way_or_another,
    resumes_bit_for_bit,
    started,
    toy,
    train,
)

SOME = ("2:4", "1:4", "8:16", "2:4@v3", "block4x4:0.25", "block3x7:0.4", "unstructured:0.2")
SCOPED = [*((each, "layer") for each in SOME), ("unstructured:0.2", "global"), ("block4x4:0.3", "global")]


def _twin(kept, real, sizes, slopes, share):
    """One entry after the other, in lists."""
    rows, columns = kept.shape
    kept = kept.tolist()
    counts = [sum(row) for row in kept]
    total = int(share * sum(counts))
    order = sorted((float(sizes[r, c]), r, c) for r in range(rows) for c in range(columns) if kept[r][c])
    dropped = [0] * rows
    for _, r, c in order:
        if sum(dropped) < total and dropped[r] < math.ceil(torch.tensor(share) * counts[r]):
            kept[r][c] = False
            dropped[r] += 1
    for r in range(rows):
        free = sorted((-float(slopes[r, c]), c) for c in range(columns) if not kept[r][c] and real[r, c])
        for _, c in free[: dropped[r]]:
            kept[r][c] = True
    return torch.tensor(kept, dtype=torch.bool).view(rows, columns)


@pytest.mark.parametrize("shape", [(1, 40), (12, 4), (7, 16), (1, 1), (5, 2), (3, 0), (0, 4)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 1.0])
def test_drop_and_grow_is_that_of_the_slow_twin(shape, share):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        real = torch.rand(shape, generator=generator) < 0.9
        kept = (torch.rand(shape, generator=generator) < 0.5) & real
        sizes, slopes = torch.rand((2, *shape), generator=generator)
        found = exchanged(kept, real, sizes, slopes, share)
        assert torch.equal(found, _twin(kept, real, sizes, slopes, share))
        assert torch.equal(found.sum(dim=1), kept.sum(dim=1))
        assert not (found & ~real).any()


@pytest.mark.parametrize(("pattern", "scope"), SCOPED)
def test_groups_lead_there_and_back(pattern, scope):
    model = toy(sizes=(26, 34, 10))
    handle = sparsify(model, pattern, adamw(model), "rigl", steps=20, scope=scope)
    for layer in handle._layers.values():
        sums = to_groups(layer, layer.mask, scope)
        assert torch.equal(from_groups(layer, sums > 0, scope), layer.mask)
        assert int(sums.sum()) == int(layer.mask.sum())


@pytest.mark.parametrize("pattern", SOME)
def test_weights_fit_the_pattern_after_every_step(pattern):
    fits_after_every_step(pattern, RigL(alpha=0.6), 40)


@pytest.mark.parametrize(("pattern", "scope"), SCOPED)
def test_the_count_of_each_group_never_changes_though_masks_do(pattern, scope):
    model, optimizer, handle = started(pattern, RigL(alpha=0.6), 40, scope=scope)
    layers = handle._layers.values()
    first = [to_groups(each, each.mask, scope).count_nonzero(dim=1) for each in layers]
    masks = handle.masks

    def check(step):
        for each, count in zip(layers, first, strict=True):
            assert torch.equal(to_groups(each, each.mask, scope).count_nonzero(dim=1), count)

    train(model, optimizer, 0, 40, after=check)
    assert any(each.flip_rate > 0 for each in handle.history)
    assert not torch.equal(masks["0"], handle.masks["0"])


@pytest.mark.parametrize("make", ["adamw", "momentum", "rmsprop"])
def test_the_smallest_weights_go_the_largest_gradients_come_at_zero_and_moments_are_forgotten(make):
    model = toy()
    optimizer = {
        "adamw": adamw,
        "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-2, centered=True, momentum=0.5),
    }[make](model)
    schedule = Schedule("constant", cool_down=5, every=4)
    handle = sparsify(model, "unstructured:0.3", optimizer, "rigl", steps=40, schedule=schedule, scope="global")
    step = 0
    while True:
        before = handle.masks["0"]
        x, y = batch(step, model)
        loss_of(model, x, y).backward()
        slopes = model[0].weight.grad.abs().clone()
        optimizer.step()
        step += 1
        grown = handle.masks["0"] & ~before
        if step > 4 and grown.any():
            break
        optimizer.zero_grad()
    gone = before & ~handle.masks["0"]
    assert int(gone.sum()) == int(grown.sum())
    assert slopes[grown].min() >= slopes[~before & ~grown].max()
    assert not model[0].weight[grown].any()
    moments = {key: each for key, each in optimizer.state[model[0].weight].items() if each.shape == before.shape}
    assert len(moments) == {"adamw": 2, "momentum": 1, "rmsprop": 3}[make]
    for each in moments.values():
        assert not each[grown].any()
        assert each[before & handle.masks["0"]].all()


def test_the_share_falls_along_a_cosine_and_masks_rest_after_three_quarters():
    model, optimizer, handle = started("unstructured:0.3", "rigl", 400, scope="global")
    kept = sum(int(mask.sum()) for mask in handle.masks.values())
    total = sum(mask.numel() for mask in handle.masks.values())
    flips = {}

    def count(step):
        flips[step] = sum(each.changed for each in handle._layers.values())

    train(
        model,
        optimizer,
        0,
        400,
        after=lambda step: flips.setdefault(step, sum(e.changed for e in handle._layers.values())),
    )
    assert all(flips[step] == 0 for step in range(300, 401))
    changes = [step for step, count in flips.items() if count]
    assert len(changes) >= 6 and changes[-1] > 200
    for step in changes:
        share = 0.15 * (1 + math.cos(math.pi * step / 300))
        assert flips[step] <= 2 * share * kept
    assert handle.history[0].flip_rate > 0.1 * kept / total


def test_erdos_renyi_kernel_densities_are_their_definition():
    shapes = {"wide": (400, 300), "square": (100, 100), "kernel": (32, 16, 3, 3), "small": (4, 4)}
    found = erdos_renyi(shapes, 0.1)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(0.1 * sum(sizes.values()))
    assert found["small"] == 1.0
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    scales = [found[name] / raw[name] for name in ("wide", "square", "kernel")]
    assert scales == pytest.approx([scales[0]] * 3)
    assert raw["small"] * scales[0] >= 1.0
    assert erdos_renyi(shapes, 1.0) == dict.fromkeys(shapes, 1.0)


@pytest.mark.parametrize("start", ["magnitude", "random"])
def test_the_global_scope_starts_at_these_densities(start):
    model = toy(sizes=(64, 48, 8))
    handle = sparsify(model, "unstructured:0.1", adamw(model), "rigl", steps=10, scope="global", start=start)
    expected = erdos_renyi({"0": (48, 64), "2": (8, 48)}, 0.1)
    for name, mask in handle.masks.items():
        assert int(mask.sum()) == math.ceil(expected[name] * mask.numel() - 1e-9)
    assert expected["2"] > 2 * expected["0"]


@pytest.mark.parametrize(("pattern", "scope"), [SCOPED[0], SCOPED[-2], SCOPED[-1]])
@pytest.mark.parametrize("at", [3, 17])
def test_a_run_resumes_bit_for_bit(pattern, scope, at):
    assert resumes_bit_for_bit(pattern, RigL(alpha=0.6), 40, at, scope=scope)


def test_accumulation_and_a_scaler_change_nothing():
    assert one_way_or_another("unstructured:0.2", "rigl", 40)


def test_what_it_cannot_follow_is_refused():
    model = toy()
    for pattern in ("64:2:8", "2:4@t"):
        with pytest.raises(PatternError, match="ties to one another; use N:M, N:M@vR"):
            sparsify(model, pattern, adamw(model), "rigl", steps=10)
    with pytest.raises(MethodError, match='schedule "cubic" asks for fewer'):
        sparsify(model, "2:4", adamw(model), "rigl", steps=10, schedule="cubic")
    with pytest.raises(MethodError, match="no share"):
        RigL(alpha=0.0)


def test_grown_weights_find_a_sparse_truth_that_the_start_missed():
    torch.manual_seed(0)
    truth = torch.where(torch.rand(16, 32) < 0.1, torch.randn(16, 32).sign(), 0.0)

    def loss_after(method):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False), torch.nn.Identity())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
        sparsify(model, "unstructured:0.2", optimizer, method, steps=200, scope="global", start="random")
        for _ in range(200):
            x = torch.randn(64, 32)
            loss = (model(x) - x @ truth.T).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    assert loss_after("rigl") < 0.1 * loss_after("fixed")
