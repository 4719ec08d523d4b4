"""Masks that live in the user's own training loop, on hooks of the user's optimizer; nothing here trains."""

from sparsecomp.training.foreign import masks
from sparsecomp.training.handle import SparseTraining, sparsify
from sparsecomp.training.loss import distillation_loss
from sparsecomp.training.schedule import Schedule

__all__ = ["Schedule", "SparseTraining", "distillation_loss", "masks", "sparsify"]
