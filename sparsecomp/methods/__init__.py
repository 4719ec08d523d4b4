"""Weight [out, in] and Gram [in, in] -> PrunedWeight. Knows nothing of models, packing and kernels."""
