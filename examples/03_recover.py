"""Win back what pruning cost: train the kept weights to do what the dense model does. No labels are needed."""

import copy

from small import accuracy, data, trained

import sparsecomp as sc

dense = trained()
print(f"dense: {accuracy(dense):.1%} right")

model = copy.deepcopy(dense)
calibration = sc.calibrate(model, [data(seed)[0] for seed in range(5000, 5004)])
report = sc.prune(model, "1:8", method="fast", calibration=calibration, only="blocks.*")
print(f"pruned to 1:8: {accuracy(model):.1%} right")

# the masks stay as they are; output= says what of the model's result is compared
tuned = sc.distill(
    model,
    teacher=dense,
    batches=[data(seed, rows=256)[0] for seed in range(6000, 6032)],
    masks=report.masks,
    output=lambda scores, batch: scores,
    tuning=sc.Tuning(steps=100, learning_rate=1e-3),
)
print(tuned)
print(f"distilled: {accuracy(model):.1%} right")

zeros = all(bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in report.masks.items())
print(f"every pruned weight is still zero: {zeros}")
