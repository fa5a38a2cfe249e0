"""The ``torch.autograd.Function`` wrappers: what torch's autograd sees of the kernels.

Where backward must itself be differentiable (``create_graph=True``) or runs under a transform
(``is_grads_batched=True``), it takes the reference's explicit formulas, which are ordinary differentiable operations,
so derivatives of any order are right. Under a transform forward does not come here at all: ``functional`` takes
torch's own function.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from . import reference

_reshape_fresh = torch.ops.aten._unsafe_view.default
_peek_functorch = torch._C._functorch.peek_interpreter_stack


def transforms_active() -> bool:
    """Whether a torch.func transform, vmap or forward-mode AD is under way, which kernels cannot see."""
    return _peek_functorch() is not None or fwAD._current_level >= 0


def resolve(t: Tensor) -> Tensor:
    """``t`` with its values in memory, where ``z.conj().imag`` lacks its sign and a ZeroTensor everything."""
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


def as_rows(t: Tensor, n: int) -> Tensor:
    """``t`` as the kernels take it: contiguous, or 2-D rows of ``n`` at unit stride. Copies only if no view will do."""
    if t.is_neg() or t._is_zerotensor():
        t = resolve(t)
    if t.is_contiguous():
        return t
    try:
        rows = t.view(-1, n)
    except RuntimeError:
        return t.contiguous()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    eps: float,
    rms: bool,
    backend: ModuleType,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the backend's forward on ``x`` of any layout; the output is contiguous with x's shape."""
    y, stats = backend.norm_forward(as_rows(x, n), weight, bias, n, 1, eps, rms, need_stats)
    if y.dim() != x.dim():
        # Not a view of the kernel's output in autograd's eyes: users may write over it.
        y = _reshape_fresh(y, x.shape)
    return y, stats


class Norm(torch.autograd.Function):
    """layer_norm (``rms=False``) or rms_norm over rows of ``n`` elements; ``weight``, ``bias`` contiguous or None."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, eps, rms, backend):
        y, stats = norm_forward(x, weight, bias, n, eps, rms, backend, need_stats=True)
        ctx.save_for_backward(x, weight, stats)
        ctx.n, ctx.eps, ctx.rms = n, eps, rms
        ctx.backend = backend  # use_backend is not in force when backward runs, and may not be in its thread
        ctx.bias_like = None if bias is None else (bias.dtype, bias.shape)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, stats = ctx.saved_tensors
        n, rms, backend = ctx.n, ctx.rms, ctx.backend
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        param_dtype = weight.dtype if weight is not None else ctx.bias_like[0] if ctx.bias_like else x.dtype
        x_shape = x.shape
        if torch.is_grad_enabled() or transforms_active():
            backend = reference
            _, stats = reference.norm_forward(x, None, None, n, 1, ctx.eps, rms, True)
        else:
            dy, x = as_rows(dy, n), as_rows(x, n)
        dx, dw, db = backend.norm_backward(dy, x, stats, weight, n, 1, rms, param_dtype, need_dx, need_dw, need_db)
        return (
            (dx if dx.shape == x_shape else dx.view(x_shape)) if need_dx else None,
            dw.view(weight.shape) if need_dw else None,
            db.view(ctx.bias_like[1]) if need_db else None,
            None,
            None,
            None,
            None,
        )


class Ticks(torch.autograd.Function):
    """The per-row loss ``ce*(-log p) + ticks*(p - log p)``, in fp32 (fp64 for fp64 logits), of logits (M, V)."""

    @staticmethod
    def forward(ctx, z, target, ignore_index, ce, ticks, backend):
        loss, stats = backend.ticks_forward(z, target, ignore_index, ce, ticks)
        ctx.save_for_backward(z, target, *stats)
        ctx.options = ignore_index, ce, ticks
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, grad):
        z, target, *stats = ctx.saved_tensors
        backend = ctx.backend
        if torch.is_grad_enabled() or transforms_active():
            backend = reference
            _, stats = reference.ticks_forward(z, target, *ctx.options)
        return backend.ticks_backward(grad, z, target, stats, *ctx.options), None, None, None, None, None
