"""Another default device or dtype of torch changes nothing: every tensor the package makes says both."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# function of torch -> what a call must name, as torch would otherwise take its default
FACTORIES = {
    **dict.fromkeys(["empty", "zeros", "ones", "eye", "rand", "randn", "linspace", "logspace"], ("device", "dtype")),
    **dict.fromkeys(["empty_strided", "full", "tensor", "arange", "range", "hann_window"], ("device", "dtype")),
    **dict.fromkeys(["randint", "randperm", "tril_indices", "triu_indices", "as_tensor"], ("device",)),
    "Generator": ("device",),
}
CLASSES = {"Tensor", "FloatTensor", "LongTensor"}
# arguments whose dtype torch infers from integers or bools and not from its default
INFERRED = {"arange", "full", "tensor", "range"}


def calls(source: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line, factory, what it does not name) of every call of a factory of torch."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch"):
            continue
        if name in CLASSES:
            yield node.lineno, name, ["a factory function: a class takes the defaults"]
        given = {keyword.arg for keyword in node.keywords}
        wanted = FACTORIES.get(name, ())
        if None in given or not wanted:  # **facts
            continue
        numbers = [each for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, float)]
        infers = name in INFERRED and not numbers
        if name == "Generator" and node.args:
            continue
        missing = [each for each in wanted if each not in given and not (infers and each == "dtype")]
        if missing:
            yield node.lineno, name, missing


@pytest.mark.parametrize("folder", ["sparsecomp", "kernels"])
def test_every_tensor_names_its_device_and_dtype(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: torch.{name} without {' and '.join(missing)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name, missing in calls(path.read_text())
    ]
    assert found == []


def test_the_scan_sees_what_takes_a_default() -> None:
    source = "torch.empty(3)\ntorch.full((2,), 1, device=d)\ntorch.full((2,), 1.0, device=d)\ntorch.zeros(2, **facts)\n"
    assert list(calls(source)) == [(1, "empty", ["device", "dtype"]), (3, "full", ["dtype"])]


# a program that sets another default after its imports; the model stays on the CPU in float32
PROGRAM = """
import copy, io, sys, torch
from torch import nn
import sparsecomp as sc

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
x = torch.randn(40, 32)
sc.prune(model, "2:4", "magnitude", show_progress=False)
want = model(x).detach()
torch.set_default_device(sys.argv[1])
torch.set_default_dtype(getattr(torch, sys.argv[2]))
calibration = sc.calibrate(model, [x], show_progress=False)
for method in ("magnitude", "wanda", "sparsegpt", "fast", "balanced", "best"):
    pruned = sc.prune(copy.deepcopy(model), "2:4", method, calibration, show_progress=False)
    assert len(pruned.layers) == 2
sc.prune(copy.deepcopy(model), "block4x4:0.5", "magnitude", show_progress=False)
for pattern in ("2:4", "8:16", "2:4@v4", "block4x4:0.5"):
    sc.prune(other := copy.deepcopy(model), pattern, "magnitude", show_progress=False)
    sc.compile(other, pattern, where="everywhere")
    assert other[0].kernel.backend == "cpu" and other(x).device.type == "cpu"
sc.compile(model, "2:4", where="everywhere")
layer = model[0]
assert layer.kernel.backend == "cpu" and layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32
assert {each.device.type for each in model.state_dict().values()} == {"cpu"}
for each in (model, copy.deepcopy(model)):
    y = each(x)
    assert y.device.type == "cpu" and y.dtype is torch.float32 and torch.allclose(y, want, atol=1e-5)
int8 = sc.SparseLinear.from_linear(layer.to_linear(), "2:4", quantized=True)
assert int8(x).dtype is torch.float32
buffer = io.BytesIO()
torch.save(model, buffer)
buffer.seek(0)
assert torch.allclose(torch.load(buffer, weights_only=False)(x), want, atol=1e-5)
sc.save(model, "model.safetensors")
fresh = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval().to_empty(device="cpu").float()
assert torch.allclose(sc.load("model.safetensors", into=fresh)(x), want, atol=1e-5)
print(sc.plan(nn.Sequential(layer.to_linear()), "2:4", batch=4))
fast = sc.compile(nn.Sequential(layer.to_linear()), "2:4", batch=4)
assert fast(x).device.type == "cpu"
layer.explain(batch=4)
blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32, device="cpu", dtype=torch.float32)) for _ in range(2))).eval()
dense = copy.deepcopy(blocks)
report = sc.prune_blocks(blocks, [x, x, x], "2:4", "wanda", tuning=sc.Tuning(steps=2), show_progress=False)
sc.distill(blocks, dense, [x, x, x], masks=report.masks, tuning=sc.Tuning(steps=2), show_progress=False)
print("as without")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), [("meta", "float32"), ("cpu", "float64"), ("meta", "bfloat16")])
def test_a_program_with_other_defaults_gets_the_same(device: str, dtype: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), device, dtype], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("as without\n"), done.stderr
