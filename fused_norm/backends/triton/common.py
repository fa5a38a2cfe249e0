"""What the kernels and their launchers share."""

from __future__ import annotations

import contextlib
import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Triton's default for fusing a multiplication and an addition differs between its versions, and with it the last bit.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# ------------------------------------------------------------------------------------------------ pieces of the kernels


@triton.jit
def ratio(a, b, FP64: tl.constexpr):
    """a / b of two integers, correctly rounded; plain fp32 division is not."""
    if FP64:
        return tl.cast(a, tl.float64) / tl.cast(b, tl.float64)
    else:
        return tl.div_rn(tl.cast(a, tl.float32), tl.cast(b, tl.float32))


@triton.jit
def mean_of(total, n, one_nth):
    """total / n as total * (1/n) and one correction by its remainder, which leaves about one rounding.

    A correctly rounded division calls a subroutine, and while a row is in registers a call makes them spill.
    """
    quotient = total * one_nth
    corrected = tl.fma(tl.fma(-quotient, tl.cast(n, total.dtype), total), one_nth, quotient)
    return tl.where(corrected == corrected, corrected, quotient)  # the remainder of an infinite total is NaN


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum of a (ROWS, BLOCK_N) tile over its rows, by pairs: two addends have one order, whatever the tile's layout."""
    if ROWS == 1:
        return tl.reshape(tile, [BLOCK_N])
    else:
        pairs = tl.reshape(tile, [ROWS // 2, 2, BLOCK_N])
        return sum_rows(tl.sum(pairs, axis=1), ROWS // 2, BLOCK_N)


@triton.jit
def sum_columns(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a (ROWS, BLOCK) tile over its columns, neighbours first: two addends have one order, whatever the layout.

    The layout of what is only read follows from its alignment, which must not change a bit.
    """
    if BLOCK == 1:
        return tl.reshape(tile, [ROWS])
    else:
        pairs = tl.reshape(tile, [ROWS, BLOCK // 2, 2])
        return sum_columns(tl.sum(pairs, axis=2), ROWS, BLOCK // 2)


@triton.jit
def number(bits, FP64: tl.constexpr):
    """The number of the accumulation type with these bits (:func:`float_bits`): a float would come as fp32."""
    if FP64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_partial(partial_ptr, value, ok, is_first):
    """Add to a partial row, whose first tile finds it uninitialised."""
    before = tl.load(partial_ptr, mask=ok & (not is_first), other=0.0)
    tl.store(partial_ptr, before + value, mask=ok)


# --------------------------------------------------------------------------------------------- what the launchers share


def check_storage(**tensors: Tensor | None) -> None:
    """Raise for a tensor whose storage has been freed (as FSDP does between uses): a kernel would read address 0."""
    for name, t in tensors.items():
        if t is not None and t.data_ptr() == 0:
            raise RuntimeError(f"{name} has shape {tuple(t.shape)} and no storage: its memory has been freed")


def float_bits(value: float, fp64: bool) -> int:
    """The bits of ``value`` as fp64 or fp32: Triton hands a Python float over as fp32 whatever it is needed for."""
    floating, integer = ("<d", "<q") if fp64 else ("<f", "<i")
    return struct.unpack(integer, struct.pack(floating, value))[0]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_stride(t: Tensor, n: int) -> int:
    """Elements from one row to the next."""
    return n if t.is_contiguous() else t.stride(0)


def group_stride(parameter: Tensor | None, n: int) -> int:
    """Elements from one group's weight or bias to the next's; 0 where all groups share it, or there is one."""
    return 0 if parameter is None or parameter.numel() == n else n


@functools.cache
def warp_size(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's data-centre GPUs. Triton takes 32 on XPU, and the interpreter has none."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's, where it is not."""
    if t.device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    backend = getattr(torch, t.device.type)
    return contextlib.nullcontext() if backend.current_device() == t.device.index else backend.device(t.device)
