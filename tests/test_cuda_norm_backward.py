"""The CUDA backward kernels of the norms: run on the CPU thread by thread, as test_cuda_emulation.py does forward's;
built, as in test_cuda_compile.py; and on a GPU, as test_cuda_native.py does.

Every call runs under two orders of the warps and with copies that arrive as early and as late as they may, and must
give the same bits.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.emulator import (
    CODES,
    KERNELS,
    SHARED_LIMIT,
    BackwardCall,
    BackwardEmulator,
    BackwardResult,
    missing,
)
from test_cuda_compile import ARCHITECTURES, cubin_of, disassembled, kernels, needs_cuobjdump
from torch import Tensor

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.testing import NormResult, assert_norm_close, param_error_limit, relative_error

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: So large that 1 - xhat^2, which backward has of one or two elements, is no difference of nearly equal numbers.
EPS = 0.1

emulated = pytest.mark.skipif(missing() is not None, reason=f"no emulation here: {missing()}")
on_gpu = pytest.mark.skipif(native.unavailable("cuda") is not None, reason=str(native.unavailable("cuda")))

each_op = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
each_dtype = pytest.mark.parametrize("dtype", list(CODES), ids=lambda d: str(d).removeprefix("torch."))

#: Blocks that the rows are shared out to in the emulation, so that a few hundred rows are many.
BLOCKS = 8

#: Shared memory that holds a row and hardly more, of those below.
TIGHT_LIMIT = 24576

#: Shared memory that holds no row, and that of sm_75 and sm_86, which hold less of what comes after it.
SMALL_LIMITS = (4096, 65536, 101376)


# ------------------------------------------------------------------------------------------------------- the emulation


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> BackwardEmulator:
    folder = tmp_path_factory.mktemp("kernels") / "cuda"
    shutil.copytree(KERNELS, folder)
    config = folder / "norm_backward_config.h"
    text, line = config.read_text(), "constexpr int kBackwardBlocks = 256;"
    assert text.count(line) == 1
    config.write_text(text.replace(line, f"constexpr int kBackwardBlocks = {BLOCKS};"))
    return BackwardEmulator(list(CODES), folder)


def statistics(x: Tensor, rms: bool) -> Tensor:
    """The fp64 truth, rounded once."""
    _, stats = reference.norm_forward(x.double(), None, None, x.shape[1], 1, EPS, rms, True)
    return stats.to(FP64 if x.dtype == FP64 else FP32)


def draw(
    rows: int, n: int, dtype: torch.dtype = FP32, weight: torch.dtype | bool = True, groups: int = 0, **options
) -> BackwardCall:
    """A call on random numbers. ``weight``: of x's dtype, none, or of another. ``groups`` 0: one, with a shared weight;
    else each with a weight of its own."""
    x, dy = (torch.randn(rows, n, dtype=FP64) + 0.5).to(dtype), torch.randn(rows, n, dtype=FP64).to(dtype)
    w = None
    if weight:
        w = (0.3 * torch.randn((groups, n) if groups else (n,), dtype=FP64) + 1).to(dtype if weight is True else weight)
    return BackwardCall(dy, x, statistics(x, options.get("rms", False)), w, groups=groups or 1, **options)


def by_torch(call: BackwardCall) -> NormResult:
    """torch's gradients, where torch takes these types; in groups it has none."""
    n, w = call.x.shape[1], call.weight
    if call.params != call.x.dtype or call.groups > 1:
        return NormResult(None)
    x = call.x.clone().requires_grad_()
    w = torch.ones(n, dtype=x.dtype) if w is None else w.clone()
    b = torch.zeros(n, dtype=x.dtype)
    leaves = [x, w.requires_grad_(), *([] if call.rms else [b.requires_grad_()])]
    y = F.rms_norm(x, (n,), w, EPS) if call.rms else F.layer_norm(x, (n,), w, b, EPS)
    return NormResult(y, *torch.autograd.grad(y, leaves, call.dy))


def truth(call: BackwardCall) -> NormResult:
    x, dy, w = (None if t is None else t.double() for t in (call.x, call.dy, call.weight))
    n = x.shape[1]
    _, stats = reference.norm_forward(x, None, None, n, 1, EPS, call.rms, True)
    args = (n, call.groups, call.rms, FP64, True, True, True)
    return NormResult(None, *reference.norm_backward(dy, x, stats, w, *args))


def gradients(result: BackwardResult, call: BackwardCall) -> dict[str, Tensor]:
    return {name: getattr(result, name) for name, need in zip(("dx", "dw", "db"), call.needs, strict=True) if need}


def cancelled(call: BackwardCall, name: str, exact: Tensor) -> float:
    """How much larger than dw or db is what is added up in it: an error measured on a few sums that are nearly 0 says
    nothing."""
    terms = call.dy.double()
    if name == "dw":
        rstd, mean = call.stats.double()[0], 0 if call.rms else call.stats.double()[1]
        terms = terms * ((call.x.double().T - mean) * rstd).T
    size = terms.square().sum().sqrt().item()
    return max(1.0, size / exact.norm().item()) if size else 1.0


def check(call: BackwardCall, result: BackwardResult) -> None:
    """Hold gradients to the fp64 truth by the rules of fused_norm.testing."""
    found, exact, by = gradients(result, call), truth(call), by_torch(call)
    assert_norm_close(NormResult(None, dx=found.pop("dx", None)), exact, by)
    for name, ours in found.items():
        expected, theirs = getattr(exact, name), getattr(by, name)
        theirs = 0.0 if theirs is None else relative_error(theirs, expected)
        limit = param_error_limit(expected, ours.dtype, theirs) * cancelled(call, name, expected)
        error = relative_error(ours, expected)
        assert error <= limit, (
            f"{name}: error {error:.3g} > limit {limit:.3g} ({ours.dtype}, torch's error {theirs:.3g})"
        )


def run_and_check(emulator: BackwardEmulator, *calls: BackwardCall) -> list[BackwardResult]:
    results = emulator.run(*calls)
    for call, result in zip(calls, results, strict=True):
        check(call, result)
    return results


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def run_to_same_bits(emulator: BackwardEmulator, first: BackwardCall, *others: BackwardCall) -> list[BackwardResult]:
    """The first is held to the truth, and what the others compute to it."""
    results = emulator.run(first, *others)
    check(first, results[0])
    for call, result in zip(others, results[1:], strict=True):
        for name, ours in gradients(result, call).items():
            assert_same_bits(ours, getattr(results[0], name))
    return results


#: One element; less than a chunk; ragged; part of a warp; a warp of several chunks a thread; rows of several warps,
#: several at once; a whole block. Of the smallest many rows, in groups: an error measured on one number means little.
SHAPES = (
    (90, 1),
    (90, 2),
    (90, 3),
    (40, 7),
    (9, 63),
    (9, 64),
    (33, 100),
    (70, 16),
    (5, 768),
    (2, 1000),
    (3, 1536),
    (2, 4097),
)


@emulated
@pytest.mark.slow
@each_op
@each_dtype
def test_matches_the_truth(emulator: BackwardEmulator, dtype: torch.dtype, rms: bool) -> None:
    # Of two or three elements less their mean only the first digits are sure.
    shapes = [(m, n) for m, n in SHAPES if rms or dtype.itemsize == 2 or n not in (2, 3)]
    run_and_check(emulator, *(draw(m, n, dtype, groups=3 if n < 4 else 0, rms=rms) for m, n in shapes))


@emulated
@pytest.mark.slow
@each_op
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
def test_an_fp32_weight_beside_two_byte_rows(emulator: BackwardEmulator, dtype: torch.dtype, rms: bool) -> None:
    calls = [draw(20, n, dtype, FP32, rms=rms) for n in (7, 64, 1000)]
    calls += [draw(20, 64, dtype, False, rms=rms, param_dtype=FP32), draw(20, 64, dtype, FP32, groups=4, rms=rms)]
    results = run_and_check(emulator, *calls)
    assert all(r.dx.dtype == dtype and r.dw.dtype == r.db.dtype == FP32 for r in results)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "n", "dtype", "rms"),
    [
        *((1000, 12, FP32, False), (283, 100, FP32, True), (303, 104, BF16, False), (170, 70, FP64, False)),
        (130, 1100, BF16, True),
    ],
)
def test_parts_of_several_tiles(emulator: BackwardEmulator, rows: int, n: int, dtype: torch.dtype, rms: bool) -> None:
    """Each block goes down its rows more than once, and the last has fewer. The ring is filled again: the less memory,
    the sooner."""
    call = draw(rows, n, dtype, rms=rms)
    (r, _) = run_to_same_bits(emulator, call, replace(call, shared_limit=TIGHT_LIMIT))
    assert r.launches == 2 and 1 < r.blocks <= (rows - 1) // r.rows_per_block / 2 + 1


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "n", "dtype", "rms", "cluster"),
    [
        *((5, 16392, BF16, False, 4), (2, 16392, BF16, True, 4), (2, 16392, FP32, False, 4), (2, 8194, FP64, True, 4)),
        *((1, 66000, FP16, True, 16), (1, 66000, FP32, False, 16)),
    ],
)
def test_wide_rows_are_shared_by_a_cluster(
    emulator: BackwardEmulator, rows: int, n: int, dtype: torch.dtype, rms: bool, cluster: int
) -> None:
    """Without clusters, or with rows that are not aligned, it is another kernel and the same bits."""
    call = draw(rows, n, dtype, rms=rms)
    less = replace(call, shared_limit=SMALL_LIMITS[-1])
    small, narrow = replace(call, largest_cluster=cluster - 1), replace(call, offsets=(0, 1, 0, 0, 0, 0))
    results = run_to_same_bits(emulator, call, less, small, narrow)
    assert [r.cluster for r in results] == [cluster, cluster, 1, 1]


@emulated
@pytest.mark.slow
def test_the_widest_cluster_and_wider_rows(emulator: BackwardEmulator) -> None:
    calls = [draw(1, n, BF16, rms=n % 2 == 0) for n in (262144, 262145)]
    assert [r.cluster for r in run_and_check(emulator, *calls)] == [16, 1]


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 768, 4096])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_memory_alignment_and_strides_change_no_bit(emulator: BackwardEmulator, dtype: torch.dtype, n: int) -> None:
    base = draw(2 if n == 4096 else 20, n, dtype)
    per_chunk = 16 // dtype.itemsize
    limits = [replace(base, shared_limit=limit) for limit in SMALL_LIMITS]
    narrow = [replace(base, offsets=tuple(int(i == k) for i in range(6))) for k in range(6)]
    strided = [replace(base, dy_row_stride=n + d, x_row_stride=n + 2 * d) for d in (per_chunk, 1)]
    unaligned = replace(strided[1], offsets=(3, 1, 1, 2, 1, 1), shared_limit=SMALL_LIMITS[0])
    results = run_to_same_bits(emulator, base, *limits, *narrow, *strided, unaligned)
    assert len({r.shared_bytes for r in results[: len(limits) + 1]}) > 1
    assert len({(r.threads_per_row, r.rows_per_block, r.blocks) for r in results}) == 1


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("limit", [SHARED_LIMIT, SMALL_LIMITS[0]], ids=["kept", "read twice"])
@pytest.mark.parametrize("rows", [3, 20], ids=["one part", "several"])
def test_each_gradient_alone(emulator: BackwardEmulator, rows: int, limit: int) -> None:
    for dtype, n, rms in ((FP32, 100, False), (BF16, 200, True)):
        call = draw(rows, n, dtype, rms=rms, shared_limit=limit)
        subsets = [tuple(bool(bits >> i & 1) for i in range(3)) for bits in range(1, 7)]
        results = run_to_same_bits(emulator, call, *(replace(call, needs=needs) for needs in subsets))
        assert results[0].launches == (1 if rows == 3 else 2)
        # stats are not read for db alone.
        (r,) = emulator.run(replace(call, stats=call.stats * math.nan, needs=(False, False, True)))
        assert_same_bits(r.db, results[0].db)


@emulated
@pytest.mark.slow
def test_each_gradient_of_a_cluster_alone(emulator: BackwardEmulator) -> None:
    call = draw(2, 16392, BF16)
    needs = [(True, False, False), (False, True, False), (False, False, True)]
    results = run_to_same_bits(emulator, call, *(replace(call, needs=n) for n in needs))
    assert all(r.cluster == 4 for r in results)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(("n", "groups", "rows"), [(16, 3, 70), (100, 3, 4), (40, BLOCKS + 1, 12), (768, 3, 2)])
def test_groups(emulator: BackwardEmulator, n: int, groups: int, rows: int) -> None:
    grouped = draw(groups * rows, n, groups=groups)
    (a, b) = run_and_check(emulator, grouped, replace(grouped, weight=grouped.weight[0]))
    assert_same_bits(a.dx[:rows], b.dx[:rows])
    assert_same_bits(a.dw, b.dw)
    assert not torch.equal(a.dx[rows:], b.dx[rows:])


@emulated
@pytest.mark.slow
def test_groups_of_wide_rows(emulator: BackwardEmulator) -> None:
    """More groups than blocks: a cluster has several rows of each."""
    (r,) = run_and_check(emulator, draw(10, 16392, BF16, groups=5))
    assert r.launches == 1 and r.cluster == 4


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 100, 768, 2052])
def test_nan_and_inf_stay_in_their_row(emulator: BackwardEmulator, n: int) -> None:
    clean = draw(5, n)
    x, dy = clean.x.clone(), clean.dy.clone()
    x[1, n // 2], x[2, n - 1], x[4, 0] = math.nan, math.inf, -math.inf
    dy[1, 0], dy[3, n - 1] = math.inf, math.nan
    bad_x, bad_dy = replace(clean, x=x, stats=statistics(x, False)), replace(clean, dy=dy)
    (good,) = emulator.run(clean)
    for call, rows in ((bad_x, [0, 3]), (bad_dy, [0, 2, 4])):
        kept, read_twice = emulator.run(call, replace(call, shared_limit=4096))
        assert_same_bits(kept.dx[rows], good.dx[rows])
        expected = truth(call)
        for name in ("dx", "dw", "db"):
            assert_same_bits(getattr(kept, name), getattr(read_twice, name))
            assert torch.equal(getattr(kept, name).isfinite(), getattr(expected, name).isfinite()), name


@emulated
@pytest.mark.slow
@each_dtype
def test_one_element_and_constant_rows_give_exact_zeros(emulator: BackwardEmulator, dtype: torch.dtype) -> None:
    constant = draw(4, 100, dtype)
    x = torch.full((4, 100), 3.3).to(dtype)
    constant = replace(constant, x=x, stats=statistics(x, False))
    (one, rows) = emulator.run(draw(300, 1, dtype), constant)
    assert one.dx.eq(0).all() and one.dw.eq(0).all()
    assert rows.dw.eq(0).all() and rows.dx.ne(0).any()


@emulated
@pytest.mark.slow
def test_a_row_does_not_depend_on_the_rows_beside_it(emulator: BackwardEmulator) -> None:
    for n, dtype in ((3, FP32), (16, BF16), (100, FP32), (768, BF16)):
        many = draw(37, n, dtype)
        alone = [replace(many, **{k: getattr(many, k)[r : r + 1] for k in ("x", "dy")}) for r in (0, 36)]
        alone = [replace(c, stats=many.stats[:, r : r + 1]) for c, r in zip(alone, (0, 36), strict=True)]
        first, *others = emulator.run(many, *alone)
        for one, r in zip(others, (0, 36), strict=True):
            assert_same_bits(one.dx[0], first.dx[r])


@emulated
@pytest.mark.slow
def test_an_expanded_gradient(emulator: BackwardEmulator) -> None:
    """Row stride 0, as the gradient of a mean over rows has."""
    call = draw(20, 100)
    dy = call.dy[:1].expand(20, 100)
    run_to_same_bits(emulator, replace(call, dy=dy.clone()), replace(call, dy=dy, dy_row_stride=0))


@emulated
@pytest.mark.slow
def test_rows_more_than_two_to_the_31_elements_apart(emulator: BackwardEmulator) -> None:
    for d, limit in ((8, SHARED_LIMIT), (9, SHARED_LIMIT), (8, 4096)):
        strides = {"dy_row_stride": 2**31 + d, "x_row_stride": 2**31 + d, "shared_limit": limit}
        run_and_check(emulator, draw(2, 64, BF16, **strides), draw(2, 4096, BF16, **strides))


# ------------------------------------------------------------------------------------------------------------- as built


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(architecture: str) -> None:
    found = kernels(cubin_of(architecture, "norm_backward"))
    # 4 types: element by element, layer and rms alone and in clusters; the plain kernel; and the sum of the parts.
    assert len(found) == 4 * (5 + 1 + 1)
    for kernel in found:
        assert kernel.stack == kernel.local == 0, kernel
        assert kernel.registers <= 128, kernel  # two blocks of 256 threads fill a multiprocessor


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_rows_move_16_bytes_at_a_time(architecture: str) -> None:
    seen = 0
    for symbol, code in disassembled(cubin_of(architecture, "norm_backward")):
        assert not re.search(r"\b(LDL|STL)\b", code), symbol  # no register array in local memory
        if "norm_backward_kernel" not in symbol:
            continue
        vector = re.search(r"Lb[01]ELb([01])ELb[01]EE", symbol)[1] == "1"
        copies = re.findall(r"\bLDGSTS\.E([.A-Z0-9]*)", code)
        stores = re.findall(r"\bSTG\.E([.A-Z0-9]*)", code)
        wide = [suffix for suffix in copies + stores if ".128" in suffix]
        if not vector:
            assert not wide, symbol
            continue
        seen += 1
        assert copies and all(".128" in suffix for suffix in copies), symbol
        # A chunk of dx for each that a thread holds. dw and db are narrow where several rows are added up.
        held = 4 if "half" in symbol or "bfloat" in symbol else 8
        assert sum(".128" in suffix for suffix in stores) >= held, symbol
    assert seen == 4 * 4


# --------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.skipif(native._cuda_missing is not None, reason=str(native._cuda_missing))
def test_the_operator_has_a_cuda_kernel() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_norm::norm_backward", "CUDA")


#: In blocks of several rows, element by element, a row a block, by clusters, wider than any.
GPU_SHAPES = ((50, 1), (9, 63), (33, 100), (4096, 768), (300, 4097), (512, 8192), (70, 16384), (40, 65536), (9, 262144))
GPU_SHAPES += ((3, 262145), (2, 300000), (1 << 18, 3))


def on_the_gpu(call: BackwardCall) -> BackwardResult:
    """The operator's results in the place of the emulation's."""
    dy, x, stats, w = (None if t is None else t.to("cuda") for t in (call.dy, call.x, call.stats, call.weight))
    n = x.shape[1]
    found = native.norm_backward(dy, x, stats, w, n, call.groups, call.rms, call.params, *call.needs)
    return BackwardResult(*(t.cpu() for t in found), 0, 0, 0, 0, 0, 0)


@pytest.mark.gpu
@on_gpu
@each_op
@each_dtype
def test_matches_the_truth_on_a_gpu(dtype: torch.dtype, rms: bool, poisoned_empty: None) -> None:
    for rows, n in GPU_SHAPES:
        call = draw(rows, n, dtype, rms=rms)
        result = on_the_gpu(call)
        check(call, result)
        again = on_the_gpu(call)
        for name in ("dx", "dw", "db"):
            assert_same_bits(getattr(result, name), getattr(again, name))


@pytest.mark.gpu
@on_gpu
def test_more_groups_than_a_grid_is_high() -> None:
    call = draw(140000, 8, groups=70000)
    check(call, on_the_gpu(call))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("n", [64, 768, 16384, 65536])
def test_alignment_and_strides_change_no_bit_on_a_gpu(n: int) -> None:
    for dtype in (FP32, BF16):
        call = draw(30, n, dtype)
        dy, x, stats, w = (t.to("cuda") for t in (call.dy, call.x, call.stats, call.weight))

        def run(dy: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
            return native.norm_backward(dy, x, stats, w, n, 1, False, dtype, True, True, True)  # noqa: B023

        def moved(t: Tensor) -> Tensor:
            return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

        def strided(t: Tensor, gap: int) -> Tensor:
            return t.new_full((t.shape[0], n + gap), math.nan)[:, :n].copy_(t)

        first = run(dy, x, w)
        for args in ((moved(dy), x, w), (dy, moved(x), w), (dy, x, moved(w)), (strided(dy, 16), strided(x, 1), w)):
            for ours, expected in zip(run(*args), first, strict=True):
                assert_same_bits(ours, expected)


@pytest.mark.gpu
@on_gpu
def test_errors_name_both_values() -> None:
    x, stats, w = torch.randn(4, 64, device="cuda"), torch.ones(2, 4, device="cuda"), torch.ones(64, device="cuda")
    good = {"dy": x, "x": x, "stats": stats, "weight": w, "n": 64, "groups": 1, "rms": False, "param_dtype": FP32}
    cases = [
        ({"dy": x[:3]}, r"dy has shape \(3, 64\), x has \(4, 64\)"),
        ({"dy": x.bfloat16()}, "dy has dtype BFloat16, x has Float"),
        ({"dy": x.cpu()}, "dy is on another device, x is on cuda:0"),
        ({"stats": stats[:1]}, r"stats has shape \(1, 4\).*expected \(2, 4\)"),
        ({"weight": w[:63]}, "weight has 63 elements, expected n = 64"),
        ({"param_dtype": BF16}, "param_dtype is BFloat16, x has Float"),
        ({"groups": 3}, "4 rows, which do not divide into 3 groups"),
    ]
    for changes, message in cases:
        with pytest.raises(RuntimeError, match=message):
            native.norm_backward(*(good | changes).values(), True, True, True)
