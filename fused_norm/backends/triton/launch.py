"""How a kernel is launched, as a value: a pure function of the shape and the element size.

What decides the order of a reduction over a row (``rows``, ``block_n``, ``num_warps``, ``looped``) depends on n, the
element size and the width of a warp alone, so a row's bits do not depend on the rows beside it. ``parts``, the number
of partial sums of dw and db, depends on M and groups too. Neither looks at the device: ``stages`` alone does, at its
shared memory.

No GPU was at hand when these numbers were chosen: they come from counting bytes and registers, and wait to be measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

#: The most elements of a row. Kernels count its columns in 32 bits; a loop's counter goes one block beyond the row, and
#: copies ahead as many more as there are stages, of at most 8192 columns each.
LONGEST_ROW = 2**31 - 2**16

#: A row wider than this (by element size) is looped over: the widest that the compiler keeps in registers without
#: spilling on sm_80, sm_90 and sm_100 (tests/test_triton.py). Forward holds an fp32 value an element, 32 a thread.
#: 32768 columns would need 1024 threads, which have 64 registers each: too few in fp32, and on sm_100 in bf16.
FORWARD_WHOLE_ROW = {8: 8192, 4: 16384, 2: 16384}

#: Backward holds x, dy, the sums for dw and db, and the weight: five values an element, 16 of each a thread. What add
#: and norm read and make besides (residual, dsummed, the mask) lives shortly: both directions keep the same rows whole.
BACKWARD_WHOLE_ROW = {8: 4096, 4: 8192, 2: 8192}

#: Double backward holds ddx, dy, x, the sums for grad_w, what it makes of them and a parameter at a time. The 128
#: registers that each of 512 threads has hold 8 elements of all that, 4 in fp64, and in bf16 and fp16 just hold 16.
DOUBLE_BACKWARD_WHOLE_ROW = {8: 2048, 4: 4096, 2: 8192}


@dataclass(frozen=True)
class NormLaunch:
    """One launch of a norm kernel: tiles of ``rows`` rows by ``block_n`` columns, ``num_warps`` warps a program.

    A program has ``stages`` tiles in hand at once: one in registers, and while that is worked on all others but one on
    their way to shared memory. No order of a sum depends on it.
    """

    rows: int
    block_n: int
    num_warps: int
    looped: bool
    stages: int = 1


@dataclass(frozen=True)
class Partition:
    """How a group's rows are shared out: ``parts`` programs of ``rows_per_part`` rows in order, fewer in the last."""

    parts: int
    rows_per_part: int


def require_countable(n: int) -> None:
    """Raise RuntimeError for a row of ``n`` elements that no kernel can count."""
    if n > LONGEST_ROW:
        raise RuntimeError(f"a row has {n} elements, the Triton kernels take at most {LONGEST_ROW}")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _warps(elements: int, per_thread: int, warp_size: int) -> int:
    """Warps for a tile of so many elements; a program has at most 1024 threads."""
    return max(1, min(1024, elements // per_thread) // warp_size)


@functools.cache
def forward_launch(
    n: int,
    element_size: int,
    warp_size: int = 32,
    dropout: bool = False,
    tensors: int = 1,
    shared_memory: int = 0,
) -> NormLaunch:
    """Forward for rows of ``n`` elements of ``element_size`` bytes, with or without a dropout mask.

    It reads ``tensors`` of x's size, where rows are looped over by way of a multiprocessor's ``shared_memory`` bytes
    (0: not so). Only ``stages`` depends on these.
    """
    if n > FORWARD_WHOLE_ROW[element_size]:
        # 512 threads of 16 values, 32 to 64 registers: two programs share a multiprocessor, so that one loads while the
        # other reduces. In fp32 8 values, which leave room for a mask.
        block_n = 4096 if element_size == 4 else 8192
        config = NormLaunch(rows=1, block_n=block_n, num_warps=512 // warp_size, looped=True)
        if element_size == 8 or dropout:
            return config
        return replace(config, stages=_stages(config, n, tensors * element_size, warp_size, shared_memory, 1024))
    # 32 values a thread (16 in fp64): 128 bytes (fp32) or 64 (bf16) in flight a thread. At 70 to 90 registers some 700
    # threads share a multiprocessor, so 45 to 90 KiB are in flight there, above the 20 to 30 KiB that hide an H100's
    # memory latency at 3 TB/s. A row of up to 1024 elements is one warp's: its sums need no barrier. Where n is no
    # multiple of 4 each value has a mask of its own, and 32 of them spill on AMD's GPUs.
    per_thread = 16 if element_size == 8 or (n % 4 and n <= 8192) else 32
    block_n = _next_power_of_2(n)
    rows = max(1, min(64, warp_size * per_thread // block_n))
    return NormLaunch(rows, block_n, _warps(rows * block_n, per_thread, warp_size), looped=False)


@functools.cache
def backward_launch(
    n: int,
    element_size: int,
    warp_size: int = 32,
    dropout: bool = False,
    tensors: int = 2,
    shared_memory: int = 0,
) -> NormLaunch:
    """Backward for rows of ``n`` elements of ``element_size`` bytes, with or without a dropout mask.

    It reads ``tensors`` of x's size, by way of a multiprocessor's ``shared_memory`` bytes (0: not so). The mask and
    these change no ``rows`` and no ``looped``, and so no bit of dw and db.
    """
    if n > BACKWARD_WHOLE_ROW[element_size]:
        # The partial sums of dw and db are written and read about once a tile, 16/rows bytes an element, in the second
        # cache. The tile is read there again if all programs' fit: of 4 rows up to 32 KiB long, 128 KiB each of x and
        # dy, 128 programs' are 32 MiB, and 16 MiB of sums, of an H100's 50. Longer rows come from memory twice: 16 of
        # them, a warp a row, so that a thread has the addresses of one to hold. More would leave too few tiles.
        rows, block_n = (4, 1024) if n * element_size <= 32 << 10 else (16, 256)
        config = NormLaunch(rows, 128 if element_size == 8 else block_n, num_warps=512 // warp_size, looped=True)
        if element_size == 8 or n % 4 or tensors > 2 or dropout:
            return config  # as below
        if warp_size == 64:
            return replace(config, stages=2)
        held = 2 * block_n * (rows * tensors * element_size + 32) + 2048  # 32: w and the partial sums, of both passes
        return replace(config, stages=3 if held <= shared_memory else 1)
    # A thread holds five values an element: of x, dy, dw, db and w. 8 elements (4 in fp64) take 64 to 117 registers,
    # addresses of copies to shared memory included: within the 128 that let 512 threads share a multiprocessor. So two
    # programs of 256, whose reductions need not coincide. 16 elements of one row fit as well, of several rows do not.
    block_n = _next_power_of_2(n)
    per_thread = (4 if element_size == 8 else 8) * (2 if block_n > 2048 else 1)
    rows = max(1, min(64, 256 * per_thread // block_n))
    if dropout and 2048 < block_n <= 256 * per_thread:
        # The words of the mask and their counters take what is left of the 128, and spill (sm_100) or leave room for
        # one such program (sm_80 and sm_90, up to 170 registers). So one of 512 threads: at 8 values each some 100.
        per_thread //= 2
    config = NormLaunch(rows, block_n, _warps(rows * block_n, per_thread, warp_size), looped=False)
    crowded = per_thread == 16 and (tensors > 2 or dropout)  # copies need addresses: 2 to 16 registers would spill
    if element_size == 8 or crowded:
        return config
    return replace(config, stages=_stages(config, n, tensors * element_size, warp_size, shared_memory))


#: Bytes to keep on their way to a multiprocessor while its programs reduce. By Little's law an H100 needs 18 KiB: a
#: 132nd of 3.35 TB/s, two thirds of it reads, for 1000 ns, which is its latency under load (700 ns idle).
IN_FLIGHT = 32 << 10


def _stages(
    config: NormLaunch, n: int, element_bytes: int, warp_size: int, shared_memory: int, resident: int = 512
) -> int:
    """How many stages keep :data:`IN_FLIGHT` bytes on their way, where they fit; ``element_bytes`` are of all tensors
    read, ``resident`` the threads that share a multiprocessor by their registers."""
    if n % 4:
        return 1  # copies of less than 16 (in bf16 8) bytes are more instructions than loads are
    if warp_size == 64:
        return 2  # AMD: the next tile's loads go to registers (to 160), and come before the work on this one
    programs = max(1, resident // (config.num_warps * warp_size))
    most = (shared_memory // programs - 2048) // (config.rows * config.block_n * element_bytes) + 1
    if most < 3:
        return 1  # with 2 there would be nothing on its way during the work
    return min(most, 3 if programs * config.rows * min(n, config.block_n) * element_bytes >= IN_FLIGHT else 4)


@functools.cache
def double_backward_launch(n: int, element_size: int, warp_size: int = 32) -> NormLaunch:
    """Double backward for rows of ``n`` elements of ``element_size`` bytes, whichever of its results are needed."""
    if n > DOUBLE_BACKWARD_WHOLE_ROW[element_size]:
        # Three sums an element at a time take the registers of two: 8 elements a thread (4 in fp64), of two programs a
        # multiprocessor. The partial sums of grad_w, read and written once a tile, are 8/rows bytes an element.
        return NormLaunch(rows=16, block_n=64 if element_size == 8 else 128, num_warps=256 // warp_size, looped=True)
    # With 8 values a thread (4 in fp64), or 16 where 512 threads are too few for the row, 96 to 128 registers: two
    # programs of 256 threads share a multiprocessor, as many as MAX_PARTS gives it, or one of 512.
    per_thread = 4 if element_size == 8 else 8 if n <= 4096 else 16
    block_n = _next_power_of_2(n)
    rows = max(1, min(64, 256 * per_thread // block_n))
    return NormLaunch(rows, block_n, _warps(rows * block_n, per_thread, warp_size), looped=False)


#: The most programs that share the rows in backward, and so the most partial sums of dw and db. 256 is about two
#: programs on each of an H100's 132 multiprocessors (97 % of two full waves). At M = 4096 their sums, written and read,
#: add one byte an element to the 12 (fp32) or 6 (bf16) of the tensors.
MAX_PARTS = 256


@functools.cache
def backward_partition(rows: int, groups: int, tile_rows: int, n: int = 0) -> Partition:
    """Share ``rows`` rows a group, in tiles of ``tile_rows``, among programs: half as many where ``n`` is so large that
    one of backward's fills a multiprocessor."""
    tiles = _ceil_div(rows, tile_rows)
    most = MAX_PARTS // 2 if n > 4096 else MAX_PARTS
    parts = max(1, min(most // groups, tiles))
    rows_per_part = _ceil_div(tiles, parts) * tile_rows
    return Partition(_ceil_div(rows, rows_per_part), rows_per_part)


def double_backward_partition(rows: int, groups: int, tile_rows: int, need_dw: bool) -> Partition:
    """As backward's where there are sums over rows, else a program a tile."""
    if need_dw:
        return backward_partition(rows, groups, tile_rows)
    return Partition(_ceil_div(rows, tile_rows), tile_rows)


@functools.cache
def reduce_launch(n: int, parts: int, warp_size: int = 32) -> NormLaunch:
    """The sum of ``parts`` partial rows: 16 columns a program where n is small, to have enough programs, else 64."""
    block_n = 16 if n <= 8192 else 64
    rows = min(_next_power_of_2(parts), 4096 // block_n)  # 32 fp32 values a thread at 128 threads
    return NormLaunch(rows, block_n, 128 // warp_size, looped=parts > rows)


@dataclass(frozen=True)
class TicksLaunch:
    """One launch of a ticks kernel: tiles of ``rows`` rows by ``block_v`` classes, ``num_warps`` warps a program;
    ``stages`` as of :class:`NormLaunch`."""

    rows: int
    block_v: int
    num_warps: int
    stages: int = 1


def _ticks_launch(v: int, per_thread: int, narrow_threads: int, warp_size: int) -> TicksLaunch:
    """256 threads a row, or where that is too many as many rows as ``narrow_threads`` hold."""
    block_v = min(_next_power_of_2(v), 256 * per_thread)
    rows = max(1, min(64, narrow_threads * per_thread // block_v))
    return TicksLaunch(rows, block_v, _warps(rows * block_v, per_thread, warp_size))


@functools.cache
def ticks_forward_launch(
    v: int, element_size: int, warp_size: int = 32, plain: bool = False, shared_memory: int = 0
) -> TicksLaunch:
    """Forward for rows of ``v`` logits of ``element_size`` bytes: a program walks its rows in blocks of ``block_v``, if
    plain by way of a multiprocessor's ``shared_memory`` bytes (0: not so). Only ``stages`` depends on these.
    """
    # A lane's state is two numbers of the accumulation type if plain, else six. With 8 lanes a thread (4 in fp64)
    # that takes some 40 registers, else 80 to 96: 1536 or 512 threads share a multiprocessor, each with 32 bytes (fp32)
    # or 16 (bf16) in flight of a tensor, twice that with soft targets: 16 to 48 KiB (8 for smoothing in bf16). More
    # threads a row would only be more lanes to add up. A narrow row is one warp's: no barriers.
    # (Two lanes of fp64 would be the better share, but ptxas spills around its divisions then.)
    config = _ticks_launch(v, 4 if element_size == 8 else 8, warp_size, warp_size)
    if not plain or config.rows > 1 or v % 4 or element_size == 8:
        return config  # not plain, the copies' addresses would leave room for two programs of three
    if warp_size == 64:
        return replace(config, stages=2)
    # Plain, copies cost no register: of 6 programs, two blocks each are on their way, 48 KiB in bf16 and 96 in fp32.
    most = (shared_memory // 6 - 1024) // (config.block_v * element_size) + 1
    return replace(config, stages=min(most, 4) if most > 2 else 1)


@functools.cache
def ticks_backward_launch(v: int, element_size: int, plain: bool, warp_size: int = 32) -> TicksLaunch:
    """Backward likewise, but a program a block: nothing is summed."""
    # 32 bytes to read and 32 to write a thread (16 each in bf16 where a row's masses are read too). Programs of 256
    # threads: while one waits for its row's target and statistics, which come before the logits, others read and write.
    per_thread = {8: 4, 4: 8, 2: 16 if plain else 8}[element_size]
    return _ticks_launch(v, per_thread, 256, warp_size)


def alignment(*strides: int) -> int:
    """The largest power of two, up to 16, that divides every stride (counted in elements)."""
    power = 16
    for stride in strides:
        while stride % power:
            power //= 2
    return power
