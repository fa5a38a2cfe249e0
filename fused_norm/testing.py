"""What our tests and a user's CI check with: the fp64 truth, error measures, how large an error may be, and the
gradient checks of ``python -m fused_norm gradcheck``.

The checks, in a CI of yours::

    from fused_norm.testing import gradchecks, run_gradchecks

    for check, failure, seconds in run_gradchecks(list(gradchecks(devices=["cuda"]))):
        assert failure is None, f"{check}: {failure}"
"""

from __future__ import annotations

import itertools
import math
import re
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from . import dispatch, reference
from . import functional as FF

#: The error allowed for y and dx, as a multiple of torch's own error against the fp64 truth on the same inputs.
TORCH_FACTOR = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 1.5, torch.float64: 1.5}

#: The same bound where torch happens to be exact (small sizes), as a multiple of the error of rounding the truth once.
#: An element of y or dx takes about four roundings in fp32 and fp64; in bf16 and fp16 only the last of them counts.
ROUNDING_FACTOR = {torch.bfloat16: 1.05, torch.float16: 1.05, torch.float32: 4.0, torch.float64: 4.0}

#: The error allowed for dw and db, likewise: in bf16 and fp16 whatever torch's own error; in fp32 and fp64 where torch
#: happens to be exact (a sum over rows of terms that took those four roundings; the fp64 truth has them too).
PARAM_ROUNDING_FACTOR = {torch.bfloat16: 3.0, torch.float16: 3.0, torch.float32: 8.0, torch.float64: 8.0}


@dataclass(frozen=True)
class NormResult:
    """Output and gradients of one layer_norm or rms_norm; what was not computed is None."""

    y: Tensor
    dx: Tensor | None = None
    dw: Tensor | None = None
    db: Tensor | None = None


def _fp64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


def norm_truth(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, n: int, eps: float, rms: bool, groups: int = 1
) -> NormResult:
    """The fp64 truth for these very inputs: rows of ``n`` elements, ``groups`` as in :mod:`fused_norm.backends`.

    ``dw`` and ``db`` have shape ``(groups, n)`` and are given whether or not there is a weight or a bias.
    """
    x64, w64, b64, dy64 = (_fp64(t) for t in (x, weight, bias, dy))
    y, stats = reference.norm_forward(x64, w64, b64, n, groups, eps, rms, True)
    dx, dw, db = reference.norm_backward(
        dy64, x64, stats, w64, n, groups, rms, torch.float64, need_dx=True, need_dw=True, need_db=True
    )
    return NormResult(y, dx, dw, db)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """``||actual - truth|| / ||truth||`` in fp64, over the elements where the truth is finite.

    Where the truth is zero it is ``||actual||``. It is inf if sizes differ or NaN and Inf stand in other places.
    """
    if actual.numel() != truth.numel():
        return float("inf")
    a, t = actual.detach().double().reshape(-1), truth.detach().double().reshape(-1).to(actual.device)
    norm, error = t.norm().item(), (a - t).norm().item()
    if math.isfinite(norm) and math.isfinite(error):  # so are all the numbers
        return error / norm if norm else error
    finite = torch.isfinite(t)
    if not torch.equal(torch.isfinite(a), finite) or not torch.allclose(a[~finite], t[~finite], equal_nan=True):
        return float("inf")
    a, t = a[finite], t[finite]
    norm = t.norm().item()
    error = (a - t).norm().item()
    return error / norm if norm else error


def one_rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """The relative error of rounding ``truth`` to ``dtype`` once: the least that any kernel can reach."""
    return relative_error(truth.to(dtype), truth)


def typical_rounding(dtype: torch.dtype) -> float:
    """The relative L2 error of rounding well-spread numbers to ``dtype``: about 0.4 times half the machine epsilon."""
    return 0.4 * torch.finfo(dtype).eps / 2


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    return max(one_rounding(truth, dtype), typical_rounding(dtype))


def error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for y or dx, given torch's own."""
    return max(TORCH_FACTOR[dtype] * torch_error, ROUNDING_FACTOR[dtype] * _rounding(truth, dtype))


def param_error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for dw or db, given torch's own, which counts in fp32 and fp64 alone."""
    rounding = PARAM_ROUNDING_FACTOR[dtype] * _rounding(truth, dtype)
    return rounding if dtype in (torch.bfloat16, torch.float16) else max(TORCH_FACTOR[dtype] * torch_error, rounding)


@dataclass(frozen=True)
class Comparison:
    """One tensor's error against the truth, and the limit it must keep."""

    name: str
    error: float
    limit: float
    dtype: torch.dtype
    torch_error: float | None = None

    @property
    def ratio(self) -> float:
        return math.inf if math.isnan(self.error) else self.error / self.limit

    def __str__(self) -> str:
        torch_error = "" if self.torch_error is None else f", torch's error {self.torch_error:.3g}"
        sign = "<=" if self.ratio <= 1 else ">"
        return f"{self.name}: error {self.error:.3g} {sign} limit {self.limit:.3g} ({self.dtype}{torch_error})"


def _norm_limit(name: str) -> Callable[[Tensor, torch.dtype, float], float]:
    """The rule for a tensor; y's forward-mode derivative, y', takes about as many roundings as dx."""
    return param_error_limit if name in ("dw", "db") else error_limit


def assert_norm_close(actual: NormResult, truth: NormResult, torch_result: NormResult) -> None:
    """Assert that every tensor of ``actual`` is as near the fp64 ``truth`` as the rules above demand.

    ``torch_result`` holds what torch computes from the same inputs (None where torch cannot: only the rounding rule
    counts then). Raises AssertionError naming the tensor, its error, torch's and the limit.
    """
    for name in ("y", "dx", "dw", "db"):
        a, t, ref = getattr(actual, name), getattr(truth, name), getattr(torch_result, name)
        if a is not None:
            done = _compare(name, a, t, ref, _norm_limit(name))
            assert done.ratio <= 1, str(done)


def _compare(
    name: str,
    actual: Tensor,
    truth: Tensor,
    torch_result: Tensor | None,
    limit: Callable[[Tensor, torch.dtype, float], float],
    torch_counts: float = math.inf,
) -> Comparison:
    torch_error = 0.0 if torch_result is None else relative_error(torch_result, truth)
    allowed = limit(truth, actual.dtype, min(torch_error, torch_counts))
    return Comparison(name, relative_error(actual, truth), allowed, actual.dtype, torch_error)


# ------------------------------------------------------------------------------------------------- what can be checked

#: The relative error allowed in fp64 where two ways to the same derivative are compared: a million roundings, and far
#: less than any mistake makes.
FP64_LIMIT = 1e-10

#: The error allowed to the norms in a check, as a multiple of the rules above. Those are for the tests' inputs; here a
#: few rows are whatever a seed drew, and where their terms cancel, the roundings before count for more. (In bf16 and
#: fp16 only the last rounding counts; in fp64 the truth has roundings too.)
SEED_FACTOR = {torch.float32: 2.0, torch.float64: 2.0}

#: torch's own error counts up to so many roundings. On random input it has about 4 at most, in fp64, fp32, bf16 and
#: fp16, forward mode too; far beyond, torch is wrong, and no excuse for another.
TORCH_ROUNDINGS = 8.0

#: The limit's multiple in bf16 in Triton's interpreter, which truncates (twice the error) where hardware rounds.
INTERPRETER_FACTOR = 3.0

#: x's dtype, and the parameters' where it is another.
_DTYPES = (
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


@dataclass
class Draw:
    """Random tensors for one check, the same on every device."""

    generator: torch.Generator
    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, layout: str = "contiguous") -> Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if not shape:
            t = 0.5 + t.abs()  # the upstream gradient of a loss: near zero, fp16 would have few digits of it
        t = t.to(self.device, dtype or self.dtype)
        if layout == "row-strided":
            return F.pad(t, (0, 3))[..., : shape[-1]]
        if layout == "transposed":
            return t.mT.contiguous().mT
        return t

    def param(self, *shape: int) -> Tensor:
        return self(*shape, dtype=self.param_dtype)

    def like(self, t: Tensor, layout: str) -> Tensor:
        return self(*t.shape, dtype=t.dtype, layout=layout if t.dim() > 1 else "contiguous")

    def targets(self, *shape: int, classes: int, ignored: int) -> Tensor:
        """Class indices, the first of which is ``ignored``."""
        t = torch.randint(classes, shape, generator=self.generator)
        t.view(-1)[0] = ignored
        return t.to(self.device)


@dataclass(frozen=True)
class Sample:
    """One drawing of an operation's arguments. ``inputs``, by name, are what is differentiated; the first gives the
    results' dtype. ``fixed`` is whatever else the operation takes."""

    label: str
    inputs: dict[str, Tensor]
    fixed: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"


Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class TorchLimit:
    """What torch's own function gets wrong, and so the backend ``torch``: a failure that is expected, if it says so."""

    applies: Callable[[GradCheck], bool]
    match: str
    reason: str


@dataclass(frozen=True)
class Operation:
    """An entry of :data:`OPERATIONS`: all that the checks know of an operation.

    ``samples(mode, slow, draw)`` yields the inputs for a mode (few and small ones if slow). ``call(namespace, sample,
    **inputs)`` calls the operation in ``fused_norm.functional``, or in ``torch.nn.functional`` if it is there.
    ``formula(sample, **inputs)`` is the same from elementary operations, whose derivatives of every order torch has
    right. ``vjp(sample, upstream)`` and ``jvp(sample, tangents)`` are the fp64 truth by explicit formulas: (outputs,
    then gradients) and (outputs, then their derivatives); without them it is the formula's. ``limit(name)`` is the
    rule for a tensor's error, by name: an output's, a gradient's (d and the input) or a derivative's (output and ').
    """

    name: str
    kernel: str
    samples: Callable[[str, bool, Draw], Iterator[Sample]]
    call: Callable[..., Tensor | Tensors]
    formula: Callable[..., Tensor | Tensors]
    limit: Callable[[str], Callable[[Tensor, torch.dtype, float], float]]
    vjp: Callable[[Sample, Tensors], Tensors] | None = None
    jvp: Callable[[Sample, Tensors], Tensors] | None = None
    outputs: tuple[str, ...] = ("y",)
    modes: tuple[str, ...] = ("vjp", "jvp", "gradcheck", "gradgradcheck", "vmap", "hessian")
    mixed: bool = False  # whether it takes fp32 parameters beside bf16 and fp16 input
    parts: bool = False  # whether ``call`` makes it of several of torch's functions, where torch has none for it
    torch_limits: tuple[TorchLimit, ...] = ()


def _norm_samples(rms: bool, mode: str, slow: bool, draw: Draw) -> Iterator[Sample]:
    if mode in ("vjp", "jvp"):
        cases = [
            ((3, 4, 37), 1, "contiguous", True),
            ((2, 1000), 1, "contiguous", True),
            ((9, 37), 1, "row-strided", True),
            ((12, 65), 1, "transposed", True),
            ((8, 5, 7), 2, "contiguous", True),
            ((6, 48), 1, "contiguous", False),
        ]
        if slow:
            cases = [((2, 37), 1, "row-strided", True), ((1, 1000), 1, "contiguous", True), *cases[-1:]]
    elif slow:
        cases = [((2, 3), 1, "contiguous", True)]
    else:
        cases = [((2, 3, 5), 1, "contiguous", True)]
        if mode != "hessian":
            cases += [((3, 4), 1, "transposed", True), ((2, 3), 1, "contiguous", False)]
    for shape, dims, layout, params in cases:
        normalized = shape[-dims:]
        inputs = {"x": draw(*shape, layout=layout)}
        if params:
            inputs["w"] = draw.param(*normalized)
        if params and not rms:
            inputs["b"] = draw.param(*normalized)
        words = ["x".join(map(str, shape)), *(["rows of 2-D"] if dims > 1 else [])]
        words += [layout] if layout != "contiguous" else [] if params else ["no parameters"]
        yield Sample(", ".join(words), inputs, {"shape": normalized, "eps": 1e-5, "rms": rms}, layout)


def _norm_call(namespace: ModuleType, sample: Sample, x: Tensor, w: Tensor | None = None, b: Tensor | None = None):
    shape, eps = sample.fixed["shape"], sample.fixed["eps"]
    return namespace.rms_norm(x, shape, w, eps) if sample.fixed["rms"] else namespace.layer_norm(x, shape, w, b, eps)


def _norm_formula(sample: Sample, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    dims = tuple(range(-len(sample.fixed["shape"]), 0))
    centred = x if sample.fixed["rms"] else x - x.mean(dims, keepdim=True)
    y = centred / ((centred * centred).mean(dims, keepdim=True) + sample.fixed["eps"]).sqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def _norm_vjp(sample: Sample, upstream: Tensors) -> Tensors:
    x, w, b = (sample.inputs.get(name) for name in ("x", "w", "b"))
    n = math.prod(sample.fixed["shape"])
    truth = norm_truth(x, w, b, upstream[0], n, sample.fixed["eps"], sample.fixed["rms"])
    return truth.y, *(getattr(truth, f"d{name}") for name in sample.inputs)


def _norm_jvp(sample: Sample, tangents: Tensors) -> Tensors:
    x, w, b = (_fp64(sample.inputs.get(name)) for name in ("x", "w", "b"))
    n, rms = math.prod(sample.fixed["shape"]), sample.fixed["rms"]
    y, stats = reference.norm_forward(x, w, b, n, 1, sample.fixed["eps"], rms, True)
    dx, dw, db = (*map(_fp64, tangents), None, None)[:3]
    derivative, _, _ = reference.norm_double_backward(
        dx, dw, db, None, x, stats, w, n, 1, rms, torch.float64, need_ddy=True, need_dx=False, need_dw=False
    )
    return y, derivative


def _seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that draws the same mask each time."""
    device = args[0].device.type
    with _own_rng(device):
        torch.manual_seed(7)
        return function(*args, **kwargs)


def _add_norm_samples(rms: bool, mode: str, slow: bool, draw: Draw) -> Iterator[Sample]:
    for sample in _norm_samples(rms, mode, slow, draw):
        x, *params = sample.inputs.items()
        inputs = dict([x, ("r", draw.like(x[1], "contiguous")), *params])
        # Not where vmap would refuse to draw, nor where torch's own dropout draws, which does so in its own way in each
        # mode and rounds its result.
        ours = dispatch.select("norm", draw.device) is not None
        drops = ours and draw.dtype in (torch.float64, torch.float32)
        drops = drops and (mode == "gradgradcheck" or (mode == "vjp" and not slow))
        for p in (0.0, 0.25) if drops else (0.0,):
            label = f"{sample.label}, dropout" if p else sample.label
            yield replace(sample, label=label, inputs=inputs, fixed=sample.fixed | {"dropout_p": p})


def _add_norm_call(
    namespace: ModuleType, sample: Sample, x: Tensor, r: Tensor, w: Tensor | None = None, b: Tensor | None = None
) -> Tensors:
    fixed = sample.fixed
    if namespace is F:
        if fixed["dropout_p"]:
            raise RuntimeError("torch's dropout draws another mask")
        return _norm_call(F, sample, x + r, w, b), x + r
    args = (x, r, fixed["shape"], w, *([] if fixed["rms"] else [b]), fixed["eps"])
    function = namespace.add_rms_norm if fixed["rms"] else namespace.add_layer_norm
    if not fixed["dropout_p"]:
        return function(*args)
    return _seeded(function, *args, dropout_p=fixed["dropout_p"])


def _add_norm_mask(sample: Sample, x: Tensor) -> Tensor:
    """What dropout multiplies by in :func:`_add_norm_call`, as the backend in use draws it; 1.0 without dropout."""
    if not sample.fixed["dropout_p"]:
        return torch.ones((), dtype=torch.float64, device=x.device)
    ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    return _add_norm_call(FF, sample, ones, torch.zeros_like(ones))[1].double()


def _add_norm_formula(sample: Sample, x: Tensor, r: Tensor, w: Tensor | None = None, b: Tensor | None = None):
    summed = x * _add_norm_mask(sample, x).to(x.dtype) + r
    return _norm_formula(sample, summed, w, b), summed


def _add_norm_sum(sample: Sample, x: Tensor, r: Tensor) -> Tensor:
    """The sum rounded to x's dtype: it is the norm's input."""
    return (x.double() * _add_norm_mask(sample, x) + r.double()).to(x.dtype)


def _add_norm_vjp(sample: Sample, upstream: Tensors) -> Tensors:
    x, r, *params = sample.inputs.items()
    summed = _add_norm_sum(sample, x[1], r[1])
    truth = _norm_vjp(replace(sample, inputs=dict([("x", summed), *params])), upstream)
    d = truth[1] + upstream[1].double()
    return truth[0], summed.double(), d * _add_norm_mask(sample, x[1]), d, *truth[2:]


def _add_norm_jvp(sample: Sample, tangents: Tensors) -> Tensors:
    x, r, *params = sample.inputs.items()
    summed, direction = (_add_norm_sum(sample, *pair) for pair in ((x[1], r[1]), tangents[:2]))
    y, derivative = _norm_jvp(replace(sample, inputs=dict([("x", summed), *params])), (direction, *tangents[2:]))
    return y, summed.double(), derivative, direction.double()


def _norm_check_limit(name: str) -> Callable[[Tensor, torch.dtype, float], float]:
    rule = _norm_limit(name)
    return lambda truth, dtype, torch_error: SEED_FACTOR.get(dtype, 1.0) * rule(truth, dtype, torch_error)


#: Every option at once, of the functions that have them; ticks_loss has the first two alone.
_TICKS_OPTIONS = {"label_smoothing": 0.1, "weight": True, "z_loss_weight": 0.3, "softcap": 4.0}


def _ticks_samples(named: tuple[str, ...], linear: bool, mode: str, slow: bool, draw: Draw) -> Iterator[Sample]:
    # The derivative of a mean over rows is a sum that may cancel, of whose digits few would be left to compare.
    reductions = ("none",) if mode == "jvp" else ("mean", "none")
    shapes = ((6, 7), (2, 5, 3))
    for kind, reduction, shape in itertools.product(("plain", "options", "soft"), reductions, shapes[: 2 - linear]):
        if (kind == "plain" and (reduction == "mean") != (shape is shapes[0]) and not linear) or (
            kind != "plain" and (shape is not shapes[0] or reduction == reductions[0] or (slow and kind == "soft"))
        ):
            continue  # each kind, shape and reduction once
        fixed: dict[str, Any] = {"reduction": reduction}
        z = draw(*shape)
        if linear:
            inputs = {"x": draw(6, 4), "w": draw(7, 4), "b": draw(7)}
            fixed["chunk_bytes"] = 4 * 7 * z.element_size()  # chunks of four rows at most
        else:
            inputs = {"z": z}
        if kind == "soft":
            inputs["a"] = torch.softmax(draw(*shape).double(), 1).to(z.dtype)
        else:
            fixed["target"] = draw.targets(shape[0], *shape[2:], classes=shape[1], ignored=-100)
        if kind != "plain":
            fixed |= {name: _TICKS_OPTIONS[name] for name in named}
            fixed["weight"] = draw(shape[1]).abs() + z.new_tensor(0.5)
        yield Sample(f"{'x'.join(map(str, shape))}, {kind}, {reduction}", inputs, fixed)


def _ticks_call(name: str, namespace: ModuleType, sample: Sample, **inputs: Tensor) -> Tensor:
    """``a`` is a soft target, ``x``, ``w`` and ``b`` hidden states and classifier."""
    fixed = dict(sample.fixed)
    target = inputs.pop("a") if "a" in inputs else fixed.pop("target")
    first, *rest = inputs.values()
    if not rest:
        return getattr(namespace, name)(first, target, **fixed)
    return getattr(namespace, name)(first, rest[0], target, rest[1], **fixed)


def _ticks_formula(coefficients: tuple[float, float], sample: Sample, z: Tensor | None = None, **inputs: Tensor):
    """By definition: log_softmax, a mass for each class, a sum."""
    ce, ticks = coefficients
    fixed = sample.fixed
    z = F.linear(*(inputs[name] for name in "xwb")) if z is None else z
    softcap, smoothing, weight = (fixed.get(name) for name in ("softcap", "label_smoothing", "weight"))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    classes, shape = z.shape[1], (1, -1, *(1,) * (z.dim() - 2))
    if "a" in inputs:
        mass, keep = inputs["a"], torch.ones(z.shape[0], *z.shape[2:], dtype=torch.bool, device=z.device)
        divisor = keep.sum()
    else:
        keep = fixed["target"] != -100
        target = torch.where(keep, fixed["target"], 0)
        mass = F.one_hot(target, classes).movedim(-1, 1).to(z.dtype)
        divisor = (keep if weight is None else keep * weight.to(z.dtype)[target]).sum()
    mass = mass if smoothing is None else (1 - smoothing) * mass + smoothing / classes
    mass = mass if weight is None else mass * weight.to(z.dtype).view(shape)
    log_p = F.log_softmax(z, 1)
    loss = (mass * (ticks * (log_p.exp() - log_p) - ce * log_p)).sum(1) * keep
    z_loss = fixed.get("z_loss_weight", 0.0) * torch.logsumexp(z, 1).square() * keep
    return loss.sum() / divisor + z_loss.sum() / keep.sum() if fixed["reduction"] == "mean" else loss + z_loss


def _ticks_limit(name: str) -> Callable[[Tensor, torch.dtype, float], float]:
    factor = 16 if name.endswith("'") else 4  # a row's derivative is a sum that may cancel
    return lambda truth, dtype, torch_error: factor * torch.finfo(dtype).eps


_WRONG_HESSIAN = TorchLimit(
    lambda check: check.mode == "hessian",
    match="d2/d",
    reason="torch's F.layer_norm loses terms of its Hessian's mixed blocks under torch.func",
)
_TANGENT_DTYPE = TorchLimit(
    lambda check: check.mode == "jvp" and check.param_dtype is not None and check.device == "cpu",
    match="y' is torch.float32",
    reason="torch's F.layer_norm gives a derivative of the parameters' dtype, not the output's",
)


def _norm(name: str, rms: bool, **options: Any) -> Operation:
    return Operation(
        name,
        "norm",
        samples=partial(_norm_samples, rms),
        call=_norm_call,
        formula=_norm_formula,
        limit=_norm_check_limit,
        vjp=_norm_vjp,
        jvp=_norm_jvp,
        mixed=True,
        **options,
    )


def _add_norm(name: str, rms: bool, **options: Any) -> Operation:
    return Operation(
        name,
        "norm",
        samples=partial(_add_norm_samples, rms),
        call=_add_norm_call,
        formula=_add_norm_formula,
        limit=_norm_check_limit,
        vjp=_add_norm_vjp,
        jvp=_add_norm_jvp,
        parts=True,
        outputs=("y", "summed"),
        mixed=True,
        **options,
    )


def _ticks(name: str, coefficients: tuple[float, float], linear: bool = False, **options: Any) -> Operation:
    named = ("label_smoothing", "weight") if name.endswith("ticks_loss") else tuple(_TICKS_OPTIONS)
    return Operation(
        name,
        "ticks",
        samples=partial(_ticks_samples, named, linear),
        call=lambda namespace, sample, **inputs: _ticks_call(
            name, namespace, replace(sample, fixed=sample.fixed | options), **inputs
        ),
        formula=partial(_ticks_formula, coefficients),
        limit=_ticks_limit,
        outputs=("loss",),
    )


#: What is checked, by name.
OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        _norm("layer_norm", rms=False, torch_limits=(_WRONG_HESSIAN, _TANGENT_DTYPE)),
        _norm("rms_norm", rms=True),
        _add_norm("add_layer_norm", rms=False, torch_limits=(_WRONG_HESSIAN, _TANGENT_DTYPE)),
        _add_norm("add_rms_norm", rms=True),
        _ticks("ticks_cross_entropy", (1.0, 0.5), ticks_weight=0.5),
        _ticks("ticks_loss", (0.0, 1.0)),
        _ticks("linear_ticks_cross_entropy", (1.0, 0.5), linear=True, ticks_weight=0.5),
        _ticks("linear_ticks_loss", (0.0, 1.0), linear=True),
    )
}


# ------------------------------------------------------------------------------------------------------ how it is done


def _tuple(outputs: Tensor | Tensors) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _positional(function: Callable[..., Any], sample: Sample) -> Callable[..., Tensors]:
    """``function(sample, **inputs)`` as one of the inputs in their order, which gives a tuple."""
    return lambda *inputs: _tuple(function(sample, **dict(zip(sample.inputs, inputs, strict=True))))


def _weighted(function: Callable[..., Tensors], weights: Tensors) -> Callable[..., Tensor]:
    """A number with derivatives of every order in all inputs: that of the results' sines."""
    return lambda *inputs: sum((y.sin() * r).sum() for y, r in zip(function(*inputs), weights, strict=True))


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(t.detach().requires_grad_() for t in tensors)


class _Run:
    """One check at work on one sample."""

    def __init__(self, check: GradCheck, op: Operation, sample: Sample, draw: Draw) -> None:
        self.check, self.op, self.sample, self.draw = check, op, sample, draw
        self.inputs = tuple(sample.inputs.values())
        self.ours = _positional(partial(op.call, FF), sample)
        self.formula = _positional(op.formula, sample)
        self.gradients = tuple(f"d{name}" for name in sample.inputs)

    def _torch(self, run: Callable[[Callable[..., Tensors]], Tensors], results: int) -> tuple[Tensor | None, ...]:
        """What torch's own function gives, or as many Nones: where it has none, or cannot."""
        if not (self.op.parts or hasattr(F, self.op.name)):
            return (None,) * results
        try:
            return run(_positional(partial(self.op.call, F), self.sample))
        except RuntimeError:
            return (None,) * results

    def _compare(self, names: Tensors, actual: Tensors, truth: Tensors, torch_results: tuple) -> Iterator[Comparison]:
        dtype = self.inputs[0].dtype
        for name, a, t, r in zip(names, actual, truth, torch_results, strict=True):
            if not name.startswith("d") and (a.dtype != dtype or a.shape != t.shape):
                raise AssertionError(
                    f"{name} is {a.dtype} {tuple(a.shape)}, where {dtype} {tuple(t.shape)} was expected"
                )
            done = _compare(name, a, t, r, self.op.limit(name), TORCH_ROUNDINGS * _rounding(t, a.dtype))
            if self.check.backend == "torch" and r is not None:
                # It is no worse than itself, within reason: on a CPU it sums fp32 dw and db of bf16 input in bf16.
                own = error_limit(t, dtype, min(done.torch_error, TORCH_ROUNDINGS * _rounding(t, dtype)))
                done = replace(done, limit=max(done.limit, own))
            if self.check.interpreted and dtype == torch.bfloat16:
                if self.op.parts:  # their sum is rounded to bf16, which fp32 dw and db tell of
                    done = replace(done, limit=max(done.limit, error_limit(t, dtype, 0.0)))
                if self.op.parts or a.dtype == dtype:
                    done = replace(done, limit=INTERPRETER_FACTOR * done.limit)
            yield done

    def vjp(self) -> Iterator[Comparison]:
        leaves = _leaves(self.inputs)
        outputs = self.ours(*leaves)
        upstream = tuple(self.draw.like(y, self.sample.layout) for y in outputs)

        def run(function: Callable[..., Tensors], outputs: Tensors | None = None) -> Tensors:
            outputs = function(*leaves) if outputs is None else outputs
            return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

        actual = run(self.ours, outputs)
        if self.op.vjp:
            truth = self.op.vjp(self.sample, upstream)
        else:
            exact = _leaves(tuple(map(_fp64, self.inputs)))
            results = self.formula(*exact)
            truth = (*results, *torch.autograd.grad(results, exact, tuple(map(_fp64, upstream))))
        yield from self._compare((*self.op.outputs, *self.gradients), actual, truth, self._torch(run, len(actual)))

    def jvp(self) -> Iterator[Comparison]:
        tangents = tuple(self.draw.like(t, self.sample.layout) for t in self.inputs)

        def run(function: Callable[..., Tensors]) -> Tensors:
            outputs, derivatives = torch.func.jvp(function, self.inputs, tangents)
            return (*outputs, *derivatives)

        actual = run(self.ours)
        if self.op.jvp:
            truth = self.op.jvp(self.sample, tangents)
        else:
            exact, directions = (tuple(map(_fp64, ts)) for ts in (self.inputs, tangents))
            truth = tuple(itertools.chain(*torch.func.jvp(self.formula, exact, directions)))
        names = (*self.op.outputs, *(f"{name}'" for name in self.op.outputs))
        yield from self._compare(names, actual, truth, self._torch(run, len(actual)))

    def gradcheck(self) -> Iterator[Comparison]:
        torch.autograd.gradcheck(
            *(self.ours, _leaves(self.inputs)),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        return iter(())

    def gradgradcheck(self) -> Iterator[Comparison]:
        upstream = tuple(self.draw.like(y, self.sample.layout) for y in self.ours(*self.inputs))
        torch.autograd.gradgradcheck(
            *(self.ours, _leaves(self.inputs), _leaves(upstream)), check_fwd_over_rev=True, check_batched_grad=True
        )
        return iter(())

    def vmap(self) -> Iterator[Comparison]:
        """Each example's gradients of all inputs against a loop's: the parameters shared, then one set an example."""
        batch = 3
        outputs = self.ours(*self.inputs)
        loss = _weighted(self.ours, tuple(self.draw.like(y, "contiguous") for y in outputs))
        gradient = torch.func.grad(loss, argnums=tuple(range(len(self.inputs))))
        batches = tuple(self.draw(batch, *t.shape, dtype=t.dtype) for t in self.inputs)
        shared = (batches[0], *self.inputs[1:]), (0, *(None for _ in self.inputs[1:]))
        # The examples' dimension is where others would take it for their own.
        apart = (batches[0].movedim(0, 1), *batches[1:]), (1, *(0 for _ in self.inputs[1:]))
        for what, (tensors, dims) in {"": shared, ", all apart": apart}.items():
            actual = torch.func.vmap(gradient, dims)(*tensors)
            loop = []
            for i in range(batch):
                leaves = _leaves(tuple(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)))
                loop.append(torch.autograd.grad(loss(*leaves), leaves))
            for name, a, *exact in zip(self.gradients, actual, *loop, strict=True):
                yield Comparison(name + what, relative_error(a, torch.stack(exact)), FP64_LIMIT, a.dtype)

    def hessian(self) -> Iterator[Comparison]:
        """All blocks, mixed ones too, against the formula's."""
        weights = tuple(self.draw.like(y, "contiguous") for y in self.ours(*self.inputs))
        argnums = tuple(range(len(self.inputs)))
        blocks, exact = (
            torch.func.hessian(_weighted(function, weights), argnums=argnums)(*self.inputs)
            for function in (self.ours, self.formula)
        )
        for (i, first), (j, second) in itertools.product(enumerate(self.gradients), repeat=2):
            error = relative_error(blocks[i][j], exact[i][j])
            yield Comparison(f"d2/{first} {second}", error, FP64_LIMIT, torch.float64)


# ---------------------------------------------------------------------------------------------------------- the checks


@dataclass(frozen=True)
class GradResult:
    """What became of a check.

    ``status`` is ``"ok"``, ``"fail"``, ``"xfail"`` (it failed in the way that is known of torch's own function) or
    ``"xpass"`` (it should have). ``worst`` is the tensor nearest to its limit, or furthest beyond it; None where
    torch's finite differences judge. ``failure`` says what is wrong, for xfail too; ``detail`` where, if it raised.
    """

    check: GradCheck
    status: str
    seconds: float
    worst: Comparison | None = None
    failure: str | None = None
    detail: str | None = None


def _own_rng(device: str) -> AbstractContextManager:
    """What is drawn inside leaves the caller's random numbers as they were."""
    if device == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.accelerator.current_device_index()], device_type=device)


@dataclass(frozen=True)
class GradCheck:
    """One check of an operation's gradients on one backend: an operation of :data:`OPERATIONS`, in one dtype and mode.

    ==================  ===========================================================================================
    mode                what is compared
    ==================  ===========================================================================================
    ``vjp``             outputs and gradients with the fp64 truth, random upstream gradients, several layouts
    ``jvp``             forward mode with the fp64 truth, random tangents, several layouts
    ``gradcheck``       first derivatives (reverse and forward mode, both batched too) with finite differences; fp64
    ``gradgradcheck``   second derivatives (reverse and forward over reverse, batched too) likewise; fp64
    ``vmap``            per-sample gradients of all inputs with a loop's; fp64
    ``hessian``         ``torch.func.hessian`` in all inputs, mixed blocks too, with that of elementary operations; fp64
    ==================  ===========================================================================================

    ``param_dtype`` is None where the parameters have ``dtype`` too.
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    mode: str
    param_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        dtypes = "+".join(str(d).removeprefix("torch.") for d in (self.dtype, self.param_dtype) if d is not None)
        return f"{self.op}-{self.backend}-{self.device}-{dtypes}-{self.mode}"

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def expected_failure(self) -> TorchLimit | None:
        """What torch itself gets wrong here, if anything is known."""
        limits = OPERATIONS[self.op].torch_limits if self.backend == "torch" else ()
        return next((limit for limit in limits if limit.applies(self)), None)

    def run(self, seed: int = 0) -> str | None:
        """None if the gradients are right (or as wrong as torch's are known to be), else what is wrong with them."""
        result = self.result(seed)
        return result.failure if result.status == "fail" else None

    def result(self, seed: int = 0) -> GradResult:
        """Run the check. The same seed draws the same numbers, on every backend, whatever else is run."""
        start = time.perf_counter()
        op = OPERATIONS[self.op]
        seed = zlib.crc32(f"{self.op}-{self.mode}-{seed}".encode())
        draw = Draw(torch.Generator().manual_seed(seed), self.device, self.dtype, self.param_dtype or self.dtype)
        slow = self.interpreted  # 10 ms for what takes 10 µs
        done: list[Comparison] = []
        failures, detail = [], None
        with _own_rng(self.device), warnings.catch_warnings(), dispatch.use_backend(self.backend):
            warnings.simplefilter("ignore")  # torch's, on what it has no fused kernel for
            torch.manual_seed(seed)  # gradcheck draws from torch's own generator
            label = "drawing its inputs"
            try:
                for sample in op.samples(self.mode, slow, draw):
                    label = sample.label
                    for comparison in getattr(_Run(self, op, sample, draw), self.mode)():
                        done.append(comparison)
                        if not comparison.ratio <= 1:
                            failures.append(f"{label}: {comparison}")
            except Exception as error:  # a failure of any kind is this check's result
                said = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                failures.append(f"{label}: {said}{error}")
                if not isinstance(error, (AssertionError, GradcheckError)):
                    detail = traceback.format_exc()
        worst = max(done, key=lambda c: c.ratio, default=None)
        status, known = "fail" if failures else "ok", self.expected_failure
        if known is not None:
            if not failures:
                status = "xpass"
            elif all(re.search(known.match, failure) for failure in failures):
                status = "xfail"
        return GradResult(self, status, time.perf_counter() - start, worst, "\n".join(failures) or None, detail)


def _places(
    devices: list[str] | None, backends: list[str] | None
) -> Iterator[tuple[Operation, str, str, str | None, bool]]:
    """(operation, backend, device, why it cannot run there, whether to check it all the same)."""
    devices = devices or dispatch.device_types()
    for device, op, backend in itertools.product(devices, OPERATIONS.values(), backends or dispatch.BACKENDS):
        reason = dispatch.unavailable(backend, op.kernel, device)
        asked = False
        if reason is not None and backends:
            # One asked for by name fails where it is missing; not where it has no such kernel, or is there on another
            # of the devices.
            reasons = {dispatch.unavailable(backend, "norm", d) for d in devices}
            asked = None not in reasons
        yield op, backend, device, reason, asked


def gradchecks(devices: list[str] | None = None, backends: list[str] | None = None) -> Iterator[GradCheck]:
    """Every check that can run here: operation x backend x device x dtype x mode.

    Args:
        devices: device types; by default all that this machine has.
        backends: backend names; by default all that can run the operation on the device. The checks of one that is
            asked for by name, and can run on none of the devices, fail and say why.
    """
    for op, backend, device, reason, asked in _places(devices, backends):
        if reason is not None and not asked:
            continue
        for mode in op.modes:
            for dtype, param_dtype in _DTYPES:
                if (mode in ("vjp", "jvp") or (dtype, param_dtype) == (torch.float64, None)) and (
                    param_dtype is None or op.mixed
                ):
                    yield GradCheck(op.name, backend, device, dtype, mode, param_dtype)


def not_checked(
    devices: list[str] | None = None, backends: list[str] | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """(operation, backend, device, reason) of all that :func:`gradchecks` leaves out on this machine."""
    for op, backend, device, reason, asked in _places(devices, backends):
        if reason is not None and not asked:
            yield op.name, backend, device, reason


def run_gradchecks(checks: list[GradCheck], seed: int = 0) -> Iterator[tuple[GradCheck, str | None, float]]:
    """Run the checks one by one: (check, None or what failed, seconds).

    A failure that is known of torch's own function, on the backend ``torch``, is none; :meth:`GradCheck.result` tells.
    """
    for check in checks:
        result = check.result(seed)
        yield check, result.failure if result.status == "fail" else None, result.seconds
