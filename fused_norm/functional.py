"""The public functions."""

from .functional_add_norm import add_layer_norm, add_rms_norm
from .functional_norms import layer_norm, rms_norm
from .functional_ticks import linear_ticks_cross_entropy, linear_ticks_loss, ticks_cross_entropy, ticks_loss

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "linear_ticks_cross_entropy",
    "linear_ticks_loss",
    "rms_norm",
    "ticks_cross_entropy",
    "ticks_loss",
]
