"""What is measured, as data: operations, passes, shapes, and the bytes that an ideal kernel moves for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """A norm over the last dimension. ``call`` takes a namespace with ``torch.nn.functional``'s names, then x, w, b."""

    name: str
    rms: bool
    eps: float
    call: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]

    @property
    def params(self) -> int:
        """How many parameters of n elements it has: weight and bias, or weight alone."""
        return 1 if self.rms else 2

    @property
    def stats(self) -> int:
        """How many row statistics forward keeps for backward: rstd and mean, or rstd alone."""
        return 1 if self.rms else 2


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("layer_norm", False, 1e-5, lambda F, x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5)),
        Op("rms_norm", True, 1e-6, lambda F, x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-6)),
    )
}

PASSES = ("forward", "backward", "forward+backward", "forward-nograd")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

#: (rows, columns) by device type. CPU: small models, a GPT-2 XL width, square, wide, narrow, very wide, odd. CUDA: the
#: widths with published figures at 4096 rows (launch-bound to bandwidth-bound), 64M elements from narrow to very wide.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": (
        (768, 384),
        (512, 768),
        (2048, 1600),
        (4096, 1024),
        (4096, 4096),
        (512, 8192),
        (8192, 128),
        (64, 65536),
        (1000, 1001),
    ),
    "cuda": (
        (4096, 1024),
        (4096, 4096),
        (4096, 16384),
        (65536, 1024),
        (16384, 4096),
        (8192, 8192),
        (2048, 32768),
        (1024, 65536),
        (256, 262144),
        (1000, 1001),
    ),
}

#: What ``--quick`` runs.
QUICK_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((512, 768), (4096, 1024)),
    "cuda": ((4096, 1024), (4096, 4096), (4096, 16384)),
}


def bytes_moved(op: Op, pass_name: str, m: int, n: int, dtype: torch.dtype) -> int:
    """Bytes of an ideal pass: each input read once, each output written once. Parameters have x's dtype, statistics
    are fp32 (fp64 for fp64). Partial sums of dw and db are a kernel's own affair and are not counted: a kernel that
    makes more of them shows fewer GB/s.

    forward         x and y, the parameters, the statistics (without grad: no statistics)
    backward        x, dy and dx, the weight, the gradient of each parameter, the statistics
    """
    e = dtype.itemsize
    stats = op.stats * m * max(e, 4)
    forward = 2 * m * n * e + op.params * n * e
    backward = 3 * m * n * e + (1 + op.params) * n * e + stats
    return {
        "forward": forward + stats,
        "backward": backward,
        "forward+backward": forward + stats + backward,
        "forward-nograd": forward,
    }[pass_name]


def copy_bytes(m: int, n: int, dtype: torch.dtype) -> int:
    """Bytes of ``x.clone()``: x read once, its copy written once."""
    return 2 * m * n * dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """One case's tensors: x, w and b are leaves that require grad, dy is a random upstream gradient."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    dy: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.x, self.w, self.b) if t is not None)


def make_inputs(op: Op, m: int, n: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs with a mean and a scale of their own, so that no term of a formula vanishes."""
    g = torch.Generator(device).manual_seed(seed)

    def rand(*shape: int, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).add_(shift).to(dtype)

    x, w = rand(m, n, shift=0.5).requires_grad_(), rand(n, shift=1.0).requires_grad_()
    b = None if op.rms else rand(n).requires_grad_()
    return Inputs(x, w, b, rand(m, n))
