"""The dropout mask of the contract: Philox4x32-10 of an element's index, made where it is used and never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import float_bits


@triton.jit
def _philox_words(seed, low, high):
    """The four words of Philox4x32-10 with the key (low, high half of seed) and the counter (low, high, 0, 0)."""
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _kept(word, threshold, scale):
    """``scale`` where the word, unsigned, reaches the threshold, which comes as the bits of an int32; else 0."""
    return tl.where(word >= threshold.to(tl.uint32, bitcast=True), scale, 0.0)


@triton.jit
def keep_of(seed_ptr, index, threshold, scale):
    """keep/(1 - p) of the elements ``index`` (int64, counted over the logical rows): a block of words for each."""
    word0, word1, word2, word3 = _philox_words(
        tl.load(seed_ptr), (index >> 2).to(tl.uint32), (index >> 34).to(tl.uint32)
    )
    which = index & 3
    word = tl.where(which < 2, tl.where(which == 0, word0, word1), tl.where(which == 2, word2, word3))
    return _kept(word, threshold, scale)


@triton.jit
def keep_of_rows(seed_ptr, first, threshold, scale, BLOCK_N: tl.constexpr, QUADS: tl.constexpr):
    """keep/(1 - p) of the BLOCK_N elements from each of the indices ``first``, (ROWS,): (ROWS, BLOCK_N).

    With QUADS these indices are multiples of 4, and four neighbouring columns are the four words of one block.
    """
    if QUADS:
        # 64 bits of counter without a 64-bit tensor, whose registers spill on sm_100: a carry where the low half wraps.
        start = (first >> 2).to(tl.uint32)[:, None]
        low = tl.add(start, tl.arange(0, BLOCK_N // 4).to(tl.uint32)[None, :], sanitize_overflow=False)
        high = (first >> 34).to(tl.uint32)[:, None] + (low < start).to(tl.uint32)
        word0, word1, word2, word3 = _philox_words(tl.load(seed_ptr), low, high)
        words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
        return _kept(words, threshold, scale)
    else:
        return keep_of(seed_ptr, first[:, None] + tl.arange(0, BLOCK_N)[None, :], threshold, scale)


def dropout_integers(p: float, fp64: bool) -> tuple[int, int]:
    """The threshold and the scale as the kernels take them: as bits, of one integer type whatever ``p`` is."""
    threshold = min(int(p * 2**32 + 0.5), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold, float_bits(1 / (1 - p), fp64)
