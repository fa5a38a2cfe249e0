"""Every GPU kernel by every path, at sizes small enough for compute-sanitizer: ``make gpu SECTION=sanitize``.

A case calls a backend by the contract of :mod:`fused_norm.backends` and compares with the reference in fp64. The Triton
kernels run on the GPU where there is one, else in the interpreter, which also tells which paths the cases take.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from triton_kernels import (
    DEVICE,
    INTERPRETED,
    interpreter_as_hardware,  # noqa: F401
    remember_places,  # noqa: F401
    remember_selected,  # noqa: F401
    runs_kernels,
)

from fused_norm import reference
from fused_norm.backends import native
from fused_norm.backends import triton as backend
from fused_norm.testing import relative_error

ROOT = Path(__file__).resolve().parents[1]
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5


@dataclass
class Pair:
    """A tensor as a kernel has it, and the same numbers for the reference."""

    ours: Tensor
    truth: Tensor


def pair(t: Tensor, dtype: torch.dtype) -> Pair:
    t = t.to(dtype)
    return Pair(t.to(DEVICE), t.double())


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Pair:
    return pair(torch.randn(*shape, dtype=FP64) * scale + shift, dtype)


def integers(values: Tensor) -> Pair:
    return Pair(values.to(DEVICE), values)


def call(module: ModuleType, name: str, *args: object, needed: tuple[bool, ...]) -> list[Pair]:
    """The results of a contract's function, those that are needed held to the reference's."""

    def of(a: object, kind: str) -> object:
        if isinstance(a, Pair):
            return getattr(a, kind)
        return FP64 if kind == "truth" and isinstance(a, torch.dtype) else a

    expected = getattr(reference, name)(*(of(a, "truth") for a in args))
    found = getattr(module, name)(*(of(a, "ours") for a in args))
    assert len(found) == len(expected) == len(needed)
    for i, (ours, truth, wanted) in enumerate(zip(found, expected, needed, strict=True)):
        if wanted:
            limit = (16 if ours.dtype in (FP64, FP32) else 6) * torch.finfo(ours.dtype).eps
            assert relative_error(ours.cpu(), truth) <= limit, f"{name}, result {i}"
    return [Pair(*results) for results in zip(found, expected, strict=True)]


def norms(
    module: ModuleType,
    m: int,
    n: int,
    dtype: torch.dtype,
    *,
    rms: bool = False,
    weight: bool = True,
    bias: bool = True,
    param: torch.dtype | None = None,
    groups: int = 1,
    own: bool = False,
    cast: bool = False,
    need: tuple[bool, bool, bool] | None = (True, True, True),
) -> None:
    """Forward and backward, forward alone and without statistics for ``need`` None."""
    x, dy, p, bias = randn(m, n, dtype=dtype, shift=0.5), randn(m, n, dtype=dtype), param or dtype, bias and not rms
    sets = groups if own else 1
    w = randn(sets * n, dtype=p, scale=0.3, shift=1.0) if weight else None
    b = randn(sets * n, dtype=p, scale=0.3) if bias else None
    y_and_stats = call(
        module, "norm_forward", x, w, b, n, groups, EPS, rms, bool(need), cast, needed=(True, bool(need))
    )
    if need:
        need = (*need[:2], need[2] and not rms)
        args = (dy, x, y_and_stats[1], w, n, groups, rms, p, *need)
        call(module, "norm_backward", *args, needed=need)


def add_norms(
    module: ModuleType,
    m: int,
    n: int,
    dtype: torch.dtype,
    *,
    rms: bool = False,
    x_dtype: torch.dtype | None = None,
    weight: bool = True,
    p: float = 0.0,
    dsummed: bool = True,
    need: tuple[bool, bool, bool, bool] | None = (True, True, True, True),
) -> None:
    x, residual = randn(m, n, dtype=x_dtype or dtype), randn(m, n, dtype=dtype)
    w = randn(n, dtype=dtype, scale=0.3, shift=1.0) if weight else None
    b = None if rms or not weight else randn(n, dtype=dtype, scale=0.3)
    seed = integers(torch.tensor([2**33 + 5])) if p else None
    args = (x, residual, w, b, seed, n, EPS, rms, p, bool(need), False)
    _, summed, stats = call(module, "add_norm_forward", *args, needed=(True, True, bool(need)))
    if need:
        summed = Pair(summed.ours, summed.ours.cpu().double())  # rounded, and so are its statistics
        _, exact = reference.norm_forward(summed.truth, None, None, n, 1, EPS, rms, True)
        grads = randn(m, n, dtype=dtype), randn(m, n, dtype=dtype) if dsummed else None
        need = (*need[:3], need[3] and not rms)
        args = (*grads, summed, Pair(stats.ours, exact), w, seed, n, rms, p, dtype, x_dtype or dtype, *need)
        one = p == 0 and x_dtype in (None, dtype)  # then dx comes as dresidual
        call(module, "add_norm_backward", *args, needed=(need[0] and not one, need[1] or (need[0] and one), *need[2:]))


def double_backward(
    module: ModuleType,
    m: int,
    n: int,
    dtype: torch.dtype,
    *,
    rms: bool = False,
    weight: bool = True,
    given: str = "ddx ddw ddb dy",
    groups: int = 1,
    need: tuple[bool, bool, bool] = (True, True, True),
) -> None:
    x = randn(m, n, dtype=dtype, shift=0.5)
    _, exact = reference.norm_forward(x.truth, None, None, n, 1, EPS, rms, True)
    stats = Pair(exact.to(FP64 if dtype == FP64 else FP32).to(DEVICE), exact)
    names = given.split()
    ddx, dy = (randn(m, n, dtype=dtype, shift=0.5) if name in names else None for name in ("ddx", "dy"))
    ddw = randn(groups * n, dtype=dtype) if "ddw" in names else None
    ddb = randn(groups * n, dtype=dtype) if "ddb" in names and not rms else None
    w = randn(groups * n, dtype=dtype, scale=0.3, shift=1.0) if weight else None
    args = (ddx, ddw, ddb, dy, x, stats, w, n, groups, rms, dtype, *need)
    call(module, "norm_double_backward", *args, needed=need)


def ticks(
    module: ModuleType,
    m: int,
    v: int,
    dtype: torch.dtype,
    *,
    soft: torch.dtype | None = None,
    weight: bool = False,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    lse: bool = False,
    need: tuple[bool, bool] = (True, True),
    inplace: bool = False,
) -> None:
    z, acc = randn(m, v, dtype=dtype, scale=3.0), FP64 if dtype == FP64 else FP32
    if soft is None:
        target = torch.randint(v, (m,))
        target[0] = -100
        target, need = integers(target), (need[0], False)
    else:
        target = pair(torch.randn(m, v, dtype=FP64).softmax(1), soft)
    w = pair(torch.rand(v, dtype=FP64) + 0.5, dtype) if weight else None
    options = (-100, smoothing, 1.0, 0.7, softcap)
    _, stats = call(module, "ticks_forward", z, target, w, *options, needed=(True, True))
    grads = randn(m, dtype=acc), randn(m, dtype=acc) if lse else None
    args = (*grads, z, target, stats, w, *options, *need, inplace)
    dz = call(module, "ticks_backward", *args, needed=need)[0]
    assert not inplace or dz.ours.data_ptr() == z.ours.data_ptr()


def _cases() -> dict[str, Callable[[ModuleType], None]]:
    """By name. The widths: less than a vector and a warp, ragged, a block's, wider than the registers of either pass or
    (native) than shared memory."""
    dx, dw, db = (True, False, False), (False, True, False), (False, False, True)
    short = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}
    found: dict[str, Callable[[ModuleType], None]] = {}

    def add(function: Callable, m: int, n: int, dtype: torch.dtype = FP32, **options: object) -> None:
        text = "-".join(f"{k}={short.get(v, v)}" for k, v in options.items())
        name = f"{function.__name__}-{m}x{n}-{short[dtype]}{'-' if text else ''}{text}"
        found[name] = lambda module: function(module, m, n, dtype, **options)

    for rms in (False, True):
        for m, n in ((20, 3), (20, 63), (20, 100), (20, 768), (5, 4097), (18, 8200), (3, 16500)):
            add(norms, m, n, rms=rms)
        add(norms, 20, 100, FP64, rms=rms)
        add(norms, 3, 8300, FP64, rms=rms)
        add(norms, 20, 100, BF16, rms=rms, param=FP32)
        add(norms, 2, 16500, FP16, rms=rms, cast=True)
        add(norms, 20, 96, BF16, rms=rms, cast=True)
        for p, dsummed in ((0.0, False), (0.25, True)):
            add(add_norms, 20, 100, rms=rms, p=p, dsummed=dsummed)
            add(add_norms, 3, 16500, rms=rms, p=p, dsummed=dsummed)
        add(add_norms, 20, 100, FP64, rms=rms, p=0.25)
        add(add_norms, 3, 8300, FP64, rms=rms, p=0.25)
        for n in (100, 8200):
            add(double_backward, 18, n, rms=rms)
        add(double_backward, 20, 100, FP64, rms=rms)
        add(double_backward, 3, 2100, FP64, rms=rms)
    add(norms, 150, 100, need=db)  # of more rows than one program takes
    for m, n in ((21, 100), (3, 16500)):
        add(norms, m, n, need=None)
        add(norms, m, n, weight=False, bias=False)
        add(norms, m, n, bias=False, need=dx)
        add(norms, m, n, weight=False, need=dw)
        add(norms, m, n, need=db)
        add(norms, m, n, groups=3, own=True)
        add(add_norms, m, n, weight=False, need=None)
        add(add_norms, m, n, p=0.25, need=(True, False, False, True))
        add(add_norms, m, n, x_dtype=BF16, need=(True, True, True, False))
        add(add_norms, m, n, weight=False, p=0.25, dsummed=False, need=(False, False, True, True))
    for m, n in ((21, 100), (3, 8200)):
        add(double_backward, m, n, BF16, given="ddx", need=dx)
        add(double_backward, m, n, weight=False, given="ddx dy", need=dw)
        add(double_backward, m, n, given="ddx dy", need=db, groups=3)
        add(double_backward, m, n, given="ddw ddb dy")
        add(double_backward, m, n, given="ddb dy", need=(True, True, False))
    for m, v in ((9, 75), (3, 5000)):
        for dtype in (FP32, BF16, FP64):
            add(ticks, m, v, dtype)
            add(ticks, m, v, dtype, weight=True, lse=True, softcap=5.0)
            add(ticks, m, v, dtype, weight=True, lse=True, softcap=5.0, smoothing=0.1)
            add(ticks, m, v, dtype, soft=FP32 if dtype == BF16 else dtype)
        add(ticks, m, v, soft=FP32, need=(False, True), weight=True)
        add(ticks, m, v, soft=FP32, need=(True, False), lse=True)
        add(ticks, m, v, smoothing=0.1)
        add(ticks, m, v, inplace=True)
        add(ticks, m, v, soft=FP32, inplace=True, softcap=5.0)
    return found


CASES = _cases()
#: Rows that native kernels share among blocks, and that no cluster of blocks holds.
WIDE = {
    f"norms-{m}x{n}-{dtype}-rms={rms}".replace("torch.", ""): partial(norms, m=m, n=n, dtype=dtype, rms=rms)
    for m, n in ((3, 40000), (3, 70000), (2, 300000), (2, 300001))
    for dtype in (FP32, BF16)
    for rms in (False, True)
}

# --------------------------------------------------------------------------------------------------------------- Triton

_ran: set[str] = set()
#: By kernel and parameter what the cases gave: whether there was a tensor, and the values of flags.
_seen: dict[str, dict[str, set[bool]]] = defaultdict(lambda: defaultdict(set))


@pytest.fixture(autouse=True, scope="module")
def seen_by_the_interpreter(request: pytest.FixtureRequest) -> None:
    """What calls were made; and the interpreter asserts that no sum or product of 32-bit integers overflows."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    request.getfixturevalue("interpreter_as_hardware")  # which has options of its own
    run = InterpretedFunction.run

    def seeing(self, *args, **options):
        given = dict(zip(self.arg_names, args, strict=False)) | options
        for name, value in given.items():
            if name.endswith("_ptr"):
                _seen[self.fn.__name__][name].add(value is not None)
            elif isinstance(value, bool):
                _seen[self.fn.__name__][name].add(value)
        return run(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", seeing)
        patch.setattr(
            interpreter_builder, "options", replace(interpreter_builder.options, sanitize_overflow=True, debug=True)
        )
        yield


@runs_kernels
@pytest.mark.small
@pytest.mark.parametrize("case", CASES)
def test_triton(case: str) -> None:
    CASES[case](backend)
    _ran.add(case)


def _kernels_of_triton() -> dict[str, Callable]:
    modules = (importlib.import_module(f"fused_norm.backends.triton.{m}") for m in ("norm", "double_backward", "ticks"))
    return {name: f for module in modules for name, f in vars(module).items() if name.endswith("_kernel")}


@runs_kernels
def test_the_cases_take_every_path_of_every_triton_kernel() -> None:
    """Each kernel is called, each flag is on and off, and each tensor that may be left out is there and is not."""
    if not INTERPRETED:
        pytest.skip("the interpreter tells")
    for name in CASES.keys() - _ran:
        CASES[name](backend)
    missing = []
    for name, kernel in _kernels_of_triton().items():
        source = inspect.getsource(kernel.fn)
        head = source[: source.index("):\n")]
        optional = {p for p in re.findall(r"(\w+_ptr),", head) if re.search(rf"\b{p} is (not )?None", source)}
        flags = set(re.findall(r"(\w+): tl\.constexpr", head)) & {"IS_RMS", "CAST", "FP64", "PLAIN", "SOFT", "CAPPED"}
        assert optional and flags, name
        missing += [f"{name}: {p} is only {_seen[name][p]}" for p in optional | flags if len(_seen[name][p]) < 2]
    assert not missing, "\n".join(missing)


# --------------------------------------------------------------------------------------------------------- native, CUDA

NATIVE_CASES = CASES | WIDE
#: Those in which blocks share a row: older sanitizers say more of clusters than is true, and are asked apart.
CLUSTERS = {name: f for name, f in NATIVE_CASES.items() if int(re.search(r"-\d+x(\d+)-", name)[1]) > 16384}
needs_native = pytest.mark.skipif(native.unavailable("cuda") is not None, reason=str(native.unavailable("cuda")))


@pytest.mark.gpu
@pytest.mark.small
@needs_native
@pytest.mark.parametrize("case", [name for name in NATIVE_CASES if name not in CLUSTERS])
def test_native(case: str) -> None:
    NATIVE_CASES[case](native)


@pytest.mark.gpu
@pytest.mark.small
@needs_native
@pytest.mark.parametrize("case", CLUSTERS)
def test_native_clusters(case: str) -> None:
    CLUSTERS[case](native)


def _kernels_of_cuda() -> set[str]:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    gpu = sys.modules.setdefault("bench_gpu", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(gpu)
    texts = [f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cuh")]
    return {name for name in gpu.kernels() if any(f" {name}(" in text for text in texts)}


#: Of each native CUDA kernel the beginning of the names of cases that call it.
NATIVE = {
    "norm_forward_kernel": "norms-",
    "norm_backward_kernel": "norms-",
    "norm_backward_plain_kernel": "norms-2x30000",
    "norm_backward_reduce_kernel": "norms-150x100",
    "ticks_forward_kernel": "ticks-",
    "ticks_backward_kernel": "ticks-",
}


def test_each_native_kernel_has_its_cases() -> None:
    assert set(NATIVE) == _kernels_of_cuda()
    assert all(any(case.startswith(begin) for case in NATIVE_CASES) for begin in NATIVE.values())


@pytest.mark.gpu
@pytest.mark.skipif(native.unavailable("cuda") is not None, reason=str(native.unavailable("cuda")))
@pytest.mark.parametrize("kernel", NATIVE)
def test_they_call_it(kernel: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for name, case in NATIVE_CASES.items():
            if name.startswith(NATIVE[kernel]):
                case(native)
        torch.cuda.synchronize()
    assert any(kernel in event.name for event in profiler.events())
