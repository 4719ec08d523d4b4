"""Who wants to see an eager call: modes, autocast, transforms, traces and dual levels. Knows only torch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# Each gives something true while it watches. The levels of forward-mode differentiation have no such function: one is
# active where forward_ad._current_level is not negative.
WATCHERS: tuple[Callable[[], object], ...] = (
    torch._C._is_torch_function_mode_enabled,
    torch._C._is_any_autocast_enabled,
)

# The keys that this thread adds to every call of the dispatcher. Modes, transforms of torch.func and traces add some,
# those too that are not known yet; autocast takes one away from those that are left out.
included: Callable[[], object] = torch._C._dispatch_tls_local_include_set
raw: Callable[..., int] = torch._C.DispatchKeySet.raw_repr


def _plain_keys() -> tuple[int, int]:
    """What they come to where nothing watches, as in a thread that begins, outside and inside inference mode."""
    found: list[int] = []

    def look() -> None:
        found.append(raw(included()))
        with torch.inference_mode():
            found.append(raw(included()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    outside, inside = found
    return outside, inside


PLAIN = _plain_keys()


def nobody_watches() -> bool:
    """Whether no mode, transform, trace or dual level wants to see this call: the dispatcher may then be bypassed."""
    for watches in WATCHERS:  # any() costs 0.2 us more
        if watches():
            return False
    return raw(included()) in PLAIN and forward_ad._current_level < 0


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
