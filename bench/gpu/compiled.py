"""Compiled layers against nn.Linear on a GPU, as a model calls them: ``sparsecomp.compile`` measures and decides.

``python -m bench.gpu.compiled --output DIR`` writes gpu.json and gpu.txt there. The times are those of eager
calls, queued without waiting: what the plan decides on, launches included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import sparsecomp
from bench.gpu.cases import MODELS, TOKENS, Case, copies
from bench.gpu.machine import describe, watch
from bench.gpu.sampler import GpuSampler
from bench.gpu.supervise import Journal
from bench.gpu.sweep import TOLERANCE, distance, gathered, random_operands, row, write
from sparsecomp.engines.timing import measure
from sparsecomp.errors import SparsecompError
from sparsecomp.nn import SparseLinear

SHAPES = (*MODELS["Llama-3-8B"], *MODELS["BERT-base"][:1])
_FINISHING_S = 5.0


def layer_cases() -> list[Case]:
    """Every shape with every batch size, shape by shape: a layer is compiled once for all of them."""
    return [Case(*shape, tokens, "compiled layers") for shape in SHAPES for tokens in TOKENS]


def measure_layer(
    of_one_shape: Sequence[Case], l2_bytes: int, seconds: float, deadline: float, journal: Journal, device: str = "cuda"
) -> None:
    """Compile layers of that shape for all its batch sizes, and record the times beside those of nn.Linear."""
    first = min(of_one_shape, key=lambda case: case.tokens)
    operands = random_operands(first, torch.bfloat16, copies(first, l2_bytes), device)
    weights = [weight for weight, _ in operands]
    dense = [_linear(weight) for weight in weights]
    model = nn.Sequential(*(_linear(weight) for weight in weights))
    compiled = list(sparsecomp.compile(model, "2:4", batch=[case.tokens for case in of_one_shape]).children())
    for case in of_one_shape:
        if time.monotonic() > deadline:
            return
        x = torch.randn(case.tokens, case.columns, device=device).bfloat16()
        error = distance(compiled[0](x), weights[0], x)
        if error > TOLERANCE["bf16"]:
            journal.add(failed=f"sparsecomp compiled, {case}: relative error {error:.2e}; not timed")
            continue
        samplers = {
            name: GpuSampler([lambda layer=layer, x=x: layer(x) for layer in layers], graphs=False)  # type: ignore[misc]
            for name, layers in (("nn.Linear", dense), ("sparsecomp compiled", compiled))
        }
        for name, timing in measure(samplers, seconds).items():
            sparse = name != "nn.Linear"
            note = _kind(compiled[0]) if sparse else ""
            journal.add(row=row(case, "bf16", name, sparse, note, timing, error, graph=False))
        journal.add(done=str(case))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where there is no GPU or a compiled layer failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of gpu.json and gpu.txt")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds in all; cases not begun by then are left out"
    )
    parser.add_argument("--seconds", type=float, default=0.08, help="of timing for each case")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; run this where there is one", file=sys.stderr)
        return 1
    deadline = time.monotonic() + given.limit - _FINISHING_S
    given.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(given.output / "journal.jsonl")
    journal.path.unlink(missing_ok=True)
    machine = describe()
    journal.add(machine=machine)
    wanted = layer_cases()
    during: dict[str, tuple[float, float]] = {}
    with watch(during), torch.inference_mode():
        for shape in SHAPES:
            if time.monotonic() > deadline:
                break
            group = [case for case in wanted if (case.out, case.columns) == shape]
            try:
                measure_layer(group, machine["l2_mib"] << 20, given.seconds, deadline, journal)
            except (SparsecompError, RuntimeError) as error:
                journal.add(failed=f"sparsecomp compiled, {shape[0]}x{shape[1]}: {type(error).__name__}: {error}"[:300])
            torch.cuda.empty_cache()
    result = gathered(journal, wanted, during)
    print(write(result, given.output))
    return int(bool(result["failed"]))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, SparseLinear):
        above = layer.dense_above
        return layer.kernel.backend + ("" if above is None else f", dense from {above} rows")
    return "stays dense"


if __name__ == "__main__":
    sys.exit(main())
