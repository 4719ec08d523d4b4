"""Who wants to see an eager call: modes, autocast, transforms, traces and dual levels. Knows only torch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor
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


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, has one of them in hand.

    By what torch promises: what a transform wraps is plain by its type and has no memory, a dual number has a tangent.
    """
    return any(each is not None and (_wrapped(each) or _dual(each)) for each in tensors)


def _wrapped(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def _dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
