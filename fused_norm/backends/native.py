"""The C++ backend: loads the compiled extensions, and adapts their operators to the contract in :mod:`.backends`.

``fused_norm._C`` holds the operators' schemas and the CPU kernels, ``fused_norm._C_cuda`` the CUDA kernels. Both are
optional: without them this module imports all the same, and :func:`unavailable` says what is missing.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import torch  # before the extensions, which need its libraries loaded
from torch import Tensor

from .. import reference

_BUILD_NOTE = Path(__file__).parent.parent / "_build_note.txt"  # left by setup.py


def _load(name: str) -> str | None:
    """Import an extension; None, or the reason why it cannot be."""
    try:
        importlib.import_module(f"fused_norm.{name}")
    except ModuleNotFoundError:
        reason = f"the extension fused_norm.{name} is not built"
        try:
            notes = _BUILD_NOTE.read_text().split("\n")
        except OSError:
            notes = []
        return ": ".join([reason, *filter(None, notes)])
    except Exception as error:  # built for another machine or torch: whatever the loader says
        return f"the extension fused_norm.{name} does not load: {error}"
    return None


_cpu_missing = _load("_C")
_cuda_missing = _cpu_missing or _load("_C_cuda")


def unavailable(device_type: str) -> str | None:
    """None, or the reason this backend cannot serve that device type here."""
    if device_type == "cpu":
        return _cpu_missing
    if device_type != "cuda":
        return f"it has no kernels for {device_type} tensors"
    if _cuda_missing:
        return _cuda_missing
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return cuda_reason(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


@functools.cache
def cuda_reason(device_index: int) -> str | None:
    """None, or the reason the CUDA kernels cannot run on ``cuda:device_index``: the build may have no code for it.

    The first question about a device makes its CUDA context.
    """
    if _cuda_missing:
        return _cuda_missing
    return importlib.import_module("fused_norm._C_cuda").unavailable(device_index) or None


def cpu_capability() -> str | None:
    """The instruction set in use on the CPU: "default", "avx2" or "avx512"; None without the extension.

    It is the best that the machine has, unless the environment variable ``ATEN_CPU_CAPABILITY`` asked for less when the
    extension was loaded.
    """
    return None if _cpu_missing else _C.cpu_capability()


def cpu_capabilities() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best last."""
    return () if _cpu_missing else _C.cpu_capabilities()


def set_cpu_capability(name: str) -> None:
    """Use this instruction set from now on, in the whole process. For tests and measurements.

    Raises:
        ValueError: if this machine cannot run it.
    """
    _C.set_cpu_capability(name)


def _add_norm_forward_composed(
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without a kernel of our own for the addition: torch's operations, then the norm's kernel."""
    summed = reference.add_dropped(x.reshape(residual.shape), residual, seed, dropout_p).contiguous()
    y, stats = norm_forward(summed, weight, bias, n, 1, eps, rms, need_stats, cast)
    return y, summed, stats


def _add_norm_backward_composed(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    need_d = need_dx or need_dresidual
    if not need_d or (dsummed is None and seed is None and x_dtype == summed.dtype):
        d, dw, db = norm_backward(dy, summed, stats, weight, n, 1, rms, param_dtype, need_d, need_dw, need_db)
        return None, d, dw, db
    # In the accumulation type, so that d is rounded after the addition alone.
    dy, wide, weight = (None if t is None else t.to(stats.dtype) for t in (dy, summed, weight))
    d, dw, db = norm_backward(dy, wide, stats, weight, n, 1, rms, stats.dtype, True, need_dw, need_db)
    d = d if dsummed is None else d + dsummed.reshape(d.shape)
    dx = d if seed is None else d * reference.dropout_mask(seed, d, dropout_p)
    dw, db = (t.to(param_dtype) if need else None for t, need in ((dw, need_dw), (db, need_db)))
    return dx.to(x_dtype), d.to(summed.dtype), dw, db


if not _cpu_missing:
    from .. import _C

    # The operators, by functions that go past the dispatcher where it would have nothing to do: it would be a third of
    # a small call. There it would do two things that nobody here needs, and which do not happen: give results of
    # arguments that require grad a grad_fn that says there is no derivative, and resolve a negative-bit view (as_rows
    # has done so).
    norm_forward = _C.norm_forward
    norm_backward = _C.norm_backward
    plain_row_length = _C.plain_row_length

    def norm_double_backward(ddx, ddw, ddb, dy, x, *args):
        """The contract's function: the operator, which has a kernel on the CPU alone; elsewhere the formulas."""
        if x.is_cpu:
            return _C.norm_double_backward(ddx, ddw, ddb, dy, x, *args)
        return reference.norm_double_backward(ddx, ddw, ddb, dy, x, *args)

    def add_norm_forward(x, residual, *args):
        """The contract's function: the operator, which has a kernel on the CPU alone; elsewhere composed."""
        if residual.is_cpu:
            return torch.ops.fused_norm.add_norm_forward.default(x, residual, *args)
        return _add_norm_forward_composed(x, residual, *args)

    def add_norm_backward(dy, dsummed, summed, *args):
        """The contract's function, likewise."""
        if summed.is_cpu:
            return torch.ops.fused_norm.add_norm_backward.default(dy, dsummed, summed, *args)
        return _add_norm_backward_composed(dy, dsummed, summed, *args)

    def _ticks_operator(operator, *args):
        try:
            return operator(*args)
        except RuntimeError as error:  # libtorch's stable ABI has no other
            if type(error) is RuntimeError and "CUDA out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            found = re.search(r"target -?\d+ is out of range for \d+ classes", str(error))
            if not found:
                raise
            raise IndexError(found.group()) from None

    def ticks_forward(z, target, weight, ignore_index, smoothing, ce, ticks, softcap):
        """The contract's function.

        Raises:
            IndexError: on the CPU, if a class index is neither in range nor ``ignore_index``.
        """
        ops = torch.ops.fused_norm
        traced = _mode_count() or type(z) not in (Tensor, torch.nn.Parameter)
        operator = ops.native_ticks_forward.default if traced else ops.ticks_forward.default
        return _ticks_operator(operator, z, target, weight, ignore_index, smoothing, ce, ticks, softcap)

    # What a graph holds in the operator's place, so that compiled code raises IndexError too.
    _mode_count = torch._C._len_torch_dispatch_stack
    _library = torch.library.Library("fused_norm", "FRAGMENT")
    _library.define(
        "native_ticks_forward(Tensor z, Tensor target, Tensor? weight, int ignore_index, float smoothing, float ce,"
        " float ticks, float softcap) -> (Tensor loss, Tensor stats)"
    )
    _library.impl(
        "native_ticks_forward",
        lambda *args: _ticks_operator(torch.ops.fused_norm.ticks_forward.default, *args),
        "CompositeExplicitAutograd",
    )

    def ticks_backward(
        grad,
        grad_lse,
        z,
        target,
        stats,
        weight,
        ignore_index,
        smoothing,
        ce,
        ticks,
        softcap,
        need_dz,
        need_dtarget,
        inplace,
    ):
        """The contract's function; raises as :func:`ticks_forward` does."""
        args = (grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap)
        if inplace and need_dz:
            return z, _ticks_operator(torch.ops.fused_norm.ticks_backward_inplace.default, *args, need_dtarget)
        return _ticks_operator(torch.ops.fused_norm.ticks_backward.default, *args, need_dz, need_dtarget)

else:

    def norm_forward(*args):
        """Stands in for the operator that is missing."""
        raise RuntimeError(_cpu_missing)

    norm_backward = norm_forward
    norm_double_backward = norm_forward
    add_norm_forward = norm_forward
    add_norm_backward = norm_forward
    ticks_forward = norm_forward
    ticks_backward = norm_forward

    def plain_row_length(x, normalized_shape, weight, bias):
        """Stands in for the check that is missing: every call takes Python's."""
        return 0
