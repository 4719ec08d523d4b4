"""Who wants to see an eager call: modes, autocast, transforms, traces and dual levels. Knows only torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack

# Each gives something true while it watches. The levels of forward-mode differentiation have no such function: one is
# active where forward_ad._current_level is not negative.
WATCHERS: tuple[Callable[[], object], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._is_tracing,
    _peek_interpreter_stack,
)


# Each gives something other than None while it wants to see the frames of Python that a call makes.
CALL_WATCHERS: tuple[Callable[[], object], ...] = (
    sys.getprofile,
    torch._C._dynamo.eval_frame.get_eval_frame_callback,
)


def nobody_watches() -> bool:
    """Whether no mode, transform, trace or dual level wants to see this call: the dispatcher may then be bypassed."""
    for watches in WATCHERS:  # any() costs 0.2 us more
        if watches():
            return False
    return forward_ad._current_level < 0


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is active."""
    return _peek_interpreter_stack() is not None or forward_ad._current_level >= 0
