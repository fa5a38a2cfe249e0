"""The ticks loss in Triton, one kernel each way: kernel, then launcher.

Traffic, in units of M*V*E bytes:

    forward   1: z read                  soft targets  1 more: target read
    backward  2: z read, dz written      soft targets  2 more: target read, dtarget written

and beside it of each row its target, z_t, grad and statistics (in backward once a block of classes), and but for PLAIN
the class weights: V of them a row, which a cache holds. This counts what kernels ask for.

A kernel is compiled for one of two kinds of a_j, the mass of class j: ``PLAIN`` is one class index a row without
smoothing, where what belongs to the target is computed once a row; for all else a_j is made as z_j is read. ``SOFT``
(class probabilities), ``CAPPED`` (a softcap), the class weights and grad_lse are left out where they are not asked for.

Tiles are (ROWS, BLOCK_V), ROWS > 1 for narrow rows alone. Lane j takes the classes that are j modulo BLOCK_V, in order,
and lanes are added up neighbours first, so V alone decides the order of a sum, not the layout of a tile in threads.

No integer is specialised upon: ``ALIGN_*`` are powers of two that divide V and the strides, and
``v // ALIGN_V * ALIGN_V`` tells the compiler.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import (
    Launch,
    accumulation_dtype,
    float_bits,
    fresh,
    kept,
    number,
    row_stride,
    shared_memory,
    sum_columns,
    warp_size,
)

# ------------------------------------------------------------------------------------------------ pieces of the kernels


@triton.jit
def _horner(p, x, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr, e: tl.constexpr, f: tl.constexpr):
    """Six steps p = p*x + a, fused by name; a Python number among the arguments of ``tl.fma`` would come as fp32."""
    p = tl.fma(p, x, tl.full(x.shape, a, x.dtype))
    p = tl.fma(p, x, tl.full(x.shape, b, x.dtype))
    p = tl.fma(p, x, tl.full(x.shape, c, x.dtype))
    p = tl.fma(p, x, tl.full(x.shape, d, x.dtype))
    p = tl.fma(p, x, tl.full(x.shape, e, x.dtype))
    return tl.fma(p, x, tl.full(x.shape, f, x.dtype))


@triton.jit
def _softcapped(z, cap, cap_inverse, FP64: tl.constexpr):
    """z' = cap*tanh(z/cap) and its derivative 1 - tanh^2.

    With |x| < 1, x = z/cap, z' = z + z*c(x^2), one rounding from z where x is small; beyond, u = exp(-2|x|) gives
    tanh = 1 - 2u/(1 + u) and 1 - tanh^2 = 4u/(1 + u)^2, which is no difference and so right however small it is.
    """
    x = z * cap_inverse
    x2 = x * x
    # c(y)/y, minimax for y < 1: what it leaves in tanh is 4.6e-9 relative in fp32, 1.2e-17 in fp64.
    if FP64:
        c = tl.full(z.shape, -6.269395511767152673e-8, z.dtype)
        c = tl.fma(c, x2, tl.full(z.shape, 6.545011444585537513e-7, z.dtype))
        c = tl.fma(c, x2, tl.full(z.shape, -3.419698284739225169e-6, z.dtype))
        c = _horner(
            c,
            x2,
            1.23413662296059794e-5,
            -3.608667162506864755e-5,
            9.476821829451300531e-5,
            -2.380438981830379905e-4,
            5.896187034541333382e-4,
            -1.455721333292540715e-3,
        )
        c = _horner(
            c,
            x2,
            3.592105607919204686e-3,
            -8.863232451958524189e-3,
            2.186948825985073374e-2,
            -5.396825395342802800e-2,
            0.1333333333329287542,
            -0.333333333333329448,
        )
    else:
        c = tl.full(z.shape, -3.5845238e-4, z.dtype)
        c = _horner(c, x2, 2.301365839e-3, -7.946107995e-3, 2.14866585e-2, -5.387980298e-2, 0.1333234458, -0.3333329543)
    near = tl.fma(z, x2 * c, z)
    t = near * cap_inverse
    u = tl.exp(-2.0 * tl.abs(x))
    v = 1.0 / (1.0 + u)
    far = tl.fma(2.0 * u * v, -cap, cap)
    is_near = tl.abs(x) < 1.0
    capped = tl.where(is_near, near, tl.where(x < 0, -far, far))
    return capped, tl.where(is_near, tl.fma(t, -t, 1.0), 4.0 * u * v * v)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: with u = 1 + x rounded, log(u)/(u - 1) is right, and varies too slowly to mind x - (u - 1)
    (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _one_minus(p, largest_q):
    """q = 1 - p: a p above 1/2 is the largest logit's, whose q, others/total, is no difference of large numbers."""
    return tl.where(p > 0.5, largest_q, 1.0 - p)


@triton.jit
def _mass(target_row_ptr, weight_ptr, t, cols, ok, col_ok, keep, uniform, SOFT: tl.constexpr, ACC: tl.constexpr):
    """a_j = w_j*(keep*target_j + uniform), with keep = 1 - smoothing, uniform = smoothing/V; 0 beyond the row's end."""
    if SOFT:
        a = tl.load(target_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC) * keep + uniform
    else:
        a = tl.where(cols == t[:, None], keep + uniform, uniform)
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
    return tl.where(ok, a, 0.0)


@triton.jit
def _times_gap(a, gap):
    """a*gap, and 0 where a is 0, also where the gap is infinite: there z_j is -inf, and counts for nothing."""
    return tl.where(a == 0, 0.0, a * gap)


# -------------------------------------------------------------------------------------------------------------- forward

_FORWARD_INTEGERS = ["ignore_index", "both_bits", "ticks_bits", "keep_bits", "uniform_bits", "cap_bits"]
_FORWARD_INTEGERS += ["cap_inverse_bits", "rows", "v", "z_stride", "target_stride"]


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def ticks_forward_kernel(
    z_ptr,  # (rows, v), rows z_stride apart
    target_ptr,  # (rows,) of int64, or (rows, v) for SOFT, rows target_stride apart
    weight_ptr,  # None, or (v,)
    loss_ptr,  # (rows,)
    stats_ptr,  # (3, rows): largest, others, q_t; not PLAIN (4, rows): largest, others, A, B
    ignore_index,
    both_bits,  # ce + ticks
    ticks_bits,
    keep_bits,  # 1 - smoothing
    uniform_bits,  # smoothing/V
    cap_bits,
    cap_inverse_bits,
    rows,
    v,
    z_stride,
    target_stride,
    PLAIN: tl.constexpr,
    SOFT: tl.constexpr,
    CAPPED: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_V: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """loss = sum_j a_j*((ce + ticks)*nll_j + ticks*p_j), the logits read once.

    A lane takes every BLOCK_V-th logit of a row. It knows the largest of them so far, and of the others

        s = sum exp(z_j - largest),

    and if not PLAIN a_largest, and of the others

        a = sum a_j        ae = sum a_j*exp(z_j - largest)        ag = sum a_j*(largest - z_j).

    A logit z, d = z - largest, joins the others; or if d > 0 it is the largest, and the one before it joins them, d
    below. Either way there is one exponential, exp(-|d|), by which in the latter case what was there shrinks. At the
    end the lanes' largest join the row's others, but one that is the row's largest: the lowest such lane's. The next
    STAGES - 2 blocks are on their way to shared memory meanwhile.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    both = number(both_bits, FP64)
    ticks = number(ticks_bits, FP64)
    keep = number(keep_bits, FP64)
    uniform = number(uniform_bits, FP64)
    cap = number(cap_bits, FP64)
    cap_inverse = number(cap_inverse_bits, FP64)
    v = v // ALIGN_V * ALIGN_V
    z_stride = z_stride // ALIGN_Z * ALIGN_Z
    target_stride = target_stride // ALIGN_TARGET * ALIGN_TARGET
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    lane = tl.arange(0, BLOCK_V)[None, :]
    kept = row_ok
    t = row
    if not SOFT:
        t = tl.load(target_ptr + row, mask=row_ok, other=0)
        kept = row_ok & (t != ignore_index)
    end = tl.max(tl.where(kept, v, 0), axis=0)  # where all rows are ignored nothing is read

    largest = tl.full([ROWS, BLOCK_V], float("-inf"), ACC)
    s = tl.zeros([ROWS, BLOCK_V], ACC)
    if not PLAIN:
        a_largest = tl.zeros([ROWS, BLOCK_V], ACC)
        a = tl.zeros([ROWS, BLOCK_V], ACC)
        ae = tl.zeros([ROWS, BLOCK_V], ACC)
        ag = tl.zeros([ROWS, BLOCK_V], ACC)
    for start in tl.range(0, end, BLOCK_V, num_stages=STAGES):
        cols = start + lane
        col_ok = cols < v
        ok = kept[:, None] & col_ok
        z_ptrs = z_ptr + row[:, None] * z_stride + cols
        z = tl.load(z_ptrs, mask=ok, other=float("-inf"), eviction_policy="evict_first").to(ACC)
        if CAPPED:
            z = tl.where(ok, _softcapped(z, cap, cap_inverse, FP64)[0], float("-inf"))
        d = tl.where(z == largest, 0.0, z - largest)  # equal infinities too; NaN in a row makes s NaN
        up = d > 0
        e = tl.exp(-tl.abs(d))
        shrink = tl.where(up, e, 1.0)
        s = s * shrink + e
        if not PLAIN:
            target_row_ptr = target_ptr + row[:, None] * target_stride
            a_z = _mass(target_row_ptr, weight_ptr, t, cols, ok, col_ok, keep, uniform, SOFT, ACC)
            a_joins = tl.where(up, a_largest, a_z)
            a_largest = tl.where(up, a_z, a_largest)
            a += a_joins
            ae = ae * shrink + a_joins * e
            ag += _times_gap(tl.where(up, a, a_joins), tl.abs(d))
        largest = tl.where(up, z, largest)

    row_largest = tl.max(largest, axis=1)
    is_largest = largest == row_largest[:, None]
    is_the_one = lane == tl.min(tl.where(is_largest, lane, BLOCK_V), axis=1)[:, None]
    gap = tl.where(is_largest, 0.0, row_largest[:, None] - largest)
    e = tl.exp(-gap)
    others = sum_columns((s + tl.where(is_the_one, 0.0, 1.0)) * e, ROWS, BLOCK_V) + (row_largest - row_largest)
    total = 1.0 + others
    if PLAIN:
        in_range = (t >= 0) & (t < v)
        z_t = tl.load(z_ptr + row * z_stride + t, mask=kept & in_range, other=float("nan")).to(ACC)
        if CAPPED:
            z_t = _softcapped(z_t, cap, cap_inverse, FP64)[0]
        gap_t = row_largest - z_t
        p_t = tl.exp(-gap_t) / total
        nll = _log1p(others) + gap_t
        loss = both * nll + ticks * p_t
        if weight_ptr is not None:
            w_t = tl.load(weight_ptr + t, mask=kept & in_range, other=0.0).to(ACC)
            loss = tl.where((w_t == 0) & (nll == float("inf")), 0.0, w_t * loss)
        q_t = _one_minus(p_t, others / total)
        tl.store(stats_ptr + 2 * rows.to(tl.int64) + row, tl.where(kept, q_t, 0.0), mask=row_ok)
    else:
        a_joins = tl.where(is_the_one, 0.0, a_largest)
        a += a_joins
        a_one = tl.sum(tl.where(is_the_one, a_largest, 0.0), axis=1)  # a sum with one term, whatever its order
        a_others = sum_columns(a, ROWS, BLOCK_V)
        ae_others = sum_columns((ae + a_joins) * e, ROWS, BLOCK_V)
        ag_others = sum_columns(ag + _times_gap(a, gap), ROWS, BLOCK_V)
        a_sum = a_one + a_others
        total_inverse = 1.0 / total
        loss = both * (a_sum * _log1p(others) + ag_others) + ticks * ((a_one + ae_others) * total_inverse)
        # sum a_j*q_j, where q is others/total at the largest and 1 - p, p <= 1/2, elsewhere
        b_sum = a_one * (others * total_inverse) + (a_others - ae_others * total_inverse)
        if not SOFT:
            in_range = (t >= 0) & (t < v)
            loss = tl.where(in_range, loss, float("nan"))
            b_sum = tl.where(in_range, b_sum, float("nan"))
        tl.store(stats_ptr + 2 * rows.to(tl.int64) + row, tl.where(kept, a_sum, 0.0), mask=row_ok)
        tl.store(stats_ptr + 3 * rows.to(tl.int64) + row, tl.where(kept, b_sum, 0.0), mask=row_ok)
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0), mask=row_ok)
    tl.store(stats_ptr + row, tl.where(kept, row_largest, 0.0), mask=row_ok)
    tl.store(stats_ptr + rows.to(tl.int64) + row, tl.where(kept, others, 0.0), mask=row_ok)


def _is_plain(target: Tensor, smoothing: float) -> bool:
    return not smoothing and not target.is_floating_point()


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
    """The losses and the row statistics, in one launch. See :mod:`fused_norm.backends`."""
    rows, v = z.shape
    launch.require_countable(v)
    plain, soft = _is_plain(target, smoothing), target.is_floating_point()
    acc = accumulation_dtype(z)
    loss = torch.empty(rows, dtype=acc, device=z.device)
    stats = torch.empty(3 if plain else 4, rows, dtype=acc, device=z.device)
    strides = (row_stride(z, v), row_stride(target, v) if soft else 1)
    options = (ignore_index, smoothing, ce, ticks, softcap)
    _forward_launch(rows, v, strides, z.dtype, plain, soft, options, z.device)(z, target, weight, loss, stats)
    return loss, stats


@kept
def _forward_launch(
    rows: int,
    v: int,
    strides: tuple[int, int],
    dtype: torch.dtype,
    plain: bool,
    soft: bool,
    options: tuple[int, float, float, float, float],
    device: torch.device,
) -> Launch:
    """``strides`` are those of z and target, ``options`` the call's from ignore_index on."""
    ignore_index, smoothing, ce, ticks, softcap = options
    bits = functools.partial(float_bits, fp64=dtype == torch.float64)
    config = launch.ticks_forward_launch(v, dtype.itemsize, warp_size(device), plain, shared_memory(device))
    cap = (bits(softcap), bits(1 / softcap if softcap else 0.0))
    return Launch(
        ticks_forward_kernel,
        -(-rows // config.rows),
        (
            ignore_index,
            bits(ce + ticks),
            bits(ticks),
            bits(1 - smoothing),
            bits(smoothing / v),
            *cap,
            rows,
            v,
            *strides,
        ),
        {
            "PLAIN": plain,
            "SOFT": soft,
            "CAPPED": softcap != 0,
            "FP64": dtype == torch.float64,
            "ALIGN_V": launch.alignment(v),
            "ALIGN_Z": launch.alignment(v, strides[0]),
            "ALIGN_TARGET": launch.alignment(v, strides[1]),
            "ROWS": config.rows,
            "BLOCK_V": config.block_v,
            "STAGES": config.stages,
        },
        device,
        config.num_warps,
    )


# ------------------------------------------------------------------------------------------------------------- backward

_BACKWARD_INTEGERS = ["ignore_index", "ce_bits", "ticks_bits", "keep_bits", "kept_both_bits", "kept_ticks_bits"]
_BACKWARD_INTEGERS += ["uniform_bits", "cap_bits"]
_BACKWARD_INTEGERS += ["cap_inverse_bits", "rows", "v", "blocks", "grad_stride", "grad_lse_stride", "z_stride"]
_BACKWARD_INTEGERS += ["target_stride", "dz_stride"]


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def ticks_backward_kernel(
    grad_ptr,  # rows, grad_stride apart
    grad_lse_ptr,  # None, or rows grad_lse_stride apart
    z_ptr,  # (rows, v), rows z_stride apart
    target_ptr,
    stats_ptr,
    weight_ptr,  # None, or (v,)
    dz_ptr,  # None, or (rows, v), rows dz_stride apart: z itself if in place
    dtarget_ptr,  # None, or (rows, v) for SOFT
    ignore_index,
    ce_bits,
    ticks_bits,
    keep_bits,  # 1 - smoothing
    kept_both_bits,  # (1 - smoothing)*(ce + ticks)
    kept_ticks_bits,  # (1 - smoothing)*ticks
    uniform_bits,  # smoothing/V
    cap_bits,
    cap_inverse_bits,
    rows,
    v,
    blocks,  # programs that share a row
    grad_stride,
    grad_lse_stride,
    z_stride,
    target_stride,
    dz_stride,
    PLAIN: tl.constexpr,
    SOFT: tl.constexpr,
    CAPPED: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_V: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_TARGET: tl.constexpr,
    ALIGN_DZ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """p = exp(z - largest)/total; q = 1 - p;

        PLAIN: dz' = (alpha + grad_lse)*p, at the target grad_lse*p - alpha*q_t, alpha = grad*w_t*(ce + ticks*q_t)
        else:  dz' = grad*(p*(ce*(A - a) + ticks*(B - a*q)) - a*q*(ce + ticks*q)) + grad_lse*p
               dtarget = grad*(1 - smoothing)*w*((ce + ticks)*nll + ticks*p)

    for a block of classes. A program reads its logits before it writes its gradients, which may lie over them.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    ce = number(ce_bits, FP64)
    ticks = number(ticks_bits, FP64)
    keep = number(keep_bits, FP64)
    uniform = number(uniform_bits, FP64)
    cap = number(cap_bits, FP64)
    cap_inverse = number(cap_inverse_bits, FP64)
    v = v // ALIGN_V * ALIGN_V
    z_stride = z_stride // ALIGN_Z * ALIGN_Z
    target_stride = target_stride // ALIGN_TARGET * ALIGN_TARGET
    dz_stride = dz_stride // ALIGN_DZ * ALIGN_DZ
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    row_ok = row < rows
    col_ok = cols < v
    kept = row_ok
    t = row
    if not SOFT:
        t = tl.load(target_ptr + row, mask=row_ok, other=0)
        kept = row_ok & (t != ignore_index)
    ok = kept[:, None] & col_ok

    z = tl.load(z_ptr + row[:, None] * z_stride + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
    grad = tl.load(grad_ptr + row * grad_stride, mask=kept, other=0.0)
    largest = tl.load(stats_ptr + row, mask=kept, other=0.0)
    others = tl.load(stats_ptr + rows.to(tl.int64) + row, mask=kept, other=0.0)
    total = 1.0 + others
    if CAPPED:
        z, slope = _softcapped(z, cap, cap_inverse, FP64)
    gap = largest[:, None] - z
    e = tl.exp(-gap)
    if PLAIN:
        q_t = tl.load(stats_ptr + 2 * rows.to(tl.int64) + row, mask=kept, other=0.0)
        alpha = grad * (ce + ticks * q_t)
        if weight_ptr is not None:
            in_range = (t >= 0) & (t < v)
            alpha *= tl.load(weight_ptr + t, mask=kept & in_range, other=0.0).to(ACC)
        of_z_t = alpha * q_t
        of_p_t = tl.zeros([ROWS], ACC)
        if grad_lse_ptr is not None:
            of_p_t = tl.load(grad_lse_ptr + row * grad_lse_stride, mask=kept, other=0.0)
        at_t = cols == t[:, None]
        dz = e * tl.where(at_t, (of_p_t / total)[:, None], ((alpha + of_p_t) / total)[:, None])
        dz -= tl.where(at_t, of_z_t[:, None], 0.0)
    else:
        total_inverse = (1.0 / total)[:, None]
        p = e * total_inverse
        if dz_ptr is not None:
            a_sum = tl.load(stats_ptr + 2 * rows.to(tl.int64) + row, mask=kept, other=0.0)[:, None]
            b_sum = tl.load(stats_ptr + 3 * rows.to(tl.int64) + row, mask=kept, other=0.0)[:, None]
            target_row_ptr = target_ptr + row[:, None] * target_stride
            a = _mass(target_row_ptr, weight_ptr, t, cols, ok, col_ok, keep, uniform, SOFT, ACC)
            q = _one_minus(p, others[:, None] * total_inverse)
            aq = a * q
            dz = p * (ce * (a_sum - a) + ticks * (b_sum - aq)) - aq * (ce + ticks * q)
            dz *= grad[:, None]
            if grad_lse_ptr is not None:
                dz += tl.load(grad_lse_ptr + row * grad_lse_stride, mask=kept, other=0.0)[:, None] * p
        if dtarget_ptr is not None:
            dtarget = number(kept_both_bits, FP64) * (_log1p(others)[:, None] + gap) + number(kept_ticks_bits, FP64) * p
            dtarget *= grad[:, None]
            if weight_ptr is not None:
                dtarget *= tl.load(weight_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
            tl.store(dtarget_ptr + row[:, None] * v + cols, dtarget, mask=ok)
    if dz_ptr is not None:
        if CAPPED:
            dz *= slope
        # An ignored row's grad, weight and masses were not read but taken as 0, and so its dz is 0.
        tl.store(dz_ptr + row[:, None] * dz_stride + cols, dz, mask=row_ok[:, None] & col_ok)


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
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dz and dtarget (None where not needed), in one launch. See :mod:`fused_norm.backends`."""
    plain, soft = _is_plain(target, smoothing), target.is_floating_point()
    need_dtarget = need_dtarget and soft
    if not (need_dz or need_dtarget):
        return None, None
    rows, v = z.shape
    launch.require_countable(v)
    dz = None
    if need_dz:
        dz = z if inplace else fresh(z)
    dtarget = fresh(target) if need_dtarget else None
    z_stride = row_stride(z, v)
    grad_strides = (grad.stride(0), 0 if grad_lse is None else grad_lse.stride(0))
    strides = (*grad_strides, z_stride, row_stride(target, v) if soft else 1, z_stride if inplace else v)
    options = (ignore_index, smoothing, ce, ticks, softcap)
    run = _backward_launch(rows, v, strides, z.dtype, plain, soft, options, z.device)
    run(grad, grad_lse, z, target, stats, weight, dz, dtarget)
    return dz, dtarget


@kept
def _backward_launch(
    rows: int,
    v: int,
    strides: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    plain: bool,
    soft: bool,
    options: tuple[int, float, float, float, float],
    device: torch.device,
) -> Launch:
    """``strides`` are those of grad, grad_lse, z, target and dz, ``options`` the call's from ignore_index on."""
    ignore_index, smoothing, ce, ticks, softcap = options
    _, _, z_stride, target_stride, dz_stride = strides
    bits = functools.partial(float_bits, fp64=dtype == torch.float64)
    keep = 1 - smoothing
    config = launch.ticks_backward_launch(v, dtype.itemsize, plain, warp_size(device))
    blocks = -(-v // config.block_v)
    weights = (
        ce,
        ticks,
        keep,
        keep * (ce + ticks),
        keep * ticks,
        smoothing / v,
        softcap,
        1 / softcap if softcap else 0.0,
    )
    return Launch(
        ticks_backward_kernel,
        -(-rows // config.rows) * blocks,
        (ignore_index, *map(bits, weights), rows, v, blocks, *strides),
        {
            "PLAIN": plain,
            "SOFT": soft,
            "CAPPED": softcap != 0,
            "FP64": dtype == torch.float64,
            "ALIGN_V": launch.alignment(v),
            "ALIGN_Z": launch.alignment(v, z_stride),
            "ALIGN_TARGET": launch.alignment(v, target_stride),
            "ALIGN_DZ": launch.alignment(v, dz_stride),
            "ROWS": config.rows,
            "BLOCK_V": config.block_v,
        },
        device,
        config.num_warps,
    )
