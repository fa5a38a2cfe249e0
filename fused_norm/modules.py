"""Modules: drop-ins that subclass torch's own and override ``forward`` alone, and the losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as FF


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`, fused: the same constructor, parameters, state_dict and repr.

    ``weight_offset`` and ``memory_efficient``, which are attributes and options of the constructor by name, are those
    of :func:`fused_norm.functional.layer_norm`; shapes, dtypes and errors too.
    """

    # On the class, so that a module which only changed its class (patch) has them.
    weight_offset: float = 0.0
    memory_efficient: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _set_options(self, weight_offset=weight_offset, memory_efficient=memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        return FF.layer_norm(
            *(input, self.normalized_shape, self.weight, self.bias, self.eps),
            weight_offset=self.weight_offset,
            memory_efficient=self.memory_efficient,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown_options(self)

    def reset_parameters(self) -> None:
        """As torch's, with the offset taken off: a new module multiplies by 1."""
        super().reset_parameters()
        _take_offset_off(self)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`, fused: the same constructor, parameters, state_dict and repr.

    ``weight_offset``, ``cast_before_weight`` and ``memory_efficient``, which are attributes and options of the
    constructor by name, are those of :func:`fused_norm.functional.rms_norm`; shapes, dtypes and errors too.
    """

    weight_offset: float = 0.0
    cast_before_weight: bool = False
    memory_efficient: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _set_options(
            self,
            weight_offset=weight_offset,
            cast_before_weight=cast_before_weight,
            memory_efficient=memory_efficient,
        )

    def forward(self, x: Tensor) -> Tensor:
        return FF.rms_norm(
            *(x, self.normalized_shape, self.weight, self.eps),
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
            memory_efficient=self.memory_efficient,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown_options(self)

    def reset_parameters(self) -> None:
        """As torch's, with the offset taken off: a new module multiplies by 1."""
        super().reset_parameters()
        _take_offset_off(self)


class AddLayerNorm(LayerNorm):
    """Dropout, residual connection and LayerNorm in one pass: :func:`fused_norm.functional.add_layer_norm`.

    The constructor, parameters and state_dict of :class:`torch.nn.LayerNorm`, and by name ``p``, the probability that
    an element of the input is dropped in training mode, and ``weight_offset``.
    """

    p: float = 0.0

    def __init__(self, *args: Any, p: float = 0.0, weight_offset: float = 0.0, **kwargs: Any) -> None:
        _refuse_memory_efficient(self, kwargs)
        super().__init__(*args, weight_offset=weight_offset, **kwargs)
        _set_options(self, p=_probability(p))

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(output, summed): ``summed = dropout(input) + residual``, and its norm."""
        return FF.add_layer_norm(
            *(input, residual, self.normalized_shape, self.weight, self.bias, self.eps),
            dropout_p=self.p,
            training=self.training,
            weight_offset=self.weight_offset,
        )


class AddRMSNorm(RMSNorm):
    """Dropout, residual connection and RMSNorm in one pass: :func:`fused_norm.functional.add_rms_norm`.

    The constructor, parameters and state_dict of :class:`torch.nn.RMSNorm`, and by name ``p``, the probability that an
    element of the input is dropped in training mode, ``weight_offset`` and ``cast_before_weight``.
    """

    p: float = 0.0

    def __init__(
        self,
        *args: Any,
        p: float = 0.0,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
        **kwargs: Any,
    ) -> None:
        _refuse_memory_efficient(self, kwargs)
        super().__init__(*args, weight_offset=weight_offset, cast_before_weight=cast_before_weight, **kwargs)
        _set_options(self, p=_probability(p))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(output, summed): ``summed = dropout(x) + residual``, and its norm."""
        return FF.add_rms_norm(
            *(x, residual, self.normalized_shape, self.weight, self.eps),
            dropout_p=self.p,
            training=self.training,
            weight_offset=self.weight_offset,
            cast_before_weight=self.cast_before_weight,
        )


def _refuse_memory_efficient(norm: nn.Module, kwargs: Mapping[str, Any]) -> None:
    if "memory_efficient" in kwargs:
        raise TypeError(f"{type(norm).__name__} takes no memory_efficient: it keeps its second output, the sum")


def _probability(p: float) -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}, a probability is between 0 and 1")
    return p


_OPTIONS = ("p", "weight_offset", "cast_before_weight", "memory_efficient")


def _set_options(norm: nn.Module, **options: float | bool) -> None:
    """Those that differ from the class's own, so that a plain module holds what torch's does."""
    for name, value in options.items():
        if value != getattr(type(norm), name):
            setattr(norm, name, value)
    if "weight_offset" in options:
        _take_offset_off(norm)


def _take_offset_off(norm: nn.Module) -> None:
    if norm.weight_offset and norm.weight is not None:
        with torch.no_grad():
            norm.weight -= norm.weight_offset


def _shown_options(norm: nn.Module) -> str:
    return "".join(f", {name}={vars(norm)[name]}" for name in _OPTIONS if name in vars(norm))


class TicksLoss(nn.CrossEntropyLoss):
    """The ticks loss ``p - log p`` alone: :func:`fused_norm.functional.ticks_loss` as a module.

    Its constructor, buffers and state_dict are those of :class:`torch.nn.CrossEntropyLoss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.ticks_loss(
            input, target, self.weight, self.ignore_index, self.reduction, label_smoothing=self.label_smoothing
        )


class TicksCrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` regularised by ticks: :func:`fused_norm.functional.ticks_cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's, in its order.
        ticks_weight, z_loss_weight, softcap, inplace_backward: the function's.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        ticks_weight: float = 1e-3,
        z_loss_weight: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.ticks_weight = ticks_weight
        self.z_loss_weight = z_loss_weight
        self.softcap = softcap
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.ticks_cross_entropy(
            *(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing),
            ticks_weight=self.ticks_weight,
            z_loss_weight=self.z_loss_weight,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return f"ticks_weight={self.ticks_weight}"


class LinearTicksCrossEntropyLoss(nn.Module):
    """A classifier and its loss in one, without the logits in memory, as ``torch.nn.LinearCrossEntropyLoss`` (2.13):
    :func:`fused_norm.functional.linear_ticks_cross_entropy` of ``self.linear``, an :class:`torch.nn.Linear`.

    ``loss.linear(hidden)`` gives the logits where they are wanted; ``loss.linear.weight = embedding.weight`` ties it.

    Args:
        in_features: the size of a hidden state, H.
        num_classes: V.
        bias: whether the classifier has a bias. Without, as torch's.
        device, dtype: of the classifier's parameters.
        weight, ignore_index, reduction, label_smoothing, ticks_weight, z_loss_weight, softcap, chunk_bytes,
            accumulate_fp32: the function's.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ticks_weight: float = 1e-3,
        z_loss_weight: float = 0.0,
        softcap: float | None = None,
        chunk_bytes: int | None = None,
        accumulate_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ticks_weight = ticks_weight
        self.z_loss_weight = z_loss_weight
        self.softcap = softcap
        self.chunk_bytes = chunk_bytes
        self.accumulate_fp32 = accumulate_fp32

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (*, H) and class indices (*) or probabilities (*, V)."""
        return FF.linear_ticks_cross_entropy(
            *(input, self.linear.weight, target, self.linear.bias),
            *(self.weight, self.ignore_index, self.reduction, self.label_smoothing),
            ticks_weight=self.ticks_weight,
            z_loss_weight=self.z_loss_weight,
            softcap=self.softcap,
            chunk_bytes=self.chunk_bytes,
            accumulate_fp32=self.accumulate_fp32,
        )

    def extra_repr(self) -> str:
        return f"ticks_weight={self.ticks_weight}"


class TrainerLoss:
    """``transformers.Trainer(compute_loss_func=TrainerLoss())``: ``ticks_cross_entropy`` of logits and labels.

    Args:
        causal: whether a token's logits predict the next label, as in a causal language model, where labels are not
            shifted beforehand. The logits are not copied for it.
        options: ticks_weight, weight, ignore_index, label_smoothing, z_loss_weight, softcap, inplace_backward of
            :func:`fused_norm.functional.ticks_cross_entropy`.
    """

    def __init__(self, causal: bool = False, **options: Any) -> None:
        allowed = inspect.signature(FF.ticks_cross_entropy).parameters.keys() - {"input", "target", "reduction"}
        if unknown := sorted(options.keys() - allowed):
            raise TypeError(f"TrainerLoss takes no {', '.join(unknown)}; its options are {', '.join(sorted(allowed))}")
        self.causal = causal
        self.options = {"ignore_index": -100, **options}

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The mean loss, in fp32, over labels that are not ``ignore_index``; with ``num_items_in_batch``, the number of
        those in all batches that share one optimizer step, the sum divided by it.

        ``outputs`` holds ``logits``, (*, V), by name (or is a tuple that starts with them); ``labels`` is (*).
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self.causal:
            labels = F.pad(labels, (0, 1), value=self.options["ignore_index"])[..., 1:]
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        device_type = logits.device.type
        # Under autocast the loss is fp32, whatever the logits are: a sum over a batch would overflow fp16.
        with torch.autocast(device_type, enabled=torch.amp.is_autocast_available(device_type), dtype=torch.bfloat16):
            loss = FF.ticks_cross_entropy(logits, labels, reduction=reduction, **self.options)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
