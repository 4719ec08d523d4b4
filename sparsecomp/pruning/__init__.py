"""Layers of a model, all at once or block after block, pruned in place, tuned, and reported. Knows no kernel."""

from sparsecomp.pruning.blockwise import prune_blocks
from sparsecomp.pruning.distillation import distill
from sparsecomp.pruning.model import prune
from sparsecomp.pruning.report import LayerReport, PruneReport, Stage
from sparsecomp.pruning.tuning import Tuning, TuningReport

__all__ = ["LayerReport", "PruneReport", "Stage", "Tuning", "TuningReport", "distill", "prune", "prune_blocks"]
