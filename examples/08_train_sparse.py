"""Fine-tune under masks in a loop of your own, with 8-bit integers in it, and compile what was trained."""

import copy

import torch
from small import accuracy, data, trained

import sparsecomp as sc

STEPS = 120


def fine_tune(model: torch.nn.Module, optimizer: torch.optim.Optimizer, teacher: torch.nn.Module) -> None:
    """A loop as anybody writes it: nothing in it knows of masks."""
    for step in range(STEPS):
        x, classes = data(7000 + step, rows=512)
        with torch.no_grad():
            wanted = teacher(x)
        sc.distillation_loss(model(x), wanted, classes).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def learner(dense: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A copy of the dense model that can learn, and its optimizer."""
    model = copy.deepcopy(dense).train().requires_grad_(True)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


dense = trained()
print(f"dense: {accuracy(dense):.1%} right")
model, optimizer = learner(dense)
fine_tune(model, optimizer, dense)
print(f"dense, trained on: {accuracy(model):.1%} right")

# blocks alone: what comes first and last is small and costs most
calibration = sc.calibrate(dense, [data(seed)[0] for seed in range(5000, 5004)])
model, optimizer = learner(dense)
name = "4:16+int8@a8"
sparse = sc.sparsify(model, name, optimizer, start="fast", calibration=calibration, steps=STEPS, only="blocks.*")
print(f"{name}, one shot: {accuracy(model):.1%} right")
fine_tune(model, optimizer, dense)
print(f"{name}, trained: {accuracy(model):.1%} right")
print(sparse)

sparse.bake()
sc.compile(model.eval(), name, only="blocks.*", where="everywhere")
packed = sum(isinstance(each, sc.SparseLinear) for each in model.modules())
print(f"packed {packed} layers: {accuracy(model):.1%} right")
