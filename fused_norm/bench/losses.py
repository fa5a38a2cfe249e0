"""The ticks loss as operations of the harness: of logits, and of hidden states and a classifier's weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from .. import reference
from .operation import Call, Inputs, Op, Provider, random_tensors, row_blocks
from .providers import fused, package, takes, with_providers
from .shapes import (
    LINEAR_QUICK_SHAPES,
    LINEAR_SHAPES,
    LINEAR_SWEEPS,
    LOSS_QUICK_SHAPES,
    LOSS_SHAPES,
    LOSS_SWEEPS,
    Shape,
)

TICKS_WEIGHT = 1e-3

#: Gemma 2's.
SOFTCAP = 30.0

#: A provider whose name begins so computes cross entropy alone, and is judged by cross entropy's own truth.
CE = "cross_entropy"


def ticks_formula(x: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and ticks as one writes them in torch, in x's dtype."""
    lp = F.log_softmax(x, -1).gather(-1, target.unsqueeze(-1))
    return (-lp + TICKS_WEIGHT * (lp.exp() - lp)).mean()


def softcap_ticks_formula(x: Tensor, target: Tensor) -> Tensor:
    return ticks_formula(SOFTCAP * torch.tanh(x / SOFTCAP), target)


def linear_ticks_formula(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return ticks_formula(F.linear(x, w), target)


def _in_fp32(call: Call) -> Provider:
    """The formula of logits in fp32, as training code has it: log_softmax in bf16 gives -log p three digits."""
    return Provider("torch:float", lambda: call, dtypes=(torch.bfloat16, torch.float16))


def ticks_bytes(pass_name: str, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of an ideal pass over (M, V) logits; row data is fp32 (fp64 for fp64), targets int64.

    forward     the logits read; a row's target, its loss and three statistics (without grad: no statistics)
    backward    the logits read, their gradient written; a row's target and statistics, the one upstream gradient
    """
    (m, v), e = shape, dtype.itemsize
    acc = max(e, 4)
    forward, stats = m * v * e + m * (8 + acc), 3 * m * acc
    backward = 2 * m * v * e + 8 * m + stats + acc
    return {
        "forward": forward + stats,
        "backward": backward,
        "forward+backward": forward + stats + backward,
        "forward-nograd": forward,
    }[pass_name]


def _raise_of_target(m: int, v: int, spread: float, device: torch.device, seed: int) -> Tensor:
    """How far each row's target is lifted above logits of this spread, from not at all to nearly certain: at random
    logits every p_t would be next to 0, and 1 - p_t next to 1."""
    g = torch.Generator(device).manual_seed(seed + 1)
    return torch.rand(m, generator=g, device=device) * (math.log(v) + spread * spread / 2 + 3)


def _upstream(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(0.7, device=device).to(dtype)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    m, v = shape
    z = random_tensors(torch.float32, device, seed)(m, v, scale=2.0)
    target = torch.randint(v, (m,), generator=torch.Generator(device).manual_seed(seed), device=device)
    z[torch.arange(m, device=device), target] += _raise_of_target(m, v, 2.0, device, seed)
    x = z.to(dtype).requires_grad_()
    return Inputs({"x": x, "target": target}, ("x",), _upstream(dtype, device))


def make_linear_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    m, v, h = shape
    rand = random_tensors(torch.float32, device, seed)
    x, w = rand(m, h), rand(v, h, scale=h**-0.5)  # logits of spread 1
    target = torch.randint(v, (m,), generator=torch.Generator(device).manual_seed(seed), device=device)
    rows = w[target]
    x += rows * (_raise_of_target(m, v, 1.0, device, seed) / rows.square().sum(1)).unsqueeze(1)
    x, w = (t.to(dtype).requires_grad_() for t in (x, w))
    return Inputs({"x": x, "w": w, "target": target}, ("x", "w"), _upstream(dtype, device))


def _block(z: Tensor, target: Tensor, ticks: float, scale: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, and the gradient of logits, in fp64, of a loss that is ``scale`` times that sum."""
    options = (None, -100, 0.0, 1.0, ticks, softcap)
    loss, stats = reference.ticks_forward(z, target, *options)
    grad = scale.expand(z.shape[0])
    dz, _ = reference.ticks_backward(
        grad, None, z, target, stats, *options, need_dz=True, need_dtarget=False, inplace=False
    )
    return loss.sum(), dz


@torch.no_grad()
def truth(ticks: float, inputs: Inputs, softcap: float = 0.0) -> dict[str, Tensor]:
    x, target = inputs.args
    m, v = x.shape
    y, dx = 0.0, torch.empty_like(x, dtype=torch.float64)
    for rows in row_blocks(m, v, x.device):
        loss, dx[rows] = _block(x[rows].double(), target[rows], ticks, inputs.upstream.double() / m, softcap)
        y = y + loss
    return {"y": y / m, "dx": dx}


@torch.no_grad()
def linear_truth(ticks: float, inputs: Inputs) -> dict[str, Tensor]:
    x, w, target = inputs.args
    x64, w64 = x.double(), w.double()
    y, dx, dw = 0.0, torch.empty_like(x64), torch.zeros_like(w64)
    for rows in row_blocks(x.shape[0], w.shape[0], x.device):
        loss, dz = _block(x64[rows] @ w64.T, target[rows], ticks, inputs.upstream.double() / x.shape[0])
        y = y + loss
        dx[rows] = dz @ w64
        dw.addmm_(dz.T, x64[rows])
    return {"y": y / x.shape[0], "dx": dx, "dw": dw}


def _with_grad_mode(call: Call) -> Call:
    """Without grad, x requires none either, as in an evaluation: these functions ask the tensor and not the mode."""
    return lambda x, *others: call(x if torch.is_grad_enabled() else x.detach(), *others)


def _liger_cross_entropy() -> Call:
    from liger_kernel.ops import LigerCrossEntropyFunction

    # Of what it returns the loss is the first; None are class weights.
    return _with_grad_mode(lambda x, target: LigerCrossEntropyFunction.apply(x, target, None)[0])


def _liger_linear() -> Call:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return _with_grad_mode(lambda x, w, target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0])


def _quack_cross_entropy(**options: object) -> Call:
    from quack.cross_entropy import cross_entropy

    return partial(cross_entropy, **options)


def _quack_linear() -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _cut(**options: object) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return _with_grad_mode(partial(linear_cross_entropy, **options))


def _torch_linear(chunked: bool) -> Call:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=options)


def _torch_linear_unavailable(device: torch.device) -> str | None:
    has = hasattr(F, "linear_cross_entropy")
    return None if has else f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has"


def _ce(name: str, make: Callable[[], Call], *checks: Callable[..., str | None], overwrites=()) -> Provider:
    """``checks`` are the provider's ``unavailable`` and ``limit``."""
    return Provider(f"ce:{name}", make, *checks, function=CE, overwrites=overwrites)


def _fused_ticks(x: Tensor, target: Tensor, **options: object) -> Tensor:
    return FF.ticks_cross_entropy(x, target, ticks_weight=TICKS_WEIGHT, **options)


def _fused_linear_ticks(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return FF.linear_ticks_cross_entropy(x, w, target, ticks_weight=TICKS_WEIGHT)


_CE_NOTE = "ce:* compute cross entropy alone, a smaller task, and are judged by its own truth"

TICKS = with_providers(
    Op(
        name="ticks_cross_entropy",
        group="ticks",
        dims=("m", "n"),
        baseline=ticks_formula,
        fused=_fused_ticks,
        inputs=make_inputs,
        truths={"": partial(truth, TICKS_WEIGHT), CE: partial(truth, 0.0)},
        bytes_moved=ticks_bytes,
        shapes=LOSS_SHAPES,
        quick_shapes=LOSS_QUICK_SHAPES,
        sweeps=LOSS_SWEEPS,
        note=f"logits (M, V); torch is -lp + {TICKS_WEIGHT}*(lp.exp() - lp) of log_softmax in the logits' dtype,"
        f" torch:float the same of fp32 copies; {_CE_NOTE}; ce:liger, ce:quack-inplace and fused:inplace write the"
        " gradient over logits (ce:liger in forward already)",
    ),
    "ticks",
    (
        _in_fp32(lambda x, target: ticks_formula(x.float(), target)),
        _ce("torch", lambda: F.cross_entropy),
        _ce(
            "liger",
            _liger_cross_entropy,
            package("liger-kernel", "liger_kernel.ops:LigerCrossEntropyFunction"),
            takes(),
            overwrites=("x",),
        ),
        *(
            _ce(
                name,
                partial(_quack_cross_entropy, **options),
                package("quack-kernels", "quack.cross_entropy:cross_entropy"),
                takes(),
                overwrites=("x",) if options else (),
            )
            for name, options in (("quack", {}), ("quack-inplace", {"inplace_backward": True}))
        ),
        fused("fused:inplace", "auto", partial(_fused_ticks, inplace_backward=True), "ticks", overwrites=("x",)),
    ),
)

#: Of logits that are capped first, as Gemma 2's are: more arithmetic for the same bytes.
SOFTCAP_TICKS = with_providers(
    replace(
        TICKS,
        name="softcap_ticks_cross_entropy",
        group="softcap",
        baseline=softcap_ticks_formula,
        fused=partial(_fused_ticks, softcap=SOFTCAP),
        truths={"": partial(truth, TICKS_WEIGHT, softcap=SOFTCAP)},
        note=f"logits (M, V), capped by {SOFTCAP:g}*tanh(x/{SOFTCAP:g}) before all else; torch is that, and then"
        " ticks_cross_entropy's formula",
        providers={},
    ),
    "ticks",
    (_in_fp32(lambda x, target: softcap_ticks_formula(x.float(), target)),),
)

LINEAR_TICKS = with_providers(
    Op(
        name="linear_ticks_cross_entropy",
        group="ticks",
        dims=("m", "n", "h"),
        baseline=linear_ticks_formula,
        fused=_fused_linear_ticks,
        inputs=make_linear_inputs,
        truths={"": partial(linear_truth, TICKS_WEIGHT), CE: partial(linear_truth, 0.0)},
        bytes_moved=lambda pass_name, shape, dtype: None,  # bound by arithmetic, not by bytes
        shapes=LINEAR_SHAPES,
        quick_shapes=LINEAR_QUICK_SHAPES,
        sweeps=LINEAR_SWEEPS,
        # Fused ones make the gradients in forward where any are wanted, so neither half compares with torch's.
        passes=("forward+backward", "forward-nograd"),
        # torch's bf16 matrix products are many times slower than fp32's on a CPU without instructions for bf16.
        dtypes={"cpu": ("fp32",), "cuda": ("fp32", "bf16")},
        note=f"hidden (M, H) and weight (V, H), as M x V x H; torch is F.linear and the formula, torch:float the"
        f" formula of fp32 copies of the logits; {_CE_NOTE}; on a CPU"
        " fp32 alone by default: torch's bf16 matrix products are many times slower on one without bf16 instructions",
    ),
    "ticks",
    (
        _in_fp32(lambda x, w, target: ticks_formula(F.linear(x, w).float(), target)),
        _ce("torch", lambda: lambda x, w, target: F.cross_entropy(F.linear(x, w), target)),
        _ce("torch-linear", partial(_torch_linear, False), _torch_linear_unavailable),
        _ce("torch-chunked", partial(_torch_linear, True), _torch_linear_unavailable),
        _ce(
            "liger",
            _liger_linear,
            package("liger-kernel", "liger_kernel.ops:LigerFusedLinearCrossEntropyFunction"),
            takes(),
        ),
        _ce(
            "quack",
            _quack_linear,
            package("quack-kernels", "quack.linear_cross_entropy:chunked_linear_cross_entropy"),
            takes("bf16", "fp16", multiple=8),
        ),
        *(
            _ce(
                name,
                partial(_cut, **options),
                package("cut-cross-entropy", "cut_cross_entropy:linear_cross_entropy", gpu_only=gpu_only),
                takes(*dtypes),
            )
            for name, gpu_only, dtypes, options in (  # by default, "cce" leaves out gradients below a threshold
                ("cut", True, ("bf16", "fp16"), {"impl": "cce"}),
                ("cut-exact", True, ("bf16", "fp16"), {"impl": "cce", "filter_eps": None}),
                ("cut-compile", False, (), {"impl": "torch_compile"}),
            )
        ),
    ),
)
