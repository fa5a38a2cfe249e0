"""Who is compared: adapters, each of which runs an operation or says why it cannot.

Those of a package stand beside the operation they run. They follow liger-kernel 0.8.5, quack-kernels 0.6.5, flash-attn
2.8.3, transformer-engine 2.20, cut-cross-entropy 25.1.1 and NVIDIA's apex of July 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

from .operation import BASELINE, DTYPES, Call, Inputs, Op, Provider

#: Left out unless asked for: what auto picks is timed under its own name, and the reference is not meant to be fast.
NOT_BY_DEFAULT = ("fused", "fused:reference")


def compiled(call: Call) -> Call:
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
    return Provider(name, lambda: call, unavailable, context=context, overwrites=overwrites)


def with_providers(op: Op, kernel: str, peers: tuple[Provider, ...]) -> Op:
    """Fill in ``op.providers``: torch, torch.compile, the peers, and ours on every backend."""
    everyone = (
        Provider(BASELINE, lambda: op.baseline),
        Provider("compile", op.compiled or partial(compiled, op.baseline)),
        *peers,
        fused("fused", "auto", op.fused, kernel),
        *(fused(f"fused:{backend}", backend, op.fused, kernel) for backend in ("triton", "native", "reference")),
    )
    op.providers.update((p.name, p) for p in everyone)
    return op


def default_providers(op: Op) -> list[str]:
    return [name for name in op.providers if name not in NOT_BY_DEFAULT]


def _missing(title: str, need: str) -> str | None:
    """Why ``need`` ("module" or "module:attribute") is not there, or None."""
    module, _, attribute = need.partition(":")
    try:
        has = import_module(module)
    except Exception as e:  # a package built for another torch or CUDA raises all kinds
        lines = str(e).strip().splitlines() or [""]
        return f"{title}: import {module} fails: {type(e).__name__}: {lines[0][:200]}"
    if attribute and not hasattr(has, attribute):
        with suppress(metadata.PackageNotFoundError):
            title += f" {metadata.version(title)}"
        return f"{title} has no {module}.{attribute}"
    return None


def package(title: str, *needs: str, gpu_only: bool = True) -> Callable[[torch.device], str | None]:
    """For ``Provider.unavailable``: whether a package is installed, serves the device, and has what is called of it.
    ``needs`` are "module" or "module:attribute", the first in the package itself."""

    def unavailable(device: torch.device) -> str | None:
        if find_spec(needs[0].partition(":")[0].partition(".")[0]) is None:
            return f"{title} is not installed"
        if gpu_only and device.type == "cpu":
            return f"{title} runs on GPUs only, the device is cpu"
        return next((reason for need in needs if (reason := _missing(title, need))), None)

    return unavailable


def takes(
    *dtypes: str, columns: int | None = None, row_bytes: int | None = None, multiple: int = 1
) -> Callable[[Inputs], str | None]:
    """For ``Provider.limit``: the dtypes taken (fp32, bf16, fp16 unless named), the longest row of x in elements or
    bytes, and what must divide each size of the tensors."""
    dtypes = dtypes or ("fp32", "bf16", "fp16")

    def limit(inputs: Inputs) -> str | None:
        x = inputs.x
        if x.dtype not in (DTYPES[name] for name in dtypes):
            return f"takes {', '.join(dtypes)}, the input is {x.dtype}"
        n = x.shape[-1]
        if columns is not None and n > columns:
            return f"takes up to {columns} columns, the input has {n}"
        if row_bytes is not None and n * x.element_size() > row_bytes:
            return f"takes rows of up to {row_bytes} bytes, the input's have {n * x.element_size()}"
        sizes = [size for name in inputs.leaves for size in inputs.tensors[name].shape]
        odd = [size for size in sizes if size % multiple]
        return f"takes sizes that are multiples of {multiple}, not {odd[0]}" if odd else None

    return limit
