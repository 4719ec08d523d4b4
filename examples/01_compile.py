"""Compile a small model and compare it with the dense one: outputs, time and bytes.

Weights are random here, so masks by magnitude will do; 02_prune.py shows what a trained model wants.
"""

import copy
import time

import torch
from torch import nn

import sparsecomp as sc


def milliseconds(models: list[nn.Module], x: torch.Tensor) -> list[float]:
    """The median time of a call of each model; they are called in turn, so that a busy moment meets all of them."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(30):
        for model, kept in zip(models, times, strict=True):
            model(x)
            begin = time.perf_counter()
            model(x)
            kept.append(1e3 * (time.perf_counter() - begin))
    return [sorted(kept)[len(kept) // 2] for kept in times]


torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).eval().requires_grad_(False)

# half of the weights become zero; the layers are still nn.Linear
pruned = copy.deepcopy(dense)
sc.prune(pruned, "2:4", method="magnitude")

# each layer that is faster so on this machine becomes a SparseLinear
sparse = sc.compile(copy.deepcopy(pruned), "2:4", batch=(1, 8))
packed = [name for name, layer in sparse.named_modules() if isinstance(layer, sc.SparseLinear)]
print(f"packed {len(packed)} of 2 layers")
for name in packed:
    weight = sparse.get_submodule(name).packed()
    print(f"layer {name}: {weight.nbytes / 1e6:.1f} MB of {weight.dense_nbytes / 1e6:.1f} MB")

x = torch.randn(8, 1024)
print(f"largest difference to the pruned model: {(sparse(x) - pruned(x)).abs().max():.0e}")
for batch in (1, 8):
    before, after = milliseconds([dense, sparse], torch.randn(batch, 1024))
    print(f"batch {batch}: torch {before:.2f} ms, sparse {after:.2f} ms, {before / after:.2f}x")
