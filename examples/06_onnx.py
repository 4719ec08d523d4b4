"""Export a packed model to ONNX and run it in ONNX Runtime. Needs: pip install 'sparsecomp[onnx]'."""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import sparsecomp as sc

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
if missing:
    sys.exit(f"skipped: {', '.join(missing)} is not installed; pip install 'sparsecomp[onnx]'")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).eval().requires_grad_(False)
sc.compile(model, "2:4", method="magnitude", where="everywhere")
x = torch.randn(4, 512)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.onnx"
    print(sc.export_onnx(model, (x,), path, input_names=["x"]))

    # with the operator library of this package the products are sparse
    [y] = sc.onnx_session(path).run(None, {"x": x.numpy()})
    print(f"sparse, in ONNX Runtime: largest difference {(torch.from_numpy(y) - model(x)).abs().max():.0e}")

    # without it the same file runs, dense
    import onnxruntime

    stock = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [y] = stock.run(None, {"x": x.numpy()})
    print(f"dense, in stock ONNX Runtime: largest difference {(torch.from_numpy(y) - model(x)).abs().max():.0e}")

    print(sc.verify_onnx(path, "2:4"))
