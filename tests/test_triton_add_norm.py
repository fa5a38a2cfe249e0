"""The Triton backend's add and norm: its mask, its results against the fp64 truth, its traffic, what it compiles to.

Tests marked ``@runs_kernels`` run on the GPU where there is one, else in Triton's interpreter (triton_kernels.py).
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton_kernels import (  # noqa: E402
    DEVICE,
    ELEMENT,
    INTERPRETED,
    SHARED_MEMORY,
    TARGETS,
    Traffic,
    assert_64_bit_offsets,
    assert_no_spills,
    in_turn,
    interpreter_as_hardware,  # noqa: F401
    laid_out,
    launches_made_anew,  # noqa: F401
    needs_compiler,
    reductions,
    remember_places,  # noqa: F401
    remember_selected,  # noqa: F401
    runs_kernels,
    streams,
    widest_access,
)

from fused_norm import reference  # noqa: E402
from fused_norm.backends import triton as backend  # noqa: E402
from fused_norm.backends.triton import common, dropout, launch, norm  # noqa: E402
from fused_norm.testing import error_limit, param_error_limit, relative_error  # noqa: E402

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP64, FP32, BF16, FP16)
SHORT = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16", None: "same"}

# ------------------------------------------------------------------------------------------------------------- the mask


@triton.jit
def _philox_kernel(seed_ptr, block_ptr, words_ptr, K: tl.constexpr):
    at = tl.arange(0, K)
    block = tl.load(block_ptr + at)
    zero = tl.zeros([K], tl.uint32)
    words = tl.philox(tl.load(seed_ptr), block.to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero)
    for i in tl.static_range(4):
        tl.store(words_ptr + at * 4 + i, words[i].to(tl.int64))


@triton.jit
def _keep_kernel(seed_ptr, first_ptr, keep_ptr, threshold, K: tl.constexpr, BLOCK_N: tl.constexpr, QUADS: tl.constexpr):
    at = tl.arange(0, K)
    keep = dropout.keep_of_rows(tl.load(seed_ptr), tl.load(first_ptr + at), threshold, 1.0, BLOCK_N, QUADS)
    tl.store(keep_ptr + at[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], keep)


@triton.jit
def _keep_one_kernel(seed_ptr, index_ptr, keep_ptr, threshold, K: tl.constexpr, QUADS: tl.constexpr):
    at = tl.arange(0, K)
    tl.store(keep_ptr + at, dropout.keep_of(tl.load(seed_ptr), tl.load(index_ptr + at), threshold, 1.0, QUADS))


SEEDS = (0, 1, -1, -(2**63), 2**63 - 1, -0x1234_5678_9ABC_DEF0, 0x8000_0000)
# Either side of where the low half of the counter, 2^34 elements, and the signed halves begin anew.
INDICES = sorted(
    {base + d for base in (0, 2**31, 2**33, 2**34, 2**35 - 16, 2**50, 2**62) for d in (0, 1, 2, 3, 4, 7)}
    | {2**34 - d for d in (1, 2, 3, 4, 5, 8, 16, 21)}
)


def test_known_answer_of_philox() -> None:
    """The vector of Random123 for a counter and a key of 0 (kat_vectors, philox4x32 10)."""
    words = reference.philox(torch.tensor(0), torch.tensor([0]))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@runs_kernels
@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_philox_is_the_reference_s(seed: int) -> None:
    blocks = torch.tensor([i // 4 for i in INDICES] + [2**32 - 1, 2**32, 2**62, 2**63 - 1] * 16)[:64]
    words = torch.full((64, 4), -1, device=DEVICE)
    on_device = torch.tensor([seed], device=DEVICE)
    _philox_kernel[(1,)](on_device, blocks.to(DEVICE), words, K=64)
    assert torch.equal(words.cpu(), reference.philox(torch.tensor(seed), blocks))


def _kept(seed: int, index: Tensor, p: float) -> Tensor:
    words = reference.philox(torch.tensor(seed), index.flatten() // 4)
    word = words.gather(1, (index.flatten() % 4).unsqueeze(1))
    return (word >= reference.dropout_threshold(p)).reshape(index.shape).float()


@runs_kernels
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS[2:6], ids=hex)
def test_mask_of_large_indices(seed: int, p: float) -> None:
    """Rows that begin anywhere, also at 2^34 elements and beyond, and in whose middle the counter's low half wraps."""
    threshold, _ = dropout.dropout_integers(p, False)
    on_device = torch.tensor([seed], device=DEVICE)
    index = torch.tensor((INDICES * 2)[:64])
    for quads, ones in ((True, index // 4 * 4), (False, index)):
        keep = torch.full((64,), -1.0, device=DEVICE)
        _keep_one_kernel[(1,)](on_device, ones.to(DEVICE), keep, threshold, K=64, QUADS=quads)
        assert torch.equal(keep.cpu(), _kept(seed, ones, p))
    for block_n, quads in ((32, True), (4, True), (32, False), (4, False), (2, False), (1, False)):
        first = index // 4 * 4 if quads else index
        keep = torch.full((64, block_n), -1.0, device=DEVICE)
        _keep_kernel[(1,)](on_device, first.to(DEVICE), keep, threshold, K=64, BLOCK_N=block_n, QUADS=quads)
        expected = _kept(seed, first[:, None] + torch.arange(block_n), p)
        assert torch.equal(keep.cpu(), expected), (block_n, quads)


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.5 - 2**-40, 0.5, 0.5 + 2**-30, 0.9, 1 - 2**-34, 1 - 2**-53])
def test_threshold_and_scale_as_bits(p: float) -> None:
    for fp64, formats in ((False, ("<f", "<i")), (True, ("<d", "<q"))):
        threshold, scale_bits = dropout.dropout_integers(p, fp64)
        # One integer type for every p, or Triton would compile anew.
        assert -(2**31) <= threshold < 2**31 and threshold % 2**32 == reference.dropout_threshold(p)
        scale = struct.unpack(formats[0], struct.pack(formats[1], scale_bits))[0]
        assert scale == torch.tensor(1 / (1 - p), dtype=FP64 if fp64 else FP32).item()
        assert not fp64 or scale_bits >= 2**31


@needs_compiler
def test_no_value_of_an_integer_is_compiled_in() -> None:
    for kernel in (
        norm.norm_forward_kernel,
        norm.norm_forward_looped_kernel,
        norm.norm_backward_kernel,
        norm.norm_backward_looped_kernel,
    ):
        plain = [p.name for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert plain and all(p.do_not_specialize for p in kernel.params if p.name in plain), kernel


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 30, 63, 64, 100, 202])
def test_mask_is_the_reference_s(n: int, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    rows, p = 9, 0.3
    seed = torch.tensor([-987654321987654321], device=DEVICE)
    ones = torch.ones(rows, n, device=DEVICE)
    mask = reference.dropout_mask(seed.cpu(), ones.cpu(), p)
    _, summed, _ = backend.add_norm_forward(ones, ones * 0, None, None, seed, n, 1e-5, True, p, True, False)
    assert torch.equal(summed.cpu(), mask)
    # With stats of 0 norm_backward's dx is 0: what remains of dx is dsummed's mask.
    stats = torch.zeros(1, rows, device=DEVICE)
    args = (ones, ones, summed, stats, None, seed, n, True, p, FP32, FP32, True, True, False, False)
    dx, dresidual, _, _ = backend.add_norm_backward(*args)
    assert torch.equal(dx.cpu(), mask) and torch.equal(dresidual, ones)


# ------------------------------------------------------------------------------------------------ cases and their truth


@dataclass(frozen=True)
class Case:
    rows: int
    n: int
    dtype: torch.dtype = FP32
    x_dtype: torch.dtype | None = None
    param_dtype: torch.dtype | None = None
    rms: bool = False
    p: float = 0.3
    dsummed: bool = True
    affine: str = "weight+bias"
    cast: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        options = {"pre": self.dsummed, "cast": self.cast, self.affine: True, self.layout: True}
        types = "/".join(SHORT[d] for d in (self.x_dtype, self.dtype, self.param_dtype))
        shape = f"{'rms' if self.rms else 'layer'}-{self.rows}x{self.n}-{types}-{self.p}"
        return "-".join([shape, *(name for name, on in options.items() if on)])


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    dy: Tensor
    dsummed: Tensor | None


def draw(case: Case) -> Inputs:
    def rows(padding: int, dtype: torch.dtype | None = None, shift: float = 0.0) -> Tensor:
        t = (torch.randn(case.rows, case.n, dtype=FP64) + shift).to(dtype or case.dtype)
        return laid_out(t, case.layout, padding)

    def parameter(name: str, shift: float) -> Tensor | None:
        t = (torch.randn(case.n, dtype=FP64) * 0.3 + shift).to(case.param_dtype or case.dtype)
        return t.to(DEVICE) if name in case.affine and not (case.rms and name == "bias") else None

    return Inputs(
        x=rows(5, case.x_dtype, 0.5),
        residual=rows(3, shift=0.25),
        weight=parameter("weight", 1.0),
        bias=parameter("bias", 0.0),
        seed=torch.randint(-(2**63), 2**63 - 1, (1,), device=DEVICE) if case.p else None,
        dy=rows(7),
        dsummed=rows(9) if case.dsummed else None,
    )


RESULTS = ("dx", "dresidual", "dw", "db")
ALL = (True, True, True, True)


def forward(case: Case, inputs: Inputs, module=backend) -> tuple[Tensor, Tensor, Tensor]:
    i = inputs
    return module.add_norm_forward(
        i.x, i.residual, i.weight, i.bias, i.seed, case.n, 1e-5, case.rms, case.p, True, case.cast
    )


def backward(case: Case, i: Inputs, summed: Tensor, stats: Tensor, need: tuple = ALL, module=backend) -> dict:
    types = (case.param_dtype or summed.dtype, case.x_dtype or summed.dtype)
    results = module.add_norm_backward(
        i.dy, i.dsummed, summed, stats, i.weight, i.seed, case.n, case.rms, case.p, *types, *need
    )
    return dict(zip(RESULTS, results, strict=True))


def separate(case: Case) -> bool:
    """Whether dx is a tensor of its own."""
    return bool(case.p) or case.x_dtype not in (None, case.dtype)


def check(case: Case) -> None:
    """Each result against the truth: sum and norm apart, for the norm is of the rounded sum."""
    inputs = draw(case)
    y, summed, stats = forward(case, inputs)
    acc = FP64 if case.dtype == FP64 else FP32
    for t in (y, summed):
        assert t.shape == inputs.residual.shape and t.dtype == case.dtype and t.is_contiguous()
    assert stats.shape == (1 if case.rms else 2, case.rows) and stats.dtype == acc

    on_cpu = Inputs(*(None if t is None else t.cpu() for t in vars(inputs).values()))
    branch = on_cpu.x.double()
    if case.p:
        branch = branch * (reference.dropout_mask(on_cpu.seed, branch, case.p))
    exact = branch + on_cpu.residual.double()
    # One rounding of the sum, and those of the scale and the product.
    allowed = torch.finfo(case.dtype).eps * exact.abs() / 2 + 1.01 * torch.finfo(acc).eps * branch.abs() + 1e-7
    assert ((summed.cpu().double() - exact).abs() <= allowed).all()

    # The norm is norm_forward's, whose own tests hold it to the truth; so are the sums of backward.
    same_y, same_stats = backend.norm_forward(
        summed, inputs.weight, inputs.bias, case.n, 1, 1e-5, case.rms, True, case.cast
    )
    assert torch.equal(y, same_y) and torch.equal(stats, same_stats)
    in_fp64 = Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in vars(on_cpu).values()))
    if not case.cast:
        args = (in_fp64.weight, in_fp64.bias, case.n, 1, 1e-5, case.rms, False)
        y_truth, _ = reference.norm_forward(summed.cpu().double(), *args)
        assert relative_error(y.cpu(), y_truth) <= error_limit(y_truth, case.dtype, 2 * torch.finfo(acc).eps)

    stats_truth = reference.norm_forward(summed.cpu().double(), None, None, case.n, 1, 1e-5, case.rms, True)[1]
    need = (True, True, True, not case.rms)
    results = backward(case, inputs, summed, stats, need)
    wide = replace(case, x_dtype=FP64, param_dtype=FP64)
    truth = backward(wide, in_fp64, summed.cpu().double(), stats_truth, need, reference)
    plain = backward(case, on_cpu, summed.cpu(), stats.cpu(), need, reference)
    for name in RESULTS:
        if (name == "dx" and not separate(case)) or (name == "db" and case.rms):
            continue
        t = results[name]
        dtype = {"dx": case.x_dtype, "dw": case.param_dtype, "db": case.param_dtype}.get(name) or case.dtype
        assert t.dtype == dtype and t.is_contiguous() and t.shape == truth[name].shape, name
        if name in ("dx", "dresidual"):
            assert t.shape == summed.shape
            error, limit = relative_error(t.cpu(), truth[name]), error_limit
        else:
            error, limit = relative_error(t.cpu(), truth[name]), param_error_limit
        allowed = limit(truth[name], dtype, relative_error(plain[name], truth[name]))
        assert error <= allowed, f"{name}: error {error:.3g} > limit {allowed:.3g} ({dtype})"
    p = case.param_dtype or case.dtype
    _, dw, db = backend.norm_backward(
        inputs.dy, summed, stats, inputs.weight, case.n, 1, case.rms, p, False, True, not case.rms
    )
    assert torch.equal(results["dw"], dw) and (case.rms or torch.equal(results["db"], db))


SHAPES = ((20, 17), (20, 64), (9, 100), (5, 250), (2, 1000))
CASES = [
    Case(m, n, dtype, rms=rms, p=p, dsummed=bool(p) != rms)
    for (m, n), dtype, rms, p in itertools.product(SHAPES[1:4], (FP32, BF16), (False, True), (0.0, 0.3))
]
CASES += [Case(*SHAPES[i], d, p=p) for i, (d, p) in enumerate(zip(DTYPES, (0.1, 0.5, 0.9, 0.0), strict=True))]
CASES += [Case(*SHAPES[i], d, p=p) for i, (d, p) in enumerate(itertools.product((FP64, FP16), (0.0, 0.4)))]
CASES += [Case(12, n, FP32, x, rms=rms, p=p) for n, x, rms, p in ((64, BF16, False, 0.3), (63, BF16, True, 0.0))]
CASES += [Case(12, 96, FP32, FP16, p=p, dsummed=False) for p in (0.0, 0.3)]
CASES += [Case(12, 100, d, None, FP32, rms) for d, rms in ((BF16, False), (FP16, True))]
CASES += [Case(12, 100, FP32, affine=affine) for affine in ("weight", "bias", "none")]
CASES += [Case(12, n, d, layout=la) for n, d in ((96, FP32), (63, BF16)) for la in ("strided", "misaligned")]
CASES += [Case(12, 100, d, None, p, rms, cast=True) for d, p, rms in ((BF16, None, True), (FP16, FP32, False))]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_truth(case: Case) -> None:
    check(case)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looped kernels in small tiles: a narrow row makes several chunks, a few rows make several tiles and parts."""
    monkeypatch.setattr(launch, "forward_launch", lambda *_: launch.NormLaunch(1, 64, 1, True))
    monkeypatch.setattr(launch, "backward_launch", lambda *_: launch.NormLaunch(4, 64, 1, True))
    monkeypatch.setattr(launch, "reduce_launch", lambda *_: launch.NormLaunch(2, 32, 1, True))
    monkeypatch.setattr(launch, "MAX_PARTS", 2)
    launch.backward_partition.cache_clear()
    yield
    launch.backward_partition.cache_clear()


LOOPED = [Case(6, 200, d, rms=rms) for d, rms in ((FP64, False), (FP32, False), (FP32, True), (BF16, False))]
LOOPED += [Case(6, n, FP32, BF16, p=p) for n, p in ((150, 0.3), (128, 0.0))]
LOOPED += [Case(11, 131, p=p, dsummed=not p, rms=bool(p)) for p in (0.0, 0.3)] + [Case(14, 1, FP64)]
LOOPED += [Case(6, 100, FP32, layout=layout) for layout in ("strided", "misaligned")]
LOOPED += [Case(6, 100, FP16, cast=True, dsummed=False), Case(2, 200, BF16, affine="none")]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty", "small_tiles")
@pytest.mark.parametrize("case", LOOPED, ids=str)
def test_looped_against_the_truth(case: Case) -> None:
    check(case)


@runs_kernels
@pytest.mark.parametrize("case", [Case(1, 16400, BF16), Case(1, 8204, FP32, rms=True)], ids=str)
def test_row_wider_than_the_registers(case: Case) -> None:
    assert launch.backward_launch(case.n, case.dtype.itemsize, 32, True).looped
    check(case)


# ------------------------------------------------------------------------------------------------------------- the cast


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=SHORT.get)
def test_cast_before_the_weight(dtype: torch.dtype, rms: bool, looped: bool, request: pytest.FixtureRequest) -> None:
    """xhat of the kernel itself (no parameters), rounded: times weight plus bias in fp32 it must give y's bits."""
    if looped:
        request.getfixturevalue("small_tiles")
    x = torch.randn(6, 200, dtype=dtype).to(DEVICE)
    w, b = (torch.randn(200, device=DEVICE) for _ in range(2))
    rounded, _ = backend.norm_forward(x, None, None, 200, 1, 1e-5, rms, False)
    y, stats = backend.norm_forward(x, w, b, 200, 1, 1e-5, rms, True, True)
    # Multiplied and added with one rounding or two: exact in fp64 but for ties, so at most the neighbour.
    exact = (rounded.double() * w.double() + b.double()).to(dtype)
    apart = backend.norm_forward(x, w, b, 200, 1, 1e-5, rms, True)
    assert (y != exact).float().mean() < 0.01 and (apart[0] != exact).float().mean() > 0.05
    torch.testing.assert_close(y, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(stats, apart[1])  # nothing else changes
    expected, _ = reference.norm_forward(x, w, b, 200, 1, 1e-5, rms, True, True)
    assert (y != expected).float().mean() < 0.01


@runs_kernels
def test_cast_of_fp32_is_nothing() -> None:
    x, w = torch.randn(6, 100, device=DEVICE), torch.randn(100, device=DEVICE)
    with_cast, without = (backend.norm_forward(x, w, None, 100, 1, 1e-5, True, True, c) for c in (True, False))
    assert torch.equal(with_cast[0], without[0])


# --------------------------------------------------------------------------------------------------------- the contract


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(6, 70), Case(6, 70, p=0.0), Case(6, 70, FP32, BF16, p=0.0)], ids=str)
def test_only_the_gradients_asked_for(case: Case, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    inputs = draw(case)
    _, summed, stats = forward(case, inputs)
    full = backward(case, inputs, summed, stats)
    for need in itertools.product((False, True), repeat=4):
        wanted = dict(zip(RESULTS, need, strict=True))
        if not separate(case):
            wanted |= {"dx": False, "dresidual": wanted["dx"] or wanted["dresidual"]}
        some = backward(case, inputs, summed, stats, need)
        assert {name: t is not None for name, t in some.items()} == wanted
        for name in RESULTS:
            assert some[name] is None or torch.equal(some[name], full[name]), (name, need)


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(5, 96), Case(5, 64, FP32, BF16), Case(5, 63, BF16)], ids=str)
def test_layout_changes_no_bit(case: Case, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    inputs = draw(case)
    expected = forward(case, inputs)
    gradients = backward(case, inputs, *expected[1:])
    for layout in ("strided", "misaligned"):
        names = ("x", "residual", "dy", "dsummed")
        moved = {k: laid_out(getattr(inputs, k), layout, 8 * i + 1) for i, k in enumerate(names)}
        for some in (names, names[:1], names[1:2]):
            other = replace(inputs, **{k: moved[k] for k in some})
            for a, e in zip(forward(case, other), expected, strict=True):
                assert torch.equal(a, e), (layout, some)
        summed = laid_out(expected[1], layout, 6)
        other = replace(inputs, **moved)
        for name, t in backward(case, other, summed, expected[2]).items():
            assert torch.equal(t, gradients[name]), (layout, name)


@runs_kernels
def test_any_shape_of_contiguous_input() -> None:
    case = Case(12, 30)
    inputs = draw(case)
    y, summed, stats = forward(case, inputs)
    shaped = replace(inputs, x=inputs.x.view(3, 4, 5, 6), residual=inputs.residual.view(3, 4, 5, 6))
    again = forward(case, shaped)
    assert again[0].shape == again[1].shape == (3, 4, 5, 6)
    assert torch.equal(again[0].view(12, 30), y) and torch.equal(again[1].view(12, 30), summed)
    full = backward(case, inputs, summed, stats)
    results = backward(case, replace(inputs, dsummed=inputs.dsummed.view(12, 5, 6)), again[1], stats)
    for name in ("dx", "dresidual"):
        assert results[name].shape == (3, 4, 5, 6) and torch.equal(results[name].view(12, 30), full[name])


@runs_kernels
def test_expanded_inputs() -> None:
    case = Case(12, 64, BF16)
    inputs = draw(case)
    names = ("x", "residual", "dy", "dsummed")
    expanded = replace(inputs, **{k: getattr(inputs, k)[:1].expand(12, 64) for k in names})
    copied = replace(inputs, **{k: getattr(expanded, k).contiguous() for k in names})
    expected = forward(case, copied)
    for a, e in zip(forward(case, expanded), expected, strict=True):
        assert torch.equal(a, e)
    full = backward(case, copied, *expected[1:])
    for name, t in backward(case, expanded, *expected[1:]).items():
        assert torch.equal(t, full[name])


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
def test_no_stats_unless_needed(looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    i = draw(Case(5, 100))
    args = (i.x, i.residual, i.weight, i.bias, i.seed, 100, 1e-5, False, 0.3)
    with_stats, without = (backend.add_norm_forward(*args, need, False) for need in (True, False))
    assert without[2].shape == (0, 5) and without[2].dtype == FP32
    assert torch.equal(with_stats[0], without[0]) and torch.equal(with_stats[1], without[1])


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(17, 18), Case(17, 100, BF16, rms=True), Case(17, 96, p=0.0)], ids=str)
def test_rows_do_not_depend_on_the_rows_beside_them(case: Case, looped: bool, request: pytest.FixtureRequest) -> None:
    """The mask is of an element's index: with it, the first rows alone; without, any rows."""
    if looped:
        request.getfixturevalue("small_tiles")
    inputs = draw(case)
    y, summed, stats = forward(case, inputs)
    full = backward(case, inputs, summed, stats)
    for rows in (slice(0, 5), slice(0, 1)) if case.p else (slice(3, 12), slice(16, 17)):
        names = ("x", "residual", "dy", "dsummed")
        part = replace(inputs, **{k: getattr(inputs, k)[rows] for k in names})
        part_y, part_summed, part_stats = forward(case, part)
        assert torch.equal(part_y, y[rows]) and torch.equal(part_summed, summed[rows])
        assert torch.equal(part_stats, stats[:, rows])
        results = backward(case, part, part_summed, part_stats)
        for name in ("dx", "dresidual"):
            assert results[name] is full[name] is None or torch.equal(results[name], full[name][rows])


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
def test_a_dropped_nan_is_nan(looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    case = Case(8, 100, p=0.5)
    inputs = draw(case)
    dropped = reference.dropout_mask(inputs.seed.cpu(), inputs.x.cpu(), 0.5) == 0
    row, col = dropped.nonzero()[len(dropped)].tolist()
    clean = forward(case, inputs)
    inputs.x[row, col] = float("nan")
    y, summed, _ = forward(case, inputs)
    others = torch.arange(8) != row
    assert summed[row].isnan().sum() == 1 and summed[row, col].isnan() and y[row].isnan().all()
    assert torch.equal(y[others], clean[0][others])
    inputs.dsummed[row, col] = float("nan")
    dx = backward(case, inputs, clean[1], clean[2])["dx"]
    assert dx.isnan().sum() == 1 and dx[row, col].isnan()


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
def test_constant_sum(looped: bool, request: pytest.FixtureRequest) -> None:
    """The mean is taken about the first element of the sum, so a sum that is constant has its exact mean."""
    if looped:
        request.getfixturevalue("small_tiles")
    x = torch.randint(-64, 64, (3, 100), device=DEVICE).float()
    residual = 1e6 + 0.25 - x
    y, summed, stats = backend.add_norm_forward(x, residual, None, None, None, 100, 1e-5, False, 0.0, True, False)
    assert (summed == 1e6 + 0.25).all() and torch.equal(stats[1], summed[:, 0]) and (y == 0).all()


@runs_kernels
def test_two_runs_give_the_same_bits_and_another_seed_another_mask() -> None:
    case = Case(10, 100)
    inputs = draw(case)
    first, second = forward(case, inputs), forward(case, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(forward(case, replace(inputs, seed=inputs.seed + 2**40))[1], first[1])
    grads, again = (backward(case, inputs, *first[1:]) for _ in range(2))
    assert all(torch.equal(grads[name], again[name]) for name in RESULTS)


@runs_kernels
def test_the_host_never_reads_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 16)
    inputs = draw(case)
    expected = forward(case, inputs)
    for name in ("item", "tolist", "__int__", "__index__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("the host waits for a tensor's value"))
    y, summed, stats = forward(case, inputs)
    backward(case, inputs, summed, stats)
    monkeypatch.undo()
    assert torch.equal(y, expected[0])


@runs_kernels
@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "seed", "dy", "dsummed", "summed", "stats"])
def test_of_a_freed_tensor(name: str) -> None:
    case = Case(4, 16)
    inputs = draw(case)
    _, summed, stats = forward(case, inputs)
    kept = {"summed": summed, "stats": stats}
    tensors = vars(inputs) | kept
    freed = tensors | {name: tensors[name].clone()}
    freed[name].untyped_storage().resize_(0)
    other = Inputs(**{k: freed[k] for k in vars(inputs)})
    calls = []
    if name in ("x", "residual", "weight", "bias", "seed"):
        calls.append(lambda: forward(case, other))
    if name not in ("x", "residual", "bias"):
        calls.append(lambda: backward(case, other, freed["summed"], freed["stats"]))
    for call in calls:
        with pytest.raises(RuntimeError, match=f"{'x' if name == 'summed' else name} has shape"):  # the norm's x
            call()


@runs_kernels
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_operators(p: float) -> None:
    case = Case(2, 12, p=p)
    i = draw(case)
    namespace = torch.ops.fused_norm
    args = (i.x, i.residual, i.weight, i.bias, i.seed, 12, 1e-5, False, p, True, False)
    _, summed, stats = namespace.triton_add_norm_forward(*args)
    torch.library.opcheck(namespace.triton_add_norm_forward.default, args)
    args = (i.dy, i.dsummed, summed, stats, i.weight, i.seed, 12, False, p, FP32, FP32, True, True, True, False)
    torch.library.opcheck(namespace.triton_add_norm_backward.default, args)


# --------------------------------------------------------------------------------------------- what only a GPU can show


@pytest.mark.gpu
def test_a_graph_s_replay_draws_another_mask() -> None:
    """The seed is a tensor that the graph reads: written between replays, it gives each its own mask."""
    x, residual = torch.ones(64, 1000, device="cuda"), torch.zeros(64, 1000, device="cuda")
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    args = (x, residual, None, None, seed, 1000, 1e-5, True, 0.5, True, False)
    backend.add_norm_forward(*args)  # compiled before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed.add_(1)
        _, summed, _ = backend.add_norm_forward(*args)
    for value in range(int(seed) + 1, int(seed) + 4):
        graph.replay()
        expected = reference.dropout_mask(torch.tensor([value]), torch.ones(64, 1000), 0.5)
        assert torch.equal(summed.cpu(), expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, n = 2**21 + 3, 1024
    x = torch.ones(1, n, device="cuda", dtype=BF16).expand(rows, n)
    seed = torch.tensor([-5], device="cuda")
    residual = torch.zeros(1, n, device="cuda", dtype=BF16).expand(rows, n)
    _, summed, stats = backend.add_norm_forward(x, residual, None, None, seed, n, 1e-5, True, 0.5, True, False)
    index = torch.arange((rows - 2) * n, rows * n).reshape(2, n)
    assert torch.equal(summed[-2:].float().cpu(), _kept(-5, index, 0.5) * 2)
    args = (residual, x, summed, stats, None, seed, n, True, 0.5, BF16, BF16, True, False, False, False)
    dx, _, _, _ = backend.add_norm_backward(*args)
    assert torch.equal(dx[-2:].float().cpu(), _kept(-5, index, 0.5) * 2)


# -------------------------------------------------------------------------------------------------------------- traffic


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(8, 256, FP32), Case(8, 256, BF16, rms=True)], ids=str)
def test_traffic(case: Case, looped: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter")
    if looped:
        request.getfixturevalue("small_tiles")
    for p, dsummed in ((0.0, False), (0.3, True)) if looped else itertools.product((0.0, 0.3), (False, True)):
        case = replace(case, p=p, dsummed=dsummed)
        i = draw(case)
        unit, size = i.x.nbytes, i.x.element_size()
        with monkeypatch.context() as patch:
            traffic = Traffic(patch)
            y, summed, stats = forward(case, i)
            pivots = 0 if case.rms else case.rows * size
            for t in (i.x, i.residual):
                assert traffic.of("load", t) == unit + pivots
            assert traffic.of("load", summed) == (unit if looped else 0)
            assert traffic.of("store", y) == traffic.of("store", summed) == unit
            config = launch.forward_launch(case.n, size)
            parameters = sum(t.nbytes for t in (i.weight, i.bias) if t is not None) * (case.rows // config.rows)
            ideal = (5 if looped else 4) * unit + parameters + stats.nbytes
            assert traffic.total("load") + traffic.total("store") <= 1.02 * ideal

            traffic.clear()
            results = backward(case, i, summed, stats, (True, True, True, not case.rms))
            twice = 2 if looped else 1
            assert traffic.of("load", i.dy) == traffic.of("load", summed) == twice * unit
            assert not dsummed or traffic.of("load", i.dsummed) == unit
            written = [results[name] for name in ("dx", "dresidual") if results[name] is not None]
            assert len(written) == 1 + bool(p) and all(traffic.of("store", t) == unit for t in written)
            config = launch.backward_launch(case.n, size, 32, bool(p))
            share = launch.backward_partition(case.rows, 1, config.rows, case.n)
            tiles = -(-case.rows // config.rows)
            grads = [results[name] for name in ("dw", "db") if results[name] is not None]
            writes = tiles if looped else share.parts
            reads = tiles if looped else share.parts  # all but the first of each part's, and once to add up
            partial = (writes + reads) * case.n * 4 * len(grads)
            weights = i.weight.nbytes * (2 * tiles if looped else share.parts * config.rows)
            units = 2 * twice + dsummed + 1 + bool(p)
            ideal = units * unit + weights + partial + stats.nbytes + sum(g.nbytes for g in grads)
            assert traffic.total("load") + traffic.total("store") <= 1.02 * ideal

            traffic.clear()
            backward(case, i, summed, stats, (False, False, False, True))
            assert traffic.of("load", summed) == 0 and (not dsummed or traffic.of("load", i.dsummed) == 0)
            traffic.clear()
            backward(case, i, summed, stats, (True, False, False, False))
            assert traffic.total("store") == unit  # dresidual is not written for nothing


# ------------------------------------------------------------------------------------------------ compiled, without GPU


def test_the_mask_changes_no_order_of_dw_and_db() -> None:
    for n, size, warp_size in itertools.product((1, 3, 64, 1000, 4096, 8192, 65536), (8, 4, 2), (32, 64)):
        plain, masked = (launch.backward_launch(n, size, warp_size, mask) for mask in (False, True))
        for shared, tensors in itertools.product((0, 100 << 10, 228 << 10), (2, 3)):
            other = launch.backward_launch(n, size, warp_size, True, tensors, shared)
            assert replace(other, stages=masked.stages) == masked
        assert replace(masked, num_warps=plain.num_warps, stages=plain.stages) == plain
        assert 1 <= masked.num_warps * warp_size <= 1024


@dataclass(frozen=True)
class Build:
    """One kernel as the launcher would compile it; ``pre`` is with dsummed, ``add`` False a plain norm."""

    pass_: str
    n: int
    size: int
    rms: bool = False
    x_size: int | None = None
    p: bool = True
    pre: bool = True
    cast: bool = False
    aligned: bool = True
    stride: int | None = None
    add: bool = True
    half: str = "bf16"

    def __str__(self) -> str:
        types = f"{self.x_size or self.size}/{self.size}{'-fp16' if self.half != 'bf16' else ''}"
        options = {"rms": self.rms, "p": self.p, "pre": self.pre, "cast": self.cast, "odd": not self.aligned}
        return "-".join([self.pass_, str(self.n), types, *(name for name, on in options.items() if on)])

    def room(self, target: str) -> tuple:
        """What decides the launch beside the width."""
        added = self.add if self.pass_ == "forward" else self.add and self.pre
        tensors = (1 if self.pass_ == "forward" else 2) + added
        return bool(self.p and self.add), tensors, SHARED_MEMORY.get(target, 0)

    def dtype(self, size: int) -> str:
        return self.half if size == 2 else ELEMENT[size]


OUTPUTS = {"summed_ptr", "y_ptr", "stats_ptr", "dx_ptr", "dinput_ptr", "dw_ptr", "db_ptr"}


@functools.cache
def compiled(build: Build, target: str):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[target])
    is_forward = build.pass_ == "forward"
    config = getattr(launch, f"{build.pass_}_launch")(build.n, build.size, gpu.warp_size, *build.room(target))
    kernel = getattr(norm, f"norm_{build.pass_}{'_looped' if config.looped else ''}_kernel")
    rows, acc = build.dtype(build.size), "fp64" if build.size == 8 else "fp32"
    branch = build.dtype(build.x_size or build.size)
    apart = build.p or branch != rows
    beside = 16 if branch == rows else 16 // build.size  # norm._alignment_beside
    align, align_n = launch.alignment(build.n, build.stride or build.n), launch.alignment(build.n)
    constants = {"FP64": build.size == 8, "IS_RMS": build.rms, "CAST": build.cast, "ALIGN_N": align_n}
    constants |= {"ROWS": config.rows, "BLOCK_N": config.block_n, "STAGES": config.stages}
    constants |= {"ALIGN_DINPUT": min(align_n, beside)}
    constants |= dict.fromkeys(("ALIGN_X", "ALIGN_DY", "ALIGN_RESIDUAL", "ALIGN_DSUMMED"), align)
    pointers = dict.fromkeys(("residual_ptr", "summed_ptr", "y_ptr", "dy_ptr", "dsummed_ptr", "dx_ptr"), rows)
    pointers |= dict.fromkeys(("weight_ptr", "bias_ptr"), rows) | dict.fromkeys(("stats_ptr", "dw_ptr", "db_ptr"), acc)
    pointers |= {"x_ptr": branch if is_forward else rows, "dinput_ptr": branch, "seed_ptr": "i64"}
    if is_forward:
        constants["ALIGN_X"] = min(align, beside)
    absent = {"seed_ptr": build.p, "dinput_ptr": apart, "dsummed_ptr": build.pre}
    absent |= dict.fromkeys(("bias_ptr", "db_ptr"), not build.rms)
    if not build.add:
        absent |= dict.fromkeys(("residual_ptr", "summed_ptr", "dsummed_ptr", "dinput_ptr", "seed_ptr"), False)
    constants |= {name: None for name, there in absent.items() if not there}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            if build.aligned or name in OUTPUTS:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if build.size == 8 and name.endswith("_bits") else "i32"
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names}, attributes)
    return triton.compile(source, target=gpu, options={"num_warps": config.num_warps, **common.COMPILE_OPTIONS})


# On every target what fills the most registers: with the mask and dsummed, narrow tiles, the widest row, a looped one.
BUILDS = [Build("forward", n, size) for n, size in ((64, 2), (8192, 4), (launch.FORWARD_WHOLE_ROW[2], 2), (65536, 2))]
BUILDS += [Build("backward", n, size) for n, size in ((64, 2), (1024, 2), (4096, 4), (8192, 4), (8192, 2), (65536, 2))]
BUILDS += [Build("backward", 8192, 4, rms=True), Build("backward", 8192, 4, x_size=2)]
MORE_BUILDS = [Build(p, 8192, size, p=False) for p in ("forward", "backward") for size in (4, 2)]
MORE_BUILDS += [Build(p, 8192, 2, half="fp16", pre=False) for p in ("forward", "backward")]
MORE_BUILDS += [Build("forward", 8192, 4, x_size=2), Build("forward", 8192, 2, rms=True, cast=True)]
MORE_BUILDS += [Build(p, 4096, 8) for p in ("forward", "backward")] + [Build("backward", 64, 4, p=False)]


SPILLS_UNDER_TRITON_3_7 = ("backward-8192-4/4-pre", "backward-8192-2/4-p-pre", "backward-4096-8/8-p-pre")


@needs_compiler
@pytest.mark.parametrize(
    "target, build",
    in_turn(BUILDS) + [("sm_100", build) for build in MORE_BUILDS],
    ids=str,
)
def test_compiles_without_spills(build: Build, target: str, tmp_path: Path) -> None:
    """Three of the widest rows' builds spill two registers a thread on sm_100 under triton 3.7, none under 3.9."""
    known = target == "sm_100" and triton.__version__ < "3.9" and str(build) in SPILLS_UNDER_TRITON_3_7
    assert_no_spills(compiled(build, target), target, tmp_path, stack_limit=8 if known else 0)


@needs_compiler
@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("n, size", [(4096, 4), (4096, 2), (64, 2)])
def test_a_block_of_words_serves_four_columns_of_its_own_thread(pass_: str, n: int, size: int) -> None:
    """One Philox for four elements, and nothing of it through shared memory or other lanes."""
    masked, plain = (compiled(Build(pass_, n, size, p=p), "sm_90") for p in (True, False))
    config = getattr(launch, f"{pass_}_launch")(n, size, 32, *(() if pass_ == "forward" else (True,)))
    blocks = config.rows * config.block_n // (config.num_warps * 32) // 4
    high_words = len(re.findall(r"mul\.hi\.u32", masked.asm["ptx"]))
    # Ten rounds of two, less those of words that are 0; in layer norm's forward the first element of each row as well.
    first_elements = config.rows if pass_ == "forward" else 0
    assert 15 * blocks <= high_words <= 20 * (blocks + first_elements), (high_words, blocks)

    def words_to_others(kernel) -> collections.Counter:
        ttgir = kernel.asm["ttgir"]
        return collections.Counter(re.findall(r"convert_layout .*?(tensor<[\dx]+x(?:i32|i1|i8)\b)", ttgir))

    assert not words_to_others(masked) - words_to_others(plain)


@needs_compiler
@pytest.mark.parametrize("pass_, n, size", [("forward", 64, 4), ("forward", 8192, 2), ("backward", 8192, 2)])
@pytest.mark.parametrize("x_size", [None, 2])
def test_order_of_sums_is_the_norm_s(pass_: str, n: int, size: int, x_size: int | None) -> None:
    """As norm_forward's and norm_backward's of the same row, whatever x's type, the mask and the alignment."""
    if x_size == size:
        pytest.skip("the same build")
    expected = reductions(compiled(Build(pass_, n, size, add=False), "sm_90"))
    assert expected
    build = Build(pass_, n, size, x_size=x_size)
    for other in (build, replace(build, p=False), replace(build, aligned=False), replace(build, stride=n + 1)):
        assert reductions(compiled(other, "sm_90")) == expected, other


@needs_compiler
@pytest.mark.parametrize("size", [4, 2], ids=ELEMENT.get)
@pytest.mark.parametrize("n", [64, 1000, 65536])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_aligned_rows_move_16_bytes_at_a_time(pass_: str, n: int, size: int) -> None:
    ptx = compiled(Build(pass_, n, size), "sm_90").asm["ptx"]
    assert set(streams(ptx)) == {16}
    assert widest_access(ptx, "st", 32) == 16


@needs_compiler
@pytest.mark.parametrize("n", [64, 65536])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_row_offsets_are_64_bit(pass_: str, n: int) -> None:
    # Without the mask, whose words are products of 32 bits, and whose elements are counted by the same offsets.
    assert_64_bit_offsets(compiled(Build(pass_, n, 4, p=False), "sm_90").asm["ttir"])
