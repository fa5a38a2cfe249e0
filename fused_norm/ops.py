"""Operators for what traces: ``composite`` defines those that Dynamo sees, and the kernels' own get their fakes.

The kernels' operators stand in csrc/ops.cpp (``norm_forward``, ...) and in backends/triton (``triton_norm_forward``,
...). Autograd, forward-mode AD and vmap do not go through them (a library operator's ``register_autograd`` gives
forward-mode AD silent zeros) but through :mod:`fused_norm.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, reference

_library = torch.library.Library("fused_norm", "FRAGMENT")


def composite(schema: str, function: Callable) -> torch._ops.OpOverload:
    """Define the operator ``fused_norm::schema``, which every transform takes apart into what ``function`` does."""
    name = _library.define(schema)
    _library.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.fused_norm, name.partition("::")[2] or name).default


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm_forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    groups: int,
    eps: float,
    rms: bool,
    need_stats: bool,
    cast: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // n
    kept = (1 if rms else 2) if need_stats else 0
    return x.new_empty(x.shape), x.new_empty((kept, rows), dtype=_stats_dtype(x))


def _norm_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dw = x.new_empty((groups, n) if need_dw else (0,), dtype=param_dtype)
    db = x.new_empty((groups, n) if need_db else (0,), dtype=param_dtype)
    return dx, dw, db


def _add_norm_forward_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    need_stats: bool,
    cast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats = _norm_forward_fake(residual, weight, bias, n, 1, eps, rms, need_stats)
    return y, torch.empty_like(y), stats


def _add_norm_backward_fake(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    n: int,
    rms: bool,
    dropout_p: float,
    param_dtype: torch.dtype,
    x_dtype: torch.dtype,
    need_dx: bool,
    need_dresidual: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    apart = seed is not None or x_dtype != summed.dtype  # dx is not dresidual
    dx = summed.new_empty(summed.shape if need_dx and apart else (0,), dtype=x_dtype)
    dresidual = summed.new_empty(summed.shape if need_dresidual or (need_dx and not apart) else (0,))
    dw = summed.new_empty((1, n) if need_dw else (0,), dtype=param_dtype)
    db = summed.new_empty((1, n) if need_db else (0,), dtype=param_dtype)
    return dx, dresidual, dw, db


def _norm_double_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    grad_dy = x.new_empty(x.shape if need_ddy else (0,))
    grad_x = x.new_empty(x.shape if need_dx else (0,))
    grad_w = x.new_empty((groups, n) if need_dw else (0,), dtype=param_dtype)
    return grad_dy, grad_x, grad_w


def _ticks_forward_fake(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    ce: float,
    ticks: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    kept = 3 if reference.is_plain(target, smoothing) else 4
    dtype = _stats_dtype(z)
    return z.new_empty(z.shape[:1], dtype=dtype), z.new_empty((kept, z.shape[0]), dtype=dtype)


def _ticks_backward_fake(
    grad: Tensor, grad_lse: Tensor | None, z: Tensor, target: Tensor, *options: Tensor | float | bool | None
) -> tuple[Tensor, Tensor]:
    *_, need_dz, need_dtarget = options
    return z.new_empty(z.shape if need_dz else (0,)), target.new_empty(target.shape if need_dtarget else (0,))


def _ticks_backward_inplace_fake(
    grad: Tensor, grad_lse: Tensor | None, z: Tensor, target: Tensor, *options: Tensor | float | bool | None
) -> Tensor:
    return target.new_empty(target.shape if options[-1] else (0,))


_FAKES = {
    "ticks_backward_inplace": _ticks_backward_inplace_fake,
    "ticks_forward": _ticks_forward_fake,
    "native_ticks_forward": _ticks_forward_fake,
    "ticks_backward": _ticks_backward_fake,
    "add_norm_forward": _add_norm_forward_fake,
    "add_norm_backward": _add_norm_backward_fake,
    "norm_forward": _norm_forward_fake,
    "norm_backward": _norm_backward_fake,
    "norm_double_backward": _norm_double_backward_fake,
}

for _backend, _prefix in (("native", ""), ("triton", "triton_")):
    dispatch.load(_backend)  # loading it defines its operators, unless the extension is missing
    for _name, _fake in _FAKES.items():
        if hasattr(torch.ops.fused_norm, _prefix + _name):
            torch.library.register_fake(f"fused_norm::{_prefix}{_name}", _fake)
