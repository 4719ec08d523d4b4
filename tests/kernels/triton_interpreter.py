"""Runs kernels in Triton's interpreter on the CPU.

In a process of its own, since TRITON_INTERPRET counts when triton is imported:
``interpret(cases)`` gives a result for every case; the file run as a program is its other half.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gpu_cases import Case

ROOT = Path(__file__).resolve().parents[2]


def interpret(cases: list[Case]) -> list[Tensor]:
    """y [batch, out] of the triton backends for every case."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "cases.pt"), Path(folder, "results.pt")
        torch.save(
            [(case.weight, case.pattern, case.x, case.bias, case.quantized, case.activation) for case in cases], given
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.kernels.triton_interpreter", str(given), str(made)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(made)


def repair_interpreter() -> None:
    """Mends what Triton 3.6's interpreter gets wrong, so that the kernel under test needs no branch for it."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        # scalars are arrays of shape (1,), which numpy >= 2.4 no longer turns into the int that range() asks for
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    convert = interpreter._convert_float
    bfloat16, float32 = tl.bfloat16, tl.float32

    def convert_rounding(data, source, target, rounding_mode):
        # bf16 is held as uint16; the interpreter truncates where the hardware rounds to nearest even
        if (source, target) == (float32, bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding_mode)

    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot_with_bfloat16(self, a, b, d, input_precision, max_num_imprecise_acc):
        # a product of bf16 is exact in fp32, but numpy would multiply the bit patterns
        a, b = (
            interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), float32)
            if operand.dtype.scalar == bfloat16
            else operand
            for operand in (a, b)
        )
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter._patch_lang_tensor = patch_with_index
    interpreter._convert_float = convert_rounding
    interpreter.InterpreterBuilder.create_dot = dot_with_bfloat16


def fenced(tensor: Tensor) -> Tensor:
    """The tensor in front of 4 KiB of set bits, NaN in every float type, so that reads past its end show."""
    octets = torch.full((tensor.nbytes + 4096,), 255, dtype=torch.uint8)
    front = octets[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return front.copy_(tensor)


def _prepared(packed: Any) -> Any:
    from sparsecomp.backends.registry import backends
    from sparsecomp.errors import BackendError

    for name in ("triton_vnm", "triton_block"):
        with suppress(BackendError):
            return backends()[name].prepare(packed)
    return backends()["triton"].prepare(packed)


def _main(given: str, made: str) -> None:
    repair_interpreter()
    from sparsecomp.backends.registry import backends
    from sparsecomp.packing.format import pack
    from sparsecomp.packing.quantize import quantize

    results = []
    for weight, pattern, x, bias, quantized, activation in torch.load(given):
        packed = pack(weight, pattern)
        kernel = _prepared(quantize(packed) if quantized else packed)
        kernel = replace(kernel, tensors=tuple(fenced(tensor) for tensor in kernel.tensors))
        backend = backends()[kernel.backend]
        results.append(backend.run_activated(kernel, x, bias, activation))
    torch.save(results, made)


if __name__ == "__main__":
    _main(*sys.argv[1:])
