"""LayerNorm and RMSNorm in Triton, one kernel each way, with ``IS_RMS`` leaving out the mean: kernel, then launcher.

The same kernels serve add and norm, where x is dropped out and added to a residual first: a pointer that is None leaves
out what belongs to it. Traffic, in units of M*N*E bytes:

    forward   whole row on chip  2: x read, y written          looped  3: x read twice
    backward  whole row on chip  3: x and dy read, dx written  looped  5: x and dy read twice
    add and norm, forward        4: x, residual, summed, y     looped  5: summed read back
    add and norm, backward       as backward with summed for x and dresidual for dx, and 1 for each of dsummed and dx,
                                 where there is one: 3 to 5    looped  5 to 7

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
    Launch,
    accumulation_dtype,
    add_partial,
    float_bits,
    fresh,
    group_stride,
    kept,
    mean_of,
    number,
    ratio,
    row_stride,
    shared_memory,
    sum_rows,
    warp_size,
)
from .dropout import dropout_integers, keep_of, keep_of_rows

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
def _first_elements(
    x_ptrs,
    residual_ptrs,
    seed_ptr,
    index,
    threshold,
    scale,
    ok,
    QUADS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The first element of each row that is normalised: x's, or its sum with the residual's, whose index is given."""
    x0 = tl.load(x_ptrs, mask=ok, other=0.0).to(ACC)
    if residual_ptrs is not None:
        residual = tl.load(residual_ptrs, mask=ok, other=0.0).to(ACC)
        if seed_ptr is not None:
            x0 = tl.fma(x0, keep_of(tl.load(seed_ptr), index, threshold, scale, QUADS), residual)
        else:
            x0 += residual
        x0 = x0.to(DTYPE).to(ACC)
    return x0


@triton.jit
def _affine(xhat, weight_ptr, bias_ptr, cols, col_ok, CAST: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """xhat*w + b for the columns ``cols`` of shape (1, BLOCK_N); with CAST of xhat rounded to DTYPE."""
    y = xhat
    if CAST:
        y = y.to(DTYPE).to(ACC)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + cols, mask=col_ok, other=0.0, eviction_policy="evict_last").to(ACC)
    return y


def _alignment_beside(dtype: torch.dtype, other: torch.dtype | None, *strides: int) -> int:
    """The alignment to tell of a tensor of ``other`` (None: there is none) beside rows of ``dtype``, whose elements may
    be wider: no wider access than an access to those.

    A wider one would decide the layout of all that the kernel holds, or be converted from it through shared memory.
    """
    alignment = launch.alignment(*strides)
    return alignment if other in (None, dtype) else min(alignment, 16 // dtype.itemsize)


# -------------------------------------------------------------------------------------------------------------- forward

_FORWARD_INTEGERS = ["eps_bits", "threshold", "scale_bits", "total_rows", "rows", "tiles", "n"]
_FORWARD_INTEGERS += ["x_stride", "residual_stride", "weight_stride", "bias_stride"]


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def norm_forward_kernel(
    x_ptr,  # (total_rows, n), rows x_stride apart
    residual_ptr,  # None, or (total_rows, n), rows residual_stride apart: what is normalised is its sum with x
    weight_ptr,  # None, or n elements a group, groups weight_stride apart (0: shared)
    bias_ptr,
    seed_ptr,  # None, or one int64: x is dropped out
    summed_ptr,  # None without residual, else (total_rows, n)
    y_ptr,  # (total_rows, n)
    stats_ptr,  # None, or (2, total_rows): rstd, mean; (1, total_rows) for IS_RMS
    eps_bits,
    threshold,
    scale_bits,
    total_rows,
    rows,  # rows of one group
    tiles,  # programs of one group
    n,
    x_stride,
    residual_stride,
    weight_stride,
    bias_stride,
    IS_RMS: tl.constexpr,
    CAST: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """m = x0 + sum(x - x0)/n; off = sum(x - m)/n; mean = m + off; var = sum((x - m)^2)/n - off^2;
    rstd = 1/sqrt(var + eps); y = (x - mean)*rstd*w + b; where there is a residual all of x*keep/(1 - p) + residual.

    The row stays in registers.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    x_stride = x_stride // ALIGN_X * ALIGN_X
    residual_stride = residual_stride // ALIGN_RESIDUAL * ALIGN_RESIDUAL
    scale = number(scale_bits, FP64)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    r = tile * ROWS + tl.arange(0, ROWS)
    row = group * rows + r
    row_ok = r < rows
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_ok = cols < n
    ok = row_ok[:, None] & col_ok

    if not IS_RMS:
        residual_row_ptr = None if residual_ptr is None else residual_ptr + row * residual_stride
        x_row_ptr = x_ptr + row * x_stride
        x0 = _first_elements(
            x_row_ptr, residual_row_ptr, seed_ptr, row * n, threshold, scale, row_ok, ALIGN_N % 4 == 0, DTYPE, ACC
        )
    x = tl.load(x_ptr + row[:, None] * x_stride + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row[:, None] * residual_stride + cols
        residual = tl.load(residual_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if seed_ptr is not None:
            # Fused by name here and for x0, where the compiler might fuse one of them only.
            keep = keep_of_rows(tl.load(seed_ptr), row * n, threshold, scale, BLOCK_N, ALIGN_N % 4 == 0)
            x = tl.fma(x, keep, residual)
        else:
            x += residual
        summed = x.to(DTYPE)
        tl.store(summed_ptr + row[:, None] * n + cols, summed, mask=ok)
        x = summed.to(ACC)
    if IS_RMS:
        centred = x
        variance = mean_of(tl.sum(x * x, axis=1), n, one_nth)
    else:
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
    y = _affine(centred * rstd[:, None], weight_ptr, bias_ptr, cols, col_ok, CAST, DTYPE, ACC)
    tl.store(y_ptr + row[:, None] * n + cols, y, mask=ok)


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def norm_forward_looped_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    summed_ptr,
    y_ptr,
    stats_ptr,
    eps_bits,
    threshold,
    scale_bits,
    total_rows,
    rows,
    tiles,
    n,
    x_stride,
    residual_stride,
    weight_stride,
    bias_stride,
    IS_RMS: tl.constexpr,
    CAST: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same for a row too wide for the registers, in chunks of BLOCK_N columns; ROWS is 1.

    Each chunk is on chip for both its passes: its mean, then its squares about that mean. Chunks are merged by

        M2 = M2_a + M2_b + (mean_b - mean_a)^2 * n_a*n_b/(n_a + n_b)

    (Chan, Golub and LeVeque), with means taken relative to a pivot: the first chunk's mean, which is itself taken
    relative to x0. So x is read twice in all, once for the statistics and once for y, and not three times. Where there
    is a residual, both are read once, and the sum that was written is read back for y. In the first pass the next
    STAGES - 2 chunks are on their way to shared memory; the second reads weight and bias too, which copies would not
    leave in the first cache, where the next row finds them.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    one_nth = ratio(1, n, FP64)
    n = n // ALIGN_N * ALIGN_N
    x_stride = x_stride // ALIGN_X * ALIGN_X
    residual_stride = residual_stride // ALIGN_RESIDUAL * ALIGN_RESIDUAL
    scale = number(scale_bits, FP64)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, ROWS)
    x_row_ptr = x_ptr + row[:, None] * x_stride
    cols = tl.arange(0, BLOCK_N)[None, :]

    if not IS_RMS:
        residual_row_ptr = None if residual_ptr is None else residual_ptr + row * residual_stride
        every = row < total_rows
        first_ptr = x_ptr + row * x_stride
        pivot = _first_elements(
            first_ptr, residual_row_ptr, seed_ptr, row * n, threshold, scale, every, ALIGN_N % 4 == 0, DTYPE, ACC
        )
    offset = tl.zeros([ROWS], ACC)  # mean - pivot of the columns so far
    squares = tl.zeros([ROWS], ACC)  # sum of (x - mean)^2 over them
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        ok = cols < n - start
        if residual_ptr is None:
            x = tl.load(x_row_ptr + (start + cols), mask=ok, other=0.0, eviction_policy="evict_last").to(ACC)
        else:
            x = tl.load(x_row_ptr + (start + cols), mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            residual_ptrs = residual_ptr + row[:, None] * residual_stride + (start + cols)
            residual = tl.load(residual_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            if seed_ptr is not None:
                keep = keep_of_rows(tl.load(seed_ptr), row * n + start, threshold, scale, BLOCK_N, ALIGN_N % 4 == 0)
                x = tl.fma(x, keep, residual)
            else:
                x += residual
            summed = x.to(DTYPE)
            tl.store(summed_ptr + row[:, None] * n + (start + cols), summed, mask=ok)
            x = summed.to(ACC)
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
    if residual_ptr is None:
        again_ptr = x_row_ptr
    else:
        again_ptr = summed_ptr + row[:, None] * n
        tl.debug_barrier()  # other threads of this program may have written what is read back
    last = (n - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n, BLOCK_N):  # what was read last comes first: a cache may still hold it
        at = last - back + cols
        ok = at < n
        x = tl.load(again_ptr + at, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if not IS_RMS:
            x = x - mean[:, None]
        y = _affine(x * rstd[:, None], weight_ptr, bias_ptr, at, ok, CAST, DTYPE, ACC)
        tl.store(y_ptr + row[:, None] * n + at, y, mask=ok)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n: int,
    groups: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    need_stats: bool,
    cast: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the sum with the residual (None without one) and the row statistics, in one launch."""
    launch.require_countable(n)
    like = x if residual is None else residual  # as y is
    total_rows = x.numel() // n
    y = fresh(like)
    summed = None if residual is None else torch.empty_like(y)
    stats_rows = 0 if not need_stats else 1 if rms else 2
    stats = torch.empty(stats_rows, total_rows, dtype=accumulation_dtype(like), device=x.device)
    weight_stride, bias_stride = group_stride(weight, n), group_stride(bias, n)
    if not weight_stride and not bias_stride:
        groups = 1  # rows need not know their group
    residual_stride = 0 if residual is None else row_stride(residual, n)
    strides = (row_stride(x, n), residual_stride, weight_stride, bias_stride)
    tensors = 1 if residual is None else 2
    call = (n, total_rows, groups, strides, tensors, like.dtype, x.dtype, eps, rms, dropout_p, cast, x.device)
    _forward_launch(*call)(x, residual, weight, bias, seed, summed, y, stats if need_stats else None)
    return y, summed, stats


@kept
def _forward_launch(
    n: int,
    total_rows: int,
    groups: int,
    strides: tuple[int, ...],
    tensors: int,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    eps: float,
    rms: bool,
    dropout_p: float,
    cast: bool,
    device: torch.device,
) -> Launch:
    """``dtype`` is y's; ``strides`` are those of x, residual, weight and bias; ``tensors`` of these have x's size."""
    x_stride, residual_stride, _, _ = strides
    rows = total_rows // groups
    fp64 = dtype == torch.float64
    room = (warp_size(device), dropout_p > 0, tensors, shared_memory(device))
    config = launch.forward_launch(n, dtype.itemsize, *room)
    tiles = -(-rows // config.rows)
    return Launch(
        norm_forward_looped_kernel if config.looped else norm_forward_kernel,
        groups * tiles,
        (float_bits(eps, fp64), *dropout_integers(dropout_p, fp64), total_rows, rows, tiles, n, *strides),
        {
            "IS_RMS": rms,
            "CAST": cast and dtype.itemsize == 2,
            "FP64": fp64,
            "ALIGN_N": launch.alignment(n),
            "ALIGN_X": _alignment_beside(dtype, x_dtype, n, x_stride),
            "ALIGN_RESIDUAL": launch.alignment(n, residual_stride),
            "ROWS": config.rows,
            "BLOCK_N": config.block_n,
            **({"STAGES": config.stages} if config.looped else {}),
        },
        device,
        config.num_warps,
    )


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
    """y and the row statistics, in one launch. See :mod:`fused_norm.backends`."""
    y, _, stats = _forward(x, None, weight, bias, None, n, groups, eps, rms, 0.0, need_stats, cast)
    return y, stats


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
    """y, summed and its row statistics, in one launch. See :mod:`fused_norm.backends`."""
    return _forward(x, residual, weight, bias, seed, n, 1, eps, rms, dropout_p, need_stats, cast)


# ------------------------------------------------------------------------------------------------------------- backward

_BACKWARD_INTEGERS = ["threshold", "scale_bits", "total_rows", "rows", "parts", "rows_per_part", "n"]
_BACKWARD_INTEGERS += ["dy_stride", "dsummed_stride", "x_stride", "weight_stride"]


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def norm_backward_kernel(
    dy_ptr,  # (total_rows, n), rows dy_stride apart
    dsummed_ptr,  # None, or (total_rows, n), rows dsummed_stride apart: what else reaches x
    x_ptr,  # (total_rows, n), rows x_stride apart: what was normalised
    stats_ptr,
    weight_ptr,  # None, or n elements a group, groups weight_stride apart (0: shared)
    seed_ptr,  # None, or one int64: the mask of dinput
    dx_ptr,  # None, or (total_rows, n)
    dinput_ptr,  # None, or (total_rows, n): the gradient of what was dropped out and added to the residual to make x
    dw_ptr,  # None, or (groups, parts, n) partial sums
    db_ptr,  # None, or (groups, parts, n) partial sums
    threshold,
    scale_bits,
    total_rows,
    rows,  # rows of one group
    parts,  # programs of one group
    rows_per_part,
    n,
    dy_stride,
    dsummed_stride,
    x_stride,
    weight_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_DSUMMED: tl.constexpr,
    ALIGN_DINPUT: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """xhat = (x - mean)*rstd; g = dy*w; dx = rstd*(g - mean_n(g) - xhat*mean_n(g*xhat)); dw += dy*xhat; db += dy.

    Where asked for, dx += dsummed and dinput = dx*keep/(1 - p). A program walks its block of rows in order, whole rows
    in registers, and keeps its sums for dw and db there too. While it works on a tile the next STAGES - 2 are on their
    way to shared memory, and STAGES - 1 while it waits for one.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    NEED_D: tl.constexpr = dx_ptr is not None or dinput_ptr is not None
    one_nth = ratio(1, n, FP64)
    dinput_stride = n // ALIGN_DINPUT * ALIGN_DINPUT
    n = n // ALIGN_N * ALIGN_N
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    dsummed_stride = dsummed_stride // ALIGN_DSUMMED * ALIGN_DSUMMED
    x_stride = x_stride // ALIGN_X * ALIGN_X
    scale = number(scale_bits, FP64)
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_ok = cols < n

    if NEED_D and weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)
        # As a whole tile, for the layout of one: another might spread to the sums, and not with all STAGES alike.
        every = tl.zeros([ROWS, 1], tl.int32) + cols
        w = tl.load(weight_ptr + every, mask=every < n, other=0.0).to(ACC)
    if dw_ptr is not None:
        dw = tl.zeros([ROWS, BLOCK_N], ACC)
    if db_ptr is not None:
        db = tl.zeros([ROWS, BLOCK_N], ACC)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        ok = row_ok[:, None] & col_ok
        dy_ptrs = dy_ptr + row[:, None] * dy_stride + cols
        dy = tl.load(dy_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
        if dsummed_ptr is not None and (ROWS > 1 or not FP64):
            # Before the sums over the row, which wait for all threads; in fp64, where a tile is one wide row, no
            # register is left to hold it meanwhile.
            dsummed_ptrs = dsummed_ptr + row[:, None] * dsummed_stride + cols
            dsummed = tl.load(dsummed_ptrs, mask=ok, other=0.0, eviction_policy="evict_first")
        if NEED_D or dw_ptr is not None:
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
        if NEED_D:
            g = dy
            if weight_ptr is not None:
                g = dy * w
            dx = g - xhat * mean_of(tl.sum(g * xhat, axis=1), n, one_nth)[:, None]
            if not IS_RMS:
                dx = dx - mean_of(tl.sum(g, axis=1), n, one_nth)[:, None]
            dx = dx * rstd[:, None]
            if dsummed_ptr is not None:
                if ROWS == 1 and FP64:
                    dsummed_ptrs = dsummed_ptr + row[:, None] * dsummed_stride + cols
                    dsummed = tl.load(dsummed_ptrs, mask=ok, other=0.0, eviction_policy="evict_first")
                dx += dsummed.to(ACC)
            if dx_ptr is not None:
                tl.store(dx_ptr + row[:, None] * n + cols, dx, mask=ok)
            if dinput_ptr is not None:
                if seed_ptr is not None:
                    dx = dx * keep_of_rows(tl.load(seed_ptr), row * n, threshold, scale, BLOCK_N, ALIGN_N % 4 == 0)
                tl.store(dinput_ptr + row[:, None] * dinput_stride + cols, dx, mask=ok)

    flat_cols = tl.arange(0, BLOCK_N)
    partial = tl.program_id(0).to(tl.int64) * n + flat_cols
    if dw_ptr is not None:
        tl.store(dw_ptr + partial, sum_rows(dw, ROWS, BLOCK_N), mask=flat_cols < n)
    if db_ptr is not None:
        tl.store(db_ptr + partial, sum_rows(db, ROWS, BLOCK_N), mask=flat_cols < n)


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def norm_backward_looped_kernel(
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    stats_ptr,
    weight_ptr,
    seed_ptr,
    dx_ptr,
    dinput_ptr,
    dw_ptr,
    db_ptr,
    threshold,
    scale_bits,
    total_rows,
    rows,
    parts,
    rows_per_part,
    n,
    dy_stride,
    dsummed_stride,
    x_stride,
    weight_stride,
    IS_RMS: tl.constexpr,
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    ALIGN_DSUMMED: tl.constexpr,
    ALIGN_DINPUT: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same for rows too wide for the registers: each tile of ROWS rows is read twice, in chunks of BLOCK_N columns.

    First for the two row sums of dx (left out where dx is not needed), then for dx and the sums over the rows. The
    chunk last read comes first then: a cache may still hold it. The next STAGES - 2 are on their way to shared memory.
    """
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    NEED_D: tl.constexpr = dx_ptr is not None or dinput_ptr is not None
    one_nth = ratio(1, n, FP64)
    dinput_stride = n // ALIGN_DINPUT * ALIGN_DINPUT
    n = n // ALIGN_N * ALIGN_N
    dy_stride = dy_stride // ALIGN_DY * ALIGN_DY
    dsummed_stride = dsummed_stride // ALIGN_DSUMMED * ALIGN_DSUMMED
    x_stride = x_stride // ALIGN_X * ALIGN_X
    scale = number(scale_bits, FP64)
    group = (tl.program_id(0) // parts).to(tl.int64)
    begin = (tl.program_id(0) % parts).to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    tile_cols = tl.arange(0, BLOCK_N)
    if NEED_D and weight_ptr is not None:
        weight_ptr += group * (weight_stride // ALIGN_N * ALIGN_N)

    for first in range(begin, end, ROWS):
        r = first + tl.arange(0, ROWS)
        row = group * rows + r
        row_ok = r < end
        dy_row_ptr = dy_ptr + row[:, None] * dy_stride
        x_row_ptr = x_ptr + row[:, None] * x_stride
        if NEED_D or dw_ptr is not None:
            rstd = tl.load(stats_ptr + row, mask=row_ok, other=0.0)[:, None]
            mean = tl.zeros([ROWS, 1], ACC)
            if not IS_RMS:
                mean = tl.load(stats_ptr + total_rows + row, mask=row_ok, other=0.0)[:, None]

        if NEED_D:
            sum_g = tl.zeros([ROWS, BLOCK_N], ACC)  # a lane for each column of a chunk, added up after the loop
            sum_g_xhat = tl.zeros([ROWS, BLOCK_N], ACC)
            for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
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

        last = (n - 1) // BLOCK_N * BLOCK_N
        for back in tl.range(0, n, BLOCK_N, num_stages=STAGES):
            start = last - back
            cols = (start + tile_cols)[None, :]
            ok = row_ok[:, None] & (cols < n)
            dy = tl.load(dy_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
            if NEED_D or dw_ptr is not None:
                x = tl.load(x_row_ptr + cols, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
                xhat = tl.where(ok, (x - mean) * rstd, 0.0)
            if NEED_D:
                g = dy
                if weight_ptr is not None:
                    g = dy * tl.load(weight_ptr + cols, mask=cols < n, other=0.0).to(ACC)
                dx = g - xhat * mean_g_xhat
                if not IS_RMS:
                    dx = dx - mean_g
                dx = dx * rstd
                if dsummed_ptr is not None:
                    dsummed_ptrs = dsummed_ptr + row[:, None] * dsummed_stride + cols
                    dx += tl.load(dsummed_ptrs, mask=ok, other=0.0, eviction_policy="evict_first").to(ACC)
                if dx_ptr is not None:
                    tl.store(dx_ptr + row[:, None] * n + cols, dx, mask=ok)
                if dinput_ptr is not None:
                    if seed_ptr is not None:
                        first_index = row * n + start
                        dx = dx * keep_of_rows(
                            tl.load(seed_ptr), first_index, threshold, scale, BLOCK_N, ALIGN_N % 4 == 0
                        )
                    tl.store(dinput_ptr + row[:, None] * dinput_stride + cols, dx, mask=ok)
            flat_cols = start + tile_cols
            partial = tl.program_id(0).to(tl.int64) * n + flat_cols
            if dw_ptr is not None:
                add_partial(dw_ptr + partial, sum_rows(dy * xhat, ROWS, BLOCK_N), flat_cols < n, first == begin)
            if db_ptr is not None:
                add_partial(db_ptr + partial, sum_rows(dy, ROWS, BLOCK_N), flat_cols < n, first == begin)
        tl.debug_barrier()  # the next tile reads the partial sums that other threads of this program may have written


@triton.jit(do_not_specialize=["parts", "n", "blocks"])
def norm_backward_reduce_kernel(
    dw_partial_ptr,  # None, or (groups, parts, n)
    db_partial_ptr,
    dw_ptr,  # None, or (groups, n)
    db_ptr,
    parts,
    n,
    blocks,  # programs of one group
    FP64: tl.constexpr,
    ALIGN_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up one group's partial rows for BLOCK_N columns: those equal modulo PARTS in order, then pairs."""
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    n = n // ALIGN_N * ALIGN_N
    group = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    _reduce_launch(groups, parts, n, some.dtype, some.device)(dw_partial, db_partial, dw, db)


@kept
def _reduce_launch(groups: int, parts: int, n: int, dtype: torch.dtype, device: torch.device) -> Launch:
    config = launch.reduce_launch(n, parts, warp_size(device))
    blocks = -(-n // config.block_n)
    return Launch(
        norm_backward_reduce_kernel,
        groups * blocks,
        (parts, n, blocks),
        {
            "FP64": dtype == torch.float64,
            "ALIGN_N": launch.alignment(n),
            "PARTS": config.rows,
            "BLOCK_N": config.block_n,
        },
        device,
        config.num_warps,
    )


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    n: int,
    groups: int,
    rms: bool,
    dropout_p: float,
    param_dtype: torch.dtype,
    dinput_dtype: torch.dtype | None,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dinput (where it has a dtype), dw and db, each None where not needed, in at most two launches."""
    launch.require_countable(n)
    need_dinput = dinput_dtype is not None
    if not (need_dx or need_dinput):
        dsummed = None
        if not (need_dw or need_db):
            return None, None, None, None
    rows = x.numel() // n // groups
    config = launch.backward_launch(n, x.element_size(), warp_size(x.device), seed is not None)
    parts = launch.backward_partition(rows, groups, config.rows, n).parts
    # A single partial row is the result, if what is added to it tile by tile is not rounded to a narrower type.
    once = not config.looped or rows <= config.rows
    direct = parts == 1 and (once or param_dtype == accumulation_dtype(x))

    def parameter_gradient(needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if not needed:
            return None, None
        result = torch.empty(groups, n, dtype=param_dtype, device=x.device)
        if direct:
            return result, result
        return result, torch.empty(groups, parts, n, dtype=accumulation_dtype(x), device=x.device)

    dx = fresh(x) if need_dx else None
    dinput = fresh(x, dinput_dtype) if need_dinput else None
    dw, dw_partial = parameter_gradient(need_dw)
    db, db_partial = parameter_gradient(need_db)
    dsummed_stride = 0 if dsummed is None else row_stride(dsummed, n)
    strides = (row_stride(dy, n), dsummed_stride, row_stride(x, n), group_stride(weight, n))
    tensors = 2 if dsummed is None else 3
    call = (n, rows, groups, strides, tensors, x.dtype, dinput_dtype, rms, dropout_p, seed is not None, x.device)
    _backward_launch(*call)(dy, dsummed, x, stats, weight, seed, dx, dinput, dw_partial, db_partial)
    if (need_dw or need_db) and not direct:
        add_up_partials(dw_partial, db_partial, dw, db, groups, parts, n)
    return dx, dinput, dw, db


@kept
def _backward_launch(
    n: int,
    rows: int,
    groups: int,
    strides: tuple[int, ...],
    tensors: int,
    dtype: torch.dtype,
    dinput_dtype: torch.dtype | None,
    rms: bool,
    dropout_p: float,
    dropout: bool,
    device: torch.device,
) -> Launch:
    """``strides`` are those of dy, dsummed, x and weight; ``tensors`` of these have x's size."""
    dy_stride, dsummed_stride, x_stride, _ = strides
    fp64 = dtype == torch.float64
    room = (warp_size(device), dropout, tensors, shared_memory(device))
    config = launch.backward_launch(n, dtype.itemsize, *room)
    share = launch.backward_partition(rows, groups, config.rows, n)
    return Launch(
        norm_backward_looped_kernel if config.looped else norm_backward_kernel,
        groups * share.parts,
        (*dropout_integers(dropout_p, fp64), rows * groups, rows, share.parts, share.rows_per_part, n, *strides),
        {
            "IS_RMS": rms,
            "FP64": fp64,
            "ALIGN_N": launch.alignment(n),
            "ALIGN_DY": launch.alignment(n, dy_stride),
            "ALIGN_DSUMMED": launch.alignment(n, dsummed_stride),
            "ALIGN_DINPUT": _alignment_beside(dtype, dinput_dtype, n),
            "ALIGN_X": launch.alignment(n, x_stride),
            "ROWS": config.rows,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
        },
        device,
        config.num_warps,
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
    dx, _, dw, db = _backward(
        dy, None, x, stats, weight, None, n, groups, rms, 0.0, param_dtype, None, need_dx, need_dw, need_db
    )
    return dx, dw, db


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
    """dx, dresidual, dw and db (None where not needed), in at most two launches. See :mod:`fused_norm.backends`.

    Where dx would be dresidual it is None, and dresidual is there for either.
    """
    if seed is None and x_dtype == summed.dtype:
        need_dx, need_dresidual = False, need_dx or need_dresidual
    dinput_dtype = x_dtype if need_dx else None
    args = (n, 1, rms, dropout_p, param_dtype, dinput_dtype, need_dresidual, need_dw, need_db)
    dresidual, dx, dw, db = _backward(dy, dsummed, summed, stats, weight, seed, *args)
    return dx, dresidual, dw, db
