"""Ask what this machine turns into speed, before any weight is touched."""

import torch
from torch import nn

import sparsecomp as sc

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()

# each layer is timed dense (in torch) and sparse at each batch size; times are kept for the next run
plan = sc.plan(model, "auto", batch=(1, 64))
print(plan)

# the same as values
for layer in plan.layers:
    print(f"layer {layer.name}: {'dense' if layer.pattern is None else layer.pattern}, because {layer.reason}")
print(f"{plan.totals()['share']:.1%} of the weights go sparse")

# compile follows the plan; nothing is timed again
sc.compile(model, plan, method="magnitude")
