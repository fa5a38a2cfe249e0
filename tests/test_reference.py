"""The oracle and the rules it is used with: both are held to torch in fp64 and to planted errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, OPS, NormCase, call, check, draw, leaf, run, run_torch

from fused_norm import reference, testing
from fused_norm.testing import NormResult, assert_norm_close, norm_truth

both = pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
subsets = pytest.mark.parametrize("has_weight, has_bias", [(True, True), (True, False), (False, True), (False, False)])


def _inputs(groups: int, rows: int, n: int, has_weight: bool, has_bias: bool, shared: bool, dtype=torch.float64):
    params = (n,) if shared else (groups, n)
    x, dy = (torch.randn(groups * rows, n, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(params, dtype=torch.float64).to(dtype) if has_weight else None
    bias = torch.randn(params, dtype=torch.float64).to(dtype) if has_bias else None
    return x, dy, weight, bias


def _by_autograd(x, dy, weight, bias, n: int, groups: int, eps: float, rms: bool) -> NormResult:
    """torch's function group by group, each with its own weight and bias, so that dw and db come per group."""
    rows = x.shape[0] // groups
    results = []
    for g in range(groups):
        own = slice(g * rows, (g + 1) * rows)
        w, b = (
            leaf(
                torch.full((n,), start, dtype=x.dtype) if p is None else p.reshape(-1, n)[g % p.reshape(-1, n).shape[0]]
            )
            for p, start in ((weight, 1.0), (bias, 0.0))
        )
        leaf_x = leaf(x[own])
        y = F.rms_norm(leaf_x, (n,), w, eps) + b if rms else F.layer_norm(leaf_x, (n,), w, b, eps)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf_x, w, b), dy[own])))
    y, dx, dw, db = zip(*results, strict=True)
    return NormResult(torch.cat(y), torch.cat(dx), torch.stack(dw), torch.stack(db))


@both
@subsets
@pytest.mark.parametrize("groups, rows, n", [(1, 1, 1), (1, 6, 9), (3, 4, 9), (4, 1, 33)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared parameters", "parameters per group"])
def test_formulas_against_autograd(
    rms: bool, has_weight: bool, has_bias: bool, groups: int, rows: int, n: int, shared: bool
) -> None:
    x, dy, weight, bias = _inputs(groups, rows, n, has_weight, has_bias, shared)
    eps = 1e-3
    y, stats = reference.norm_forward(x, weight, bias, n, groups, eps, rms, True)
    dx, dw, db = reference.norm_backward(dy, x, stats, weight, n, groups, rms, torch.float64, True, True, True)
    expected = _by_autograd(x, dy, weight, bias, n, groups, eps, rms)
    assert dw.shape == db.shape == (groups, n)
    for a, e in zip((y, dx, dw, db), (expected.y, expected.dx, expected.dw, expected.db), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@both
def test_statistics(rms: bool) -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    _, stats = reference.norm_forward(x, None, None, 12, 1, 0.5, rms, True)
    mean = x.mean(1)
    square = x.square().mean(1) if rms else x.var(1, unbiased=False)
    expected = (square + 0.5).rsqrt()[None] if rms else torch.stack([(square + 0.5).rsqrt(), mean])
    torch.testing.assert_close(stats, expected)
    _, none = reference.norm_forward(x, None, None, 12, 1, 0.5, rms, False)
    assert none.shape == (0, 5)
    for dtype in DTYPES:
        _, stats = reference.norm_forward(x.to(dtype), None, None, 12, 1, 0.5, rms, True)
        assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_and_shapes_of_the_contract(rms: bool, dtype: torch.dtype) -> None:
    """y and dx have x's dtype and shape, fresh and contiguous; dw and db the dtype asked for, whatever x's."""
    x = torch.randn(2, 3, 8).to(dtype)
    params = [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]
    for param_dtype in params:
        w, b = torch.randn(8).to(param_dtype), torch.randn(8).to(param_dtype)
        y, stats = reference.norm_forward(x, w, b, 8, 1, 1e-5, rms, True)
        dx, dw, db = reference.norm_backward(
            torch.randn(6, 9).to(dtype)[:, :8], x, stats, w, 8, 1, rms, param_dtype, True, True, True
        )
        assert (
            y.dtype == dx.dtype == dtype and y.shape == dx.shape == x.shape and y.is_contiguous() and dx.is_contiguous()
        )
        assert dw.dtype == db.dtype == param_dtype and dw.shape == db.shape == (1, 8)


def test_constant_rows_have_their_exact_mean() -> None:
    for constant in (0.1, 1 / 3, 1e6 + 0.1, -7.7):
        x = torch.full((2, 1000), constant)
        y, stats = reference.norm_forward(x, None, None, 1000, 1, 1e-5, False, True)
        assert (y == 0).all() and (stats[1] == x[0, 0]).all()


def test_large_offset() -> None:
    x = torch.randn(8, 768) + 1e6
    y, _ = reference.norm_forward(x, None, None, 768, 1, 1e-5, False, False)
    truth, _ = reference.norm_forward(x.double(), None, None, 768, 1, 1e-5, False, False)
    assert (
        y - truth
    ).abs().max() < 0.75 * 0.0625  # the mean, an fp32 number near 1e6, is rounded to a multiple of 1/16
    assert abs(y.std().item() - 1) < 1e-2


@both
def test_derivatives_of_the_formulas(rms: bool) -> None:
    """They are ordinary operations: gradcheck of forward, and of backward as a function of (dy, x, weight)."""
    x, dy, weight, bias = (t.requires_grad_() for t in _inputs(1, 3, 5, True, True, True))

    def forward(x, weight, bias):
        return reference.norm_forward(x, weight, bias, 5, 1, 1e-3, rms, True)

    assert torch.autograd.gradcheck(forward, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *a: forward(*a)[0], (x, weight, bias))

    def backward(dy, x, weight):
        stats = forward(x, None, None)[1]
        return reference.norm_backward(dy, x, stats, weight, 5, 1, rms, torch.float64, True, True, True)

    assert torch.autograd.gradcheck(backward, (dy, x, weight))


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta", "xpu"])
def test_it_serves_every_device(device_type: str) -> None:
    assert reference.unavailable(device_type) is None


# ------------------------------------------------------------------------------------------------ the rules of testing


def test_norm_truth_is_the_fp64_result() -> None:
    for op in OPS:
        case = NormCase(op, 6, 40, torch.bfloat16)
        inputs = draw(case)
        truth = norm_truth(inputs.x, inputs.weight, inputs.bias, inputs.dy, 40, case.eps, case.rms)
        double = replace(inputs, **{k: v.double() for k, v in vars(inputs).items() if v is not None})
        expected = run_torch(replace(case, dtype=torch.float64), double)
        for name in ("y", "dx", "dw") + (("db",) if op == "layer_norm" else ()):
            a, e = getattr(truth, name), getattr(expected, name)
            assert a.dtype == torch.float64
            torch.testing.assert_close(a.reshape(e.shape), e, rtol=1e-10, atol=1e-12)


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert testing.relative_error(truth.clone(), truth) == 0
    assert testing.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert testing.relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5
    nan = float("nan")
    assert math.isinf(testing.relative_error(torch.tensor([nan, 4.0]), truth))
    assert math.isinf(testing.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([nan, 4.0])))
    assert math.isinf(testing.relative_error(torch.tensor([3.0, 4.0, 5.0]), truth))
    assert testing.relative_error(torch.tensor([nan, 4.0]), torch.tensor([nan, 4.0])) == 0


def test_an_infinity_of_the_wrong_kind_is_an_error() -> None:
    """NaN for Inf, or Inf of the other sign, are not the truth."""
    inf, nan = float("inf"), float("nan")
    for wrong, right in ((nan, inf), (-inf, inf), (inf, nan)):
        assert math.isinf(testing.relative_error(torch.tensor([wrong, 4.0]), torch.tensor([right, 4.0]))), (
            wrong,
            right,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_rule_accepts_torch_and_refuses_small_errors(op: str, dtype: torch.dtype) -> None:
    """In every tensor: a systematic error of a few roundings, one wrong row, and a NaN."""
    case = NormCase(op, 40, 256, dtype)
    inputs = draw(case)
    truth = norm_truth(inputs.x, inputs.weight, inputs.bias, inputs.dy, 256, case.eps, case.rms)
    by_torch = run_torch(case, inputs)
    good = NormResult(*(None if t is None else t.to(dtype) for t in (truth.y, truth.dx, truth.dw, truth.db)))
    assert_norm_close(good, truth, by_torch)
    assert_norm_close(replace(by_torch, dw=None, db=None), truth, by_torch)
    for name in ("y", "dx", "dw") + (("db",) if op == "layer_norm" else ()):
        t = getattr(good, name)
        row = t.clone()
        row.view(-1)[: max(t.numel() // 40, 4)] *= 1 + 100 * torch.finfo(dtype).eps
        nan = t.clone()
        nan.view(-1)[3] = float("nan")
        for bad in (t * (1 + 30 * torch.finfo(dtype).eps), row, nan):
            with pytest.raises(AssertionError, match=name):
                assert_norm_close(replace(good, **{name: bad}), truth, by_torch)


@pytest.mark.parametrize(
    "wrong", ["no mean(g) term", "no mean(g*xhat) term", "variance over n-1", "weight left out", "eps outside the root"]
)
def test_the_check_refuses_the_usual_mistakes(wrong: str) -> None:
    """With the upstream gradients that the tests use; a ``.sum()`` loss would let the first of them through."""
    case = NormCase("layer_norm", 16, 64, torch.float32, eps=1e-2)
    inputs = draw(case)
    x, w, b, dy = (t.double() for t in (inputs.x, inputs.weight, inputs.bias, inputs.dy))
    centred = x - x.mean(1, keepdim=True)
    var = centred.square().sum(1, keepdim=True) / (63 if wrong == "variance over n-1" else 64)
    rstd = 1 / (var.sqrt() + case.eps) if wrong == "eps outside the root" else (var + case.eps).rsqrt()
    xhat = centred * rstd
    g = dy if wrong == "weight left out" else dy * w
    dx = g - (0 if wrong == "no mean(g) term" else g.mean(1, keepdim=True))
    dx = (dx - (0 if wrong == "no mean(g*xhat) term" else xhat * (g * xhat).mean(1, keepdim=True))) * rstd
    result = NormResult(*(t.float() for t in (xhat * w + b, dx, (dy * xhat).sum(0), dy.sum(0))))
    with pytest.raises(AssertionError, match="error"):
        check(case, inputs, result)
    check(case, inputs, run(case, inputs))


def test_call_names_both_functions() -> None:
    x, w = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(call("rms_norm", F, x, (8,), w), F.rms_norm(x, (8,), w, 1e-5))
    torch.testing.assert_close(call("layer_norm", F, x, (8,), w, w), F.layer_norm(x, (8,), w, w))
