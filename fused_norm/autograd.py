"""The ``torch.autograd.Function`` wrappers: what torch's autograd sees of the kernels.

Three functions, each the derivative of the one before: :class:`Norm`, :class:`NormBackward`,
:class:`NormDoubleBackward`. Each runs one kernel of the backend, and each has a rule for reverse mode, forward mode
(``jvp``) and ``vmap``; so double backward, forward over reverse, reverse over forward, Hessians and per-sample
gradients run on kernels too. Forward over forward and derivatives beyond the second take the reference's explicit
formulas. The mathematics is in docs/math.md.

``vmap`` folds its batch into the rows: a tensor of rows gains a leading dimension, and parameters that differ from one
example to the next become groups (:mod:`fused_norm.backends`). How many groups there are is read from sizes: a
parameter has ``n`` elements for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from . import reference

_reshape_fresh = torch.ops.aten._unsafe_view.default
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def transforms_active() -> bool:
    """Whether a torch.func transform, vmap or forward-mode AD is under way, which kernels cannot see."""
    return _functorch_active() or fwAD._current_level >= 0


def resolve(t: Tensor) -> Tensor:
    """``t`` with its values in memory, where ``z.conj().imag`` lacks its sign and a ZeroTensor everything."""
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


def as_rows(t: Tensor, n: int) -> Tensor:
    """``t`` as the kernels take it: contiguous, or 2-D rows of ``n`` at unit stride. Copies only if no view will do."""
    if t.is_neg() or t._is_zerotensor():
        t = resolve(t)
    if t.is_contiguous():
        return t
    try:
        rows = t.view(-1, n)
    except (RuntimeError, ValueError):  # ValueError where sizes are symbols
        return t.contiguous()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dense(p: Tensor | None) -> Tensor | None:
    """A parameter or statistics as the kernels take them: contiguous, with no minus sign pending."""
    if p is None or (p.is_contiguous() and not p.is_neg() and not p._is_zerotensor()):
        return p
    return resolve(p).contiguous()


def _groups(p: Tensor | None, n: int) -> int:
    return 1 if p is None else p.numel() // n


def _spread(p: Tensor | None, n: int, groups: int) -> Tensor | None:
    """A parameter of fewer groups than there are, each of which holds for several in a row; one for all stays."""
    if p is None or p.numel() in (n, groups * n):
        return p
    return p.reshape(-1, 1, n).expand(-1, groups * n // p.numel(), n).reshape(groups, n)


def shaped_like(result: Tensor, x: Tensor) -> Tensor:
    # Not a view of the kernel's output in autograd's eyes: users may write over it.
    return result if result.shape == x.shape else _reshape_fresh(result, x.shape)


class Function(torch.autograd.Function):
    """A Function with rules for every transform."""

    @classmethod
    def call(cls, *args):
        """``apply`` without what it spends on binding the arguments to forward's signature, outside torch.func."""
        if _functorch_active() or _is_compiling():  # Dynamo, which may come upon a rule, knows `apply` alone
            return cls.apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


def jvp_rule(rule: Callable) -> staticmethod:
    """A jvp of (ctx, the saved tensors, tangents) that an enclosing torch.func.jvp can differentiate once more.

    torch turns forward mode off while a rule runs, for the enclosing levels too, which would see zero tangents without
    a word. So it is turned on again, and this level's own tangents are taken off the saved tensors.
    """

    @functools.wraps(rule)
    def jvp(ctx, *tangents):
        if not _functorch_active():
            return rule(ctx, ctx.saved_tensors, *tangents)
        saved = [None if t is None else fwAD.unpack_dual(t).primal for t in ctx.saved_tensors]
        with fwAD._set_fwd_grad_enabled(True):
            return rule(ctx, saved, *tangents)

    return staticmethod(jvp)


def jvp_of(
    vjp: Callable, inputs: Sequence[Tensor], outputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The outputs' tangents, from the vjp: forward mode does not nest here, but u -> J^T u is linear, and its vjp J."""
    given = [torch.zeros_like(p) if t is None else t for p, t in zip(inputs, tangents, strict=True)]
    _, transposed = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))
    (result,) = transposed(tuple(given))
    return result


# -------------------------------------------------------------------------------------------------- running the kernels


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    eps: float,
    rms: bool,
    cast: bool,
    backend: ModuleType,
    need_stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the backend's forward on ``x`` of any layout; the output is contiguous with x's shape."""
    groups = 1
    if (weight is not None and weight.numel() != n) or (bias is not None and bias.numel() != n):
        groups = max(_groups(weight, n), _groups(bias, n))
        weight, bias = _spread(weight, n, groups), _spread(bias, n, groups)
    options = (True,) if cast else ()  # a call without them is the one that native's direct path knows
    y, stats = backend.norm_forward(as_rows(x, n), weight, bias, n, groups, eps, rms, need_stats, *options)
    return shaped_like(y, x), stats


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_dx: bool,
    dw_groups: int,
    db_groups: int,
    backend: ModuleType,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backend's backward. ``dw_groups`` and ``db_groups`` are the numbers of rows of dw and db, 0 for none."""
    groups = 1
    if dw_groups > 1 or db_groups > 1 or (weight is not None and weight.numel() != n):
        groups = max(_groups(weight, n), dw_groups, db_groups)
        weight = _spread(weight, n, groups)
    rows, dy, stats, weight = as_rows(x, n), as_rows(dy, n), dense(stats), dense(weight)
    dx, dw, db = backend.norm_backward(
        dy, rows, stats, weight, n, groups, rms, param_dtype, need_dx, dw_groups == groups, db_groups == groups
    )
    # A parameter of fewer groups than another needs its own sum over the rows.
    if 0 < dw_groups < groups:
        _, dw, _ = backend.norm_backward(dy, rows, stats, None, n, dw_groups, rms, param_dtype, False, True, False)
    if 0 < db_groups < groups:
        _, _, db = backend.norm_backward(dy, rows, stats, None, n, db_groups, rms, param_dtype, False, False, True)
    return shaped_like(dx, x) if need_dx else None, dw if dw_groups else None, db if db_groups else None


def _norm_double_backward(
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    n: int,
    rms: bool,
    param_dtype: torch.dtype,
    need_ddy: bool,
    need_dx: bool,
    dw_groups: int,
    backend: ModuleType,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backend's double backward. ``dw_groups`` is the number of rows of grad_w, 0 for none."""
    groups = max(*(_groups(p, n) for p in (weight, ddw, ddb)), dw_groups)
    rows, weight, ddw, ddb = as_rows(x, n), *(_spread(dense(p), n, groups) for p in (weight, ddw, ddb))
    ddx, dy = (None if t is None else as_rows(t, n) for t in (ddx, dy))
    stats = dense(stats)
    grad_dy, grad_x, grad_w = backend.norm_double_backward(
        *(ddx, ddw, ddb, dy, rows, stats, weight, n, groups, rms, param_dtype),
        *(need_ddy, need_dx, dw_groups == groups),
    )
    if 0 < dw_groups < groups:
        _, _, grad_w = backend.norm_double_backward(
            *(ddx, None, None, dy, rows, stats, None, n, dw_groups, rms, param_dtype, False, False, True)
        )
    return (
        shaped_like(grad_dy, x) if need_ddy else None,
        shaped_like(grad_x, x) if need_dx else None,
        grad_w if dw_groups else None,
    )


def legacy_batched(*tensors: Tensor | None) -> bool:
    """Whether one is a tensor of ``is_grads_batched=True``: an older vmap, which asks a Function for no rule.

    A Function would lose its graph there: the formulas must stand in its place.
    """
    return any(t is not None and _is_legacy_batched(t) for t in tensors)


def _backward(dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend):
    """Backward's results, differentiable where someone may differentiate them."""
    if legacy_batched(dy):
        _, stats = reference.norm_forward(x, None, None, n, 1, eps, rms, True)
        backend = reference
    elif torch.is_grad_enabled() or transforms_active():
        return NormBackward.call(dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend)
    return _norm_backward(dy, x, stats, weight, n, rms, param_dtype, need_dx, dw_groups, db_groups, backend)


def shaped_as(d: Tensor, shape: torch.Size) -> Tensor:
    """A parameter's gradient, (groups, n), in the parameter's shape."""
    # One-dimensional parameters are of one group; a view of a new shape costs more than twice as much.
    return d.squeeze(0) if len(shape) == 1 else d.view(shape)


def gradients(dy, x, stats, weight, bias_like, n, eps, rms, needs, backend):
    """The gradients of x, weight and bias, in their shapes; ``bias_like`` is None or the bias's (dtype, shape)."""
    need_dx, need_dw, need_db = needs[:3]
    param_dtype = weight.dtype if weight is not None else bias_like[0] if bias_like else x.dtype
    dw_groups = weight.numel() // n if need_dw else 0
    db_groups = bias_like[1].numel() // n if need_db else 0
    dx, dw, db = _backward(dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend)
    dw, db = shaped_as(dw, weight.shape) if need_dw else None, shaped_as(db, bias_like[1]) if need_db else None
    return dx, dw, db


def _double_backward(
    ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, param_dtype, need_ddy, need_dx, dw_groups, backend
):
    """Double backward's results, likewise."""
    if legacy_batched(ddx, ddw, ddb, dy):
        _, stats = reference.norm_forward(x, None, None, n, 1, eps, rms, True)
        backend = reference
    elif torch.is_grad_enabled() or transforms_active():
        return NormDoubleBackward.call(
            ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, param_dtype, need_ddy, need_dx, dw_groups, backend
        )
    return _norm_double_backward(
        ddx, ddw, ddb, dy, x, stats, weight, n, rms, param_dtype, need_ddy, need_dx, dw_groups, backend
    )


# ---------------------------------------------------------------------------------------------------------- vmap's fold


def fold_rows(t: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """A tensor of rows with vmap's batch in front."""
    if t is None:
        return None
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)


def fold_stats(stats: Tensor, dim: int | None, batch: int) -> Tensor:
    """(k, M) statistics of each example as (k, batch * M)."""
    stats = stats.unsqueeze(1).expand(-1, batch, -1) if dim is None else stats.movedim(dim, 1)
    return stats.reshape(stats.shape[0], batch * stats.shape[2]).contiguous()  # of one row, reshape is a view


def unfold_stats(stats: Tensor, batch: int) -> Tensor:
    return stats.view(stats.shape[0], batch, stats.shape[1] // batch)


def _fold_param(p: Tensor | None, dim: int | None, batch: int, n: int) -> Tensor | None:
    """A parameter with the batch as groups. One that all rows share stays as it is."""
    if p is None or (dim is None and p.numel() == n):
        return p
    return fold_rows(p, dim, batch).contiguous()


def _unfold_param(p: Tensor | None, batch: int) -> Tensor | None:
    return None if p is None else p.view(batch, p.shape[0] // batch, p.shape[1])


def _nothing(x: Tensor, n: int, *groups: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """What vmap over a batch of 0 gives of parameters' gradients that have so many ``groups``; 0 is none needed."""
    return tuple(x.new_empty((0, g, n), dtype=dtype) if g else None for g in groups)


def out_dims(results: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if r is None else 0 for r in results)


# -------------------------------------------------------------------------------------------------------- the functions


class Norm(Function):
    """layer_norm (``rms=False``) or rms_norm over rows of ``n`` elements: (y, stats).

    ``weight`` and ``bias`` are None or contiguous with n elements, or n for each group of rows.
    """

    @staticmethod
    def forward(x, weight, bias, n, eps, rms, cast, backend):
        return norm_forward(x, weight, bias, n, eps, rms, cast, backend, need_stats=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.n, ctx.eps, ctx.rms, _, ctx.backend = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, stats)
        if transforms_active():
            ctx.save_for_forward(x, weight, stats)
        ctx.bias_like = None if bias is None else (bias.dtype, bias.shape)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 8
        x, weight, stats = ctx.saved_tensors
        dx, dw, db = gradients(
            dy, x, stats, weight, ctx.bias_like, ctx.n, ctx.eps, ctx.rms, ctx.needs_input_grad, ctx.backend
        )
        return dx, dw, db, *(None,) * 5

    @jvp_rule
    def jvp(ctx, saved, dx, dw, db, *_):
        x, weight, stats = saved
        param = next((p for p in (weight, dw, db) if p is not None), x)
        dy, _, _ = _double_backward(
            *(dx, dw, db, None, x, stats, weight, ctx.n, ctx.eps, ctx.rms, param.dtype, True, False, 0, ctx.backend)
        )
        return dy, None

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, n, eps, rms, cast, backend):
        batch = info.batch_size
        x = fold_rows(x, in_dims[0], batch)
        if batch == 0:  # nothing to compute, but still connected to the graph
            y = sum((p.sum() * 0 for p in (weight, bias) if p is not None), x.clone())
            rows = math.prod(x.shape[1:]) // n
            return (y, x.new_empty((1 if rms else 2, 0, rows), dtype=reference.accumulation_dtype(x))), (0, 1)
        weight, bias = (_fold_param(p, d, batch, n) for p, d in zip((weight, bias), in_dims[1:3], strict=True))
        y, stats = Norm.call(x, weight, bias, n, eps, rms, cast, backend)
        return (y, unfold_stats(stats, batch)), (0, 1)


class NormKeepingOutput(Function):
    """:class:`Norm`, which keeps y for backward instead of x: (y, rstd, apart), in eager mode outside torch.func.

    Backward recovers centred = x - mean as (y - bias)/weight/rstd, and runs on it with a mean of 0: the norm's
    derivatives know x by its distance from the mean alone. Rounding y once gives xhat an error of at most
    u*(|xhat| + |bias/weight|), with u the unit roundoff: where |bias| <= |weight| that is about what
    rounding xhat would. In the columns ``apart`` it is more, or weight is 0; there ``centred`` itself is kept.

    rstd and the kept columns are outputs with derivatives, so that what backward recovers, a function of outputs, has
    x's derivatives to any order.
    """

    @staticmethod
    def columns_apart(weight: Tensor | None, bias: Tensor | None, n: int, x: Tensor) -> Tensor | None:
        """The columns that cannot be recovered; None if it is better to keep x: they are many, or none may ask."""
        if weight is None and bias is None:
            return torch.empty(0, dtype=torch.int64, device=x.device)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        with torch.no_grad():
            size = torch.ones(n, device=x.device) if weight is None else weight.detach().reshape(n).abs()
            # A weight far below the others would be divided by twice in second derivatives; a tiny one has a rounded y.
            least = (size.max() / 1024).clamp(min=torch.finfo(x.dtype).tiny).expand(n)
            if bias is not None:
                least = torch.maximum(least, bias.detach().reshape(n).abs())
            columns = torch.logical_not(size >= least).nonzero().view(-1)  # NaN is among them
        return columns if columns.numel() <= n // 2 else None

    @staticmethod
    def forward(x, weight, bias, apart, n, eps, rms, cast, backend):
        y, stats = norm_forward(x, weight, bias, n, eps, rms, cast, backend, need_stats=True)
        kept = x.reshape(-1, n).index_select(1, apart)
        if not rms and apart.numel():
            kept = (kept - stats[1][:, None]).to(x.dtype)
        return y, stats[0].clone() if len(stats) > 1 else stats[0], kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, bias, apart, ctx.n, ctx.eps, ctx.rms, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, weight, bias, apart)
        ctx.bias_like = None if bias is None else (bias.dtype, bias.shape)

    @staticmethod
    def backward(ctx, dy, drstd, dkept):
        y, rstd, kept, weight, bias, apart = ctx.saved_tensors
        n, rms = ctx.n, ctx.rms
        if dy is None and drstd is None and dkept is None:
            return (None,) * 9
        centred = y.reshape(-1, n).to(rstd.dtype)
        # In place saves a tensor of memory.
        divide = torch.div if bias is None or torch.is_grad_enabled() else Tensor.div_
        if bias is not None:
            centred = centred - bias.reshape(n)
        if weight is not None:
            centred = divide(centred, weight.reshape(n).index_fill(0, apart, 1.0))  # it may be 0 there
        centred = divide(centred, rstd[:, None]).to(y.dtype)
        if apart.numel():
            centred = centred.index_copy(1, apart, kept)
        dx = dw = db = None
        if dy is not None:
            detached = rstd.detach()
            stats = detached[None] if rms else torch.stack([detached, torch.zeros_like(detached)])
            dx, dw, db = gradients(
                *(dy.reshape(-1, n), centred, stats, weight, ctx.bias_like, n, ctx.eps, rms),
                *(ctx.needs_input_grad, ctx.backend),
            )
        if ctx.needs_input_grad[0]:
            more = []
            if drstd is not None:
                more.append(centred * ((-1 / n) * drstd * rstd**3)[:, None].to(y.dtype))
            if dkept is not None:
                spread = torch.zeros_like(centred).index_add(1, apart, dkept)
                more.append(spread if rms else spread - spread.mean(1, keepdim=True))
            dx = sum(more, 0 if dx is None else dx).view(y.shape)
        return dx, dw, db, *(None,) * 6


class NormBackward(Function):
    """(dx, dw, db) of :class:`Norm`; dw and db are (groups, n), and what is not needed is None.

    It is differentiable in dy, x and weight; ``stats`` follows from x and is taken care of in x's derivative.
    """

    @staticmethod
    def forward(dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend):
        return _norm_backward(dy, x, stats, weight, n, rms, param_dtype, need_dx, dw_groups, db_groups, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, stats, weight, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, stats, weight)
        if transforms_active():
            ctx.save_for_forward(dy, x, stats, weight)

    @staticmethod
    def backward(ctx, ddx, ddw, ddb):
        dy, x, stats, weight = ctx.saved_tensors
        n, eps, rms, param_dtype, _, _, _, backend = ctx.options
        need_ddy, need_dx, _, need_dw = ctx.needs_input_grad[:4]
        if ddx is None and ddw is None and ddb is None:
            return (None,) * 12
        dw_groups = weight.numel() // n if need_dw else 0
        grad_dy, grad_x, grad_w = _double_backward(
            ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, param_dtype, need_ddy, need_dx, dw_groups, backend
        )
        return grad_dy, grad_x, None, None if grad_w is None else grad_w.view(weight.shape), *(None,) * 8

    @jvp_rule
    def jvp(ctx, saved, ddy, dx, _, dweight, *__):
        dy, x, stats, weight = saved
        n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend = ctx.options
        result: list[Tensor | None] = [None, None, None]
        if dx is not None or dweight is not None:
            # The Hessian of <dy, y> is symmetric: its product with a direction is that of double backward.
            _, *result[:2] = _double_backward(
                *(dx, dweight, None, dy, x, stats, weight, n, eps, rms, param_dtype),
                *(False, need_dx, dw_groups, backend),
            )
        if ddy is not None:
            linear = _backward(ddy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend)
            result = [b if a is None else a if b is None else a + b for a, b in zip(result, linear, strict=True)]
        elif db_groups:
            result[2] = x.new_zeros((db_groups, n), dtype=param_dtype)  # forward-mode AD takes no None for an output
        return tuple(result)

    @staticmethod
    def vmap(info, in_dims, dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, dw_groups, db_groups, backend):
        batch = info.batch_size
        dy, x = fold_rows(dy, in_dims[0], batch), fold_rows(x, in_dims[1], batch)
        if batch == 0:
            dx = torch.empty_like(x) if need_dx else None
            results = dx, *_nothing(x, n, dw_groups, db_groups, dtype=param_dtype)
            return results, out_dims(results)
        stats = fold_stats(stats, in_dims[2], batch)
        weight = _fold_param(weight, in_dims[3], batch, n)
        dx, dw, db = NormBackward.call(
            *(dy, x, stats, weight, n, eps, rms, param_dtype, need_dx, batch * dw_groups, batch * db_groups, backend)
        )
        results = dx, _unfold_param(dw, batch), _unfold_param(db, batch)
        return results, out_dims(results)


class NormDoubleBackward(Function):
    """(grad_dy, grad_x, grad_w): the gradients of :class:`NormBackward`; what is not needed is None.

    ``ddx``, ``ddw``, ``ddb`` reach its results and may be None. With ``need_ddy`` alone, and ``dy`` None, it is the
    derivative of y in their direction, whose own backward runs on kernels; all other derivatives are those of the
    reference's formulas.
    """

    @staticmethod
    def forward(ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, dtype, need_ddy, need_dx, dw_groups, backend):
        return _norm_double_backward(
            ddx, ddw, ddb, dy, x, stats, weight, n, rms, dtype, need_ddy, need_dx, dw_groups, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[7:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        if transforms_active():
            ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx, grad_ddy, *grads):
        if ctx.options[4] and ctx.saved_tensors[3] is None:
            return NormDoubleBackward._backward_of_derivative(ctx, grad_ddy)
        _, places, outputs, vjp = NormDoubleBackward._formula(ctx.saved_tensors, ctx.options)
        given = [grad for grad, needed in zip((grad_ddy, *grads), ctx.options[4:7], strict=True) if needed]
        given = [torch.zeros_like(o) if g is None else g.view(o.shape) for g, o in zip(given, outputs, strict=True)]
        result: list[Tensor | None] = [None] * 15
        for place, grad in zip(places, vjp(tuple(given)), strict=True):
            result[place] = grad
        return tuple(result)

    @staticmethod
    def _backward_of_derivative(ctx, s):
        """Of y's derivative J(ddx, ddw, ddb): J is backward's transpose, and <s, J(..)> = <backward(s), (..)>."""
        ddx, ddw, ddb, _, x, stats, weight = ctx.saved_tensors
        n, eps, rms, dtype, _, _, _, backend = ctx.options
        if s is None:
            return (None,) * 15
        need_ddx, need_ddw, need_ddb, _, need_x, _, need_w = ctx.needs_input_grad[:7]
        result: list[Tensor | None] = [None] * 15
        if need_ddx or need_ddw or need_ddb:
            groups = [p.numel() // n if need else 0 for p, need in ((ddw, need_ddw), (ddb, need_ddb))]
            grads = _backward(s, x, stats, weight, n, eps, rms, dtype, need_ddx, *groups, backend)
            for i, (grad, t) in enumerate(zip(grads, (ddx, ddw, ddb), strict=True)):
                result[i] = None if grad is None else grad.view(t.shape)
        if need_x or need_w:
            groups = weight.numel() // n if need_w else 0
            _, result[4], grad_w = _double_backward(
                ddx, ddw, ddb, s, x, stats, weight, n, eps, rms, dtype, False, need_x, groups, backend
            )
            result[6] = None if grad_w is None else grad_w.view(weight.shape)
        return tuple(result)

    @jvp_rule
    def jvp(ctx, saved, *tangents):
        inputs, places, outputs, vjp = NormDoubleBackward._formula(saved, ctx.options)
        result = jvp_of(vjp, inputs, outputs, [tangents[place] for place in places])
        result = iter(result)
        return tuple(next(result) if needed else None for needed in ctx.options[4:7])

    @staticmethod
    def _formula(saved, options):
        """The reference's formulas: the inputs there are, their places among forward's, the outputs, and the vjp."""
        n, eps, rms, dtype, need_ddy, need_dx, dw_groups, _ = options
        places = [i for i, t in enumerate(saved) if t is not None and i != 5]  # 5: stats, which follows from x

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = [None] * len(saved)
            for place, t in zip(places, tensors, strict=True):
                full[place] = t
            *before, x, _, weight = full
            _, stats = reference.norm_forward(x, None, None, n, 1, eps, rms, True)
            results = _norm_double_backward(
                *(*before, x, stats, weight, n, rms, dtype, need_ddy, need_dx, dw_groups, reference)
            )
            return tuple(r for r in results if r is not None)

        inputs = [saved[place] for place in places]
        return inputs, places, *torch.func.vjp(formula, *inputs)

    @staticmethod
    def vmap(
        info, in_dims, ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, dtype, need_ddy, need_dx, dw_groups, backend
    ):
        batch = info.batch_size
        ddx, dy, x = (fold_rows(t, in_dims[i], batch) for i, t in ((0, ddx), (3, dy), (4, x)))
        if batch == 0:
            grad_dy, grad_x = (torch.empty_like(x) if needed else None for needed in (need_ddy, need_dx))
            results = grad_dy, grad_x, *_nothing(x, n, dw_groups, dtype=dtype)
            return results, out_dims(results)
        stats = fold_stats(stats, in_dims[5], batch)
        ddw, ddb, weight = (_fold_param(p, in_dims[i], batch, n) for i, p in ((1, ddw), (2, ddb), (6, weight)))
        grad_dy, grad_x, grad_w = NormDoubleBackward.call(
            *(ddx, ddw, ddb, dy, x, stats, weight, n, eps, rms, dtype, need_ddy, need_dx, batch * dw_groups, backend)
        )
        results = grad_dy, grad_x, _unfold_param(grad_w, batch)
        return results, out_dims(results)
