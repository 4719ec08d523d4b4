"""Weight + statistics -> PrunedWeight, one layer or a whole model. Knows nothing of packing or kernels."""

from sparsecomp.prune.distillation import distill
from sparsecomp.prune.model import prune
from sparsecomp.prune.registry import methods
from sparsecomp.prune.report import LayerReport, PruneReport, Stage
from sparsecomp.prune.sequential import prune_blocks
from sparsecomp.prune.tuning import Tuning, TuningReport
from sparsecomp.prune.weight import PrunedWeight, prune_weight

__all__ = [
    "LayerReport",
    "PruneReport",
    "PrunedWeight",
    "Stage",
    "Tuning",
    "TuningReport",
    "distill",
    "methods",
    "prune",
    "prune_blocks",
    "prune_weight",
]
