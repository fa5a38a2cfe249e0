"""The public ticks losses: check once, choose a backend, run it under autograd, reduce.

Every function does what :func:`torch.nn.functional.cross_entropy` does with the same arguments. What no kernel serves
(tensor subclasses, empty input, torch.export, torch.jit.trace) is computed by the reference's formulas.
"""

from __future__ import annotations

import math
import numbers
import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import handle_torch_function, has_torch_function

from . import dispatch, linear_ticks, ops, reference
from .autograd import legacy_batched, transforms_active
from .autograd_ticks import Ticks, TicksOptions, check_classes, lse_of, ticks_forward
from .calls import (
    DTYPE_NAMES,
    DTYPES,
    LOW_PRECISION,
    PLAIN,
    autocast_enabled,
    functionalizing,
    is_compiling,
    is_exporting,
    is_tracing,
)
from .linear_ticks import LinearTicksOptions, row_losses

_REDUCTIONS = ("none", "mean", "sum")


def ticks_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The *ticks* loss (token-wise predictive coding): ``e = p - log p``, p = softmax(input) at the target.

    It is cross entropy whose gradient, ``(1 - p) * (softmax - onehot)``, fades as a token becomes well predicted; its
    floor is 1. Derivation in docs/math.md.

    Args, returns and raises: as :func:`ticks_cross_entropy`.
    """
    return _public(ticks_loss, input, target, weight, ignore_index, reduction, label_smoothing, 0.0, 1.0)


def ticks_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    ticks_weight: float = 1e-3,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Cross entropy regularised by ticks: ``CE + ticks_weight * (p - log p)`` per target.

    With class probabilities a as target it is ``sum_j a_j*(-log p_j + ticks_weight*(p_j - log p_j))``, and label
    smoothing and class weights make such an a of class indices. Derivation in docs/math.md.

    Args:
        input: logits of shape (M, V), (V,) or (N, V, d1, ...); fp64, fp32, bf16 or fp16, in any layout.
        target: class indices, int64, of shape (M,), () or (N, d1, ...); or class probabilities, floating, of input's
            shape, which may require grad.
        weight: a weight per class, (V,): each class's part of the loss is multiplied by it, and with class indices the
            mean is the weighted mean. It takes a gradient beside class probabilities alone, as in torch.
        ignore_index: rows with this target count for nothing and get exactly zero gradient, whatever they hold. It
            holds for class indices alone.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over the rows that are kept, weighted by their
            targets' class weights; with class probabilities over all rows.
        label_smoothing: in [0, 1]: the part of the target that is spread evenly over the classes.
        ticks_weight: the coefficient of ticks; 0 is ``F.cross_entropy``.
        z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to each row that is kept; its mean is over the
            number of those rows, whatever the class weights.
        softcap: s > 0 puts ``s * tanh(input / s)`` in the logits' place, before everything else.
        inplace_backward: backward writes the gradient over ``input``'s memory instead of new memory, where its rows lie
            apart with their classes adjacent. Whoever still needs the logits gets torch's error for tensors modified in
            place; a leaf that requires grad, and ``create_graph=True``, are refused. Compiled code and torch.func take
            no notice of it.

    Returns:
        The loss in input's dtype (promoted with that of class probabilities; fp32 under autocast): a scalar, or for
        ``"none"`` one per row, of target's shape (without the classes' dimension).

    Raises:
        ValueError: another number of targets than rows, an unknown reduction, or a softcap that is not positive and
            finite.
        IndexError: on a CPU, a target outside [0, V) that is not ``ignore_index``. (On a GPU it makes its row NaN.)
        RuntimeError: other shapes that do not fit, a target of another type, a weight of another shape or dtype, a
            label_smoothing outside [0, 1], an ignore_index beside class probabilities, inplace_backward of a leaf.
        NotImplementedError: a dtype that the loss is not defined for.
        TypeError: arguments of the wrong type.
    """
    return _public(
        *(ticks_cross_entropy, input, target, weight, ignore_index, reduction, label_smoothing, 1.0, ticks_weight),
        ticks_weight=ticks_weight,
        z_loss_weight=z_loss_weight,
        softcap=softcap,
        inplace_backward=inplace_backward,
    )


def linear_ticks_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    ticks_weight: float = 1e-3,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    accumulate_fp32: bool = False,
) -> Tensor:
    r"""``ticks_cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`` without the logits in memory.

    Rows go through in chunks of logits; ``"mean"`` and ``"sum"`` make the gradients in forward already (three matrix
    products in all), ``"none"`` and fp16 make them in backward (four). Every derivative is right: a second backward
    through the same graph computes again; double backward, forward mode and torch.func transforms go by way of the
    logits, and take their memory.

    Args:
        input: hidden states of shape (*, H); fp64, fp32, bf16 or fp16.
        linear_weight: the classifier's weight, (V, H), in input's dtype.
        target: class indices, int64, of shape (*), or class probabilities (*, V).
        linear_bias: (V,), in input's dtype.
        weight, ignore_index, reduction, label_smoothing, ticks_weight, z_loss_weight, softcap: as
            :func:`ticks_cross_entropy`.
        chunk_bytes: how much memory a chunk's logits may take; None is 64 MiB on a CPU and 512 MiB elsewhere. A chunk
            has one row at least.
        accumulate_fp32: with a bf16 or fp16 ``linear_weight``, add up its gradient over the chunks in fp32, which takes
            an fp32 copy of it for a while, instead of rounding each sum.

    Returns:
        The loss in input's dtype (fp32 under autocast): a scalar, or for ``"none"`` one per row, of shape (*).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or what :func:`ticks_cross_entropy` raises it for.
        ValueError: chunk_bytes below 1, or what :func:`ticks_cross_entropy` raises it for.
        IndexError, NotImplementedError, TypeError: as :func:`ticks_cross_entropy`.
    """
    return _public_linear(
        *(linear_ticks_cross_entropy, input, linear_weight, target, linear_bias, weight, ignore_index, reduction),
        *(label_smoothing, 1.0, ticks_weight),
        chunk_bytes=chunk_bytes,
        accumulate_fp32=accumulate_fp32,
        ticks_weight=ticks_weight,
        z_loss_weight=z_loss_weight,
        softcap=softcap,
    )


def linear_ticks_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    chunk_bytes: int | None = None,
    accumulate_fp32: bool = False,
) -> Tensor:
    r"""``ticks_loss(F.linear(input, linear_weight, linear_bias), target, ...)`` without the logits in memory.

    Args, returns and raises: as :func:`linear_ticks_cross_entropy`.
    """
    return _public_linear(
        *(linear_ticks_loss, input, linear_weight, target, linear_bias, weight, ignore_index, reduction),
        *(label_smoothing, 0.0, 1.0),
        chunk_bytes=chunk_bytes,
        accumulate_fp32=accumulate_fp32,
    )


# --------------------------------------------------------------------------------------------------------------- checks


def _check_options(ignore_index, reduction, label_smoothing, ticks_weight, z_loss_weight, softcap) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction!r} is not a reduction; the reductions are 'none', 'mean', 'sum'")
    if type(ignore_index) is not int:
        try:
            operator.index(ignore_index)
        except TypeError:
            raise TypeError(f"ignore_index is {ignore_index!r}; it must be an int") from None
    softcap = 1.0 if softcap is None else softcap
    options = (label_smoothing, ticks_weight, z_loss_weight, softcap)
    for name, value in zip(("label_smoothing", "ticks_weight", "z_loss_weight", "softcap"), options, strict=True):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} is a tensor; it must be a number, which takes no gradient")
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, but is {label_smoothing}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, but is {softcap}")


def _check_tensors(z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Raise what ``F.cross_entropy`` raises, with both values in the message."""
    if not isinstance(z, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"input and target must be tensors, not {type(z).__name__} and {type(target).__name__}")
    if z.dim() == 0:
        raise RuntimeError(
            f"input has shape (), target has shape {tuple(target.shape)}: input needs a dimension of classes"
        )
    soft = target.dim() == z.dim() and target.shape == z.shape  # so F.cross_entropy tells probabilities from indices
    if not soft:
        given, expected = tuple(target.shape), () if z.dim() == 1 else (z.shape[0], *z.shape[2:])
        if given != expected and not (z.dim() == 1 and given == (1,)):
            message = f"target has shape {given}, but input of shape {tuple(z.shape)} needs {expected}"
            batch_differs = given[:1] != (1 if z.dim() == 1 else z.shape[0],)
            raise ValueError(message) if batch_differs else RuntimeError(message)
    _check_kinds(z, target, soft, weight, z.shape[-1] if z.dim() == 1 else z.shape[1], ignore_index)


def _check_kinds(z: Tensor, target: Tensor, soft: bool, weight: Tensor | None, classes: int, ignore_index: int) -> None:
    """Dtypes and devices, beside logits or hidden states ``z``; the target's shape is that of ``soft`` ones, or not."""
    if soft:
        if not target.is_floating_point():
            raise RuntimeError(
                f"target is {target.dtype} and has shape {tuple(target.shape)}, that of class probabilities, which are"
                " floating"
            )
        if ignore_index >= 0:
            raise RuntimeError(f"ignore_index is {ignore_index}, but target holds class probabilities, which have none")
        if target.dtype not in DTYPES:
            raise NotImplementedError(f"the ticks loss is not defined for target of {target.dtype}")
    elif target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target is {target.dtype}; it must hold class indices, as torch.int64")
    if z.dtype not in DTYPES:
        raise NotImplementedError(f"the ticks loss is not defined for input of {z.dtype}; it takes {DTYPE_NAMES}")
    if target.device != z.device:
        raise RuntimeError(f"target is on device {target.device}, input is on {z.device}")
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, not {type(weight).__name__}")
        if weight.dim() != 1 or weight.shape[0] != classes:
            raise RuntimeError(f"weight has shape {tuple(weight.shape)}, but there are {classes} classes")
        if weight.device != z.device:
            raise RuntimeError(f"weight is on device {weight.device}, input is on {z.device}")


def _in_one_dtype(
    z: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """(z, target, weight) in dtypes that the kernels take, and the result's dtype. Raises where torch raises."""
    soft = target.is_floating_point()
    autocast = autocast_enabled(z.device.type)
    result = z.dtype
    if autocast:
        result = torch.promote_types(result, torch.float32)
        weight = weight if weight is None or weight.dtype == torch.float64 else weight.float()
    if soft:
        for t in (target, weight):
            result = result if t is None else torch.promote_types(result, t.dtype)
    elif weight is not None:
        if weight.requires_grad:
            raise RuntimeError("weight requires grad, but beside class indices the loss has no derivative in it")
        if weight.dtype != (result if autocast else z.dtype):
            raise RuntimeError(f"weight is {weight.dtype}, input is {z.dtype}: they must have the same dtype")
    if result == torch.float64:
        z = z.double()
    beside = z.dtype if z.dtype not in LOW_PRECISION else torch.float32
    if soft:
        target = target if target.dtype == z.dtype else target.to(beside)
    else:
        target = target.long()
    weight = weight if weight is None or weight.dtype == z.dtype else weight.to(beside)
    return z, target, weight, result


def _weight_in_target(target: Tensor, weight: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor | None, float]:
    """(target, weight, smoothing) of soft rows (M, V) whose class weights may need a derivative: as a product."""
    if weight is None or not target.is_floating_point() or not (weight.requires_grad or transforms_active()):
        return target, weight, smoothing
    dtype = torch.promote_types(torch.promote_types(target.dtype, weight.dtype), torch.float32)
    mass = (1 - smoothing) * target.to(dtype) + smoothing / target.shape[1]
    return weight.to(dtype) * mass, None, 0.0


def _divisors(z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """What the mean divides the sum of the losses by, and that of the z-losses, in the losses' dtype."""
    dtype = reference.accumulation_dtype(z)
    if target.is_floating_point():
        count = target.numel() // target.shape[1] if target.shape[1] else 0  # torch's count of rows without classes
        rows = torch.full((), count, dtype=dtype, device=z.device)
        return rows, rows
    keep = target != ignore_index
    rows = keep.sum(dtype=dtype)
    if weight is None:
        return rows, rows
    known = keep & (target >= 0) & (target < weight.numel())  # any other is an IndexError, or a NaN, elsewhere
    return torch.where(known, weight.to(dtype)[torch.where(known, target, 0)], 0).sum(), rows


# ---------------------------------------------------------------------------------------------------------- from logits


def _public(
    public,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    ce: float,
    ticks: float,
    **keywords,
) -> Tensor:
    """Both losses from logits: ``keywords`` are those that the user's function ``public`` has and the other has not."""
    z_loss, softcap = keywords.get("z_loss_weight", 0.0), keywords.get("softcap")
    _check_options(ignore_index, reduction, label_smoothing, ticks, z_loss, softcap)
    numbers = (
        int(ignore_index),
        reduction,
        float(label_smoothing),
        ce,
        float(ticks),
        float(z_loss),
        float(softcap or 0.0),
    )
    if is_compiling() and not is_exporting() and not transforms_active():
        return _ticks_op(z, target, weight, *numbers, dispatch.compile_plan("ticks", z.device.type))
    by_formulas = is_compiling() or is_tracing()
    if not by_formulas:
        given = tuple(t for t in (z, target, weight) if isinstance(t, Tensor))
        if has_torch_function(given):
            args = (z, target, weight, ignore_index, reduction, label_smoothing)
            return handle_torch_function(public, given, *args, **keywords)
    return _ticks(z, target, weight, *numbers, by_formulas, keywords.get("inplace_backward", False))


def _ticks(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    ce: float,
    ticks: float,
    z_loss_weight: float,
    softcap: float,
    by_formulas: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Both losses from logits: check the tensors, choose a backend, run it."""
    _check_tensors(z, target, weight, ignore_index)
    one_row, soft = z.dim() == 1, target.is_floating_point()
    shape = z.shape[:0] if one_row else target.shape if not soft else (z.shape[0], *z.shape[2:])
    classes = z.shape[-1] if one_row else z.shape[1]
    inplace = inplace and not transforms_active()
    if inplace and z.requires_grad and torch.is_grad_enabled() and (z if z._base is None else z._base).is_leaf:
        raise RuntimeError(
            f"inplace_backward=True would write the gradient over input of shape {tuple(z.shape)}, which is a leaf that"
            " requires grad, or a view of one: its values would be lost"
        )
    z, target, weight, dtype = _in_one_dtype(z, target, weight)
    rows = _rows(z, classes)
    target = _rows(target, classes) if soft else target.reshape(-1)
    target, weight, smoothing = _weight_in_target(target, weight, smoothing)
    options = TicksOptions(ignore_index, smoothing, ce, ticks, softcap)
    reduce = LinearTicksOptions(options, reduction, z_loss_weight, None, False)
    scale = z_scale = None
    if reduction == "mean":
        scale, z_scale = _divisors(rows, target, weight, ignore_index)
    need_lse = z_loss_weight != 0

    if classes == 0 and not soft and rows.is_cpu and not by_formulas:
        check_classes(target, 0, ignore_index)
    if classes == 0 or rows.shape[0] == 0:
        loss = rows.sum(1, dtype=reference.accumulation_dtype(rows)) * 0  # still connected to the graph
        loss, lse = (loss + target.sum(1) * 0 if soft else loss), None
    else:
        tensors = [t for t in (rows, target, weight) if t is not None]
        if by_formulas or any(type(t) not in _KNOWN for t in tensors) or legacy_batched(*tensors) or functionalizing():
            backend = None
        else:
            backend = dispatch.select("ticks", rows.device.type) or reference  # torch has no such function
        if backend is None:
            loss, stats = reference.ticks_forward(rows, target, weight, *options.values)
        elif transforms_active() or (torch.is_grad_enabled() and (rows.requires_grad or target.requires_grad)):
            loss, lse, stats = Ticks.call(rows, target, weight, options, need_lse, inplace, backend)
        else:
            loss, stats = ticks_forward(rows, target, weight, options, backend)
            backend = None
        if backend is None:
            lse = lse_of(stats) if need_lse else None
    if reduction == "none":
        loss = loss.reshape(shape)
        lse = None if lse is None else lse.reshape(shape)
    return row_losses(loss, lse, reduce, scale, z_scale).to(dtype)


def _rows(t: Tensor, classes: int) -> Tensor:
    """(V,) or (N, V, d1, ...) as (M, V)."""
    return t.unsqueeze(0) if t.dim() == 1 else t if t.dim() == 2 else t.movedim(1, -1).reshape(-1, classes)


#: What the Functions and kernels take. The traced ones come where AOTAutograd takes the operators below apart.
_KNOWN = PLAIN | {FakeTensor, FunctionalTensor}


def _compiled_ticks(z, target, weight, *rest) -> Tensor:
    """What AOTAutograd traces in the operator's place: the Functions of :mod:`.autograd_ticks`, and in them kernels."""
    *numbers, plan = rest
    with dispatch.planned(plan):
        return _ticks(z, target, weight, *numbers)


_NUMBERS = (
    "int ignore_index, str reduction, float label_smoothing, float ce, float ticks, float z_loss_weight, float softcap"
)
_ticks_op = ops.composite(
    f"ticks(Tensor input, Tensor target, Tensor? weight, {_NUMBERS}, str plan) -> Tensor", _compiled_ticks
)


# --------------------------------------------------------------------------------------------------- from hidden states


def _public_linear(
    public,
    x: Tensor,
    w: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    ce: float,
    ticks: float,
    *,
    chunk_bytes: int | None,
    accumulate_fp32: bool,
    **keywords,
) -> Tensor:
    """Both losses from hidden states, as :func:`_public` from logits."""
    z_loss, softcap = keywords.get("z_loss_weight", 0.0), keywords.get("softcap")
    _check_options(ignore_index, reduction, label_smoothing, ticks, z_loss, softcap)
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes is True or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be a positive int, or None, but is {chunk_bytes!r}")
    numbers = (
        int(ignore_index),
        reduction,
        float(label_smoothing),
        ce,
        float(ticks),
        float(z_loss),
        float(softcap or 0.0),
    )
    numbers = (*numbers, chunk_bytes, bool(accumulate_fp32))
    if is_compiling() and not is_exporting() and not transforms_active():
        return _linear_ticks_op(x, w, target, bias, weight, *numbers, dispatch.compile_plan("ticks", x.device.type))
    by_formulas = is_compiling() or is_tracing()
    if not by_formulas:
        given = tuple(t for t in (x, w, target, bias, weight) if isinstance(t, Tensor))
        if has_torch_function(given):
            args = (x, w, target, bias, weight, ignore_index, reduction, label_smoothing)
            keywords |= {"chunk_bytes": chunk_bytes, "accumulate_fp32": accumulate_fp32}
            return handle_torch_function(public, given, *args, **keywords)
    return _linear_ticks(x, w, target, bias, weight, *numbers, by_formulas)


def _check_linear(x, w, target, bias, weight, ignore_index) -> None:
    for name, t in (("input", x), ("linear_weight", w), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"linear_bias must be a tensor, not {type(bias).__name__}")
    if w.dim() != 2:
        raise RuntimeError(f"linear_weight has shape {tuple(w.shape)}; it must have two dimensions (classes, features)")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise RuntimeError(
            f"input has shape {tuple(x.shape)}, but linear_weight of shape {tuple(w.shape)} needs"
            f" {w.shape[1]} features last"
        )
    if bias is not None and tuple(bias.shape) != (w.shape[0],):
        raise RuntimeError(f"linear_bias has shape {tuple(bias.shape)}, but there are {w.shape[0]} classes")
    for name, t in (("linear_weight", w), ("linear_bias", bias)):
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{name} is on device {t.device}, input is on {x.device}")
        # Autocast makes one dtype of all but fp64.
        cast = autocast_enabled(x.device.type) and {x.dtype, t.dtype if t is not None else None} <= _CAST
        if t is not None and t.dtype != x.dtype and not cast:
            raise RuntimeError(f"{name} is {t.dtype}, input is {x.dtype}: they must have the same dtype")
    soft = target.dim() == x.dim()
    expected = (*x.shape[:-1], w.shape[0]) if soft else x.shape[:-1]
    if target.dim() != len(expected) or any(a != b for a, b in zip(target.shape, expected, strict=True)):
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but input of shape {tuple(x.shape)} needs {tuple(x.shape[:-1])},"
            f" or {(*x.shape[:-1], w.shape[0])} for class probabilities"
        )
    _check_kinds(x, target, soft, weight, w.shape[0], ignore_index)


#: What autocast casts.
_CAST = LOW_PRECISION | {torch.float32, None}


def _linear_ticks(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    ce: float,
    ticks: float,
    z_loss_weight: float,
    softcap: float,
    chunk_bytes: int | None,
    accumulate_fp32: bool,
    by_formulas: bool = False,
) -> Tensor:
    """Both losses from hidden states: check the tensors, choose a backend, run it."""
    _check_linear(x, w, target, bias, weight, ignore_index)
    shape = x.shape[:-1]
    device_type = x.device.type
    if autocast_enabled(device_type):
        cast = torch.get_autocast_dtype(device_type)
        x, w, bias = (t if t is None or t.dtype == torch.float64 else t.to(cast) for t in (x, w, bias))
    x, target, weight, dtype = _in_one_dtype(x, target, weight)
    if x.dtype == torch.float64:
        w, bias = w.double(), None if bias is None else bias.double()
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    if target.is_floating_point():
        target = target.unsqueeze(0) if target.dim() == 1 else target.flatten(0, -2)
    else:
        target = target.reshape(-1)
    target, weight, smoothing = _weight_in_target(target, weight, smoothing)
    options = LinearTicksOptions(
        TicksOptions(ignore_index, smoothing, ce, ticks, softcap),
        *(reduction, z_loss_weight, chunk_bytes, accumulate_fp32),
    )
    one = torch.ones((), dtype=reference.accumulation_dtype(rows), device=rows.device)
    scale, z_scale = _divisors(rows, target, weight, ignore_index) if reduction == "mean" else (one, one)
    if rows.shape[0] == 0 or w.shape[0] == 0 or rows.shape[1] == 0:
        logits = F.linear(rows, w, bias)
        numbers = (ignore_index, reduction, smoothing, ce, ticks, z_loss_weight, softcap)
        loss = _ticks(logits, target, weight, *numbers, by_formulas)
        return (loss.reshape(shape) if reduction == "none" else loss).to(dtype)
    tensors = [t for t in (rows, w, target, bias, weight) if t is not None]
    if by_formulas or any(type(t) not in _KNOWN for t in tensors) or legacy_batched(*tensors) or functionalizing():
        loss = linear_ticks.materialized(rows, w, bias, target, weight, scale, z_scale, options, None)
    else:
        backend = dispatch.select("ticks", device_type) or reference
        run = linear_ticks.materialized if transforms_active() else linear_ticks.linear_ticks
        loss = run(rows, w, bias, target, weight, scale, z_scale, options, backend)
    return (loss.reshape(shape) if reduction == "none" else loss).to(dtype)


def _compiled_linear_ticks(x, w, target, bias, weight, *rest) -> Tensor:
    *numbers, plan = rest
    with dispatch.planned(plan):
        return _linear_ticks(x, w, target, bias, weight, *numbers)


_linear_ticks_op = ops.composite(
    "linear_ticks(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight,"
    f" {_NUMBERS}, int? chunk_bytes, bool accumulate_fp32, str plan) -> Tensor",
    _compiled_linear_ticks,
)
