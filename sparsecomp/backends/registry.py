"""Which backends there are, which of them can run a request, and why the others cannot.

Takes a ``PackedWeight``, gives a ``Kernel`` (the weight in one backend's layout). Knows nothing of
nn, planning or pruning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel, Weight
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import require_packable
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import FLOAT

# In the order in which they are preferred: sparse kernels, then a dense product of the unpacked weight, then the truth.
_ADAPTERS = (
    ("sparsecomp.backends.gpu.cusparselt", "CusparseltBackend"),
    ("sparsecomp.backends.gpu.semi_structured", "SemiStructuredBackend"),
    ("sparsecomp.backends.gpu.triton_vnm", "TritonVnmBackend"),
    ("sparsecomp.backends.gpu.triton", "TritonBackend"),
    ("sparsecomp.backends.gpu.gluon", "GluonBackend"),
    ("sparsecomp.backends.gpu.cutlass.backend", "CutlassBackend"),
    ("sparsecomp.backends.gpu.cutlass.e4m3", "CutlassFp8Backend"),
    ("sparsecomp.backends.gpu.cutlass.e4m3", "CutlassFp8TensorBackend"),
    ("sparsecomp.backends.gpu.triton_block", "TritonBlockBackend"),
    ("sparsecomp.backends.gpu.experimental.gluon_numbers", "GluonTf32Backend"),
    ("sparsecomp.backends.gpu.experimental.gluon_numbers", "GluonInt8Backend"),
    ("sparsecomp.backends.gpu.experimental.gluon_wgmma", "GluonWgmmaBackend"),
    ("sparsecomp.backends.cpu", "CpuBackend"),
    ("sparsecomp.backends.dense", "DenseBackend"),
    ("sparsecomp.backends.reference", "ReferenceBackend"),
)


@lru_cache(maxsize=1)
def backends() -> Mapping[str, Backend]:
    """Every backend by name, in order of preference; no optional package is imported by asking."""
    adapters = [getattr(import_module(module), name)() for module, name in _ADAPTERS]
    return MappingProxyType({adapter.name: adapter for adapter in adapters})


def explain(request: Request) -> list[tuple[str, str | None]]:
    """Each backend's answer to a request, in order of preference: its name, and None or the reason why not."""
    return [
        (name, backend.missing() or backend.supports(request) or backend.by_name_only(request))
        for name, backend in backends().items()
    ]


def sparse_backends(request: Request) -> list[str]:
    """Names of the sparse kernels that run a request, in order of preference: all that are worth measuring.

    Those that compute less exactly than the dtype allows are not among them.
    """
    return [name for name, reason in explain(request) if reason is None and backends()[name].sparse]


def why_no_kernel(request: Request) -> str:
    """The name and the reason of the backend that comes nearest to running a request which none runs sparse."""
    nearest = next(name for name, backend in backends().items() if backend.nearest(request))
    return f"{nearest}: {dict(explain(request))[nearest]}"


def choose(request: Request) -> str:
    """Name of the first backend that runs a request.

    Raises BackendError with every backend's reason if none does.
    """
    answers = explain(request)
    for name, reason in answers:
        if reason is None:
            return name
    reasons = "; ".join(f"{name}: {reason}" for name, reason in answers)
    raise BackendError(
        f"no backend runs a {request.pattern} weight of shape {request.shape} in {request.dtype} on {request.device} "
        f"({reasons}); convert the layer to torch.float32 or keep it dense"
    )


# tensors made under inference_mode could never be part of a graph afterwards
@torch.inference_mode(False)
@torch.no_grad()
def prepared(weight: Weight, choice: Choice) -> Kernel:
    """The layout of a weight, packed or dense [out, in] and fitting the pattern chosen, for its device and dtype.

    By the backend chosen: if it is pinned its errors are the caller's, else the first that runs the weight takes its
    place where it does not; one that cannot prepare it after all is named in a warning, and the next is tried.
    Raises ModelError if the one pinned is unknown or does not run the weight, BackendError if none could prepare it,
    PatternError for a dense weight that ``pack`` refuses.
    """
    pattern = choice.pattern
    if isinstance(weight, Tensor):
        weight = weight.detach()
        require_packable(weight, pattern)
    if weight.device.type == "meta":
        return _prepare("dense", weight, pattern)
    numbers = FLOAT if isinstance(weight, Tensor) else weight.numbers
    shape = (weight.shape[0], weight.shape[1])
    request = Request(pattern, shape, weight.dtype, str(weight.device), batch=1, numbers=numbers)
    if choice.pinned and (wanted := choice.backend) is not None:
        if wanted not in backends():
            raise ModelError(f'backend "{wanted}" is not known; use one of {", ".join(backends())}')
        if reason := backends()[wanted].missing() or backends()[wanted].supports(request):
            raise ModelError(f'backend "{wanted}" {reason}; leave backend=None to have one chosen')
        return _prepare(wanted, weight, pattern)
    if choice.backend is not None and choice.backend not in backends():
        _warn_once(f'backend "{choice.backend}" is not known here; known are {", ".join(backends())}')
    able = [name for name, reason in explain(request) if reason is None] or [choose(request)]
    if weight.device.type == "cpu" and (refusal := backends()["cpu"].refusal()) is not None:
        _warn_refused(refusal)
    refused: list[tuple[str, str]] = []
    for name in sorted(able, key=lambda name: name != choice.backend):
        try:
            kernel = _prepare(name, weight, pattern)
        except Exception as error:
            if not of_a_library(error):
                raise
            refused.append((name, f"could not prepare this weight ({first_line(error)})"))
            _warn_once(f"the {name} backend could not prepare a {pattern} weight {shape}: {first_line(error)}")
        else:
            return replace(kernel, refused=tuple(refused)) if refused else kernel
    reasons = "; ".join(f"{name} {reason}" for name, reason in refused)
    raise BackendError(f"no backend could prepare a {pattern} weight of shape {shape} ({reasons}); keep it dense")


def _prepare(name: str, weight: Weight, pattern: Pattern) -> Kernel:
    backend = backends()[name]
    return backend.prepare_dense(weight, pattern) if isinstance(weight, Tensor) else backend.prepare(weight)


def of_a_library(error: Exception) -> bool:
    """Whether an error says that a library or this machine gave up, rather than that a weight or our code is wrong."""
    return isinstance(error, RuntimeError | ImportError | OSError) or type(error).__module__.startswith("triton")


def first_line(error: Exception) -> str:
    """What an error says, shortened to its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    warnings.warn(f"{message}; the next one is taken, see layer.explain()", stacklevel=4)


@lru_cache(maxsize=1)
def _warn_refused(refusal: str) -> None:
    warnings.warn(
        f"sparse layers multiply dense here: {refusal}; correct that, see: sparsecomp doctor",
        RuntimeWarning,
        stacklevel=4,
    )
