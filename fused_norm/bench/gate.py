"""The correctness gate: a provider is timed only if its output and gradients are right, judged by the fp64 truth."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..testing import relative_error
from .operation import BASELINE, Call, Inputs, Op, Provider, as_tuple, gradients, row_blocks

#: Relative error below which an answer counts as right. The gate tells wrong from right, not good from better (the
#: tests do that, by far tighter rules): ten or more roundings are allowed, so kernels with statistics in bf16 pass.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

#: Twice torch's own error is right as well (its dw and db in bf16 on a CPU are several percent off), up to this much.
TORCH_FACTOR, TORCH_CAP = 2.0, 0.5


@dataclass
class Verdict:
    """``status`` is ok, wrong, error, or skipped where the provider does not take the case; ``errors`` maps y, dx, dw,
    db to their relative error; ``no_backward`` is the reason why a provider whose forward is right has no backward;
    ``seconds`` is what the answer took."""

    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    no_backward: str = ""
    seconds: float = 0.0


def describe(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def answer(provider: Provider, op: Op, call: Call, inputs: Inputs) -> tuple[dict[str, Tensor], str]:
    """What the provider computes: outputs, gradients, and the outputs once more without grad (another path in most);
    and why there are no gradients, if it has no backward."""
    grads, no_backward = (), ""
    with provider.context():
        own = inputs.without_sharing(provider.overwrites)
        outputs = call(*own.args)
        try:
            upstream = tuple(
                None if u is None else u.to(o.dtype)
                for o, u in zip(as_tuple(outputs), as_tuple(inputs.upstream), strict=True)
            )
            grads = gradients(outputs, own.leaf_tensors, upstream)
        except NotImplementedError as e:
            no_backward = describe(e)
        found = {name: o.detach() for name, o in zip(op.outputs, as_tuple(outputs), strict=True) if o is not None}
        own = inputs.without_sharing(provider.overwrites)
        with torch.no_grad():
            plain = call(*own.args)
    found |= {f"{n} without grad": o for n, o in zip(op.outputs, as_tuple(plain), strict=True) if o is not None}
    return found | dict(zip((f"d{name}" for name in inputs.leaves), grads, strict=False)), no_backward


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; where a tensor has the input's rows, as y and dx may, the largest over blocks of rows."""
    errors = {}
    for key, actual in found.items():
        t = truth[key.removesuffix(" without grad")]
        if key in ("dw", "db") or t.dim() < 2:
            errors[key] = relative_error(actual, t)
        elif actual.shape != t.shape:
            errors[key] = float("inf")
        else:
            errors[key] = max(relative_error(actual[rows], t[rows]) for rows in row_blocks(*t.shape, t.device))
    return errors


def judge(op: Op, inputs: Inputs, providers: list[Provider]) -> tuple[dict[str, Verdict], dict[str, Call]]:
    """A verdict for each provider on these inputs, and the call of each that is right. One that does not take them,
    raises, writes over an input or is off is not to be timed."""
    calls: dict[str, Call] = {}
    verdicts: dict[str, Verdict] = {}
    upstream = as_tuple(inputs.upstream)
    shared = {**inputs.tensors, **{f"d{name}": u for name, u in zip(op.outputs, upstream, strict=True)}}
    before = {key: t.detach().clone() for key, t in shared.items() if t is not None}
    # One function's truth at a time, and one provider's answer: at large sizes either fills much of a device.
    for function in dict.fromkeys(p.function for p in providers):
        truth = op.truths[function](inputs) if op.truth_of_call is None else {}
        for p in (p for p in providers if p.function == function):
            if limit := p.limit(inputs):
                verdicts[p.name] = Verdict("skipped", limit)
                continue
            begin = time.perf_counter()
            try:
                calls[p.name] = p.make()
                found, no_backward = answer(p, op, calls[p.name], inputs)
                seconds = time.perf_counter() - begin
                if op.truth_of_call is not None:
                    with p.context():
                        truth = op.truth_of_call(inputs, calls[p.name])
                verdict = Verdict("ok", "", _errors(found, truth), no_backward, seconds)
                del found
            except Exception as e:  # whatever a provider raises is its verdict, the others go on
                verdict = Verdict("error", describe(e), seconds=time.perf_counter() - begin)
            for key, old in before.items():
                if not torch.equal(shared[key].detach(), old):
                    shared[key].detach().copy_(old)
                    verdict = Verdict("wrong", f"wrote over its input {key}", seconds=verdict.seconds)
            verdicts[p.name] = verdict
    floor = LIMITS[inputs.x.dtype]
    torch_errors = verdicts[BASELINE].errors if BASELINE in verdicts else {}
    for verdict in verdicts.values():
        off = []
        for key, error in verdict.errors.items():
            limit = max(floor, min(TORCH_FACTOR * torch_errors.get(key, 0.0), TORCH_CAP))
            if not error <= limit:
                off.append(f"{key}: error {error:.3g} > {limit:.3g}")
        if off:
            verdict.status, verdict.reason = "wrong", "; ".join(off)
    verdicts = {p.name: verdicts[p.name] for p in providers}
    return verdicts, {name: calls[name] for name, verdict in verdicts.items() if verdict.status == "ok"}
