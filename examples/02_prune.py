"""Prune a trained model with calibration data and read the report.

"magnitude" keeps the largest weights. "fast" looks at what the layers see, and changes the weights that it keeps.
"""

import copy

from small import accuracy, data, trained

import sparsecomp as sc

dense = trained()
print(f"dense: {accuracy(dense):.1%} right")

# a Gram matrix for each layer: what its inputs look like. Give at least four rows for each input of a layer.
calibration = sc.calibrate(dense, [data(seed)[0] for seed in range(5000, 5004)])

for method in ("magnitude", "fast"):
    model = copy.deepcopy(dense)
    report = sc.prune(model, "1:4", method=method, calibration=calibration, only="blocks.*")
    print(f"{method}: {accuracy(model):.1%} right")

# one row for each layer: how much of its output was lost, and on how many rows of data that is based
print(report)
worst = max(report.layers, key=lambda name: report.layers[name].error)
print(f"worst layer: {worst}; its mask keeps {report.masks[worst].float().mean():.0%} of the weights")
