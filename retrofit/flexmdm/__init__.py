"""The model: all that travels to the Hub with a checkpoint. Imports torch, transformers and siblings only."""

from .configuration import FlexMDMConfig, LLaDAConfig
from .llada import LLaDAForMaskedDiffusion
from .modeling import FlexMDMForMaskedDiffusion
from .packing import PackedSequences
from .schedules import Geometric, Linear, Power, Schedules

__all__ = [
    "FlexMDMConfig",
    "FlexMDMForMaskedDiffusion",
    "Geometric",
    "LLaDAConfig",
    "LLaDAForMaskedDiffusion",
    "Linear",
    "PackedSequences",
    "Power",
    "Schedules",
]
