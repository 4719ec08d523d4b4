"""A torch that lacks what it never promised: the package imports, and layers are right, through the dispatcher.

The names are hidden from the package alone, as after a change of torch's, whose own code would know the new ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# hides names of torch's modules from every caller within the package, then uses a layer in all ways
PROGRAM = """
import builtins, copy, io, sys, types
import torch
import torch.autograd.forward_ad, torch.nn.modules.module

HIDDEN = sys.argv[1].split(",")

def hidden(module, name):
    full = f"{module}.{name}"
    return full in HIDDEN or ("all" in HIDDEN and name.startswith("_") and not name.startswith("__"))

def asked_by_the_package():
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("sparsecomp")

class Hiding(types.ModuleType):
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name == "__name__" or not asked_by_the_package():
            return found
        module = super().__getattribute__("__name__")
        if name == "__dict__" and any(hidden(module, each) for each in found):
            return {each: value for each, value in found.items() if not hidden(module, each)}
        if hidden(module, name):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return found

for module in ("torch", "torch._C", "torch._C._functorch", "torch.autograd.forward_ad", "torch.nn.modules.module"):
    sys.modules[module].__class__ = Hiding
true_import = builtins.__import__

def importing(name, *args, **named):
    if ("all" in HIDDEN or name in HIDDEN) and name in ("torch.utils._python_dispatch", "torch._dynamo"):
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("sparsecomp"):
            raise ModuleNotFoundError(f"No module named {name!r}")
    return true_import(name, *args, **named)

builtins.__import__ = importing

import sparsecomp as sc
from sparsecomp.nn.eager.probe import probe

torch.manual_seed(0)
x = torch.randn(3, 40)
dense = torch.nn.Linear(40, 24)
layer = sc.SparseLinear.from_linear(dense, "2:4", method="magnitude")
linear = layer.to_linear()
found = probe()
assert isinstance(found, str) is (sys.argv[2] == "dispatcher"), found

for kind in (torch.float32, torch.bfloat16):
    close = dict(rtol=1e-4, atol=1e-4) if kind is torch.float32 else dict(rtol=3e-2, atol=3e-2)
    with torch.no_grad():
        torch.testing.assert_close(layer.to(kind)(x.to(kind)), linear.to(kind)(x.to(kind)), **close)
layer.float(), linear.float()
with torch.autocast("cpu", torch.bfloat16):
    torch.testing.assert_close(layer(x), linear(x), rtol=3e-2, atol=3e-2)
gradients = []
for each in (layer, linear):
    given = x.clone().requires_grad_()
    each(given).square().sum().backward()
    gradients.append((given.grad, each.bias.grad))
for got, want in zip(*gradients):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
    torch.testing.assert_close(transform(layer)(x), transform(linear)(x), rtol=1e-4, atol=1e-4)
with torch.autograd.forward_ad.dual_level():
    dual = torch.autograd.forward_ad.make_dual(x, x)
    got, want = (torch.autograd.forward_ad.unpack_dual(each(dual)).tangent for each in (layer, linear))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
seen = []
with layer.register_forward_hook(lambda *_: seen.append("hook")):
    layer(x)
assert seen == ["hook"]
if "all" in HIDDEN:
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x), rtol=1e-4, atol=1e-4)
if sys.argv[2] == "dispatcher":
    assert any(found in note for note in layer.explain().notes)
model = torch.nn.Sequential(layer, torch.nn.ReLU())
assert not layer.weight.requires_grad and torch.equal(layer.weight + 0, linear.weight)
sc.save(model, "model.safetensors")
into = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU())
with torch.no_grad():
    torch.testing.assert_close(sc.load("model.safetensors", into=into)(x), torch.relu(linear(x)), rtol=1e-4, atol=1e-4)
buffer = io.BytesIO()
torch.save(copy.deepcopy(model), buffer)
print("as with all names")
"""

# what the eager path asks of torch, and other names that it asked in the past
DISPATCHER = [
    "torch._C._dispatch_tls_local_include_set",
    "torch._C._dispatch_tls_local_exclude_set",
    "torch._C.DispatchKeySet",
    "torch._C._is_any_autocast_enabled",
    "torch._C._is_torch_function_mode_enabled",
    "torch.autograd.forward_ad._current_level",
    "torch.utils._python_dispatch",
    "torch._C",
    "all",
]
PAST = [
    "torch._C._len_torch_dispatch_stack,torch._C._is_tracing,torch._C._functorch,torch._functorch",
    "torch._C._dynamo,torch._dynamo",
    "torch._C.DisableTorchFunctionSubclass,torch._C.TensorBase",
    "torch.nn.modules.module._global_forward_hooks,torch.nn.modules.module._global_backward_hooks",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "way"), [*((each, "dispatcher") for each in DISPATCHER), *((each, "past it") for each in PAST)]
)
def test_layers_are_right_without(names: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSECOMP_EAGER", raising=False)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), names, way], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("as with all names\n"), done.stderr
