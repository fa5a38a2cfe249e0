"""The C++ CPU kernels, called directly, under each instruction set that this machine has."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.testing import NormResult, assert_norm_close, norm_truth, one_rounding, typical_rounding

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"no native CPU backend: {native.unavailable('cpu')}"
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: (dtype of x, dtype of the parameters): every pair that the contract allows.
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
#: Around the registers' 2, 4, 8 and 16 lanes, around four of them, and past the 64 rounds after which accumulators are
#: added up.
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 768, 1000, 1001, 4096, 8219, 65537]


def dtype_id(value):
    if isinstance(value, tuple):
        return "-".join(str(d).removeprefix("torch.") for d in value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


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


def forward(x, weight, bias, n, groups=1, eps=1e-5, rms=False, need_stats=True):
    return native.norm_forward(x, weight, bias, n, groups, eps, rms, need_stats)


def backward(dy, x, stats, weight, n, groups=1, rms=False, param_dtype=None, needs=(True, True, True)):
    return native.norm_backward(dy, x, stats, weight, n, groups, rms, param_dtype or x.dtype, *needs)


def run(x, weight, bias, dy, n, groups=1, eps=1e-5, rms=False, param_dtype=None):
    y, stats = forward(x, weight, bias, n, groups, eps, rms)
    return NormResult(y, *backward(dy, x, stats, weight, n, groups, rms, param_dtype))


def run_torch(x, weight, bias, dy, n, groups=1, eps=1e-5, rms=False):
    """torch's own result, group by group."""
    parts = []
    for g in range(groups):
        rows = slice(g * len(x) // groups, (g + 1) * len(x) // groups)
        p = [None if t is None else t.view(-1, n)[g if t.numel() > n else 0].clone() for t in (weight, bias)]
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x[rows].clone(), *p)]
        y = F.rms_norm(leaves[0], (n,), leaves[1], eps) if rms else F.layer_norm(leaves[0], (n,), *leaves[1:], eps)
        try:
            y.backward(dy[rows])
        except RuntimeError:  # fp32 weight or bias alone beside bf16 or fp16 x: torch has a forward only
            return NormResult(None)
        parts.append([y.detach(), *(None if t is None else t.grad for t in leaves)])
    y, dx, dw, db = ([p[i] for p in parts] for i in range(4))
    return NormResult(torch.cat(y), torch.cat(dx), *(None if t[0] is None else torch.stack(t) for t in (dw, db)))


def extended_truth(x, weight, bias, dy, n, eps, rms, groups=1):
    """The truth for fp64 inputs, in numpy's long double: torch's rms_norm takes the oracle's steps, and seems exact."""

    def wide(t):
        return None if t is None else t.numpy().astype(np.longdouble).reshape(-1, n)

    x, dy, weight, bias = wide(x), wide(dy), wide(weight), wide(bias)
    w, b = (None if p is None else p.repeat(len(x) // len(p), 0) for p in (weight, bias))
    d = x if rms else x - x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((d * d).mean(1, keepdims=True) + np.longdouble(eps))
    xhat = d * rstd
    y = (xhat if w is None else xhat * w) + (0 if b is None else b)
    g = dy if w is None else dy * w
    dx = rstd * (g - (0 if rms else g.mean(1, keepdims=True)) - xhat * (g * xhat).mean(1, keepdims=True))
    dw, db = (t.reshape(groups, -1, n).sum(1) for t in (dy * xhat, dy))
    return NormResult(*(torch.from_numpy(t.astype(np.float64)) for t in (y, dx, dw, db)))


def narrow_bounds(x, weight, bias, dy, n, groups, eps, rms):
    """For each of y, dx, dw, db: the norm of what is added up in it, counting what cancels.

    In rows of a few elements much cancels, and in fp64 all of a row shares one rounding of its rstd: how large torch's
    error and ours come out over a few rows is chance then. A bound that counts the terms before they cancel holds for
    every draw.
    """
    x, dy, sets = x.double(), dy.double(), [None if p is None else p.double().view(-1, n) for p in (weight, bias)]
    w, b = (torch.zeros(1, n) if p is None else p.repeat_interleave(len(x) // len(p), 0) for p in sets)
    w = 1 if weight is None else w
    mean = x.mean(1, keepdim=True) * (not rms)
    rstd = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    size = rstd * (x.abs() + mean.abs())
    worst = 1 + size.amax(1, keepdim=True)  # rstd's own relative error, in units of rounding
    xhat = size * worst
    g = (dy * w).abs()
    dx = rstd * worst * (g + g.mean(1, keepdim=True) + xhat * (g * xhat).mean(1, keepdim=True))
    y = xhat * abs(w) + b.abs()
    dw, db = ((dy.abs() * t).view(groups, -1, n).sum(1) for t in (xhat, 1))
    return {"y": y.norm(), "dx": dx.norm(), "dw": dw.norm(), "db": db.norm()}


def check(x, weight, bias, dy, n, groups=1, eps=1e-5, rms=False, param_dtype=None):
    actual = run(x, weight, bias, dy, n, groups, eps, rms, param_dtype)
    truth = (extended_truth if x.dtype == F64 else norm_truth)(x, weight, bias, dy, n, eps, rms, groups)
    what = f"{tuple(x.shape)}, n={n}, groups={groups}, rms={rms}"
    assert actual.dx.dtype == actual.y.dtype == x.dtype and actual.dx.shape == actual.y.shape == x.shape, what
    assert actual.dw.dtype == actual.db.dtype == (param_dtype or x.dtype), what
    assert actual.dw.shape == actual.db.shape == (groups, n), what
    if n < 32 or (len(x) < 32 and x.dtype == F64):
        unit = torch.finfo(F64 if x.dtype == F64 else F32).eps / 2
        for name, bound in narrow_bounds(x, weight, bias, dy, n, groups, eps, rms).items():
            a, t = getattr(actual, name), getattr(truth, name)
            limit = 4 * unit * bound + torch.finfo(a.dtype).eps / 2 * t.norm() + torch.finfo(a.dtype).tiny
            error = (a.double() - t).norm()
            assert error <= limit, f"{what}: {name}: error {error:.3g} > limit {limit:.3g}"
        return
    try:
        assert_norm_close(actual, truth, run_torch(x, weight, bias, dy, n, groups, eps, rms))
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def same_bits(a, b):
    """Equal element by element, NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def assert_same(a: NormResult, b: NormResult, what=""):
    for name in ("y", "dx", "dw", "db"):
        assert same_bits(getattr(a, name), getattr(b, name)), f"{what}: {name} differs"


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_widths(dtypes, rms):
    dtype, param_dtype = dtypes
    for n in WIDTHS:
        rows = 37 if n <= 1001 else 5
        weight, bias = rand(n, dtype=param_dtype, shift=1, scale=0.3), rand(n, dtype=param_dtype)
        # torch's rms_norm has no bias, so without a bias of ours neither.
        check(
            rand(rows, n, dtype=dtype, shift=0.5),
            weight,
            None if rms else bias,
            rand(rows, n, dtype=dtype),
            n,
            rms=rms,
            param_dtype=param_dtype,
        )


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_row_counts(dtypes):
    """Rows that are not a multiple of the four taken together, and several chunks of partial sums."""
    dtype, param_dtype = dtypes
    for rows in (1, 2, 3, 4, 6, 131, 517):
        n = 257
        weight, bias = rand(n, dtype=param_dtype, shift=1, scale=0.3), rand(n, dtype=param_dtype)
        x, dy = rand(rows, n, dtype=dtype, shift=0.5), rand(rows, n, dtype=dtype)
        check(x, weight, bias, dy, n, param_dtype=param_dtype)


def test_many_rows_low_precision():
    """dw and db summed over many rows are as good as the truth rounded once; torch's are off by percents."""
    n = 40
    for dtype in (BF16, F16):
        x, dy = rand(20011, n, dtype=dtype), rand(20011, n, dtype=dtype)
        check(x, rand(n, dtype=dtype), rand(n, dtype=dtype), dy, n)


def laid_out(t, stride, offset):
    """A copy of 2-D ``t`` with this row stride, ``offset`` elements behind an aligned address."""
    rows, n = t.shape
    storage = torch.full((offset + rows * stride + n,), float("nan"), dtype=t.dtype)
    view = storage.as_strided((rows, n), (stride, 1), offset)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_layout_changes_no_bit(dtypes):
    dtype, param_dtype = dtypes
    for n in (3, 17, 100, 1001):
        rows = 45
        x, dy = rand(rows, n, dtype=dtype), rand(rows, n, dtype=dtype)
        weight, bias = rand(n, dtype=param_dtype), rand(n, dtype=param_dtype)
        for rms in (False, True):
            expected = run(x, weight, bias, dy, n, rms=rms, param_dtype=param_dtype)
            shifted = [laid_out(p.view(1, n), n, 1).view(n) for p in (weight, bias)]
            actual = run(laid_out(x, n + 3, 1), *shifted, laid_out(dy, n + 5, 3), n, rms=rms, param_dtype=param_dtype)
            assert_same(actual, expected, f"strided, n={n}")
            x3 = x.view(9, 5, n)
            actual = run(x3, weight, bias, dy.view(9, 5, n), n, rms=rms, param_dtype=param_dtype)
            assert actual.y.shape == actual.dx.shape == (9, 5, n)
            assert same_bits(actual.y.view(rows, n), expected.y) and same_bits(actual.dx.view(rows, n), expected.dx)
        one = rand(1, n, dtype=dtype)
        actual = run(one.expand(rows, n), weight, bias, one.expand(rows, n), n)
        copy = one.expand(rows, n).contiguous()
        assert_same(actual, run(copy, weight, bias, copy, n), f"expanded, n={n}")


def test_rows_more_than_2_to_the_31_elements_apart():
    n, stride = 1001, 2**31 + 5
    storage = torch.empty(stride + n, dtype=BF16)  # its pages are never touched, but for the two rows'
    x = storage.as_strided((2, n), (stride, 1))
    x.copy_(rand(2, n, dtype=BF16))
    weight, bias = rand(n, dtype=BF16), rand(n, dtype=BF16)
    assert_same(run(x, weight, bias, x, n), run(x.contiguous(), weight, bias, x.contiguous(), n))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_groups(dtypes):
    """Three groups give what three calls give; parameters may be shared or a set for each."""
    dtype, param_dtype = dtypes
    groups = 3
    for rows, n in ((2, 5), (21, 100), (70, 515)):
        x, dy = rand(groups * rows, n, dtype=dtype), rand(groups * rows, n, dtype=dtype)
        for rms in (False, True):
            for w_sets, b_sets in ((1, 1), (groups, groups), (1, groups), (groups, 1)):
                weight, bias = rand(w_sets, n, dtype=param_dtype), rand(b_sets, n, dtype=param_dtype)
                together = run(x, weight, bias, dy, n, groups, rms=rms, param_dtype=param_dtype)
                apart = [
                    run(*(x[s], weight[g % w_sets], bias[g % b_sets], dy[s]), n, rms=rms, param_dtype=param_dtype)
                    for g, s in ((g, slice(g * rows, (g + 1) * rows)) for g in range(groups))
                ]
                joined = NormResult(*(torch.cat([getattr(r, name) for r in apart]) for name in ("y", "dx", "dw", "db")))
                assert_same(together, joined, f"{rows}x{n}, weight sets {w_sets}, bias sets {b_sets}")
                if not rms:
                    check(x, weight, bias, dy, n, groups, param_dtype=param_dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_parameter_subsets(dtypes):
    dtype, param_dtype = dtypes
    n = 77
    x, dy = rand(19, n, dtype=dtype, shift=0.5), rand(19, n, dtype=dtype)
    for rms in (False, True):
        for has_weight in (False, True):
            for has_bias in (False, True):
                weight = rand(n, dtype=param_dtype) if has_weight else None
                bias = rand(n, dtype=param_dtype) if has_bias else None
                if not (rms and has_bias):
                    check(x, weight, bias, dy, n, rms=rms, param_dtype=param_dtype)
                else:  # the contract allows a bias here too; torch does not
                    y, _ = forward(x, weight, bias, n, rms=rms)
                    truth = norm_truth(x, weight, bias, dy, n, 1e-5, rms).y
                    torch.testing.assert_close(y, truth.to(dtype))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_needed_subsets(dtypes):
    """Each gradient has the same bits whichever others are asked for; what is not asked for comes back empty."""
    dtype, param_dtype = dtypes
    n = 103
    x, dy, weight = rand(150, n, dtype=dtype), rand(150, n, dtype=dtype), rand(n, dtype=param_dtype)
    for rms in (False, True):
        for w in (weight, None):
            y, stats = forward(x, w, None, n, rms=rms)
            y_alone, no_stats = forward(x, w, None, n, rms=rms, need_stats=False)
            assert same_bits(y, y_alone) and no_stats is None
            full = backward(dy, x, stats, w, n, rms=rms, param_dtype=param_dtype)
            for needs in ((d, p, b) for d in (0, 1) for p in (0, 1) for b in (0, 1)):
                needs = tuple(map(bool, needs))
                some = backward(dy, x, stats, w, n, rms=rms, param_dtype=param_dtype, needs=needs)
                for need, got, expected in zip(needs, some, full, strict=True):
                    assert same_bits(got, expected) if need else got.shape == (0,), (rms, needs)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_stats(dtype):
    n = 100
    x = rand(9, n, dtype=dtype, shift=0.5)
    x64 = x.double()
    for rms in (False, True):
        _, stats = forward(x, None, None, n, eps=0.25, rms=rms)
        assert stats.shape == (1 if rms else 2, 9) and stats.dtype == (F64 if dtype == F64 else F32)
        centred = x64 if rms else x64 - x64.mean(1, keepdim=True)
        torch.testing.assert_close(stats[0].double(), (centred.square().mean(1) + 0.25).rsqrt(), rtol=1e-6, atol=0)
        if not rms:
            torch.testing.assert_close(stats[1].double(), x64.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_nan_and_inf_stay_in_their_row(dtype):
    for n in (7, 100, 1001):
        clean = rand(9, n, dtype=dtype)
        weight, bias = rand(n, dtype=dtype), rand(n, dtype=dtype)
        for bad in (float("nan"), float("inf"), float("-inf")):
            for column in (0, n // 2, n - 1):
                x = clean.clone()
                x[3, column] = bad
                others = torch.arange(9) != 3
                y, _ = forward(x, weight, bias, n)
                assert y[3].isnan().all()
                assert same_bits(y[others], forward(clean, weight, bias, n)[0][others])
                y, _ = forward(x, weight, None, n, rms=True)
                at_bad = torch.arange(n) == column
                assert y[3, column].isnan()
                assert y[3].isnan().all() if bad != bad else (y[3][~at_bad] == 0).all()
                assert same_bits(y[others], forward(clean, weight, None, n, rms=True)[0][others])


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_constant_rows(dtype):
    """A constant row has exactly its mean: y is the bias; with eps = 0 it is 0/0."""
    for n in (1, 3, 16, 100, 1001):
        for value in (0.1, -3.7, 100.0, 0.0):
            x, bias = torch.full((3, n), value, dtype=dtype), rand(n, dtype=dtype)
            y, stats = forward(x, rand(n, dtype=dtype), bias, n)
            assert same_bits(y, bias.expand(3, n)), (n, value)
            assert (stats[1] == x[:, 0]).all()
            y, _ = forward(x, None, None, n, eps=0.0)
            assert y.isnan().all(), (n, value)


def test_large_offset():
    """Two passes: a mean of a million leaves the deviations right (E[x^2] - E[x]^2 would be noise)."""
    for n in (768, 4099):
        x = torch.randn(64, n) + 1e6
        y, _ = forward(x, None, None, n)
        assert (y.std(1) - 1).abs().max() < 1e-2
        # The mean itself is an fp32 number, and near a million these are 1/16 apart.
        assert y.mean(1).abs().max() <= 1 / 32 + 1e-3


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_every_16_bit_number(dtype):
    """The conversions, seen through db: all 65536 patterns are read exactly, and sums are rounded to nearest even."""
    n = 65536
    pattern = torch.arange(n, dtype=torch.int32).to(torch.int16).view(dtype).view(1, n)
    stats = torch.empty(0)
    db_alone = (False, False, True)
    read = backward(pattern, pattern, stats, None, n, param_dtype=F32, needs=db_alone)[2]
    assert same_bits(read, pattern.float())
    written = backward(pattern, pattern, stats, None, n, needs=db_alone)[2]
    assert same_bits(written, pattern)
    for shift in (1, 257, 30011):  # what is added lies anywhere below the last bit, at ties too
        pair = torch.cat([pattern, pattern.roll(shift, 1) * 0.5])
        rounded = backward(pair, pair, stats, None, n, needs=db_alone)[2]
        assert same_bits(rounded, (pair[:1].float() + pair[1:].float()).to(dtype))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_batch_invariance(dtype):
    """A row's output has the same bits alone, among others, and wherever it stands."""
    for n in (5, 100, 1001, 20000):
        x, weight, bias = rand(50, n, dtype=dtype), rand(n, dtype=dtype), rand(n, dtype=dtype)
        for rms in (False, True):
            y, _ = forward(x, weight, bias, n, rms=rms)
            for part in (slice(0, 1), slice(7, 8), slice(3, 20), slice(49, 50)):
                assert same_bits(forward(x[part], weight, bias, n, rms=rms)[0], y[part])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_same_bits_for_any_number_of_threads(dtype):
    for rows, n, groups in ((4000, 24, 1), (333, 1001, 1), (6, 40000, 3), (70, 4096, 1)):
        x, dy = rand(rows, n, dtype=dtype), rand(rows, n, dtype=dtype)
        weight, bias = rand(n, dtype=dtype), rand(n, dtype=dtype)
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, weight, bias, dy, n, groups))
        for other in results[1:]:
            assert_same(other, results[0], f"{rows}x{n}")


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_every_element_is_written(dtype):
    """Nothing shows through of what lay in the memory of the outputs.

    torch's own poisoning of fresh memory does not reach the stable ABI's empty tensors: the allocator is handed blocks
    of NaN to give out again, and the results must be those of before.
    """
    for rows, n, groups in ((3, 1, 1), (9, 17, 3), (70, 515, 1), (2, 7001, 1), (300, 100, 1)):
        x, weight = rand(rows, n, dtype=dtype), rand(n, dtype=dtype)
        for rms in (False, True):

            def results(x=x, weight=weight, n=n, groups=groups, rms=rms):
                y, stats = forward(x, weight, weight, n, groups, rms=rms)
                return [y, stats, *backward(x, x, stats, weight, n, groups, rms)]

            before = [t.clone() for t in results()]
            for t in before:
                blocks = [torch.full_like(t, float("nan")) for _ in range(5)]
                del blocks
            for a, b in zip(results(), before, strict=True):
                assert not a.isnan().any() and same_bits(a, b), (rows, n)


def test_no_rows():
    x, weight = torch.empty(0, 5), torch.randn(5)
    y, stats = forward(x, weight, weight, 5)
    assert y.shape == (0, 5) and stats.shape == (2, 0)
    dx, dw, db = backward(x, x, stats, weight, 5)
    assert dx.shape == (0, 5) and torch.equal(dw, torch.zeros(1, 5)) and torch.equal(db, torch.zeros(1, 5))


def f(*shape, dtype=F32):
    return torch.ones(*shape, dtype=dtype)


BAD_FORWARD = {
    "n=0": (lambda: (f(4, 6), None, None, 0, 1), "n is 0"),
    "ragged": (lambda: (f(4, 6), None, None, 5, 1), "24 elements.*n = 5"),
    "groups=0": (lambda: (f(4, 6), None, None, 6, 0), "groups is 0"),
    "groups": (lambda: (f(4, 6), None, None, 6, 3), "4 rows.*groups = 3"),
    "integer x": (lambda: (f(4, 6, dtype=torch.int32), None, None, 6, 1), "x has dtype Int"),
    "short weight": (lambda: (f(4, 6), f(5), None, 6, 1), r"weight has shape \(5,\).*n = 6"),
    "long bias": (lambda: (f(4, 6), None, f(12), 6, 1), r"bias has shape \(12,\).*n = 6"),
    "empty weight": (lambda: (f(4, 6), f(0), None, 6, 2), r"weight has shape \(0,\).*n = 6"),
    "weight dtype": (lambda: (f(4, 6), f(6, dtype=F64), None, 6, 1), "weight has dtype Double, x has Float"),
    "fp64 x": (lambda: (f(4, 6, dtype=F64), f(6), None, 6, 1), "weight has dtype Float, x has Double"),
    "bias dtype": (
        lambda: (f(4, 6, dtype=BF16), f(6), f(6, dtype=BF16), 6, 1),
        "bias has dtype BFloat16, weight has Float",
    ),
    "strided weight": (lambda: (f(4, 6), f(12)[::2], None, 6, 1), "weight is not contiguous"),
    "column-strided x": (lambda: (f(6, 4).t(), None, None, 6, 1), r"x has shape \(4, 6\).*n = 6"),
    "strided 3-D x": (lambda: (f(4, 3, 8)[..., :6], None, None, 6, 1), r"x has shape \(4, 3, 6\)"),
    "rows of another width": (lambda: (f(4, 8)[:, :6], None, None, 3, 1), r"x has shape \(4, 6\).*n = 3"),
}


@pytest.mark.parametrize("case", BAD_FORWARD)
def test_forward_refuses(case):
    arguments, message = BAD_FORWARD[case]
    with pytest.raises(RuntimeError, match=message):
        native.norm_forward(*arguments(), 1e-5, False, True)


def good_backward():
    return {
        "dy": f(4, 6),
        "x": f(4, 6),
        "stats": f(2, 4),
        "weight": f(6),
        "n": 6,
        "groups": 1,
        "rms": False,
        "param_dtype": F32,
    }


BAD_BACKWARD = {
    "short dy": ({"dy": f(3, 6)}, r"dy has shape \(3, 6\), x has \(4, 6\)"),
    "dy dtype": ({"dy": f(4, 6, dtype=BF16)}, "dy has dtype BFloat16, x has Float"),
    "strided dy": ({"dy": f(6, 4).t()}, r"dy has shape \(4, 6\)"),
    "short stats": ({"stats": f(1, 4)}, r"stats has shape \(1, 4\), expected \(2, 4\)"),
    "stats dtype": ({"stats": f(2, 4, dtype=F64)}, "stats has dtype Double, expected Float"),
    "strided stats": ({"stats": f(4, 2).t()}, "stats is not"),
    "weight": ({"weight": f(7)}, r"weight has shape \(7,\)"),
    "param dtype": ({"param_dtype": BF16}, "param_dtype is BFloat16, x has Float"),
    "groups": ({"groups": 3}, "4 rows.*groups = 3"),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses(case):
    changes, message = BAD_BACKWARD[case]
    native.norm_backward(*good_backward().values(), True, True, True)
    with pytest.raises(RuntimeError, match=message):
        native.norm_backward(*(good_backward() | changes).values(), True, True, True)


def test_a_capability_by_environment(capability):
    """ATEN_CPU_CAPABILITY is read when the extension is loaded."""
    code = "from fused_norm.backends import native; print(native.cpu_capability())"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == capability


def test_an_unknown_capability_is_refused():
    with pytest.raises(ValueError, match="mmx"):
        native.set_cpu_capability("mmx")


DOUBLE_WIDTHS = [1, 2, 3, 7, 8, 17, 31, 33, 63, 64, 100, 768, 1000, 4097, 20000]
DOUBLE_RESULTS = ("grad_dy", "grad_x", "grad_w")
BOOLEANS = (False, True)


def double_backward(ddx, ddw, ddb, dy, x, weight, n, groups=1, rms=False, param_dtype=None, needs=(True, True, True)):
    _, stats = forward(x, None, None, n, groups, rms=rms)
    return native.norm_double_backward(
        ddx, ddw, ddb, dy, x, stats, weight, n, groups, rms, param_dtype or x.dtype, *needs
    )


def fp64(*tensors):
    return [None if t is None else t.double() for t in tensors]


def double_backward_truth(ddx, ddw, ddb, dy, x, weight, n, groups=1, rms=False):
    ddx, ddw, ddb, dy, x, weight = fp64(ddx, ddw, ddb, dy, x, weight)
    _, stats = reference.norm_forward(x, None, None, n, groups, 1e-5, rms, True)
    return reference.norm_double_backward(ddx, ddw, ddb, dy, x, stats, weight, n, groups, rms, F64, True, True, True)


def double_backward_bounds(ddx, ddw, ddb, dy, x, weight, n, groups=1, rms=False):
    """For each result: the norm of what is added up in it, counting what cancels, as in `narrow_bounds`.

    A mean counts with the terms' own sizes, or, where these are many, with four standard deviations of a sum of terms
    of such sizes and random signs: the means of u * xhat and of g * xhat, to which grad_x is proportional, come out
    small by chance.
    """
    rows = x.numel() // n

    def spread(p, otherwise):
        sets = torch.full((1, n), float(otherwise), dtype=F64) if p is None else p.double().reshape(-1, n)
        return sets.repeat_interleave(rows // len(sets), 0)

    def mean(terms, sizes, dim=1):
        likely = 4 * sizes.square().sum(dim, keepdim=True).sqrt() / sizes.shape[dim]
        counted = torch.minimum(sizes.mean(dim, keepdim=True), likely)
        return torch.maximum(terms.mean(dim, keepdim=True).abs(), counted)

    x, dy, u = (spread(t, 0) for t in (x, dy, ddx))
    v, c, w = spread(ddw, 0), spread(ddb, 0), spread(weight, 1)
    x_mean = x.mean(1, keepdim=True) * (not rms)
    rstd = ((x - x_mean).square().mean(1, keepdim=True) + 1e-5).rsqrt()
    xhat, size = (x - x_mean) * rstd, (x.abs() + x_mean.abs()) * rstd
    # rstd's own relative error, in units of rounding; in longer rows it averages out.
    worst = 1 + size.amax(1, keepdim=True) * (n < 32)
    size = size * worst
    g = dy * w
    a, b = ((t * xhat).mean(1, keepdim=True) for t in (u, g))
    p = u - u.mean(1, keepdim=True) * (not rms) - xhat * a
    t = v * dy - rstd * (b * u + a * g)
    a_size, b_size = (mean(t * xhat, t.abs() * size) for t in (u, g))
    p_size = u.abs() + mean(u, u.abs()) + size * a_size
    t_size = (v * dy).abs() + rstd * worst * (b_size * u.abs() + a_size * g.abs())
    k_size = mean(t * xhat, t_size * size) + rstd * worst * mean(p * g, p_size * g.abs())
    grad_w, grad_w_size = ((rstd * t).view(groups, -1, n) for t in (dy * p, worst * dy.abs() * p_size))
    return (
        (w.abs() * rstd * worst * p_size + v.abs() * size + c.abs()).norm(),
        (rstd * worst * (t_size + mean(t, t_size) + size * k_size)).norm(),
        (mean(grad_w, grad_w_size, 1) * (rows / groups)).norm(),
    )


def check_double(ddx, ddw, ddb, dy, x, weight, n, groups=1, rms=False, param_dtype=None):
    """Compares all three results with the fp64 truth, and returns them."""
    inputs = (ddx, ddw, ddb, dy, x, weight)
    actual = double_backward(*inputs, n, groups, rms, param_dtype)
    given = [name for name, t in zip(("ddx", "ddw", "ddb"), inputs[:3], strict=True) if t is not None]
    what = f"{tuple(x.shape)}, n={n}, groups={groups}, rms={rms}, weight={weight is not None}, {given}"
    assert actual[0].shape == actual[1].shape == x.shape and actual[0].dtype == actual[1].dtype == x.dtype, what
    assert actual[2].shape == (groups, n) and actual[2].dtype == (param_dtype or x.dtype), what
    truth = double_backward_truth(*inputs, n, groups, rms)
    bounds = double_backward_bounds(*inputs, n, groups, rms)
    unit = torch.finfo(F64 if x.dtype == F64 else F32).eps / 2
    for name, got, true, bound in zip(DOUBLE_RESULTS, actual, truth, bounds, strict=True):
        rounding = 1.05 * max(one_rounding(true, got.dtype), typical_rounding(got.dtype)) * true.norm()
        limit = 3 * unit * bound + rounding + torch.finfo(got.dtype).tiny
        error = (got.double() - true).norm()
        assert error <= limit, (
            f"{what}: {name}: error {error:.3g} > limit {limit:.3g} (the truth's norm {true.norm():.3g})"
        )
    return actual


def draw_double(rows, n, dtypes, sets=(1, 1, 1)):
    """Random ddx, ddw, ddb, dy, x, weight; `sets` is how many of ddw, ddb and weight there are."""
    dtype, param_dtype = dtypes
    ddx, dy = rand(rows, n, dtype=dtype), rand(rows, n, dtype=dtype)
    ddw, ddb = (rand(s, n, dtype=param_dtype) for s in sets[:2])
    weight = rand(sets[2], n, dtype=param_dtype, shift=1, scale=0.3)
    return ddx, ddw, ddb, dy, rand(rows, n, dtype=dtype, shift=0.5), weight


def without(inputs, has_ddx, has_ddw, has_ddb, has_weight):
    ddx, ddw, ddb, dy, x, weight = inputs
    return (
        ddx if has_ddx else None,
        ddw if has_ddw else None,
        ddb if has_ddb else None,
        dy,
        x,
        weight if has_weight else None,
    )


@pytest.mark.parametrize("rms", BOOLEANS, ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_widths(dtypes, rms):
    for n in DOUBLE_WIDTHS:
        inputs = draw_double(37 if n <= 1000 else 5, n, dtypes)
        check_double(*inputs, n, rms=rms, param_dtype=dtypes[1])
        # ddx alone, as a gradient penalty has it: all of grad_x is then proportional to means over the row.
        check_double(*without(inputs, True, False, False, True), n, rms=rms, param_dtype=dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_row_counts(dtypes):
    """Rows that are not a multiple of those taken together, and several chunks of partial sums."""
    for rows in (1, 2, 3, 4, 6, 131, 517):
        check_double(*draw_double(rows, 257, dtypes), 257, param_dtype=dtypes[1])


@pytest.mark.parametrize("rms", BOOLEANS, ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_subsets(dtypes, rms):
    """Every subset of the inputs against the truth; each result has the same bits whichever others are asked for."""
    n = 103
    every = draw_double(150, n, dtypes)
    for present in itertools.product(BOOLEANS, repeat=4):
        inputs = without(every, *present)
        full = check_double(*inputs, n, rms=rms, param_dtype=dtypes[1])
        for needs in itertools.product(BOOLEANS, repeat=3):
            some = double_backward(*inputs, n, rms=rms, param_dtype=dtypes[1], needs=needs)
            for need, got, expected in zip(needs, some, full, strict=True):
                assert same_bits(got, expected) if need else got.shape == (0,), (present, needs)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_reads_no_more_than_it_must(dtypes):
    n, jvp = 103, (True, False, False)
    ddx, ddw, ddb, dy, x, weight = draw_double(9, n, dtypes)
    nan = torch.full_like(x, float("nan"))
    for rms in BOOLEANS:
        expected = double_backward(ddx, ddw, ddb, dy, x, weight, n, rms=rms, param_dtype=dtypes[1])[0]
        for unread in (None, nan, nan[:2]):
            got = double_backward(ddx, ddw, ddb, unread, x, weight, n, rms=rms, param_dtype=dtypes[1], needs=jvp)[0]
            assert same_bits(got, expected)
        grad_dy = double_backward(None, None, ddb, None, nan, weight, n, rms=rms, param_dtype=dtypes[1], needs=jvp)[0]
        assert same_bits(grad_dy, ddb.to(x.dtype).expand(9, n))
        zero = double_backward(None, None, None, dy, x, weight, n, rms=rms, param_dtype=dtypes[1])
        assert not any(t.any() for t in zero)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_groups(dtypes):
    """Three groups give what three calls give; parameters may be shared or a set for each."""
    groups = 3
    for rows, n in ((1, 40), (21, 100), (70, 515)):
        for rms, with_ddx, *sets in itertools.product(BOOLEANS, BOOLEANS, *[(1, groups)] * 3):
            inputs = without(draw_double(groups * rows, n, dtypes, sets), with_ddx, True, True, True)
            if rows != 70:
                together = check_double(*inputs, n, groups, rms, dtypes[1])
            else:
                together = double_backward(*inputs, n, groups, rms, dtypes[1])
            ddx, ddw, ddb, dy, x, weight = inputs
            apart = []
            for group in range(groups):
                own = slice(group * rows, (group + 1) * rows)
                params = [p[group % len(p)] for p in (ddw, ddb, weight)]
                part = (None if ddx is None else ddx[own], *params[:2], dy[own], x[own], params[2])
                apart.append(double_backward(*part, n, 1, rms, dtypes[1]))
            for name, got, parts in zip(DOUBLE_RESULTS, together, zip(*apart, strict=True), strict=True):
                assert same_bits(got, torch.cat(parts)), f"{name}: {groups * rows}x{n}, rms={rms}, sets {sets}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_layout_changes_no_bit(dtypes):
    rows, options = 45, {"param_dtype": dtypes[1]}
    for n in (3, 17, 100, 1001):
        inputs = draw_double(rows, n, dtypes)
        for rms, with_ddx in itertools.product(BOOLEANS, repeat=2):
            ddx, ddw, ddb, dy, x, weight = without(inputs, with_ddx, True, True, True)
            expected = double_backward(ddx, ddw, ddb, dy, x, weight, n, rms=rms, **options)
            v, c, w = (laid_out(p.view(1, n), n, 1).view(n) for p in (ddw, ddb, weight))
            u = laid_out(ddx, n + 7, 2) if with_ddx else None
            actual = double_backward(u, v, c, laid_out(dy, n + 5, 3), laid_out(x, n + 3, 1), w, n, rms=rms, **options)
            for name, got, same in zip(DOUBLE_RESULTS, actual, expected, strict=True):
                assert same_bits(got, same), (name, n, rms)
            u, dy3, x3 = (t if t is None else t.view(9, 5, n) for t in (ddx, dy, x))
            actual = double_backward(u, ddw, ddb, dy3, x3, weight, n, rms=rms, **options)
            assert actual[0].shape == actual[1].shape == (9, 5, n)
            for name, got, same in zip(DOUBLE_RESULTS, actual, expected, strict=True):
                assert same_bits(got.view(same.shape), same), (name, n, rms)
        one = rand(1, n, dtype=dtypes[0])
        wide, copy = one.expand(rows, n), one.expand(rows, n).contiguous()
        actual, expected = (double_backward(t, ddw, ddb, t, t, weight, n, **options) for t in (wide, copy))
        assert all(map(same_bits, actual, expected)), f"expanded, n={n}"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_double_backward_same_bits_for_any_number_of_threads(dtype):
    for rows, n, groups in ((4000, 24, 1), (333, 1001, 1), (6, 40000, 3), (70, 4096, 1)):
        inputs = draw_double(rows, n, (dtype, dtype))
        for needs in ((True, True, True), (True, True, False)):
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                results.append(double_backward(*inputs, n, groups, needs=needs))
            for other in results[1:]:
                assert all(map(same_bits, other, results[0])), f"{rows}x{n}, {needs}"


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_double_backward_nan_stays_in_its_row(dtype):
    for n in (7, 100, 1001):
        clean = draw_double(9, n, (dtype, dtype))
        expected = double_backward(*clean, n)
        others = torch.arange(9) != 3
        for bad, (name, place) in itertools.product((float("nan"), float("inf")), {"ddx": 0, "dy": 3, "x": 4}.items()):
            inputs = list(clean)
            inputs[place] = inputs[place].clone()
            inputs[place][3, n // 2] = bad
            grad_dy, grad_x, grad_w = double_backward(*inputs, n)
            if name == "dy":
                assert same_bits(grad_dy, expected[0]) and not grad_w[0, n // 2].isfinite(), (n, bad)
                assert same_bits(grad_w[:, : n // 2], expected[2][:, : n // 2]), (n, bad)
            else:
                assert not grad_dy[3].isfinite().any() and not grad_w.isfinite().any(), (n, name, bad)
            assert not grad_x[3].isfinite().any(), (n, name, bad)
            for got, same in ((grad_dy, expected[0]), (grad_x, expected[1])):
                assert same_bits(got[others], same[others]), (n, name, bad)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_double_backward_writes_every_element(dtype):
    """As test_every_element_is_written: nothing shows through of what lay in the memory of the outputs."""
    for rows, n, groups in ((3, 1, 1), (9, 17, 3), (70, 515, 1), (2, 7001, 1), (300, 100, 1)):
        every = draw_double(rows, n, (dtype, dtype))
        for rms, with_ddx, with_ddw in itertools.product(BOOLEANS, repeat=3):
            inputs = without(every, with_ddx, with_ddw, True, True)
            before = [t.clone() for t in double_backward(*inputs, n, groups, rms)]
            for t in before:
                blocks = [torch.full_like(t, float("nan")) for _ in range(5)]
                del blocks
            for got, expected in zip(double_backward(*inputs, n, groups, rms), before, strict=True):
                assert not got.isnan().any() and same_bits(got, expected), (rows, n)


def test_double_backward_no_rows():
    x, p = torch.empty(0, 5), torch.randn(5)
    for ddx in (x, None):
        grad_dy, grad_x, grad_w = double_backward(ddx, p, p, x, x, p, 5)
        assert grad_dy.shape == grad_x.shape == (0, 5) and torch.equal(grad_w, torch.zeros(1, 5))


def good_double_backward():
    return {
        "ddx": f(4, 6),
        "ddw": f(6),
        "ddb": f(6),
        "dy": f(4, 6),
        "x": f(4, 6),
        "stats": f(2, 4),
        "weight": f(6),
        "n": 6,
        "groups": 1,
        "rms": False,
        "param_dtype": F32,
        "need_ddy": True,
        "need_dx": True,
        "need_dw": True,
    }


BAD_DOUBLE_BACKWARD = {
    "short ddx": ({"ddx": f(3, 6)}, r"ddx has shape \(3, 6\), x has \(4, 6\)"),
    "short dy": ({"dy": f(3, 6)}, r"dy has shape \(3, 6\), x has \(4, 6\)"),
    "ddx dtype": ({"ddx": f(4, 6, dtype=BF16)}, "ddx has dtype BFloat16, x has Float"),
    "dy dtype": ({"dy": f(4, 6, dtype=BF16)}, "dy has dtype BFloat16, x has Float"),
    "strided ddx": ({"ddx": f(6, 4).t()}, r"ddx has shape \(4, 6\).*n = 6"),
    "strided dy": ({"dy": f(6, 4).t()}, r"dy has shape \(4, 6\).*n = 6"),
    "strided x": ({"x": f(6, 4).t()}, r"x has shape \(4, 6\).*n = 6"),
    "integer x": ({"x": f(4, 6, dtype=torch.int32)}, "x has dtype Int"),
    "no dy for grad_x": ({"dy": None, "need_dw": False}, "dy is None.*need_dx is true"),
    "no dy for grad_w": ({"dy": None, "need_dx": False}, "dy is None.*need_dw is true"),
    "short stats": ({"stats": f(1, 4)}, r"stats has shape \(1, 4\), expected \(2, 4\)"),
    "stats dtype": ({"stats": f(2, 4, dtype=F64)}, "stats has dtype Double, expected Float"),
    "strided stats": ({"stats": f(4, 2).t()}, "stats is not"),
    "weight": ({"weight": f(7)}, r"weight has shape \(7,\).*n = 6"),
    "ddw": ({"ddw": f(7)}, r"ddw has shape \(7,\).*n = 6"),
    "ddb": ({"ddb": f(12)}, r"ddb has shape \(12,\).*n = 6"),
    "ddw for other groups": ({"ddw": f(12), "groups": 4}, r"ddw has shape \(12,\).*4 groups"),
    "strided ddw": ({"ddw": f(12)[::2]}, "ddw is not contiguous"),
    "weight dtype": ({"weight": f(6, dtype=F64)}, "weight has dtype Double, x has Float"),
    "param dtype": ({"param_dtype": BF16}, "param_dtype is BFloat16, x has Float"),
    "n": ({"n": 0}, "n is 0"),
    "ragged": ({"n": 5}, "24 elements.*n = 5"),
    "groups": ({"groups": 3}, "4 rows.*groups = 3"),
}


@pytest.mark.parametrize("case", BAD_DOUBLE_BACKWARD)
def test_double_backward_refuses(case):
    changes, message = BAD_DOUBLE_BACKWARD[case]
    native.norm_double_backward(*good_double_backward().values())
    with pytest.raises(RuntimeError, match=message):
        native.norm_double_backward(*(good_double_backward() | changes).values())


@pytest.mark.parametrize("name", ["weight", "ddw", "ddb"])
def test_double_backward_refuses_parameters_of_two_dtypes(name):
    """The kernel reads all three in the one dtype that `param_dtype` names."""
    arguments = good_double_backward() | {p: f(4, 6, dtype=BF16) for p in ("ddx", "dy", "x")}
    native.norm_double_backward(*arguments.values())
    with pytest.raises(RuntimeError, match=f"{name} has dtype BFloat16, param_dtype is Float"):
        native.norm_double_backward(*(arguments | {name: f(6, dtype=BF16)}).values())


def test_double_backward_refuses_freed_memory():
    for name in ("ddx", "ddw", "ddb", "dy", "x", "stats", "weight"):
        arguments = good_double_backward()
        arguments[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"{name} has shape .* no storage"):
            native.norm_double_backward(*arguments.values())


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_double_backward_operator(dtypes):
    """torch's own checks of the operator: its schema against what it does, and its fake against its results."""
    every = draw_double(6, 10, dtypes)
    for rms, with_ddx, needs in ((False, True, (True, True, True)), (True, False, (True, False, False))):
        ddx, ddw, ddb, dy, x, weight = without(every, with_ddx, True, True, with_ddx)
        _, stats = forward(x, None, None, 10, 2, rms=rms)
        arguments = (ddx, ddw, ddb, dy if needs[1] else None, x, stats, weight, 10, 2, rms, dtypes[1], *needs)
        operator = torch.ops.fused_norm.norm_double_backward.default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_double_backward_without_a_kernel(monkeypatch):
    """What is not on the CPU goes to the reference's formulas."""
    arguments = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in good_double_backward().items()}
    results = native.norm_double_backward(*arguments.values())
    assert [(t.device.type, t.shape) for t in results] == [("meta", (4, 6)), ("meta", (4, 6)), ("meta", (1, 6))]
    monkeypatch.setattr(reference, "norm_double_backward", lambda *given: given)
    given = native.norm_double_backward(*arguments.values())
    assert all(a is b for a, b in zip(given, arguments.values(), strict=True))
