"""fused_norm: fused LayerNorm and RMSNorm, and the ticks loss, as drop-ins for PyTorch.

import fused_norm
import fused_norm.functional as FF
"""

__version__ = "0.1.0"

from . import functional, ops, testing
from .dispatch import available_backends, use_backend
from .modules import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    LinearTicksCrossEntropyLoss,
    RMSNorm,
    TicksCrossEntropyLoss,
    TicksLoss,
    TrainerLoss,
)
from .patch import PatchReport, patch, unpatch

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "LayerNorm",
    "LinearTicksCrossEntropyLoss",
    "PatchReport",
    "RMSNorm",
    "TicksCrossEntropyLoss",
    "TicksLoss",
    "TrainerLoss",
    "available_backends",
    "functional",
    "ops",
    "patch",
    "testing",
    "unpatch",
    "use_backend",
]
