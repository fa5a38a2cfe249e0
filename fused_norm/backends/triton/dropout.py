"""The dropout mask of the contract: Philox4x32-10 of an element's index, made where it is used and never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import float_bits


@triton.jit
def _keep_words(seed, low, high, threshold):
    """Which elements of a block are kept: whether each word of Philox4x32-10 reaches the threshold, all unsigned.

    The key is (low, high half of seed), the counter (low, high, 0, 0); the threshold comes as the bits of an int32.
    """
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero, zero)
    least = threshold.to(tl.uint32, bitcast=True)
    return word0 >= least, word1 >= least, word2 >= least, word3 >= least


@triton.jit
def keep_of(seed, index, threshold, scale, QUADS: tl.constexpr):
    """keep/(1 - p) of the elements ``index`` (int64, counted over the logical rows): a block of words for each.

    QUADS says that these indices are multiples of 4.
    """
    low, high = (index >> 2).to(tl.uint32), (index >> 34).to(tl.uint32)
    kept0, kept1, kept2, kept3 = _keep_words(seed, low, high, threshold)
    if not QUADS:
        odd = (index & 1) != 0
        kept0 = tl.where((index & 2) != 0, tl.where(odd, kept3, kept2), tl.where(odd, kept1, kept0))
    return tl.where(kept0, scale, 0.0)


@triton.jit
def keep_of_rows(seed, first, threshold, scale, BLOCK_N: tl.constexpr, QUADS: tl.constexpr):
    """keep/(1 - p) of the BLOCK_N elements from each of the indices ``first``, (ROWS,): (ROWS, BLOCK_N).

    Four neighbouring columns are the four words of a block where ``first`` is a multiple of 4, which QUADS says. Else
    they are the end of one and the beginning of the next.
    """
    if BLOCK_N < 4:
        return keep_of(seed, first[:, None] + tl.arange(0, BLOCK_N)[None, :], threshold, scale, False)
    else:
        # 64 bits of counter without a 64-bit tensor, whose registers spill on sm_100: a carry where the low half wraps.
        start, start_high = (first >> 2).to(tl.uint32)[:, None], (first >> 34).to(tl.uint32)[:, None]
        low = tl.add(start, tl.arange(0, BLOCK_N // 4).to(tl.uint32)[None, :], sanitize_overflow=False)
        high = start_high + (low < start).to(tl.uint32)
        kept0, kept1, kept2, kept3 = _keep_words(seed, low, high, threshold)
        if not QUADS:
            low = tl.add(low, 1, sanitize_overflow=False)
            kept4, kept5, kept6, _ = _keep_words(seed, low, high + (low == 0).to(tl.uint32), threshold)
            two = ((first & 2) != 0)[:, None]
            kept0, kept1, kept2 = tl.where(two, kept2, kept0), tl.where(two, kept3, kept1), tl.where(two, kept4, kept2)
            kept3, kept4 = tl.where(two, kept5, kept3), tl.where(two, kept6, kept4)
            one = ((first & 1) != 0)[:, None]
            kept0, kept1 = tl.where(one, kept1, kept0), tl.where(one, kept2, kept1)
            kept2, kept3 = tl.where(one, kept3, kept2), tl.where(one, kept4, kept3)
        # Bits, not words: where a thread has fewer columns than 4 side by side, they go to other threads.
        kept = tl.interleave(tl.interleave(kept0, kept2), tl.interleave(kept1, kept3))
        return tl.where(kept, scale, 0.0)


def dropout_integers(p: float, fp64: bool) -> tuple[int, int]:
    """The threshold and the scale as the kernels take them: as bits, of one integer type whatever ``p`` is."""
    threshold = min(int(p * 2**32 + 0.5), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold, float_bits(1 / (1 - p), fp64)
