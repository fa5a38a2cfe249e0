"""LayerNorm and RMSNorm in Triton, one kernel each way, with ``IS_RMS`` leaving out the mean: kernel, then launcher.

Traffic, in units of M*N*E bytes:

    forward   whole row on chip  2: x read, y written          looped  3: x read twice
    backward  whole row on chip  3: x and dy read, dx written  looped  5: x and dy read twice

and beside it the parameters, the row statistics, and in backward the partial sums of dw and db, ``parts`` rows of n
fp32 values each (:mod:`.launch`). They are written once, and read once by the kernel that adds them up; the looped
kernel reads and writes them for each tile of rows. All this counts what kernels ask for: a second read may hit a cache.

Tiles are (ROWS, BLOCK_N). The layout in which Triton holds a tile, and with it the order of a sum, follows from the
widest access to the tile: that is y or dx, which are fresh and contiguous, so n alone decides it, not the alignment or
the strides of the inputs. To that end no integer is specialised upon: ``ALIGN_*`` are powers of two that divide n and
the strides, and ``n // ALIGN_N * ALIGN_N`` tells the compiler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import (
    COMPILE_OPTIONS,
    accumulation_dtype,
    add_partial,
    check_storage,
    float_bits,
    group_stride,
    mean_of,
    on_device_of,
    ratio,
    row_stride,
    sum_rows,
    warp_size,
)

# ------------------------------------------------------------------------------------------------ pieces of the kernels


@triton.jit
def _reciprocal_sqrt(variance, eps_bits, FP64: tl.constexpr):
    """1/sqrt(variance + eps), with eps as the bits of a number of the accumulation type: a float would come as fp32."""
    if FP64:
        eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
        return 1.0 / tl.sqrt(variance + eps)
    else:
        eps = eps_bits.to(tl.int32).to(tl.float32, bitcast=True)
        return tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, cols, col_ok, ACC: tl.constexpr):
    """xhat*w + b for the columns ``cols`` of shape (1, BLOCK_N)."""
    y = xhat
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
    return y


# -------------------------------------------------------------------------------------------------------------- forward

_FORWARD_INTEGERS = ["eps_bits", "total_rows", "rows", "tiles", "n", "x_stride", "weight_stride", "bias_stride"]


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def norm_forward_kernel(
    x_ptr,  # (total_rows, n), rows x_stride apart
    weight_ptr,  # None, or n elements a group, groups weight_stride apart (0: shared)
    bias_ptr,
    y_ptr,  # (total_rows, n)
    stats_ptr,  # None, or (2, total_rows): rstd, mean; (1, total_rows) for IS_RMS
    eps_bits,
    total_rows,
    rows,  # rows of one group
    tiles,  # programs of one group
    n,
    x_stride,
    weight_stride,
    bias_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """m = x0 + sum(x - x0)/n; off = sum(x - m)/n; mean = m + off; var = sum((x - m)^2)/n - off^2;
    rstd = 1/sqrt(var + eps); y = (x - mean)*rstd*w + b.

    The row stays in registers.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    r = tile * ROWS + tl.arange(0, ROWS)
    row = group * rows + r
    row_ok = r < rows
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_ok = cols < n
    ok = row_ok[:, None] & col_ok

    x = tl.load(x_ptr + row[:, None] * x_stride + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
    if IS_RMS:
        centred = x
        variance = mean_of(tl.sum(x * x, axis=1), n, one_nth)
    else:
        x0 = tl.load(x_ptr + row * x_stride, mask=row_ok, other=0.0).to(ACC)
        mean = x0 + mean_of(tl.sum(tl.where(ok, x - x0[:, None], 0.0), axis=1), n, one_nth)
        centred = tl.where(ok, x - mean[:, None], 0.0)
        off = mean_of(tl.sum(centred, axis=1), n, one_nth)
        variance = mean_of(tl.sum(centred * centred, axis=1), n, one_nth) - off * off
        mean += off
        centred = x - mean[:, None]
    rstd = _reciprocal_sqrt(variance, eps_bits, FP64)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, rstd, mask=row_ok)
        if not IS_RMS:
            tl.store(stats_ptr + total_rows + row, mean, mask=row_ok)

    if weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
    if bias_ptr is not None:
        bias_ptr += group * (bias_stride // ALIGN_N * ALIGN_N)
    y = _affine(centred * rstd[:, None], weight_ptr, bias_ptr, cols, col_ok, ACC)
    tl.store(y_ptr + row[:, None] * n + cols, y, mask=ok)


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def norm_forward_looped_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    eps_bits,
    total_rows,
    rows,
    tiles,
    n,
    x_stride,
    weight_stride,
    bias_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for a row too wide for the registers, in chunks of BLOCK_N columns; ROWS is 1.

    Each chunk is on chip for both its passes: its mean, then its squares about that mean. Chunks are merged by

        M2 = M2_a + M2_b + (mean_b - mean_a)^2 * n_a*n_b/(n_a + n_b)

    (Chan, Golub and LeVeque), with means taken relative to a pivot: the first chunk's mean, which is itself taken
    relative to x0. So x is read twice in all, once for the statistics and once for y, and not three times.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)
    x_row_ptr = x_ptr + row[:, None] * x_stride
    cols = tl.arange(0, BLOCK_N)[None, :]

    if not IS_RMS:
        pivot = tl.load(x_ptr + row * x_stride).to(ACC)
    offset = tl.zeros([ROWS], ACC)  # mean - pivot of the columns so far
    squares = tl.zeros([ROWS], ACC)  # sum of (x - mean)^2 over them
    for start in range(0, n, BLOCK_N):
        ok = cols < n - start
        x = tl.load(x_row_ptr + (start + cols), mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
        if IS_RMS:
            squares += tl.sum(x * x, axis=1)
        else:
            count = tl.minimum(n - start, BLOCK_N)
            one_countth = ratio(1, count, FP64)
            chunk_offset = mean_of(tl.sum(tl.where(ok, x - pivot[:, None], 0.0), axis=1), count, one_countth)
            if start == 0:
                pivot += chunk_offset
                chunk_offset = tl.zeros([ROWS], ACC)
            centred = tl.where(ok, (x - pivot[:, None]) - chunk_offset[:, None], 0.0)
            off = mean_of(tl.sum(centred, axis=1), count, one_countth)
            chunk_offset += off
            share = ratio(count, start + count, FP64)  # n_b / (n_a + n_b)
            delta = chunk_offset - offset
            squares += tl.sum(centred * centred, axis=1) - off * off * count + delta * delta * (share * start)
            offset += delta * share
    rstd = _reciprocal_sqrt(mean_of(squares, n, one_nth), eps_bits, FP64)
    if not IS_RMS:
        mean = pivot + offset
    if stats_ptr is not None:
        tl.store(stats_ptr + row, rstd)
        if not IS_RMS:
            tl.store(stats_ptr + total_rows + row, mean)

    if weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
    if bias_ptr is not None:
        bias_ptr += group * (bias_stride // ALIGN_N * ALIGN_N)
    for start in range(0, n, BLOCK_N):
        at = start + cols
        ok = at < n
        x = tl.load(x_row_ptr + at, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if not IS_RMS:
            x = x - mean[:, None]
        y = _affine(x * rstd[:, None], weight_ptr, bias_ptr, at, ok, ACC)
        tl.store(y_ptr + row[:, None] * n + at, y, mask=ok)


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, groups: int, eps: float, rms: bool, need_stats: bool
) -> tuple[Tensor, Tensor]:
    """y and the row statistics, in one launch. See :mod:`fused_norm.backends`."""
    check_storage(x=x, weight=weight, bias=bias)
    total_rows = x.numel() // n
    fp64 = x.dtype == torch.float64
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats_rows = 0 if not need_stats else 1 if rms else 2
    stats = torch.empty((stats_rows, total_rows), dtype=accumulation_dtype(x), device=x.device)
    weight_stride, bias_stride = group_stride(weight, n), group_stride(bias, n)
    if not weight_stride and not bias_stride:
        groups = 1  # rows need not know their group
    rows = total_rows // groups
    x_stride = row_stride(x, n)
    config = launch.forward_launch(n, x.element_size(), warp_size(x.device))
    tiles = -(-rows // config.rows)
    kernel = norm_forward_looped_kernel if config.looped else norm_forward_kernel
    with on_device_of(x):
        kernel[(groups * tiles,)](
            x,
            weight,
            bias,
            y,
            stats if need_stats else None,
            float_bits(eps, fp64),
            total_rows,
            rows,
            tiles,
            n,
            x_stride,
            weight_stride,
            bias_stride,
            IS_RMS=rms,
            FP64=fp64,
            ALIGN_N=launch.alignment(n),
            ALIGN_X=launch.alignment(n, x_stride),
            ROWS=config.rows,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            **COMPILE_OPTIONS,
        )
    return y, stats


# ------------------------------------------------------------------------------------------------------------- backward

_BACKWARD_INTEGERS = ["total_rows", "rows", "parts", "rows_per_part", "n", "dy_stride", "x_stride", "weight_stride"]


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def norm_backward_kernel(
    dy_ptr,  # (total_rows, n), rows dy_stride apart
    x_ptr,  # (total_rows, n), rows x_stride apart
    stats_ptr,
    weight_ptr,  # None, or n elements a group, groups weight_stride apart (0: shared)
    dx_ptr,  # None, or (total_rows, n)
    dw_ptr,  # None, or (groups, parts, n) partial sums
    db_ptr,  # None, or (groups, parts, n) partial sums
    total_rows,
    rows,  # rows of one group
    parts,  # programs of one group
    rows_per_part,
    n,
    dy_stride,
    x_stride,
    weight_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """xhat = (x - mean)*rstd; g = dy*w; dx = rstd*(g - mean_n(g) - xhat*mean_n(g*xhat)); dw += dy*xhat; db += dy.

    A program walks its block of rows in order, whole rows in registers, and keeps its sums for dw and db there too.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_ok = cols < n

    if dx_ptr is not None and weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
        w = tl.load(weight_ptr + cols, mask=col_ok, other=0.0).to(ACC)
    if dw_ptr is not None:
        dw = tl.zeros([ROWS, BLOCK_N], ACC)
    if db_ptr is not None:
        db = tl.zeros([ROWS, BLOCK_N], ACC)
    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        ok = row_ok[:, None] & col_ok
        dy_ptrs = dy_ptr + row[:, None] * dy_stride + cols
        dy = tl.load(dy_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if dx_ptr is not None or dw_ptr is not None:
            x_ptrs = x_ptr + row[:, None] * x_stride + cols
            x = tl.load(x_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            rstd = tl.load(stats_ptr + row, mask=row_ok, other=0.0)
            if IS_RMS:
                xhat = x * rstd[:, None]
            else:
                mean = tl.load(stats_ptr + total_rows + row, mask=row_ok, other=0.0)
                xhat = tl.where(ok, (x - mean[:, None]) * rstd[:, None], 0.0)
            if dw_ptr is not None:
                dw += dy * xhat
        if db_ptr is not None:
            db += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g = dy * w
            dx = g - xhat * mean_of(tl.sum(g * xhat, axis=1), n, one_nth)[:, None]
            if not IS_RMS:
                dx = dx - mean_of(tl.sum(g, axis=1), n, one_nth)[:, None]
            tl.store(dx_ptr + row[:, None] * n + cols, dx * rstd[:, None], mask=ok)

    flat_cols = tl.arange(0, BLOCK_N)
    partial = tl.program_id(0).to(tl.int64) * n + flat_cols
    if dw_ptr is not None:
        tl.store(dw_ptr + partial, sum_rows(dw, ROWS, BLOCK_N), mask=flat_cols < n)
    if db_ptr is not None:
        tl.store(db_ptr + partial, sum_rows(db, ROWS, BLOCK_N), mask=flat_cols < n)


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def norm_backward_looped_kernel(
    dy_ptr,
    x_ptr,
    stats_ptr,
    weight_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    total_rows,
    rows,
    parts,
    rows_per_part,
    n,
    dy_stride,
    x_stride,
    weight_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for rows too wide for the registers: each tile of ROWS rows is read twice, in chunks of BLOCK_N columns.

    First for the two row sums of dx (left out where dx is not needed), then for dx and the sums over the rows.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    x_stride = x_stride // ALIGN_X * ALIGN_X
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    tile_cols = tl.arange(0, BLOCK_N)
    if dx_ptr is not None and weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)

    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        dy_row_ptr = dy_ptr + row[:, None] * dy_stride
        x_row_ptr = x_ptr + row[:, None] * x_stride
        if dx_ptr is not None or dw_ptr is not None:
            rstd = tl.load(stats_ptr + row, mask=row_ok, other=0.0)[:, None]
            mean = tl.zeros([ROWS, 1], ACC)
            if not IS_RMS:
                mean = tl.load(stats_ptr + total_rows + row, mask=row_ok, other=0.0)[:, None]

        if dx_ptr is not None:
            sum_g = tl.zeros([ROWS, BLOCK_N], ACC)  # a lane for each column of a chunk, added up after the loop
            sum_g_xhat = tl.zeros([ROWS, BLOCK_N], ACC)
            for start in range(0, n, BLOCK_N):
                cols = (start + tile_cols)[None, :]
                ok = row_ok[:, None] & (cols < n)
                g = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
                if weight_ptr is not None:
                    g = g * tl.load(weight_ptr + cols, mask=cols < n, other=0.0).to(ACC)
                sum_g_xhat += g * tl.where(ok, (x - mean) * rstd, 0.0)
                if not IS_RMS:
                    sum_g += g
            mean_g_xhat = mean_of(tl.sum(sum_g_xhat, axis=1), n, one_nth)[:, None]
            if not IS_RMS:
                mean_g = mean_of(tl.sum(sum_g, axis=1), n, one_nth)[:, None]

        for start in range(0, n, BLOCK_N):
            cols = (start + tile_cols)[None, :]
            ok = row_ok[:, None] & (cols < n)
            dy = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            if dx_ptr is not None or dw_ptr is not None:
                x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
                xhat = tl.where(ok, (x - mean) * rstd, 0.0)
            if dx_ptr is not None:
                g = dy
                if weight_ptr is not None:
                    g = dy * tl.load(weight_ptr + cols, mask=cols < n, other=0.0).to(ACC)
                dx = g - xhat * mean_g_xhat
                if not IS_RMS:
                    dx = dx - mean_g
                tl.store(dx_ptr + row[:, None] * n + cols, dx * rstd, mask=ok)
            flat_cols = start + tile_cols
            partial = tl.program_id(0).to(tl.int64) * n + flat_cols
            if dw_ptr is not None:
                add_partial(dw_ptr + partial, sum_rows(dy * xhat, ROWS, BLOCK_N), flat_cols < n, first == begin)
            if db_ptr is not None:
                add_partial(db_ptr + partial, sum_rows(dy, ROWS, BLOCK_N), flat_cols < n, first == begin)
        tl.debug_barrier()  # the next tile reads the partial sums that other threads of this program may have written


@triton.jit(do_not_specialize=["parts", "n"])
def norm_backward_reduce_kernel(
    dw_partial_ptr,  # None, or (groups, parts, n)
    db_partial_ptr,
    dw_ptr,  # None, or (groups, n)
    db_ptr,
    parts,
    n,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up one group's partial rows for BLOCK_N columns: those equal modulo PARTS in order, then pairs."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    n = n // ALIGN_N * ALIGN_N
    group = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if dw_ptr is not None:
        total = _sum_parts(dw_partial_ptr + group * parts * n, cols, parts, n, PARTS, BLOCK_N, ACC)
        tl.store(dw_ptr + group * n + cols, total, mask=cols < n)
    if db_ptr is not None:
        total = _sum_parts(db_partial_ptr + group * parts * n, cols, parts, n, PARTS, BLOCK_N, ACC)
        tl.store(db_ptr + group * n + cols, total, mask=cols < n)


@triton.jit
def _sum_parts(partial_ptr, cols, parts, n, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros([PARTS, BLOCK_N], ACC)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        ok = (part < parts) & (cols < n)[None, :]
        total += tl.load(partial_ptr + part.to(tl.int64) * n + cols[None, :], mask=ok, other=0.0)
    return sum_rows(total, PARTS, BLOCK_N)


def add_up_partials(
    dw_partial: Tensor | None,
    db_partial: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    groups: int,
    parts: int,
    n: int,
) -> None:
    """Launch the sum of partial rows ``(groups, parts, n)`` into ``(groups, n)``, for dw, db or both."""
    some = dw_partial if dw_partial is not None else db_partial
    config = launch.reduce_launch(n, parts, warp_size(some.device))
    norm_backward_reduce_kernel[(-(-n // config.block_n), groups)](
        dw_partial,
        db_partial,
        dw,
        db,
        parts,
        n,
        FP64=some.dtype == torch.float64,
        ALIGN_N=launch.alignment(n),
        PARTS=config.rows,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        **COMPILE_OPTIONS,
    )


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
    """dx, dw and db (None where not needed), in at most two launches. See :mod:`fused_norm.backends`."""
    if not (need_dx or need_dw or need_db):
        return None, None, None
    check_storage(dy=dy, x=x, stats=stats, weight=weight)
    total_rows = x.numel() // n
    rows = total_rows // groups
    fp64 = x.dtype == torch.float64
    x_stride, dy_stride, weight_stride = row_stride(x, n), row_stride(dy, n), group_stride(weight, n)
    config = launch.backward_launch(n, x.element_size(), warp_size(x.device))
    share = launch.backward_partition(rows, groups, config.rows)
    # A single partial row that is written once is the result.
    direct = share.parts == 1 and not (config.looped and rows > config.rows)

    def parameter_gradient(needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if not needed:
            return None, None
        result = torch.empty((groups, n), dtype=param_dtype, device=x.device)
        if direct:
            return result, result
        return result, torch.empty((groups, share.parts, n), dtype=accumulation_dtype(x), device=x.device)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dw, dw_partial = parameter_gradient(need_dw)
    db, db_partial = parameter_gradient(need_db)
    kernel = norm_backward_looped_kernel if config.looped else norm_backward_kernel
    with on_device_of(x):
        kernel[(groups * share.parts,)](
            dy,
            x,
            stats,
            weight,
            dx,
            dw_partial,
            db_partial,
            total_rows,
            rows,
            share.parts,
            share.rows_per_part,
            n,
            dy_stride,
            x_stride,
            weight_stride,
            IS_RMS=rms,
            FP64=fp64,
            ALIGN_N=launch.alignment(n),
            ALIGN_DY=launch.alignment(n, dy_stride),
            ALIGN_X=launch.alignment(n, x_stride),
            ROWS=config.rows,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            **COMPILE_OPTIONS,
        )
        if (need_dw or need_db) and not direct:
            add_up_partials(dw_partial, db_partial, dw, db, groups, share.parts, n)
    return dx, dw, db
