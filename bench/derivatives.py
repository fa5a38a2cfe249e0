"""Higher derivatives and torch.compile: torch's time divided by ours (above 1 we are faster), on one device.

``python bench/derivatives.py --output bench/results/cpu-derivatives.txt``. Medians of runs taken in turns. torch's
layer_norm is one operator with derivative formulas in eager operations; ours runs a kernel for each derivative.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import fused_norm.functional as FF
from fused_norm.bench import environment

SHAPES = ((512, 768), (4096, 768), (1024, 4096))
DTYPES = (torch.float32, torch.bfloat16)
COMPILED = ((512, 768), (4096, 768))


def _leaves(rows: int, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in ((rows, n), (n,), (n,))]


def _double_backward(namespace, rows: int, n: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    leaves = _leaves(rows, n, dtype, device)
    dy = torch.randn(rows, n, device=device).to(dtype).requires_grad_()
    first = torch.autograd.grad(namespace.layer_norm(leaves[0], (n,), *leaves[1:]), leaves, dy, create_graph=True)
    upstream = [torch.randn_like(g) for g in first]
    return lambda: torch.autograd.grad(first, [*leaves[:2], dy], upstream, retain_graph=True)


def _forward_mode(namespace, rows: int, n: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    leaves = [t.detach() for t in _leaves(rows, n, dtype, device)]
    tangents = [torch.randn_like(t) for t in leaves]

    def run() -> Tensor:
        with fwAD.dual_level():
            x, w, b = map(fwAD.make_dual, leaves, tangents)
            return fwAD.unpack_dual(namespace.layer_norm(x, (n,), w, b)).tangent

    return run


def _per_sample(namespace, rows: int, n: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Gradients of weight and bias for each of 32 examples."""
    x, w, b = (t.detach() for t in _leaves(rows, n, dtype, device))
    x = x.view(32, rows // 32, n)

    def loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return namespace.layer_norm(x, (n,), w, b).square().sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1)), in_dims=(None, None, 0))
    return lambda: gradients(w, b, x)


def _compiled(backward: bool, neighbours: bool) -> Callable[..., Callable[[], object]]:
    """Under Inductor, alone or between an addition and a GELU that it can fuse with torch's norm, not with ours."""

    def make(namespace, rows: int, n: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
        leaves = _leaves(rows, n, dtype, device)
        residual, dy = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))

        def function(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
            if neighbours:
                return F.gelu(namespace.layer_norm(x + residual, (n,), w, b))
            return namespace.layer_norm(x, (n,), w, b)

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        if backward:
            return lambda: torch.autograd.grad(compiled(*leaves, residual), leaves, dy)

        def forward() -> Tensor:
            with torch.no_grad():
                return compiled(*leaves, residual)

        return forward

    return make


CASES = {
    "double backward": (_double_backward, SHAPES),
    "forward + forward-mode AD": (_forward_mode, SHAPES),
    "per-sample gradients, 32 examples": (_per_sample, SHAPES),
    "torch.compile, forward": (_compiled(False, False), COMPILED),
    "torch.compile, forward + backward": (_compiled(True, False), COMPILED),
    "torch.compile, add + norm + gelu, forward": (_compiled(False, True), COMPILED),
    "torch.compile, add + norm + gelu, both": (_compiled(True, True), COMPILED),
}


def measure(functions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(ts) for name, ts in times.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    options = parser.parse_args(argv)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.output:  # at once: an interrupted run keeps its rows
            options.output.write_text("\n".join(lines) + "\n")

    name = environment.cpu_name() if options.device == "cpu" else environment.device_name(torch.device(options.device))
    say(f"layer_norm on {name}, torch {torch.__version__}, {torch.get_num_threads()} threads.")
    say(f"Milliseconds, medians of {options.repeats} runs in turns; ratio: torch's time by ours.")
    say("")
    say(f"{'':<44}{'rows x n':>12}{'dtype':>10}{'torch':>10}{'ours':>10}{'ratio':>8}")
    for name, (make, shapes) in CASES.items():
        for rows, n in shapes:
            for dtype in DTYPES:
                functions = {k: make(ns, rows, n, dtype, options.device) for k, ns in (("torch", F), ("ours", FF))}
                ms = measure(functions, options.repeats, options.device)
                kind = str(dtype).removeprefix("torch.")
                say(
                    f"{name:<44}{f'{rows}x{n}':>12}{kind:>10}{ms['torch']:>10.3f}{ms['ours']:>10.3f}"
                    f"{ms['torch'] / ms['ours']:>8.2f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
