"""What GPU backends ask of the machine, a CUDA device and a Triton that are new enough, and of x. Knows no backend."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)
MINIMUM_TRITON = (3, 6)
NEWEST_GLUON = (3, 9)
# the project's own kernel for the sparse tensor cores by the major number of the compute capability
SPARSE_CORE_PATHS = {8: "gluon", 9: "cutlass"}
CHECKED_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))


def missing_cuda() -> str | None:
    """None if torch sees an NVIDIA GPU of compute capability 8.0 or newer, else the reason why not."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm; install a CUDA build of torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the NVIDIA driver and CUDA_VISIBLE_DEVICES"
    reasons = [too_old(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def too_old(device: str) -> str | None:
    """None if that CUDA device has compute capability 8.0 or newer, else the reason why not."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= MINIMUM_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed"


def on_gpu(tensor: Tensor) -> bool:
    """Whether layouts of that tensor are made by kernels."""
    return tensor.is_cuda


def uncertified(device: str) -> str | None:
    """None if the project's kernels are compiled and checked for that CUDA device, else what to know about it."""
    capability = torch.cuda.get_device_capability(device)
    if capability in CHECKED_CAPABILITIES:
        return None
    names = ", ".join(f"sm_{major}{minor}" for major, minor in CHECKED_CAPABILITIES)
    return (
        f"not certified on sm_{capability[0]}{capability[1]}: the kernels are compiled and checked for {names}; "
        f"compare results with layer.to_linear() first"
    )


def not_the_path(name: str, device: str) -> str | None:
    """None if the backend ``name`` is the project's way to the sparse tensor cores of that device, else the reason.

    There is one on each architecture until a run on hardware decides between them.
    """
    capability = torch.cuda.get_device_capability(device)
    path = SPARSE_CORE_PATHS.get(capability[0])
    if path == name:
        return None
    on = f"sm_{capability[0]}{capability[1]}"
    instead = f"{path} is" if path else "none is before hardware has decided"
    return f'is not the way to the sparse tensor cores of {on} that is taken unasked ({instead}): backend="{name}"'


def missing_triton() -> str | None:
    """None if Triton 3.6 or newer can be imported and can make its launchers here, else the reason why not."""
    try:
        version = str(import_module("triton").__version__)
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({error}); install sparsecomp[triton]"
    wanted = ".".join(str(part) for part in MINIMUM_TRITON)
    # what stands behind, as in "3.9.0+git1a2b" or "3.10rc1", is of no matter
    number = _release(version)
    if number is None:
        return f'Triton\'s version "{version}" cannot be read; install {wanted} or newer'
    if number < MINIMUM_TRITON:
        return f"Triton {version} is too old; install {wanted} or newer"
    return _missing_compiler()


def missing_gluon() -> str | None:
    """None if Triton is there in a version whose Gluon the kernels were compiled with, else the reason why not.

    Gluon is experimental: names move between releases, and kernels then fail while they are compiled.
    """
    reason = missing_triton()
    if reason is not None:
        return reason
    version = import_module("triton").__version__
    number = _release(version)
    newest = ".".join(str(part) for part in NEWEST_GLUON)
    if number is None or number > NEWEST_GLUON:
        return (
            f"Gluon of Triton {version} is newer than the kernels, which compile with 3.6 to {newest}; install {newest}"
        )
    try:
        import_module("sparsecomp.kernels.gluon_compat")
    except Exception as error:  # of any kind, as it comes from a library that changes
        return f"Gluon of Triton {version} lacks what the kernels need ({error}); install {newest}"
    return None


def with_unit_columns(x: Tensor) -> Tensor:
    """``x`` [batch, in] itself if neighbours in a row lie side by side, as the Triton kernels read it, else a copy."""
    # the stride of a single column means nothing
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _release(version: str) -> tuple[int, int] | None:
    """(3, 6) of "3.6.0+git1a2b3c", None of "main"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


@lru_cache(maxsize=1)
def _missing_compiler() -> str | None:
    """None if Triton can build the C extension through which it talks to the driver, or has built it before."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does on Debian
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if compiler is not None and shutil.which(compiler) is None:
        reason = f"needs a C compiler, and CC names {compiler}, which is not there; correct CC"
    elif compiler is None:
        reason = "needs a C compiler to talk to the driver; install gcc or set CC"
    elif not header.is_file():
        reason = f"needs {header} to talk to the driver; install Python's headers, such as python3-dev"
    else:
        return None
    # the extension may be in Triton's cache
    return None if _triton_starts() else f"Triton {reason}"


def _triton_starts() -> bool:
    try:
        import_module("triton.runtime").driver.active.get_current_device()
    except Exception:  # of any kind: a compiler's, the loader's, Triton's own
        return False
    return True
