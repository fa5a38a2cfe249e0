"""Builds the emulation of ``csrc/cuda/*.cuh`` and calls it: the Python side of driver.cpp and ticks_driver.cpp.

The kernels are compiled by the C++ compiler with AddressSanitizer and UndefinedBehaviorSanitizer; no CUDA toolkit is
needed.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulation"

FLAGS = (
    # Unoptimised: it compiles in a third of the time, and the switching of fibers takes longer than the arithmetic.
    *("-std=c++17", "-O0", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # A vector load reads elements as words, as it does on the device; multiply-adds are fused only where the source
    # says so.
    *("-fno-strict-aliasing", "-ffp-contract=off"),
)

#: The most shared memory a block may have on an H100.
SHARED_LIMIT = 232448

#: Codes of fused_norm::DType, and the names the kernels know the types by.
CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NAMES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}

Types = tuple[torch.dtype, torch.dtype]  # of x, and of weight and bias

#: Every pair that the backend contract allows.
ALL_TYPES: tuple[Types, ...] = (
    *((d, d) for d in CODES),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)


class EmulationError(Exception):
    """The emulated kernel did what it must not do: the message is the sanitizer's or the emulation's report."""


@dataclass
class Call:
    """One call of norm_forward.

    ``x`` is (rows, n) and contiguous here; the kernel sees its rows ``x_row_stride`` elements apart (None: n).
    ``offsets`` are how many elements x, y, weight and bias begin past a 256-byte boundary.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    eps: float = 1e-5
    rms: bool = False
    cast: bool = False
    need_stats: bool = True
    x_row_stride: int | None = None
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    compute_capability: int = 90
    shared_limit: int = SHARED_LIMIT
    largest_cluster: int = 16  # that the device has room for

    def encode(self) -> bytes:
        rows, n = self.x.shape
        params = [p for p in (self.weight, self.bias) if p is not None]
        param_dtype = params[0].dtype if params else self.x.dtype
        sizes = (self.x.element_size(),) * 2 + (param_dtype.itemsize,) * 2
        header = struct.pack(
            "20qd",
            *(CODES[self.x.dtype], CODES[param_dtype], self.rms, self.cast, self.need_stats),
            *(self.weight is not None, self.bias is not None),
            *(p is not None and p.numel() != n for p in (self.weight, self.bias)),
            *(self.groups, rows, n, n if self.x_row_stride is None else self.x_row_stride),
            *(self.compute_capability, self.shared_limit, self.largest_cluster),
            *(offset * size for offset, size in zip(self.offsets, sizes, strict=True)),
            self.eps,
        )
        return b"".join([header, *(_bytes(t) for t in (self.x, *params))])


@dataclass
class Result:
    y: Tensor
    stats: Tensor
    threads_per_row: int
    rows_per_block: int
    cluster: int  # blocks that share a row; 1: no cluster
    vector: bool  # 16-byte accesses
    keep: str  # where rows are kept: "registers", "shared" or, a slice of a row in each block, "slice"
    shared_bytes: int


#: By fused_norm::Keep.
KEEPS = ("registers", "shared", "slice")


def _bytes(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """Why the emulation cannot run on this machine; None if it can."""
    if compiler() is None:
        return "no C++ compiler"
    probe = BUILD / f"probe-{os.getpid()}"  # tests may run in several processes
    probe.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler(), "-xc++", "-", "-fsanitize=address,undefined", "-o", str(probe)]
    source = "#include <sanitizer/asan_interface.h>\n#include <ucontext.h>\nint main() {}"
    built = subprocess.run(command, input=source, text=True, capture_output=True)
    runs = built.returncode == 0 and subprocess.run([str(probe)], capture_output=True).returncode == 0
    probe.unlink(missing_ok=True)
    return None if runs else f"{compiler()} has no AddressSanitizer, or no ucontext"


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


def _compile(defines: list[str], source: Path, kernels: Path) -> Path:
    """The object file of ``source``, kept in the build folder under a name made of all that went into it."""
    command = [compiler(), *FLAGS, *defines, "-c", str(source), f"-I{HERE / 'include'}", f"-I{HERE}"]
    headers = sorted(p for d in (HERE, HERE / "include", kernels) for p in d.iterdir() if p.suffix in (".h", ".cuh"))
    target = BUILD / f"{source.stem}-{_digest(command, source, *headers)}.o"
    if not target.exists():
        unfinished = f"{target}.{os.getpid()}"
        subprocess.run([*command, f"-I{kernels}", "-o", unfinished], check=True)
        os.replace(unfinished, target)
    return target


def _build(units: Sequence[tuple[list[str], Path, Path]]) -> Path:
    """The executable linked from these units: defines, source, folder of the kernels."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(lambda unit: _compile(*unit), units)]
    executable = BUILD / f"emulation-{_digest(objects)}"
    if not executable.exists():
        unfinished = f"{executable}.{os.getpid()}"
        subprocess.run([compiler(), *FLAGS, *objects, "-o", unfinished], check=True)
        os.replace(unfinished, executable)
    return executable


def _communicate(executable: Path, message: bytes) -> bytes:
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run([str(executable)], input=message, capture_output=True, env=environment)
    if done.returncode != 0:
        raise EmulationError(f"exit status {done.returncode}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def _take(output: bytes, dtype: torch.dtype, *shape: int) -> tuple[Tensor, bytes]:
    """A tensor from the front of ``output``, and the rest of it."""
    size = dtype.itemsize * math.prod(shape)
    if not size:  # frombuffer refuses nothing
        return torch.empty(shape, dtype=dtype), output
    return torch.frombuffer(bytearray(output[:size]), dtype=dtype).reshape(shape), output[size:]


class Emulator:
    """An executable built from the kernels in the folder ``kernels`` for these types."""

    def __init__(self, types: Sequence[Types], kernels: Path = KERNELS) -> None:
        # The fibers and the driver see the headers without kernels alone: a planted bug does not compile them again.
        units = [([], HERE / "emulation.cpp", KERNELS), ([], HERE / "driver.cpp", KERNELS)]
        for x, param in types:
            defines = [f"-DEMULATE_T={NAMES[x]}", f"-DEMULATE_W={NAMES[param]}"]
            defines += [f"-DEMULATE_DTYPE={CODES[x]}", f"-DEMULATE_PARAM_DTYPE={CODES[param]}"]
            units.append((defines, HERE / "kernels.cpp", kernels))
        self.executable = _build(units)

    def run(self, *calls: Call) -> list[Result]:
        """The results of the calls, made one after the other in one process."""
        output, results = _communicate(self.executable, b"".join(c.encode() for c in calls)), []
        for call in calls:
            rows, n = call.x.shape
            (*chosen, vector, keep, shared_bytes), output = struct.unpack("6q", output[:48]), output[48:]
            acc = torch.float64 if call.x.dtype == torch.float64 else torch.float32
            y, output = _take(output, call.x.dtype, rows, n)
            stats, output = _take(output, acc, 0 if not call.need_stats else 1 if call.rms else 2, rows)
            results.append(Result(y, stats, *chosen, bool(vector), KEEPS[keep], shared_bytes))
        assert not output
        return results


# ------------------------------------------------------------------------------------------------------ the ticks loss


@dataclass
class TicksCall:
    """One call of ticks_forward, or with ``grad`` and ``stats`` one of ticks_backward, by the backends' contract.

    ``z`` and a soft ``target`` are (rows, classes) and contiguous here; the kernel sees their rows ``z_row_stride`` and
    ``target_row_stride`` elements apart (None: classes). ``grad`` and ``grad_lse`` may have any stride. ``offsets`` are
    how many elements z, target, weight, dz and dtarget begin past a 256-byte boundary.
    """

    z: Tensor
    target: Tensor
    weight: Tensor | None = None
    ignore_index: int = -100
    smoothing: float = 0.0
    ce: float = 1.0
    ticks: float = 1.0
    softcap: float = 0.0
    grad: Tensor | None = None
    grad_lse: Tensor | None = None
    stats: Tensor | None = None
    need_dz: bool = True
    need_dtarget: bool = False
    inplace: bool = False
    z_row_stride: int | None = None
    target_row_stride: int | None = None
    offsets: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32

    def encode(self) -> bytes:
        rows, classes = self.z.shape
        backward = self.grad is not None
        grads = [
            (0, b"") if g is None else (g.stride(0), _bytes(g if g.stride(0) else g[0].clone()))
            for g in (self.grad, self.grad_lse)
        ]
        sizes = [t.dtype.itemsize for t in (self.z, self.target, self.z if self.weight is None else self.weight)]
        header = struct.pack(
            "20q4d",
            *(backward, CODES[self.z.dtype], CODES.get(self.target.dtype, -1)),
            *(-1 if self.weight is None else CODES[self.weight.dtype], rows, classes),
            *(classes if stride is None else stride for stride in (self.z_row_stride, self.target_row_stride)),
            *(self.ignore_index, self.grad_lse is not None, grads[0][0], grads[1][0]),
            *(self.need_dz or self.inplace, self.need_dtarget, self.inplace),
            *(o * s for o, s in zip(self.offsets, (*sizes, sizes[0], sizes[1]), strict=True)),
            *(self.smoothing, self.ce, self.ticks, self.softcap),
        )
        operands = (self.z, self.target, self.weight, self.stats if backward else None)
        return b"".join([header, *(_bytes(t) for t in operands if t is not None), *(data for _, data in grads)])


@dataclass
class TicksResult:
    """``loss`` and ``stats`` of a forward call, ``dz`` and ``dtarget`` of a backward one; empty: not asked for."""

    first: Tensor
    second: Tensor
    threads_per_row: int
    rows_per_block: int
    blocks: int
    vector: bool  # 16-byte accesses


class TicksEmulator:
    """An executable built from the ticks kernels in the folder ``kernels`` for logits of these dtypes."""

    def __init__(self, dtypes: Sequence[torch.dtype], kernels: Path = KERNELS) -> None:
        units = [([], HERE / "emulation.cpp", KERNELS), ([], HERE / "ticks_driver.cpp", KERNELS)]
        units += [
            ([f"-DEMULATE_T={NAMES[d]}", f"-DEMULATE_DTYPE={CODES[d]}"], HERE / "ticks_kernels.cpp", kernels)
            for d in dtypes
        ]
        self.executable = _build(units)

    def run(self, *calls: TicksCall) -> list[TicksResult]:
        """The results of the calls, made one after the other in one process."""
        output, results = _communicate(self.executable, b"".join(c.encode() for c in calls)), []
        for call in calls:
            rows, classes = call.z.shape
            (*chosen, vector), output = struct.unpack("4q", output[:32]), output[32:]
            if call.grad is None:
                first, output = _take(output, call.acc, rows)
                second, output = _take(output, call.acc, 4 if call.soft or call.smoothing else 3, rows)
            else:
                first, output = _take(output, call.z.dtype, rows if call.need_dz or call.inplace else 0, classes)
                second, output = _take(output, call.target.dtype, rows if call.need_dtarget else 0, classes)
            results.append(TicksResult(first, second, *chosen, bool(vector)))
        assert not output
        return results


# -------------------------------------------------------------------------------------------------- the norms' backward


@dataclass
class BackwardCall:
    """One call of norm_backward, by the backends' contract.

    ``dy`` and ``x`` are (rows, n) and contiguous here; the kernel sees their rows ``dy_row_stride`` and
    ``x_row_stride`` elements apart (None: n). ``offsets`` are how many elements dy, x, weight, dx, dw and db begin past
    a 256-byte boundary.
    """

    dy: Tensor
    x: Tensor
    stats: Tensor
    weight: Tensor | None = None
    groups: int = 1
    rms: bool = False
    param_dtype: torch.dtype | None = None  # None: the weight's, or x's
    needs: tuple[bool, bool, bool] = (True, True, True)
    dy_row_stride: int | None = None
    x_row_stride: int | None = None
    offsets: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    shared_limit: int = SHARED_LIMIT
    largest_cluster: int = 16  # 1: the device has no clusters

    @property
    def params(self) -> torch.dtype:
        return self.param_dtype or (self.x if self.weight is None else self.weight).dtype

    def encode(self) -> bytes:
        rows, n = self.x.shape
        size, param_size = self.x.element_size(), self.params.itemsize
        header = struct.pack(
            "21q",
            *(CODES[self.x.dtype], CODES[self.params], self.rms, self.weight is not None),
            *(self.weight is not None and self.weight.numel() != n, *self.needs, self.groups, rows, n),
            *(n if stride is None else stride for stride in (self.dy_row_stride, self.x_row_stride)),
            *(self.shared_limit, self.largest_cluster),
            *(o * s for o, s in zip(self.offsets, (size, size, param_size, size, param_size, param_size), strict=True)),
        )
        operands = (self.dy, self.x, self.stats, self.weight)
        return b"".join([header, *(_bytes(t) for t in operands if t is not None)])


@dataclass
class BackwardResult:
    """Gradients, empty where not asked for, and what served the call."""

    dx: Tensor
    dw: Tensor
    db: Tensor
    threads_per_row: int
    rows_per_block: int
    cluster: int  # blocks that share a row
    blocks: int
    shared_bytes: int
    launches: int


class BackwardEmulator:
    """An executable built from the backward kernels in the folder ``kernels`` for x of these dtypes."""

    def __init__(self, dtypes: Sequence[torch.dtype], kernels: Path = KERNELS) -> None:
        units = [([], HERE / "emulation.cpp", KERNELS), ([], HERE / "backward_driver.cpp", KERNELS)]
        units += [
            ([f"-DEMULATE_T={NAMES[d]}", f"-DEMULATE_DTYPE={CODES[d]}"], HERE / "backward_kernels.cpp", kernels)
            for d in dtypes
        ]
        self.executable = _build(units)

    def run(self, *calls: BackwardCall) -> list[BackwardResult]:
        """The results of the calls, made one after the other in one process."""
        output, results = _communicate(self.executable, b"".join(c.encode() for c in calls)), []
        for call in calls:
            rows, n = call.x.shape
            chosen, output = struct.unpack("6q", output[:48]), output[48:]
            dx, output = _take(output, call.x.dtype, rows if call.needs[0] else 0, n)
            dw, output = _take(output, call.params, call.groups if call.needs[1] else 0, n)
            db, output = _take(output, call.params, call.groups if call.needs[2] else 0, n)
            results.append(BackwardResult(dx, dw, db, *chosen))
        assert not output
        return results
