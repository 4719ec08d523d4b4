"""Whether eager calls may go past torch's dispatcher here: the functions which that takes, or the reason why not.

Takes torch, the extension and ``SPARSECOMP_EAGER``, and never raises. Knows nothing of kernels.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsecomp.machine.native import native

if TYPE_CHECKING:
    from sparsecomp.nn.eager.watch import Watch

SWITCH = "SPARSECOMP_EAGER"
# Torch promises none of the functions, so each minor version is let in by name: these have the functions alike. The
# tests run with 2.13; a newer one is let in by running them with it.
FIRST, BEYOND = (2, 11), (2, 14)


@dataclass(frozen=True)
class Functions:
    """What calls past the dispatcher ask: ``watch`` in Python, and ``extension``, which asks the same in C.

    ``extension`` is None where it cannot take part; ``in_python`` then says why calls of the CPU kernels go by Python.
    """

    watch: Watch
    extension: object | None
    in_python: str | None = None


@lru_cache(maxsize=1)
def probe() -> Functions | str:
    """The functions, or in one sentence without an end why every call goes through the dispatcher; asked once."""
    try:
        return _why_not() or _functions()
    except Exception as error:  # whatever another torch meets: layers are right without
        return f"torch {torch.__version__} is not as it is known here ({type(error).__name__}: {error})"


def warn_of_a_mistake() -> None:
    """Warn once where the variable says neither on nor off; probe() takes that for off."""
    asked = _asked()
    if asked not in ("on", "off"):
        _warn_once(_mistaken(asked))


def _asked() -> str:
    return os.environ.get(SWITCH, "").strip().lower() or "on"


def _mistaken(asked: str) -> str:
    return f'{SWITCH}={asked} is neither "on" nor "off" and counts as "off"; set one of them, or unset it'


@lru_cache(maxsize=1)
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _why_not() -> str | None:
    asked = _asked()
    if asked != "on":
        return f"{SWITCH}=off" if asked == "off" else _mistaken(asked)
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or not FIRST <= (int(version[1]), int(version[2])) < BEYOND:
        first, beyond = (".".join(map(str, each)) for each in (FIRST, BEYOND))
        return f"torch {torch.__version__} is outside what is tested, which is from {first} up to, without, {beyond}"
    return None


def _functions() -> Functions:
    from sparsecomp.nn.eager import watch  # names what another torch may lack

    found = watch.find()
    module = native()
    if isinstance(module, str):
        return Functions(found, None, module)
    held = _held_by(module, found)
    return Functions(found, held) if not isinstance(held, str) else Functions(found, None, held)


def _held_by(module: ModuleType, found: Watch) -> object | str:
    """The extension's hold of torch, or why it has none."""
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return f"torch {torch.__version__} has no table of DLPack's functions"
    keys = found.watchers, found.included, found.raw, found.plain, found.levels
    functions = torch.get_num_threads, torch.is_grad_enabled, Tensor.is_neg, Tensor.new_empty, Tensor.contiguous
    try:
        held: object | None = module.torch_functions(table, Tensor, nn.Parameter, *keys, *functions)
    except (AttributeError, TypeError) as error:
        return f"the compiled extension is of another version ({error}); install the package again"
    return f"torch {torch.__version__} has another version of DLPack's table" if held is None else held
