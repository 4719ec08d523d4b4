"""``sparsecomp doctor``: what this machine can run, and why the rest is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from dataclasses import asdict
from typing import Any

from sparsecomp.cli.packages import look, missing_torch

_EXAMPLE = """\
example: sparsecomp doctor

The matrix shows what each backend answers for each pattern, on the devices of this machine; nothing is run for it.
--json prints the same facts as JSON: rates in operations and bytes a second, a reason for each backend that is missing.
The exit code is 0 if a compiled kernel can run here, and 1 if only dense fallbacks can.
"""

# package -> what it is for
OPTIONAL = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "running exported models",
    "triton": "GPU kernels",
    "cupy": "arrays of CuPy",
    "openvino": "bench, plan --engines",
    "transformers": "Hugging Face folders as MODEL",
}
_FALLBACKS = ("dense", "reference")
_OPERATORS = "onnxruntime operators"
# variables of others that change what this package does; its own all begin with SPARSECOMP_
_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "XDG_CACHE_HOME", "CUTLASS_PATH", "CUDA_HOME", "CUDA_PATH", "CC")


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("doctor", help="say what this machine can run and what is missing", epilog=_EXAMPLE)
    parser.add_argument("--quick", action="store_true", help="do not measure the machine's peaks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    with warnings.catch_warnings():
        # a refused machine is what the table and the last line are about
        warnings.simplefilter("ignore", RuntimeWarning)
        facts = _facts(quick=arguments.quick)
    print(json.dumps(facts, indent=1, allow_nan=False) if arguments.json else _text(facts))
    return 0 if facts["compiled"] else 1


def _facts(quick: bool) -> dict[str, Any]:
    import sparsecomp as sc

    facts: dict[str, Any] = {"sparsecomp": sc.__version__, "python": platform.python_version()}
    reason = missing_torch()
    if reason is None:
        facts |= _facts_of_torch(quick)
    else:
        facts |= {"torch": None, "devices": [], "backends": {}, "onnxruntime_operators": False}
        facts |= {"compiled": [], "refused": reason, "eager_calls": None, "support": {}}
    found = look(OPTIONAL)
    facts["packages"] = {name: None if each.problem else each.version for name, each in found.items()}
    facts["package_problems"] = {name: str(each) for name, each in found.items() if each.problem}
    ours = sorted(name for name in os.environ if name.startswith("SPARSECOMP_"))
    facts["environment"] = {name: os.environ[name] for name in (*ours, *_VARIABLES) if name in os.environ}
    return facts


def _facts_of_torch(quick: bool) -> dict[str, Any]:
    import torch

    from sparsecomp.backends.cpu import CpuBackend
    from sparsecomp.backends.registry import backends
    from sparsecomp.backends.support import support
    from sparsecomp.machine.device import detect
    from sparsecomp.onnx.session import library_path

    reasons = {name: backend.missing() for name, backend in backends().items()}
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "torch": str(torch.__version__),
        "devices": [_device(kind, quick) for kind in kinds],
        "backends": {name: {"ready": reason is None, "reason": reason} for name, reason in reasons.items()},
        "onnxruntime_operators": library_path() is not None,
        "compiled": [name for name, reason in reasons.items() if reason is None and name not in _FALLBACKS],
        "refused": CpuBackend().refusal(),
        "eager_calls": _eager(),
        "support": {kind: [asdict(row) for row in support(detect(kind).place)] for kind in kinds},
    }


def _eager() -> dict[str, Any]:
    """Whether eager calls go past torch's dispatcher, and why not, or why not in C."""
    from sparsecomp.nn.eager.probe import probe

    found = probe()
    if isinstance(found, str):
        return {"past_the_dispatcher": False, "reason": found}
    return {"past_the_dispatcher": True, "reason": found.in_python}


def _device(kind: str, quick: bool) -> dict[str, Any]:
    import torch

    from sparsecomp.machine.device import detect
    from sparsecomp.machine.native import native

    device = detect(kind)
    found: dict[str, Any] = {"kind": kind, "description": device.describe(), "instruction_sets": None}
    found |= {"natural_pattern": str(device.natural_pattern()), "flops": None, "bytes_per_second": None}
    rates = {str(columns): device.pair_rate(columns) for columns in (1, 4, 8, 16)}
    found["pairs_per_second"] = None if None in rates.values() else rates
    module = native()
    if kind == "cpu" and not isinstance(module, str):
        found["instruction_sets"] = str(module.isa_available()).split(",")
    if not quick:
        dtypes = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        found["flops"] = {name: device.flops(dtype) for name, dtype in dtypes}
        found["bytes_per_second"] = device.bandwidth()
    return found


def _text(facts: dict[str, Any]) -> str:
    from sparsecomp.cli.matrix import matrix
    from sparsecomp.reporting.terminal import table, wrap

    torch = facts["torch"]
    lines = [
        f"sparsecomp {facts['sparsecomp']}, Python {facts['python']}, "
        f"{'no torch' if torch is None else f'torch {torch}'}"
    ]
    for device in facts["devices"]:
        lines.append(wrap(device["description"], indent="     "))
        if device["instruction_sets"] is not None:
            sets = ", ".join(device["instruction_sets"])
            lines.append(wrap(f"     instruction sets: {sets} (SPARSECOMP_ISA names a lower one)", indent="       "))
        lines.append(f"     natural pattern at half the weights: {device['natural_pattern']}")
        if device["pairs_per_second"] is not None:
            lines.append(wrap(_rates_line(device["pairs_per_second"]), indent="       "))
        if device["flops"] is not None:
            peaks = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in device["flops"].items())
            memory = f"memory {device['bytes_per_second'] / 1e9:.0f} GB/s"
            lines.append(wrap(f"     measured peaks: {peaks}, {memory}", indent="       "))
    if torch is not None and all(device["kind"] != "cuda" for device in facts["devices"]):
        lines.append("cuda: torch sees no GPU")
    if facts["eager_calls"] is not None:
        lines.append(wrap(_eager_line(facts["eager_calls"]), indent="  "))
    set_here = ", ".join(f"{name}={value}" for name, value in facts["environment"].items())
    lines.append(wrap(f"environment: {set_here or 'no variable that changes this package is set'}", indent="  "))
    problems = facts["package_problems"]
    packages = [
        (name, problems.get(name) or facts["packages"][name] or "not installed", purpose)
        for name, purpose in OPTIONAL.items()
    ]
    if facts["backends"]:
        lines += ["", table(("backend", "state", "why"), _backend_rows(facts))]
    for kind, rows in facts["support"].items():
        lines += ["", *matrix(kind, rows)]
    lines += ["", table(("optional package", "version", "used for"), packages)]
    if not facts["compiled"]:
        why = facts["refused"]
        if torch is None:
            return "\n".join([*lines, "", wrap(f"Nothing can run here: {why}.", indent="")])
        how = why if why is not None else "reinstall with a C++ compiler at hand"
        lines += ["", wrap(f"No compiled kernel can run here, so sparse layers multiply dense: {how}.", indent="")]
    return "\n".join(lines)


def _rates_line(rates: dict[str, float]) -> str:
    """What the kernels of AVX2, and with them the natural pattern, are chosen by."""
    permutes = ", ".join(f"groups of {columns} {rates[columns] / 1e9:.1f}" for columns in ("4", "8", "16"))
    return f"     permutes with a multiply-add, 10^9/s: {permutes}; multiply-adds alone {rates['1'] / 1e9:.1f}"


def _eager_line(told: dict[str, Any]) -> str:
    if not told["past_the_dispatcher"]:
        return f"layers: eager calls go through torch's dispatcher, which takes longer: {told['reason']}"
    how = "" if told["reason"] is None else f", in Python: {told['reason']}"
    return f"layers: eager calls go past torch's dispatcher (SPARSECOMP_EAGER=off: through it){how}"


def _backend_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Those that are ready, then those that are missing, in one row for each reason."""
    rows = [(name, "ready", "") for name, each in facts["backends"].items() if each["ready"]]
    operators = facts["onnxruntime_operators"]
    rows += [(_OPERATORS, "ready", "")] * operators
    missing: dict[str, list[str]] = {}
    for name, each in facts["backends"].items():
        if not each["ready"]:
            missing.setdefault(each["reason"], []).append(name)
    for reason, names in missing.items():
        one = len(names) == 1
        rows.append(
            (names[0] if one else f"{len(names)} others", "missing", reason if one else f"{', '.join(names)}: {reason}")
        )
    if not operators:
        rows.append((_OPERATORS, "missing", "the library was not built"))
    return rows
