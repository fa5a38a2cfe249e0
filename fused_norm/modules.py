"""Modules: drop-ins that subclass torch's own and override ``forward`` alone, and the losses."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional as FF


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`, fused: the same constructor, parameters, state_dict and repr.

    Shapes, dtypes and errors: :func:`fused_norm.functional.layer_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return FF.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`, fused: the same constructor, parameters, state_dict and repr.

    Shapes, dtypes and errors: :func:`fused_norm.functional.rms_norm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return FF.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class TicksLoss(nn.Module):
    """The ticks loss ``p - log p`` alone: :func:`fused_norm.functional.ticks_loss` as a module.

    Args:
        weight: a weight per class, (V,), or None.
        ignore_index, reduction: as :class:`torch.nn.CrossEntropyLoss`.
    """

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.ticks_loss(input, target, self.weight, self.ignore_index, self.reduction)


class TicksCrossEntropyLoss(TicksLoss):
    """Cross entropy plus ``ticks_weight`` times ticks: :func:`fused_norm.functional.ticks_cross_entropy` as a module.

    Args:
        weight, ignore_index, reduction: as :class:`torch.nn.CrossEntropyLoss`.
        ticks_weight: the coefficient of ticks.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        ticks_weight: float = 1e-3,
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        self.ticks_weight = ticks_weight

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.ticks_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, ticks_weight=self.ticks_weight
        )
