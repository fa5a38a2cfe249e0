"""How the C++ CPU kernels walk a row: its ends, its statistics, its stores past the caches, its share among threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_native_add_norm import DTYPES as ADD_DTYPES
from test_native_add_norm import backward as add_backward
from test_native_add_norm import draw as draw_add
from test_native_add_norm import forward as add_forward
from test_native_cpu import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_same,
    backward,
    capability,  # noqa: F401  a fixture of every test here
    check,
    dtype_id,
    extended_truth,
    forward,
    laid_out,
    rand,
    run,
    run_torch,
    same_bits,
)

import fused_norm
from fused_norm.backends import native
from fused_norm.testing import norm_truth, relative_error, typical_rounding

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason=f"no native CPU backend: {native.unavailable('cpu')}"
)

ROWS = (1, 3, 4, 5, 9)
NEVER = 2**62

each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
each_add_dtype = pytest.mark.parametrize("dtypes", ADD_DTYPES, ids=dtype_id)
each_op = pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])


def draw(rows, n, dtypes):
    """x, weight, bias, dy"""
    dtype, param_dtype = dtypes
    weight, bias = rand(n, dtype=param_dtype, shift=1, scale=0.3), rand(n, dtype=param_dtype)
    return rand(rows, n, dtype=dtype, shift=0.5), weight, bias, rand(rows, n, dtype=dtype)


def assert_all_same(got, expected, what):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"{what}: result {i} differs"


def check_few(x, weight, bias, dy, n, rms, param_dtype):
    """As `check`; a few fp32 rows' errors are mostly those of each one's rstd, and torch's come out small by chance."""
    if x.dtype != F32 or n < 32:
        return check(x, weight, bias, dy, n, rms=rms, param_dtype=param_dtype)
    actual, by_torch = run(x, weight, bias, dy, n, rms=rms), run_torch(x, weight, bias, dy, n, rms=rms)
    truth = norm_truth(x, weight, bias, dy, n, 1e-5, rms)
    for name in ("y", "dx", "dw", "db"):
        a, t, other = (getattr(r, name) for r in (actual, truth, by_torch))
        limit = max(16 * typical_rounding(F32), 0 if other is None else 1.5 * relative_error(other, t))
        assert relative_error(a, t) <= limit, (
            f"{tuple(x.shape)}, rms={rms}: {name}: {relative_error(a, t):.3g} > {limit:.3g}"
        )


# ------------------------------------------------------------------------------------------- stores past the caches


@contextmanager
def past_caches_from(size: int) -> Iterator[None]:
    before = native._C.set_past_cache_bytes(size)
    try:
        yield
    finally:
        native._C.set_past_cache_bytes(before)


def either_way(function, rows, n, dtype):
    """function's results with all stores past the caches, and with none.

    Only memory that has been touched is written past them: that of the results is left by tensors of their size.
    """
    results = []
    for size in (0, NEVER):
        with past_caches_from(size):
            warm = [torch.full((rows, n), float("nan"), dtype=dtype) for _ in range(3)]
            del warm
            results.append(function())
    return results


#: (rows, columns): rows that begin at multiples of 64 bytes in every dtype, and rows that do not; held and not held.
PAST_CACHES = (
    (1, 1),
    (9, 7),
    (5, 33),
    (37, 64),
    (9, 100),
    (6, 1001),
    (7, 1024),
    (3, 4100),
    (2, 8192),
    (5, 8224),
    (3, 16391),
)


@each_op
@each_dtype
def test_past_the_caches(dtypes, rms):
    for rows, n in PAST_CACHES:
        x, weight, bias, dy = draw(rows, n, dtypes)
        for w, b in ((weight, bias), (None, None)):
            streamed, stored = either_way(
                lambda x=x, w=w, b=b, dy=dy, n=n: run(x, w, b, dy, n, rms=rms, param_dtype=dtypes[1]), rows, n, x.dtype
            )
            assert_same(streamed, stored, f"{rows}x{n}")


@each_op
@each_add_dtype
def test_add_norm_past_the_caches(dtypes, rms):
    x_dtype, dtype, param_dtype = dtypes
    for (rows, n), p in itertools.product(PAST_CACHES, (0.0, 0.2)):
        x, residual, weight, bias, dy, dsummed = draw_add(rows, n, dtypes)
        seed = torch.tensor(1234567) if p else None

        def results():
            y, summed, stats = add_forward(x, residual, weight, bias, seed, p, rms)  # noqa: B023
            arguments = dy, dsummed, summed, stats, weight, seed, p, rms, param_dtype, x_dtype  # noqa: B023
            return [y, summed, stats, *add_backward(*arguments)]

        assert_all_same(*either_way(results, rows, n, dtype), f"{rows}x{n}, p={p}")


STORES, FENCES = ("movntdq", "vmovntdq", "movntps", "vmovntps", "movntpd", "vmovntpd"), ("sfence",)


@functools.cache
def instructions():
    """Where in the library those of STORES and FENCES stand: address, name."""
    command = ["objdump", "-d", "--no-show-raw-insn", native._C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"^ *(\w+):\t({'|'.join(STORES + FENCES)})\b", listing, re.MULTILINE)
    return [(int(address, 16), name) for address, name in found]


def executes(names, function):
    """Whether ``function()`` comes to such an instruction: all of them are traps in the fork that calls it."""
    addresses = [address for address, name in instructions() if name in names]
    child = os.fork()
    if not child:
        try:
            libc = ctypes.CDLL(None)
            libc.signal(signal.SIGTRAP, ctypes.cast(libc._exit, ctypes.c_void_p))  # and no core is dumped
            maps = Path("/proc/self/maps").read_text().splitlines()
            library = min(int(line.split("-")[0], 16) for line in maps if line.endswith(native._C.__file__))
            first, last = (end(addresses, default=0) // mmap.PAGESIZE * mmap.PAGESIZE for end in (min, max))
            size, access = last + mmap.PAGESIZE - first, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
            if libc.mprotect(ctypes.c_void_p(library + first), ctypes.c_size_t(size), access):
                raise OSError("mprotect failed")
            for address in addresses:
                ctypes.memset(library + address, 0xCC, 1)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGTRAP << 8), f"wait status {status}"
    return status != 0


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("objdump"), reason="takes Linux and objdump")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_what_is_written_past_the_caches(dtype, capability):  # noqa: F811
    """There the streaming stores are executed, and the fence that other threads' view of them takes; else neither."""
    for rows, n in ((4, 256), (3, 8224)) if dtype == F32 else ((4, 256),):
        x, weight, bias, dy = draw(rows, n, (dtype, dtype))
        _, stats = forward(x, weight, bias, n)
        seed = torch.tensor(5)
        calls = {
            "forward": functools.partial(forward, x, weight, bias, n),
            "backward": functools.partial(backward, dy, x, stats, weight, n),
            "add_norm forward": functools.partial(add_forward, x, dy, weight, bias, seed, 0.2),
            "add_norm backward": functools.partial(add_backward, dy, dy, x, stats, weight, seed, 0.2, False),
        }
        for name, function in calls.items():

            def results(function=function):
                return either_way(function, rows, n, dtype)  # noqa: B023

            # Four rows of dx are written in turn, two registers each: these must be whole lines.
            short = name == "backward" and capability == "avx2" and dtype in (BF16, F16)
            expected = capability != "default" and not short
            assert executes(STORES, results) == expected, f"{rows}x{n}: {name}"
            assert executes(FENCES, results) == expected, f"{rows}x{n}: {name}: the fence"
            with past_caches_from(NEVER):
                assert not executes(STORES + FENCES, function), f"{rows}x{n}: {name}, in the caches"


# ------------------------------------------------------------------------------------------------- one row, shared out


@each_dtype
def test_wide_rows_shared_among_threads(dtypes):
    for n, rms in ((65536, False), (70001, True), (131072, False)):
        x, weight, bias, dy = draw(9, n, dtypes)
        many = run(x, weight, bias, dy, n, rms=rms, param_dtype=dtypes[1])
        for rows in (1, 3):
            x_, dy_ = x[3 : 3 + rows], dy[3 : 3 + rows]
            torch.set_num_threads(1)
            alone = run(x_, weight, bias, dy_, n, rms=rms, param_dtype=dtypes[1])
            for name in ("y", "dx"):
                assert same_bits(getattr(alone, name), getattr(many, name)[3 : 3 + rows]), (name, n, rows)
            for threads, size in ((2, NEVER), (4, NEVER), (4, 0)):
                torch.set_num_threads(threads)
                with past_caches_from(size):
                    shared = run(x_, weight, bias, dy_, n, rms=rms, param_dtype=dtypes[1])
                assert_same(shared, alone, f"{rows}x{n}, {threads} threads")
            check_few(x_, weight, None if rms else bias, dy_, n, rms, dtypes[1])


# ----------------------------------------------------------------------------------- statistics in one pass, or in two


def unlike_rows(n, dtype):
    """Rows whose first elements say little about the rest, by name."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    rows = {"sorted": torch.randn(n, dtype=F64).sort().values}
    for count, value in itertools.product((1, 64, 128), (0.0, 1e4, -1e4)):
        rows[f"{count} times {value}, then randn"] = torch.randn(n, dtype=F64).index_fill(0, torch.arange(count), value)
    for far in (1e3, 1e6) if dtype != F16 else (1e3,):
        rows[f"{far} first"] = torch.randn(n, dtype=F64).index_fill(0, torch.tensor([0]), far)
        rows[f"randn + {far}"] = torch.randn(n, dtype=F64) + far
    rows["first half 0"] = torch.randn(n, dtype=F64) * (torch.arange(n) >= n // 2)
    rows["small"] = torch.randn(n, dtype=F64) * smallest
    if dtype in (F32, BF16):
        rows["0 first, then 1e18"] = torch.randn(n, dtype=F64) * 1e18 * (torch.arange(n) >= 128)
    for value in (0.3, 1e4, largest, -largest, smallest / 8):
        rows[f"all {value}"] = torch.full((n,), value, dtype=F64)
    rows["largest, either sign"] = torch.randn(n, dtype=F64).sign() * largest
    for bad, at in itertools.product((float("nan"), float("inf"), float("-inf")), (0, n // 2, n - 1)):
        rows[f"{bad} at {at}"] = torch.randn(n, dtype=F64).index_fill(0, torch.tensor([at]), bad)
    return {name: row.to(dtype) for name, row in rows.items()}


@each_op
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=dtype_id)
def test_rows_whose_beginning_is_unlike_the_rest(dtype, rms):
    unit = torch.finfo(F64 if dtype == F64 else F32).eps / 2
    for n in (257, 4096, 10007):
        for name, row in unlike_rows(n, dtype).items():
            x = row.view(1, n)
            y, _ = forward(x, None, None, n, rms=rms)
            by_torch = F.rms_norm(x, (n,), eps=1e-5) if rms else F.layer_norm(x, (n,), eps=1e-5)
            assert (y.isfinite() | ~by_torch.isfinite()).all(), f"{name}, n={n}: y is not finite, torch's is"
            if not x.isfinite().all():
                assert same_bits(y, by_torch), f"{name}, n={n}"
            if not y.isfinite().all():
                continue
            truth = (extended_truth if dtype == F64 else norm_truth)(x, None, None, x, n, 1e-5, rms).y
            # All of a row shares the roundings of its rstd, and of its mean.
            x64 = x.double()
            mean, size = x64.mean() * (not rms), truth.norm() + 1e-300
            rstd = (x64 - mean).square().mean().add(1e-5).rsqrt()
            floor = (
                16 * typical_rounding(dtype) if dtype in (F32, F64) else 1.05 * relative_error(truth.to(dtype), truth)
            )
            floor += 1.05 * unit * float(mean.abs() * rstd * n**0.5 / size)
            factor = 1.05 if dtype in (BF16, F16) else 1.5
            error, other = relative_error(y, truth), relative_error(by_torch, truth)
            assert error <= max(factor * other, floor), f"{name}, n={n}: {error:.3g}, torch's {other:.3g}, {floor:.3g}"


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=dtype_id)
def test_squares_that_overflow(dtype):
    """Then rstd is 0, as torch has it, and y with it; not NaN."""
    largest = torch.finfo(dtype).max
    for n in (7, 257, 4096, 10007):
        for at in (0, n // 2, n - 1):
            row = torch.randn(n, dtype=F64).index_fill(0, torch.tensor([at]), largest * 1e-8)
            x = row.to(dtype).view(1, n)
            y, by_torch = forward(x, None, None, n)[0], F.layer_norm(x, (n,))
            assert (y.isfinite() | ~by_torch.isfinite()).all(), (n, at)


# -------------------------------------------------------------------------------------------------- widths, row counts

#: Around one and two registers, the sums' blocks, the columns that are held, rows of 64 KB.
EDGES = [b + d for b in (128, 256, 1024, 2048, 4096, 8192, 16384) for d in (-1, 0, 1)]


@each_op
@each_dtype
def test_every_width(dtypes, rms):
    for n in [*range(1, 71), *EDGES]:
        for rows in {ROWS[n % 5], ROWS[(n + 2) % 5]} if n < 1000 else (ROWS[n % 5],):
            x, weight, bias, dy = draw(rows, n, dtypes)
            if n % 3 == 0:
                x, dy = laid_out(x, n + 5, 3), laid_out(dy, n + 3, 1)
            check_few(x, weight, None if rms else bias, dy, n, rms, dtypes[1])


@each_dtype
def test_dw_is_the_same_without_dx(dtypes):
    for rows, n in itertools.product(ROWS, (33, 1001, 8192, 8193, 9000, 16385)):
        x, weight, _, dy = draw(rows, n, dtypes)
        _, stats = forward(x, weight, None, n)
        for w in (weight, None):
            full = backward(dy, x, stats, w, n, param_dtype=dtypes[1])
            for needs in ((True, True, False), (False, True, True), (False, True, False)):
                some = backward(dy, x, stats, w, n, param_dtype=dtypes[1], needs=needs)
                for need, got, expected in zip(needs, some, full, strict=True):
                    assert not need or same_bits(got, expected), f"{rows}x{n}, {needs}"


@each_dtype
def test_a_row_does_not_depend_on_the_others(dtypes):
    most = 70
    for n in (1, 33, 128, 1001, 8192):
        x, weight, bias, dy = draw(most, n, dtypes)
        y, stats = forward(x, weight, bias, n)
        dx = backward(dy, x, stats, weight, n, param_dtype=dtypes[1])[0]
        for rows in range(1, most + 1):
            last = slice(most - rows, most)
            some, some_stats = forward(x[last], weight, bias, n)
            assert same_bits(some, y[last]) and same_bits(some_stats, stats[:, last]), f"{rows} of {most} rows, n={n}"
            if rows < 10:
                needs = (True, False, False)
                some = backward(dy[last], x[last], some_stats, weight, n, param_dtype=dtypes[1], needs=needs)[0]
                assert same_bits(some, dx[last]), f"dx of {rows} of {most} rows, n={n}"


# ----------------------------------------------------------------------------------------- NaN, the edges of the memory


@each_op
@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_every_kind_of_nan_in_fp32_parameters(dtype, rms):
    """Rounded to 16 bits by addition alone, 0x7fffffff would become -0, and 0x7f800001 infinity."""
    patterns = [0x7FFFFFFF, 0x7FC00001, 0x7FBFFFFF, 0x7F800001, 0x7FFF8000]
    patterns = torch.tensor(patterns + [p - 2**31 for p in patterns], dtype=torch.int32).view(F32)
    for n in (11, 65, 133, 8203):
        x, clean, bias, dy = draw(2, n, (dtype, F32))
        at = torch.randperm(n)[: len(patterns)]
        bad, others = clean.index_copy(0, at, patterns), torch.ones(n, dtype=torch.bool).index_fill(0, at, False)
        for cast in (False, True):
            for w, b in ((bad, bias), (bad, None), (clean, bad), (None, bad)):
                kept = [None if p is None else torch.where(p.isnan(), torch.ones(()), p) for p in (w, b)]
                y, stats = native.norm_forward(x, w, b, n, 1, 1e-5, rms, True, cast)
                expected, _ = native.norm_forward(x, *kept, n, 1, 1e-5, rms, True, cast)
                assert y[:, at].isnan().all() and same_bits(y[:, others], expected[:, others]), (n, cast)
        assert backward(dy, x, stats, bad, n, rms=rms, param_dtype=F32)[0].isnan().all(), n


def guarded(t, front):
    """A copy of ``t`` that ends where a page ends, or begins where one begins, between pages that cannot be read."""
    page = mmap.PAGESIZE
    size = -(-t.nbytes // page) * page
    area = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for edge in (address, address + page + size):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0):
            raise OSError("mprotect failed")
    offset = page if front else page + size - t.nbytes
    copy = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    return copy.copy_(t)


def read_up_to_the_edges():
    """Every kernel on every input so placed: a read past it ends the process."""
    torch.set_num_threads(1)
    for n, front in itertools.product([*range(1, 34), 63, 65, 129, 1001, 8193], (False, True)):
        rows = ROWS[n % 5]
        for dtypes in DTYPES:
            x, weight, bias, dy = (guarded(t, front) for t in draw(rows, n, dtypes))
            for rms, (w, b) in itertools.product((False, True), ((weight, bias), (None, None))):
                run(x, w, b, dy, n, rms=rms, param_dtype=dtypes[1])
            _, stats = forward(x, weight, None, n)
            for needs in ((False, True, True), (False, True, False), (False, False, True)):
                backward(dy, x, guarded(stats, front), weight, n, param_dtype=dtypes[1], needs=needs)
        for dtypes, p in itertools.product(ADD_DTYPES, (0.0, 0.2)):
            x, residual, weight, bias, dy, dsummed = (guarded(t, front) for t in draw_add(rows, n, dtypes))
            seed = torch.tensor(5) if p else None
            _, summed, stats = add_forward(x, residual, weight, bias, seed, p)
            summed = guarded(summed, front)
            add_backward(dy, dsummed, summed, stats, weight, seed, p, False, dtypes[2], dtypes[0])
    print("read")


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
def test_nothing_is_read_beyond_the_inputs(capability):  # noqa: F811
    paths = [str(Path(fused_norm.__file__).parents[1]), str(Path(__file__).parent)]
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(paths)}
    code = "import test_native_rows; test_native_rows.read_up_to_the_edges()"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr[-3000:]
