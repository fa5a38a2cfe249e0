"""How a kernel is launched, as a value: a pure function of the shape and the element size.

What decides the order of a reduction over a row (``rows``, ``block_n``, ``num_warps``, ``looped``) depends on n and the element
size alone, so a row's bits do not depend on the rows beside it. ``parts``, the number of partial sums of dw and db, depends
on M and groups too. Neither looks at the device's number of multiprocessors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

#: A row wider than this is looped over. Forward holds one fp32 value an element: 32 a thread at 1024 threads, in the 64
#: registers that a thread then has. fp64 takes two registers a value.
FORWARD_WHOLE_ROW = {8: 16384, 4: 32768, 2: 32768}

#: Backward holds x, dy, the sums for dw and db, and the weight: five values an element.
BACKWARD_WHOLE_ROW = {8: 4096, 4: 8192, 2: 8192}


@dataclass(frozen=True)
class NormLaunch:
    """One launch of a norm kernel: tiles of ``rows`` rows by ``block_n`` columns, ``num_warps`` warps a program."""

    rows: int
    block_n: int
    num_warps: int
    looped: bool


@dataclass(frozen=True)
class Partition:
    """How the rows of one group are shared out: ``parts`` programs of ``rows_per_part`` consecutive rows (the last may have fewer)."""

    parts: int
    rows_per_part: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _warps(tile: int, per_warp: int) -> int:
    """Warps for a tile of so many elements, at ``per_warp`` each; at most 1024 threads of 32 lanes."""
    return max(1, min(32, tile // per_warp))


@functools.cache
def forward_launch(n: int, element_size: int) -> NormLaunch:
    """Forward for rows of ``n`` elements of ``element_size`` bytes: its tiles depend on nothing else, so it is batch-invariant."""
    # 32 values a thread: 128 bytes (fp32) or 64 (bf16) in flight a thread. With about 64 registers 1024 threads share a
    # multiprocessor, so 64 to 128 KiB are in flight there, above the 20 to 30 KiB that hide an H100's memory latency at 3 TB/s.
    # A row of up to 1024 elements is one warp's: its sums need no barrier.
    per_warp = 512 if element_size == 8 else 1024
    if n > FORWARD_WHOLE_ROW[element_size]:
        # Half the threads a multiprocessor holds, so that one program loads while another reduces.
        return NormLaunch(rows=1, block_n=16 * per_warp, num_warps=16, looped=True)
    block_n = _next_power_of_2(n)
    rows = max(1, min(64, per_warp // block_n))
    return NormLaunch(rows, block_n, _warps(rows * block_n, per_warp), looped=False)


@functools.cache
def backward_launch(n: int, element_size: int) -> NormLaunch:
    """Backward for rows of ``n`` elements of ``element_size`` bytes."""
    # 16 values a thread of each of x, dy, dw, db and w: 80 registers and what addresses take, within the 128 that leave room
    # for 512 threads on a multiprocessor: two programs of 8 warps.
    per_warp = 256 if element_size == 8 else 512
    if n > BACKWARD_WHOLE_ROW[element_size]:
        # Partial sums of dw and db are read and written once for each tile, 16/rows bytes an element: 8 rows make that small
        # beside the 20 (fp32) or 10 (bf16) of the tensors themselves, and leave M/8 tiles to share out.
        return NormLaunch(rows=8, block_n=per_warp, num_warps=8, looped=True)
    block_n = _next_power_of_2(n)
    rows = max(1, min(64, 8 * per_warp // block_n))
    return NormLaunch(rows, block_n, _warps(rows * block_n, per_warp), looped=False)


#: The most programs that share the rows in backward, and so the most partial sums of dw and db. 256 is about two programs on
#: each of an H100's 132 multiprocessors (97 % of two full waves), and at M = 4096 adds one byte an element to the 12 (fp32) or 6.
MAX_PARTS = 256


@functools.cache
def backward_partition(rows: int, groups: int, tile_rows: int) -> Partition:
    """Share ``rows`` rows a group, in tiles of ``tile_rows``, among programs: by the shape alone, never by the device."""
    tiles = _ceil_div(rows, tile_rows)
    parts = max(1, min(MAX_PARTS // groups, tiles))
    rows_per_part = _ceil_div(tiles, parts) * tile_rows
    return Partition(_ceil_div(rows, rows_per_part), rows_per_part)


@functools.cache
def reduce_launch(n: int, parts: int) -> NormLaunch:
    """The sum of ``parts`` partial rows: 16 columns a program where n is small, to have programs enough, 64 where it is not."""
    block_n = 16 if n <= 8192 else 64
    rows = min(_next_power_of_2(parts), 4096 // block_n)  # 32 fp32 values a thread at 4 warps
    return NormLaunch(rows, block_n, 4, looped=parts > rows)


def alignment(*strides: int) -> int:
    """The largest power of two, up to 16, that divides every stride (counted in elements)."""
    power = 16
    for stride in strides:
        while stride % power:
            power //= 2
    return power
