"""LayerNorm and RMSNorm as operations of the harness."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..testing import norm_truth
from .operation import Call, Inputs, Op, Provider, random_tensors, row_blocks
from .providers import package, takes, with_providers
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
        from liger_kernel.ops import LigerRMSNormFunction

        # "gemma" computes in fp32 and rounds once, as torch does; in_place=True would write dx over dy.
        return lambda x, w, b: LigerRMSNormFunction.apply(x, w, EPS[True], 0.0, "gemma", False)
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS[False])


def _quack_rms_norm() -> Call:
    from quack.rmsnorm import rmsnorm

    return lambda x, w, b: rmsnorm(x, w, eps=EPS[True])


def _quack_layer_norm() -> Call:
    """QuACK has the two kernels, and no function of autograd's around them. Its forward takes fp32 parameters: they are
    converted once, as a model that used it would hold them."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

    in_fp32 = lru_cache(maxsize=2)(lambda parameter: parameter.detach().float())  # a tensor's hash is its identity

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, b):
            y, rstd, mean = layernorm_fwd(x, in_fp32(w), in_fp32(b), EPS[False], return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, w, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, w, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, w, dy, rstd, mean)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return LayerNorm.apply(x, w, b)
        return layernorm_fwd(x, in_fp32(w), in_fp32(b), EPS[False])

    return call


def _flash_attn(rms: bool) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    norm = rms_norm_fn if rms else layer_norm_fn
    return lambda x, w, b: norm(x, w, b, eps=EPS[rms])


def _apex(rms: bool) -> Call:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    if rms:
        return lambda x, w, b: fused_rms_norm_affine(x, w, x.shape[-1:], EPS[True])
    return lambda x, w, b: fused_layer_norm_affine(x, w, b, x.shape[-1:], EPS[False])


def _transformer_engine(rms: bool) -> Call:
    from transformer_engine.pytorch import LayerNorm, RMSNorm

    @lru_cache(maxsize=1)
    def module(w: Tensor, b: Tensor | None) -> torch.nn.Module:
        made = (RMSNorm if rms else LayerNorm)(w.shape[0], eps=EPS[rms], device=w.device, dtype=w.dtype)
        # The case's own tensors in its parameters' place, so that gradients are theirs: assigning wants a Parameter.
        made._parameters.update({"weight": w} if rms else {"weight": w, "bias": b})
        return made

    return lambda x, w, b: module(w, b)(x)


FLASH_ATTN = package(
    "flash-attn", "flash_attn.ops.triton.layer_norm:layer_norm_fn", "flash_attn.ops.triton.layer_norm:rms_norm_fn"
)
#: It holds a row in registers, of up to 64 KB.
FLASH_ATTN_LIMIT = takes(row_bytes=65536)
#: Of its norms of one block a row.
LIGER_LIMIT = takes(columns=65536)


def _peers(rms: bool) -> tuple[Provider, ...]:
    title = "RMSNorm" if rms else "LayerNorm"
    if rms:
        quack = Provider("quack", _quack_rms_norm, package("quack-kernels", "quack.rmsnorm:rmsnorm"), takes())
    else:
        needs = ("quack.rmsnorm:layernorm_fwd", "quack.rmsnorm:layernorm_bwd")
        quack = Provider("quack", _quack_layer_norm, package("quack-kernels", *needs), takes())
    apex = f"apex.normalization.fused_layer_norm:fused_{'rms' if rms else 'layer'}_norm_affine"
    return (
        Provider(
            "liger",
            partial(_liger, rms),
            package("liger-kernel", f"liger_kernel.ops:Liger{title}Function"),
            LIGER_LIMIT,
        ),
        quack,
        Provider("flash-attn", partial(_flash_attn, rms), FLASH_ATTN, FLASH_ATTN_LIMIT),
        Provider(
            "apex",
            partial(_apex, rms),
            package("apex", apex, "fused_layer_norm_cuda"),
            takes("fp32", "bf16", "fp16", "fp64"),
        ),
        Provider(
            "transformer-engine",
            partial(_transformer_engine, rms),
            package("transformer-engine", f"transformer_engine.pytorch:{title}"),
            takes(),
            one_backward="frees what it saved in backward, so that one graph has one backward",
        ),
    )


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
    return with_providers(op, "norm", _peers(rms))


LAYER_NORM = _op("layer_norm", False, layer_norm)
RMS_NORM = _op("rms_norm", True, rms_norm)
