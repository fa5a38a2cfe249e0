"""LayerNorm and RMSNorm as operations of the harness."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..testing import norm_truth
from .operation import Call, Inputs, Op, Provider, random_tensors, row_blocks
from .providers import liger_unavailable, with_providers
from .shapes import NORM_QUICK_SHAPES, NORM_SHAPES, NORM_SWEEPS, Shape

EPS = {False: 1e-5, True: 1e-6}


def bytes_moved(rms: bool, pass_name: str, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of an ideal pass: each input read once, each output written once. Parameters have x's dtype, statistics
    are fp32 (fp64 for fp64). Partial sums of dw and db are a kernel's own affair and are not counted: a kernel that
    makes more of them shows fewer GB/s.

    forward         x and y, the parameters, the statistics (without grad: no statistics)
    backward        x, dy and dx, the weight, the gradient of each parameter, the statistics
    """
    (m, n), e = shape, dtype.itemsize
    params = 1 if rms else 2  # weight and bias, or weight alone
    stats = (1 if rms else 2) * m * max(e, 4)  # rstd and mean, or rstd alone
    forward = 2 * m * n * e + params * n * e
    backward = 3 * m * n * e + (1 + params) * n * e + stats
    return {
        "forward": forward + stats,
        "backward": backward,
        "forward+backward": forward + stats + backward,
        "forward-nograd": forward,
    }[pass_name]


def make_inputs(rms: bool, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs with a mean and a scale of their own, so that no term of a formula vanishes."""
    (m, n), rand = shape, random_tensors(dtype, device, seed)
    x, w = rand(m, n, shift=0.5).requires_grad_(), rand(n, shift=1.0).requires_grad_()
    b = None if rms else rand(n).requires_grad_()
    dy = rand(m, n)
    return Inputs({"x": x, "w": w, "b": b}, ("x", "w") if rms else ("x", "w", "b"), dy, dy)


def truth(rms: bool, inputs: Inputs) -> dict[str, Tensor]:
    x, w, b = inputs.args
    y, dx = torch.empty_like(x, dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)
    dw = db = 0.0
    for rows in row_blocks(*x.shape, x.device):
        block = norm_truth(x[rows], w, b, inputs.upstream[rows], x.shape[1], EPS[rms], rms)
        y[rows], dx[rows] = block.y, block.dx
        dw, db = dw + block.dw, db + block.db
    return {"y": y.detach(), "dx": dx.detach(), "dw": dw, "db": db}


def layer_norm(namespace: object, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return namespace.layer_norm(x, x.shape[-1:], w, b, EPS[False])


def rms_norm(namespace: object, x: Tensor, w: Tensor, b: None = None) -> Tensor:
    return namespace.rms_norm(x, x.shape[-1:], w, EPS[True])


def _liger(rms: bool) -> Call:
    if rms:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # "gemma" computes in fp32 and rounds once, as torch does; in_place=True would write dx over dy.
        return lambda x, w, b: LigerRMSNormFunction.apply(x, w, EPS[True], 0.0, "gemma", False)
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS[False])


def _op(name: str, rms: bool, call: Call) -> Op:
    op = Op(
        name=name,
        group="norms",
        dims=("m", "n"),
        baseline=partial(call, F),
        fused=partial(call, FF),
        inputs=partial(make_inputs, rms),
        truths={"": partial(truth, rms)},
        bytes_moved=partial(bytes_moved, rms),
        shapes=NORM_SHAPES,
        quick_shapes=NORM_QUICK_SHAPES,
        sweeps=NORM_SWEEPS,
    )
    return with_providers(op, "norm", (Provider("liger", partial(_liger, rms), liger_unavailable),))


LAYER_NORM = _op("layer_norm", False, layer_norm)
RMS_NORM = _op("rms_norm", True, rms_norm)
