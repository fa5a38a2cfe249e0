"""The oracle: LayerNorm and RMSNorm by explicit formulas in eager PyTorch, on any device.

It follows the backend contract in :mod:`fused_norm.backends`, so that every test can put it in a kernel's place.
Arithmetic is fp32, or fp64 for fp64 input; the tests' truth is this module on inputs converted to fp64. The formulas
are those of docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable(device_type: str) -> str | None:
    return None


def _acc(t: Tensor) -> Tensor:
    """``t`` in the dtype that sums are taken in."""
    return t if t.dtype == torch.float64 else t.to(torch.float32)


def _per_group(p: Tensor, n: int) -> Tensor:
    """Weight or bias as (1 or groups, 1, n), to broadcast over (groups, rows, n)."""
    return _acc(p).reshape(-1, 1, n)


def _xhat(x: Tensor, rstd: Tensor, mean: Tensor | None) -> Tensor:
    return x * rstd if mean is None else (x - mean) * rstd


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, groups: int, eps: float, rms: bool, need_stats: bool
) -> tuple[Tensor, Tensor]:
    xf = _acc(x).reshape(groups, -1, n)
    mean = None
    if not rms:
        # Summing the differences from the first element keeps a constant row's mean exact, and a row with a large
        # offset accurate. A first element far from the rest costs digits, which `off` gives back.
        x0 = xf[..., :1]
        mean = x0 + (xf - x0).sum(-1, keepdim=True) / n
        centred = xf - mean
        off = centred.sum(-1, keepdim=True) / n
        var = centred.square().sum(-1, keepdim=True) / n - off.square()
        mean = mean + off
        centred = xf - mean
    else:
        centred = xf
        var = xf.square().sum(-1, keepdim=True) / n
    rstd = 1 / torch.sqrt(var + eps)
    y = centred * rstd
    if weight is not None:
        y = y * _per_group(weight, n)
    if bias is not None:
        y = y + _per_group(bias, n)
    rows = [] if not need_stats else [rstd] if mean is None else [rstd, mean]
    stats = torch.stack([r.reshape(-1) for r in rows]) if rows else xf.new_empty((0, xf.shape[0] * xf.shape[1]))
    y = y.to(x.dtype).contiguous()
    # Not a view in autograd's eyes, so that users may write over the output.
    return torch.ops.aten._unsafe_view.default(y, x.shape), stats


def norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    groups: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dyf = _acc(dy).reshape(groups, -1, n)
    dx = dw = db = None
    if need_dx or need_dw:
        rstd = stats[0].reshape(groups, -1, 1)
        mean = None if rms else stats[1].reshape(groups, -1, 1)
        xhat = _xhat(_acc(x).reshape(groups, -1, n), rstd, mean)
        if need_dx:
            g = dyf if weight is None else dyf * _per_group(weight, n)
            dx = g - xhat * ((g * xhat).sum(-1, keepdim=True) / n)
            if not rms:
                dx = dx - g.sum(-1, keepdim=True) / n
            dx = (dx * rstd).to(x.dtype).reshape(x.shape)
        if need_dw:
            dw = (dyf * xhat).sum(1).to(param_dtype)
    if need_db:
        db = dyf.sum(1).to(param_dtype)
    return dx, dw, db


def ticks_forward(
    z: Tensor, target: Tensor, ignore_index: int, ce: float, ticks: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row loss ``ce*(-log p) + ticks*(p - log p)`` of logits (M, V) with targets (M,): (loss, lse, q), each (M,).

    The target is kept out of the sum of exponentials, so that ``q = 1 - p`` keeps its accuracy as p nears 1. Rows whose
    target is ``ignore_index`` have loss 0.
    """
    zf = _acc(z)
    keep = target != ignore_index
    t = torch.where(keep, target, 0).unsqueeze(1)
    largest = zf.detach().amax(1, keepdim=True)  # everything below is the same whatever is subtracted
    z_t = (zf.gather(1, t) - largest).squeeze(1)
    others = (zf - largest).scatter(1, t, float("-inf")).exp().sum(1)
    total = others + z_t.exp()
    q = others / total
    # Each form of -log p where it is exact: near p = 1 by q, elsewhere by the logits. (log1p is kept off q = 1.)
    nll = torch.where(q < 0.5, -torch.log1p(-torch.where(q < 0.5, q, 0)), total.log() - z_t)
    loss = (ce + ticks) * nll + ticks * (1 - q)
    return torch.where(keep, loss, 0), total.log() + largest.squeeze(1), q


def ticks_backward(
    grad: Tensor, z: Tensor, target: Tensor, lse: Tensor, q: Tensor, ignore_index: int, ce: float, ticks: float
) -> Tensor:
    """dL/dz for the upstream gradient ``grad`` (M,) of the loss: ``(ce + ticks*q) * (p_k, or -q at the target)``."""
    keep = (target != ignore_index).unsqueeze(1)
    t = torch.where(keep, target.unsqueeze(1), 0)
    direction = torch.exp(_acc(z) - lse.unsqueeze(1)).scatter(1, t, -q.unsqueeze(1))
    dz = direction * (_acc(grad) * (ce + ticks * q)).unsqueeze(1)
    return torch.where(keep, dz, 0).to(z.dtype)
