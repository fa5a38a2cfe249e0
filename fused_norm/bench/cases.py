"""What is measured: the operations, by name and by group."""

from __future__ import annotations

from .add_norms import ADD_NORMS
from .losses import LINEAR_TICKS, SOFTCAP_TICKS, TICKS
from .norms import LAYER_NORM, RMS_NORM
from .operation import Op

OPS: dict[str, Op] = {op.name: op for op in (LAYER_NORM, RMS_NORM, *ADD_NORMS, TICKS, LINEAR_TICKS, SOFTCAP_TICKS)}

GROUPS: dict[str, list[str]] = {}
for _op in OPS.values():
    GROUPS.setdefault(_op.group, []).append(_op.name)
