"""Factories that the command-line tests name: small models, their batches and example inputs."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    wide = [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()]
    return nn.Sequential(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))


def images() -> list[Tensor]:
    return [torch.randn(20, 8, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def headed() -> nn.Module:
    torch.manual_seed(0)
    body = [(f"block{i}", nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))) for i in range(2)]
    return nn.Sequential(OrderedDict([*body, ("classifier", nn.Linear(32, 8))]))


def bracketed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict([("a[0]", nn.Linear(32, 16)), ("a*", nn.Linear(16, 16)), ("ab", nn.Linear(16, 8))])
    )


def spiked() -> nn.Module:
    """As ``build``; the first layer does not read the input in which ``spiked_batches`` have an outlier."""
    model = build()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, 5] = 0
    return model


def spiked_batches() -> list[Tensor]:
    found = batches()
    for each in found:
        each[:, 5] = 300
    return found


def double() -> nn.Module:
    return build().double()


def holed() -> nn.Module:
    model = build()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 4] = torch.nan
    return model


def batches() -> list[Tensor]:
    return [torch.randn(20, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(20, dtype=torch.int64)) for x in batches()]


def dicts() -> list[dict[str, Tensor]]:
    return [{"pixels": x, "label": torch.zeros(20)} for x in batches()]


def example() -> Tensor:
    return batches()[0][:2]


def named_example() -> dict[str, Tensor]:
    return {"input": example()}


def broken() -> nn.Module:
    raise ValueError("the shop is closed")


def single() -> nn.Module:
    return nn.Linear(32, 16)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))


def number() -> int:
    return 3


def wants(width: int, depth: int, *, bias: bool = True) -> nn.Module:
    return nn.Linear(width, depth, bias)


class Wants(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


def kind() -> type[nn.Module]:
    return nn.Sequential
