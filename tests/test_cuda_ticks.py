"""The CUDA kernels of the ticks loss: emulated on the CPU under sanitizers, as the norms' (test_cuda_emulation.py) are;
built, as in test_cuda_compile.py; and on a GPU, as in test_cuda_native.py.

The tests marked ``small`` also run under compute-sanitizer (``make gpu``).
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cuda_emulation.emulator import KERNELS, EmulationError, TicksCall, TicksEmulator, TicksResult, missing
from test_cuda_compile import ARCHITECTURES, cubin_of, disassembled, kernels, needs_cuobjdump
from torch import Tensor

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.testing import error_limit, relative_error, typical_rounding

emulated = pytest.mark.skipif(missing() is not None, reason=f"no emulation here: {missing()}")
on_gpu = pytest.mark.skipif(native.unavailable("cuda") is not None, reason=str(native.unavailable("cuda")))

FP64, FP32, BF16, FP16 = DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
IGNORE = -100

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

#: (rows, V): one class; less than a chunk; ragged; part of a warp; several rows a block and the last block not full; a
#: block; ragged blocks; backward in several blocks a row (above 32 KB).
SHAPES = ((40, 1), (40, 2), (30, 7), (9, 63), (70, 16), (33, 100), (6, 768), (33, 1000), (5, 1001), (3, 4099))
SHAPES += ((2, 20008),)


#: The most that the issue allows of a gradient, as a relative L2 error, whatever the eager formula's is.
MOST = {FP64: 1e-10, FP32: 5e-6, BF16: 1e-2, FP16: 2e-3}


def low(dtype: torch.dtype) -> bool:
    return dtype in (BF16, FP16)


# ------------------------------------------------------------------------------------------------- calls and the truth


def draw(
    rows: int,
    classes: int,
    dtype: torch.dtype = FP32,
    soft: torch.dtype | None = None,
    weight: torch.dtype | None = None,
    **options,
) -> TicksCall:
    """A forward call on random numbers; in the first rows the target's logit stands out, and one row is ignored."""
    z = 3 * torch.randn(rows, classes, dtype=FP64)
    if soft is None:
        target = torch.randint(classes, (rows,))
        stands_out = slice(0, rows // 3)
        z[stands_out, :].scatter_add_(1, target[stands_out, None], torch.full((rows // 3, 1), 14.0, dtype=FP64))
        if rows > 2:
            target[rows // 2] = options.get("ignore_index", IGNORE)
    else:
        target = torch.softmax(2 * torch.randn(rows, classes, dtype=FP64), 1).to(soft)
        target[0] = 0
        target[0, z[0].argmax()] = 1
    if weight is not None:
        options["weight"] = (torch.rand(classes, dtype=FP64) + 0.2).to(weight)
        options["weight"][classes // 2] = 0
    return TicksCall(z.to(dtype), target, **options)


def arguments(call: TicksCall) -> tuple:
    """A call's arguments after z, target and weight, as the contract has them."""
    return call.ignore_index, call.smoothing, call.ce, call.ticks, call.softcap


def eager(call: TicksCall, dtype: torch.dtype, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """dz and dtarget of the formula as one writes it, in ``dtype``, by autograd."""
    z = call.z.to(dtype).requires_grad_()
    target = call.target.to(dtype).requires_grad_() if call.soft else call.target
    capped = call.softcap * torch.tanh(z / call.softcap) if call.softcap else z
    logp, keep = torch.log_softmax(capped, 1), torch.ones(len(z), dtype=torch.bool)
    if call.soft:
        a = target
    else:
        keep = target != call.ignore_index
        a = torch.zeros_like(z).scatter(1, torch.where(keep, target, 0)[:, None], 1)
    a = a * (1 - call.smoothing) + call.smoothing / z.shape[1]
    a = a if call.weight is None else a * call.weight.to(dtype)
    loss = (a * (call.ticks * logp.exp() - (call.ce + call.ticks) * logp)).sum(1)
    out = torch.where(keep, loss, 0) * grad.to(dtype)
    if grad_lse is not None:
        out = out + torch.where(keep, torch.logsumexp(capped, 1), 0) * grad_lse.to(dtype)
    inputs = (z, target) if call.soft else (z,)
    return (*torch.autograd.grad(out.sum(), inputs), None)[:2]


def with_gradients(call: TicksCall, forward: TicksResult, lse: bool = False, **options) -> TicksCall:
    """The backward call that follows ``call``, with random upstream gradients."""
    grad, grad_lse = (torch.randn(len(call.z), dtype=call.acc) for _ in range(2))
    options = {"grad": grad, "grad_lse": grad_lse if lse else None, "need_dtarget": call.soft} | options
    return replace(call, stats=forward.second, **options)


def assert_close(name: str, ours: Tensor, truth: Tensor, theirs: Tensor) -> None:
    """By the rule of fused_norm.testing, and the issue's own limits."""
    dtype = ours.dtype
    limit = error_limit(truth, dtype, relative_error(theirs, truth))
    # As in cases.py: of fp64 the truth has roundings too, and of a few rows in fp32 the error is mostly that of each
    # one's own others, so that the ratio to another's is that of a few random numbers.
    if dtype == FP64 or (dtype == FP32 and len(ours) < 16):
        limit = max(limit, 16 * typical_rounding(dtype))
    limit = min(limit, MOST[dtype])
    error = relative_error(ours, truth)
    assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g} ({dtype})"


def fp64(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


def check_forward(call: TicksCall, loss: Tensor, stats: Tensor) -> None:
    truth, stats_truth = reference.ticks_forward(*map(fp64, (call.z, call.target, call.weight)), *arguments(call))
    assert loss.dtype == stats.dtype == call.acc and stats.shape == stats_truth.shape
    eps = torch.finfo(call.acc).eps
    assert relative_error(loss, truth) < 8 * eps, f"loss: error {relative_error(loss, truth):.3g}"
    for i, (ours, row) in enumerate(zip(stats, stats_truth, strict=True)):
        # Each row's own: q_t and others must be right where they are small too.
        error = ((ours.double() - row).abs() / row.abs().clamp_min(1e-300)).nan_to_num(0).max().item()
        # The largest, of about 40, is as exact as the softcap's tanh; others shares that absolute error.
        assert error < (8 if i == 0 else 400) * eps, f"stats[{i}]: error {error:.3g}"


def check_backward(call: TicksCall, dz: Tensor | None, dtarget: Tensor | None) -> None:
    z, target, weight = map(fp64, (call.z, call.target, call.weight))
    _, stats = reference.ticks_forward(z, target, weight, *arguments(call))
    grads = fp64(call.grad), fp64(call.grad_lse)
    truth = reference.ticks_backward(*grads, z, target, stats, weight, *arguments(call), True, call.soft, False)
    theirs = eager(call, call.z.dtype, call.grad, call.grad_lse)
    if dz is not None:
        assert dz.dtype == call.z.dtype and dz.shape == call.z.shape
        if truth[0].any():
            assert_close("dz", dz, truth[0], theirs[0])
        else:  # of a single class nothing can be learned
            assert not dz.any()
    if dtarget is not None:
        assert dtarget.dtype == call.target.dtype and dtarget.shape == call.target.shape
        assert_close("dtarget", dtarget, truth[1], theirs[1])


def run_and_check(
    emulator: TicksEmulator, *calls: TicksCall, lse: bool = False
) -> list[tuple[TicksResult, TicksResult]]:
    """Forward and backward of the calls, each held to the truth."""
    forward = emulator.run(*calls)
    gradients = [with_gradients(c, f, lse) for c, f in zip(calls, forward, strict=True)]
    backward = emulator.run(*gradients)
    for call, f, with_gradient, b in zip(calls, forward, gradients, backward, strict=True):
        check_forward(call, f.first, f.second)
        check_backward(with_gradient, b.first, b.second if call.soft else None)
    return list(zip(forward, backward, strict=True))


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------- emulated: what it computes


@pytest.fixture(scope="session")
def emulator() -> TicksEmulator:
    return TicksEmulator(DTYPES)


@emulated
@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_matches_the_truth(emulator: TicksEmulator, dtype: torch.dtype, general: bool) -> None:
    options = {"smoothing": 0.1, "weight": dtype} if general else {}
    results = run_and_check(emulator, *(draw(m, v, dtype, **options) for m, v in SHAPES))
    # The shapes reach every kernel: by 16 bytes, element by element, several blocks a row.
    assert {f.vector for f, _ in results} == {True, False}
    assert {b.vector for _, b in results} == ({True, False} if general else {True})
    assert any(b.blocks > m for (_, b), (m, _) in zip(results, SHAPES, strict=True))


@emulated
@pytest.mark.slow
@each_dtype
def test_options_in_every_combination(emulator: TicksEmulator, dtype: torch.dtype) -> None:
    others = (dtype, FP32) if low(dtype) else (dtype,)
    combinations = itertools.product((None, *others), (None, *others), (0.0, 0.2), (0.0, 5.0), (False, True))
    for i, (soft, weight, smoothing, softcap, lse) in enumerate(combinations):
        classes = (7, 64, 301)[i % 3]
        ce, ticks = ((1.0, 0.001), (0.0, 1.0), (1.0, 0.0), (0.7, 0.4))[i % 4]
        call = draw(7, classes, dtype, soft, weight, smoothing=smoothing, softcap=softcap, ce=ce, ticks=ticks)
        run_and_check(emulator, call, lse=lse)


@emulated
@pytest.mark.slow
def test_a_well_predicted_token_keeps_its_digits(emulator: TicksEmulator) -> None:
    """1 - p of 1e-3 to 1e-30, of one-hot soft targets as well; also where two logits tie."""
    tops = torch.tensor([0.0, 1.0, 8.0, 16.0, 30.0, 69.0])
    for classes in (4, 100, 1024):
        z = torch.zeros(len(tops), classes)
        target = torch.arange(len(tops)) * 7 % classes
        z.scatter_(1, target[:, None], tops[:, None])
        hard = TicksCall(z, target)
        soft = TicksCall(z, torch.nn.functional.one_hot(target, classes).float())
        for call, (f, b) in zip((hard, soft), run_and_check(emulator, hard, soft), strict=True):
            others = (classes - 1) * torch.exp(-tops.double())
            q = others / (1 + others)
            torch.testing.assert_close(f.second[-1].double(), q, rtol=2e-6, atol=0)
            torch.testing.assert_close(f.first.double(), 1 - q + 2 * torch.log1p(others), rtol=2e-6, atol=0)
            # ce = ticks = 1: at the target -(1 + q)*q
            call = with_gradients(call, f, grad=torch.ones(len(z)), need_dtarget=False)
            (b,) = emulator.run(call)
            at_target = b.first.double().gather(1, target[:, None]).squeeze(1)
            torch.testing.assert_close(at_target, -(1 + q) * q, rtol=5e-6, atol=0)


GENERAL = {"plain": {}, "smoothing": {"smoothing": 0.1}}
each_loss = pytest.mark.parametrize("options", GENERAL.values(), ids=GENERAL)


@emulated
@pytest.mark.slow
@each_loss
@pytest.mark.parametrize("classes", [7, 64, 300])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_ignored_rows_are_zero_and_not_read(
    emulator: TicksEmulator, classes: int, inplace: bool, options: dict[str, float]
) -> None:
    """The driver forbids reading them, but where they are written over."""
    call = draw(12, classes, ignore_index=3, **options)
    call.target[[0, 5, 11]] = 3
    kept = call.target != 3
    (forward,) = emulator.run(call)
    assert forward.first[~kept].eq(0).all() and forward.second[:, ~kept].eq(0).all()
    backward = with_gradients(call, forward, lse=True, inplace=inplace)
    bad = replace(backward, z=torch.where(kept[:, None], call.z, math.nan))
    for run in emulator.run(backward, bad):
        assert run.first[~kept].eq(0).all() and run.first[kept].ne(0).any(1).all()
        check_backward(backward, run.first, None)


@emulated
@pytest.mark.slow
@each_loss
@pytest.mark.parametrize("bad", [-1, 100, 101, 2**31, 2**32 + 5, -(2**40), 2**62])
def test_a_target_out_of_range_is_nan_and_touches_nothing(
    emulator: TicksEmulator, bad: int, options: dict[str, float]
) -> None:
    call = draw(6, 100, weight=FP32, **options)
    clean, wrong = call, replace(call, target=call.target.clone())
    wrong.target[2] = bad
    others = [0, 1, 3, 4, 5]
    f, g = emulator.run(clean, wrong)
    assert g.first[2].isnan() and g.second[:, 2].isnan().all()
    assert_same_bits(f.first[others], g.first[others])
    grad = torch.randn(6)
    # The statistics of a good target, too: backward looks for itself.
    for stats in (f, g):
        b, c = emulator.run(with_gradients(clean, f, grad=grad), with_gradients(wrong, stats, grad=grad))
        assert c.first[2].isnan().all()
        assert_same_bits(b.first[others], c.first[others])


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("classes", [8, 100, 1001])
def test_infinities_and_nan(emulator: TicksEmulator, classes: int) -> None:
    inf, lowest = math.inf, torch.finfo(FP32).min
    z = torch.randn(9, classes)
    target = torch.full((9,), classes - 1)
    z[0, : classes - 2] = -inf  # two classes are left, the others masked
    z[1, : classes - 1] = -inf  # the target alone is left
    z[2, :-1] = lowest
    z[3] = lowest
    z[4, -1] = -inf  # the target itself
    z[5] = -inf
    z[6, 1] = inf
    z[7, classes // 2] = math.nan
    hard = TicksCall(z, target, ticks=0.5)
    soft = torch.zeros(9, classes)
    soft[:, -1] = 0.75
    soft[[2, 3, 7, 8], 0] = 0.25
    soft = TicksCall(z, soft, ticks=0.5, weight=torch.ones(classes))
    for call, f in zip((hard, soft), emulator.run(hard, soft), strict=True):
        truth, _ = reference.ticks_forward(z.double(), fp64(call.target), fp64(call.weight), *arguments(call))
        torch.testing.assert_close(f.first.double(), truth, rtol=1e-5, atol=0, equal_nan=True)
        assert f.first[[5, 6, 7]].isnan().all() and f.first[4] == inf
        (b,) = emulator.run(with_gradients(call, f, grad=torch.ones(9)))
        assert b.first[[5, 6, 7]].isnan().all()
        fine = [0, 1, 2, 3, 4, 8]
        assert b.first[fine].isfinite().all() and b.first[0, : classes - 2].eq(0).all()
        assert b.second.shape[0] == (9 if call.soft else 0)
        assert_same_bits(b.first[1, :-1], torch.zeros(classes - 1))
    # A masked target that has no weight counts for nothing.
    weight = torch.ones(classes)
    weight[-1] = 0
    (f,) = emulator.run(replace(hard, weight=weight))
    assert f.first[:5].eq(0).all() and f.first[8] == 0 and f.first[5:8].isnan().all()


@emulated
@pytest.mark.slow
def test_a_saturated_softcap_keeps_its_slope(emulator: TicksEmulator) -> None:
    """1 - tanh^2 of logits of many times the softcap is small and not 0."""
    z = torch.linspace(-60, 60, 97)[None].repeat(2, 1)
    call = TicksCall(z, torch.tensor([3, 90]), softcap=4.0)
    (f,) = emulator.run(call)
    backward = with_gradients(call, f)
    (b,) = emulator.run(backward)
    # By autograd's own 1 - tanh^2 nothing would be left of it even in fp64: of 4u/(1 + u)^2 all is.
    u = torch.exp(-2 * z.double().abs() / 4)
    uncapped = replace(call, z=4 * torch.tanh(z.double() / 4), softcap=0.0)
    _, stats = reference.ticks_forward(uncapped.z, uncapped.target, None, *arguments(uncapped))
    no_lse = (fp64(backward.grad), None)
    dz, _ = reference.ticks_backward(
        *no_lse, uncapped.z, call.target, stats, None, *arguments(uncapped), True, False, False
    )
    torch.testing.assert_close(b.first.double(), dz * 4 * u / (1 + u).square(), rtol=2e-5, atol=0)


# --------------------------------------------------------------------------- emulated: what its bits may not depend on


def layouts(call: TicksCall) -> list[TicksCall]:
    """The call with its operands anywhere in memory."""
    v, k = call.z.shape[1], 16 // call.z.element_size()
    moved = [replace(call, offsets=tuple(int(i == place) for i in range(5))) for place in range(5)]
    moved += [replace(call, offsets=(k - 1, k - 1, k - 1, k - 1, k - 1))]
    strides = [(v + 2 * k, None), (v + 1, None), (None, v + 3), (v + 3, v + 3)]
    return moved + [replace(call, z_row_stride=a, target_row_stride=b) for a, b in strides]


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [5, 64, 768, 8201])
@pytest.mark.parametrize("kind", ["plain", "soft", "soft32"])
def test_alignment_and_strides_change_no_bit(
    emulator: TicksEmulator, dtype: torch.dtype, classes: int, kind: str
) -> None:
    if kind == "plain":
        call = draw(3, classes, dtype, softcap=10.0)
    elif kind == "soft" or not low(dtype):
        call = draw(3, classes, dtype, soft=dtype, weight=dtype, smoothing=0.1)
    else:
        call = draw(3, classes, dtype, soft=FP32, weight=FP32)
    first, *rest = emulator.run(call, *layouts(call))
    for r in rest:
        assert_same_bits(r.first, first.first)
        assert_same_bits(r.second, first.second)
    backward = with_gradients(call, first, lse=True)
    written_over = [replace(c, inplace=True) for c in layouts(backward)]
    parts = [replace(backward, need_dz=False)] if call.soft else []
    first, *rest = emulator.run(backward, *layouts(backward), *written_over, *parts)
    for r in rest:
        if r.first.numel():
            assert_same_bits(r.first, first.first)
        assert_same_bits(r.second, first.second)
    if kind == "plain":
        # Odd lengths too move by 16 bytes, wherever z and dz pass such a boundary together.
        assert first.vector and all(r.vector for r in rest[len(layouts(call)) :])
    elif dtype != BF16 or kind == "soft":
        assert first.vector == (classes % (16 // dtype.itemsize) == 0)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [3, 16, 100, 1000])
def test_a_row_does_not_depend_on_the_rows_beside_it(emulator: TicksEmulator, dtype: torch.dtype, classes: int) -> None:
    many = draw(37, classes, dtype)
    (all_rows,) = emulator.run(many)
    gradients = with_gradients(many, all_rows)
    (all_dz,) = emulator.run(gradients)
    for r in (0, 17, 36):
        one = slice(r, r + 1)
        alone = replace(many, z=many.z[one], target=many.target[one])
        (f,) = emulator.run(alone)
        assert_same_bits(f.first, all_rows.first[one])
        assert_same_bits(f.second, all_rows.second[:, one])
        (b,) = emulator.run(replace(alone, grad=gradients.grad[one], stats=f.second))
        assert_same_bits(b.first, all_dz.first[one])


@emulated
@pytest.mark.slow
def test_gradients_of_any_stride(emulator: TicksEmulator) -> None:
    call = draw(5, 100)
    (f,) = emulator.run(call)
    grad, lse = torch.randn(10)[::2], torch.randn(15)[::3]
    strided = replace(call, grad=grad, grad_lse=lse, stats=f.second)
    dense = replace(strided, grad=grad.clone(), grad_lse=lse.clone())
    one = replace(strided, grad=grad[:1].expand(5), grad_lse=lse[:1].expand(5))
    repeated = replace(strided, grad=grad[:1].repeat(5), grad_lse=lse[:1].repeat(5))
    a, b, c, d = emulator.run(strided, dense, one, repeated)
    assert_same_bits(a.first, b.first)
    assert_same_bits(c.first, d.first)


@emulated
@pytest.mark.slow
def test_rows_more_than_two_to_the_31_elements_apart(emulator: TicksEmulator) -> None:
    for stride in (2**31 + 8, 2**31 + 9):
        call = draw(2, 64, BF16, z_row_stride=stride)
        run_and_check(emulator, call)
        (f,) = emulator.run(call)
        fresh = with_gradients(call, f)
        a, b = emulator.run(fresh, replace(fresh, inplace=True))
        assert_same_bits(a.first, b.first)
    call = draw(2, 64, BF16, soft=BF16, target_row_stride=2**31 + 8)
    run_and_check(emulator, call)


# -------------------------------------------------------------------------------- emulated: bugs that it must catch


@dataclass(frozen=True)
class Bug:
    """A change of one file of the kernels, the call that meets it, and what the report says (None: wrong numbers)."""

    file: str
    old: str
    new: str
    call: Callable[[], TicksCall]
    report: str | None = None
    dtype: torch.dtype = FP32
    inplace: bool = False
    lse: bool = False


def stands_out() -> TicksCall:
    z = torch.zeros(3, 64)
    z[:, 5] = 16.0
    return TicksCall(z, torch.full((3,), 5))


BUGS = {
    "the largest counted among the others": Bug(
        "ticks_forward.cuh", "        v[j] = -infinity<A>();\n", "", lambda: draw(3, 100)
    ),
    "1 - p by subtraction": Bug(
        "ticks_forward.cuh", "gap == 0 ? others / total : 1 - p", "1 - p", lambda: replace(stands_out(), ticks=1.0)
    ),
    "the former largest forgotten": Bug(
        "ticks_forward.cuh",
        "times(plus(seen.others, A(1)), factor)",
        "times(seen.others, factor)",
        lambda: draw(3, 100),
    ),
    "the former largest's mass forgotten": Bug(
        "ticks_forward.cuh",
        "    seen.mass = plus(seen.mass, seen.top_mass);\n",
        "",
        lambda: draw(3, 100, smoothing=0.3),
    ),
    "gaps that stay where they were": Bug(
        "ticks_forward.cuh",
        "if (seen.mass != 0) seen.mass_gaps",
        "if (seen.mass == 0) seen.mass_gaps",
        lambda: draw(3, 100, soft=FP32),
    ),
    "a removed barrier": Bug(
        "ticks_forward.cuh",
        "  __syncthreads();\n",
        "",
        lambda: draw(1, 1000),
        "depends on the order in which warps run",
    ),
    "lanes without a row leave before the shuffle": Bug(
        "ticks_forward.cuh",
        "  const bool live = row < shape.rows;\n",
        "  const bool live = row < shape.rows;\n  if (!live) return;\n",
        lambda: draw(3, 16),
        "12 of 32 lanes are at a shuffle",
    ),
    "an ignored row is read": Bug(
        "ticks_forward.cuh",
        "live && target.valid ? all_chunks : 0",
        "live ? all_chunks : 0",
        lambda: draw(3, 64),
        "use-after-poison",
    ),
    "a target out of range is followed": Bug(
        "ticks.cuh",
        "valid = !ignored && given >= 0 && given < shape.classes;",
        "valid = !ignored;",
        lambda: replace(draw(3, 64), target=torch.tensor([1, 2, 64])),
        "heap-buffer-overflow",
    ),
    "a read past the row's end": Bug(
        "common.cuh",
        "if (present<VECTOR, K>(c, j, n)) v = p[j];",
        "v = p[j];",
        lambda: draw(1, 99),
        "heap-buffer-overflow",
    ),
    "an absent element of a smoothed row counts": Bug(
        "ticks_forward.cuh",
        "if (!present<VECTOR, K>(c, j, shape.classes)) a[j] = 0;",
        "",
        lambda: draw(2, 99, smoothing=0.3),
    ),
    "a 16-byte access to a misaligned row": Bug(
        "ticks_forward.cuh",
        "t.classes % kPerChunk<T> == 0 && is_aligned",
        "t.classes % kPerChunk<T> == 0 || is_aligned",
        lambda: draw(2, 64, offsets=(1, 0, 0, 0, 0)),
        "misaligned address",
    ),
    "backward takes a boundary that dz does not share": Bug(
        "ticks_backward.cuh",
        "bool vector = with_z(a.dz, a.dz_row_stride, t.dtype);",
        "bool vector = true;",
        lambda: draw(2, 64, offsets=(0, 0, 0, 1, 0)),
        "misaligned address",
    ),
    "the elements before the boundary are left out": Bug(
        "ticks_backward.cuh",
        "i < head + (classes - tail)",
        "i + head < head + (classes - tail)",
        lambda: draw(2, 99, offsets=(1, 0, 0, 1, 0)),
    ),
    "the last block of a row goes too far": Bug(
        "ticks_backward.cuh", "last < chunks ? last : chunks", "last", lambda: draw(2, 8196), "heap-buffer-overflow"
    ),
    "rows written as far apart as they are read": Bug(
        "ticks_backward.cuh",
        "dz + m * gradients.dz_row_stride",
        "dz + m * shape.classes",
        lambda: draw(4, 60, z_row_stride=64),
        "a write between two rows",
        inplace=True,
    ),
    "the slope of the softcap forgotten": Bug(
        "ticks_backward.cuh",
        "multiply_add(e, row.lse_scale, at_target) : times(e, scale);\n          if (CAPPED)",
        "multiply_add(e, row.lse_scale, at_target) : times(e, scale);\n          if (!CAPPED)",
        lambda: draw(3, 64, softcap=3.0),
    ),
    "a block of a wide row is left out": Bug(
        "ticks_backward.cuh",
        "blockIdx.x % gradients.blocks_per_row",
        "blockIdx.x % gradients.blocks_per_row / 2",
        lambda: draw(2, 20000),
    ),
    "the gradient of lse left out at the target": Bug(
        "ticks_backward.cuh",
        "multiply_add(e, row.lse_scale, at_target)",
        "at_target",
        lambda: draw(3, 8),
        lse=True,
    ),
    "a fp32 target read as bf16": Bug(
        "ticks.cuh",
        "          a.target_dtype != a.dtype,",
        "          false,",
        lambda: draw(3, 64, BF16, soft=FP32),
        dtype=BF16,
    ),
    "a 32-bit row offset": Bug(
        "ticks_backward.cuh",
        "z + m * shape.z_row_stride;\n  T* const",
        "z + static_cast<int>(m * shape.z_row_stride);\n  T* const",
        lambda: draw(2, 64, z_row_stride=2**31 + 8),
        "SEGV",
    ),
}


def planted(bug: Bug, folder: Path) -> Path:
    """A copy of the kernels' source with the bug in it."""
    copy = folder / "cuda"
    shutil.copytree(KERNELS, copy)
    text = (copy / bug.file).read_text()
    assert text.count(bug.old) == 1, f"{bug.file} holds {text.count(bug.old)} times: {bug.old}"
    (copy / bug.file).write_text(text.replace(bug.old, bug.new))
    return copy


def try_bug(emulator: TicksEmulator, bug: Bug, call: TicksCall) -> None:
    """Forward and backward of the call, held to the truth unless the target is out of range."""
    (f,) = emulator.run(call)
    in_range = call.soft or (call.target[call.target != IGNORE] < call.z.shape[1]).all()
    backward = with_gradients(call, f, bug.lse, inplace=bug.inplace)
    (b,) = emulator.run(backward)
    if in_range:
        check_forward(call, f.first, f.second)
        check_backward(backward, b.first, b.second if call.soft else None)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(emulator: TicksEmulator, bug: str, tmp_path: Path) -> None:
    planted_bug = BUGS[bug]
    call = planted_bug.call()
    try_bug(emulator, planted_bug, call)  # the bug is what fails, not the call
    broken = TicksEmulator([planted_bug.dtype], planted(planted_bug, tmp_path))
    if planted_bug.report is None:
        with pytest.raises(AssertionError, match=r"error (\d|inf)|any\(\)"):
            try_bug(broken, planted_bug, call)
    else:
        with pytest.raises(EmulationError, match=planted_bug.report):
            try_bug(broken, planted_bug, call)


# ------------------------------------------------------------------------------------------------------------- as built


@dataclass(frozen=True)
class Switches:
    """A kernel's template arguments, from its mangled name."""

    fp64: bool
    general: bool
    capped: bool
    vector: bool

    @classmethod
    def of(cls, symbol: str) -> Switches:
        dtype, *flags = re.search(r"_kernelI(\w+?)Lb([01])ELb([01])ELb([01])EE", symbol).groups()
        return cls(dtype == "d", *(flag == "1" for flag in flags))


each_compiled = pytest.mark.parametrize(
    "architecture, name", list(itertools.product(ARCHITECTURES, ("ticks_forward", "ticks_backward")))
)


@needs_cuobjdump
@each_compiled
def test_registers_and_spills(architecture: str, name: str) -> None:
    found = kernels(cubin_of(architecture, name))
    # 4 types; hard targets with and without a softcap, and all else; by 16 bytes and element by element.
    assert len(found) == 4 * 3 * 2
    for kernel in found:
        assert kernel.stack == kernel.local == 0, kernel
        switches = Switches.of(kernel.symbol)
        # What keeps 1024 threads on a multiprocessor; the general backward 768, and fp64 512.
        most = 128 if switches.fp64 else 80 if switches.general and name == "ticks_backward" else 64
        assert kernel.registers <= most, kernel


@needs_cuobjdump
@each_compiled
def test_aligned_rows_move_16_bytes_at_a_time(architecture: str, name: str) -> None:
    seen = 0
    for symbol, code in disassembled(cubin_of(architecture, name)):
        switches = Switches.of(symbol)
        accesses = re.findall(r"\b((?:LD|ST)G)\.E((?:\.[A-Z0-9]+)*)", code)
        wide = [kind for kind, suffix in accesses if ".128" in suffix]
        assert not re.search(r"\b(LDL|STL)\b", code), symbol  # no register array in local memory
        if not switches.vector:
            assert not wide, symbol
            continue
        seen += 1
        in_flight = 2 if switches.general else 4
        assert wide.count("LDG") >= in_flight, (symbol, accesses)
        if name == "ticks_forward":
            assert not wide.count("STG"), symbol  # a few numbers a row
        else:
            assert wide.count("STG") >= in_flight, (symbol, accesses)
        # All loads of a group stand before what uses the first of them.
        loads = [m.start() for m in re.finditer(r"\bLDG\.E[.A-Z0-9]*\.128", code)][:in_flight]
        exponentials = [m.start() for m in re.finditer(r"\bMUFU\.EX2", code)]
        assert switches.fp64 or switches.capped or loads[-1] < exponentials[-1], symbol
    assert seen == 4 * 3


# ------------------------------------------------------------------------------------------------------------ on a GPU


def cuda(call: TicksCall) -> TicksCall:
    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.cuda()

    return replace(call, z=moved(call.z), target=moved(call.target), weight=moved(call.weight))


def native_forward(call: TicksCall) -> tuple[Tensor, Tensor]:
    return native.ticks_forward(call.z, call.target, call.weight, *arguments(call))


def native_backward(
    call: TicksCall, stats: Tensor, grad: Tensor, grad_lse: Tensor | None, inplace: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    return native.ticks_backward(
        grad, grad_lse, call.z, call.target, stats, call.weight, *arguments(call), True, call.soft, inplace
    )


def check_on_gpu(call: TicksCall, lse: bool = False) -> None:
    """Forward, and backward both ways, of a call drawn on the CPU, held to the truth there."""
    there = cuda(call)
    loss, stats = native_forward(there)
    check_forward(call, loss.cpu(), stats.cpu())
    grad, grad_lse = (torch.randn(len(call.z), dtype=call.acc) for _ in range(2))
    grads = grad.cuda(), grad_lse.cuda() if lse else None
    dz, dtarget = native_backward(there, stats, *grads)
    with_gradient = replace(call, grad=grad, grad_lse=grad_lse if lse else None)
    check_backward(with_gradient, dz.cpu(), dtarget.cpu() if call.soft else None)
    over = replace(there, z=there.z.clone())
    dz_over, _ = native_backward(over, stats, *grads, inplace=True)
    assert dz_over.data_ptr() == over.z.data_ptr()
    assert_same_bits(dz_over, dz)


@on_gpu
@pytest.mark.gpu
@pytest.mark.small
@each_dtype
def test_gpu_small_shapes(dtype: torch.dtype, poisoned_empty: None) -> None:
    for rows, classes in SHAPES:
        check_on_gpu(draw(rows, classes, dtype))
        check_on_gpu(draw(rows, classes, dtype, weight=dtype, smoothing=0.1, softcap=20.0), lse=True)
        check_on_gpu(draw(rows, classes, dtype, soft=FP32 if low(dtype) else dtype, ticks=0.001))


@on_gpu
@pytest.mark.gpu
@each_dtype
def test_gpu_large_shapes(dtype: torch.dtype, poisoned_empty: None) -> None:
    for rows, classes in ((33, 1000), (4, 30522), (2, 128256), (1, 262144), (1 << 16, 3)):
        check_on_gpu(draw(rows, classes, dtype))
        check_on_gpu(draw(rows, classes, dtype, soft=dtype, weight=dtype, smoothing=0.1), lse=True)


@on_gpu
@pytest.mark.gpu
@pytest.mark.small
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [64, 777, 8200])
def test_gpu_alignment_strides_and_neighbours_change_no_bit(dtype: torch.dtype, classes: int) -> None:
    for options in ({}, {"soft": dtype, "smoothing": 0.1}):
        call = cuda(draw(4, classes, dtype, **options))
        loss, stats = native_forward(call)
        grad, grad_lse = torch.randn(2, 4, device="cuda")
        dz, dtarget = native_backward(call, stats, grad, grad_lse)
        flat = torch.empty(call.z.numel() + 1, dtype=dtype, device="cuda")
        moved = [flat[1:].view_as(call.z).copy_(call.z)]
        moved += [call.z.new_full((4, classes + gap), math.nan)[:, :classes].copy_(call.z) for gap in (1, 16)]
        for other in (replace(call, z=z) for z in moved):
            a, b = native_forward(other)
            assert_same_bits(a, loss)
            assert_same_bits(b, stats)
            for inplace in (False, True):  # which spoils it
                a, b = native_backward(other, stats, grad, grad_lse, inplace)
                assert_same_bits(a, dz)
                if call.soft:
                    assert_same_bits(b, dtarget)
        for r in range(4):
            alone = replace(call, z=call.z[r : r + 1], target=call.target[r : r + 1])
            assert_same_bits(native_forward(alone)[0], loss[r : r + 1])


@on_gpu
@pytest.mark.gpu
@pytest.mark.small
def test_gpu_ignored_rows_and_targets_out_of_range() -> None:
    call = draw(8, 100)
    call.target[5] = 100
    call.target[6] = -1
    call.z[4] = math.nan  # ignored
    there = cuda(call)
    loss, stats = native_forward(there)
    dz, _ = native_backward(there, stats, torch.ones(8, device="cuda"), None)
    torch.cuda.synchronize()
    assert loss[4] == 0 and dz[4].eq(0).all()
    assert loss[[5, 6]].isnan().all() and dz[[5, 6]].isnan().all()
    good = [0, 1, 2, 3, 7]
    assert loss[good].isfinite().all() and dz[good].isfinite().all()


@on_gpu
@pytest.mark.gpu
def test_gpu_current_stream_no_waiting_and_a_graph() -> None:
    call = cuda(draw(64, 1000))
    grad = torch.randn(64, device="cuda")
    loss, stats = native_forward(call)
    dz, _ = native_backward(call, stats, grad, None)
    torch.cuda.synchronize()
    stream, busy = torch.cuda.Stream(), torch.cuda.Event()
    moved = replace(call, z=call.z - 7)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # what another stream launches now runs before z is put right
        busy.record()
        moved.z.copy_(call.z)
        a, b = native_forward(moved)
        c, _ = native_backward(moved, b, grad, None)
        assert not busy.query()
    stream.synchronize()
    assert_same_bits(a, loss)
    assert_same_bits(c, dz)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a, b = native_forward(moved)
        c, _ = native_backward(moved, b, grad, None)
    moved.z.copy_(call.z.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    expected, stats = native_forward(moved)
    assert_same_bits(a, expected)
    assert_same_bits(c, native_backward(moved, stats, grad, None)[0])


@on_gpu
@pytest.mark.gpu
@pytest.mark.small
def test_gpu_errors_name_both_values() -> None:
    call = cuda(draw(4, 64, weight=FP32))
    with pytest.raises(RuntimeError, match=r"weight has shape \(63,\).*expected \(64,\)"):
        native_forward(replace(call, weight=call.weight[:63]))
    with pytest.raises(RuntimeError, match=r"weight has dtype BFloat16, expected Float"):
        native_forward(replace(call, weight=call.weight.bfloat16()))
    with pytest.raises(RuntimeError, match=r"target is on another device, z is on cuda:0"):
        native_forward(replace(call, target=call.target.cpu()))
    with pytest.raises(RuntimeError, match=r"target has shape \(3,\).*expected \(4,\)"):
        native_forward(replace(call, target=call.target[:3]))
    _, stats = native_forward(call)
    grad = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match=r"stats has shape \(3, 4\).*expected \(4, 4\)"):
        native_backward(replace(call, smoothing=0.1), stats, grad, None)
    with pytest.raises(RuntimeError, match=r"its rows overlap"):
        native_backward(replace(call, z=call.z[:1].expand(4, 64)), stats, grad, None, inplace=True)


@on_gpu
@pytest.mark.gpu
def test_gpu_more_than_two_to_the_31_elements() -> None:
    classes = 32768
    rows = 2**31 // classes + 2
    if torch.cuda.mem_get_info()[0] < 3 * rows * classes * 2:
        pytest.skip("needs 13 GB of GPU memory")
    z = torch.zeros(rows, classes, dtype=BF16, device="cuda")
    z[-3:] = 3 * torch.randn(3, classes)
    target = torch.randint(classes, (rows,), device="cuda")
    call, last = TicksCall(z, target), TicksCall(z[-3:].clone(), target[-3:])
    grad = torch.ones(rows, device="cuda")
    (loss, stats), (alone, alone_stats) = native_forward(call), native_forward(last)
    assert_same_bits(loss[-3:], alone)
    expected, _ = native_backward(last, alone_stats, grad[-3:], None)
    dz, _ = native_backward(call, stats, grad, None, inplace=True)
    assert_same_bits(dz[-3:], expected)
