"""The names of Gluon that changed between Triton 3.6 and 3.9, under one name each. Imports triton."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.ampere import async_copy

# 3.9 renamed it and warns about the old name
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
commit_group = async_copy.commit_group
wait_group = async_copy.wait_group
