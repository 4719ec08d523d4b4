"""y = activation(x W^T + bias) on sparse tensor cores, through mma.sp (sm_80 on).

Weights are 2:4 in fp16, bf16 or int8, or 1:2 in fp32. Takes plain tensors in the fragment layout and launches on
torch's current stream. Imports triton, so it is loaded on first use; knows nothing of packing, backends or layers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from sparsecomp.kernels import launching
from sparsecomp.kernels.add_splits import add_splits
from sparsecomp.kernels.quantize_rows import quantize_rows
from sparsecomp.kernels.sparse_mma_config import Config, candidates
from sparsecomp.kernels.sparse_mma_epilogue import ACTIVATIONS as ACTIVATIONS
from sparsecomp.kernels.sparse_mma_kernel import sparse_mma_kernel
from sparsecomp.kernels.sparse_mma_tuning import bucket, tuned

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8", torch.float32: "tf32"}
"""What the instruction calls the elements of weight and x."""


def sparse_mma_linear(
    x: torch.Tensor,
    fragments: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    config: Config | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [tokens, out] = activation(x W^T + bias), accumulated in fp32 and rounded once to the dtype of ``x``.

    ``x`` [tokens, in] in fp16, bf16 or fp32; ``fragments`` int32 [row tiles of 16, slices, 128] and ``metadata`` int32
    as ``packing.layouts.fragments`` makes them. Rows of x that do not start at multiples of 16 bytes are copied once,
    padded; all else is read where it is. fp32 is rounded to tf32 (10 bits) on its way into the tensor cores.

    With ``scales`` fp32 [out] the weight is int8: x is rounded to int8 with a scale for each row (``quantize_rows``),
    the sums are exact integers, and y = activation(sum * row scale * token scale + bias) in fp32, rounded once.

    ``config`` None takes the fastest of a few, measured at the first call for about that many tokens.
    """
    tokens, in_features = x.shape
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    token_scales = None
    if scales is None:
        x = aligned_rows(x)
    else:
        x, token_scales = quantize_rows(x)

    def run(config: Config) -> None:
        _run(x, fragments, metadata, bias, scales, token_scales, y, activation, config)

    if config is None:
        capability, multiprocessors = gpu(x.get_device())
        sizes = x.dtype.itemsize, y.dtype.itemsize
        options = candidates(out_features, tokens, capability, multiprocessors, result_bytes=sizes[1])
        config = tuned(tuning_key(x.get_device(), out_features, in_features, tokens, *sizes), options, run)
    run(config)
    return y


def tuning_key(
    device: int, out_features: int, in_features: int, tokens: int, itemsize: int = 2, result_bytes: int = 2
) -> tuple[int, ...]:
    """What products share a measurement: one GPU, padded shape, size of elements and results, about as many tokens."""
    return (device, out_features, in_features + -in_features % 8, itemsize, result_bytes, bucket(tokens))


def _run(
    x: torch.Tensor,
    fragments: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    config: Config,
) -> None:
    tokens, out_features = y.shape
    row_tiles, depth_blocks = fragments.shape[0], fragments.shape[1] // 2
    blocks = -(-row_tiles * 16 // config.out) * -(-tokens // config.tokens)
    unit = 8 if out_features % 8 == 0 else 1
    per_chunk = 16 // x.dtype.itemsize
    arguments = (
        fragments,
        metadata,
        x.view(torch.int32),
        y if bias is None else bias,
        y if scales is None else scales,
        y if token_scales is None else token_scales,
        y,
        row_tiles,
        depth_blocks,
        x.shape[1] // per_chunk,
        x.stride(0) // per_chunk,
        out_features // unit,
        tokens,
    )
    splits = min(config.splits, -(-depth_blocks * 64 // config.depth))
    if splits == 1:
        variant = constants(config, x.dtype, bias is not None, activation, unit)
        launching.launch(sparse_mma_kernel, arguments, variant, (blocks,), config.warps)
        return
    sums = torch.int32 if x.dtype == torch.int8 else torch.float32
    partial = torch.empty(splits, tokens, out_features, dtype=sums, device=y.device)
    variant = constants(config, x.dtype, False, "none", unit, split=True)
    split_arguments = (*arguments[:6], partial, *arguments[7:])
    launching.launch(sparse_mma_kernel, split_arguments, variant, (blocks, splits), config.warps)
    add_splits(partial, bias, scales, token_scales, y, activation)


def constants(
    config: Config, dtype: torch.dtype, has_bias: bool, activation: str, unit: int, split: bool = False
) -> dict[str, Any]:
    """What one compiled variant of the kernel is made for; ``dtype`` is that of the operands of the instruction."""
    return {
        "KIND": KINDS[dtype],
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "OUT_UNIT": unit,
        "ROW_TILES": config.row_tiles,
        "TOKEN_TILES": config.token_tiles,
        "WARPS_OUT": config.warps_out,
        "WARPS_TOKENS": config.warps_tokens,
        "DEPTH": config.depth,
        "STAGES": config.stages,
        "SPLIT": split,
    }


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy padded with zero columns, whose rows start at multiples of 16 bytes and hold whole ones."""
    per_chunk = 16 // x.dtype.itemsize
    missing = -x.shape[1] % per_chunk
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    # a single row may have any stride
    if x.stride(1) == 1 and x.stride(0) % per_chunk == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def gpu(index: int) -> tuple[int, int]:
    """Compute capability, as 80 for 8.0, and multiprocessors of a CUDA device."""
    facts = torch.cuda.get_device_properties(index)
    return 10 * facts.major + facts.minor, facts.multi_processor_count
