"""Models with sparse layers, and the ways to run an ONNX file."""

import numpy as np
import torch
from torch import nn

from sparsecomp.nn import SparseLinear
from sparsecomp.packing import pack
from sparsecomp.patterns import Block, parse, row_nm


def random_sparse_layer(out, columns, pattern, *, bias=True, dtype=torch.float32, seed=0, activation="none"):
    """A SparseLinear of random weights that fit, with as many nonzeros as the pattern allows."""
    generator = torch.Generator().manual_seed(seed)
    value = parse(pattern)
    weight = torch.randn(out, columns, generator=generator)
    if isinstance(value, Block):
        down, across = value.grid(out, columns)
        order = torch.randperm(down * across, generator=generator)
        kept = torch.zeros(down * across, dtype=torch.bool)
        kept[order[: value.kept_blocks(out, columns)]] = True
        mask = kept.view(down, across).repeat_interleave(value.rows, 0).repeat_interleave(value.cols, 1)
    else:
        nm = row_nm(value)
        rows = getattr(value, "v", nm.mask_rows)  # a mask shared by V rows fits V:N:M as well
        scores = torch.rand(-(-out // rows), nm.groups(columns), nm.m, generator=generator)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(nm.n).indices, True)
        mask = kept.flatten(1).repeat_interleave(rows, 0)
    weight = (weight * mask[:out, :columns]).to(dtype)
    offset = torch.randn(out, generator=generator).to(dtype) if bias else None
    return SparseLinear.from_packed(pack(weight, pattern), offset, activation=activation)


class Mixed(nn.Module):
    """Sparse layers with and without bias, one of them used twice, around dense ones."""

    def __init__(self, pattern="2:4", dtype=torch.float32):
        super().__init__()
        self.up = random_sparse_layer(26, 22, pattern, dtype=dtype, seed=1)
        self.twice = random_sparse_layer(26, 26, pattern, bias=False, dtype=dtype, seed=2)
        self.also = self.twice
        self.down = nn.Linear(26, 10).to(dtype)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(self.drop(x + self.also(self.twice(x))))


def run_stock(path, *arrays):
    """Outputs of ONNX Runtime without the operator library."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return run_session(session, *arrays)


def run_session(session, *arrays):
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


def run_reference(path, *arrays):
    """Outputs of the evaluator of the onnx package, which follows the specification and folds nothing."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(path))
    names = [entry.name for entry in model.graph.input]
    return ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))[0]


def torch_output(model, *inputs):
    with torch.no_grad():
        return model(*inputs).float().numpy()


def assert_close(got, want, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert got.shape == want.shape
    largest = float(np.abs(want).max(initial=1.0))
    np.testing.assert_allclose(np.asarray(got).astype(np.float32), want, rtol=tolerance, atol=tolerance * largest)
