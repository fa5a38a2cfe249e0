"""The Triton backend: LayerNorm and RMSNorm for CUDA, ROCm and XPU, by the contract of :mod:`fused_norm.backends`.

Importing this module imports no triton, which is optional and slow to load; the first call does.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type`` on this machine, else the reason why not."""
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "on a CPU Triton only has its interpreter, for tests: set TRITON_INTERPRET=1 before triton is imported"
            )
    elif device_type not in ("cuda", "xpu"):
        return f"no Triton kernel is written for {device_type!r} devices"
    elif not getattr(torch, device_type).is_available():
        return f"torch {torch.__version__} sees no {device_type} device"
    try:
        import triton
        from triton.runtime import JITFunction
    except Exception as error:  # a broken installation raises whatever it likes
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    if device_type == "cpu" and isinstance(triton.language.zeros, JITFunction):
        return "triton was imported before TRITON_INTERPRET=1 was set"
    return None


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, groups: int, eps: float, rms: bool, need_stats: bool
) -> tuple[Tensor, Tensor]:
    from . import norm

    return norm.norm_forward(x, weight, bias, n, groups, eps, rms, need_stats)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    groups: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from . import norm

    return norm.norm_backward(dy, x, stats, weight, n, groups, rms, param_dtype, need_dx, need_dw, need_db)


def norm_double_backward(
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    groups: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_ddy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from . import double_backward

    return double_backward.norm_double_backward(
        ddx, ddw, ddb, dy, x, stats, weight, n, groups, rms, param_dtype, need_ddy, need_dx, need_dw
    )
