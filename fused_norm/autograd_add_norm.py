"""The ``torch.autograd.Function`` of ``summed = dropout(x) + residual; y = norm(summed)``, one kernel each way.

It has a reverse rule alone: :mod:`.functional_add_norm` takes the operations one by one, each with all its rules, where
a torch.func transform or forward mode is under way. Derivatives of backward come from the same pieces.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .autograd import Function, as_rows, gradients, legacy_batched, shaped_as, shaped_like, transforms_active


def add_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    cast: bool,
    backend: ModuleType,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backend's kernel on x and residual of any layout; both outputs are contiguous with their shape."""
    y, summed, stats = backend.add_norm_forward(
        *(as_rows(x, n), as_rows(residual, n), weight, bias, seed, n, eps, rms, dropout_p, need_stats, cast)
    )
    return shaped_like(y, residual), shaped_like(summed, residual), stats


class AddNorm(Function):
    """(y, summed, stats). Arguments as the kernel's, of one group; x and residual in any layout."""

    @staticmethod
    def forward(x, residual, weight, bias, seed, n, eps, rms, dropout_p, cast, backend):
        return add_norm_forward(x, residual, weight, bias, seed, n, eps, rms, dropout_p, cast, backend, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, weight, bias, seed, ctx.n, ctx.eps, ctx.rms, ctx.dropout_p, _, ctx.backend = inputs
        _, summed, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, stats, weight, seed)
        ctx.x_dtype = x.dtype
        ctx.bias_like = None if bias is None else (bias.dtype, bias.shape)

    @staticmethod
    def backward(ctx, dy, dsummed, _):
        need_dx, need_dresidual, *needs = ctx.needs_input_grad[:4]
        nothing = (None,) * 7
        if dy is None and dsummed is None:
            return None, None, None, None, *nothing
        summed, stats, weight, seed = ctx.saved_tensors
        needs = need_dx or need_dresidual, *needs
        same = seed is None and ctx.x_dtype == summed.dtype
        if dy is None or torch.is_grad_enabled() or transforms_active() or legacy_batched(dy, dsummed):
            d = dw = db = None
            if dy is not None:
                d, dw, db = gradients(
                    dy, summed, stats, weight, ctx.bias_like, ctx.n, ctx.eps, ctx.rms, needs, ctx.backend
                )
            if needs[0]:
                d = dsummed if d is None else d if dsummed is None else d + dsummed
            dx = d
            if need_dx and not same:
                dx = d.to(reference.accumulation_dtype(d))
                dx = dx if seed is None else dx * reference.dropout_mask(seed, summed, ctx.dropout_p)
                dx = dx.to(ctx.x_dtype)
            return dx if need_dx else None, d if need_dresidual else None, dw, db, *nothing
        rows = as_rows(summed, ctx.n)
        param_dtype = weight.dtype if weight is not None else ctx.bias_like[0] if ctx.bias_like else summed.dtype
        dx, dresidual, dw, db = ctx.backend.add_norm_backward(
            *(as_rows(dy, ctx.n), None if dsummed is None else as_rows(dsummed, ctx.n), rows, stats, weight, seed),
            *(ctx.n, ctx.rms, ctx.dropout_p, param_dtype, ctx.x_dtype, need_dx, need_dresidual, needs[1], needs[2]),
        )
        dresidual = shaped_like(dresidual, summed) if need_dresidual or (need_dx and same) else None
        if need_dx:
            dx = dresidual if same else shaped_like(dx, summed)
        return (
            dx if need_dx else None,
            dresidual if need_dresidual else None,
            shaped_as(dw, weight.shape) if needs[1] else None,
            shaped_as(db, ctx.bias_like[1]) if needs[2] else None,
            *nothing,
        )
