"""The oracle: LayerNorm, RMSNorm and the ticks loss by explicit formulas in eager PyTorch, on any device.

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
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    groups: int,
    eps: float,
    rms: bool,
    need_stats: bool,
    cast: bool = False,
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
    if cast:
        y = _acc(y.to(x.dtype))
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


_PHILOX_MULTIPLIERS, _PHILOX_WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, blocks: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011) of an int64 seed and counters (k,): int64 words (k, 4), each below 2^32.

    A product of two 32-bit words may pass 2^63; as int64 it wraps, which keeps its bits, and the mask after the shift
    takes the copies of the sign away.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = blocks & _WORD, (blocks >> 32) & _WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        a, b = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


def dropout_threshold(p: float) -> int:
    """An element is kept where its word is at least this."""
    return min(int(p * 2**32 + 0.5), 2**32 - 1)


def dropout_mask(seed: Tensor, like: Tensor, p: float) -> Tensor:
    """keep/(1 - p) for every element of ``like``, in its accumulation dtype."""
    count = like.numel()
    words = philox(seed.reshape(()), torch.arange(-(-count // 4), device=like.device)).flatten()[:count]
    return (words >= dropout_threshold(p)).reshape(like.shape).to(accumulation_dtype(like)) * (1 / (1 - p))


def add_dropped(x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x*keep/(1 - dropout_p) + residual, rounded once to residual's dtype."""
    x = x.to(accumulation_dtype(residual)).reshape(residual.shape)
    if seed is not None:
        x = x * dropout_mask(seed, x, dropout_p)
    return (x + _acc(residual)).to(residual.dtype)


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
    need_stats: bool,
    cast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    summed = add_dropped(x, residual, seed, dropout_p).contiguous()
    y, stats = norm_forward(summed, weight, bias, n, 1, eps, rms, need_stats, cast)
    return y, summed, stats


def add_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    n: int,
    rms: bool,
    dropout_p: float,
    param_dtype: torch.dtype,
    x_dtype: torch.dtype,
    need_dx: bool,
    need_dresidual: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_d = need_dx or need_dresidual
    wide = _acc(summed)  # so that d is rounded after the addition alone
    weight = None if weight is None else _acc(weight)
    d, dw, db = norm_backward(_acc(dy), wide, stats, weight, n, 1, rms, param_dtype, need_d, need_dw, need_db)
    dx = dresidual = None
    if need_d:
        d = d if dsummed is None else d + _acc(dsummed).reshape(d.shape)
        dresidual = d.to(summed.dtype)
        if seed is not None:
            d = d * dropout_mask(seed, d, dropout_p)
        dx = d.to(x_dtype)
    return dx, dresidual, dw, db


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


def _capped(z: Tensor, softcap: float) -> Tensor:
    zf = _acc(z)
    return softcap * torch.tanh(zf / softcap) if softcap else zf


def _masses(target: Tensor, weight: Tensor | None, smoothing: float, like: Tensor) -> Tensor:
    """a, (M, V): target mass times class weight."""
    if target.is_floating_point():
        a = target.to(like.dtype)
    else:
        a = torch.zeros_like(like).scatter(1, target.unsqueeze(1), 1.0)
    if smoothing:
        a = a * (1 - smoothing) + smoothing / like.shape[1]
    return a if weight is None else a * weight.to(like.dtype)


def is_plain(target: Tensor, smoothing: float) -> bool:
    """One class index a row: what belongs to the target alone needs no (M, V) array of its own."""
    return not smoothing and not target.is_floating_point()


def _row_weight(target: Tensor, weight: Tensor | None, like: Tensor) -> Tensor | float:
    return 1.0 if weight is None else weight.to(like.dtype)[target].unsqueeze(1)


def _prediction(gap: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q = 1 - p, nll = -log p) of logits that lie ``gap`` below their row's largest."""
    total = 1 + others
    p = torch.exp(-gap) / total
    # total - exp(-gap) is others at the largest. Its derivative is not, hence the expm1, whose value there is 0.
    largest = gap == 0
    q = torch.where(largest, (others - torch.expm1(-torch.where(largest, gap, 0))) / total, 1 - p)
    return p, q, torch.log1p(others) + gap


def _ticks_of(p: Tensor, q: Tensor, nll: Tensor) -> Tensor:
    """p - log p = 1 + (nll - q), whose derivative in q would cancel near q = 0: there by its series."""
    series = q * q * (1 / 2 + q * (1 / 3 + q * (1 / 4 + q * (1 / 5 + q / 6))))
    small = 1e-3 if q.dtype == torch.float64 else 1 / 32
    return torch.where(q < small, 1 + series, p + nll)


def _terms(p: Tensor, q: Tensor, nll: Tensor, ce: float, ticks: float) -> Tensor:
    """ce*(-log p) + ticks*(p - log p); a coefficient of 0 leaves no trace of an infinite -log p."""
    terms = ce * nll if ce else torch.zeros_like(nll)
    return terms + ticks * _ticks_of(p, q, nll) if ticks else terms


def _weighed(a: Tensor, terms: Tensor) -> Tensor:
    """a*terms, where a mass of 0 makes nothing of an infinite term; with the derivative ``terms`` in a all the same."""
    return a * torch.where((a == 0) & terms.isinf(), 0, terms)


def ticks_forward(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    ce: float,
    ticks: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    soft = target.is_floating_point()
    zf = _acc(z)
    if not soft:
        keep = (target != ignore_index).unsqueeze(1)
        zf, target = torch.where(keep, zf, 0), torch.where(keep.squeeze(1), target, 0)
    zf = _capped(zf, softcap)
    largest, where = zf.detach().max(1, keepdim=True)  # everything below is the same whatever is subtracted
    gap = largest - zf
    # The largest is left out, but not its derivative: its exp(0) - 1 is 0, and its derivative 1.
    exps = torch.exp(-gap).scatter(1, where, torch.expm1(-gap.gather(1, where)))
    others = exps.sum(1, keepdim=True) + (largest - largest)
    if is_plain(target, smoothing):
        p, q, nll = _prediction(gap.gather(1, target.unsqueeze(1)), others)
        terms = _terms(p, q, nll, ce, ticks)
        loss = terms if weight is None else _weighed(_row_weight(target, weight, zf), terms)
        rows = [largest, others, q]
    else:
        a = _masses(target, weight, smoothing, zf)
        p, q, nll = _prediction(gap, others)
        terms = _terms(p, q, nll, ce, ticks)
        loss = _weighed(a, terms).sum(1, keepdim=True)
        rows = [largest, others, a.sum(1, keepdim=True), (a * q).sum(1, keepdim=True)]
    if not soft:
        loss, *rows = (torch.where(keep, r, 0) for r in (loss, *rows))
    return loss.squeeze(1), torch.cat(rows, 1).t().contiguous()


def ticks_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    z: Tensor,
    target: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    ce: float,
    ticks: float,
    softcap: float,
    need_dz: bool,
    need_dtarget: bool,
    inplace: bool,
) -> tuple[Tensor | None, Tensor | None]:
    soft = target.is_floating_point()
    zf, g = _acc(z), grad.unsqueeze(1)
    if not soft:
        keep = (target != ignore_index).unsqueeze(1)
        zf, target = torch.where(keep, zf, 0), torch.where(keep.squeeze(1), target, 0)
    zf = _capped(zf, softcap)
    largest, others = stats[0].unsqueeze(1), stats[1].unsqueeze(1)
    gap = largest - zf
    dz = dtarget = None
    if is_plain(target, smoothing):
        p, q_t = torch.exp(-gap) / (1 + others), stats[2].unsqueeze(1)
        alpha = g * _row_weight(target, weight, zf) * (ce + ticks * q_t)
        dz = (alpha * p).scatter(1, target.unsqueeze(1), -alpha * q_t)
    else:
        p, q, nll = _prediction(gap, others)
        if need_dz:
            a, a_sum, b_sum = _masses(target, weight, smoothing, zf), stats[2].unsqueeze(1), stats[3].unsqueeze(1)
            dz = g * (p * (ce * (a_sum - a) + ticks * (b_sum - a * q)) - a * q * (ce + ticks * q))
        if need_dtarget:
            dtarget = g * (1 - smoothing) * _terms(p, q, nll, ce, ticks)
            dtarget = (dtarget if weight is None else dtarget * weight.to(zf.dtype)).to(target.dtype)
    if need_dz:
        if grad_lse is not None:
            dz = dz + grad_lse.unsqueeze(1) * p
        if softcap:
            dz = dz * (1 - (zf / softcap).square())
        if not soft:
            dz = torch.where(keep, dz, 0)
        dz = dz.to(z.dtype)
        if inplace:
            dz = z.copy_(dz)
    return dz, dtarget
