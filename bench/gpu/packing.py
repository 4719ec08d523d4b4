"""How long a GPU takes to make the layouts of its backends: our kernels beside the torch packer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from sparsecomp.backends import registry
from sparsecomp.backends.choice import Choice
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import pack
from sparsecomp.packing.layouts.fragments import to_fragments
from sparsecomp.patterns import parse, row_nm

SIDES = (4096, 8192)
_ROUNDS = 9


def packing_rows(sides: tuple[int, ...] = SIDES) -> list[dict[str, Any]]:
    """Microseconds, medians, for a square bf16 2:4 weight.

    "dense", "canonical" and "torch" are the layout of the sparse tensor cores, from the dense weight, from the
    canonical form, and from it by torch; "planes" is that of the triton backend, and "default" what a layer moved to
    the GPU waits for, by the "backend" it gets. Raises RuntimeError if a kernel's layout is not that of the torch
    packer. Nothing where the gluon backend cannot run.
    """
    if registry.backends()["gluon"].missing() is not None:
        return []
    kernels = import_module("sparsecomp.kernels.pack_fragments")
    nm = row_nm(parse("2:4"))
    assert nm is not None
    found = []
    for side in sides:
        weight = torch.randn(side, side // 4, 4, device="cuda")
        dense = (weight * (torch.rand_like(weight).argsort(dim=2) < 2)).flatten(1).bfloat16()
        packed = pack(dense, "2:4")
        ways: dict[str, Callable[[], Any]] = {
            "dense": partial(kernels.pack_dense, dense),
            "canonical": partial(kernels.pack_fragments, packed.values, packed.metadata, nm, side),
            "torch": partial(to_fragments, packed),
        }
        # the first way also counts nonzeros
        layouts = [call()[:2] for call in ways.values()]
        if not all(torch.equal(made, twin) for each in layouts for made, twin in zip(each, layouts[-1], strict=True)):
            raise RuntimeError(f"the packing kernels differ from the torch packer for {side}x{side}")
        backend = registry.choose(Request(packed.pattern, packed.shape, packed.dtype, "cuda", 1))
        ways["planes"] = partial(registry.backends()["triton"].prepare, packed)
        ways["default"] = partial(registry.prepared, packed, Choice(packed.pattern))
        found.append({"side": side, "backend": backend, **{name: _microseconds(call) for name, call in ways.items()}})
    return found


def _microseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e3)
    return float(f"{statistics.median(times):.4g}")
