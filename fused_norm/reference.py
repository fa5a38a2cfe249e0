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


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The dtype that sums of ``t`` are taken in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _acc(t: Tensor) -> Tensor:
    return t.to(accumulation_dtype(t))


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


def norm_double_backward(
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    groups: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_ddy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rstd = stats[0].reshape(groups, -1, 1)
    xhat = _xhat(_acc(x).reshape(groups, -1, n), rstd, None if rms else stats[1].reshape(groups, -1, 1))

    def mean(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True) / n

    def centred(t: Tensor) -> Tensor:
        return t if rms else t - mean(t)

    u = torch.zeros_like(xhat) if ddx is None else _acc(ddx).reshape(groups, -1, n)
    a = mean(u * xhat)
    p = centred(u) - xhat * a
    grad_dy = grad_x = grad_w = None
    if need_ddy:
        grad_dy = rstd * p if weight is None else rstd * p * _per_group(weight, n)
        if ddw is not None:
            grad_dy = grad_dy + xhat * _per_group(ddw, n)
        if ddb is not None:
            grad_dy = grad_dy + _per_group(ddb, n)
        grad_dy = grad_dy.to(x.dtype).reshape(x.shape)
    if need_dx or need_dw:
        dyf = _acc(dy).reshape(groups, -1, n)
    if need_dx:
        g = dyf if weight is None else dyf * _per_group(weight, n)
        t = -rstd * (mean(g * xhat) * u + a * g)
        if ddw is not None:
            t = t + dyf * _per_group(ddw, n)
        grad_x = rstd * (centred(t) - xhat * (mean(t * xhat) + rstd * mean(p * g)))
        grad_x = grad_x.to(x.dtype).reshape(x.shape)
    if need_dw:
        grad_w = (dyf * (rstd * p)).sum(1).to(param_dtype)
    return grad_dy, grad_x, grad_w


def ticks_forward(
    z: Tensor, target: Tensor, ignore_index: int, ce: float, ticks: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Per-row loss ``ce*(-log p) + ticks*(p - log p)`` of logits (M, V) with targets (M,).

    Returns the loss (M,) and what backward needs, each (M,): the row's largest logit, ``total = sum exp(z - largest)``
    and ``q = 1 - p``. The two are not merged into an lse, whose rounding would grow with the logits' offset. The target
    is kept out of the sum that gives q, which so keeps its accuracy as p nears 1. Rows whose target is ``ignore_index``
    count for nothing, whatever they hold.
    """
    keep = target != ignore_index
    zf = torch.where(keep.unsqueeze(1), _acc(z), 0)
    t = torch.where(keep, target, 0).unsqueeze(1)
    largest = zf.detach().amax(1)  # everything below is the same whatever is subtracted
    shifted = zf - largest.unsqueeze(1)
    z_t = shifted.gather(1, t).squeeze(1)
    others = shifted.scatter(1, t, float("-inf")).exp().sum(1)
    total = others + z_t.exp()
    q = others / total
    # Each form of -log p where it is exact: near p = 1 by q, elsewhere by the logits. (log1p is kept off q = 1.)
    nll = torch.where(q < 0.5, -torch.log1p(-torch.where(q < 0.5, q, 0)), total.log() - z_t)
    terms = []
    if ce:
        terms.append(ce * nll)
    if ticks:
        # p - log p = 1 + (nll - q), whose derivative in q would cancel near q = 0: there by its series.
        series = q * q * (1 / 2 + q * (1 / 3 + q * (1 / 4 + q * (1 / 5 + q / 6))))
        small = 1e-3 if q.dtype == torch.float64 else 1 / 32
        terms.append(ticks * (1 + torch.where(q < small, series, nll - q)))
    loss = torch.where(keep, sum(terms, torch.zeros_like(q)), 0)
    return loss, (largest, total, q)


def ticks_backward(
    grad: Tensor,
    z: Tensor,
    target: Tensor,
    stats: tuple[Tensor, Tensor, Tensor],
    ignore_index: int,
    ce: float,
    ticks: float,
) -> Tensor:
    """dL/dz for the upstream gradient ``grad`` (M,) of the loss: ``(ce + ticks*q) * (p_k, or -q at the target)``."""
    largest, total, q = (s.unsqueeze(1) for s in stats)
    keep = (target != ignore_index).unsqueeze(1)
    t = torch.where(keep, target.unsqueeze(1), 0)
    p = torch.exp(torch.where(keep, _acc(z), 0) - largest) / total
    dz = p.scatter(1, t, -q) * (_acc(grad).unsqueeze(1) * (ce + ticks * q))
    return torch.where(keep, dz, 0).to(z.dtype)
