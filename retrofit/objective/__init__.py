"""Training targets: corruption, losses, and the MDM baseline."""

from .interpolant import Corrupted, corrupt
from .losses import FlexMDMLoss, flexmdm_loss
from .objectives import Documents, FlexMDMObjective, MDMObjective, MicroBatch, Objective

__all__ = [
    "Corrupted",
    "Documents",
    "FlexMDMLoss",
    "FlexMDMObjective",
    "MDMObjective",
    "MicroBatch",
    "Objective",
    "corrupt",
    "flexmdm_loss",
]
