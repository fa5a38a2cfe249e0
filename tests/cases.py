"""The table of norm cases (shapes x dtypes x parameters), how to draw and run them, and the rule they are held to.

The rule itself, how far a result may lie from the fp64 truth, is ``fused_norm.testing.assert_norm_close``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_norm.functional as FF
from fused_norm.testing import NormResult, assert_norm_close, norm_truth, relative_error, typical_rounding

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)

#: (rows, columns): one element, one column, narrower than a vector, ragged, usual widths, wide rows, many short rows.
SHAPES = (
    (1, 1),
    (3, 1),
    (1, 7),
    (4, 16),
    (5, 63),
    (2, 64),
    (33, 100),
    (600, 16),
    (17, 768),
    (64, 1000),
    (3, 4097),
    (2, 20000),
)

#: Which of weight and bias there are.
AFFINE = ("weight+bias", "weight", "bias", "none")

OPS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class NormCase:
    """One call of layer_norm or rms_norm. ``param_dtype`` None means x's."""

    op: str
    rows: int
    n: int
    dtype: torch.dtype
    affine: str = "weight+bias"
    param_dtype: torch.dtype | None = None
    eps: float = 1e-5

    @property
    def rms(self) -> bool:
        return self.op == "rms_norm"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.param_dtype is not None:
            name += f"/{str(self.param_dtype).removeprefix('torch.')}"
        return f"{self.op}-{self.rows}x{self.n}-{name}-{self.affine}"


@dataclass(frozen=True)
class NormInputs:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor


def has_bias(op: str, affine: str) -> bool:
    return op == "layer_norm" and affine in ("weight+bias", "bias")


def _affine_of(op: str) -> tuple[str, ...]:
    return AFFINE if op == "layer_norm" else ("weight", "none")


def norm_cases() -> list[NormCase]:
    """Every shape and dtype with full parameters, bf16/fp16 x with fp32 parameters, each subset of parameters once."""
    cases = []
    for op in OPS:
        full = _affine_of(op)[0]
        cases += [NormCase(op, m, n, dtype, full) for m, n in SHAPES for dtype in DTYPES]
        cases += [
            NormCase(op, m, n, d, full, torch.float32)
            for m, n in ((5, 63), (17, 768), (3, 4097))
            for d in LOW_PRECISION
        ]
        cases += [NormCase(op, 17, 768, dtype, affine) for affine in _affine_of(op)[1:] for dtype in DTYPES]
    return cases


def draw(case: NormCase, device: str = "cpu") -> NormInputs:
    """Random inputs and upstream gradient; drawn on the CPU, so that every device sees the same numbers.

    x has mean 0.5, so that layer_norm and rms_norm differ, and the weight is spread around 1.
    """
    param_dtype = case.param_dtype or case.dtype

    def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale + shift).to(dtype).to(device)

    return NormInputs(
        x=randn(case.rows, case.n, dtype=case.dtype, shift=0.5),
        weight=randn(case.n, dtype=param_dtype, scale=0.3, shift=1.0) if "weight" in case.affine else None,
        bias=randn(case.n, dtype=param_dtype, scale=0.3) if has_bias(case.op, case.affine) else None,
        dy=randn(case.rows, case.n, dtype=case.dtype),
    )


def call(
    op: str, namespace, x: Tensor, shape, weight: Tensor | None = None, bias: Tensor | None = None, eps=1e-5
) -> Tensor:
    """``layer_norm`` or ``rms_norm`` of ``namespace``: torch's functional or ours."""
    if op == "layer_norm":
        return namespace.layer_norm(x, shape, weight, bias, eps)
    return namespace.rms_norm(x, shape, weight, eps)


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone().requires_grad_()


def run(case: NormCase, inputs: NormInputs, namespace=FF) -> NormResult:
    """Output and all gradients of the case, by ``namespace``'s function."""
    x, weight, bias = leaf(inputs.x), leaf(inputs.weight), leaf(inputs.bias)
    y = call(case.op, namespace, x, (case.n,), weight, bias, case.eps)
    y.backward(inputs.dy)
    return NormResult(y.detach(), x.grad, *(None if p is None else p.grad for p in (weight, bias)))


def run_torch(case: NormCase, inputs: NormInputs) -> NormResult:
    """torch's result from the same inputs; where CUDA refuses (bf16 x, fp32 parameters), the CPU's stands in."""
    try:
        return run(case, inputs, F)
    except RuntimeError:
        if case.param_dtype is None or inputs.x.device.type == "cpu":
            raise
        moved = (None if t is None else t.cpu() for t in (inputs.x, inputs.weight, inputs.bias, inputs.dy))
        return run(case, NormInputs(*moved), F)


def check(case: NormCase, inputs: NormInputs, result: NormResult, is_torch: bool = False) -> None:
    """Hold ``result`` to the rule, and its dtypes, shapes and layout to torch's.

    ``is_torch``: the result comes from torch's own kernels, whose dw and db in bf16/fp16 may break our rule.
    """
    truth = norm_truth(inputs.x, inputs.weight, inputs.bias, inputs.dy, case.n, case.eps, case.rms)
    by_torch = run_torch(case, inputs)
    for name in ("y", "dx", "dw", "db"):
        ours, theirs = getattr(result, name), getattr(by_torch, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (name, ours.dtype, ours.shape)
    assert result.y.is_contiguous()
    judged = {"y": result.y, "dx": result.dx, "dw": result.dw, "db": result.db}
    if is_torch:
        judged["dw"] = judged["db"] = None
    if case.n == 1 and case.rms:
        # dx is g*rstd*(1 - xhat^2) with xhat^2 nearly 1: nothing but cancellation is left of it.
        judged["dx"] = None
        rstd = (inputs.x.double().square() + case.eps).rsqrt()
        size = inputs.dy.double().abs() * rstd * (1 if inputs.weight is None else inputs.weight.double().abs())
        assert ((result.dx.double() - truth.dx).abs() <= 4 * torch.finfo(case.dtype).eps * size + 1e-300).all()
    for name, value in judged.items():
        if value is not None and relative_error(value, getattr(truth, name)) <= _lottery(case):
            judged[name] = None
    assert_norm_close(NormResult(**judged), truth, by_torch)


def _lottery(case: NormCase) -> float:
    """The error below which a comparison with torch's is a lottery, as a relative L2 norm.

    In fp64 because the truth itself is rounded to fp64; in fp32 with a few rows because each row's error is mostly that
    of its one rstd, so the ratio of two errors is that of a few random numbers.
    """
    if case.dtype == torch.float64:
        return 16 * typical_rounding(case.dtype)
    if case.dtype == torch.float32 and case.rows < 16:
        return 16 * typical_rounding(case.dtype)
    return 0.0


def assert_same_bits(a: Tensor | None, b: Tensor | None, what: str = "") -> None:
    """Equal bit for bit, NaN equal to NaN."""
    assert (a is None) == (b is None), what
    if a is not None:
        assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def exception_of(function: Callable, *args, **kwargs) -> BaseException | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None
