"""The correctness gate: a provider is timed only if y, dx, dw and db are right, judged by the fp64 truth."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..testing import norm_truth, relative_error
from .cases import Inputs, Op
from .providers import BASELINE, NormCall, Provider

#: Relative error below which an answer counts as right. The gate tells wrong from right, not good from better (the
#: tests do that, by far tighter rules): ten or more roundings are allowed, so kernels with statistics in bf16 pass.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

#: Twice torch's own error is right as well (its dw and db in bf16 on a CPU are several percent off), up to this much.
TORCH_FACTOR, TORCH_CAP = 2.0, 0.5

#: Rows are judged in blocks of about this many elements: the truth takes several fp64 tensors of the block's size.
BLOCK_ELEMENTS = 1 << 22


@dataclass
class Verdict:
    """``status`` is ok, wrong or error; ``errors`` maps y, dx, dw, db to their relative error; ``no_backward`` is the
    reason why a provider whose forward is right has no backward; ``seconds`` is what the answer took."""

    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    no_backward: str = ""
    seconds: float = 0.0


def describe(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def answer(provider: Provider, call: NormCall, inputs: Inputs) -> tuple[dict[str, Tensor], str]:
    """What the provider computes: output, gradients, and the output once more without grad (another path in most);
    and why there are no gradients, if it has no backward."""
    x, w, b = inputs.x, inputs.w, inputs.b
    grads, no_backward = (), ""
    with provider.context():
        y = call(x, w, b)
        try:
            grads = torch.autograd.grad(y, inputs.leaves, inputs.dy)
        except NotImplementedError as e:
            no_backward = describe(e)
        with torch.no_grad():
            plain = call(x, w, b)
    found = {"y": y.detach(), "y without grad": plain, **dict(zip(("dx", "dw", "db"), grads, strict=False))}
    return found, no_backward


def _errors(op: Op, inputs: Inputs, answers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Relative errors of all answers. For tensors of x's shape it is the largest over the blocks of rows."""
    m, n = inputs.x.shape
    errors: dict[str, dict[str, float]] = {name: {} for name in answers}
    dw = db = 0.0
    step = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        truth = norm_truth(inputs.x[rows], inputs.w, inputs.b, inputs.dy[rows], n, op.eps, op.rms)
        dw, db = dw + truth.dw, db + truth.db
        for name, a in answers.items():
            for key, t in (("y", truth.y), ("y without grad", truth.y), ("dx", truth.dx)):
                if key not in a:
                    continue
                same_shape = a[key].shape == inputs.x.shape
                error = relative_error(a[key][rows], t) if same_shape else float("inf")
                errors[name][key] = max(errors[name].get(key, 0.0), error)
    for name, a in answers.items():
        for key, t in (("dw", dw), ("db", db)):
            if key in a:
                errors[name][key] = relative_error(a[key], t)
    return errors


def judge(op: Op, inputs: Inputs, providers: list[Provider]) -> tuple[dict[str, Verdict], dict[str, NormCall]]:
    """A verdict for each provider on these inputs, and the call of each that is right. One that raises, writes over an
    input or is off is not to be timed."""
    verdicts: dict[str, Verdict] = {}
    calls: dict[str, NormCall] = {}
    answers: dict[str, dict[str, Tensor]] = {}
    no_backward: dict[str, str] = {}
    tensors = dict(zip(("x", "w", "b", "dy"), (inputs.x, inputs.w, inputs.b, inputs.dy), strict=True))
    before = {key: t.detach().clone() for key, t in tensors.items() if t is not None}
    seconds: dict[str, float] = {}
    for p in providers:
        begin = time.perf_counter()
        try:
            calls[p.name] = p.make(op)
            answers[p.name], no_backward[p.name] = answer(p, calls[p.name], inputs)
        except Exception as e:  # whatever a provider raises is its verdict, the others go on
            verdicts[p.name] = Verdict("error", describe(e))
        seconds[p.name] = time.perf_counter() - begin
        for key, old in before.items():
            if not torch.equal(tensors[key].detach(), old):
                tensors[key].detach().copy_(old)
                verdicts[p.name] = Verdict("wrong", f"wrote over its input {key}")
                answers.pop(p.name, None)
    errors = _errors(op, inputs, answers)
    floor = LIMITS[inputs.x.dtype]
    torch_errors = errors.get(BASELINE, {})
    for name, found in errors.items():
        off = []
        for key, error in found.items():
            limit = max(floor, min(TORCH_FACTOR * torch_errors.get(key, 0.0), TORCH_CAP))
            if not error <= limit:
                off.append(f"{key}: error {error:.3g} > {limit:.3g}")
        verdicts[name] = Verdict("wrong" if off else "ok", "; ".join(off), found, no_backward[name])
    for name, verdict in verdicts.items():
        verdict.seconds = seconds[name]
    return verdicts, {name: call for name, call in calls.items() if verdicts[name].status == "ok"}
