"""What a call costs where the arithmetic is next to nothing (layer_norm at 1x64 on one CPU thread), and which part.

``python bench/small_call.py --output bench/results/cpu-small-call-parts.txt``. Each line is the least of many short
measurements, taken in turns with all others, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import fused_norm.functional as FF
from fused_norm import dispatch
from fused_norm import functional_norms as norms
from fused_norm.autograd import transforms_active
from fused_norm.backends import native
from fused_norm.bench import environment

M, N = 1, 64


class Nothing(torch.autograd.Function):
    """An autograd.Function of our signature with no work in it but a copy: what torch asks for having one."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, eps, rms, backend):
        ctx.save_for_backward(x, weight)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        _, weight = ctx.saved_tensors
        return dy, weight, weight, None, None, None, None


def sections() -> dict[str, dict[str, Callable[[], object]]]:
    """Section -> line -> what is timed. Lines that start with a space are parts of FF.layer_norm, called alone."""
    shape, dy, x, w, b = (N,), torch.randn(M, N), torch.randn(M, N), torch.randn(N), torch.randn(N)
    leaves = gx, gw, gb = [t.clone().requires_grad_() for t in (x, w, b)]
    operators = torch.ops.fused_norm
    forward, backward = operators.norm_forward.default._op, operators.norm_backward.default._op
    stats = native.norm_forward(x, w, b, N, 1, 1e-5, False, True)[1]
    forward_args, stats_args = (x, w, b, N, 1, 1e-5, False, False), (x, w, b, N, 1, 1e-5, False, True)
    backward_args = (dy, x, stats, w, N, 1, False, torch.float32, True, True, True)

    def backpropagate(y: torch.Tensor) -> None:
        y.backward(dy)
        for t in leaves:
            t.grad = None

    return {
        "without gradients": {
            "F.layer_norm": lambda: F.layer_norm(x, shape, w, b),
            "FF.layer_norm": lambda: FF.layer_norm(x, shape, w, b),
            "  is_compiling, is_tracing": lambda: norms.is_compiling() or norms.is_tracing(),
            "  plain_row_length": lambda: dispatch.plain_row_length(x, shape, w, b),
            "  transforms_active": transforms_active,
            "  dispatch.select": lambda: dispatch.select("norm", "cpu"),
            "  is_grad_enabled, requires_grad": lambda: (
                torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or b.requires_grad)
            ),
            "  is_cpu, is_contiguous": lambda: x.is_cpu and x.is_contiguous(),
            "  native.norm_forward": lambda: native.norm_forward(*forward_args),
            "norm_forward by the dispatcher": lambda: forward(*forward_args),
            "the checks in Python instead of plain_row_length": lambda: (
                norms.row_length(False, x, shape, w, b),
                norms.checked_params(False, x, shape, w, b),
            ),
        },
        "forward + backward": {
            "F.layer_norm": lambda: backpropagate(F.layer_norm(gx, shape, gw, gb)),
            "FF.layer_norm": lambda: backpropagate(FF.layer_norm(gx, shape, gw, gb)),
            "  forward": lambda: FF.layer_norm(gx, shape, gw, gb),
            "  native.norm_forward": lambda: native.norm_forward(*stats_args),
            "  native.norm_backward": lambda: native.norm_backward(*backward_args),
            "norm_forward by the dispatcher": lambda: forward(*stats_args),
            "norm_backward by the dispatcher": lambda: backward(*backward_args),
            "an autograd.Function that does nothing": lambda: backpropagate(
                Nothing.apply(gx, gw, gb, N, 1e-5, False, None)
            ),
        },
    }


def measure(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Microseconds a call."""
    timers = [timeit.Timer(call) for call in (lambda: None, *calls)]
    # half a millisecond each: what is much longer is seldom left alone by the rest of the machine
    numbers = [max(1, int(5e-4 * 100 / max(1e-9, min(timer.repeat(5, 100))))) for timer in timers]
    best = [float("inf")] * len(timers)
    for _ in range(rounds):
        for i, (timer, number) in enumerate(zip(timers, numbers, strict=True)):
            best[i] = min(best[i], timer.timeit(number) / number * 1e6)
    return [t - best[0] for t in best[1:]]  # less the lambda around each line


def report(rounds: int) -> str:
    lines = [
        f"Microseconds a call, the least of {rounds} measurements: layer_norm, {M}x{N} fp32, one thread.",
        f"{environment.cpu_name()}, {native.cpu_capability()}, torch {torch.__version__}.",
    ]
    for title, calls in sections().items():
        times = dict(zip(calls, measure(list(calls.values()), rounds), strict=True))
        lines += ["", title]
        for name, t in times.items():
            ratio = f"   {t / times['F.layer_norm']:.2f}x torch's" if name == "FF.layer_norm" else ""
            lines.append(f"  {name:52s} {t:7.2f}{ratio}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="measurements of each line (1000)")
    parser.add_argument("--output", type=Path, help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if reason := native.unavailable("cpu"):
        sys.exit(f"no native CPU backend: {reason}")
    text = report(options.rounds)
    print(text, end="")
    if options.output:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
