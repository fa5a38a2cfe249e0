"""A classifier's matrix product and the ticks loss of its logits in one, without the logits in memory.

Rows go through in chunks: logits of a chunk by torch's matrix product, the loss by the backend's kernel, its gradient
written over the logits, and the products that make the gradients of hidden states, weight and bias. For a loss that is
one number the gradients are made in forward, three products in all, and scaled by the upstream gradient in backward;
for one loss a row they are made in backward, from logits computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .autograd import legacy_batched
from .autograd_ticks import Ticks, TicksOptions, lse_of, ticks_backward, ticks_forward
from .calls import LOW_PRECISION, PLAIN

#: Memory for a chunk's logits. A chunk reads the weight twice and its gradient once, so it should have a few hundred
#: rows to be bound by arithmetic: 130 rows of 128256 fp32 logits on a CPU, 2000 of bf16 on a GPU.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


@dataclass(frozen=True)
class LinearTicksOptions:
    """The loss, how it is reduced, and how the work is cut. ``chunk_bytes`` None: by the device."""

    ticks: TicksOptions
    reduction: str
    z_loss_weight: float
    chunk_bytes: int | None
    accumulate_fp32: bool


def row_losses(
    loss: Tensor, lse: Tensor | None, options: LinearTicksOptions, scale: Tensor | None, z_scale: Tensor | None
) -> Tensor:
    """Row losses, or their one number: ``scale`` and ``z_scale`` are what the mean divides the two sums by."""
    z_loss = None if lse is None else options.z_loss_weight * lse.square()
    if options.reduction == "none":
        return loss if z_loss is None else loss + z_loss
    total, z_total = loss.sum(), None if z_loss is None else z_loss.sum()
    if options.reduction == "mean":
        total, z_total = total / scale, None if z_loss is None else z_total / z_scale
    return total if z_loss is None else total + z_total


@functools.cache
def _products_in_low_precision(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of bf16 or fp16; where it does not, torch's product is 500 times slower."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return False


def _compute_dtype(x: Tensor) -> torch.dtype:
    if x.is_cpu and x.dtype in LOW_PRECISION and not _products_in_low_precision(x.dtype):
        return torch.float32
    return x.dtype


def _beside(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Class weights or probabilities in a dtype that kernels take beside logits of ``dtype``: that, or fp32."""
    return t if t is None or not t.is_floating_point() or t.dtype in (dtype, torch.float32) else t.to(dtype)


def chunk_rows(rows: int, classes: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows a chunk: as many as fit into ``chunk_bytes`` of logits (one at least), in chunks of about the same size."""
    most = max(1, chunk_bytes // max(1, classes * itemsize))
    chunks = -(-rows // most)
    return -(-rows // chunks)


def _run(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: LinearTicksOptions,
    backend: ModuleType,
    grads: Callable[[slice, Tensor | None], tuple[Tensor, Tensor | None]] | None,
    need: tuple[bool, bool, bool, bool],
    want_loss: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, lse, dx, dw, dbias, dtarget) of rows ``x`` (M, H), by chunks.

    ``grads`` gives, for a chunk's slice and its lse (None without a z-loss), the gradients of its losses and lse's;
    None where no gradient is needed.
    """
    rows, classes = x.shape[0], w.shape[0]
    compute = _compute_dtype(x)
    # A product of low precision in fp32 sums in fp32 whether asked to or not.
    acc = torch.float32 if options.accumulate_fp32 and w.dtype in LOW_PRECISION else compute
    o, z_loss = options.ticks, options.z_loss_weight != 0
    loss_dtype = reference.accumulation_dtype(x)
    make_grads = grads is not None
    need_dx, need_dw, need_db, need_dt = (n and make_grads for n in need)
    soft = target.is_floating_point()
    keep = None if soft else (target != o.ignore_index).unsqueeze(1)

    wc = w.detach().to(compute)
    bc = None if bias is None else bias.detach().to(compute)
    weight = _beside(weight, compute)
    loss = x.new_empty(rows, dtype=loss_dtype) if want_loss else None
    lse = x.new_empty(rows, dtype=loss_dtype) if want_loss and z_loss else None
    dx = x.new_empty(x.shape) if need_dx else None
    dw = w.new_empty(w.shape, dtype=acc) if need_dw else None
    db = w.new_zeros(classes, dtype=acc) if need_db else None
    dt = target.new_empty(target.shape) if need_dt else None
    budget = options.chunk_bytes or CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE)
    step = chunk_rows(rows, classes, compute.itemsize, budget)
    buffer = x.new_empty((step, classes), dtype=compute)

    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        xc, tc = x.detach()[part].to(compute), _beside(target.detach()[part], compute)
        logits = buffer[: part.stop - begin]
        if keep is not None and need_dw:  # a gradient of 0 times a NaN of an ignored row would still be a NaN
            xc = torch.where(keep[part], xc, 0)
        if bc is None:
            torch.mm(xc, wc.t(), out=logits)
        else:
            torch.addmm(bc, xc, wc.t(), out=logits)
        chunk_loss, stats = ticks_forward(logits, tc, weight, o, backend)
        chunk_lse = lse_of(stats) if z_loss else None
        if want_loss:
            loss[part] = chunk_loss
            if z_loss:
                lse[part] = chunk_lse
        if not (need_dx or need_dw or need_db or need_dt):
            continue
        grad, grad_lse = grads(part, chunk_lse)
        dz, dtc = ticks_backward(
            grad, grad_lse, logits, tc, stats, weight, o, need_dx or need_dw or need_db, need_dt, backend, inplace=True
        )
        if need_dt:
            dt[part] = dtc
        if need_dx:
            if compute == x.dtype:
                torch.mm(dz, wc, out=dx[part])
            else:
                dx[part] = torch.mm(dz, wc)
        if need_dw:
            if acc == compute:  # the first product overwrites what was never set
                torch.addmm(dw, dz.t(), xc, beta=0 if begin == 0 else 1, out=dw)
            elif begin == 0:
                dw.copy_(torch.mm(dz.t(), xc))
            else:
                dw += torch.mm(dz.t(), xc)
        if need_db:
            db += dz.sum(0, dtype=acc)
    return loss, lse, dx, None if dw is None else dw.to(w.dtype), None if db is None else db.to(bias.dtype), dt


def _row_grads(
    upstream: Tensor, options: LinearTicksOptions, scale: Tensor, z_scale: Tensor
) -> Callable[[slice, Tensor | None], tuple[Tensor, Tensor | None]]:
    """The derivative of :func:`row_losses`, for a chunk's rows at a time."""
    whole = options.reduction == "none"
    per_loss, per_z = (upstream, upstream) if whole else (upstream / scale, upstream / z_scale)

    def of(part: slice, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        grad = per_loss[part] if whole else per_loss.expand(part.stop - part.start)
        if lse is None:
            return grad, None
        return grad, 2 * options.z_loss_weight * lse * (per_z[part] if whole else per_z)

    return of


# ----------------------------------------------------------------------------------------- the two passes, as operators

_SCHEMA = (
    "Tensor x, Tensor w, Tensor? bias, Tensor target, Tensor? weight, Tensor scale, Tensor z_scale, int ignore_index,"
    " float smoothing, float ce, float ticks, float softcap, str reduction, float z_loss_weight, int? chunk_bytes,"
    " bool accumulate_fp32, bool[] need, str backend"
)
_library = torch.library.Library("fused_norm", "FRAGMENT")
_mode_count = torch._C._len_torch_dispatch_stack


def _forward(x, w, bias, target, weight, scale, z_scale, options, need, backend):
    """(out, dx, dw, dbias, dtarget): what is not in ``need`` is None."""
    one = torch.ones((), dtype=reference.accumulation_dtype(x), device=x.device)
    grads = _row_grads(one, options, scale, z_scale) if any(need) else None
    loss, lse, *results = _run(x, w, bias, target, weight, options, backend, grads, need, True)
    return row_losses(loss, lse, options, scale, z_scale), *results


def _backward(grad, x, w, bias, target, weight, scale, z_scale, options, need, backend):
    """(dx, dw, dbias, dtarget), from logits computed again."""
    grads = _row_grads(grad, options, scale, z_scale)
    return _run(x, w, bias, target, weight, options, backend, grads, need, False)[2:]


def _operator(function: Callable, name: str, inputs: str, outputs: str, fake: Callable) -> Callable:
    """``function`` as it is, and as an operator where torch traces (torch.compile, make_fx, FakeTensor)."""

    def kernel(*args):
        *tensors, ignore_index, smoothing, ce, ticks, softcap, reduction, z_loss, chunk, fp32, need, backend = args
        options = LinearTicksOptions(
            TicksOptions(ignore_index, smoothing, ce, ticks, softcap), reduction, z_loss, chunk, fp32
        )
        results = function(*tensors, options, tuple(need), dispatch.load(backend))
        return tuple(tensors[0].new_empty(0) if r is None else r for r in results)

    _library.define(f"{name}({inputs}) -> ({outputs})")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_norm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fused_norm, name).default

    @functools.wraps(function)
    def call(*args):
        if not _mode_count() and all(a is None or type(a) in PLAIN or not isinstance(a, Tensor) for a in args):
            return function(*args)
        *tensors, options, need, backend = args
        o = options
        results = operator(
            *(*tensors, *o.ticks.values, o.reduction, o.z_loss_weight, o.chunk_bytes, o.accumulate_fp32, list(need)),
            backend.__name__.rpartition(".")[2],
        )
        before = len(results) - len(need)
        return *results[:before], *(r if n else None for r, n in zip(results[before:], need, strict=True))

    return call


def _fake_grads(x, w, bias, target, need):
    like = (x, w, bias, target)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else x.new_empty(0)
        for t, n in zip(like, need, strict=True)
    )


def _forward_fake(x, w, bias, target, weight, scale, z_scale, *options):
    need, reduction = options[-2], options[5]
    out = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=reference.accumulation_dtype(x))
    return out, *_fake_grads(x, w, bias, target, need)


def _backward_fake(grad, x, w, bias, target, weight, scale, z_scale, *options):
    return _fake_grads(x, w, bias, target, options[-2])


_GRADS = "Tensor dx, Tensor dw, Tensor dbias, Tensor dtarget"
_forward = _operator(_forward, "linear_ticks_forward", _SCHEMA, f"Tensor out, {_GRADS}", _forward_fake)
_backward = _operator(_backward, "linear_ticks_backward", f"Tensor grad, {_SCHEMA}", _GRADS, _backward_fake)


# ------------------------------------------------------------------------------------------------------- under autograd


def materialized(x, w, bias, target, weight, scale, z_scale, options, backend) -> Tensor:
    """The same loss by way of the logits: every transform and derivative, and their memory."""
    compute = _compute_dtype(x)
    if not target.is_floating_point():  # an ignored row's NaN would reach dw
        x = torch.where((target != options.ticks.ignore_index).unsqueeze(1), x, 0)
    logits = F.linear(x.to(compute), w.to(compute), None if bias is None else bias.to(compute))
    target, weight = _beside(target, compute), _beside(weight, compute)
    need_lse = options.z_loss_weight != 0
    if backend is None:  # by formulas alone
        loss, stats = reference.ticks_forward(logits, target, weight, *options.ticks.values)
        lse = lse_of(stats) if need_lse else None
    else:
        loss, lse, _ = Ticks.call(logits, target, weight, options.ticks, need_lse, False, backend)
    return row_losses(loss, lse, options, scale, z_scale)


def linear_ticks(x, w, bias, target, weight, scale, z_scale, options, backend) -> Tensor:
    """The loss of hidden states ``x`` (M, H) and classifier ``w`` (V, H): a number, or (M,) for ``"none"``."""
    args = (x, w, bias, target, weight, scale, z_scale, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias, target)):
        return LinearTicks.apply(*args, backend)
    return _forward(*args, (False,) * 4, backend)[0]


class LinearTicks(torch.autograd.Function):
    """:func:`linear_ticks` with gradients for hidden states, weight, bias and soft targets."""

    @staticmethod
    def forward(ctx, x, w, bias, target, weight, scale, z_scale, options, backend):
        ctx.options, ctx.backend = options, backend
        ctx.save_for_backward(x, w, bias, target, weight, scale, z_scale)
        # Made here, gradients have not met the upstream gradient yet: in fp16 they could vanish before a loss scaler's
        # factor reaches them.
        now = options.reduction != "none" and x.dtype != torch.float16
        need = tuple(ctx.needs_input_grad[:4])
        out, *grads = _forward(
            x, w, bias, target, weight, scale, z_scale, options, need if now else (False,) * 4, backend
        )
        ctx.grads = grads if now else None
        return out

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        need = tuple(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled() or legacy_batched(grad):
            ctx.grads = None
            with torch.enable_grad():
                out = materialized(*saved, ctx.options, ctx.backend)
            inputs = [t for t, n in zip(saved, need, strict=False) if n]
            grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=torch.is_grad_enabled()))
            return *(next(grads) if n else None for n in need), *(None,) * 5
        # The gradients that forward made are given away, scaled where they lie; another backward through the same graph
        # computes them anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _backward(grad, *saved, ctx.options, need, ctx.backend)
        elif _mode_count() or type(grad) not in PLAIN:
            grads = [None if g is None else g * grad for g in grads]
        elif not (grad.is_cpu and grad.item() == 1):  # on other devices, to look would be to wait
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return *grads, *(None,) * 5
