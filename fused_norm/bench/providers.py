"""Who is compared: a registry of small adapters, each of which runs an operation or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Op

NormCall = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _always(device: torch.device) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """``make(op)`` is called once for each case and gives ``f(x, w, b) -> y``; ``context()`` is entered around its
    calls, outside the timed region; ``unavailable(device)`` gives None, or the reason it cannot run there."""

    name: str
    make: Callable[[Op], NormCall]
    unavailable: Callable[[torch.device], str | None] = _always
    context: Callable[[], AbstractContextManager] = nullcontext

    @property
    def ours(self) -> bool:
        return self.name.partition(":")[0] == "fused"


def _torch(op: Op) -> NormCall:
    return partial(op.call, F)


def _compile(op: Op) -> NormCall:
    # A static graph for each shape is the compiler's best case. A reset keeps earlier shapes from counting towards the
    # recompilation limit, past which it would quietly run eager code.
    torch.compiler.reset()
    # Backward is timed on one graph again and again, which compiled code allows only if it may not reuse saved buffers.
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    return torch.compile(partial(op.call, F), dynamic=False, fullgraph=True)


def _fused_unavailable(backend: str, device: torch.device) -> str | None:
    if backend == "triton" and device.type == "cpu":
        return "Triton runs on a CPU only in its interpreter, which is not timed"
    try:
        from .. import dispatch

        with dispatch.use_backend(backend):
            dispatch.select("norm", device.type)
    except (ImportError, RuntimeError) as e:
        return str(e)
    return None


def _fused_context(backend: str) -> AbstractContextManager:
    from .. import dispatch

    return dispatch.use_backend(backend)


def _fused(op: Op) -> NormCall:
    from .. import functional as FF

    return partial(op.call, FF)


def _liger_unavailable(device: torch.device) -> str | None:
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if device.type == "cpu":
        return "liger-kernel runs on GPUs only, the device is cpu"
    return None


def _liger(op: Op) -> NormCall:
    if op.rms:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as rms_norm

        # "gemma" computes in fp32 and rounds once, as torch does; in_place=True would write dx over dy.
        return lambda x, w, b: rms_norm.apply(x, w, op.eps, 0.0, "gemma", False)
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction as layer_norm

    return lambda x, w, b: layer_norm.apply(x, w, b, op.eps)


#: The one every ratio is taken to.
BASELINE = "torch"

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("torch", _torch),
        Provider("compile", _compile),
        Provider("liger", _liger, _liger_unavailable),
        *(
            Provider(
                "fused" if backend == "auto" else f"fused:{backend}",
                _fused,
                partial(_fused_unavailable, backend),
                partial(_fused_context, backend),
            )
            for backend in ("auto", "triton", "native", "reference")
        ),
    )
}

#: Left out unless asked for: what auto picks is timed under its own name, and the reference is not meant to be fast.
NOT_BY_DEFAULT = ("fused", "fused:reference")
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name not in NOT_BY_DEFAULT)
