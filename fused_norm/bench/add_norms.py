"""Dropout, residual connection and norm as operations of the harness, against the operations one by one."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..testing import norm_truth
from .norms import EPS, FLASH_ATTN, FLASH_ATTN_LIMIT, LIGER_LIMIT, layer_norm, rms_norm
from .operation import Call, Inputs, Op, Provider, random_tensors, row_blocks
from .providers import compiled, package, takes, with_providers
from .shapes import ADD_NORM_SWEEPS, NORM_QUICK_SHAPES, NORM_SHAPES, Shape

DROPOUT_P = 0.1

#: Every call of an operation with dropout starts its generator here: its mask is then the same in each, and can be
#: looked at.
SEED = 1


def bytes_moved(rms: bool, p: float, both: bool, pass_name: str, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of an ideal pass, counted as for the norms; a mask is drawn again in backward and never in memory.

    forward     x and the residual read, the sum and y written, the parameters, the statistics
    backward    dy and the sum read, and the sum's own gradient where it is used (``both``); the residual's gradient
                written, and x's where dropout makes it another; the weight, the gradient of each parameter, statistics
    """
    (m, n), e = shape, dtype.itemsize
    params = 1 if rms else 2
    stats = (1 if rms else 2) * m * max(e, 4)
    forward = 4 * m * n * e + params * n * e
    backward = (3 + both + (p > 0)) * m * n * e + (1 + params) * n * e + stats
    return {
        "forward": forward + stats,
        "backward": backward,
        "forward+backward": forward + stats + backward,
        "forward-nograd": forward,
    }[pass_name]


def make_inputs(rms: bool, both: bool, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    (m, n), rand = shape, random_tensors(dtype, device, seed)
    x, r = (rand(m, n, shift=0.5).requires_grad_() for _ in range(2))
    w = rand(n, shift=1.0).requires_grad_()
    b = None if rms else rand(n).requires_grad_()
    upstream = rand(m, n), rand(m, n) if both else None
    leaves = ("x", "r", "w") if rms else ("x", "r", "w", "b")
    return Inputs({"x": x, "r": r, "w": w, "b": b}, leaves, upstream, upstream)


def seeded(p: float, call: Call) -> Call:
    """``call`` with the generator at its start, where it draws from it. Not a part of what torch.compile gets."""

    def seeded_call(*args: Tensor | None) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        return call(*args)

    return seeded_call if p else call


def parts(norm: Call, p: float, x: Tensor, r: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """What one writes in torch."""
    summed = (F.dropout(x, p) if p else x) + r
    return norm(F, summed, w, b), summed


def fused(rms: bool, p: float, x: Tensor, r: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    if rms:
        return FF.add_rms_norm(x, r, x.shape[-1:], w, EPS[True], dropout_p=p)
    return FF.add_layer_norm(x, r, x.shape[-1:], w, b, EPS[False], dropout_p=p)


@torch.no_grad()
def truth(rms: bool, p: float, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """With the mask of this call, which is its sum of ones and zeros."""
    x, r, w, b = inputs.args
    mask = call(torch.ones_like(x), torch.zeros_like(x), w, b)[1].double() if p else None
    if mask is not None and not 0.8 * p < (mask == 0).double().mean() < 1.2 * p:
        raise ValueError(f"drops {(mask == 0).double().mean():.3g} of the elements, dropout_p is {p}")
    found = {name: torch.empty_like(x, dtype=torch.float64) for name in ("y", "summed", "dx", "dr")}
    dw = db = 0.0
    dy, ds = inputs.upstream
    for rows in row_blocks(*x.shape, x.device):
        summed = x[rows].double() * (1.0 if mask is None else mask[rows]) + r[rows].double()
        found["summed"][rows] = summed
        block = norm_truth(summed, w, b, dy[rows], x.shape[1], EPS[rms], rms)
        d = block.dx if ds is None else block.dx + ds[rows].double()
        found["y"][rows], found["dr"][rows] = block.y, d
        found["dx"][rows] = d if mask is None else d * mask[rows]
        dw, db = dw + block.dw, db + block.db
    return {**found, "dw": dw, "db": db}


def _liger() -> Call:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    # "gemma" computes in fp32 and rounds once; in_place=True would write dx over dy.
    return lambda x, r, w, b: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS[True], 0.0, "gemma", False)


def _quack() -> Call:
    from quack.rmsnorm import rmsnorm

    return lambda x, r, w, b: rmsnorm(x, w, residual=r, eps=EPS[True], prenorm=True)


def _flash_attn(rms: bool, p: float, both: bool) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    norm = rms_norm_fn if rms else layer_norm_fn

    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if p:
            torch.manual_seed(SEED)
        # Asked for the sum, its backward reads a gradient of it, also one of zeros: a post-norm block does not ask.
        # What requires no gradient is the sum of ones and zeros, by which the harness sees the mask.
        prenorm = both or not x.requires_grad
        out = norm(x, w, b, residual=r, eps=EPS[rms], dropout_p=p, prenorm=prenorm)
        return out if prenorm else (out, None)

    return call


def _peers(rms: bool, p: float, both: bool) -> tuple[Provider, ...]:
    flash_attn = Provider("flash-attn", partial(_flash_attn, rms, p, both), FLASH_ATTN, FLASH_ATTN_LIMIT)
    if p or not rms:
        return (flash_attn,)
    liger = package("liger-kernel", "liger_kernel.ops:LigerFusedAddRMSNormFunction")
    quack = package("quack-kernels", "quack.rmsnorm:rmsnorm")
    return (Provider("liger", _liger, liger, LIGER_LIMIT), Provider("quack", _quack, quack, takes()), flash_attn)


def _op(rms: bool, p: float, both: bool) -> Op:
    name = f"{'dropout_' if p else ''}add_{'rms' if rms else 'layer'}_norm"
    used = "both outputs used (pre-norm)" if both else "the norm alone used (post-norm)"
    torch_parts = partial(parts, rms_norm if rms else layer_norm, p)
    op = Op(
        name=name,
        group="add-norms",
        dims=("m", "n"),
        baseline=seeded(p, torch_parts),
        compiled=lambda: seeded(p, compiled(torch_parts)),
        fused=seeded(p, partial(fused, rms, p)),
        inputs=partial(make_inputs, rms, both),
        truths={"": lambda inputs: {}},
        truth_of_call=partial(truth, rms, p),
        outputs=("y", "summed"),
        bytes_moved=partial(bytes_moved, rms, p, both),
        shapes=NORM_SHAPES,
        quick_shapes=NORM_QUICK_SHAPES,
        sweeps=ADD_NORM_SWEEPS,
        note=f"{f'dropout {p}, ' if p else ''}residual connection and norm, {used}; torch is the operations one by one",
    )
    return with_providers(op, "norm", _peers(rms, p, both))


#: Llama's and GPT-2's blocks, BERT's, T5's.
ADD_NORMS = (
    _op(rms=False, p=0.0, both=True),
    _op(rms=True, p=0.0, both=True),
    _op(rms=False, p=DROPOUT_P, both=False),
    _op(rms=True, p=DROPOUT_P, both=True),
)
