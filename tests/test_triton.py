"""The Triton backend's norms: their results against the fp64 truth, their traffic, and what their kernels compile to.

Tests marked ``@runs_kernels`` run on the GPU where there is one, else in Triton's interpreter (triton_kernels.py).
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

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

import fused_norm.functional as FF  # noqa: E402
from fused_norm import reference, use_backend  # noqa: E402
from fused_norm.backends import triton as backend  # noqa: E402
from fused_norm.backends.triton import common, double_backward, launch, norm  # noqa: E402
from fused_norm.testing import (  # noqa: E402
    NormResult,
    assert_norm_close,
    error_limit,
    norm_truth,
    param_error_limit,
    relative_error,
)

# ------------------------------------------------------------------------------------------------ cases and their truth

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP64, FP32, BF16, FP16)


@dataclass(frozen=True)
class Case:
    rows: int
    n: int
    dtype: torch.dtype = FP32
    rms: bool = False
    param_dtype: torch.dtype | None = None
    affine: str = "weight+bias"
    groups: int = 1
    per_group: bool = False
    eps: float = 1e-5
    layout: str = "contiguous"

    def __str__(self) -> str:
        short = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16", None: "same"}
        extras = f"-{self.groups}groups{'-own' if self.per_group else ''}" if self.groups > 1 else ""
        return (
            f"{'rms' if self.rms else 'layer'}-{self.rows}x{self.n}-{short[self.dtype]}-{short[self.param_dtype]}"
            f"-{self.affine}-{self.layout}{extras}"
        )


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor


def draw(case: Case) -> Inputs:
    def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, dtype=FP64) * scale + shift).to(dtype)

    p = case.param_dtype or case.dtype
    n = case.n * (case.groups if case.per_group else 1)
    return Inputs(
        x=laid_out(randn(case.rows, case.n, dtype=case.dtype, shift=0.5), case.layout, 5),
        weight=randn(n, dtype=p, scale=0.3, shift=1.0).to(DEVICE) if "weight" in case.affine else None,
        bias=randn(n, dtype=p, scale=0.3).to(DEVICE) if "bias" in case.affine and not case.rms else None,
        dy=laid_out(randn(case.rows, case.n, dtype=case.dtype), case.layout, 3),
    )


def run(case: Case, inputs: Inputs, need: tuple[bool, bool, bool] = (True, True, True)) -> NormResult:
    """What the backend computes, once its shapes, dtypes and layout are checked against the contract."""
    need = (*need[:2], need[2] and not case.rms)
    x, acc = inputs.x, FP64 if case.dtype == FP64 else FP32
    p = case.param_dtype or case.dtype
    y, stats = backend.norm_forward(
        x, inputs.weight, inputs.bias, case.n, case.groups, case.eps, case.rms, need_stats=True
    )
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert stats.shape == (1 if case.rms else 2, case.rows) and stats.dtype == acc
    dx, dw, db = backend.norm_backward(inputs.dy, x, stats, inputs.weight, case.n, case.groups, case.rms, p, *need)
    if need[0]:
        assert dx.shape == x.shape and dx.dtype == x.dtype and dx.is_contiguous()
    for needed, grad in zip(need[1:], (dw, db), strict=True):
        if needed:
            assert grad.shape == (case.groups, case.n) and grad.dtype == p and grad.is_contiguous()
    return NormResult(y, dx, dw, db)


def run_torch(case: Case, inputs: Inputs) -> NormResult:
    """torch's own CPU kernels, group by group."""

    def split(parameter: Tensor | None) -> list[Tensor | None]:
        if parameter is None:
            return [None] * case.groups
        return list(parameter.cpu().reshape(-1, case.n).expand(case.groups, -1))

    parts = []
    xs, dys = (t.cpu().contiguous().chunk(case.groups) for t in (inputs.x, inputs.dy))
    for x, dy, weight, bias in zip(xs, dys, split(inputs.weight), split(inputs.bias), strict=True):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        if case.rms:
            y = F.rms_norm(leaves[0], (case.n,), leaves[1], case.eps)
        else:
            y = F.layer_norm(leaves[0], (case.n,), leaves[1], leaves[2], case.eps)
        y.backward(dy)
        parts.append((y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)))
    y, dx, dw, db = (None if p[0] is None else torch.stack(p) for p in zip(*parts, strict=True))
    return NormResult(y, dx, dw, db)


def truth_of(case: Case, inputs: Inputs) -> NormResult:
    on_cpu = (None if t is None else t.cpu() for t in (inputs.x, inputs.weight, inputs.bias, inputs.dy))
    return norm_truth(*on_cpu, case.n, case.eps, case.rms, case.groups)


def check(case: Case, inputs: Inputs, result: NormResult) -> None:
    ours = NormResult(*(None if t is None else t.cpu() for t in vars(result).values()))
    truth = truth_of(case, inputs)
    if case.n < 16 and case.dtype in (FP64, FP32):
        # A few sums of many terms, which may cancel: torch's error there is luck, the magnitude of the terms is not.
        no_affine = truth_of(case, Inputs(inputs.x, None, None, inputs.dy))
        dy = inputs.dy.double().cpu()
        for sums, exact, terms in ((ours.dw, truth.dw, dy * no_affine.y), (ours.db, truth.db, dy)):
            if sums is not None:
                assert ((sums - exact).abs() <= 2 * torch.finfo(case.dtype).eps * terms.abs().sum(0)).all()
        ours = replace(ours, dw=None, db=None)
    assert_norm_close(ours, truth, run_torch(case, inputs))


def assert_same_bits(a: NormResult, b: NormResult) -> None:
    for name in vars(a):
        left, right = getattr(a, name), getattr(b, name)
        if left is not None and right is not None:
            assert left.dtype == right.dtype
            torch.testing.assert_close(
                left, right, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


# Many rows where a row is short: the error of a handful of elements says little.
SHAPES = ((150, 1), (150, 2), (100, 3), (40, 17), (20, 63), (30, 100), (5, 1000), (3, 1024))
CASES = [Case(m, n, dtype, rms) for (m, n), dtype, rms in itertools.product(SHAPES, DTYPES, (False, True))]
CASES += [Case(20, 100, dtype, rms, FP32) for dtype in (BF16, FP16) for rms in (False, True)]
CASES += [Case(20, 100, dtype, affine=affine) for dtype in (FP32, BF16) for affine in ("weight", "bias", "none")]
CASES += [Case(20, 100, FP32, True, affine="none")]
CASES += [
    Case(30, 100, d, rms, None, "weight+bias", 3, own)
    for d, rms, own in ((FP32, False, True), (BF16, True, True), (BF16, False, False))
]
CASES += [Case(80, 100, d, groups=2, per_group=own) for d, own in ((FP32, True), (BF16, False))]  # of several parts
CASES += [Case(20, n, d, layout=la) for n, d in ((96, FP32), (63, BF16)) for la in ("strided", "misaligned")]
CASES += [Case(20, 100, FP32, rms, eps=eps) for eps in (0.0, 0.1) for rms in (False, True)]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_the_truth(case: Case) -> None:
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looped kernels in small tiles: a narrow row makes several chunks, a few rows make several tiles and parts."""
    monkeypatch.setattr(launch, "forward_launch", lambda *_: launch.NormLaunch(1, 64, 1, True))
    monkeypatch.setattr(launch, "backward_launch", lambda *_: launch.NormLaunch(4, 64, 1, True))
    monkeypatch.setattr(launch, "double_backward_launch", lambda *_: launch.NormLaunch(4, 64, 1, True))
    monkeypatch.setattr(launch, "reduce_launch", lambda *_: launch.NormLaunch(2, 32, 1, True))
    monkeypatch.setattr(launch, "MAX_PARTS", 2)
    launch.backward_partition.cache_clear()
    yield
    launch.backward_partition.cache_clear()


LOOPED = [Case(14, 200, dtype, rms) for dtype in DTYPES for rms in (False, True)] + [Case(14, 64), Case(14, 1, FP64)]
LOOPED += [Case(27, 150, BF16, rms, FP32, groups=3, per_group=own) for rms, own in ((False, True), (True, False))]
LOOPED += [Case(27, 150, d, groups=3) for d in (FP64, FP32)] + [Case(27, 150, BF16, False, FP32, groups=3)]
LOOPED += [Case(14, 100, FP32, affine=affine) for affine in ("weight", "bias", "none")]
LOOPED += [Case(14, 100, FP32, layout=layout) for layout in ("strided", "misaligned")]
LOOPED += [Case(2, 200, BF16)]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty", "small_tiles")
@pytest.mark.parametrize("case", LOOPED, ids=str)
def test_looped_error_against_the_truth(case: Case) -> None:
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


@runs_kernels
@pytest.mark.parametrize("case", [Case(2, 8200, BF16), Case(2, 8200, FP32, True)], ids=str)
def test_row_wider_than_the_registers(case: Case) -> None:
    assert launch.backward_launch(case.n, case.dtype.itemsize).looped
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


@runs_kernels
@pytest.mark.parametrize("n, dtype", [(262144, BF16), (16400, FP32)])
def test_forward_of_a_wide_row(n: int, dtype: torch.dtype) -> None:
    case = Case(1, n, dtype)
    assert launch.forward_launch(n, dtype.itemsize).looped
    inputs = draw(case)
    y, _ = backend.norm_forward(inputs.x, inputs.weight, inputs.bias, n, 1, case.eps, False, need_stats=False)
    check(case, inputs, NormResult(y))


# --------------------------------------------------------------------------------------------------------- the contract

SUBSETS = [need for need in itertools.product((False, True), repeat=3) if any(need)]


@runs_kernels
@pytest.mark.small
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("need", SUBSETS, ids=lambda need: "-".join(itertools.compress(("dx", "dw", "db"), need)))
def test_only_the_gradients_asked_for(need: tuple, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    case = Case(20, 70)
    inputs = draw(case)
    full, some = run(case, inputs), run(case, inputs, need)
    assert [getattr(some, name) is not None for name in ("dx", "dw", "db")] == list(need)
    assert_same_bits(full, some)


@runs_kernels
def test_no_stats_unless_needed() -> None:
    inputs = draw(Case(5, 16))
    with_stats, stats = backend.norm_forward(inputs.x, inputs.weight, inputs.bias, 16, 1, 1e-5, False, True)
    without, none = backend.norm_forward(inputs.x, inputs.weight, inputs.bias, 16, 1, 1e-5, False, False)
    assert none.shape == (0, 5) and none.dtype == FP32
    torch.testing.assert_close(with_stats, without, rtol=0, atol=0)
    torch.testing.assert_close(stats[1], inputs.x.mean(-1), rtol=1e-6, atol=1e-6)


@runs_kernels
@pytest.mark.small
@pytest.mark.parametrize("layout", ["strided", "misaligned"])
@pytest.mark.parametrize("case", [Case(20, 96), Case(20, 96, BF16), Case(20, 63, BF16)], ids=str)
def test_layout_changes_no_bit(case: Case, layout: str) -> None:
    inputs = draw(case)
    moved = Inputs(laid_out(inputs.x, layout, 32), inputs.weight, inputs.bias, laid_out(inputs.dy, layout, 7))
    assert_same_bits(run(case, inputs), run(case, moved))


@runs_kernels
def test_expanded_upstream_gradient() -> None:
    case = Case(20, 63)
    inputs = draw(case)
    expanded = Inputs(inputs.x, inputs.weight, inputs.bias, inputs.dy[:1].expand(20, 63))
    check(case, expanded, run(case, expanded))


@runs_kernels
@pytest.mark.small
def test_any_shape_of_contiguous_input() -> None:
    case = Case(24, 30)
    inputs = draw(case)
    y, stats = backend.norm_forward(inputs.x.view(2, 12, 5, 6), inputs.weight, inputs.bias, 30, 1, 1e-5, False, True)
    assert y.shape == (2, 12, 5, 6)
    dx, _, _ = backend.norm_backward(
        inputs.dy.view(24, 5, 6),
        inputs.x.view(2, 12, 5, 6),
        stats,
        inputs.weight,
        30,
        1,
        False,
        FP32,
        True,
        False,
        False,
    )
    assert dx.shape == (2, 12, 5, 6)
    check(case, inputs, NormResult(y, dx))


# ------------------------------------------------------------------------------------------------------ double backward


@dataclass(frozen=True)
class Directions:
    """What reaches backward's results, and the tensors of that backward."""

    ddx: Tensor | None
    ddw: Tensor | None
    ddb: Tensor | None
    dy: Tensor | None
    x: Tensor
    weight: Tensor | None


RESULTS = ("grad_dy", "grad_x", "grad_w")
ALL = (True, True, True)


def draw_directions(case: Case, given: str = "ddx+ddw+ddb") -> Directions:
    """As ``draw``, with the ``given`` directions; ddw is one a group where the weight is shared, and the reverse."""
    inputs = draw(case)
    ddx = (torch.randn(case.rows, case.n, dtype=FP64) + 0.5).to(case.dtype)
    ddw, ddb = (
        torch.randn(case.n * groups, dtype=FP64).to(case.param_dtype or case.dtype).to(DEVICE)
        for groups in (1 if case.per_group else case.groups, case.groups)
    )
    return Directions(
        ddx=laid_out(ddx, case.layout, 11) if "ddx" in given else None,
        ddw=ddw if "ddw" in given else None,
        ddb=ddb if "ddb" in given and not case.rms else None,
        dy=inputs.dy,
        x=inputs.x,
        weight=inputs.weight,
    )


def _double_backward(module, case: Case, d: Directions, need: tuple[bool, bool, bool], p: torch.dtype) -> tuple:
    _, stats = reference.norm_forward(d.x, None, None, case.n, 1, case.eps, case.rms, True)
    return module.norm_double_backward(
        d.ddx, d.ddw, d.ddb, d.dy, d.x, stats, d.weight, case.n, case.groups, case.rms, p, *need
    )


def run_double(case: Case, d: Directions, need: tuple[bool, bool, bool] = ALL) -> dict[str, Tensor]:
    """What the backend computes, once its shapes, dtypes and layout are checked against the contract."""
    p = case.param_dtype or case.dtype
    results = dict(zip(RESULTS, _double_backward(backend, case, d, need, p), strict=True))
    for name, needed in zip(RESULTS, need, strict=True):
        t = results[name]
        if needed:
            shape, dtype = ((case.groups, case.n), p) if name == "grad_w" else (d.x.shape, d.x.dtype)
            assert t.shape == shape and t.dtype == dtype and t.is_contiguous(), name
    return {name: results[name] for name in itertools.compress(RESULTS, need)}


def check_double(case: Case, d: Directions, results: dict[str, Tensor]) -> None:
    """Hold the results to the fp64 truth: as near as one rounding, or as the reference in the same precision."""
    need = tuple(name in results for name in RESULTS)
    on_cpu = Directions(*(None if t is None else t.cpu() for t in vars(d).values()))
    in_fp64 = Directions(*(None if t is None else t.double() for t in vars(on_cpu).values()))
    exact = dict(zip(RESULTS, _double_backward(reference, case, in_fp64, need, FP64), strict=True))
    plain = dict(
        zip(RESULTS, _double_backward(reference, case, on_cpu, need, case.param_dtype or case.dtype), strict=True)
    )
    for name, t in results.items():
        truth = exact[name]
        if case.n < 4:
            # p and t have few directions left, or none: what remains of them is what their terms' roundings leave.
            def largest(t: Tensor | None) -> Tensor:
                return torch.ones(()) if t is None else t.abs().max()

            rstd = 1 / case.eps**0.5
            terms = largest(in_fp64.weight) * rstd * largest(in_fp64.ddx) + largest(in_fp64.ddw) + largest(in_fp64.ddb)
            if name != "grad_dy":
                terms = terms * rstd * largest(in_fp64.dy)
            assert ((t.cpu().double() - truth).abs() <= 4 * torch.finfo(t.dtype).eps * terms).all(), name
            continue
        limit = param_error_limit if name == "grad_w" else error_limit
        allowed = limit(truth, t.dtype, relative_error(plain[name], truth))
        error = relative_error(t.cpu(), truth)
        assert error <= allowed, f"{name}: error {error:.3g} > limit {allowed:.3g} ({t.dtype})"


DOUBLE = [
    Case(m, n, dtype, rms)
    for (m, n), dtype, rms in itertools.product(((40, 17), (20, 100), (5, 1000)), DTYPES, (False, True))
]
DOUBLE += [Case(70, n, FP32, rms) for n in (1, 2, 3) for rms in (False, True)]
DOUBLE += [Case(20, 100, BF16, rms, FP32) for rms in (False, True)]
DOUBLE += [Case(20, 100, FP32, affine="none"), Case(30, 100, FP32, groups=3), Case(1, 64, FP32)]
DOUBLE += [Case(30, 100, d, r, FP32, groups=3, per_group=True) for d, r in ((FP32, False), (BF16, True))]
DOUBLE += [Case(80, 100, d, groups=2) for d in (FP32, BF16)]
DOUBLE += [Case(20, n, d, layout=la) for n, d in ((96, FP32), (63, BF16)) for la in ("strided", "misaligned")]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_double_backward_against_the_truth(case: Case) -> None:
    d = draw_directions(case)
    check_double(case, d, run_double(case, d))


DOUBLE_LOOPED = [Case(14, 200, dtype, rms) for dtype in (FP64, FP32, BF16) for rms in (False, True)]
DOUBLE_LOOPED += [Case(27, 150, BF16, r, FP32, groups=3, per_group=own) for r, own in ((False, True), (True, False))]
DOUBLE_LOOPED += [Case(27, 150, d, groups=3) for d in (FP32, BF16)]
DOUBLE_LOOPED += [Case(14, 100, FP32, layout="strided"), Case(14, 100, FP32, affine="none"), Case(2, 64, FP16)]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty", "small_tiles")
@pytest.mark.parametrize("case", DOUBLE_LOOPED, ids=str)
def test_looped_double_backward_against_the_truth(case: Case) -> None:
    d = draw_directions(case)
    check_double(case, d, run_double(case, d))


@runs_kernels
@pytest.mark.parametrize("case", [Case(2, 8200, BF16), Case(2, 4100, FP32, True)], ids=str)
def test_double_backward_of_a_row_wider_than_the_registers(case: Case) -> None:
    assert launch.double_backward_launch(case.n, case.dtype.itemsize).looped
    d = draw_directions(case)
    check_double(case, d, run_double(case, d))


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(10, 70, groups=2), Case(7, 70, rms=True)], ids=str)
@pytest.mark.parametrize("given", ["", "ddx", "ddw", "ddb", "ddx+ddw", "ddx+ddb", "ddw+ddb", "ddx+ddw+ddb"])
def test_double_backward_of_some_directions(
    given: str, case: Case, looped: bool, request: pytest.FixtureRequest
) -> None:
    """Whichever of ddx, ddw and ddb there are and whatever is needed; what is needed changes no bit of the rest."""
    if looped:
        request.getfixturevalue("small_tiles")
    d = draw_directions(case, given)
    full = run_double(case, d)
    check_double(case, d, full)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        without_dy = replace(d, dy=None) if need == (True, False, False) else d
        for name, t in run_double(case, without_dy, need).items():
            assert torch.equal(t, full[name]), (name, need)


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(20, 96), Case(20, 63, BF16)], ids=str)
def test_layout_changes_no_bit_of_double_backward(case: Case, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    d = draw_directions(case)
    expected = run_double(case, d)
    for layout in ("strided", "misaligned"):
        moved = replace(d, **{k: laid_out(getattr(d, k), layout, i) for k, i in (("ddx", 32), ("dy", 7), ("x", 16))})
        for name, t in run_double(case, moved).items():
            assert torch.equal(t, expected[name]), (name, layout)


@runs_kernels
@pytest.mark.parametrize("name", ["ddx", "ddw", "ddb", "dy", "x", "weight"])
def test_double_backward_of_a_freed_tensor(name: str) -> None:
    d = draw_directions(Case(4, 16))
    t = getattr(d, name)
    freed = replace(d, **{name: t.clone()})
    stats = torch.ones(2, 4, device=DEVICE)
    getattr(freed, name).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name} has shape"):
        backend.norm_double_backward(
            freed.ddx, freed.ddw, freed.ddb, freed.dy, freed.x, stats, freed.weight, 16, 1, False, FP32, *ALL
        )


# ------------------------------------------------------------------------------------------------------------- numerics


@runs_kernels
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_eps_has_the_precision_of_the_sums(dtype: torch.dtype, rms: bool) -> None:
    # Rows so small that rstd is nearly 1/sqrt(eps): an eps rounded to fp32 is off by 2e-8.
    case = Case(8, 100, dtype, rms, affine="none", eps=1e-5)
    inputs = draw(case)
    inputs = Inputs(inputs.x * 1e-4, None, None, inputs.dy)
    y, stats = backend.norm_forward(inputs.x, None, None, 100, 1, case.eps, rms, True)
    truth = truth_of(case, inputs)
    assert relative_error(y.cpu(), truth.y) < 4 * torch.finfo(dtype).eps
    rstd = 1 / (inputs.x.double().var(-1, correction=0) + 1e-5).sqrt() if not rms else None
    if rstd is not None:
        torch.testing.assert_close(stats[0].double(), rstd, rtol=3 * torch.finfo(dtype).eps, atol=0)


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("n", [100, 1000])
def test_constant_row(n: int, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    x = torch.tensor([[0.1], [1e6 + 0.3], [-7.7]], device=DEVICE).expand(3, n).contiguous()
    y, stats = backend.norm_forward(x, None, None, n, 1, 1e-5, False, True)
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(stats[1], x[:, 0])
    y, _ = backend.norm_forward(x, None, None, n, 1, 0.0, False, True)
    assert y.isnan().all()


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
def test_large_offset(looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    x = (torch.randn(4, 1000) + 1e6).to(DEVICE)
    y, _ = backend.norm_forward(x, None, None, 1000, 1, 1e-5, False, False)
    assert (y.std(-1, correction=0) - 1).abs().max() < 1e-2
    assert relative_error(y.cpu(), norm_truth(x.cpu(), None, None, x.cpu(), 1000, 1e-5, False).y) < 0.05


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("n", [64, 1000])
def test_first_element_far_from_the_rest(n: int, looped: bool, request: pytest.FixtureRequest) -> None:
    """The mean is summed about the first element; that must cost no digits when it is an outlier."""
    if looped:
        request.getfixturevalue("small_tiles")
    x = torch.randn(4, n)
    x[:, 0] += 100
    y, _ = backend.norm_forward(x.to(DEVICE), None, None, n, 1, 1e-5, False, False)
    assert relative_error(y.cpu(), norm_truth(x, None, None, x, n, 1e-5, False).y) < 2e-7


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("value, at", [(float("nan"), 0), (float("nan"), 70), (float("inf"), 0), (float("-inf"), 70)])
def test_nan_and_inf_as_torch(value: float, at: int, rms: bool, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    case = Case(12, 100, FP32, rms)
    clean = draw(case)
    x = clean.x.clone()
    x[5, at] = value
    dirty = Inputs(x, clean.weight, clean.bias, clean.dy)
    before, after, by_torch = run(case, clean), run(case, dirty), run_torch(case, dirty)
    others = torch.arange(12) != 5
    assert torch.equal(after.y[5].cpu().isnan(), by_torch.y[0, 5].isnan())
    if not rms or value != value:  # NaN
        assert after.y[5].isnan().all()
    else:
        assert torch.equal(after.y[5].cpu().nan_to_num(9), by_torch.y[0, 5].nan_to_num(9))
    assert torch.equal(after.y[others], before.y[others]) and torch.equal(after.dx[others], before.dx[others])
    assert torch.equal(after.dx[5].cpu().isnan(), by_torch.dx[0, 5].isnan())


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(40, 17), Case(40, 100, BF16, True)], ids=str)
def test_forward_is_batch_invariant(case: Case, looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    inputs = draw(case)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return backend.norm_forward(x, inputs.weight, inputs.bias, case.n, 1, case.eps, case.rms, True)

    y, stats = forward(inputs.x)
    for rows in (slice(3, 20), slice(39, 40)):
        part, part_stats = forward(inputs.x[rows])
        assert torch.equal(part, y[rows]) and torch.equal(part_stats, stats[:, rows])


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
def test_two_runs_give_the_same_bits(looped: bool, request: pytest.FixtureRequest) -> None:
    if looped:
        request.getfixturevalue("small_tiles")
    case = Case(40, 100, BF16, param_dtype=FP32)
    inputs = draw(case)
    assert_same_bits(run(case, inputs), run(case, inputs))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, n = 2**21 + 3, 1024
    x = torch.randn(64, n, device="cuda", dtype=BF16).repeat(rows // 64 + 1, 1)[:rows]
    y, stats = backend.norm_forward(x, None, None, n, 1, 1e-5, False, True)
    assert torch.equal(y[-2:], y[(rows - 2) % 64 : (rows - 2) % 64 + 2])
    dx, _, _ = backend.norm_backward(x, x, stats, None, n, 1, False, BF16, True, False, False)
    assert torch.equal(dx[-2:], dx[(rows - 2) % 64 : (rows - 2) % 64 + 2])


# -------------------------------------------------------------------------------------------------------------- traffic


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(24, 256, FP32), Case(24, 256, BF16, True)], ids=str)
def test_traffic(case: Case, looped: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter")
    if looped:
        request.getfixturevalue("small_tiles")
    inputs = draw(case)
    unit = inputs.x.nbytes
    traffic = Traffic(monkeypatch)
    y, stats = backend.norm_forward(inputs.x, inputs.weight, inputs.bias, case.n, 1, 1e-5, case.rms, True)
    pivots = 0 if case.rms else unit // case.n
    assert traffic.of("load", inputs.x) == unit * (2 if looped else 1) + pivots
    assert traffic.of("store", y) == unit and traffic.total("store") == unit + stats.nbytes

    traffic.clear()
    dx, dw, db = backend.norm_backward(
        inputs.dy, inputs.x, stats, inputs.weight, case.n, 1, case.rms, case.dtype, True, True, not case.rms
    )
    assert traffic.of("load", inputs.x) == traffic.of("load", inputs.dy) == unit * (2 if looped else 1)
    assert traffic.of("store", dx) == unit
    grads = [g for g in (dw, db) if g is not None]
    config = launch.backward_launch(case.n, case.dtype.itemsize)
    share = launch.backward_partition(case.rows, 1, config.rows, case.n)
    tiles = share.parts if not looped else -(-case.rows // config.rows)
    partial = tiles * case.n * 4 * len(grads)
    assert traffic.total("store") == unit + partial + sum(g.nbytes for g in grads)

    traffic.clear()
    backend.norm_backward(
        inputs.dy, inputs.x, stats, inputs.weight, case.n, 1, case.rms, case.dtype, False, False, True
    )
    assert traffic.of("load", inputs.x) == 0 and traffic.of("load", inputs.dy) == unit


@runs_kernels
@pytest.mark.parametrize("looped", [False, True], ids=["whole", "looped"])
@pytest.mark.parametrize("case", [Case(24, 256, FP32), Case(24, 256, BF16, True)], ids=str)
def test_traffic_of_double_backward(
    case: Case, looped: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter")
    if looped:
        request.getfixturevalue("small_tiles")
    d = draw_directions(case)
    unit = d.x.nbytes
    traffic = Traffic(monkeypatch)

    def reads() -> tuple[float, ...]:
        return tuple(traffic.of("load", t) / unit for t in (d.ddx, d.dy, d.x))

    grad_w = run_double(case, d)["grad_w"]
    assert reads() == ((3, 3, 3) if looped else (1, 1, 1))
    config = launch.double_backward_launch(case.n, case.dtype.itemsize)
    parts = launch.double_backward_partition(case.rows, 1, config.rows, True).parts
    tiles = parts if not looped else -(-case.rows // config.rows)
    assert traffic.total("store") == 2 * unit + tiles * case.n * 4 + grad_w.nbytes

    for need, expected, written in (
        ((True, False, False), (2, 0, 2) if looped else (1, 0, 1), unit),  # the jvp
        ((False, True, False), (3, 3, 3) if looped else (1, 1, 1), unit),
        ((False, False, True), (2, 1, 2) if looped else (1, 1, 1), tiles * case.n * 4 + grad_w.nbytes),
    ):
        traffic.clear()
        run_double(case, d, need)
        assert reads() == expected and traffic.total("store") == written, need

    traffic.clear()
    without_ddx = replace(d, ddx=None)
    run_double(case, without_ddx, (True, True, False))
    assert reads() == ((0, 2, 2) if looped else (0, 1, 1))
    traffic.clear()
    run_double(case, replace(without_ddx, ddw=None))
    assert traffic.total("load") == traffic.total("store") == 0  # no kernel runs


# ------------------------------------------------------------------------------------------------- launch configuration


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("element_size", [8, 4, 2])
def test_launches_cover_every_width(element_size: int, warp_size: int) -> None:
    widths = sorted({2**k + d for k in range(19) for d in (-1, 0, 1) if 2**k + d > 0})
    for n in widths:
        for config in (launch.forward_launch, launch.backward_launch, launch.double_backward_launch):
            c = config(n, element_size, warp_size)
            assert c.looped or c.block_n >= n
            assert c.num_warps & (c.num_warps - 1) == 0 and 1 <= c.num_warps * warp_size <= 1024


@pytest.mark.parametrize("tensors", [2, 3])
@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("element_size", [8, 4, 2])
def test_copies_ahead_fit_and_change_nothing_else(element_size: int, warp_size: int, tensors: int) -> None:
    """Of every width up to the widest held one, on multiprocessors from 64 to 228 KiB of shared memory."""
    deepest = 0
    widths = {2**k + d for k in range(14) for d in range(-4, 5)} | {768, 1000, 1536, 3072, 5120, 6144}
    for n, kib, dropout in itertools.product(
        sorted(w for w in widths if 0 < w <= 8192), (0, 64, 100, 164, 228), (False, True)
    ):
        c = launch.backward_launch(n, element_size, warp_size, dropout, tensors, kib << 10)
        plain = launch.backward_launch(n, element_size, warp_size, dropout)
        assert replace(c, stages=1) == replace(plain, stages=1)
        if warp_size == 64 or c.stages == 1:
            assert c.stages in (1, 2)
            continue
        assert n % 4 == 0 and element_size < 8 and not c.looped and c.stages in (3, 4)
        tile = c.rows * c.block_n * element_size * tensors
        programs = max(1, 512 // (c.num_warps * warp_size))
        # Two programs of 256 threads share a multiprocessor, with a KiB of each the system's.
        assert programs * ((c.stages - 1) * tile + 1024) <= kib << 10
        deepest = max(deepest, c.stages)
        if kib == 228:
            assert programs * (c.stages - 2) * c.rows * n * element_size * tensors >= 16 << 10
    assert deepest == (4 if warp_size == 32 and element_size < 8 else 0)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("tensors", [2, 3])
def test_copies_ahead_of_looped_rows(tensors: int, dropout: bool) -> None:
    for n, size, kib in itertools.product((8196, 16384, 16388, 16390, 65536), (8, 4, 2), (0, 64, 100, 164, 228)):
        c = launch.backward_launch(n, size, 32, dropout, tensors, kib << 10)
        assert c.looped and replace(c, stages=1) == launch.backward_launch(n, size)
        possible = kib >= 164 and n % 4 == 0 and size < 8 and tensors == 2 and not dropout
        assert c.stages == (3 if possible else 1) or (kib in (64, 100) and c.stages == 3)
        assert c.stages == 1 or (c.stages - 1) * c.rows * c.block_n * size * tensors + 1024 <= kib << 10
        # Where tiles of few rows are chosen, they and the partial sums of all programs are within 50 MB.
        sums = 2 * 4 * n
        assert c.rows == 16 or launch.MAX_PARTS // 2 * (2 * c.rows * n * size + sums) <= 50 << 20


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize("element_size", [8, 4, 2])
def test_copies_ahead_in_forward(element_size: int, tensors: int) -> None:
    for n, kib, dropout in itertools.product(
        (64, 1000, 16384, 16388, 16390, 65536), (0, 64, 100, 164, 228), (False, True)
    ):
        c = launch.forward_launch(n, element_size, 32, dropout, tensors, kib << 10)
        assert replace(c, stages=1) == launch.forward_launch(n, element_size)
        possible = c.looped and n % 4 == 0 and element_size < 8 and not dropout
        held = 2 * ((c.stages - 1) * c.block_n * element_size * tensors + 1024)  # of two programs of 512 threads
        assert (c.stages == 1 or held <= kib << 10) and c.stages in ((1, 3, 4) if possible else (1,))
        assert kib != 228 or not possible or element_size * tensors == 8 or c.stages == 3


@pytest.mark.parametrize("groups", [1, 3, 300])
@pytest.mark.parametrize("rows", [1, 7, 256, 257, 4096, 4100, 1_000_003])
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_partition_shares_out_every_row_once(rows: int, groups: int, tile: int) -> None:
    for n, most in ((0, launch.MAX_PARTS), (4096, launch.MAX_PARTS), (4097, launch.MAX_PARTS // 2)):
        share = launch.backward_partition(rows, groups, tile, n)
        assert share.rows_per_part % tile == 0 and share.parts * groups <= max(most, groups)
        assert (share.parts - 1) * share.rows_per_part < rows <= share.parts * share.rows_per_part
    share = launch.backward_partition(rows, groups, tile)
    assert (share.parts - 1) * share.rows_per_part < rows <= share.parts * share.rows_per_part
    assert launch.double_backward_partition(rows, groups, tile, True) == share
    share = launch.double_backward_partition(rows, groups, tile, False)
    assert (share.parts - 1) * share.rows_per_part < rows <= share.parts * share.rows_per_part


def test_no_grid_has_a_second_dimension() -> None:
    """CUDA takes 2^31 - 1 programs in the first and 65535 in the others; vmap makes as many groups as its batch has."""
    run = norm._reduce_launch(70_000, 2, 100, FP32, torch.device("cpu"))
    assert run.grid == (70_000 * 7, 1, 1)
    assert dict(zip(("parts", "n", "blocks"), run.integers, strict=True)) == {"parts": 2, "n": 100, "blocks": 7}


@runs_kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("function", ["norm_backward", "norm_double_backward"])
def test_one_part_of_several_tiles_is_the_result_unless_rounded(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three groups, each with one part of three looped tiles: sums in the result's type need no second launch."""
    reduced = []
    for module in (norm, double_backward):
        monkeypatch.setattr(module, "add_up_partials", lambda *args: reduced.append(args))
    for dtype, param_dtype, launches in ((FP64, FP64, 0), (FP32, FP32, 0), (BF16, FP32, 0), (BF16, BF16, 1)):
        reduced.clear()
        x = torch.ones(27, 64, dtype=dtype, device=DEVICE)
        stats = torch.ones(2, 27, dtype=common.accumulation_dtype(x), device=DEVICE)
        upstream = (x,) if function == "norm_backward" else (x, None, None, x)
        getattr(backend, function)(*upstream, x, stats, None, 64, 3, False, param_dtype, *ALL)
        assert len(reduced) == launches


def one_row(n: int) -> dict[str, tuple]:
    """The arguments of the contract's functions for one row of ``n`` elements, without memory."""
    x, stats, grad = (torch.empty(s, dtype=BF16, device="meta") for s in ((1, n), (3, 1), (1,)))
    target = torch.empty(1, dtype=torch.int64, device="meta")
    ticks = (-100, 0.0, 1.0, 1e-3, 0.0)
    return {
        "norm_forward": (x, None, None, n, 1, 1e-5, False, True),
        "norm_backward": (x, x, stats, None, n, 1, False, BF16, *ALL),
        "norm_double_backward": (x, None, None, x, x, stats, None, n, 1, False, BF16, *ALL),
        "add_norm_forward": (x, x, None, None, None, n, 1e-5, False, 0.0, True, False),
        "add_norm_backward": (x, None, x, stats, None, None, n, False, 0.0, BF16, BF16, True, *ALL),
        "ticks_forward": (x, target, None, *ticks),
        "ticks_backward": (grad, None, x, target, stats, None, *ticks, True, False, False),
    }


@pytest.mark.parametrize("function", list(one_row(1)))
def test_a_row_too_long_to_count_is_refused(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter of a loop over a row goes a block beyond it, and must not wrap there."""
    launched = []
    monkeypatch.setattr(common.Launch, "__call__", lambda self, *_: launched.append(self))
    longest = launch.LONGEST_ROW
    for n in (longest + 1, 2**31 - 1, 2**31, 2**40):
        with pytest.raises(RuntimeError, match=f"a row has {n} elements, the Triton kernels take at most {longest}"):
            getattr(backend, function)(*one_row(n)[function])
    assert not launched
    getattr(backend, function)(*one_row(longest)[function])
    assert launched
    for run in launched:
        block = run.constants.get("BLOCK_N") or run.constants["BLOCK_V"]
        assert longest + (run.constants.get("STAGES", 1) + 1) * block < 2**31


def test_alignment() -> None:
    assert [launch.alignment(n) for n in (1, 2, 12, 16, 48, 1000, 0)] == [1, 2, 4, 16, 16, 8, 16]
    assert launch.alignment(64, 24) == 8


# ---------------------------------------------------------------------------------------------- availability and import


# ------------------------------------------------------------------------------------------- under autograd and compile


OPERATIONS = {
    "layer_norm": lambda x, w, b: FF.layer_norm(x, (3,), w, b),
    "rms_norm": lambda x, w, b: FF.rms_norm(x, (3,), w, 1e-5),
}
on_both = pytest.mark.parametrize("operation", OPERATIONS)


def _leaves(dtype: torch.dtype = FP64) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype).to(DEVICE).requires_grad_() for s in ((2, 3), (3,), (3,))]


@runs_kernels
@on_both
def test_finite_differences(operation: str) -> None:
    """Both orders, both modes and their mixtures, batched: the interpreter's share of tests/test_opinfo.py."""
    leaves = _leaves()[: 3 if operation == "layer_norm" else 2]

    def function(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return OPERATIONS[operation](x, w, b)

    with use_backend("triton"):
        batched = {"check_batched_grad": True}
        torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_forward_grad=True, **batched)
        torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **batched)


@runs_kernels
@on_both
def test_transforms_run_on_the_kernels(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-sample gradients and a Hessian-vector product; the reference's formulas are out of reach meanwhile."""
    x, w, b = (t.detach() for t in _leaves())
    per_sample, hvp = _transforms(OPERATIONS[operation], x, w, b)
    with use_backend("reference"):
        expected = per_sample(), hvp()
    for name in ("norm_forward", "norm_backward", "norm_double_backward"):
        monkeypatch.setattr(reference, name, None)
    with use_backend("triton"):
        torch.testing.assert_close((per_sample(), hvp()), expected, rtol=1e-9, atol=1e-9)


def _transforms(norm: Callable, x: Tensor, w: Tensor, b: Tensor) -> tuple[Callable, Callable]:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return norm(x, w, b).sin().sum()

    gradient = torch.func.grad(loss, (0, 1))
    return (
        lambda: torch.vmap(gradient, in_dims=(0, None))(x, w),
        lambda: torch.func.jvp(gradient, (x, w), (x.cos(), w.cos()))[1],
    )


@runs_kernels
@on_both
def test_compiled(operation: str) -> None:
    """The operators that stand for the kernels in a graph, with their fakes, give the kernels' bits."""
    results = []
    start = [t.detach() for t in _leaves(FP32)]
    for compiled in (False, True):
        torch._dynamo.reset()
        leaves = [t.clone().requires_grad_() for t in start]
        function = OPERATIONS[operation]
        with use_backend("triton"):
            y = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*leaves)
            results.append((y, *torch.autograd.grad(y.sin().sum(), leaves[:2])))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@runs_kernels
def test_operators() -> None:
    x, w = (t.detach() for t in _leaves(FP32)[:2])
    namespace = torch.ops.fused_norm
    y, stats = namespace.triton_norm_forward(x, w, None, 3, 1, 1e-5, False, True)
    calls = {
        "forward": (x, w, None, 3, 1, 1e-5, False, True),
        "backward": (y, x, stats, w, 3, 1, False, FP32, True, True, False),
        "double_backward": (y, w, None, x, x, stats, w, 3, 1, False, FP32, True, True, False),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(namespace, f"triton_norm_{name}").default, args)


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in backend.unavailable("cpu")
    assert "mps" in backend.unavailable("mps")
    if not torch.cuda.is_available():
        assert "no cuda device" in backend.unavailable("cuda")
    if not INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "before" in backend.unavailable("cpu")


def test_without_triton() -> None:
    code = """if True:
        import os, sys
        sys.modules["triton"] = None
        from fused_norm.backends import triton as backend
        assert backend.unavailable("cpu") == backend.unavailable("cuda") == "triton is not installed"
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_triton_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise OSError('libcuda is of another age')")
    code = "from fused_norm.backends import triton as b; print(b.unavailable('cpu'))"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True).stdout
    assert out == "triton cannot be imported: OSError: libcuda is of another age\n"


def test_importing_the_backend_imports_no_triton() -> None:
    code = "import sys, fused_norm.backends.triton as b; b.unavailable('cpu'); assert 'triton' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    )


# ------------------------------------------------------------------------------------------------ compiled, without GPU

INTEGERS = {
    "eps_bits",
    "threshold",
    "scale_bits",
    "total_rows",
    "rows",
    "tiles",
    "parts",
    "rows_per_part",
    "n",
    "blocks",
}

ADD = ("residual_ptr", "summed_ptr", "dsummed_ptr", "dinput_ptr", "seed_ptr")  # add and norm's: test_triton_add_norm.py


@dataclass(frozen=True)
class Build:
    """One kernel as the launcher would compile it: a pass, a row width, types, which inputs are aligned.

    The pass "jvp" is double backward with grad_dy alone needed.
    """

    pass_: str
    n: int
    size: int
    rms: bool = False
    param_size: int | None = None
    aligned: bool = True
    stride: int | None = None

    def __str__(self) -> str:
        params = f"-{ELEMENT[self.param_size]}" if self.param_size else ""
        layout = "" if self.aligned and self.stride is None else f"-aligned={self.aligned}-stride={self.stride}"
        return f"{self.pass_}-{self.n}-{ELEMENT[self.size]}{params}-{'rms' if self.rms else 'layer'}{layout}"


@functools.cache
def compiled(build: Build, target: str):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[target])
    x, parameter, acc = (
        ELEMENT[build.size],
        ELEMENT[build.param_size or build.size],
        "fp64" if build.size == 8 else "fp32",
    )
    constants: dict[str, object] = {"FP64": build.size == 8, "ALIGN_N": launch.alignment(build.n)}
    pointers = {
        "stats_ptr": acc,
        "weight_ptr": parameter,
        "bias_ptr": parameter,
        "x_ptr": x,
        "y_ptr": x,
        "dy_ptr": x,
        "dx_ptr": x,
        "ddx_ptr": x,
        "ddw_ptr": parameter,
        "ddb_ptr": parameter,
        "grad_dy_ptr": x,
        "grad_x_ptr": x,
        "grad_w_ptr": acc,
    }
    pointers |= {"dw_ptr": acc, "db_ptr": acc, "dw_partial_ptr": acc, "db_partial_ptr": acc}
    fresh = {"grad_dy_ptr", "grad_x_ptr", "grad_w_ptr"}
    fresh |= {"stats_ptr", "y_ptr", "dx_ptr", "dw_ptr", "db_ptr", "dw_partial_ptr", "db_partial_ptr"}
    align = launch.alignment(build.n, build.stride or build.n)
    if build.pass_ == "reduce":
        config = launch.reduce_launch(build.n, launch.MAX_PARTS, gpu.warp_size)
        kernel = norm.norm_backward_reduce_kernel
        constants |= {"PARTS": config.rows, "BLOCK_N": config.block_n}
        pointers |= {"dw_ptr": parameter, "db_ptr": parameter}
    elif build.pass_ in ("double_backward", "jvp"):
        config = launch.double_backward_launch(build.n, build.size, gpu.warp_size)
        kernel = getattr(double_backward, f"norm_double_backward{'_looped' if config.looped else ''}_kernel")
        constants |= {"IS_RMS": build.rms, "ROWS": config.rows, "BLOCK_N": config.block_n}
        constants |= dict.fromkeys(("ALIGN_DDX", "ALIGN_DY", "ALIGN_X"), align)
        if build.pass_ == "jvp":
            constants |= dict.fromkeys(("dy_ptr", "grad_x_ptr", "grad_w_ptr"))
        if build.rms:
            constants["ddb_ptr"] = None
    else:
        room = (False, 2 if build.pass_ == "backward" else 1, SHARED_MEMORY.get(target, 0))
        config = getattr(launch, f"{build.pass_}_launch")(build.n, build.size, gpu.warp_size, *room)
        kernel = getattr(norm, f"norm_{build.pass_}{'_looped' if config.looped else ''}_kernel")
        constants |= {"IS_RMS": build.rms, "CAST": False, "ROWS": config.rows, "BLOCK_N": config.block_n}
        constants["STAGES"] = config.stages
        constants |= dict.fromkeys(("ALIGN_X", "ALIGN_DY"), align) | dict.fromkeys(ADD)
        constants |= dict.fromkeys(("ALIGN_RESIDUAL", "ALIGN_DSUMMED", "ALIGN_DINPUT"), 16)
        if build.rms:
            constants |= {"bias_ptr": None} if build.pass_ == "forward" else {"db_ptr": None}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS or name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = f"*{pointers[name]}"
            if build.aligned or name in fresh:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names}, attributes)
    return triton.compile(source, target=gpu, options={"num_warps": config.num_warps, **common.COMPILE_OPTIONS})


WIDEST = {"forward": launch.FORWARD_WHOLE_ROW, "backward": launch.BACKWARD_WHOLE_ROW}
# Of each pass and dtype: several rows a tile, the widest row that is kept whole, and a looped one.
BUILDS = [
    Build(pass_, n, size, rms)
    for pass_, size, rms in itertools.product(WIDEST, (4, 2), (False, True))
    for n in (64, WIDEST[pass_][size], 65536)
    if not rms or n == WIDEST[pass_][size]  # without the mean there is less to hold
]
BUILDS += [Build(pass_, WIDEST[pass_][2], 2, param_size=4) for pass_ in WIDEST]
BUILDS += [Build("reduce", 1024, 4), Build("reduce", 65536, 2)]
# Of double backward as few as tell: the classes that fill their registers, on every target.
DOUBLE_WIDEST = launch.DOUBLE_BACKWARD_WHOLE_ROW
BUILDS += [Build("double_backward", n, 4) for n in (64, DOUBLE_WIDEST[4], 65536)]
BUILDS += [Build("double_backward", n, 2, param_size=4) for n in (DOUBLE_WIDEST[2], 65536)]
BUILDS += [Build("double_backward", DOUBLE_WIDEST[2], 2, rms) for rms in (False, True)] + [Build("jvp", 65536, 2)]
SM_90_BUILDS = [Build(pass_, n, 8) for pass_ in WIDEST for n in (64, WIDEST[pass_][8], 65536)]
SM_90_BUILDS += [Build(p, n, size) for p in WIDEST for n in (1024, 4096) for size in (4, 2)]
SM_90_BUILDS += [Build(pass_, 65536, 2, param_size=4) for pass_ in WIDEST]
SM_90_BUILDS += [Build("double_backward", n, 8) for n in (64, DOUBLE_WIDEST[8], 65536)]
SM_90_BUILDS += [Build("double_backward", 4096, 2), Build("double_backward", 65536, 4, True), Build("jvp", 8192, 2)]


@needs_compiler
@pytest.mark.parametrize(
    "target, build",
    in_turn(BUILDS) + [("sm_90", build) for build in SM_90_BUILDS],
    ids=str,
)
def test_compiles_without_spills(build: Build, target: str, tmp_path: Path) -> None:
    assert_no_spills(compiled(build, target), target, tmp_path)


@needs_compiler
@pytest.mark.parametrize("size", [4, 2], ids=ELEMENT.get)
@pytest.mark.parametrize("n", [64, 1000, 4096, 65536])
@pytest.mark.parametrize("pass_", ["forward", "backward", "double_backward"])
def test_aligned_rows_move_16_bytes_at_a_time(pass_: str, n: int, size: int) -> None:
    ptx = compiled(Build(pass_, n, size), "sm_90").asm["ptx"]
    assert set(streams(ptx)) == {16}
    assert widest_access(ptx, "st", 32) == 16


@needs_compiler
@pytest.mark.parametrize(
    "build",
    [Build("forward", 64, 4, aligned=False), *(Build(p, 64, 4, stride=65) for p in ("backward", "jvp"))],
    ids=str,
)
def test_unaligned_rows_take_no_wide_load(build: Build) -> None:
    assert set(streams(compiled(build, "sm_90").asm["ptx"])) == {build.size}


@needs_compiler
@pytest.mark.parametrize(
    "pass_, n, size",
    [(p, n, size) for p in ("forward", "backward") for n, size in ((64, 4), (4096, 2), (65536, 4), (1001, 2))]
    + [("double_backward", n, size) for n, size in ((64, 4), (1001, 2))],
)
def test_order_of_sums_does_not_depend_on_alignment(pass_: str, n: int, size: int) -> None:
    expected = reductions(compiled(Build(pass_, n, size), "sm_90"))
    assert expected
    for other in (
        Build(pass_, n, size, aligned=False),
        Build(pass_, n, size, stride=n + 1),
        Build(pass_, n, size, stride=n + 15),
    ):
        assert reductions(compiled(other, "sm_90")) == expected, other


@needs_compiler
@pytest.mark.parametrize(
    "pass_, n, size",
    [("backward", n, size) for n, size in ((64, 4), (256, 4), (512, 2), (1000, 2), (4096, 2), (8192, 4))]
    + [(pass_, n, size) for pass_ in WIDEST for n, size in ((16388, 2), (65536, 2), (65536, 4))]
    + [("backward", 16384, 2)],
)
def test_order_of_sums_does_not_depend_on_the_copies_ahead(
    pass_: str, n: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_copies = compiled(Build(pass_, n, size), "sm_90")
    assert "cp.async" in with_copies.asm["ptx"]
    monkeypatch.setattr(sys.modules[__name__], "SHARED_MEMORY", {})
    without = compiled.__wrapped__(Build(pass_, n, size), "sm_90")
    assert "cp.async" not in without.asm["ptx"]
    assert reductions(with_copies) == reductions(without) != []


@needs_compiler
@pytest.mark.parametrize("n, size", [(64, 4), (8192, 2), (65536, 2)])
def test_order_of_sums_does_not_depend_on_what_is_needed(n: int, size: int) -> None:
    alone, together = (reductions(compiled(Build(p, n, size), "sm_90")) for p in ("jvp", "double_backward"))
    assert alone and set(alone) <= set(together), set(alone) - set(together)


@needs_compiler
@pytest.mark.parametrize("n", [64, 65536])
@pytest.mark.parametrize("pass_", ["forward", "backward", "double_backward"])
def test_row_offsets_are_64_bit(pass_: str, n: int) -> None:
    ttir = compiled(Build(pass_, n, 4), "sm_90").asm["ttir"]
    assert_64_bit_offsets(ttir)
