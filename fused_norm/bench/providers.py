"""Who is compared: adapters, each of which runs an operation or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec

import torch

from .operation import BASELINE, Call, Op, Provider

#: Left out unless asked for: what auto picks is timed under its own name, and the reference is not meant to be fast.
NOT_BY_DEFAULT = ("fused", "fused:reference")


def _compiled(call: Call) -> Call:
    # A static graph for each shape is the compiler's best case. A reset keeps earlier shapes from counting towards the
    # recompilation limit, past which it would quietly run eager code.
    torch.compiler.reset()
    # Backward is timed on one graph again and again, which compiled code allows only if it may not reuse saved buffers.
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    return torch.compile(call, dynamic=False, fullgraph=True)


def _fused_unavailable(backend: str, kernel: str, device: torch.device) -> str | None:
    if backend == "triton" and device.type == "cpu":
        return "Triton runs on a CPU only in its interpreter, which is not timed"
    try:
        from .. import dispatch

        with dispatch.use_backend(backend):
            dispatch.select(kernel, device.type)
    except (ImportError, RuntimeError) as e:
        return str(e)
    return None


def _fused_context(backend: str) -> AbstractContextManager:
    from .. import dispatch

    return dispatch.use_backend(backend)


def fused(name: str, backend: str, call: Call, kernel: str, overwrites: tuple[str, ...] = ()) -> Provider:
    """``call`` on one backend of ours, with its kernel ("norm" or "ticks")."""
    unavailable, context = partial(_fused_unavailable, backend, kernel), partial(_fused_context, backend)
    return Provider(name, lambda: call, unavailable, context, overwrites=overwrites)


def with_providers(op: Op, kernel: str, peers: tuple[Provider, ...]) -> Op:
    """Fill in ``op.providers``: torch, torch.compile, the peers, and ours on every backend."""
    everyone = (
        Provider(BASELINE, lambda: op.baseline),
        Provider("compile", lambda: _compiled(op.baseline)),
        *peers,
        fused("fused", "auto", op.fused, kernel),
        *(fused(f"fused:{backend}", backend, op.fused, kernel) for backend in ("triton", "native", "reference")),
    )
    op.providers.update((p.name, p) for p in everyone)
    return op


def default_providers(op: Op, quick: bool) -> list[str]:
    return [name for name in op.providers if name not in NOT_BY_DEFAULT and not (quick and name == "compile")]


def package(module: str, title: str, gpu_only: bool) -> Callable[[torch.device], str | None]:
    """For ``Provider.unavailable``: whether a package is installed, and serves the device."""

    def unavailable(device: torch.device) -> str | None:
        if find_spec(module) is None:
            return f"{title} is not installed"
        if gpu_only and device.type == "cpu":
            return f"{title} runs on GPUs only, the device is cpu"
        return None

    return unavailable


liger_unavailable = package("liger_kernel", "liger-kernel", gpu_only=True)
