"""``sparsecomp doctor``: what this machine can run, and why the rest is missing."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_EXAMPLE = """\
example: sparsecomp doctor

The exit code is 0 if a compiled kernel can run here, and 1 if only dense fallbacks can.
"""

# package -> what it is for
OPTIONAL = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "running exported models",
    "triton": "GPU kernels",
    "cupy": "arrays of CuPy",
    "openvino": "a dense baseline of bench",
    "transformers": "Hugging Face folders as MODEL",
}


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the verb."""
    parser = verbs.add_parser("doctor", help="say what this machine can run and what is missing", epilog=_EXAMPLE)
    parser.add_argument("--quick", action="store_true", help="do not measure the machine's peaks")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    import torch

    import sparsecomp as sc
    from sparsecomp.backends.registry import backends
    from sparsecomp.display import table
    from sparsecomp.onnx.session import library_path

    print(f"sparsecomp {sc.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    reasons = {name: backend.missing() for name, backend in backends().items()}
    print(_devices(quick=arguments.quick))
    print()
    rows = [(name, "ready" if reason is None else "missing", reason or "") for name, reason in reasons.items()]
    library = library_path()
    rows.append(
        ("onnxruntime operators", "ready" if library else "missing", "" if library else "the library was not built")
    )
    print(table(("backend", "state", "why"), rows))
    print()
    packages = [(name, _version(name), purpose) for name, purpose in OPTIONAL.items()]
    print(table(("optional package", "version", "used for"), packages))
    compiled = [name for name, reason in reasons.items() if reason is None and name not in ("dense", "reference")]
    if not compiled:
        print(
            "\nNo compiled kernel can run here, so sparse layers multiply dense; reinstall with a C++ compiler at hand."
        )
    return 0 if compiled else 1


def _devices(quick: bool) -> str:
    import torch

    from sparsecomp.device import detect

    lines = []
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = detect(kind)
        lines.append(device.describe())
        if kind == "cpu":
            from sparsecomp.backends.cpu import native

            module = native()
            if not isinstance(module, str):
                lines.append(f"     instruction sets: {module.isa_available()} (SPARSECOMP_ISA names a lower one)")
            lines.append(f"     natural pattern at half the weights: {device.natural_pattern()}")
        if not quick:
            dtypes = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
            peaks = ", ".join(f"{name} {device.flops(dtype) / 1e9:.0f} GFLOP/s" for name, dtype in dtypes)
            lines.append(f"     measured peaks: {peaks}, memory {device.bandwidth() / 1e9:.0f} GB/s")
    if not torch.cuda.is_available():
        lines.append("cuda: torch sees no GPU")
    return "\n".join(lines)


def _version(package: str) -> str:
    if find_spec(package) is None:
        return "not installed"
    for distribution in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "installed"
