"""Small models to save and load, and a check that a refused load changed nothing."""

import pytest
import torch
from torch import nn

from sparsecomp.errors import FormatError
from sparsecomp.files.storage import load
from sparsecomp.nn import SparseLinear
from sparsecomp.packing import pack


class Beside(nn.Module):
    """A sparse or dense layer, and whatever is registered beside it."""

    def __init__(self, sparse=False, **buffers):
        super().__init__()
        self.lin = packed(1) if sparse else nn.Linear(16, 4)
        for name, value in buffers.items():
            self.register_buffer(name, value)


def packed(seed, pattern="2:4", cls=SparseLinear, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(4, 16)
    weight[:, ::8] = torch.randn(4, 2, generator=generator)
    return cls.from_packed(pack(weight, pattern), torch.randn(4, generator=generator), **options)


def facts(model):
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(name, id(module), list(vars(module))) for name, module in model.named_modules()],
        [id(each) for each in tensors],
        [(each.dtype, tuple(each.shape), each.tolist()) for each in tensors],
        [str(module.get_extra_state()) for module in model.modules() if isinstance(module, Extra)],
    )


def assert_refused(path, model, message, error=FormatError):
    before = str(facts(model))
    with pytest.raises(error, match=message):
        load(path, into=model)
    assert str(facts(model)) == before


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = torch.zeros(3)

    def get_extra_state(self):
        return self.state.clone()

    def set_extra_state(self, state):
        self.state = state
