"""The compiled extension, or the reason why it is not there or refuses this machine. Knows no kernel of it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

# as csrc/include/sparsecomp.h has them
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
ROUNDING_CODE = 4  # of int8 weights whose product rounds activations


@lru_cache(maxsize=1)
def extension() -> ModuleType | str:
    """The compiled extension, whose kernels may refuse this machine, or the reason why there is none."""
    try:
        return import_module("sparsecomp._native")
    except ImportError as error:
        return f"the compiled extension is not there ({error}); install the package with a C++ compiler available"


@lru_cache(maxsize=1)
def native() -> ModuleType | str:
    """The compiled extension, or the reason why its kernels cannot be used here."""
    module = extension()
    if isinstance(module, str):
        return module
    try:
        module.isa()
    except RuntimeError as error:
        return f"the compiled extension refuses this machine: {error}"
    return module
