"""In what numbers weights are stored: element types, and the tensors they take. Knows nothing of layouts."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float64 has no sparse kernel; it is there so that a model with packed layers can become float64 as a whole
LAYER_DTYPES = (*FLOAT_DTYPES, torch.float64)
DTYPES = (*LAYER_DTYPES, torch.int8)
LARGEST_INT8 = 127  # of quantised weights: symmetric, so -128 is not used


def part_names(quantized: bool) -> tuple[str, ...]:
    """The names of a weight's tensors in files and in a state_dict."""
    return ("values", "metadata", "scales") if quantized else ("values", "metadata")
