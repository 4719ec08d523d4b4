"""Masks that live in the user's own training loop, on hooks of the user's optimizer; nothing here trains."""

from sparsecomp.training.foreign import masks
from sparsecomp.training.handle import SparseTraining, sparsify
from sparsecomp.training.loss import distillation_loss
from sparsecomp.training.rules.fixed import Fixed
from sparsecomp.training.rules.gradients import Gradient
from sparsecomp.training.rules.gradual import Gradual
from sparsecomp.training.rules.movement import Movement
from sparsecomp.training.rules.rigl import RigL
from sparsecomp.training.rules.second_order import Obd, Obs
from sparsecomp.training.rules.soft_movement import SoftMovement
from sparsecomp.training.rules.step import Step
from sparsecomp.training.rules.straight_through import SrSte
from sparsecomp.training.schedule import Schedule

__all__ = [
    "Fixed",
    "Gradient",
    "Gradual",
    "Movement",
    "Obd",
    "Obs",
    "RigL",
    "Schedule",
    "SoftMovement",
    "SparseTraining",
    "SrSte",
    "Step",
    "distillation_loss",
    "masks",
    "sparsify",
]
