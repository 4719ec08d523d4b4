"""Weight + statistics -> PrunedWeight, one layer or a whole model. Knows nothing of packing or kernels."""

from sparsecomp.prune.model import prune
from sparsecomp.prune.registry import methods
from sparsecomp.prune.report import LayerReport, PruneReport
from sparsecomp.prune.weight import PrunedWeight, prune_weight

__all__ = ["LayerReport", "PruneReport", "PrunedWeight", "methods", "prune", "prune_weight"]
