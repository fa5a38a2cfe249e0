"""What our tests and a user's CI check with: the fp64 truth, error measures, and how large an error may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

#: The error allowed for y and dx, as a multiple of torch's own error against the fp64 truth on the same inputs.
TORCH_FACTOR = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 1.5, torch.float64: 1.5}

#: The same bound where torch happens to be exact (small sizes), as a multiple of the error of rounding the truth once.
#: An element of y or dx takes about four roundings in fp32 and fp64; in bf16 and fp16 only the last of them counts.
ROUNDING_FACTOR = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 4.0, torch.float64: 4.0}

#: The error allowed for dw and db in bf16 and fp16, as a multiple of rounding the truth once.
PARAM_ROUNDING_FACTOR = 3.0


@dataclass(frozen=True)
class NormResult:
    """Output and gradients of one layer_norm or rms_norm; what was not computed is None."""

    y: Tensor
    dx: Tensor | None = None
    dw: Tensor | None = None
    db: Tensor | None = None


def _fp64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


def norm_truth(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, n: int, eps: float, rms: bool, groups: int = 1
) -> NormResult:
    """The fp64 truth for these very inputs: rows of ``n`` elements, ``groups`` as in :mod:`fused_norm.backends`.

    ``dw`` and ``db`` have shape ``(groups, n)`` and are given whether or not there is a weight or a bias.
    """
    x64, w64, b64, dy64 = (_fp64(t) for t in (x, weight, bias, dy))
    y, stats = reference.norm_forward(x64, w64, b64, n, groups, eps, rms, True)
    dx, dw, db = reference.norm_backward(
        dy64, x64, stats, w64, n, groups, rms, torch.float64, need_dx=True, need_dw=True, need_db=True
    )
    return NormResult(y, dx, dw, db)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """``||actual - truth|| / ||truth||`` in fp64, over the elements where the truth is finite.

    Where the truth is zero it is ``||actual||``. It is inf if the two are not finite at the same elements, or differ in size.
    """
    if actual.numel() != truth.numel():
        return float("inf")
    a, t = actual.detach().double().reshape(-1), truth.detach().double().reshape(-1).to(actual.device)
    if not torch.equal(torch.isfinite(a), torch.isfinite(t)):
        return float("inf")
    finite = torch.isfinite(t)
    a, t = a[finite], t[finite]
    norm = t.norm().item()
    error = (a - t).norm().item()
    return error / norm if norm else error


def one_rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """The relative error of rounding ``truth`` to ``dtype`` once: the least that any kernel can reach."""
    return relative_error(truth.to(dtype), truth)


def typical_rounding(dtype: torch.dtype) -> float:
    """The relative L2 error of rounding well-spread numbers to ``dtype``: about 0.4 times half the machine epsilon."""
    return 0.4 * torch.finfo(dtype).eps / 2


def error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for y or dx (and for dw and db in fp32 and fp64), given torch's own."""
    rounding = max(one_rounding(truth, dtype), typical_rounding(dtype))
    return max(TORCH_FACTOR[dtype] * torch_error, ROUNDING_FACTOR[dtype] * rounding)


def param_error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for dw and db: for bf16 and fp16 whatever torch's error, three times one rounding."""
    if dtype in (torch.bfloat16, torch.float16):
        return PARAM_ROUNDING_FACTOR * max(one_rounding(truth, dtype), typical_rounding(dtype))
    return error_limit(truth, dtype, torch_error)


def assert_norm_close(actual: NormResult, truth: NormResult, torch_result: NormResult) -> None:
    """Assert that every tensor of ``actual`` is as near the fp64 ``truth`` as the rules above demand.

    ``torch_result`` holds what torch computes from the same inputs (None where torch cannot: only the rounding rule
    counts then). Raises AssertionError naming the tensor, its error, torch's and the limit.
    """
    for name in ("y", "dx", "dw", "db"):
        a, t, ref = getattr(actual, name), getattr(truth, name), getattr(torch_result, name)
        if a is None:
            continue
        torch_error = 0.0 if ref is None else relative_error(ref, t)
        limit = (error_limit if name in ("y", "dx") else param_error_limit)(t, a.dtype, torch_error)
        error = relative_error(a, t)
        assert error <= limit, (
            f"{name}: error {error:.3g} > limit {limit:.3g} ({a.dtype}, torch's error {torch_error:.3g})"
        )
