"""What our tests and a user's CI check with: the fp64 truth, error measures, and how large an error may be."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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


def error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for y or dx, given torch's own."""
    rounding = max(one_rounding(truth, dtype), typical_rounding(dtype))
    return max(TORCH_FACTOR[dtype] * torch_error, ROUNDING_FACTOR[dtype] * rounding)


def param_error_limit(truth: Tensor, dtype: torch.dtype, torch_error: float) -> float:
    """The largest error allowed for dw or db, given torch's own, which counts in fp32 and fp64 alone."""
    rounding = PARAM_ROUNDING_FACTOR[dtype] * max(one_rounding(truth, dtype), typical_rounding(dtype))
    return rounding if dtype in (torch.bfloat16, torch.float16) else max(TORCH_FACTOR[dtype] * torch_error, rounding)


def assert_norm_close(actual: NormResult, truth: NormResult, torch_result: NormResult) -> None:
    """Assert that every tensor of ``actual`` is as near the fp64 ``truth`` as the rules above demand.

    ``torch_result`` holds what torch computes from the same inputs (None where torch cannot: only the rounding rule
    counts then). Raises AssertionError naming the tensor, its error, torch's and the limit.
    """
    for name in ("y", "dx", "dw", "db"):
        a, t, ref = getattr(actual, name), getattr(truth, name), getattr(torch_result, name)
        if a is None:
            continue
        torch_error = 0.0 if ref is None else relative_error(ref, t)
        limit = (error_limit if name in ("y", "dx") else param_error_limit)(t, a.dtype, torch_error)
        error = relative_error(a, t)
        assert error <= limit, (
            f"{name}: error {error:.3g} > limit {limit:.3g} ({a.dtype}, torch's error {torch_error:.3g})"
        )


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GradCheck:
    """One check of an operation's gradients on one backend.

    ``mode`` is ``"vjp"`` (output and gradients against the fp64 truth, random upstream gradients), ``"gradcheck"`` or
    ``"gradgradcheck"`` (torch's finite differences, fp64 alone).
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        return f"{self.op}-{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}-{self.mode}"

    def run(self) -> str | None:
        """None if the gradients are right, else what is wrong with them."""
        generator = torch.Generator().manual_seed(0)
        try:
            with dispatch.use_backend(self.backend):
                if self.op == "ticks_cross_entropy":
                    self._ticks(generator)
                else:
                    self._norm(generator)
        except Exception as error:  # a failure of any kind is this check's result
            return f"{type(error).__name__}: {error}"
        return None

    def _norm(self, generator: torch.Generator) -> None:
        rms, n, eps = self.op == "rms_norm", 37 if self.mode == "vjp" else 5, 1e-5

        def draw(*shape: int) -> Tensor:
            t = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
            return t.requires_grad_()

        x, weight, bias = draw(3, 4, n), draw(n), None if rms else draw(n)
        inputs = [t for t in (x, weight, bias) if t is not None]

        def call(module, *inputs: Tensor) -> Tensor:
            if rms:
                return module.rms_norm(inputs[0], (n,), inputs[1], eps)
            return module.layer_norm(inputs[0], (n,), inputs[1], inputs[2], eps)

        if self.mode != "vjp":
            getattr(torch.autograd, self.mode)(lambda *inputs: call(FF, *inputs), inputs)
            return
        dy = draw(3, 4, n).detach()
        results = []
        for module in (FF, F):
            y = call(module, *inputs)
            results.append(NormResult(y, *torch.autograd.grad(y, inputs, dy)))
        assert_norm_close(results[0], norm_truth(x, weight, bias, dy, n, eps, rms), results[1])

    def _ticks(self, generator: torch.Generator) -> None:
        z = torch.randn(6, 7, generator=generator, dtype=torch.float64).to(self.device, self.dtype).requires_grad_()
        target = torch.tensor([0, 6, -100, 3, 3, 1], device=self.device)
        if self.mode != "vjp":
            getattr(torch.autograd, self.mode)(lambda z: FF.ticks_cross_entropy(z, target, ticks_weight=0.5), z)
            return
        loss = FF.ticks_cross_entropy(z, target, ticks_weight=0.5)
        (dz,) = torch.autograd.grad(loss, z)
        z64 = z.detach().double().requires_grad_()
        log_p = F.log_softmax(z64, 1)[target >= 0].gather(1, target[target >= 0].unsqueeze(1))
        truth = (0.5 * (log_p.exp() - log_p) - log_p).mean()
        (truth_dz,) = torch.autograd.grad(truth, z64)
        for name, actual, exact in (("loss", loss, truth), ("dz", dz, truth_dz)):
            error, limit = relative_error(actual, exact), 4 * torch.finfo(self.dtype).eps
            assert error <= limit, f"{name}: error {error:.3g} > limit {limit:.3g}"


def gradchecks(devices: list[str] | None = None, backends: list[str] | None = None) -> Iterator[GradCheck]:
    """Every check that can run here: operation x backend x device x dtype x mode.

    Args:
        devices: device types; by default all that this machine has.
        backends: backend names; by default all that can run the operation on the device.
    """
    for device, op in itertools.product(
        devices or dispatch.device_types(), ("layer_norm", "rms_norm", "ticks_cross_entropy")
    ):
        kernel = "ticks" if op.startswith("ticks") else "norm"
        for backend in backends or [b for b in dispatch.BACKENDS if dispatch.unavailable(b, kernel, device) is None]:
            for dtype in _DTYPES:
                yield GradCheck(op, backend, device, dtype, "vjp")
            for mode in ("gradcheck", "gradgradcheck"):
                yield GradCheck(op, backend, device, torch.float64, mode)


def run_gradchecks(checks: list[GradCheck]) -> Iterator[tuple[GradCheck, str | None, float]]:
    """Run the checks one by one: (check, None or what failed, seconds)."""
    for check in checks:
        start = time.perf_counter()
        failure = check.run()
        yield check, failure, time.perf_counter() - start
