import pytest
import torch

from sparsecomp.errors import ModelError
from sparsecomp.training import sparsify


@pytest.mark.parametrize(
    ("pattern", "method", "scope"),
    [
        ("2:4", "movement", "layer"),
        ("8:16", "movement", "layer"),
        ("block4x4:0.3", "movement", "layer"),
        ("block4x4:0.3", "movement", "global"),
        ("block4x4:0.3", "soft-movement", "global"),
        ("unstructured:0.2", "soft-movement", "global"),
        ("2:4", "rigl", "layer"),
        ("8:16", "rigl", "layer"),
        ("block4x4:0.3", "rigl", "global"),
        ("unstructured:0.2", "rigl", "global"),
    ],
)
def test_convolutions_whose_channels_fill_no_group_are_trained_to_their_pattern(pattern, method, scope):
    torch.manual_seed(0)
    # a last group of 4 or of 16 ends with the channels of one kernel position
    model = torch.nn.Sequential(torch.nn.Conv2d(18, 10, 3), torch.nn.ReLU(), torch.nn.Conv2d(10, 12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = sparsify(model, pattern, optimizer, method, steps=30, scope=scope)
    first = handle.masks
    for _ in range(30):
        model(torch.randn(2, 18, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(first) == (1 if pattern == "8:16" else 2)  # 10 channels are fewer than 16
    assert any(not torch.equal(first[name], mask) for name, mask in handle.masks.items())
    assert handle.density < 0.75
    handle.bake()  # which checks the pattern of each layer, where layers have one


def test_a_training_without_a_sparse_layer_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3))
    with pytest.raises(ModelError, match=r"0: the convolution has 6 input channels.*fits their shapes"):
        sparsify(model, "8:16", torch.optim.SGD(model.parameters(), lr=0.1), "movement", steps=10)
