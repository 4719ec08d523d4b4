"""Which backends there are, which of them can run a request, and why the others cannot.

Takes a ``PackedWeight``, gives a ``Kernel`` (the weight in one backend's layout). Knows nothing of nn, plan or prune.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.activations import activate
from sparsecomp.errors import BackendError, ModelError
from sparsecomp.pack.format import PackedWeight, pack
from sparsecomp.patterns import Pattern

# In the order in which they are preferred: sparse kernels, then a dense product of the unpacked weight, then the truth.
_ADAPTERS = (
    ("sparsecomp.backends.cusparselt", "CusparseltBackend"),
    ("sparsecomp.backends.semi_structured", "SemiStructuredBackend"),
    ("sparsecomp.backends.triton_vnm", "TritonVnmBackend"),
    ("sparsecomp.backends.triton", "TritonBackend"),
    ("sparsecomp.backends.gluon", "GluonBackend"),
    ("sparsecomp.backends.gluon", "GluonTf32Backend"),
    ("sparsecomp.backends.gluon", "GluonInt8Backend"),
    ("sparsecomp.backends.cutlass", "CutlassBackend"),
    ("sparsecomp.backends.cutlass_e4m3", "CutlassFp8Backend"),
    ("sparsecomp.backends.cutlass_e4m3", "CutlassFp8TensorBackend"),
    ("sparsecomp.backends.gluon_wgmma", "GluonWgmmaBackend"),
    ("sparsecomp.backends.triton_block", "TritonBlockBackend"),
    ("sparsecomp.backends.cpu", "CpuBackend"),
    ("sparsecomp.backends.dense", "DenseBackend"),
    ("sparsecomp.backends.reference", "ReferenceBackend"),
)


QUANTIZED_TENSORS = 3  # of a kernel: values, metadata, scales

Weight = PackedWeight | Tensor  # a dense one is [out, in]


# (x [..., in], bias, dense_above) -> y [..., out], or None if the dispatcher has to see the call; see sparsecomp.eager
EagerProduct = Callable[[Tensor, Tensor | None, int | None], Tensor | None]


@dataclass(frozen=True)
class Request:
    """One linear product y[batch, out] = x[batch, in] W^T, as backends are asked about it.

    ``dtype`` is that of x and y. The weight is stored in it, or, with ``quantized``, in int8 with row scales.
    """

    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    device: str
    batch: int
    quantized: bool = False

    @property
    def weight_dtype(self) -> torch.dtype:
        """Element type in which the weight is stored."""
        return torch.int8 if self.quantized else self.dtype


@dataclass(frozen=True, eq=False)
class Kernel:
    """A weight [out, in] prepared for one backend: the only copy a live layer holds.

    ``dtype`` is that of x and y. Int8 weights have a third tensor, their row scales.
    ``arguments`` are constants the backend derived from the other fields, so that no call derives them again.
    ``refused`` names backends that were tried before this one and could not prepare the weight, each with the reason.
    ``sizes`` are the bytes of each tensor, for a backend that checks them before it reads raw memory.
    """

    backend: str
    tensors: tuple[Tensor, ...]
    pattern: Pattern
    shape: tuple[int, int]
    dtype: torch.dtype
    arguments: tuple[int, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the weights are int8 with row scales."""
        # an fp8 layout has scales too, and stands for a floating weight
        return len(self.tensors) == QUANTIZED_TENSORS and self.tensors[0].dtype != torch.float8_e4m3fn

    @property
    def nbytes(self) -> int:
        """Bytes of the layout."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Backend(ABC):
    """A family of kernels. Stateless; one instance is registered under its name.

    ``by_name_only`` is why nobody gets it without asking for it by name: it computes less exactly than others do.
    ``of_a_vendor``: the kernels are torch's or the GPU vendor's, who answer for the architectures they run on.
    """

    name: ClassVar[str]
    fuses_activations: ClassVar[bool] = False
    by_name_only: ClassVar[str | None] = None
    of_a_vendor: ClassVar[bool] = False

    @abstractmethod
    def missing(self) -> str | None:
        """None if this machine can run the backend at all, else the reason why not."""

    def refusal(self) -> str | None:
        """Why kernels that are installed refuse this machine or its settings, so that layers run slower unasked."""
        return None

    @abstractmethod
    def supports(self, request: Request) -> str | None:
        """None if the backend runs this request here, else the reason why not."""

    @abstractmethod
    def prepare(self, packed: PackedWeight) -> Kernel:
        """The weight in this backend's layout, on the device of ``packed``."""

    def prepare_dense(self, weight: Tensor, pattern: Pattern) -> Kernel:
        """What ``prepare`` makes of ``pack(weight, pattern)``, for a dense weight [out, in] that fits the pattern."""
        return self.prepare(pack(weight, pattern))

    @abstractmethod
    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form back from the layout, exactly."""

    def adopt(
        self, tensors: tuple[Tensor, ...], pattern: Pattern, shape: tuple[int, int], dtype: torch.dtype
    ) -> Kernel:
        """The kernel whose layout these tensors, prepared earlier by this backend, already are."""
        return Kernel(self.name, tensors, pattern, shape, dtype)

    def dense(self, kernel: Kernel) -> Tensor:
        """The dense weight [out, in] of the kernel's dtype, as a temporary."""
        return self.restore(kernel).unpack()

    @abstractmethod
    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] for x [batch, in] of the kernel's dtype and device; ``x`` may have any row stride."""

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run``, then an activation of ``sparsecomp.activations``; a backend that can fuse it overrides this."""
        return activate(self.run(kernel, x, bias), activation)

    def eager(self, kernel: Kernel, activation: str, otherwise: EagerProduct) -> EagerProduct | None:
        """A cheaper function that does what ``otherwise`` does, which it may call; None if there is none."""
        return None


@lru_cache(maxsize=1)
def backends() -> Mapping[str, Backend]:
    """Every backend by name, in order of preference; no optional package is imported by asking."""
    adapters = [getattr(import_module(module), name)() for module, name in _ADAPTERS]
    return MappingProxyType({adapter.name: adapter for adapter in adapters})


def explain(request: Request) -> list[tuple[str, str | None]]:
    """Each backend's answer to a request, in order of preference: its name, and None or the reason why not."""
    return [
        (name, backend.missing() or backend.supports(request) or backend.by_name_only)
        for name, backend in backends().items()
    ]


def sparse_backends(request: Request) -> list[str]:
    """Names of the sparse kernels that run a request, in order of preference: all that are worth measuring.

    Those that compute less exactly than the dtype allows are not among them.
    """
    answers = explain(request)
    fallback = [name for name, _ in answers].index("dense")
    return [name for name, reason in answers[:fallback] if reason is None]


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


def prepared(weight: Weight, pattern: Pattern, wanted: str | None, preferred: str | None = None) -> Kernel:
    """The layout of a weight, packed or dense [out, in] and fitting ``pattern``, for its device and dtype.

    By the backend ``wanted``, whose errors are the caller's. With none wanted, by ``preferred`` if it runs the weight,
    else by the first that does; one that cannot prepare it after all is named in a warning, and the next is tried.
    Raises ModelError if the one wanted is unknown or does not run the weight, BackendError if none could prepare it.
    """
    if weight.device.type == "meta":
        return _prepare("dense", weight, pattern)
    quantized = not isinstance(weight, Tensor) and weight.scales is not None
    shape = (weight.shape[0], weight.shape[1])
    request = Request(pattern, shape, weight.dtype, str(weight.device), batch=1, quantized=quantized)
    if wanted is not None:
        if wanted not in backends():
            raise ModelError(f'backend "{wanted}" is not known; use one of {", ".join(backends())}')
        if reason := backends()[wanted].missing() or backends()[wanted].supports(request):
            raise ModelError(f'backend "{wanted}" {reason}; leave backend=None to have one chosen')
        return _prepare(wanted, weight, pattern)
    able = [name for name, reason in explain(request) if reason is None] or [choose(request)]
    if weight.device.type == "cpu" and (refusal := backends()["cpu"].refusal()) is not None:
        _warn_refused(refusal)
    refused: list[tuple[str, str]] = []
    for name in sorted(able, key=lambda name: name != preferred):
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
