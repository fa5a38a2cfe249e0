"""The Triton backend: norms and the ticks loss for CUDA, ROCm and XPU, by the contract of :mod:`fused_norm.backends`.

Importing this module imports no triton, which is optional and slow to load; the first call does.

Each kernel is an operator too, ``fused_norm::triton_norm_forward`` and so on. Where torch traces (torch.compile,
make_fx, FakeTensor), the operator stands for the kernel; all other calls go past it, for an operator in Python costs
more than a launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor


def unavailable(device_type: str) -> str | None:
    """None if this backend can serve ``device_type`` on this machine, else the reason why not."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
    except Exception as error:  # a finder raises whatever it likes
        return f"triton cannot be imported: {type(error).__name__}: {error}"
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


_library = torch.library.Library("fused_norm", "FRAGMENT")
#: What arguments of calls that no one but the GPU sees may be.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, int, float, bool, type(None), torch.dtype})
_mode_count = torch._C._len_torch_dispatch_stack
_pre_dispatch = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch)


def _traced(args: tuple) -> bool:
    """Whether something is to see the call before the GPU does."""
    return _mode_count() or not _PLAIN.issuperset(map(type, args)) or _pre_dispatch()


def _kernel(module: str, name: str) -> Callable:
    """The launcher of that name in the module, which the first call imports."""

    @functools.cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(f".{module}", __name__), name)

    return launcher


def _operator(module: str, name: str, schema: str) -> Callable:
    """The contract's function ``name``, by the launcher of :mod:`.module`: for calls that are traced an operator."""
    launcher = _kernel(module, name)

    def kernel(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        # An operator's results are tensors.
        return tuple(torch.empty(0, device=device) if r is None else r for r in launcher()(*args))

    _library.define(f"triton_{name}{schema}")
    _library.impl(f"triton_{name}", kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.fused_norm, f"triton_{name}").default

    def function(*args, **kwargs):
        return (operator if _traced(args) else launcher())(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"The contract's function, by :mod:`.{module}`."
    return function


norm_forward = _operator(
    "norm",
    "norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, int n, int groups, float eps, bool rms, bool need_stats,"
    " bool cast=False) -> (Tensor y, Tensor stats)",
)
norm_backward = _operator(
    "norm",
    "norm_backward",
    "(Tensor dy, Tensor x, Tensor stats, Tensor? weight, int n, int groups, bool rms, ScalarType param_dtype,"
    " bool need_dx, bool need_dw, bool need_db) -> (Tensor dx, Tensor dw, Tensor db)",
)
add_norm_forward = _operator(
    "norm",
    "add_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int n, float eps, bool rms,"
    " float dropout_p, bool need_stats, bool cast) -> (Tensor y, Tensor summed, Tensor stats)",
)
add_norm_backward = _operator(
    "norm",
    "add_norm_backward",
    "(Tensor dy, Tensor? dsummed, Tensor summed, Tensor stats, Tensor? weight, Tensor? seed, int n, bool rms,"
    " float dropout_p, ScalarType param_dtype, ScalarType x_dtype, bool need_dx, bool need_dresidual, bool need_dw,"
    " bool need_db) -> (Tensor dx, Tensor dresidual, Tensor dw, Tensor db)",
)
norm_double_backward = _operator(
    "double_backward",
    "norm_double_backward",
    "(Tensor? ddx, Tensor? ddw, Tensor? ddb, Tensor? dy, Tensor x, Tensor stats, Tensor? weight, int n, int groups,"
    " bool rms, ScalarType param_dtype, bool need_ddy, bool need_dx, bool need_dw)"
    " -> (Tensor grad_dy, Tensor grad_x, Tensor grad_w)",
)
ticks_forward = _operator(
    "ticks",
    "ticks_forward",
    "(Tensor z, Tensor target, Tensor? weight, int ignore_index, float smoothing, float ce, float ticks, float softcap)"
    " -> (Tensor loss, Tensor stats)",
)
_ticks_backward = _operator(
    "ticks",
    "ticks_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor z, Tensor target, Tensor stats, Tensor? weight, int ignore_index,"
    " float smoothing, float ce, float ticks, float softcap, bool need_dz, bool need_dtarget)"
    " -> (Tensor dz, Tensor dtarget)",
)
_ticks_backward_launcher = _kernel("ticks", "ticks_backward")


def ticks_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    z: Tensor,
    target: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    ce: float,
    ticks: float,
    softcap: float,
    need_dz: bool,
    need_dtarget: bool,
    inplace: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The contract's function, by :mod:`.ticks`. An operator may not return its argument: it has no ``inplace``."""
    args = (grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap, need_dz)
    inplace = inplace and need_dz
    if inplace and not _traced(args):
        return _ticks_backward_launcher()(*args, need_dtarget, inplace)
    dz, dtarget = _ticks_backward(*args, need_dtarget)
    return z.copy_(dz) if inplace else dz, dtarget
