"""The Triton backend's ticks loss: its results against the fp64 truth, its traffic, and what its kernels compile to.

Tests marked ``@runs_kernels`` run on the GPU where there is one, else in Triton's interpreter (triton_kernels.py).
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

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
    remember_places,  # noqa: F401
    remember_selected,  # noqa: F401
    runs_kernels,
    streams,
    widest_access,
)

from fused_norm import reference  # noqa: E402
from fused_norm.backends import triton as backend  # noqa: E402
from fused_norm.backends.triton import common, launch, ticks  # noqa: E402
from fused_norm.testing import error_limit, param_error_limit, relative_error  # noqa: E402

# ------------------------------------------------------------------------------------------------ cases and their truth

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP64, FP32, BF16, FP16)
SHORT = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}
IGNORE = -100

#: The relative error of a gradient that no size, type or choice of options may exceed.
GRADIENT_LIMIT = {FP64: 1e-10, FP32: 5e-6, BF16: 1e-2, FP16: 2e-3}


@dataclass(frozen=True)
class Case:
    rows: int
    v: int
    dtype: torch.dtype = FP32
    soft: bool = False
    smoothing: float = 0.0
    weight: bool = False
    softcap: float = 0.0
    grad_lse: bool = False
    mixed: bool = False  # weight and soft targets in fp32
    ce: float = 0.9
    ticks: float = 0.7
    layout: str = "contiguous"

    def __str__(self) -> str:
        options = {
            "soft": self.soft,
            "smooth": self.smoothing,
            "weight": self.weight,
            "cap": self.softcap,
            "lse": self.grad_lse,
            "mixed": self.mixed,
            self.layout: self.layout != "contiguous",
            f"ce{self.ce}": self.ce != 0.9,
        }
        return "-".join([f"{self.rows}x{self.v}", SHORT[self.dtype], *(name for name, on in options.items() if on)])

    @property
    def acc(self) -> torch.dtype:
        return FP64 if self.dtype == FP64 else FP32

    @property
    def options(self) -> tuple[int, float, float, float, float]:
        return IGNORE, self.smoothing, self.ce, self.ticks, self.softcap


@dataclass(frozen=True)
class Inputs:
    z: Tensor
    target: Tensor
    weight: Tensor | None
    grad: Tensor
    grad_lse: Tensor | None

    def map(self, function) -> Inputs:
        return Inputs(*(None if t is None else function(t) for t in vars(self).values()))


@dataclass(frozen=True)
class Results:
    loss: Tensor
    stats: Tensor
    dz: Tensor | None
    dtarget: Tensor | None

    def cpu(self) -> Results:
        return Results(*(None if t is None else t.cpu() for t in vars(self).values()))


def draw(case: Case) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=FP64)

    beside = FP32 if case.mixed else case.dtype
    if case.soft:
        target = laid_out(torch.softmax(2 * randn(case.rows, case.v), 1).to(beside), case.layout, 3)
    else:
        target = torch.randint(case.v, (case.rows,))
        target[1::5] = IGNORE
        target = target.to(DEVICE)
    return Inputs(
        z=laid_out((3 * randn(case.rows, case.v)).to(case.dtype), case.layout, 5),
        target=target,
        weight=(0.2 + torch.rand(case.v, dtype=FP64)).to(beside).to(DEVICE) if case.weight else None,
        grad=randn(case.rows).to(case.acc).to(DEVICE),
        grad_lse=randn(case.rows).to(case.acc).to(DEVICE) if case.grad_lse else None,
    )


def run(case: Case, i: Inputs, need_dz: bool = True, need_dtarget: bool = True, inplace: bool = False) -> Results:
    """What the backend computes, once its shapes, dtypes and layout are checked against the contract."""
    loss, stats = backend.ticks_forward(i.z, i.target, i.weight, *case.options)
    assert loss.shape == (case.rows,) and loss.dtype == case.acc
    assert stats.shape == (4 if case.soft or case.smoothing else 3, case.rows)
    assert stats.dtype == case.acc and stats.is_contiguous()
    dz, dtarget = backend.ticks_backward(
        i.grad, i.grad_lse, i.z, i.target, stats, i.weight, *case.options, need_dz, need_dtarget, inplace
    )
    if need_dz:
        assert dz is i.z if inplace else dz.shape == i.z.shape and dz.dtype == i.z.dtype and dz.is_contiguous()
    if case.soft and need_dtarget:
        assert dtarget.shape == i.target.shape and dtarget.dtype == i.target.dtype and dtarget.is_contiguous()
    return Results(loss, stats, dz, dtarget)


def truth_of(case: Case, inputs: Inputs) -> Results:
    i = inputs.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())
    loss, stats = reference.ticks_forward(i.z, i.target, i.weight, *case.options)
    gradients = reference.ticks_backward(
        i.grad, i.grad_lse, i.z, i.target, stats, i.weight, *case.options, True, case.soft, False
    )
    return Results(loss, stats, *gradients)


def eager(case: Case, inputs: Inputs) -> Results:
    """By torch's log_softmax under autograd, in fp32 (fp64 for fp64)."""
    i = inputs.map(lambda t: t.cpu().to(case.acc) if t.is_floating_point() else t.cpu())
    z, target = i.z.requires_grad_(), i.target
    keep = torch.ones(case.rows) if case.soft else (target != IGNORE)
    if case.soft:
        target.requires_grad_()
    log_p = torch.log_softmax(case.softcap * torch.tanh(z / case.softcap) if case.softcap else z, 1)
    a = target if case.soft else torch.zeros_like(z).scatter(1, (target * keep).unsqueeze(1), 1.0)
    a = (a * (1 - case.smoothing) + case.smoothing / case.v) * (1 if i.weight is None else i.weight)
    loss = (a * (case.ticks * log_p.exp() - (case.ce + case.ticks) * log_p)).sum(1) * keep
    total = (loss * i.grad).sum()
    if i.grad_lse is not None:
        capped = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
        total = total + (torch.logsumexp(capped, 1) * i.grad_lse * keep).sum()
    total.backward()
    return Results(loss.detach(), None, z.grad, target.grad if case.soft else None)


def check(case: Case, inputs: Inputs, results: Results) -> None:
    ours, truth, plain = results.cpu(), truth_of(case, inputs), eager(case, inputs)
    for name in ("loss", "dz", "dtarget"):
        actual, exact = getattr(ours, name), getattr(truth, name)
        if actual is None or exact is None:
            continue
        if actual.dtype in (FP64, FP32):  # of a few rows torch's error may be luck, and eight roundings are let pass
            by_torch = relative_error(getattr(plain, name), exact)
            allowed = param_error_limit(exact, actual.dtype, by_torch) * (
                2 if actual.dtype == FP64 else 1
            )  # the truth's
        else:  # arithmetic is fp32, and nothing counts but the last rounding
            by_torch = 0.0
            allowed = error_limit(exact, actual.dtype, by_torch)
        allowed = min(allowed, GRADIENT_LIMIT[actual.dtype])
        error = relative_error(actual, exact)
        assert error <= allowed, f"{name}: error {error:.3g} > limit {allowed:.3g} (torch's {by_torch:.3g})"
    # The statistics keep their digits one by one: others and q_t or B hold what is left of a p near 1.
    torch.testing.assert_close(
        ours.stats.double(), truth.stats, rtol=64 * torch.finfo(case.acc).eps, atol=0.0, equal_nan=True
    )


def assert_same_bits(a: Results, b: Results) -> None:
    for name in vars(a):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow row makes several blocks, each lane takes several logits."""
    monkeypatch.setattr(launch, "ticks_forward_launch", lambda *_: launch.TicksLaunch(1, 16, 1))
    monkeypatch.setattr(launch, "ticks_backward_launch", lambda *_: launch.TicksLaunch(2, 32, 1))


#: Each path with the fewest options, for what has nothing to do with the others.
PATHS = {"plain": {}, "smooth": {"smoothing": 0.1, "weight": True}, "soft": {"soft": True}}
paths = pytest.mark.parametrize("path", PATHS)
tiles = pytest.mark.parametrize("tiles", ["one block", "many"])


@pytest.fixture
def tiled(tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "many":
        request.getfixturevalue("small_tiles")


OPTIONS = [
    {"soft": soft, "smoothing": smoothing, "weight": weight, "softcap": softcap, "grad_lse": grad_lse}
    for soft, smoothing, weight, softcap, grad_lse in itertools.product(
        (False, True), (0.0, 0.1), (False, True), (0.0, 3.3), (False, True)
    )
]
CASES = [Case(7, 37, dtype, **options) for dtype in DTYPES for options in OPTIONS]
CASES += [Case(1, 7, dtype, soft=soft, smoothing=s) for dtype in DTYPES for soft in (False, True) for s in (0.0, 0.1)]
CASES += [Case(3, 1, dtype, soft=soft) for dtype in (FP64, BF16) for soft in (False, True)]
CASES += [Case(7, 40, BF16, soft=soft, smoothing=0.2, weight=True, mixed=True) for soft in (False, True)]
CASES += [Case(7, 40, FP32, soft=soft, ce=ce) for soft in (False, True) for ce in (0.0, 1.0)]
CASES += [Case(70, 2, FP32), Case(65, 3, FP32, soft=True)]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_against_the_truth(case: Case) -> None:
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


@runs_kernels
@paths
def test_no_less_exact_than_torch(path: str) -> None:
    """Over many rows, where it is no luck."""
    case = Case(150, 37, **PATHS[path])
    inputs = draw(case)
    results, truth, by_torch = run(case, inputs).cpu(), truth_of(case, inputs), eager(case, inputs)
    for name in ("loss", "dz", "dtarget")[: 3 if case.soft else 2]:
        ours, theirs = (relative_error(getattr(r, name), getattr(truth, name)) for r in (results, by_torch))
        assert ours <= 1.5 * theirs, (name, ours, theirs)


BLOCKS = [Case(3, 150, dtype, **options) for dtype in (FP32,) for options in OPTIONS[::3]]
BLOCKS += [Case(3, 150, dtype, **OPTIONS[at]) for dtype, at in ((FP64, 0), (FP64, 31), (BF16, 0), (FP16, 31))]
BLOCKS += [Case(3, 64), Case(3, 64, soft=True), Case(3, 65)]


@pytest.mark.small
@runs_kernels
@pytest.mark.usefixtures("poisoned_empty", "small_tiles")
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_error_of_rows_of_many_blocks(case: Case) -> None:
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


WIDE = [
    Case(33, 1000, FP32),
    Case(33, 1000, BF16, soft=True),
    Case(4, 30522, BF16),
    Case(4, 30522, FP32, smoothing=0.1, weight=True),
    Case(4, 30522, FP16, softcap=15.0),
    Case(2, 128256, FP32, grad_lse=True),
]


@runs_kernels
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_error_of_wide_rows(case: Case) -> None:
    inputs = draw(case)
    check(case, inputs, run(case, inputs))


# --------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.small
@runs_kernels
@pytest.mark.parametrize("path", ["smooth", "soft"])
@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(path: str, need: tuple[bool, bool]) -> None:
    case = Case(5, 40, **PATHS[path])
    inputs = draw(case)
    full, some = run(case, inputs), run(case, inputs, *need)
    assert (some.dz is not None, some.dtarget is not None) == (need[0], need[1] and case.soft)
    assert_same_bits(some, Results(full.loss, full.stats, full.dz if need[0] else None, some.dtarget))
    if some.dtarget is not None:
        assert torch.equal(some.dtarget, full.dtarget)


@runs_kernels
@paths
@tiles
@pytest.mark.parametrize("layout", ["strided", "misaligned"])
@pytest.mark.usefixtures("tiled")
def test_layout_changes_no_bit(path: str, layout: str) -> None:
    case = Case(3, 75, BF16, **PATHS[path])
    inputs = draw(case)
    target = laid_out(inputs.target, layout, 16) if case.soft else inputs.target
    assert_same_bits(run(case, inputs), run(case, replace(inputs, z=laid_out(inputs.z, layout, 7), target=target)))


@runs_kernels
def test_upstream_gradients_of_any_stride() -> None:
    case = Case(7, 20, grad_lse=True)
    inputs = draw(case)
    wide = torch.stack([inputs.grad, inputs.grad_lse, inputs.grad], 1)
    strided = replace(inputs, grad=wide[:, 0], grad_lse=wide[:, 1])
    assert_same_bits(run(case, inputs), run(case, strided))
    expanded = replace(inputs, grad=inputs.grad[:1].expand(7), grad_lse=inputs.grad_lse[:1].expand(7))
    assert expanded.grad.stride() == (0,)
    check(case, expanded, run(case, expanded))


@pytest.mark.small
@runs_kernels
@paths
@tiles
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.usefixtures("tiled")
def test_in_place(path: str, layout: str) -> None:
    """The same bits, written over the logits and over nothing beside them."""
    case = Case(3, 75, layout=layout, **PATHS[path])
    inputs = draw(case)
    expected = run(case, inputs)
    over = replace(inputs, z=laid_out(inputs.z.clone(), layout, 5))
    beside = over.z._base[:, 75:].clone() if layout == "strided" else None
    assert_same_bits(run(case, over, inplace=True), expected)
    if beside is not None:
        assert torch.equal(over.z._base[:, 75:].isnan(), torch.ones_like(beside, dtype=torch.bool))


@runs_kernels
@pytest.mark.parametrize("name", ["z", "target", "weight", "grad", "grad_lse", "stats"])
def test_a_freed_tensor(name: str) -> None:
    case = Case(4, 16, weight=True, grad_lse=True)
    inputs = draw(case)
    _, stats = backend.ticks_forward(inputs.z, inputs.target, inputs.weight, *case.options)
    tensors = vars(inputs) | {"stats": stats}
    tensors[name] = tensors[name].clone()
    tensors[name].untyped_storage().resize_(0)
    z, target, weight, grad, grad_lse, stats = tensors.values()
    with pytest.raises(RuntimeError, match=f"{name} has shape"):
        backend.ticks_backward(grad, grad_lse, z, target, stats, weight, *case.options, True, False, False)
    if name in ("z", "target", "weight"):
        with pytest.raises(RuntimeError, match=f"{name} has shape"):
            backend.ticks_forward(z, target, weight, *case.options)


@runs_kernels
@pytest.mark.parametrize("inplace", [False, True])
def test_traced_calls_take_the_operators(inplace: bool) -> None:
    """and an operator may not return its argument: in place, the trace holds a copy."""
    case = Case(4, 12, soft=True, grad_lse=True)
    inputs = draw(case)

    def both(z: Tensor, target: Tensor, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        loss, stats = backend.ticks_forward(z, target, None, *case.options)
        gradients = backend.ticks_backward(grad, grad_lse, z, target, stats, None, *case.options, True, True, inplace)
        return loss, stats, *gradients

    def arguments() -> tuple[Tensor, ...]:
        return inputs.z.clone(), inputs.target, inputs.grad, inputs.grad_lse

    graph = make_fx(both)(*arguments())
    names = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert {"triton_ticks_forward.default", "triton_ticks_backward.default"} <= set(names)
    assert ("copy_.default" in names) == inplace
    assert_same_bits(Results(*graph(*arguments())), run(case, inputs))


@runs_kernels
def test_operators_keep_their_schemas() -> None:
    case = Case(4, 12, grad_lse=True, weight=True)
    i = draw(case)
    _, stats = backend.ticks_forward(i.z, i.target, i.weight, *case.options)
    calls = {
        "forward": (i.z, i.target, i.weight, *case.options),
        "backward": (i.grad, i.grad_lse, i.z, i.target, stats, i.weight, *case.options, True, False),
    }
    for name, args in calls.items():
        operator = getattr(torch.ops.fused_norm, f"triton_ticks_{name}").default
        torch.library.opcheck(operator, args, test_utils="test_schema")
    dz, dtarget = operator(*args)
    assert torch.equal(dz, run(case, i).dz) and dtarget.numel() == 0


# ------------------------------------------------------------------------------------------------------------- numerics


@runs_kernels
@paths
@tiles
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("top", [4.0, 16.0, 40.0, 80.0])
def test_a_well_predicted_token(path: str, top: float) -> None:
    """1 - p_t is 3.4e-7 at z = (16, 0, 0, 0), where both 1 - exp(z_t - lse) and -expm1(z_t - lse) are 0 in fp32.

    Each element of the gradient has its digits, but what exp of an fp32 number of size ``top`` costs.
    """
    case = Case(6, 40, ce=0.0, ticks=1.0, **PATHS[path])
    inputs = draw(case)
    z, at = torch.zeros(6, 40), torch.tensor([0, 1, 17, 37, 38, 39])
    z[torch.arange(6), at] = top
    one_hot = torch.zeros(6, 40).scatter(1, at[:, None], 1.0)
    inputs = replace(inputs, z=z.to(DEVICE), target=(one_hot if case.soft else at).to(DEVICE))
    if case.smoothing:  # each element is a difference, and some are near 0
        check(case, inputs, run(case, inputs))
        return
    result, truth = run(case, inputs).cpu(), truth_of(case, inputs)
    limit = 1e-6 if top == 16.0 else max(1e-6, 4 * top * torch.finfo(FP32).eps)
    representable = truth.dz.abs() > 1e-37
    relative = ((result.dz - truth.dz) / truth.dz)[representable]
    assert relative.numel() > 0 or top == 80.0
    assert relative.numel() == 0 or relative.abs().max() < limit
    torch.testing.assert_close(result.stats.double(), truth.stats, rtol=limit, atol=1e-37)
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=2e-7, atol=0.0)
    case = replace(case, ce=1.0, ticks=0.0)  # -log p, which is about 1 - p
    result, truth = run(case, inputs).cpu(), truth_of(case, inputs)
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=limit, atol=1e-37)
    if case.soft:
        torch.testing.assert_close(result.dtarget.double(), truth.dtarget, rtol=limit, atol=1e-37)


@runs_kernels
@paths
@tiles
@pytest.mark.usefixtures("tiled")
def test_order_ties_and_offsets(path: str) -> None:
    """Rows that rise (each logit is the largest so far), fall, are constant, hold ties, or lie far from 0."""
    case = Case(6, 100, **PATHS[path])
    ramp = torch.linspace(-20, 20, 100)
    noise = torch.randint(-8, 8, (100,)).float()
    z = torch.stack([ramp, -ramp, torch.full((100,), 2.5), noise, noise + 1e4, noise - 1e4])
    inputs = replace(draw(case), z=z.to(DEVICE))
    check(case, inputs, run(case, inputs))


@runs_kernels
@paths
@tiles
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("softcap", [0.0, 4.0], ids=["", "cap"])
def test_logits_of_minus_infinity(path: str, softcap: float) -> None:
    """They have p = 0 and no gradient; one with mass makes the loss infinite, one without counts for nothing."""
    case = Case(5, 60, softcap=softcap, weight=True, **{k: v for k, v in PATHS[path].items() if k != "weight"})
    inputs = draw(case)
    z = inputs.z.clone()
    z[0, :50] = z[2, 40:] = z[3, ::2] = z[4, 1:] = -torch.inf
    if case.soft:
        target = inputs.target.clone()
        target[:3] = torch.where(z[:3] == -torch.inf, 0, target[:3])  # rows 3 and 4 have mass there
        inputs = replace(inputs, z=z, target=target)
    else:
        weight = inputs.weight.clone()
        weight[[2, 45]] = 0.0
        target = torch.tensor([55, IGNORE, 45, 1, 2], device=DEVICE)  # z_45, z_2 are -inf with weight 0
        inputs = replace(inputs, z=z, weight=weight, target=target)
    result, truth = run(case, inputs).cpu(), truth_of(case, inputs)
    if path == "plain":
        truth = replace(truth, loss=truth.loss.nan_to_num(0.0))  # weight 0 counts for nothing
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(result.dz.double(), truth.dz, rtol=1e-5, atol=1e-7)
    if path == "soft":
        assert result.loss.isinf().tolist() == [False, False, False, not softcap, not softcap]
    elif path == "plain":
        assert result.loss.isfinite().all()


@pytest.mark.small
@runs_kernels
@paths
@tiles
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("bad", ["nan first", "nan", "nan last", "inf", "all -inf", "two inf"])
def test_rows_with_no_answer(path: str, bad: str) -> None:
    """NaN loss and gradient, and the other rows' bits are what they are without it."""
    case = Case(3, 60, **PATHS[path])
    clean = draw(case)
    z = clean.z.clone()
    at, value = {
        "nan first": ([0], torch.nan),
        "nan": ([30], torch.nan),
        "nan last": ([59], torch.nan),
        "inf": ([30], torch.inf),
        "two inf": ([3, 40], torch.inf),
        "all -inf": (list(range(60)), -torch.inf),
    }[bad]
    z[2, at] = value
    before, after = run(case, clean).cpu(), run(case, replace(clean, z=z)).cpu()
    assert after.loss[2].isnan() and after.dz[2].isnan().all()
    others = torch.arange(3) != 2
    assert torch.equal(before.loss[others], after.loss[others]) and torch.equal(before.dz[others], after.dz[others])


@runs_kernels
@paths
def test_a_row_of_the_lowest_finite_logits(path: str) -> None:
    """As masks make them: uniform, as any constant row is."""
    case = Case(2, 50, **PATHS[path])
    inputs = replace(draw(case), z=torch.full((2, 50), torch.finfo(FP32).min, device=DEVICE))
    zeros = replace(inputs, z=torch.zeros(2, 50, device=DEVICE))
    a, b = run(case, inputs), run(case, zeros)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.dz, b.dz)


@pytest.mark.small
@runs_kernels
@pytest.mark.parametrize("path", ["plain", "smooth"])
@tiles
@pytest.mark.usefixtures("tiled")
def test_ignored_rows_are_not_read(path: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 60, BF16, grad_lse=True, **PATHS[path])
    inputs = draw(case)
    target = inputs.target.clone()
    target[:6] = IGNORE
    z = inputs.z.clone()
    z[:6] = torch.nan
    inputs = replace(inputs, z=z, target=target)
    if INTERPRETED:
        traffic = Traffic(monkeypatch)
    result = run(case, inputs)
    for name in ("loss", "dz"):
        assert torch.equal(getattr(result, name)[:6], torch.zeros_like(getattr(result, name)[:6])), name
    assert torch.equal(result.stats[:, :6], torch.zeros_like(result.stats[:, :6]))
    assert result.loss[7] > 0 and result.dz[7].any()
    if INTERPRETED:
        kept = (target != IGNORE).sum().item()
        assert traffic.of("load", z) <= kept * (2 * 60 + 1) * 2


@pytest.mark.small
@runs_kernels
@pytest.mark.parametrize("path", ["plain", "smooth"])
@tiles
@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("out", [60, -1, 10**9, -(2**40)])
def test_a_target_out_of_range(path: str, tiles: str, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for its row alone, and every address lies in the tensors."""
    case = Case(4, 60, weight=True, **{k: v for k, v in PATHS[path].items() if k != "weight"})
    inputs = draw(case)
    before = run(case, inputs)
    target = inputs.target.clone()
    target[2] = out
    inputs = replace(inputs, target=target)
    if INTERPRETED:
        traffic = Traffic(monkeypatch)
    after = run(case, inputs)
    assert after.loss[2].isnan() and after.dz[2].isnan().all()
    others = torch.arange(4) != 2
    assert torch.equal(before.loss[others], after.loss[others]) and torch.equal(before.dz[others], after.dz[others])
    if INTERPRETED:
        tensors = (inputs.z, target, inputs.weight, inputs.grad, after.stats)
        assert traffic.total("load") == sum(traffic.of("load", t) for t in tensors)
        assert traffic.total("store") == sum(t.nbytes for t in (after.loss, after.stats, after.dz))


@runs_kernels
@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("softcap", [1e9, 30.0, 1.0, 0.05])
def test_softcap(dtype: torch.dtype, softcap: float) -> None:
    """From one that changes nothing, where z' = z to the last bit or nearly, to one that saturates: there the gradient
    is small by 1 - tanh^2, element by element."""
    case = Case(3, 200, dtype, softcap=softcap)
    inputs = draw(case)
    inputs = replace(inputs, z=torch.linspace(-6 * min(softcap, 1), 6 * min(softcap, 1), 600, dtype=dtype).view(3, 200))
    inputs = replace(inputs, z=inputs.z.to(DEVICE), target=torch.tensor([199, 3, 100], device=DEVICE))
    result, truth = run(case, inputs).cpu(), truth_of(case, inputs)
    eps = torch.finfo(dtype).eps
    if dtype == FP64:  # the truth's own 1 - tanh^2 has no more digits
        torch.testing.assert_close(result.dz, truth.dz, rtol=1e-10, atol=1e-14)
    else:
        torch.testing.assert_close(result.dz.double(), truth.dz, rtol=64 * eps, atol=0.0)
    if softcap == 1e9:
        uncapped = replace(case, softcap=0.0)
        torch.testing.assert_close(result.dz, run(uncapped, inputs).cpu().dz, rtol=8 * eps, atol=0.0)


@runs_kernels
@paths
@tiles
@pytest.mark.usefixtures("tiled")
def test_batch_invariance(path: str) -> None:
    """A row's bits do not depend on the rows beside it, and two runs give the same."""
    case = Case(10, 40, BF16, **PATHS[path])
    inputs = draw(case)
    all_rows = run(case, inputs)
    assert_same_bits(run(case, inputs), all_rows)
    for rows in (slice(3, 7), slice(9, 10)):
        part = replace(inputs, z=inputs.z[rows], target=inputs.target[rows].clone(), grad=inputs.grad[rows].clone())
        some = run(replace(case, rows=part.z.shape[0]), part)
        dtarget = None if all_rows.dtarget is None else all_rows.dtarget[rows]
        expected = Results(all_rows.loss[rows], all_rows.stats[:, rows], all_rows.dz[rows], dtarget)
        assert_same_bits(some, expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, v = 2**17 + 3, 2**14
    case = Case(rows, v, BF16)
    few = torch.randn(64, v, device="cuda", dtype=BF16)
    z = few.repeat(rows // 64 + 1, 1)[:rows]
    target = torch.full((rows,), 5, device="cuda")
    grad = torch.ones((), device="cuda").expand(rows)
    last = slice((rows - 2) % 64, (rows - 2) % 64 + 2)
    loss, stats = backend.ticks_forward(z, target, None, *case.options)
    assert torch.equal(loss[-2:], loss[last])
    dz, _ = backend.ticks_backward(grad, None, z, target, stats, None, *case.options, True, False, True)
    expected, _ = backend.ticks_backward(
        grad[:64], None, few, target[:64], stats[:, :64].contiguous(), None, *case.options, True, False, False
    )
    assert torch.equal(dz[-2:], expected[last])


# -------------------------------------------------------------------------------------------------------------- traffic


@runs_kernels
@tiles
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=SHORT.get)
@paths
def test_traffic(path: str, dtype: torch.dtype, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits read once, gradients written once, and what comes beside that is within 2 % of it."""
    if not INTERPRETED:
        pytest.skip("bytes are counted in the interpreter")
    if tiles == "many":
        monkeypatch.setattr(launch, "ticks_forward_launch", lambda *_: launch.TicksLaunch(1, 256, 1))
        monkeypatch.setattr(launch, "ticks_backward_launch", lambda *_: launch.TicksLaunch(1, 1024, 1))
    case = Case(2, 3000, dtype, **(PATHS[path] | {"weight": False}))
    inputs = draw(case)
    inputs = replace(inputs, target=inputs.target if case.soft else torch.tensor([5, 7]))
    traffic = Traffic(monkeypatch)
    unit = inputs.z.nbytes
    loss, stats = backend.ticks_forward(inputs.z, inputs.target, None, *case.options)
    z_t = 2 * dtype.itemsize if path == "plain" else 0
    assert traffic.of("load", inputs.z) == unit + z_t
    assert traffic.of("load", inputs.target) == inputs.target.nbytes
    assert traffic.total("store") == loss.nbytes + stats.nbytes
    assert traffic.total("load") + traffic.total("store") <= 1.02 * unit * (2 if case.soft else 1)

    def backward(need_dz: bool, need_dtarget: bool, inplace: bool = False) -> tuple[Tensor | None, Tensor | None]:
        traffic.clear()
        z = inputs.z.clone() if inplace else inputs.z
        gradients = backend.ticks_backward(
            inputs.grad, None, z, inputs.target, stats, None, *case.options, need_dz, need_dtarget, inplace
        )
        assert traffic.of("load", z) == unit
        return gradients

    tensors = 4 if case.soft else 2
    for inplace in (False, True):
        dz, dtarget = backward(True, True, inplace)
        assert traffic.of("store", dz) == unit
        assert traffic.total("store") == unit + (0 if dtarget is None else dtarget.nbytes)
        assert traffic.total("load") + traffic.total("store") <= 1.02 * unit * tensors
    if case.soft:
        backward(False, True)
        assert traffic.of("load", inputs.target) == 0 and traffic.total("store") == inputs.target.nbytes


# ------------------------------------------------------------------------------------------------- launch configuration


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("element_size", [8, 4, 2])
def test_launches_of_every_width(element_size: int, warp_size: int) -> None:
    for v in sorted({2**k + d for k in range(19) for d in (-1, 0, 1) if 2**k + d > 0}):
        launches = [launch.ticks_forward_launch(v, element_size, warp_size)]
        launches += [launch.ticks_backward_launch(v, element_size, plain, warp_size) for plain in (False, True)]
        for c in launches:
            assert c.block_v >= v or c.rows == 1  # rows share a program where each is one block
            assert c.block_v & (c.block_v - 1) == c.rows & (c.rows - 1) == c.num_warps & (c.num_warps - 1) == 0
            assert 1 <= c.num_warps * warp_size <= 1024


# ------------------------------------------------------------------------------------------------ compiled, without GPU


@dataclass(frozen=True)
class Build:
    """One kernel as the launcher would compile it."""

    pass_: str
    v: int
    size: int
    path: str = "plain"
    capped: bool = False
    weight: bool = True
    grad_lse: bool = True
    mixed: bool = False
    aligned: bool = True
    stride: int | None = None

    def __str__(self) -> str:
        options = {"cap": self.capped, "no_weight": not self.weight, "mixed": self.mixed, "lse": self.grad_lse}
        return "-".join(
            [self.pass_, str(self.v), ELEMENT[self.size], self.path, *(k for k, on in options.items() if on)]
        )


@functools.cache
def compiled(build: Build, target: str):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[target])
    plain, soft = build.path == "plain", build.path == "soft"
    z, acc = ELEMENT[build.size], "fp64" if build.size == 8 else "fp32"
    beside = "fp32" if build.mixed else z
    if build.pass_ == "forward":
        room = (gpu.warp_size, plain, SHARED_MEMORY.get(target, 0))
        kernel, config = ticks.ticks_forward_kernel, launch.ticks_forward_launch(build.v, build.size, *room)
    else:
        kernel = ticks.ticks_backward_kernel
        config = launch.ticks_backward_launch(build.v, build.size, plain, gpu.warp_size)
    align = launch.alignment(build.v, build.stride or build.v)
    constants = {"PLAIN": plain, "SOFT": soft, "CAPPED": build.capped, "FP64": build.size == 8}
    constants |= {"ALIGN_V": launch.alignment(build.v), "ALIGN_Z": align, "ALIGN_TARGET": align}
    constants |= {"ALIGN_DZ": launch.alignment(build.v), "ROWS": config.rows, "BLOCK_V": config.block_v}
    constants["STAGES"] = config.stages
    absent = {"weight_ptr": build.weight, "grad_lse_ptr": build.grad_lse, "dtarget_ptr": soft}
    constants |= {name: None for name, there in absent.items() if not there}
    pointers = dict.fromkeys(("loss_ptr", "stats_ptr", "grad_ptr", "grad_lse_ptr"), acc)
    pointers |= {"z_ptr": z, "dz_ptr": z, "target_ptr": beside if soft else "i64"}
    pointers |= {"weight_ptr": beside, "dtarget_ptr": beside}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            if build.aligned or name in ("dz_ptr", "dtarget_ptr", "loss_ptr", "stats_ptr"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if build.size == 8 and name.endswith("_bits") else "i32"
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names}, attributes)
    return triton.compile(source, target=gpu, options={"num_warps": config.num_warps, **common.COMPILE_OPTIONS})


# Wide rows of 16-byte alignment are all compiled alike (the test below), so one width stands for them. On every target
# what fills the most registers of each pass and type, on one of them more.
BUILDS = [Build("forward", 32000, size, path, capped=True) for size in (4, 2) for path in ("plain", "soft")]
BUILDS += [Build("forward", 32000, 8, "smooth"), Build("forward", 32000, 8, "soft", capped=True)]
BUILDS += [Build("backward", 32000, size, "soft", capped=True) for size in (8, 4, 2)]
SM_90_BUILDS = [Build("forward", 32000, size, path) for size in (4, 2) for path in PATHS]
SM_90_BUILDS += [Build("backward", 32000, size, path) for size in (4, 2) for path in ("plain", "smooth")]
SM_90_BUILDS += [Build(p, 40, 2, path) for p in ("forward", "backward") for path in ("plain", "soft")]
SM_90_BUILDS += [Build("backward", 30522, 2, "soft", mixed=True)]


def test_copies_ahead_in_forward() -> None:
    deepest = 0
    widths, memories = (40, 1000, 2047, 2048, 30522, 32000, 128257), (0, 64, 100, 164, 228)
    for v, size, plain, kib in itertools.product(widths, (8, 4, 2), (False, True), memories):
        c = launch.ticks_forward_launch(v, size, 32, plain, kib << 10)
        assert replace(c, stages=1) == launch.ticks_forward_launch(v, size) and c.stages in (1, 3, 4)
        assert c.stages == 1 or (plain and c.rows == 1 and v % 4 == 0 and size < 8)
        assert c.stages == 1 or 6 * ((c.stages - 1) * c.block_v * size + 1024) <= kib << 10
        deepest = max(deepest, c.stages)
    assert deepest == 4


@needs_compiler
@pytest.mark.parametrize("size", [4, 2], ids=ELEMENT.get)
def test_logits_beyond_the_row_s_end_are_no_zeros_when_copied_ahead(size: int) -> None:
    """Copies fill with zeros what is masked: what stands there for the loop must be chosen after them."""
    kernel = compiled(Build("forward", 32000, size), "sm_90")
    loop = kernel.asm["ttgir"].partition("scf.for")[2]
    block = launch.ticks_forward_launch(32000, size).block_v
    chosen = rf"local_load .*\n(?:.*\n){{0,2}}.*arith\.select .*tensor<1x{block}xi1, #\w+>, tensor<1x{block}x"
    assert "cp.async" in kernel.asm["ptx"] and re.search(chosen, loop)


def test_wide_rows_are_compiled_alike() -> None:
    for size, warp_size in itertools.product((8, 4, 2), (32, 64)):
        for function in (
            launch.ticks_forward_launch,
            *(functools.partial(launch.ticks_backward_launch, plain=plain) for plain in (False, True)),
        ):
            few, many = (function(v, size, warp_size=warp_size) for v in (32000, 128256))
            assert few == many
    assert launch.alignment(32000) == launch.alignment(128256) == 16


@needs_compiler
@pytest.mark.parametrize(
    "target, build",
    # On gfx942 the softcap's fp64 constants move from scalar to vector registers and back, which counts as spills.
    [(target, build) for target, build in in_turn(BUILDS) if (target, build.size) != ("gfx942", 8)]
    + [("sm_90", build) for build in SM_90_BUILDS],
    ids=str,
)
def test_compiles_without_spills(build: Build, target: str, tmp_path: Path) -> None:
    assert_no_spills(compiled(build, target), target, tmp_path)


@needs_compiler
@pytest.mark.parametrize("size", [4, 2], ids=ELEMENT.get)
@pytest.mark.parametrize("v", [1000, 32000])
@pytest.mark.parametrize("path", ["plain", "soft"])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_aligned_rows_move_16_bytes_at_a_time(pass_: str, path: str, v: int, size: int) -> None:
    ptx = compiled(Build(pass_, v, size, path), "sm_90").asm["ptx"]
    assert set(streams(ptx)) == {16}  # z and soft targets
    assert pass_ == "forward" or widest_access(ptx, "st", 32) == 16


@needs_compiler
@pytest.mark.parametrize("build", [Build("forward", 1000, 4, aligned=False), Build("forward", 1000, 4, stride=1001)])
def test_unaligned_rows_take_no_wide_load(build: Build) -> None:
    assert set(streams(compiled(build, "sm_90").asm["ptx"])) == {build.size}


@needs_compiler
@paths
@pytest.mark.parametrize("v", [40, 32000])
def test_order_of_sums_does_not_depend_on_the_layout(path: str, v: int) -> None:
    """Floating-point sums are of two addends, but that of zeros and one lane's mass, which is exact."""
    ttir = compiled(Build("forward", v, 2, path), "sm_90").asm["ttir"]
    reductions = [r.partition(") ->")[0] for r in ttir.split('"tt.reduce"')[1:]]
    shapes = [re.findall(r"tensor<([\dx]+)x\w+>", r)[-1] for r in reductions if "arith.addf" in r]
    wide = [shape for shape in shapes if not re.fullmatch(r"\d+x\d+x2", shape)]
    assert len(reductions) > len(shapes) > 5 and len(wide) == (0 if path == "plain" else 1), shapes


@needs_compiler
@paths
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_row_offsets_are_64_bit(pass_: str, path: str) -> None:
    assert_64_bit_offsets(compiled(Build(pass_, 32000, 2, path), "sm_90").asm["ttir"])
