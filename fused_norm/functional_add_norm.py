"""``add_layer_norm`` and ``add_rms_norm``: dropout, the residual connection and the norm that follows, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import handle_torch_function, has_torch_function

from . import dispatch, ops, reference
from .autograd import dense, legacy_batched, resolve, transforms_active
from .autograd_add_norm import AddNorm, add_norm_forward
from .calls import LOW_PRECISION, PLAIN, autocast_enabled, functionalizing, is_compiling, is_exporting, is_tracing
from .functional_norms import checked_norm, checked_params, layer_norm, offset_weight, rms_norm, row_length

_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Dropout, residual connection and layer normalisation in one pass: ``summed = dropout(input) + residual``,
    ``output = layer_norm(summed)``.

    A post-norm block goes on with ``output`` alone, a pre-norm block with both; the gradients are right when both are
    used. The dropout mask is never stored: it is a function of a seed drawn from torch's generator and of an element's
    place (Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), and backward computes it
    again. So ``torch.manual_seed`` and activation checkpointing give the mask they should, the same on every backend of
    ours; it is not the mask that :func:`torch.nn.functional.dropout` draws from the same seed. (That is drawn where the
    operations are torch's own: on the backend ``torch``, for shapes that broadcast, for tensor subclasses, in export.)

    Args:
        input, residual: shape ``(*, *normalized_shape)``, any layout; fp64, fp32, bf16 or fp16. Different dtypes are
            promoted as by ``+``.
        normalized_shape, weight, bias, eps, weight_offset: of :func:`fused_norm.functional.layer_norm`.
        dropout_p: the probability that an element of ``input`` is dropped; the others are multiplied by
            ``1/(1 - dropout_p)``.
        training: no dropout if False.

    Returns:
        ``(output, summed)``, both contiguous, in the promoted dtype (``output`` fp32 under CUDA autocast, as a norm's).
        ``summed`` is rounded to it before the norm sees it, as separate operations would have it.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1], or a ``weight_offset`` without a weight.
        RuntimeError, NotImplementedError, TypeError: as layer_norm; also shapes that do not fit each other.
    """
    if weight_offset:
        weight, bias = offset_weight(False, residual, weight, bias, weight_offset)
    p = _probability(dropout_p, training)
    return _add_norm(add_layer_norm, False, input, residual, normalized_shape, weight, bias, eps, p, False)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Dropout, residual connection and root-mean-square normalisation in one pass: :func:`add_layer_norm` with
    ``output = rms_norm(summed)``.

    Args:
        input, residual, dropout_p, training: of :func:`add_layer_norm`.
        normalized_shape, weight, eps, weight_offset, cast_before_weight: of :func:`fused_norm.functional.rms_norm`.

    Returns:
        ``(output, summed)``, as :func:`add_layer_norm`.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1], or a ``weight_offset`` without a weight.
        RuntimeError, ValueError, NotImplementedError, TypeError: as rms_norm; also shapes that do not fit each other.
    """
    if weight_offset:
        weight, _ = offset_weight(True, residual, weight, None, weight_offset)
    p = _probability(dropout_p, training)
    return _add_norm(add_rms_norm, True, input, residual, normalized_shape, weight, None, eps, p, cast_before_weight)


def _probability(dropout_p: float, training: bool) -> float:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, a probability is between 0 and 1")
    return float(dropout_p) if training else 0.0


def _add_norm(public, rms, x, residual, shape, weight, bias, eps, p, cast) -> tuple[Tensor, Tensor]:
    """Both functions: ``public`` is the one the user called, whose place a torch function mode may take."""
    if is_compiling() and not is_exporting():
        seed = _new_seed(x) if p else None
        if transforms_active():  # torch.func takes no derivative of an operator, and gives zeros without a word
            return _checked_add_norm(rms, x, residual, shape, weight, bias, eps, p, cast, seed, by_formulas=True)
        plan = dispatch.compile_plan("norm", x.device.type)
        return _add_norm_op(x, residual, shape, weight, bias, eps, rms, cast, p, seed, plan)
    tensors = (x, residual, weight, bias)
    # torch.export, torch.jit.trace, tensor subclasses: as functional_norms.
    if is_compiling() or is_tracing():
        return _by_parts(rms, F.dropout(x, p) if p else x, residual, shape, weight, bias, eps, cast)
    n = dispatch.plain_row_length(residual, shape, weight, bias)
    if (  # an ordinary call: nothing is left to check or to convert
        n
        and dispatch.plain_row_length(x, shape, weight, bias)
        and (x.dtype, x.shape, x.device) == (residual.dtype, residual.shape, residual.device)
        and type(eps) is float
        and p < 1.0
        and not transforms_active()
        and (x.is_cpu or not autocast_enabled(x.device.type))
    ):
        backend = dispatch.select("norm", "cpu" if x.is_cpu else x.device.type)
        if backend is not None:
            return _run(rms, x, residual, weight, bias, _new_seed(x) if p else None, n, eps, p, cast, backend)
    for name, t in (("input", x), ("residual", residual)):
        if not isinstance(t, Tensor) and not has_torch_function((t,)):
            raise TypeError(f"{public.__name__}(): argument '{name}' must be Tensor, not {type(t).__name__}")
    if any(t is not None and type(t) not in PLAIN for t in tensors) or any(
        t.layout is not torch.strided or t.is_nested for t in (x, residual)
    ):
        return _by_parts(rms, F.dropout(x, p) if p else x, residual, shape, weight, bias, eps, cast)
    if has_torch_function((x,)):
        options = {"dropout_p": p, **({"cast_before_weight": True} if cast else {})}
        args = (x, residual, shape, weight, eps) if rms else (x, residual, shape, weight, bias, eps)
        return handle_torch_function(public, (x,), *args, **options)
    return _checked_add_norm(rms, x, residual, shape, weight, bias, eps, p, cast)


def _by_parts(rms, dropped, residual, shape, weight, bias, eps, cast) -> tuple[Tensor, Tensor]:
    """The sum and the norm as two operations, each of which finds its own way."""
    summed = dropped + residual
    if rms:
        return rms_norm(summed, shape, weight, eps, cast_before_weight=cast), summed
    return layer_norm(summed, shape, weight, bias, eps), summed


def _new_seed(x: Tensor) -> Tensor:
    """The mask's seed, from the generator of x's device: a tensor there, so that nobody waits for it and a CUDA graph
    draws a new one each replay; under vmap, one or one an example, as its ``randomness`` says."""
    return torch.randint(2**62, (), dtype=torch.int64, device=x.device)


def _checked_add_norm(
    rms: bool,
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    p: float,
    cast: bool,
    seed: Tensor | None = None,
    by_formulas: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both functions on strided tensors that no one else is to see first: check, choose a backend, run it.

    ``seed`` is drawn here unless given. ``by_formulas``: in operations that Dynamo can trace, instead of a backend.
    """
    device_type = residual.device.type
    by_parts = by_formulas
    if not by_parts:
        x, residual, weight, bias = (None if t is None else _unwrap_if_dead(t) for t in (x, residual, weight, bias))
        by_parts = transforms_active() or legacy_batched(x, residual, weight, bias) or functionalizing()
    dtype = torch.promote_types(x.dtype, residual.dtype)
    autocast = device_type != "cpu" and autocast_enabled(device_type)
    # What the kernels do not take: broadcasting, two devices, no rows, all dropped, other dtypes, a sum in another
    # dtype than the output. Torch's own operations find what is wrong, or do it.
    n = None
    if x.shape == residual.shape and x.device == residual.device and residual.numel() and p < 1.0:
        residual = residual.to(dtype)
        n = row_length(rms, residual, shape, weight, bias)
    if autocast:
        n = None if dtype in LOW_PRECISION else n
        weight, bias = (t.float() if t is not None and t.dtype in LOW_PRECISION else t for t in (weight, bias))
    if eps is None and rms:
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    n = n if type(eps) in (float, int) else None
    if n is not None and (weight is not None or bias is not None):
        weight, bias = checked_params(rms, residual, shape, weight, bias)
    backend = dispatch.select("norm", device_type) if n is not None and not by_parts else None
    if n is None or (backend is None and not by_parts):
        return _by_parts(rms, F.dropout(x, p) if p else x, residual, shape, weight, bias, eps, cast)

    if p and seed is None:
        seed = _new_seed(x)
    if by_parts:
        summed = reference.add_dropped(x, residual, seed, p)
        return checked_norm(rms, summed, shape, weight, bias, eps, cast, by_formulas=by_formulas), summed
    if x.dtype != dtype and not (x.dtype in LOW_PRECISION and dtype == torch.float32):
        x = x.to(dtype)
    x, residual = (resolve(t) if t.is_neg() else t for t in (x, residual))
    return _run(rms, x, residual, dense(weight), dense(bias), seed, n, eps, p, cast, backend)


def _run(rms, x, residual, weight, bias, seed, n, eps, p, cast, backend) -> tuple[Tensor, Tensor]:
    cast = cast and weight is not None and residual.dtype in LOW_PRECISION
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return AddNorm.call(x, residual, weight, bias, seed, n, eps, rms, p, cast, backend)[:2]
    return add_norm_forward(x, residual, weight, bias, seed, n, eps, rms, p, cast, backend)[:2]


def _compiled_add_norm(x, residual, shape, weight, bias, eps, rms, cast, p, seed, plan):
    """What AOTAutograd traces in the operator's place: the Function, and in it the kernels' operators."""
    traced = (FakeTensor, FunctionalTensor, *PLAIN)
    tensors = (x, residual, weight, bias)
    if any(t is not None and type(t) not in traced for t in tensors) or any(
        t.layout is not torch.strided for t in (x, residual)
    ):
        return _by_parts(rms, F.dropout(x, p) if p else x, residual, shape, weight, bias, eps, cast)
    with dispatch.planned(plan):
        return _checked_add_norm(rms, x, residual, tuple(map(int, shape)), weight, bias, eps, p, cast, seed)


_add_norm_op = ops.composite(
    "add_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float? eps,"
    " bool rms, bool cast, float dropout_p, Tensor? seed, str plan) -> (Tensor output, Tensor summed)",
    _compiled_add_norm,
)
