"""``layer_norm`` and ``rms_norm``: validate once, choose a backend, run it under autograd.

Each does what its counterpart in ``torch.nn.functional`` does; what no kernel serves (tensor subclasses, other devices
and dtypes, empty input, torch.export, torch.jit.trace) is handed to torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import handle_torch_function, has_torch_function

from . import dispatch, ops, reference
from .autograd import Norm, NormKeepingOutput, dense, legacy_batched, norm_forward, resolve, transforms_active
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

_is_grad_enabled = torch.is_grad_enabled
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Layer normalisation over the trailing dimensions: :func:`torch.nn.functional.layer_norm`, fused.

    ``y = (x - mean)/sqrt(var + eps) * weight + bias`` with the mean and the biased variance of each row (Ba, Kiros and
    Hinton, "Layer Normalization", 2016); derivation of the gradients in docs/math.md.

    Args:
        input: shape ``(*, *normalized_shape)``, any layout; fp64, fp32, bf16 or fp16.
        normalized_shape: the trailing dimensions that make a row.
        weight, bias: shape ``normalized_shape``, in input's dtype, or fp32 for bf16 and fp16 input.
        eps: added to the variance.
        weight_offset: added to the weight, in fp32 (fp64 for fp64 input): 1.0 where a model keeps its weights about 0.
        memory_efficient: keep the output for backward instead of the input: see :func:`rms_norm`.

    Returns:
        A contiguous tensor of input's shape and dtype. Statistics and sums are taken in fp32 (fp64 for fp64 input).

    Raises:
        RuntimeError: shapes that do not fit, an empty ``normalized_shape``, parameters of another dtype or device, or a
            backend asked for by name that cannot run.
        NotImplementedError: a dtype layer_norm is not defined for.
        ValueError: a ``weight_offset`` without a weight.
        TypeError: arguments of the wrong type, as torch raises it.
    """
    if weight_offset:
        weight, bias = offset_weight(False, input, weight, bias, weight_offset)
    return _norm(layer_norm, False, input, normalized_shape, weight, bias, eps, False, memory_efficient)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Root-mean-square normalisation over the trailing dimensions: :func:`torch.nn.functional.rms_norm`, fused.

    ``y = x/sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019);
    derivation of the gradients in docs/math.md.

    Args:
        input: shape ``(*, *normalized_shape)``, any layout; fp64, fp32, bf16 or fp16 (complex goes to torch's own).
        normalized_shape: the trailing dimensions that make a row.
        weight: shape ``normalized_shape``, of any floating dtype.
        eps: added to the mean square; None is the machine epsilon of fp32 (fp64 for fp64 input), as in torch.
        weight_offset: added to the weight, in fp32 (fp64 for fp64 input): 1.0 for Gemma.
        cast_before_weight: round ``x/sqrt(...)`` to input's dtype before the multiplication, as Llama does. It says
            something for bf16 and fp16 alone, and nothing about the gradients.
        memory_efficient: keep the output for backward instead of the input. That saves memory where the output is kept
            anyway, as by a linear layer that follows, and the input is not. The normalised row is then recovered as
            ``(y - bias)/weight``, to y's own rounding; columns where the weight is zero, or smaller than the bias, are
            kept apart, and the whole input where they are more than half. On an accelerator finding them waits for the
            device once a call. Writing over the output before backward raises. Under torch.compile, torch.func and
            stream capture the option does nothing.

    Returns:
        A contiguous tensor of input's shape and dtype. Statistics and sums are taken in fp32 (fp64 for fp64 input).

    Raises:
        RuntimeError: shapes that do not fit, an empty ``normalized_shape``, a weight on another device, or a backend
            asked for by name that cannot run.
        ValueError: input with fewer dimensions than ``normalized_shape``, or a ``weight_offset`` without a weight.
        NotImplementedError: a dtype rms_norm is not defined for.
        TypeError: arguments of the wrong type, as torch raises it.
    """
    if weight_offset:
        weight, _ = offset_weight(True, input, weight, None, weight_offset)
    return _norm(rms_norm, True, input, normalized_shape, weight, None, eps, cast_before_weight, memory_efficient)


def offset_weight(
    rms: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float
) -> tuple[Tensor | None, Tensor | None]:
    """``weight + offset`` in fp32 or fp64, and the bias beside it: plain operations, whose derivatives are torch's.

    Layer norm's parameters of a dtype it refuses stay as they are, to be refused.
    """
    if weight is None:
        raise ValueError(f"weight_offset is {offset}, weight is None: there is nothing to add it to")
    if weight.dtype in LOW_PRECISION and (rms or x.dtype in LOW_PRECISION):
        bias = bias.float() if bias is not None and bias.dtype == weight.dtype else bias
        weight = weight.float()
    return weight + offset, bias


def _norm(
    public: object,
    rms: bool,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    cast: bool,
    memory_efficient: bool,
) -> Tensor:
    """Both norms: ``public`` is the function the user called, whose place a torch function mode may take."""
    if is_compiling() and not is_exporting():
        if transforms_active():  # torch.func takes no derivative of an operator, and gives zeros without a word
            return checked_norm(rms, x, shape, weight, bias, eps, cast, by_formulas=True)
        plan = dispatch.compile_plan("norm", x.device.type)
        if rms:
            return _rms_norm_op(x, shape, weight, eps, plan, cast)
        return _layer_norm_op(x, shape, weight, bias, eps, plan)
    # torch.export: the program must run, and be lowered, where this package is not.
    # torch.jit.trace: its graph can hold torch's operators alone.
    if is_compiling() or is_tracing():
        return torch_norm(rms, x, shape, weight, bias, eps, cast)
    n = dispatch.plain_row_length(x, shape, weight, bias)
    if not n:
        if (
            type(x) not in PLAIN
            or (weight is not None and type(weight) not in PLAIN)
            or (bias is not None and type(bias) not in PLAIN)
            or x.layout is not torch.strided
            or x.is_nested
        ):
            return torch_norm(rms, x, shape, weight, bias, eps, cast)
        if has_torch_function((x,)):  # x is plain, so this is a mode, such as a default device: it may see the call
            options = (("cast_before_weight", cast), ("memory_efficient", memory_efficient))
            options = {name: True for name, on in options if on}
            args = (x, shape, weight, eps) if rms else (x, shape, weight, bias, eps)
            return handle_torch_function(public, (x,), *args, **options)
    return checked_norm(rms, x, shape, weight, bias, eps, cast, memory_efficient, n)


def checked_norm(
    rms: bool,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    cast: bool = False,
    memory_efficient: bool = False,
    ordinary: int = 0,
    by_formulas: bool = False,
) -> Tensor:
    """Both norms of strided tensors that no one else is to see first: check, choose a backend, run it.

    ``ordinary``: the length of a row where nothing is left to check or to convert, else 0. ``by_formulas``: in
    operations that Dynamo can trace, instead of a backend.
    """
    n = ordinary or row_length(rms, x, shape, weight, bias)
    if n is None or type(eps) not in (float, int):
        if n is None or eps is not None or not rms:
            return torch_norm(rms, x, shape, weight, bias, eps, cast)
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps

    device_type = "cpu" if x.is_cpu else x.device.type
    if device_type != "cpu" and autocast_enabled(device_type):
        x, weight, bias = (t.float() if t is not None and t.dtype in LOW_PRECISION else t for t in (x, weight, bias))
    if not ordinary and (weight is not None or bias is not None):
        weight, bias = checked_params(rms, x, shape, weight, bias)
    cast = cast and weight is not None and x.dtype in LOW_PRECISION

    if not (ordinary or by_formulas):
        x, weight, bias = (None if t is None else _unwrap_if_dead(t) for t in (x, weight, bias))
        x = resolve(x) if x.is_neg() else x  # forward mode of forward mode loses its way in such a view
        by_formulas = legacy_batched(x, weight, bias) or functionalizing()
    if by_formulas and x.numel():
        return reference.norm_forward(x, weight, bias, n, 1, eps, rms, False, cast)[0]
    backend = None if by_formulas else dispatch.select("norm", device_type)
    if backend is None or not (ordinary or x.numel()):
        return torch_norm(rms, x, shape, weight, bias, eps, cast)
    if not ordinary:
        weight, bias = dense(weight), dense(bias)
    if transforms_active() or (
        _is_grad_enabled()
        and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        )
    ):
        if memory_efficient and not transforms_active():
            apart = NormKeepingOutput.columns_apart(weight, bias, n, x)
            if apart is not None:
                return NormKeepingOutput.call(x, weight, bias, apart, n, eps, rms, cast, backend)[0]
        return Norm.call(x, weight, bias, n, eps, rms, cast, backend)[0]
    if ordinary and not cast and x.is_contiguous():  # as_rows and the view of its result would do nothing
        return backend.norm_forward(x, weight, bias, n, 1, eps, rms, False)[0]
    return norm_forward(x, weight, bias, n, eps, rms, cast, backend)[0]


def _compiled_norm(rms: bool, x, shape, weight, bias, eps, cast: bool, plan: str) -> Tensor:
    """What AOTAutograd traces in the operators' place: the Functions of :mod:`.autograd`, and in them the kernels'."""
    traced = (FakeTensor, FunctionalTensor, *PLAIN)
    if any(t is not None and type(t) not in traced for t in (x, weight, bias)) or x.layout is not torch.strided:
        return torch_norm(rms, x, shape, weight, bias, eps, cast)
    with dispatch.planned(plan):
        return checked_norm(rms, x, tuple(map(int, shape)), weight, bias, eps, cast)


# Under torch.compile a call is one operator to Dynamo, which could trace neither the choice of a backend nor a Function
# with forward mode. AOTAutograd takes it apart: the graph holds the operators of the backend's kernels.
_layer_norm_op = ops.composite(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, str plan) -> Tensor",
    lambda x, shape, weight, bias, eps, plan: _compiled_norm(False, x, shape, weight, bias, eps, False, plan),
)
_rms_norm_op = ops.composite(
    "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, float? eps, str plan, bool cast=False)"
    " -> Tensor",
    lambda x, shape, weight, eps, plan, cast=False: _compiled_norm(True, x, shape, weight, None, eps, cast, plan),
)


def torch_norm(rms, x, shape, weight, bias, eps, cast: bool = False) -> Tensor:
    """torch's own function, made to take fp32 parameters beside bf16 and fp16 input on every device."""
    if cast and weight is not None:
        xhat = torch_norm(rms, x, shape, None, None, eps)
        return (xhat * weight).to(xhat.dtype)
    if rms:
        y = F.rms_norm(x, shape, weight, eps)
        return y.contiguous() if type(y) is Tensor and y.layout is torch.strided else y
    if (
        isinstance(x, Tensor)
        and not x.is_cpu
        and x.dtype in LOW_PRECISION
        and any(isinstance(p, Tensor) and p.dtype == torch.float32 for p in (weight, bias))
    ):
        return F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, shape, weight, bias, eps)


def row_length(rms: bool, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> int | None:
    """The number of elements in a row; None where torch's own function should answer (or raise TypeError).

    Raises the exception class that torch raises for the same function, with both values in the message.
    """
    if type(shape) not in (tuple, list, torch.Size):
        return None
    n = 1
    for d in shape:
        if type(d) is not int:
            return None
        n *= d
    k, given = len(shape), x.shape
    if k == 0:
        raise RuntimeError(
            f"normalized_shape must have at least one dimension, but is () for input of shape {tuple(given)}"
        )
    if given[-k:] != tuple(shape) or len(given) < k:
        message = f"input has shape {tuple(given)}, whose trailing dimensions are not normalized_shape {tuple(shape)}"
        # torch's rms_norm counts dimensions first, and with another class
        raise ValueError(message) if rms and len(given) < k else RuntimeError(message)
    if x.dtype in DTYPES or (rms and x.is_complex()):
        return n if x.dtype in DTYPES else None
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.dtype != x.dtype and not rms:  # torch's layer_norm compares dtypes first
            raise RuntimeError(f"{name} is {p.dtype}, input is {x.dtype}: layer_norm takes {DTYPE_NAMES}")
    raise NotImplementedError(
        f"{'rms_norm' if rms else 'layer_norm'} is not defined for input of {x.dtype}; it takes {DTYPE_NAMES}"
    )


def checked_params(
    rms: bool, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in a dtype that the kernels take: x's, or fp32. Raises where torch raises."""
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        if p.shape != tuple(shape):
            raise RuntimeError(f"{name} has shape {tuple(p.shape)}, normalized_shape is {tuple(shape)}")
        if p.device != x.device:
            raise RuntimeError(f"{name} is on device {p.device}, input is on {x.device}")
    if rms:
        if weight.dtype != x.dtype and weight.dtype != torch.float32:
            if weight.is_complex():
                raise RuntimeError(f"weight is {weight.dtype}, input is {x.dtype}: a real input takes a real weight")
            weight = weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        elif x.dtype == torch.float64:
            weight = weight.double()
    else:
        p = weight if weight is not None else bias
        if bias is not None and bias.dtype != p.dtype:
            raise RuntimeError(f"weight is {p.dtype}, bias is {bias.dtype}: they must have the same dtype")
        if p.dtype != x.dtype and not (p.dtype == torch.float32 and x.dtype in LOW_PRECISION):
            name = "weight" if weight is not None else "bias"
            raise RuntimeError(
                f"{name} is {p.dtype}, input is {x.dtype}: parameters must have input's dtype,"
                " or float32 for bfloat16 and float16"
            )
    return weight, bias
