"""The ways to compute one linear layer on a GPU that the sweep compares, each behind the same three questions.

Takes dense weights that fit 2:4, or 1:2 in fp32; gives calls. Knows nothing of timing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.cases import Case
from bench.gpu.engine import Call, GpuEngine
from bench.gpu.fp8 import fp8_engines, not_compiled
from sparsecomp.backends import registry
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.config import configs
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns import parse
from sparsecomp.patterns.numbers import FLOAT, INT8, Numbers


class Cublas(GpuEngine):
    """torch's linear."""

    name, sparse = "cublas", False

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """torch.nn.functional.linear."""
        return lambda: functional.linear(x, weight)


class CublasTf32(Cublas):
    """torch's linear, allowed to round fp32 to tf32."""

    name = "cublas tf32"

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """torch.nn.functional.linear with the permission given for the call only."""

        def call() -> Tensor:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                return functional.linear(x, weight)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return call


class CublasInt8(GpuEngine):
    """cuBLAS on int8 weights and on x rounded token by token, as our int8 backend rounds it, by the same kernel."""

    name, sparse = "cublas int8", False

    def missing(self) -> str | None:
        """The kernel that rounds x needs what the gluon_int8 backend needs."""
        return registry.backends()["gluon_int8"].missing()

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """torch._int_mm asks for more than 16 tokens and for multiples of 8."""
        if case.tokens <= 16 or case.out % 8 or case.columns % 8:
            return f"takes more than 16 tokens and sides that are multiples of 8, not {case}"
        return None

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """Rounding, torch._int_mm and the scales."""
        quantize_rows = import_module("sparsecomp.kernels.quantize_rows").quantize_rows
        scales = weight.float().abs().amax(dim=1) / 127
        integers = (weight.float() / scales[:, None]).round().to(torch.int8).t()

        def call() -> Tensor:
            rounded, tokens = quantize_rows(x)
            y: Tensor = (torch._int_mm(rounded, integers) * tokens[:, None] * scales).to(x.dtype)
            return y

        return call


class TritonDense(GpuEngine):
    """Our own dense kernel in Triton."""

    name, sparse = "triton dense", False

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """The kernel of ``gpu_dense``."""
        dense_linear = import_module("bench.gpu.dense").dense_linear
        return lambda: dense_linear(x, weight)


class Cusparselt(GpuEngine):
    """cuSPARSELt with the algorithm that its own search finds for each shape."""

    name, sparse = "cusparselt", True

    def __init__(self) -> None:
        """Nothing is found yet."""
        self._algorithms: dict[tuple[int, int, int], int] = {}

    def missing(self) -> str | None:
        """Why the cusparselt backend cannot run."""
        return registry.backends()["cusparselt"].missing()

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """Why the cusparselt backend refuses the weight, or the batch that it would have to pad."""
        return registry.backends()["cusparselt"].supports(_request(case, dtype))

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """The compressed weight; x is padded to 8 rows once, so that the library alone is timed."""
        compressed = torch._cslt_compress(weight)
        tokens = x.shape[0]
        rows = functional.pad(x, (0, 0, 0, -tokens % 8)).t()
        key = (*weight.shape, tokens)
        if key not in self._algorithms:
            self._algorithms[key] = torch._cslt_sparse_mm_search(compressed, rows, transpose_result=True)
        algorithm = self._algorithms[key]
        return lambda: torch._cslt_sparse_mm(compressed, rows, transpose_result=True, alg_id=algorithm)[:tokens]

    def note(self, case: Case) -> str:
        """The algorithm."""
        return f"algorithm {self._algorithms.get((case.out, case.columns, case.tokens))}"


class SemiStructured(GpuEngine):
    """torch.sparse.to_sparse_semi_structured, with torch's own choice of library."""

    name, sparse = "torch semi-structured", True

    def missing(self) -> str | None:
        """Why torch's semi-structured tensors cannot be used: what holds for cuSPARSELt holds for them."""
        return registry.backends()["cusparselt"].missing()

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """torch asks for sides that are multiples of 64 where CUTLASS might be used."""
        if case.out % 64 or case.columns % 64:
            return f"takes sides that are multiples of 64, not {case.out}x{case.columns}"
        return None

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """A semi-structured parameter under torch's linear."""
        semi: Any = torch.sparse.to_sparse_semi_structured(weight)
        return lambda: functional.linear(x, semi)


class Ours(GpuEngine):
    """A backend of this package, as a layer calls it."""

    sparse = True

    def __init__(self, backend: str, numbers: Numbers = FLOAT) -> None:
        """``backend`` is a name in the registry, ``numbers`` are what the weight is stored in."""
        self._backend, self._numbers = registry.backends()[backend], numbers
        self.name = f"sparsecomp {backend}"

    def missing(self) -> str | None:
        """Why the backend cannot run here."""
        return self._backend.missing()

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """Why the backend refuses the case."""
        return self._backend.supports(_request(case, dtype, self._numbers))

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """The layout; the first call compiles, and tunes where there is something to tune."""
        pattern = parse(pattern_of(weight.dtype))
        if self._numbers.has_scales:
            kernel = self._backend.prepare(in_numbers(pack(weight, pattern), self._numbers))
        else:
            # in one pass where the backend has a kernel for it: a case has up to 160 weights
            kernel = self._backend.prepare_dense(weight, pattern)
        return lambda: self._backend.run(kernel, x, None)

    def note(self, case: Case) -> str:
        """The configuration that was found fastest."""
        # bytes of an element in the tensor cores, and of an output
        sizes = {"gluon": (2, 2), "gluon_int8": (1, 2), "gluon_tf32": (4, 4)}.get(self._backend.name)
        if sizes is None:
            return ""
        kernels, tuning = (import_module(f"sparsecomp.kernels.{name}") for name in ("sparse_mma", "sparse_mma_tuning"))
        key = kernels.tuning_key(torch.cuda.current_device(), case.out, case.columns, case.tokens, *sizes)
        return str(tuning.known(key))


class OursCutlass(Ours):
    """The CUTLASS backend, as a layer calls it."""

    def __init__(self) -> None:
        """No weight is prepared yet."""
        super().__init__("cutlass")
        self._element = ""

    def missing(self) -> str | None:
        """Why the backend cannot run here; it does not compile in the middle of a sweep."""
        return super().missing() or not_compiled(configs("bfloat16", "bfloat16"))

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """The layout; the first call measures some kernels."""
        self._element = str(weight.dtype).removeprefix("torch.")
        return super().prepare(weight, x)

    def note(self, case: Case) -> str:
        """The kernel that was found fastest."""
        product = (torch.cuda.current_device(), configs(self._element, self._element), case.out, case.columns)
        key = cutlass_library.tuning_key(*product, case.tokens)
        return str(import_module("sparsecomp.kernels.sparse_mma_tuning").known(key))


def engines(elements: str = "bf16") -> list[GpuEngine]:
    """All of them, baselines first: for bf16 and fp16, for int8 weights and activations, for fp8, or for fp32 ("tf32").

    The weights of int8 are given in bf16, in which cuBLAS is a baseline of theirs, too.
    """
    if elements == "int8":
        return [Cublas(), CublasInt8(), Ours("gluon_int8", INT8)]
    if elements == "fp8":
        return fp8_engines()
    if elements == "tf32":
        return [Cublas(), CublasTf32(), Ours("gluon_tf32")]
    return [
        Cublas(),
        TritonDense(),
        Cusparselt(),
        SemiStructured(),
        Ours("gluon"),
        OursCutlass(),
        Ours("gluon_wgmma"),
        Ours("triton"),
    ]


def pattern_of(dtype: torch.dtype) -> str:
    """What the sparse tensor cores take of weights in that dtype."""
    return "1:2" if dtype == torch.float32 else "2:4"


def _request(case: Case, dtype: torch.dtype, numbers: Numbers = FLOAT) -> Request:
    shape = case.out, case.columns
    return Request(parse(pattern_of(dtype)), shape, dtype, "cuda", case.tokens, numbers)
