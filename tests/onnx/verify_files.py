"""Small ONNX files written as text, weights with and without a 2:4 pattern, and what the verifier says of them."""

import numpy as np
import onnx
from onnx import numpy_helper, parser

from sparsecomp.onnx import verify

X = "float[N, 8] x"
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "local" : 1, "other" : 1]>'


def two_of_four(*shape, dtype=np.float32, seed=0):
    """Random numbers of which the first of two axes from behind, the reduced one of MatMul, is 2:4."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 7, shape).astype(dtype)
    weight = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    weight.reshape(-1, 4)[:, [1, 3]] = 0
    return np.ascontiguousarray(np.swapaxes(weight, -1, -2))


def three_of_four(*shape, dtype=np.float32):
    """The same with one group too full."""
    weight = two_of_four(*shape, dtype=dtype)
    weight[..., 1, 0] = 3
    return weight


GOOD, BAD = two_of_four(8, 8), three_of_four(8, 8)


def written(tmp_path, text, **tensors):
    """A file of this text in ONNX's own syntax, with tensors as initialisers."""
    model = parser.parse_model(f"{HEAD}\n{text}")
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return save(tmp_path, model)


def save(tmp_path, model):
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def verdict(path, pattern="2:4"):
    """(names that fit, names that do not, names not seen) of a file; its text must not say more than that."""
    report = verify(path, pattern)
    fitting = [w.name for w in report.weights if w.fits]
    broken = [w.name for w in report.weights if not w.fits]
    unseen = [u.name for u in report.unseen]
    assert report.fits == bool(fitting and not broken and not unseen)
    for name in unseen:
        assert name in str(report)
    assert ("not said to fit" in str(report)) == bool(unseen)
    return fitting, broken, unseen
