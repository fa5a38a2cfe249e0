"""Double backward of LayerNorm and RMSNorm in Triton, and with it forward-mode AD: kernel, then launcher.

Traffic, in units of M*N*E bytes, beside the parameters, the row statistics and the partial sums of grad_w:

    whole row on chip  5: ddx, dy and x read, grad_dy and grad_x written; grad_dy alone, which is the jvp, 3
    looped            11: ddx, dy and x read three times;                 grad_dy alone                    5

The looped kernel reads a row as often as its sums depend on one another: those of t and of p*g need a = mean_n(u*xhat)
and b = mean_n(g*xhat), which need the whole row, and the results need all four. Expanded into sums that a single read
could take, mean_n(p*g) = mean_n(u*g) - mean_n(u)*mean_n(g) - a*b, it would cancel. Without grad_x there is no need of b
and of the second read; dy is then read once, for grad_w, or not at all.

Tiles, layouts and integers are as in :mod:`.norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import (
    Launch,
    accumulation_dtype,
    add_partial,
    fresh,
    group_stride,
    kept,
    mean_of,
    ratio,
    row_stride,
    sum_rows,
    warp_size,
)
from .norm import add_up_partials

# ------------------------------------------------------------------------------------------------ pieces of the kernels


@triton.jit
def _parameter(pointer, cols, col_ok, ACC: tl.constexpr):
    """A parameter's elements for the columns ``cols``.

    They are loaded where they are used, not kept in registers from row to row: these have the row to hold.
    """
    return tl.load(pointer + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)


@triton.jit
def _xhat(x, mean, rstd, ok, IS_RMS: tl.constexpr):
    """xhat, and zero where there is no element."""
    if IS_RMS:
        return x * rstd
    else:
        return tl.where(ok, (x - mean) * rstd, 0.0)


@triton.jit
def _pu(u, xhat, a, mean_u, rstd, ok, IS_RMS: tl.constexpr):
    """P(u) = rstd*p with p = u - mean_n(u) - xhat*a, and zero where there is no element."""
    if IS_RMS:
        return rstd * (u - xhat * a)
    else:
        return tl.where(ok, rstd * (u - xhat * a - mean_u), 0.0)


@triton.jit
def _grad_dy(pu, xhat, weight_ptr, ddw_ptr, ddb_ptr, cols, col_ok, ACC: tl.constexpr):
    """w*P(u) + v*xhat + c; pu is None for zeros."""
    if pu is None:
        grad_dy = xhat * _parameter(ddw_ptr, cols, col_ok, ACC)
    else:
        grad_dy = pu
        if weight_ptr is not None:
            grad_dy = grad_dy * _parameter(weight_ptr, cols, col_ok, ACC)
        if ddw_ptr is not None:
            grad_dy = grad_dy + xhat * _parameter(ddw_ptr, cols, col_ok, ACC)
    if ddb_ptr is not None:
        grad_dy = grad_dy + _parameter(ddb_ptr, cols, col_ok, ACC)
    return grad_dy


@triton.jit
def _g(dy, weight_ptr, cols, col_ok, ACC: tl.constexpr):
    """g = dy*w."""
    if weight_ptr is None:
        return dy
    else:
        return dy * _parameter(weight_ptr, cols, col_ok, ACC)


@triton.jit
def _t(pu, xhat, dy, g, a_rstd, b, ddw_ptr, cols, col_ok, ACC: tl.constexpr):
    """t = v*dy - rstd*(b*u + a*g) with u - mean_n(u) for u, which is p + xhat*a; pu is None for zeros.

    A constant added to t changes no result, and P(u) is what a program still holds of u.
    """
    if pu is None:
        t = dy * _parameter(ddw_ptr, cols, col_ok, ACC)
    else:
        t = -(b * (pu + xhat * a_rstd) + a_rstd * g)
        if ddw_ptr is not None:
            t = t + dy * _parameter(ddw_ptr, cols, col_ok, ACC)
    return t


# -------------------------------------------------------------------------------------------------------------- kernels

_INTEGERS = ["total_rows", "rows", "parts", "rows_per_part", "n", "ddx_stride", "dy_stride", "x_stride"]
_INTEGERS += ["weight_stride", "ddw_stride", "ddb_stride"]


@triton.jit(do_not_specialize=_INTEGERS)
def norm_double_backward_kernel(
    ddx_ptr,  # None for zeros, or (total_rows, n), rows ddx_stride apart; called u in the formulas
    dy_ptr,  # None if neither grad_x nor grad_w is needed, or (total_rows, n), rows dy_stride apart
    x_ptr,  # (total_rows, n), rows x_stride apart
    stats_ptr,
    weight_ptr,  # None, or n elements a group, groups weight_stride apart (0: shared)
    ddw_ptr,  # likewise, None for zeros; called v
    ddb_ptr,  # likewise; called c
    grad_dy_ptr,  # None, or (total_rows, n)
    grad_x_ptr,  # None, or (total_rows, n)
    grad_w_ptr,  # None, or (groups, parts, n) partial sums; not without ddx
    total_rows,
    rows,  # rows of one group
    parts,  # programs of one group
    rows_per_part,
    n,
    ddx_stride,
    dy_stride,
    x_stride,
    weight_stride,
    ddw_stride,
    ddb_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DDX: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """a = mean_n(u*xhat); b = mean_n(g*xhat); p = u - mean_n(u) - xhat*a; t = v*dy - rstd*(b*u + a*g);
    grad_dy = w*rstd*p + v*xhat + c; grad_x = rstd*(t - mean_n(t) - xhat*(mean_n(t*xhat) + rstd*mean_n(p*g)));
    grad_w += dy*rstd*p.

    A program walks its block of rows in order, whole rows in registers, and keeps its sums for grad_w there too.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    ddx_stride = ddx_stride // ALIGN_DDX * ALIGN_DDX
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_ok = cols < n
    if weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
    if ddw_ptr is not None:
        ddw_ptr += group * (ddw_stride // ALIGN_N * ALIGN_N)
    if ddb_ptr is not None:
        ddb_ptr += group * (ddb_stride // ALIGN_N * ALIGN_N)

    if grad_w_ptr is not None:
        grad_w = tl.zeros([ROWS, BLOCK_N], ACC)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        ok = row_ok[:, None] & col_ok
        # All loads of a row come before its first sum, so that they are under way together.
        x_ptrs = x_ptr + row[:, None] * x_stride + cols
        x = tl.load(x_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if ddx_ptr is not None:
            u_ptrs = ddx_ptr + row[:, None] * ddx_stride + cols
            u = tl.load(u_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if dy_ptr is not None:
            dy_ptrs = dy_ptr + row[:, None] * dy_stride + cols
            dy = tl.load(dy_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        rstd = tl.load(stats_ptr + row, mask=row_ok, other=0.0)[:, None]
        mean = None
        if not IS_RMS:
            mean = tl.load(stats_ptr + total_rows + row, mask=row_ok, other=0.0)[:, None]
        xhat = _xhat(x, mean, rstd, ok, IS_RMS)

        pu, a_rstd, b, g, mean_u = None, None, None, None, None
        if ddx_ptr is not None:
            a = mean_of(tl.sum(u * xhat, axis=1), n, one_nth)[:, None]
            if not IS_RMS:
                mean_u = mean_of(tl.sum(u, axis=1), n, one_nth)[:, None]
            if grad_x_ptr is not None:
                b = mean_of(tl.sum(_g(dy, weight_ptr, cols, col_ok, ACC) * xhat, axis=1), n, one_nth)[:, None]
            pu = _pu(u, xhat, a, mean_u, rstd, ok, IS_RMS)
            a_rstd = a * rstd
        if grad_dy_ptr is not None:
            grad_dy = _grad_dy(pu, xhat, weight_ptr, ddw_ptr, ddb_ptr, cols, col_ok, ACC)
            tl.store(grad_dy_ptr + row[:, None] * n + cols, grad_dy, mask=ok)
        if grad_w_ptr is not None:
            grad_w += dy * pu
        if grad_x_ptr is not None:
            if ddx_ptr is not None:
                g = _g(dy, weight_ptr, cols, col_ok, ACC)  # loads w again, which costs less than the registers for g
                s = mean_of(tl.sum(pu * g, axis=1), n, one_nth)[:, None]
            t = _t(pu, xhat, dy, g, a_rstd, b, ddw_ptr, cols, col_ok, ACC)
            along = mean_of(tl.sum(t * xhat, axis=1), n, one_nth)[:, None]
            if ddx_ptr is not None:
                along += s
            grad_x = t - xhat * along
            if not IS_RMS:
                grad_x = grad_x - mean_of(tl.sum(t, axis=1), n, one_nth)[:, None]
            tl.store(grad_x_ptr + row[:, None] * n + cols, grad_x * rstd, mask=ok)

    if grad_w_ptr is not None:
        flat_cols = tl.arange(0, BLOCK_N)
        partial = tl.program_id(0).to(tl.int64) * n + flat_cols
        tl.store(grad_w_ptr + partial, sum_rows(grad_w, ROWS, BLOCK_N), mask=flat_cols < n)


@triton.jit(do_not_specialize=_INTEGERS)
def norm_double_backward_looped_kernel(
    ddx_ptr,
    dy_ptr,
    x_ptr,
    stats_ptr,
    weight_ptr,
    ddw_ptr,
    ddb_ptr,
    grad_dy_ptr,
    grad_x_ptr,
    grad_w_ptr,
    total_rows,
    rows,
    parts,
    rows_per_part,
    n,
    ddx_stride,
    dy_stride,
    x_stride,
    weight_stride,
    ddw_stride,
    ddb_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DDX: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for rows too wide for the registers: each tile of ROWS rows is read three times, in chunks of BLOCK_N.

    First for a, b and mean_n(u), then for the sums of t and of p*g, which need those, then for the results. The first
    read is left out where there is no ddx, the second where grad_x is not needed.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    ddx_stride = ddx_stride // ALIGN_DDX * ALIGN_DDX
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    tile_cols = tl.arange(0, BLOCK_N)
    if weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
    if ddw_ptr is not None:
        ddw_ptr += group * (ddw_stride // ALIGN_N * ALIGN_N)
    if ddb_ptr is not None:
        ddb_ptr += group * (ddb_stride // ALIGN_N * ALIGN_N)

    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        x_row_ptr = x_ptr + row[:, None] * x_stride
        if ddx_ptr is not None:
            u_row_ptr = ddx_ptr + row[:, None] * ddx_stride
        if dy_ptr is not None:
            dy_row_ptr = dy_ptr + row[:, None] * dy_stride
        rstd = tl.load(stats_ptr + row, mask=row_ok, other=0.0)[:, None]
        mean = None
        if not IS_RMS:
            mean = tl.load(stats_ptr + total_rows + row, mask=row_ok, other=0.0)[:, None]

        a, a_rstd, b, mean_u = None, None, None, None
        if ddx_ptr is not None:
            sum_u = tl.zeros([ROWS, BLOCK_N], ACC)  # a lane for each column of a chunk, added up after the loop
            sum_u_xhat = tl.zeros([ROWS, BLOCK_N], ACC)
            sum_g_xhat = tl.zeros([ROWS, BLOCK_N], ACC)
            for start in range(0, n, BLOCK_N):
                cols = (start + tile_cols)[None, :]
                ok = row_ok[:, None] & (cols < n)
                x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                u = tl.load(u_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                xhat = _xhat(x, mean, rstd, ok, IS_RMS)
                sum_u_xhat += u * xhat
                if not IS_RMS:
                    sum_u += u
                if grad_x_ptr is not None:
                    dy = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                    sum_g_xhat += _g(dy, weight_ptr, cols, cols < n, ACC) * xhat
            a = mean_of(tl.sum(sum_u_xhat, axis=1), n, one_nth)[:, None]
            a_rstd = a * rstd
            if not IS_RMS:
                mean_u = mean_of(tl.sum(sum_u, axis=1), n, one_nth)[:, None]
            if grad_x_ptr is not None:
                b = mean_of(tl.sum(sum_g_xhat, axis=1), n, one_nth)[:, None]

        if grad_x_ptr is not None:
            sum_pu_g = tl.zeros([ROWS, BLOCK_N], ACC)
            sum_t = tl.zeros([ROWS, BLOCK_N], ACC)
            sum_t_xhat = tl.zeros([ROWS, BLOCK_N], ACC)
            for start in range(0, n, BLOCK_N):
                cols = (start + tile_cols)[None, :]
                ok = row_ok[:, None] & (cols < n)
                x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                dy = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                xhat = _xhat(x, mean, rstd, ok, IS_RMS)
                pu = None
                g = None
                if ddx_ptr is not None:
                    u = tl.load(u_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                    pu = _pu(u, xhat, a, mean_u, rstd, ok, IS_RMS)
                    g = _g(dy, weight_ptr, cols, cols < n, ACC)
                    sum_pu_g += pu * g
                t = _t(pu, xhat, dy, g, a_rstd, b, ddw_ptr, cols, cols < n, ACC)
                sum_t_xhat += t * xhat
                if not IS_RMS:
                    sum_t += t
            along = mean_of(tl.sum(sum_t_xhat, axis=1), n, one_nth)[:, None]
            if ddx_ptr is not None:
                along += mean_of(tl.sum(sum_pu_g, axis=1), n, one_nth)[:, None]
            if not IS_RMS:
                mean_t = mean_of(tl.sum(sum_t, axis=1), n, one_nth)[:, None]

        for start in range(0, n, BLOCK_N):
            cols = (start + tile_cols)[None, :]
            ok = row_ok[:, None] & (cols < n)
            x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            xhat = _xhat(x, mean, rstd, ok, IS_RMS)
            pu = None
            g = None
            if ddx_ptr is not None:
                u = tl.load(u_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
                pu = _pu(u, xhat, a, mean_u, rstd, ok, IS_RMS)
            if dy_ptr is not None:
                dy = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            if grad_dy_ptr is not None:
                grad_dy = _grad_dy(pu, xhat, weight_ptr, ddw_ptr, ddb_ptr, cols, cols < n, ACC)
                tl.store(grad_dy_ptr + row[:, None] * n + cols, grad_dy, mask=ok)
            if grad_x_ptr is not None:
                if ddx_ptr is not None:
                    g = _g(dy, weight_ptr, cols, cols < n, ACC)
                grad_x = _t(pu, xhat, dy, g, a_rstd, b, ddw_ptr, cols, cols < n, ACC) - xhat * along
                if not IS_RMS:
                    grad_x = grad_x - mean_t
                tl.store(grad_x_ptr + row[:, None] * n + cols, grad_x * rstd, mask=ok)
            if grad_w_ptr is not None:
                flat_cols = start + tile_cols
                partial = tl.program_id(0).to(tl.int64) * n + flat_cols
                added = sum_rows(dy * pu, ROWS, BLOCK_N)
                add_partial(grad_w_ptr + partial, added, flat_cols < n, first == begin)
        if grad_w_ptr is not None:
            tl.debug_barrier()  # the next tile reads partial sums that other threads of this program may have written


# ------------------------------------------------------------------------------------------------------------- launcher


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
    """grad_dy, grad_x and grad_w (None where not needed), in at most two launches. See :mod:`fused_norm.backends`."""
    launch.require_countable(n)
    grad_dy = fresh(x) if need_ddy else None
    grad_x = fresh(x) if need_dx else None
    grad_w = torch.empty(groups, n, dtype=param_dtype, device=x.device) if need_dw else None
    # What no kernel is needed for: grad_w is linear in ddx, grad_x in ddx and ddw.
    if ddx is None and need_dw:
        grad_w.zero_()
        need_dw = False
    if ddx is None and ddw is None:
        if need_dx:
            grad_x.zero_()
            need_dx = False
        if need_ddy:
            grad_dy.view(groups, -1, n).copy_(0.0 if ddb is None else ddb.view(-1, 1, n))
            need_ddy = False
    if not (need_ddy or need_dx or need_dw):
        return grad_dy, grad_x, grad_w

    # What is not read is None, lest it make another kernel to compile.
    dy = dy if need_dx or need_dw else None
    weight = weight if ddx is not None and (need_ddy or need_dx) else None
    ddw = ddw if need_ddy or need_dx else None
    ddb = ddb if need_ddy else None
    weight_stride, ddw_stride, ddb_stride = group_stride(weight, n), group_stride(ddw, n), group_stride(ddb, n)
    if not (need_dw or weight_stride or ddw_stride or ddb_stride):
        groups = 1  # rows need not know their group
    rows = x.numel() // n // groups
    config = launch.double_backward_launch(n, x.element_size(), warp_size(x.device))
    parts = launch.double_backward_partition(rows, groups, config.rows, need_dw).parts
    partial = None
    if need_dw:
        acc = accumulation_dtype(x)
        once = not config.looped or rows <= config.rows
        direct = parts == 1 and (once or param_dtype == acc)  # as in .norm
        partial = grad_w if direct else torch.empty(groups, parts, n, dtype=acc, device=x.device)
    row_strides = (*[n if t is None else row_stride(t, n) for t in (ddx, dy)], row_stride(x, n))
    run = _launch(
        n, rows, groups, row_strides, (weight_stride, ddw_stride, ddb_stride), x.dtype, rms, need_dw, x.device
    )
    run(ddx, dy, x, stats, weight, ddw, ddb, grad_dy, grad_x, partial)
    if need_dw and not direct:
        add_up_partials(partial, None, grad_w, None, groups, parts, n)
    return grad_dy, grad_x, grad_w


@kept
def _launch(
    n: int,
    rows: int,
    groups: int,
    row_strides: tuple[int, int, int],
    group_strides: tuple[int, int, int],
    dtype: torch.dtype,
    rms: bool,
    need_dw: bool,
    device: torch.device,
) -> Launch:
    """``row_strides`` are those of ddx, dy and x, ``group_strides`` those of weight, ddw and ddb."""
    config = launch.double_backward_launch(n, dtype.itemsize, warp_size(device))
    share = launch.double_backward_partition(rows, groups, config.rows, need_dw)
    ddx_stride, dy_stride, x_stride = row_strides
    return Launch(
        norm_double_backward_looped_kernel if config.looped else norm_double_backward_kernel,
        groups * share.parts,
        (rows * groups, rows, share.parts, share.rows_per_part, n, *row_strides, *group_strides),
        {
            "IS_RMS": rms,
            "FP64": dtype == torch.float64,
            "ALIGN_N": launch.alignment(n),
            "ALIGN_DDX": launch.alignment(n, ddx_stride),
            "ALIGN_DY": launch.alignment(n, dy_stride),
            "ALIGN_X": launch.alignment(n, x_stride),
            "ROWS": config.rows,
            "BLOCK_N": config.block_n,
        },
        device,
        config.num_warps,
    )
