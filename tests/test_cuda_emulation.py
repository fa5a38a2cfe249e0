"""The CUDA forward kernel, run on the CPU thread by thread under AddressSanitizer and UndefinedBehaviorSanitizer.

Every call runs under two orders of the warps and must give the same bits, with outputs and shared memory poisoned with
NaN and guarded at both ends. The second half plants bugs in a copy of the source, and demands that each is caught.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.emulator import ALL_TYPES, KERNELS, Call, EmulationError, Emulator, Result, Types, missing
from torch import Tensor

from fused_norm import reference
from fused_norm.testing import NormResult, assert_norm_close, relative_error

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"no emulation here: {missing()}")]

#: (rows, n): one element; less than a vector; ragged; part of a warp; a warp; several rows a block and the last block
#: not full; a block; a ragged block; above 32 KB, where a row is kept in shared memory, of one block or of two and four
#: in a cluster. Of the smallest many rows, for an error measured on one number means little.
SHAPES = ((50, 1), (50, 2), (30, 7), (9, 63), (9, 64), (33, 100), (70, 16), (5, 768), (3, 1000), (3, 4097))
SHAPES += ((2, 8200), (2, 20008))

AFFINE = ((True, True), (True, False), (False, True), (False, False))

FP32 = (torch.float32, torch.float32)
BF16 = (torch.bfloat16, torch.bfloat16)


def name(types: Types) -> str:
    return "/".join(str(t).removeprefix("torch.") for t in dict.fromkeys(types))


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(ALL_TYPES)


def draw(
    rows: int, n: int, types: Types = FP32, affine: tuple[bool, bool] = (True, True), groups: int = 0, **options
) -> Call:
    """A call on random numbers; ``groups`` 0: one group with shared parameters, else parameters per group."""

    def params(present: bool, shift: float) -> Tensor | None:
        shape = (groups, n) if groups else (n,)
        return (0.3 * torch.randn(shape, dtype=torch.float64) + shift).to(types[1]) if present else None

    x = (torch.randn(rows, n, dtype=torch.float64) + 0.5).to(types[0])
    return Call(x, params(affine[0], 1.0), params(affine[1], 0.0), groups=groups or 1, **options)


def by_torch(call: Call) -> Tensor | None:
    """torch's result, where torch takes these types."""
    n = call.x.shape[1]
    params = [p for p in (call.weight, call.bias) if p is not None]
    if any(p.dtype != call.x.dtype or p.numel() != n for p in params) or (call.rms and call.bias is not None):
        return None
    if call.rms:
        return F.rms_norm(call.x, (n,), call.weight, call.eps)
    return F.layer_norm(call.x, (n,), call.weight, call.bias, call.eps)


def check(call: Call, result: Result) -> None:
    """Hold a result to the fp64 truth by the rule of fused_norm.testing; the statistics to a few roundings."""
    params = (None if p is None else p.double() for p in (call.weight, call.bias))
    y, stats = reference.norm_forward(call.x.double(), *params, call.x.shape[1], call.groups, call.eps, call.rms, True)
    assert_norm_close(NormResult(result.y), NormResult(y), NormResult(by_torch(call)))
    if call.need_stats:
        assert relative_error(result.stats, stats) < 8 * torch.finfo(result.stats.dtype).eps
    else:
        assert result.stats.numel() == 0


def run_and_check(emulator: Emulator, *calls: Call) -> list[Result]:
    results = emulator.run(*calls)
    for call, result in zip(calls, results, strict=True):
        check(call, result)
    return results


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("types", ALL_TYPES, ids=name)
def test_matches_the_truth(emulator: Emulator, types: Types, rms: bool) -> None:
    results = run_and_check(emulator, *(draw(m, n, types, rms=rms) for m, n in SHAPES))
    # The shapes reach every kernel but the one for devices without clusters (test_a_sliced_row).
    assert {(r.vector, r.keep) for r in results} == {(True, "registers"), (True, "slice"), (False, "shared")}


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("affine", AFFINE, ids=["w+b", "w", "b", "none"])
def test_every_subset_of_parameters(emulator: Emulator, affine: tuple[bool, bool], rms: bool) -> None:
    calls = [
        draw(3, n, t, affine, rms=rms, need_stats=s)
        for n in (64, 100, 771)
        for t, s in ((FP32, True), ((torch.bfloat16, torch.float32), False))
    ]
    run_and_check(emulator, *calls)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("types", ALL_TYPES, ids=name)
def test_cast_before_the_parameters(emulator: Emulator, types: Types, rms: bool) -> None:
    """The kernel's own rounded xhat, times weight plus bias: y to the last bit, but for what a second rounding ties."""
    for n, affine in ((64, (True, True)), (771, (True, False)), (8200, (False, True)), (100, (True, True))):
        call = draw(2, n, types, affine, rms=rms)
        rounded, plain, cast = emulator.run(replace(call, weight=None, bias=None), call, replace(call, cast=True))
        w, b = (None if p is None else p.double() for p in (call.weight, call.bias))
        expected = rounded.y.double() * (1 if w is None else w) + (0 if b is None else b)
        different = (cast.y != expected.to(torch.float32).to(types[0])).double().mean()
        assert_same_bits(cast.stats, plain.stats)
        if types[0].itemsize == 2:
            assert different < 0.01 and (cast.y != plain.y).double().mean() > 0.05
        else:
            assert_same_bits(cast.y, plain.y)


@pytest.mark.parametrize("n", [16, 100, 768])
def test_groups_have_their_own_parameters(emulator: Emulator, n: int) -> None:
    grouped = draw(12, n, groups=3)
    shared = replace(grouped, weight=grouped.weight[0], bias=grouped.bias[0])
    (a, b) = run_and_check(emulator, grouped, shared)
    assert_same_bits(a.y[:4], b.y[:4])
    assert not torch.equal(a.y[4:], b.y[4:])


MIXED = {"a weight a group": (True, False), "a bias a group": (False, True)}


def draw_mixed(rows: int, n: int, types: Types, grouped: tuple[bool, bool], **options) -> Call:
    """Of weight and bias one is shared by the two groups, and the other each group's own."""
    call = draw(rows, n, types, groups=2, **options)
    weight, bias = (p if each else p[0] for p, each in zip((call.weight, call.bias), grouped, strict=True))
    return replace(call, weight=weight, bias=bias)


@pytest.mark.parametrize("grouped", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("types", [FP32, (torch.bfloat16, torch.float32)], ids=name)
def test_one_parameter_shared_and_one_per_group(emulator: Emulator, types: Types, grouped: tuple[bool, bool]) -> None:
    calls = [draw_mixed(4, n, types, grouped, rms=rms) for n in (1, 16, 100, 768) for rms in (False, True)]
    calls += [draw_mixed(2, 16400, types, grouped, largest_cluster=blocks) for blocks in (16, 1)]
    results = run_and_check(emulator, *calls)
    assert {r.keep for r in results} == {"registers", "slice", "shared"}


def test_a_large_offset_and_a_constant_row(emulator: Emulator) -> None:
    n = 4096
    x = torch.randn(3, n) + 1e6
    x[2] = 1e6 + 0.3
    (r,) = emulator.run(Call(x))
    assert (r.y[:2].std(dim=1) - 1).abs().max() < 1e-2
    assert r.y[2].eq(0).all() and r.stats[1, 2] == x[2, 0]


def test_an_outlier_as_first_element_costs_no_accuracy(emulator: Emulator) -> None:
    calls = [draw(8, n) for n in (64, 768, 4096)] + [draw(2, 20000)]
    for call in calls:
        call.x[:, 0] += 100
    run_and_check(emulator, *calls)


@pytest.mark.parametrize("n", [64, 100, 768, 9000, 20000])
def test_nan_and_inf_stay_in_their_row(emulator: Emulator, n: int) -> None:
    clean = draw(5, n)
    bad = clean.x.clone()
    bad[1, n // 2], bad[2, n - 1], bad[4, 0] = math.nan, math.inf, -math.inf
    good = [0, 3]
    for rms in (False, True):
        a, b = emulator.run(replace(clean, rms=rms), replace(clean, x=bad, rms=rms))
        assert_same_bits(a.y[good], b.y[good])
        assert b.y[1].isnan().all()
        if not rms:
            assert b.y[2].isnan().all() and b.y[4].isnan().all()
    (r,) = emulator.run(Call(bad, rms=True))
    assert r.y[2, n - 1].isnan() and r.y[2, : n - 1].eq(0).all()
    assert r.y[4, 0].isnan() and r.y[4, 1:].eq(0).all()


def test_a_constant_row_without_eps_is_nan(emulator: Emulator) -> None:
    x = torch.full((2, 100), 3.0)
    x[1] = torch.randn(100)
    (r,) = emulator.run(Call(x, eps=0.0))
    assert r.y[0].isnan().all() and not r.y[1].isnan().any()


# ------------------------------------------------------------------------------- what its bits may not depend on


@pytest.mark.parametrize(
    "types", [FP32, BF16, (torch.float16, torch.float32), (torch.float64, torch.float64)], ids=name
)
@pytest.mark.parametrize("n", [64, 768, 16400])
def test_alignment_strides_and_memory_change_no_bit(emulator: Emulator, types: Types, n: int) -> None:
    base = draw(2, n, types)
    per_chunk = 16 // types[0].itemsize
    aligned = [base, replace(base, x_row_stride=n + 2 * per_chunk)]
    narrow = [replace(base, offsets=tuple(int(i == k) for i in range(4))) for k in range(4 if n < 1000 else 1)]
    narrow += [replace(base, x_row_stride=n + 1), replace(base, x_row_stride=n + 1, offsets=(3, 1, 1, 2))]
    # A device whose shared memory holds none of the row, or some of it.
    small = [replace(c, shared_limit=s) for c in (base, narrow[0]) for s in (2048, 16 * 1024)] if n > 1000 else []
    results = run_and_check(emulator, *aligned, *narrow, *small)
    first = results[0]
    for r in results[1:]:
        assert_same_bits(r.y, first.y)
        assert_same_bits(r.stats, first.stats)
        assert r.threads_per_row == first.threads_per_row
    assert all(r.vector for r in results[: len(aligned)])
    assert not any(r.vector for r in results[len(aligned) : len(aligned) + len(narrow)])


@pytest.mark.parametrize("types", [FP32, BF16], ids=name)
@pytest.mark.parametrize("n", [3, 16, 100, 768, 9000])
def test_a_row_does_not_depend_on_the_rows_beside_it(emulator: Emulator, types: Types, n: int) -> None:
    many = draw(37 if n < 9000 else 3, n, types)
    # The rows alone, in a vector kernel or not as it was among many.
    rows = [0, many.x.shape[0] - 1]
    all_rows, *alone = emulator.run(many, *(replace(many, x=many.x[r : r + 1]) for r in rows))
    for r, one in zip(rows, alone, strict=True):
        assert_same_bits(one.y[0], all_rows.y[r])
        assert_same_bits(one.stats[:, 0], all_rows.stats[:, r])


def test_an_expanded_row(emulator: Emulator) -> None:
    base = draw(1, 768)
    one, many = emulator.run(base, replace(base, x=base.x.expand(5, 768), x_row_stride=0))
    assert_same_bits(many.y, one.y.expand(5, 768))


#: Of each pair of types rows wider than 32 KB, and how many slices they have. A row has at most 16: beyond 1 MB each is
#: more than 64 KB. The last slice may be shorter than the others, by all but half of one.
SLICED = {
    FP32: ((8196, 1), (16384, 1), (16388, 2), (32772, 4), (65540, 8), (131076, 16), (262144, 16), (270004, 16)),
    BF16: ((16392, 1), (32776, 2), (100008, 4), (262144, 8), (262152, 16)),
    (torch.float16, torch.float16): ((50000, 2),),
    (torch.bfloat16, torch.float32): ((65544, 4),),
    (torch.float16, torch.float32): ((32776, 2),),
    (torch.float64, torch.float64): ((8194, 2), (16386, 4), (32770, 8), (65538, 16)),
}


@pytest.mark.parametrize(
    ("types", "n", "slices"),
    [pytest.param(t, *s, id=f"{name(t)}-{s[0]}") for t, found in SLICED.items() for s in found],
)
def test_a_sliced_row(emulator: Emulator, types: Types, n: int, slices: int) -> None:
    """In a cluster, and in one block where the device has no clusters, no room for one, or no copies on the side."""
    call = draw(1, n, types, rms=n // 4 % 2 == 1)
    clustered = replace(call, largest_cluster=slices)
    crowded = replace(call, largest_cluster=slices - 1)
    # A block has 99 KB on sm_89 and 64 KB on sm_75: what they do not hold is read again.
    older = [replace(call, compute_capability=c, shared_limit=s << 10) for c, s in ((89, 99), (75, 64))]
    results = run_and_check(emulator, clustered, *(c for c in (crowded, *older) if n < 100_000 or c is older[0]))
    assert (results[0].keep, results[0].cluster, results[0].vector) == ("slice", slices, True)
    for r in results[1:]:
        assert r.cluster == 1 and r.vector and (slices == 1 or r.keep == "shared")
        assert_same_bits(r.y, results[0].y)
        assert_same_bits(r.stats, results[0].stats)


@pytest.mark.parametrize("types", [BF16, (torch.float16, torch.float32), FP32], ids=name)
def test_options_of_a_sliced_row(emulator: Emulator, types: Types) -> None:
    n = 33000 if types[0].itemsize == 2 else 16500
    grouped = draw(2, n, types, groups=2)
    calls = [
        grouped,
        replace(grouped, cast=True, bias=None),
        replace(grouped, weight=None, x_row_stride=n + 16, need_stats=False),
        replace(grouped, weight=None, bias=None, rms=True, groups=1, x_row_stride=n + 8),
        draw(2, n, types, rms=True, need_stats=False),
    ]
    clustered, alone = (emulator.run(*(replace(c, largest_cluster=blocks) for c in calls)) for blocks in (2, 1))
    for call, a, b in zip(calls, clustered, alone, strict=True):
        assert (a.cluster, b.cluster) == (2, 1)
        assert_same_bits(a.y, b.y)
        assert_same_bits(a.stats, b.stats)
        if not call.cast:  # its own test has the truth
            check(call, a)


@pytest.mark.parametrize(("types", "n"), [(FP32, 131077), (BF16, 262147), (BF16, 100001)], ids=str)
def test_a_wide_row_that_fills_no_chunks(emulator: Emulator, types: Types, n: int) -> None:
    (r,) = run_and_check(emulator, draw(1, n, types, rms=n == 262147))
    assert not r.vector and r.keep == "shared" and r.cluster == 1


def test_rows_more_than_two_to_the_31_elements_apart(emulator: Emulator) -> None:
    run_and_check(emulator, *(draw(2, 64, BF16, x_row_stride=2**31 + d) for d in (8, 9)))


# ------------------------------------------------------------------------------------------ bugs that it must catch


@dataclass(frozen=True)
class Bug:
    """A change of one file of the kernel, the call that meets it, and what the report says.

    A report of None: wrong numbers; "bits": right ones, but in a cluster not those of one block.
    """

    file: str
    old: str
    new: str
    call: Callable[[], Call]
    report: str | None


BUGS = {
    "a removed barrier": Bug(
        "common.cuh",
        "  __syncthreads();\n",
        "",
        lambda: draw(1, 2048, rms=True),
        "depends on the order in which warps run",
    ),
    "one shared array for two sums": Bug(
        "norm_forward.cuh",
        "    partial += COUNT * kWarp;\n",
        "",
        lambda: draw(1, 2048),
        "depends on the order in which warps run",
    ),
    "a barrier not all threads reach": Bug(
        "common.cuh",
        "  __syncthreads();\n",
        "  if (threadIdx.x < kWarp) __syncthreads();\n",
        lambda: draw(1, 2048),
        "32 of 64 threads wait at a barrier",
    ),
    "lanes without a row leave before the shuffle": Bug(
        "norm_forward.cuh",
        "  const A length = ",
        "  if (!row.live) return;\n  const A length = ",
        lambda: draw(3, 16),
        "12 of 32 lanes are at a shuffle",
    ),
    "a wrong shuffle offset": Bug(
        "common.cuh", "int offset = lanes / 2;", "int offset = lanes / 4;", lambda: draw(1, 128), None
    ),
    "a read past the row's end": Bug(
        "common.cuh",
        "if (present<VECTOR, K>(c, j, n)) v = p[j];",
        "v = p[j];",
        lambda: draw(1, 99),
        "heap-buffer-overflow",
    ),
    "a write past the row's end": Bug(
        "common.cuh",
        "if (present<VECTOR, K>(c, j, n)) p[j] =",
        "p[j] =",
        lambda: draw(1, 99, affine=(False, False)),
        "heap-buffer-overflow",
    ),
    "the bias of a group taken where its weight would be": Bug(
        "norm_forward.cuh",
        "bias + group * shape.bias_row_stride",
        "bias + group * shape.weight_row_stride",
        lambda: draw_mixed(4, 64, FP32, (False, True)),
        None,
    ),
    "the bias of all groups taken as one of each": Bug(
        "norm_forward.cuh",
        "bias + group * shape.bias_row_stride",
        "bias + group * shape.weight_row_stride",
        lambda: draw_mixed(4, 64, FP32, (True, False)),
        "heap-buffer-overflow",
    ),
    "a chunk never written": Bug(
        "norm_forward.cuh",
        "store_chunk<VECTOR>(y_row",
        "if (c != 17) store_chunk<VECTOR>(y_row",
        lambda: draw(1, 128),
        None,
    ),
    "a 16-byte access to a misaligned row": Bug(
        "norm_forward.cuh",
        "const bool vector = whole_chunks && aligned(a.x)",
        "const bool vector = whole_chunks",
        lambda: draw(2, 64, offsets=(1, 0, 0, 0)),
        "misaligned address",
    ),
    "less shared memory than is used": Bug(
        "norm_forward.cuh",
        "how.shared_bytes += sizeof(Chunk) * config.rows_per_block * cached;",
        "how.shared_bytes += sizeof(Chunk) * config.rows_per_block * (cached - 1);",
        lambda: draw(1, 9001),
        "use-after-poison",
    ),
    "a 32-bit row offset": Bug(
        "norm_forward.cuh",
        "x + (live ? m : 0) * shape.x_row_stride),\n        n(",
        "x + static_cast<int>((live ? m : 0) * shape.x_row_stride)),\n        n(",
        lambda: draw(2, 64, x_row_stride=2**31 + 8),
        "SEGV",
    ),
    "no wait for the cluster's mailboxes to be open": Bug(
        "cluster.cuh",
        "    if (blocks_ > 1) cluster_wait();\n",
        "",
        lambda: draw(1, 16388),
        "a block is sent to that has not begun",
    ),
    "a mailbox read before all has come": Bug(
        "cluster.cuh",
        "    mailbox_wait(flag, round_ / 2 % 2);\n",
        "",
        lambda: draw(1, 16388),
        "EMULATION",
    ),
    "the sums of the last slice left out": Bug(
        "cluster.cuh",
        "    add_warp_sums(v, box, entries);\n",
        "    add_warp_sums(v, box, entries - warps);\n",
        lambda: draw(1, 32772),
        None,
    ),
    "the last slice as long as the others": Bug(
        "norm_forward.cuh",
        "count(shape.chunks - begin < shape.slice_chunks ? shape.chunks - begin : shape.slice_chunks),",
        "count(shape.slice_chunks),",
        lambda: draw(1, 16388),
        "heap-buffer-overflow",
    ),
    "a slice used before its copies have come": Bug(
        "norm_forward.cuh",
        "      wait_for_copies(kGroups - 1 - g);\n",
        "      wait_for_copies(kGroups - g);\n",
        lambda: draw(1, 16388),
        "depends on the order in which warps run or copies arrive",
    ),
    "another order of the warps' sums in one block": Bug(
        "common.cuh",
        "partial[(i * slices + slice) * warps + warp] = v[i];",
        "partial[(i * warps + warp) * slices + slice] = v[i];",
        lambda: draw(6, 16388, rms=True),
        "bits",
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


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(emulator: Emulator, bug: str, tmp_path: Path) -> None:
    planted_bug = BUGS[bug]
    torch.manual_seed(5)  # whether sums in another order round otherwise is up to the numbers
    call = planted_bug.call()
    run_and_check(emulator, call)  # the bug is what fails, not the call
    broken = Emulator([FP32], planted(planted_bug, tmp_path))
    if planted_bug.report == "bits":
        clustered, alone = run_and_check(broken, call, replace(call, largest_cluster=1))
        with pytest.raises(AssertionError, match="not equal"):
            assert_same_bits(clustered.stats, alone.stats)
    elif planted_bug.report is None:
        (result,) = broken.run(call)
        with pytest.raises(AssertionError, match="limit"):
            check(call, result)
    else:
        with pytest.raises(EmulationError, match=planted_bug.report):
            broken.run(call)
