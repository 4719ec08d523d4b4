"""Who wants to see an eager call: modes of dispatcher and functions, transforms, traces, autocast, dual levels.

Takes what torch keeps to itself, and raises where that is not as it is known. Knows nothing of kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Keys that a thread adds to every call of the dispatcher where nothing watches. Modes, transforms and traces add some,
# those too that no list names.
_ADDED = {"BackendSelect", "ADInplaceOrView"}
_ADDED_IN_INFERENCE_MODE = {"BackendSelect"}
# What it leaves out until somebody wants it. Only autocast watches by a key that is no longer left out.
_LEFT_OUT = "Autocast"


@dataclass(frozen=True)
class Watch:
    """The functions that tell whether an eager call is watched.

    Each of ``watchers`` gives something true while it watches. ``raw(included())`` is an integer for the keys that this
    thread adds, and ``plain`` what it is where nothing watches, outside and inside inference mode. ``levels`` is the
    namespace in which ``_current_level`` is negative outside all levels of forward-mode differentiation.
    """

    watchers: tuple[Callable[[], object], ...]
    included: Callable[[], object]
    raw: Callable[[Any], int]
    plain: tuple[int, int]
    levels: dict[str, Any] = field(repr=False)

    def nobody(self) -> bool:
        """Whether no mode, transform, trace or dual level wants to see this call: the dispatcher may be bypassed."""
        for watches in self.watchers:  # any() costs 0.2 us more
            if watches():
                return False
        return self.raw(self.included()) in self.plain and self.levels["_current_level"] < 0


def find() -> Watch:
    """The functions of this torch; LookupError, AttributeError and others where it is not as it is known."""
    watchers = torch._C._is_torch_function_mode_enabled, torch._C._is_any_autocast_enabled
    included, raw = torch._C._dispatch_tls_local_include_set, torch._C.DispatchKeySet.raw_repr
    levels = vars(forward_ad)
    if not isinstance(levels["_current_level"], int):
        raise LookupError("the level of forward-mode differentiation is no integer")
    with ThreadPoolExecutor(1) as thread:  # nothing watches a thread that begins
        plain = tuple(raw(keys) for keys in thread.submit(_plain_keys).result())
        watch = Watch(watchers, included, raw, (plain[0], plain[1]), levels)
        thread.submit(_require_noticed, watch).result()
    return watch


def _names(keys: object) -> set[str]:
    return set(re.findall(r"\w+", str(keys))[1:])  # after the name of the class


def _plain_keys() -> tuple[Any, Any]:
    """The keys that this new thread adds, outside and inside inference mode; LookupError for others than are known."""
    outside, left_out = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch.inference_mode():
        inside = torch._C._dispatch_tls_local_include_set()
    known = _names(outside) == _ADDED and _names(inside) == _ADDED_IN_INFERENCE_MODE
    if not known or not all(name.startswith(_LEFT_OUT) for name in _names(left_out)):
        raise LookupError(
            f"a new thread adds the keys {outside}, in inference mode {inside}, and leaves out {left_out}"
        )
    return outside, inside


def _require_noticed(watch: Watch) -> None:
    """LookupError if one of torch's ways to watch the calls of a thread is not noticed, or one is that is not there."""
    if watch.levels["_current_level"] < 0 and not watch.nobody():
        raise LookupError("something watches the calls of a new thread")
    modes: dict[str, AbstractContextManager[Any]] = {
        "a mode of functions": TorchFunctionMode(),  # a default device is one, but entering it is for all threads
        "a mode of the dispatcher": TorchDispatchMode(),  # type: ignore[no-untyped-call]
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    noticed = {}
    for name, mode in modes.items():
        with mode:
            noticed[name] = not watch.nobody()

    def ask(row: Tensor) -> Tensor:
        noticed["a transform"] = not watch.nobody()
        return row

    torch.func.vmap(ask)(torch.zeros(1, device="cpu", dtype=torch.float32))
    missed = [name for name, seen in noticed.items() if not seen]
    if missed:
        raise LookupError(f"{' and '.join(missed)} would not be noticed")
