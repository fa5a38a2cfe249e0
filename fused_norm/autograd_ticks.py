"""The ticks loss under autograd: the Functions :class:`Ticks` and :class:`TicksBackward`, as :mod:`.autograd`'s norms.

Each runs one kernel of the backend and has a rule for reverse mode, forward mode and ``vmap``. The derivatives of the
gradient (double backward, Hessians) are those of the reference's explicit formulas. vmap folds its batch into the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .autograd import (
    Function,
    as_rows,
    dense,
    fold_rows,
    fold_stats,
    jvp_of,
    jvp_rule,
    legacy_batched,
    out_dims,
    transforms_active,
    unfold_stats,
)


@dataclass(frozen=True)
class TicksOptions:
    """What a ticks loss is made of, beside tensors; see :mod:`fused_norm.backends`."""

    ignore_index: int
    smoothing: float
    ce: float
    ticks: float
    softcap: float

    @property
    def values(self) -> tuple[int, float, float, float, float]:
        """In the contract's order."""
        return self.ignore_index, self.smoothing, self.ce, self.ticks, self.softcap


# -------------------------------------------------------------------------------------------------- running the kernels


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for a class index outside [0, classes) that is not ``ignore_index``."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise IndexError(f"target {target[bad][0].item()} is out of range for {classes} classes")


def _as_target(target: Tensor) -> Tensor:
    return as_rows(target, target.shape[1]) if target.is_floating_point() else dense(target)


def ticks_forward(
    z: Tensor, target: Tensor, weight: Tensor | None, options: TicksOptions, backend: ModuleType
) -> tuple[Tensor, Tensor]:
    """Run the backend's forward on logits (M, V) of any layout: (loss, stats)."""
    if backend is reference and type(target) is Tensor and target.is_cpu and not target.is_floating_point():
        check_classes(target, z.shape[1], options.ignore_index)  # eager operations name no value
    return backend.ticks_forward(as_rows(z, z.shape[1]), _as_target(target), dense(weight), *options.values)


def lse_of(stats: Tensor) -> Tensor:
    """Each row's logsumexp; 0 of an ignored row."""
    return stats[0] + torch.log1p(stats[1])


def ticks_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    z: Tensor,
    target: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    options: TicksOptions,
    need_dz: bool,
    need_dtarget: bool,
    backend: ModuleType,
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Run the backend's backward. ``inplace`` writes dz over z where that is rows of their own memory."""
    rows = as_rows(z, z.shape[1])
    inplace = inplace and need_dz and (rows.stride(0) >= rows.shape[1] or rows.shape[0] == 1)
    grad, grad_lse = (None if g is None else g.resolve_neg() for g in (grad, grad_lse))
    if inplace:
        rows = rows.detach()
    dz, dtarget = backend.ticks_backward(
        *(grad, grad_lse, rows, _as_target(target), dense(stats), dense(weight), *options.values),
        *(need_dz, need_dtarget, inplace),
    )
    if inplace and torch._C._is_alias_of(rows, z):  # a raw write, which autograd would not see
        torch.autograd.graph.increment_version(z)
    return dz if need_dz else None, dtarget if need_dtarget else None


def _backward(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend, inplace=False):
    """Backward's results, differentiable where someone may differentiate them."""
    if grad is None:
        grad = torch.zeros_like(grad_lse)
    if legacy_batched(grad, grad_lse):
        return _formula(grad, grad_lse, z, target, weight, options, need_dz, need_dtarget)
    if torch.is_grad_enabled() or transforms_active():
        if inplace:
            raise RuntimeError(
                "inplace_backward=True writes the gradient over the logits, so that gradient cannot be differentiated:"
                " create_graph=True and torch.func need inplace_backward=False"
            )
        return TicksBackward.call(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend)
    return ticks_backward(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend, inplace)


def _formula(grad, grad_lse, z, target, weight, options, need_dz, need_dtarget):
    _, stats = reference.ticks_forward(z, target, weight, *options.values)
    return reference.ticks_backward(
        grad, grad_lse, z, target, stats, weight, *options.values, need_dz, need_dtarget, False
    )


# ---------------------------------------------------------------------------------------------------------- vmap's fold


def _fold(t: Tensor | None, dim: int | None, batch: int, row_dims: int) -> Tensor | None:
    """A tensor whose rows have ``row_dims`` dimensions, (M, ...), with vmap's batch folded into M."""
    t = fold_rows(t, dim, batch)
    return t if t is None else t.reshape(batch * t.shape[1], *t.shape[2:]) if row_dims else t.reshape(-1)


def _one_by_one(cls: type[Function], batch: int, in_dims: tuple[int | None, ...], args: tuple) -> tuple:
    """vmap of class weights, which a kernel takes for all of its rows: a call for each example."""
    results = []
    for i in range(batch):
        mine = (
            a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims, strict=True)
        )
        results.append(cls.call(*mine))
    stacked = tuple(None if r[0] is None else torch.stack(r) for r in zip(*results, strict=True))
    return stacked, out_dims(stacked)


# -------------------------------------------------------------------------------------------------------- the functions


class Ticks(Function):
    """(loss, lse, stats) of logits ``z`` (M, V): ``loss`` and ``lse`` are (M,), in fp32 (fp64 for fp64 logits).

    ``target`` is class indices (M,) or probabilities (M, V), which may require grad; the class weights, (V,), may not.
    ``lse`` is None unless ``need_lse``.
    """

    @staticmethod
    def forward(z, target, weight, options, need_lse, inplace, backend):
        loss, stats = ticks_forward(z, target, weight, options, backend)
        return loss, lse_of(stats) if need_lse else None, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, target, weight, ctx.options, ctx.need_lse, ctx.inplace, ctx.backend = inputs
        stats = output[2]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, target, weight, stats)
        if transforms_active():
            ctx.save_for_forward(z, target, weight, stats)

    @staticmethod
    def backward(ctx, grad, grad_lse, _):
        if grad is None and grad_lse is None:
            return (None,) * 7
        z, target, weight, stats = ctx.saved_tensors
        need_dz, need_dtarget = ctx.needs_input_grad[:2]
        dz, dtarget = _backward(
            grad, grad_lse, z, target, stats, weight, ctx.options, need_dz, need_dtarget, ctx.backend, ctx.inplace
        )
        return dz, dtarget, *(None,) * 5

    @jvp_rule
    def jvp(ctx, saved, dz, dtarget, dweight, *_):
        if dweight is not None:
            raise RuntimeError("the class weights have a tangent: the ticks losses take no derivative in them")
        z, target, weight, stats = saved
        acc = reference.accumulation_dtype(z)
        z, one = z.to(acc), torch.ones_like(stats[0])  # not rounded on the way, as a gradient in z's dtype would be
        target = target.to(acc) if target.is_floating_point() else target

        def derivative(grad: Tensor, grad_lse: Tensor | None) -> Tensor:
            grads = _backward(
                *(grad, grad_lse, z, target, stats, weight, ctx.options, dz is not None, dtarget is not None),
                ctx.backend,
            )
            pairs = zip(grads, (dz, dtarget), strict=True)
            terms = [(g * tangent.to(acc)).sum(1) for g, tangent in pairs if tangent is not None]
            return sum(terms, torch.zeros_like(one))

        return derivative(one, None), derivative(0 * one, one) if ctx.need_lse else None, None

    @staticmethod
    def vmap(info, in_dims, z, target, weight, options, need_lse, inplace, backend):
        batch = info.batch_size
        if batch == 0:  # nothing to compute, but still connected to the graph
            loss = fold_rows(z, in_dims[0], 0).sum(-1, dtype=reference.accumulation_dtype(z)) * 0
            kept = 3 if reference.is_plain(target, options.smoothing) else 4
            stats = loss.new_empty((kept, *loss.shape))
            return (loss, loss.clone() if need_lse else None, stats), (0, 0 if need_lse else None, 1)
        if in_dims[2] is not None:
            return _one_by_one(Ticks, batch, in_dims, (z, target, weight, options, need_lse, inplace, backend))
        z = _fold(z, in_dims[0], batch, 1)
        target = _fold(target, in_dims[1], batch, target.is_floating_point())
        loss, lse, stats = Ticks.call(z, target, weight, options, need_lse, False, backend)
        lse = lse.view(batch, -1) if need_lse else None
        return (loss.view(batch, -1), lse, unfold_stats(stats, batch)), (0, 0 if need_lse else None, 1)


class TicksBackward(Function):
    """(dz, dtarget) of :class:`Ticks`; what is not needed is None.

    It is differentiable in ``grad``, ``grad_lse``, ``z`` and ``target``; ``stats`` follows from them.
    """

    @staticmethod
    def forward(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend):
        return ticks_backward(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[6:9]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])
        if transforms_active():
            ctx.save_for_forward(*inputs[:6])

    @staticmethod
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * 10
        _, places, outputs, vjp = TicksBackward._vjp(ctx.saved_tensors, ctx.options)
        given = [grad for grad, needed in zip(grads, ctx.options[1:], strict=True) if needed]
        given = [torch.zeros_like(o) if g is None else g for g, o in zip(given, outputs, strict=True)]
        result: list[Tensor | None] = [None] * 10
        for place, grad in zip(places, vjp(tuple(given)), strict=True):
            result[place] = grad
        return tuple(result)

    @jvp_rule
    def jvp(ctx, saved, *tangents):
        inputs, places, outputs, vjp = TicksBackward._vjp(saved, ctx.options)
        result = iter(jvp_of(vjp, inputs, outputs, [tangents[place] for place in places]))
        return tuple(next(result) if needed else None for needed in ctx.options[1:])

    @staticmethod
    def _vjp(saved, options):
        """The reference's formulas: the inputs there are, their places among forward's, the outputs, and the vjp."""
        target, weight = saved[3], saved[5]
        places = [i for i in (0, 1, 2, 3) if saved[i] is not None and saved[i].is_floating_point()]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: dict[int, Tensor | None] = {1: None, 3: target, **dict(zip(places, tensors, strict=True))}
            results = _formula(full[0], full[1], full[2], full[3], weight, *options)
            return tuple(r for r in results if r is not None)

        inputs = [saved[place] for place in places]
        return inputs, places, *torch.func.vjp(formula, *inputs)

    @staticmethod
    def vmap(info, in_dims, grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend):
        batch = info.batch_size
        if batch == 0:
            dz, dtarget = (
                torch.empty_like(fold_rows(t, d, 0)) if needed else None
                for t, d, needed in ((z, in_dims[2], need_dz), (target, in_dims[3], need_dtarget))
            )
            return (dz, dtarget), out_dims((dz, dtarget))
        if in_dims[5] is not None:
            args = (grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend)
            return _one_by_one(TicksBackward, batch, in_dims, args)
        grad, grad_lse = _fold(grad, in_dims[0], batch, 0), _fold(grad_lse, in_dims[1], batch, 0)
        z, target = _fold(z, in_dims[2], batch, 1), _fold(target, in_dims[3], batch, target.is_floating_point())
        stats = fold_stats(stats, in_dims[4], batch)
        results = TicksBackward.call(grad, grad_lse, z, target, stats, weight, options, need_dz, need_dtarget, backend)
        results = tuple(None if r is None else r.view(batch, -1, r.shape[1]) for r in results)
        return results, out_dims(results)
