"""add_norm's C++ CPU kernels, called directly, under each instruction set that this machine has."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.testing import error_limit, param_error_limit, relative_error

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"no native CPU backend: {native.unavailable('cpu')}"
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: (dtype of x, of residual, of the parameters): every triple that the contract allows.
DTYPES = [(d, d, d) for d in (F64, F32, BF16, F16)]
DTYPES += [(BF16, BF16, F32), (F16, F16, F32), (BF16, F32, F32), (F16, F32, F32)]
#: Narrower than a register, ragged, and around the 128 columns whose words are drawn at once.
WIDTHS = [1, 2, 3, 5, 7, 8, 17, 33, 127, 128, 129, 132, 135, 136, 137, 145, 256, 263, 1000, 1001, 4099]
SEEDS = [0, 1, -1, 0x123456789ABCDEF0, -(2**63)]

each_dtype = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda v: "-".join(str(d).removeprefix("torch.") for d in dict.fromkeys(v))
)
each_op = pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])


@pytest.fixture(params=["default", "avx2", "avx512"], autouse=True)
def capability(request):
    if request.param not in native.cpu_capabilities():
        pytest.skip(f"this processor cannot run {request.param}")
    before, threads = native.cpu_capability(), torch.get_num_threads()
    native.set_cpu_capability(request.param)
    torch.set_num_threads(1)  # most tensors here are too small to share out
    yield request.param
    torch.set_num_threads(threads)
    native.set_cpu_capability(before)


def rand(*shape, dtype, shift=0.0, scale=1.0):
    return (torch.randn(*shape, dtype=F64) * scale + shift).to(dtype)


def seed_of(p, value=None):
    value = int(torch.randint(-(2**63), 2**63 - 1, ())) if value is None else value
    return torch.tensor(value) if p else None


def draw(rows, n, dtypes):
    """x, residual, weight, bias, dy, dsummed."""
    x_dtype, dtype, param_dtype = dtypes
    return (
        rand(rows, n, dtype=x_dtype),
        rand(rows, n, dtype=dtype, shift=0.5),
        rand(n, dtype=param_dtype, shift=1, scale=0.3),
        rand(n, dtype=param_dtype, scale=0.3),
        rand(rows, n, dtype=dtype),
        rand(rows, n, dtype=dtype),
    )


def forward(x, residual, weight=None, bias=None, seed=None, p=0.0, rms=False, eps=1e-5, need_stats=True, cast=False):
    n = residual.shape[-1]
    return native.add_norm_forward(x, residual, weight, bias, seed, n, eps, rms, p, need_stats, cast)


def backward(
    dy, dsummed, summed, stats, weight, seed, p, rms, param_dtype=None, x_dtype=None, needs=(True, True, True, True)
):
    dtypes = param_dtype or summed.dtype, x_dtype or summed.dtype
    n = summed.shape[-1]
    return native.add_norm_backward(dy, dsummed, summed, stats, weight, seed, n, rms, p, *dtypes, *needs)


def same_bits(a, b):
    """Equal element by element, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def by_torch(x, residual, weight, bias, dy, dsummed, seed, p, rms):
    """What torch's separate operations make of the same mask: y, summed, dx, dresidual, dw, db."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    x, residual, weight, bias = leaves
    dropped = x
    if p:
        keep = reference.dropout_mask(seed, x, p) != 0
        dropped = x * (keep.to(x.dtype) / (1 - p))  # as torch's dropout does on a CPU
    summed = dropped + residual
    n = x.shape[-1]
    y = F.rms_norm(summed, (n,), weight, 1e-5) if rms else F.layer_norm(summed, (n,), weight, bias, 1e-5)
    outputs, gradients = ([y], [dy]) if dsummed is None else ([y, summed], [dy, dsummed])
    torch.autograd.backward(outputs, gradients)
    return [y.detach(), summed.detach(), *(None if t is None else t.grad for t in leaves)]


def truth_of(x, residual, weight, bias, dy, dsummed, seed, p, rms, summed):
    """The fp64 truth; the norm's, of the sum as it was rounded, since that is what the contract norms."""
    n = x.shape[-1]
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias, dy, dsummed, summed)]
    x, residual, weight, bias, dy, dsummed, summed = wide
    exact = reference.add_dropped(x, residual, seed, p)
    y, stats = reference.norm_forward(summed, weight, bias, n, 1, 1e-5, rms, True)
    grads = reference.add_norm_backward(
        dy, dsummed, summed, stats, weight, seed, n, rms, p, F64, F64, True, True, True, True
    )
    return [y, exact, *grads]


def check(rows, n, dtypes, p, rms, with_dsummed):
    x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)
    x_dtype, dtype, param_dtype = dtypes
    bias, dsummed, seed = None if rms else bias, dsummed if with_dsummed else None, seed_of(p)
    y, summed, stats = forward(x, residual, weight, bias, seed, p, rms)
    dx, dresidual, dw, db = backward(dy, dsummed, summed, stats, weight, seed, p, rms, param_dtype, x_dtype)
    what = f"{rows}x{n}, p={p}, rms={rms}, dsummed={with_dsummed}"
    if not p and x_dtype == dtype:
        assert dx.shape == (0,), what
        dx = dresidual
    given = (x, residual, weight, bias, dy, dsummed, seed, p, rms)
    truths, theirs = truth_of(*given, summed), by_torch(*given)
    # Where torch rounds what is dropped before it adds, and its norm sees another sum, its error is larger than ours.
    names = ("y", "summed", "dx", "dresidual", "dw", "db")
    expected = (dtype, dtype, x_dtype, dtype, param_dtype, param_dtype)
    for name, ours, truth, other, d in zip(
        names, (y, summed, dx, dresidual, dw, db), truths, theirs, expected, strict=True
    ):
        if name in ("dw", "db"):
            assert ours.dtype == d and ours.shape == (1, n), what
        else:
            assert ours.dtype == d and ours.shape == (rows, n) and ours.is_contiguous(), what
        if name == "db" and rms:
            continue
        # The truth of y is that of our rounded sum: torch's is to be judged by its own.
        limit = param_error_limit if name in ("dw", "db") else error_limit
        torch_error = relative_error(other, truth) if dtype in (F32, F64) and name != "y" else 0.0
        error, allowed = relative_error(ours, truth), limit(truth, d, torch_error)
        if n < 32 or dtype == F64:  # much cancels in a short row, and fp64's truth has roundings of its own
            allowed = max(allowed, 16 * torch.finfo(d).eps * scale_of(name, dy, weight, stats, dsummed) / truth.norm())
        assert error <= allowed, f"{what}: {name}: error {error:.3g} > limit {allowed:.3g}"


def scale_of(name, dy, weight, stats, dsummed):
    """The norm of what is added up in a gradient, before it cancels; of y, that of its terms."""
    size = 1 + (dy.double().abs() * (1 + weight.double().abs())).norm() * (1 + stats[0].double().max())
    return size * (1 + stats[0].double().max()) if name in ("y", "dw", "db", "dx", "dresidual") else size


@each_op
@each_dtype
def test_against_the_truth(dtypes, rms):
    for n, p in itertools.product(WIDTHS, (0.0, 0.1)):
        for with_dsummed in (False, True):
            check(13 if n <= 300 else 6, n, dtypes, p, rms, with_dsummed)


@each_dtype
def test_against_torch_on_the_same_mask(dtypes):
    """End to end, from the same inputs: at most 1.05 times torch's error in bf16 and fp16, 1.5 times in fp32."""
    x_dtype, dtype, param_dtype = dtypes
    if dtype == F64:
        pytest.skip("torch's and ours are both the truth, give or take its own roundings")
    rows, n = 96, 500
    for p, rms, with_dsummed in itertools.product((0.0, 0.3), (False, True), (False, True)):
        x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)
        bias, dsummed, seed = None if rms else bias, dsummed if with_dsummed else None, seed_of(p)
        y, summed, stats = forward(x, residual, weight, bias, seed, p, rms)
        dx, dresidual, dw, db = backward(dy, dsummed, summed, stats, weight, seed, p, rms, param_dtype, x_dtype)
        dx = dx if dx.numel() else dresidual
        given = (x, residual, weight, bias, dy, dsummed, seed, p, rms)
        wide = [t.double() if isinstance(t, torch.Tensor) and t is not seed else t for t in given]
        truths, theirs = truth_of(*given, reference.add_dropped(wide[0], wide[1], seed, p)), by_torch(*given)
        factor = 1.5 if dtype == F32 else 1.05
        for name, ours, truth, other in zip(
            ("y", "summed", "dx", "dresidual", "dw", "db"),
            (y, summed, dx, dresidual, dw, db),
            truths,
            theirs,
            strict=True,
        ):
            if name == "db" and rms:
                continue
            error, torch_error = relative_error(ours, truth), relative_error(other, truth)
            assert error <= factor * torch_error + 1e-12, (
                f"p={p}, rms={rms}, dsummed={with_dsummed}: {name}: {error:.4g}, torch's {torch_error:.4g}"
            )


@each_op
@each_dtype
def test_bits_are_the_norms_own(dtypes, rms):
    x_dtype, _, param_dtype = dtypes
    for (rows, n), p in itertools.product(((150, 7), (37, 100), (9, 263), (70, 515), (3, 4099)), (0.0, 0.2)):
        x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)
        seed = seed_of(p)
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            for cast in (False, True):
                y, summed, stats = forward(x, residual, w, b, seed, p, rms, cast=cast)
                expected, expected_stats = native.norm_forward(summed, w, b, n, 1, 1e-5, rms, True, cast)
                assert same_bits(y, expected) and same_bits(stats, expected_stats)
                y, again, stats = forward(x, residual, w, b, seed, p, rms, cast=cast, need_stats=False)
                assert same_bits(y, expected) and same_bits(again, summed) and stats.shape == (0, rows)
            dx, dw, db = native.norm_backward(dy, summed, expected_stats, w, n, 1, rms, param_dtype, True, True, True)
            for d in (None, dsummed):
                got = backward(dy, d, summed, expected_stats, w, seed, p, rms, param_dtype, x_dtype)
                assert same_bits(got[2], dw) and same_bits(got[3], db)
                if d is None:
                    assert same_bits(got[1], dx)


@each_dtype
def test_needed_subsets(dtypes):
    """Each gradient has the same bits whichever others are asked for; what is not asked for comes back empty."""
    x_dtype, dtype, param_dtype = dtypes
    rows, n = 70, 139
    x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)
    for p, rms, w, d in itertools.product((0.0, 0.2), (False, True), (weight, None), (dsummed, None)):
        seed = seed_of(p)
        _, summed, stats = forward(x, residual, w, bias, seed, p, rms)
        args = (dy, d, summed, stats, w, seed, p, rms, param_dtype, x_dtype)
        full, one = backward(*args), not p and x_dtype == dtype
        for needs in itertools.product((False, True), repeat=4):
            expected = list(needs)
            if one:
                expected[:2] = False, needs[0] or needs[1]
            for need, got, every in zip(expected, backward(*args, needs=needs), full, strict=True):
                assert same_bits(got, every) if need else got.shape == (0,), (p, rms, needs)


# -------------------------------------------------------------------------------------------------------------- dropout


def mask_of(x_dtype, dtype, rows, n, seed, p):
    """The mask as forward's and as backward's kernel applies it."""
    ones, zeros = torch.ones(rows, n, dtype=x_dtype), torch.zeros(rows, n, dtype=dtype)
    _, summed, _ = forward(ones, zeros, seed=seed, p=p)
    stats = torch.zeros(2, rows, dtype=F64 if dtype == F64 else F32)  # of the norm nothing is left
    dx, *_ = backward(zeros, ones.to(dtype), zeros, stats, None, seed, p, False, x_dtype=x_dtype)
    return summed, dx


@each_dtype
def test_masks_are_the_references(dtypes):
    x_dtype, dtype, _ = dtypes
    for n, p in itertools.product(WIDTHS, (1e-12, 0.1, 0.5, 1 - 2**-20)):
        rows = 13 if n < 1000 else 3
        for seed in map(torch.tensor, SEEDS):
            expected = reference.dropout_mask(seed, torch.empty(rows, n, dtype=dtype), p)
            summed, dx = mask_of(x_dtype, dtype, rows, n, seed, p)
            assert same_bits(summed, expected.to(dtype)) and same_bits(dx, expected.to(x_dtype)), (n, p, seed)


def test_philox_known_answers():
    """Random123's: the words of the counter 0 under the key 0, by masks that tell where a word is below a threshold."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for bit in range(31, -1, -1):
        for k, word in enumerate(words):
            # the smallest threshold that shares the word's upper bits and has this one set
            threshold = (word >> bit | 1) << bit
            p = threshold / 2**32
            summed, _ = mask_of(F64, F64, 1, 4, torch.tensor(0), p)
            assert bool(summed[0, k]) == (word >= threshold), (k, bit)


#: Prints the words of the blocks given by the seed, the first and their number: memory has no room for a mask of 2^34.
PHILOX = r"""
#include "philox.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** arguments) {
  const fused_norm::Philox philox(strtoull(arguments[1], nullptr, 10));
  static uint32_t words[4096];
  const int blocks = atoi(arguments[3]);
  philox.words(strtoull(arguments[2], nullptr, 10), blocks, words);
  for (int i = 0; i < 4 * blocks; i++) printf("%u\n", words[i]);
}
"""
FLAGS = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]}
FLAGS["avx512"] = [
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-DCPU_CAPABILITY_AVX512")
]


def test_counters_of_two_words(capability, tmp_path):
    """Carries into the counter's upper word, in every lane; the number of blocks drawn at once changes none of them."""
    compiler, sources = shutil.which("c++"), Path(__file__).parents[1] / "csrc/cpu"
    if compiler is None or not sources.exists():
        pytest.skip("no C++ compiler, or no sources beside the tests")
    (tmp_path / "main.cpp").write_text(PHILOX)
    flags = ["-std=c++17", "-O1", "-w", *FLAGS[capability], f"-I{sources}"]
    subprocess.run([compiler, *flags, "-o", tmp_path / "main", tmp_path / "main.cpp"], check=True)
    for seed, first, blocks in itertools.product((0, 2**64 - 1, 0x123456789ABCDEF0), (2**32 - 9, 2**40 + 3), (1, 37)):
        run = subprocess.run([tmp_path / "main", *map(str, (seed, first, blocks))], check=True, stdout=subprocess.PIPE)
        signed = seed - 2**64 if seed >= 2**63 else seed
        expected = reference.philox(torch.tensor(signed), torch.arange(first, first + blocks))
        assert [int(word) for word in run.stdout.split()] == expected.flatten().tolist()


def test_one_seed_one_mask_and_the_rate_of_p():
    n, rows, p = 1000, 400, 0.25
    kept = [mask_of(F32, F32, rows, n, torch.tensor(s), p)[0] != 0 for s in (3, 3, 4)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    sigma = (p * (1 - p) / (rows * n)) ** 0.5
    for k in kept:
        assert abs(k.double().mean() - (1 - p)) < 5 * sigma
        for dim, count in ((0, rows), (1, n)):
            assert (k.double().mean(dim) - (1 - p)).abs().max() < 6 * (p * (1 - p) / count) ** 0.5
    agree = (kept[0] == kept[2]).double().mean()
    assert abs(agree - (p * p + (1 - p) ** 2)) < 0.005


@each_dtype
def test_dropped_nan_and_infinity_stay(dtypes):
    x_dtype, dtype, _ = dtypes
    rows, n, p = 6, 139, 0.5
    seed = torch.tensor(7)
    keep = reference.dropout_mask(seed, torch.empty(rows, n), p) != 0
    x, residual = rand(rows, n, dtype=x_dtype), rand(rows, n, dtype=dtype)
    x[0, :], x[1, 5], x[2, 138] = float("nan"), float("inf"), float("nan")
    _, summed, _ = forward(x, residual, seed=seed, p=p)
    assert summed[0].isnan().all() and summed[2, 138].isnan()
    assert summed[1, 5] == float("inf") if keep[1, 5] else summed[1, 5].isnan()
    assert summed.isfinite().sum() == rows * n - n - 2
    d = residual.clone()
    d[0, :] = float("nan")
    stats = torch.zeros(2, rows, dtype=F64 if dtype == F64 else F32)
    zeros = torch.zeros_like(residual)
    dx, dresidual, *_ = backward(zeros, d, zeros, stats, None, seed, p, False, x_dtype=x_dtype)
    assert dx[0].isnan().all() and dx[1:].isfinite().all() and same_bits(dresidual, d)


# --------------------------------------------------------------------------------------------------- layout and threads


def laid_out(t, stride, offset):
    """A copy of 2-D ``t`` with this row stride, ``offset`` elements behind an aligned address."""
    rows, n = t.shape
    storage = torch.full((offset + rows * stride + n,), float("nan"), dtype=t.dtype)
    view = storage.as_strided((rows, n), (stride, 1), offset)
    view.copy_(t)
    return view


def everything(x, residual, weight, bias, dy, dsummed, seed, p, rms, param_dtype):
    y, summed, stats = forward(x, residual, weight, bias, seed, p, rms)
    return [y, summed, stats, *backward(dy, dsummed, summed, stats, weight, seed, p, rms, param_dtype, x.dtype)]


@each_dtype
def test_layout_changes_no_bit(dtypes):
    for n, p, rms in itertools.product((3, 100, 263), (0.0, 0.4), (False, True)):
        rows, seed = 45, seed_of(p)
        x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)
        tail = (seed, p, rms, dtypes[2])
        expected = everything(x, residual, weight, bias, dy, dsummed, *tail)
        params = [laid_out(t.view(1, n), n, 1).view(n) for t in (weight, bias)]
        strided = [
            laid_out(t, n + gap, by) for t, gap, by in ((x, 3, 1), (residual, 5, 2), (dy, 1, 3), (dsummed, 2, 1))
        ]
        for k in range(5):  # all of them, then one at a time
            some = [
                moved if k in (0, i) else t
                for i, (t, moved) in enumerate(zip((x, residual, dy, dsummed), strided, strict=True), 1)
            ]
            actual = everything(*some[:2], *params, *some[2:], *tail)
            assert all(map(same_bits, actual, expected)), (n, p, rms, k)
        threefold = [t.view(9, 5, n) for t in (x, residual, dy, dsummed)]
        actual = everything(*threefold[:2], weight, bias, *threefold[2:], *tail)
        assert actual[0].shape == actual[1].shape == (9, 5, n)
        assert all(torch.equal(a.flatten(), e.flatten()) for a, e in zip(actual, expected, strict=True))
        # x by rows of its own beside a contiguous residual of another number of dimensions
        y, summed, _ = forward(strided[0], threefold[1], weight, bias, seed, p, rms)
        assert same_bits(y.view(rows, n), expected[0]) and same_bits(summed, expected[1].view(9, 5, n))


def test_a_row_does_not_see_its_neighbours():
    """Batch invariance: without dropout a row's results are the same in any company; its mask is that of its place."""
    n = 519
    for dtypes, rms in itertools.product(DTYPES, (False, True)):
        x, residual, weight, bias, dy, dsummed = draw(50, n, dtypes)

        def of(part, *tail):
            return everything(x[part], residual[part], weight, bias, dy[part], dsummed[part], *tail)  # noqa: B023

        tail = (None, 0.0, rms, dtypes[2])
        full = of(slice(None), *tail)
        for part in (slice(0, 1), slice(7, 8), slice(3, 20)):
            some = of(part, *tail)
            assert all(same_bits(some[k], full[k][part]) for k in (0, 1, 3, 4) if full[k].numel())
        tail = (torch.tensor(11), 0.3, rms, dtypes[2])
        full, first = of(slice(None), *tail), of(slice(9), *tail)
        assert all(same_bits(first[k], full[k][:9]) for k in (0, 1, 3, 4))


def test_threads_change_no_bit():
    for dtypes in DTYPES:
        for rows, n in ((700, 263), (40, 4099)):
            args = draw(rows, n, dtypes)
            for p in (0.0, 0.2):
                seed, results = seed_of(p), []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(everything(*args, seed, p, False, dtypes[2]))
                for other in results[1:]:
                    assert all(map(same_bits, results[0], other)), (dtypes, rows, n, p)


def test_nothing_is_touched_out_of_bounds():
    """Inputs and the row before and behind them lie between pages that may be neither read nor written."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = 16384
    base = libc.mmap(None, 3 * page, 3, 0x22, -1, 0)
    assert base not in (None, 2**64 - 1)
    libc.mprotect(base, page, 0)
    libc.mprotect(base + 2 * page, page, 0)

    def guarded(t, at_end):
        size = t.numel() * t.element_size()
        start = base + page + (page - size if at_end else 0)
        buffer = (ctypes.c_char * size).from_address(start)
        return torch.frombuffer(buffer, dtype=t.dtype).view(t.shape).copy_(t)

    for dtypes, n, p in itertools.product(DTYPES, (1, 3, 5, 17, 131, 139), (0.0, 0.3)):
        rows, seed = 5, seed_of(p)
        args = draw(rows, n, dtypes)
        expected = everything(*args, seed, p, False, dtypes[2])
        for k, at_end in itertools.product(range(6), (False, True)):
            given = [guarded(t, at_end) if i == k else t for i, t in enumerate(args)]
            assert all(map(same_bits, everything(*given, seed, p, False, dtypes[2]), expected))


# ------------------------------------------------------------------------------------------------------------- refusals


def f(*shape, dtype=F32):
    return torch.ones(*shape, dtype=dtype)


def good_forward():
    return {
        "x": f(4, 6),
        "residual": f(4, 6),
        "weight": f(6),
        "bias": f(6),
        "seed": torch.tensor(1),
        "n": 6,
        "eps": 1e-5,
        "rms": False,
        "dropout_p": 0.5,
        "need_stats": True,
        "cast": False,
    }


BAD_FORWARD = {
    "n of 0": ({"n": 0}, "n is 0"),
    "no rows of n": ({"n": 5}, "residual has 24 elements, not a multiple of n = 5"),
    "int residual": ({"residual": torch.ones(4, 6, dtype=torch.int32)}, "residual has dtype Int"),
    "x of another size": ({"x": f(3, 6)}, r"x has shape \(3, 6\), residual has \(4, 6\)"),
    "x of fp64": ({"x": f(4, 6, dtype=F64)}, "x's dtype is Double, residual has Float"),
    "x of int": ({"x": f(4, 6, dtype=torch.int32)}, "x's dtype is Int, residual has Float"),
    "fp32 x beside bf16": ({"residual": f(4, 6, dtype=BF16)}, "x's dtype is Float, residual has BFloat16"),
    "bf16 x beside fp16": (
        {"x": f(4, 6, dtype=BF16), "residual": f(4, 6, dtype=F16)},
        "x's dtype is BFloat16, residual has Half",
    ),
    "x of columns": ({"x": f(6, 4).t()}, r"x has shape \(4, 6\) and is not contiguous"),
    "residual of columns": ({"residual": f(6, 4).t()}, r"residual has shape \(4, 6\) and is not contiguous"),
    "weight too short": ({"weight": f(5)}, r"weight has shape \(5,\), expected n = 6"),
    "weight of two sets": ({"weight": f(2, 6)}, r"weight has shape \(2, 6\), expected n = 6"),
    "bf16 weight beside fp32": ({"weight": f(6, dtype=BF16)}, "weight has dtype BFloat16, residual has Float"),
    "bias of another dtype": (
        {"x": f(4, 6, dtype=BF16), "residual": f(4, 6, dtype=BF16), "weight": f(6, dtype=BF16)},
        "bias has dtype Float, weight has BFloat16",
    ),
    "no seed": ({"seed": None}, "seed is None, dropout_p is 0.5"),
    "a seed for nothing": ({"dropout_p": 0.0}, "seed is a tensor, dropout_p is 0"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, r"seed has shape \(2,\), expected one element"),
    "int32 seed": ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed has dtype Int, expected Long"),
    "p of 1": ({"dropout_p": 1.0}, "dropout_p is 1, expected at least 0 and below 1"),
    "p below 0": ({"dropout_p": -0.5}, "dropout_p is -0.5"),
    "p of NaN": ({"dropout_p": float("nan")}, "dropout_p is nan"),
}


@pytest.mark.parametrize("case", BAD_FORWARD)
def test_forward_refuses(case):
    changes, message = BAD_FORWARD[case]
    native.add_norm_forward(*good_forward().values())
    with pytest.raises(RuntimeError, match=message):
        native.add_norm_forward(*(good_forward() | changes).values())


def good_backward():
    return {
        "dy": f(4, 6),
        "dsummed": f(4, 6),
        "summed": f(4, 6),
        "stats": f(2, 4),
        "weight": f(6),
        "seed": torch.tensor(1),
        "n": 6,
        "rms": False,
        "dropout_p": 0.5,
        "param_dtype": F32,
        "x_dtype": F32,
        "need_dx": True,
        "need_dresidual": True,
        "need_dw": True,
        "need_db": True,
    }


BAD_BACKWARD = {
    "no rows of n": ({"n": 5}, "summed has 24 elements, not a multiple of n = 5"),
    "dy of another size": ({"dy": f(3, 6)}, r"dy has shape \(3, 6\), summed has \(4, 6\)"),
    "dy of another dtype": ({"dy": f(4, 6, dtype=BF16)}, "dy has dtype BFloat16, summed has Float"),
    "dsummed of another size": ({"dsummed": f(5, 6)}, r"dsummed has shape \(5, 6\), summed has \(4, 6\)"),
    "dsummed of another dtype": ({"dsummed": f(4, 6, dtype=F64)}, "dsummed has dtype Double, summed has Float"),
    "dsummed of columns": ({"dsummed": f(6, 4).t()}, r"dsummed has shape \(4, 6\) and is not contiguous"),
    "stats of too few rows": ({"stats": f(2, 3)}, r"stats has shape \(2, 3\), expected \(2, 4\)"),
    "stats of rms": ({"stats": f(1, 4)}, r"stats has shape \(1, 4\), expected \(2, 4\)"),
    "fp64 stats": ({"stats": f(2, 4, dtype=F64)}, "stats has dtype Double, expected Float"),
    "weight too short": ({"weight": f(5)}, r"weight has shape \(5,\)"),
    "param_dtype": ({"param_dtype": F64}, "param_dtype is Double, summed has Float"),
    "x_dtype": ({"x_dtype": F64}, "x_dtype is Double, summed has Float"),
    "int x_dtype": ({"x_dtype": torch.int64}, "x_dtype is Long, summed has Float"),
    "no seed": ({"seed": None}, "seed is None, dropout_p is 0.5"),
    "a seed for nothing": ({"dropout_p": 0.0}, "seed is a tensor, dropout_p is 0"),
    "p of 1": ({"dropout_p": 1.0}, "dropout_p is 1, expected at least 0 and below 1"),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses(case):
    changes, message = BAD_BACKWARD[case]
    native.add_norm_backward(*good_backward().values())
    with pytest.raises(RuntimeError, match=message):
        native.add_norm_backward(*(good_backward() | changes).values())


@pytest.mark.parametrize("good", [good_forward, good_backward])
def test_refuses_freed_memory(good):
    function = native.add_norm_forward if good is good_forward else native.add_norm_backward
    for name in [name for name, a in good().items() if isinstance(a, torch.Tensor)]:
        arguments = good()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name} has shape .* no storage"):
            function(*arguments.values())


# --------------------------------------------------------------------------------------------- the rest of the contract


@each_dtype
def test_operators(dtypes):
    """torch's own checks of the operators: schemas against what they do, and fakes against their results."""
    x_dtype, _, param_dtype = dtypes
    x, residual, weight, bias, dy, dsummed = draw(6, 10, dtypes)
    for p, rms, needs in ((0.0, False, (True, True, True, True)), (0.5, True, (True, False, False, True))):
        seed = seed_of(p)
        arguments = (x, residual, weight, bias, seed, 10, 1e-5, rms, p, True, True)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.fused_norm.add_norm_forward.default, arguments, test_utils=checks)
        _, summed, stats = forward(x, residual, weight, bias, seed, p, rms)
        arguments = (dy, dsummed, summed, stats, weight, seed, 10, rms, p, param_dtype, x_dtype, *needs)
        torch.library.opcheck(torch.ops.fused_norm.add_norm_backward.default, arguments, test_utils=checks)


@each_op
@each_dtype
def test_composition(dtypes, rms):
    """What serves CUDA tensors: the norm's own functions between torch's operations. On the CPU it must agree."""
    x_dtype, dtype, param_dtype = dtypes
    rows, n = 14, 137
    # In 16 bits a sum may be rounded to the other side: here its terms' product and sum are one operation, there two.
    unit = torch.finfo(dtype).eps
    x, residual, weight, bias, dy, dsummed = draw(rows, n, dtypes)

    def assert_alike(ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            if a.numel():
                assert a.dtype == b.dtype and a.shape == b.shape
                assert relative_error(b, a.double()) < 4 * max(unit, torch.finfo(a.dtype).eps)

    for p, w, d in itertools.product((0.0, 0.3), (weight, None), (None, dsummed)):
        seed = seed_of(p)
        args = (x, residual, w, bias, seed, n, 1e-5, rms, p, True, True)
        ours = native.add_norm_forward(*args)
        assert_alike(ours, native._add_norm_forward_composed(*args))
        for needs in itertools.product((False, True), repeat=4):
            args = (dy, d, *ours[1:], w, seed, n, rms, p, param_dtype, x_dtype, *needs)
            assert_alike(native.add_norm_backward(*args), native._add_norm_backward_composed(*args))


def test_what_is_not_on_the_cpu_is_composed():
    args = {k: a.to("meta") if isinstance(a, torch.Tensor) else a for k, a in good_backward().items()}
    results = native.add_norm_backward(*args.values())
    assert [(t.device.type, t.shape) for t in results] == [("meta", s) for s in ((4, 6), (4, 6), (1, 6), (1, 6))]


# ----------------------------------------------------------------------------------------------- cast before the weight


@each_op
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] == d[1]], ids=lambda v: f"{v[0]}-{v[2]}")
def test_cast(dtypes, rms):
    """xhat is rounded to x's dtype, and then multiplied: y is the reference's but where roundings meet a tie."""
    _, dtype, param_dtype = dtypes
    for n in (1, 3, 17, 100, 1001):
        x, w, b = rand(9, n, dtype=dtype, shift=0.5), rand(n, dtype=param_dtype), rand(n, dtype=param_dtype)
        x[0, 0] = float("nan")
        for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
            y, stats = native.norm_forward(x, weight, bias, n, 1, 1e-5, rms, True, True)
            plain, plain_stats = native.norm_forward(x, weight, bias, n, 1, 1e-5, rms, True)
            assert same_bits(stats, plain_stats)
            if dtype in (F64, F32) or (weight is None and bias is None):
                assert same_bits(y, plain)
                continue
            xhat, _ = native.norm_forward(x, None, None, n, 1, 1e-5, rms, False)  # rounded, by its own path
            expected = xhat.double() * (1 if weight is None else weight.double()) + (
                0 if bias is None else bias.double()
            )
            # the product and the sum are fused where the processor can, and else rounded apart in fp32
            assert relative_error(y[1:], expected[1:].float().to(dtype)) < 1e-2 * torch.finfo(dtype).eps
            assert y[0, 0].isnan() and same_bits(y.isnan().to(F32), expected.isnan().to(F32))
