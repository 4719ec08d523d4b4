"""What GPU backends ask of the machine, a CUDA device and a Triton that are new enough, and of x. Knows no backend."""

from __future__ import annotations

import re
from importlib import import_module

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)
MINIMUM_TRITON = (3, 6)


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


def missing_triton() -> str | None:
    """None if Triton 3.6 or newer can be imported, else the reason why not."""
    try:
        version = str(import_module("triton").__version__)
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({error}); install sparsecomp[triton]"
    wanted = ".".join(str(part) for part in MINIMUM_TRITON)
    # what stands behind, as in "3.9.0+git1a2b" or "3.10rc1", is of no matter
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return f'Triton\'s version "{version}" cannot be read; install {wanted} or newer'
    if (int(found[1]), int(found[2])) < MINIMUM_TRITON:
        return f"Triton {version} is too old; install {wanted} or newer"
    return None


def missing_gluon() -> str | None:
    """None if ``missing_triton`` is and Gluon has the names the kernels use, else the reason why not."""
    if reason := missing_triton():
        return reason
    try:
        import_module("sparsecomp.kernels.gluon_compat")
    except Exception as error:
        version = import_module("triton").__version__
        return f"the Gluon of Triton {version} is not one the kernels know ({error}); install Triton 3.6 to 3.9"
    return None


def with_unit_columns(x: Tensor) -> Tensor:
    """``x`` [batch, in] itself if neighbours in a row lie side by side, as the Triton kernels read it, else a copy."""
    # the stride of a single column means nothing
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
