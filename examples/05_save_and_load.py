"""Save a packed model as one safetensors file, and load it into a model that was just built."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import sparsecomp as sc


def build() -> nn.Module:
    """The architecture; the file holds weights only."""
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).eval().requires_grad_(False)


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    model = sc.compile(build(), "2:4", method="magnitude", where="everywhere")
    sc.save(model, path, metadata={"note": "random weights"})
    dense_bytes = sum(4 * each.numel() for each in build().state_dict().values())
    print(f"the file is {path.stat().st_size / dense_bytes:.0%} of the dense weights")

    loaded = sc.load(path, into=build())
    x = torch.randn(4, 512)
    print(f"the same outputs, bit for bit: {torch.equal(loaded(x), model(x))}")

    # a file that was damaged is refused, and no layer is touched
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    try:
        sc.load(path, into=build())
    except sc.errors.FormatError as error:
        print(f"damaged: {str(error).replace(folder, '.')}")
