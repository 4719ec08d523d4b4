"""The names of Gluon that changed between Triton 3.6 and 3.9, under one name each. Imports triton.

Raises ImportError or AttributeError where Gluon lacks what the kernels use: backends ask before they offer themselves.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence_async_shared

_USED = (
    *("BlockedLayout", "DistributedLinearLayout", "NVMMASharedLayout", "SliceLayout", "SwizzledSharedLayout"),
    *("allocate_shared_memory", "convert_layout", "inline_asm_elementwise", "join", "permute", "static_range"),
)
if _lacking := [name for name in _USED if not hasattr(gl, name)]:
    raise ImportError(f"Gluon has no {', '.join(_lacking)}")

# 3.9 renamed it and warns about the old name
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
commit_group = async_copy.commit_group
wait_group = async_copy.wait_group
# 3.7 renamed it
block_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
