"""Weight [out, in] and Gram [in, in] -> PrunedWeight. Knows nothing of models, packing and kernels."""

# isort: off
# these register their methods, which are listed in this order
import sparsecomp.methods.scores
import sparsecomp.methods.obs
import sparsecomp.methods.presets  # noqa: F401
# isort: on
