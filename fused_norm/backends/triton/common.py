"""What the kernels and their launchers share."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.knobs import runtime as _runtime
from triton.runtime import driver as _driver

#: Triton's default for fusing a multiplication and an addition differs between its versions, and with it the last bit.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# ------------------------------------------------------------------------------------------------ pieces of the kernels


@triton.jit
def ratio(a, b, FP64: tl.constexpr):
    """a / b of two integers, correctly rounded; plain fp32 division is not."""
    if FP64:
        return tl.cast(a, tl.float64) / tl.cast(b, tl.float64)
    else:
        return tl.div_rn(tl.cast(a, tl.float32), tl.cast(b, tl.float32))


@triton.jit
def mean_of(total, n, one_nth):
    """total / n as total * (1/n) and one correction by its remainder, which leaves about one rounding.

    A correctly rounded division calls a subroutine, and while a row is in registers a call makes them spill.
    """
    quotient = total * one_nth
    corrected = tl.fma(tl.fma(-quotient, tl.cast(n, total.dtype), total), one_nth, quotient)
    return tl.where(corrected == corrected, corrected, quotient)  # the remainder of an infinite total is NaN


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum of a (ROWS, BLOCK_N) tile over its rows, by pairs: two addends have one order, whatever the tile's layout."""
    if ROWS == 1:
        return tl.reshape(tile, [BLOCK_N])
    else:
        pairs = tl.reshape(tile, [ROWS // 2, 2, BLOCK_N])
        return sum_rows(tl.sum(pairs, axis=1), ROWS // 2, BLOCK_N)


@triton.jit
def sum_columns(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a (ROWS, BLOCK) tile over its columns, neighbours first: two addends have one order, whatever the layout.

    The layout of what is only read follows from its alignment, which must not change a bit.
    """
    if BLOCK == 1:
        return tl.reshape(tile, [ROWS])
    else:
        pairs = tl.reshape(tile, [ROWS, BLOCK // 2, 2])
        return sum_columns(tl.sum(pairs, axis=2), ROWS, BLOCK // 2)


@triton.jit
def number(bits, FP64: tl.constexpr):
    """The number of the accumulation type with these bits (:func:`float_bits`): a float would come as fp32."""
    if FP64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_partial(partial_ptr, value, ok, is_first):
    """Add to a partial row, whose first tile finds it uninitialised."""
    before = tl.load(partial_ptr, mask=ok & (not is_first), other=0.0)
    tl.store(partial_ptr, before + value, mask=ok)


# --------------------------------------------------------------------------------------------- what the launchers share

_INTERPRETED = not isinstance(ratio, triton.JITFunction)


_caches: list[functools._lru_cache_wrapper] = []


def kept(make: Callable[..., Launch]) -> Callable[..., Launch]:
    """Keep the launches that ``make`` makes, by its arguments: more kinds of call than a model has, each some KB."""
    _caches.append(functools.lru_cache(1024)(make))
    return _caches[-1]


def forget_launches() -> None:
    """For who changes what :mod:`.launch` says: tests and measurements."""
    for cache in _caches:
        cache.cache_clear()


class Launch:
    """All of a launch but its pointers: made once for a kind of call (:func:`kept`), called with the tensors.

    Triton's own launcher binds and looks at all arguments at every call, which takes longer than many a kernel. Here it
    does so for the first call with such tensors alone; later ones go straight to the kernel that it compiled then.
    """

    __slots__ = ("_compiled", "_trailing", "constants", "device", "grid", "integers", "kernel")

    def __init__(
        self,
        kernel: Callable,
        programs: int,
        integers: tuple[int, ...],
        constants: dict[str, object],
        device: torch.device,
        num_warps: int,
    ) -> None:
        """``integers`` and ``constants`` in the order of the kernel's parameters, which begin with its pointers.

        CUDA takes 2^31 - 1 ``programs`` in the first dimension of a grid, and 65535 in the others, which are not used.
        """
        self.kernel, self.grid, self.integers, self.device = kernel, (programs, 1, 1), integers, device
        self.constants = {**constants, "num_warps": num_warps, **COMPILE_OPTIONS}
        self._trailing = (*integers, *constants.values())
        self._compiled: dict[tuple, triton.compiler.CompiledKernel] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Enqueue the kernel on the device's current stream.

        Raises:
            RuntimeError: if a tensor's memory has been freed (as FSDP does between uses).
        """
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        if 0 in pointers:  # a kernel would read it
            freed = pointers.index(0)
            name = self.kernel.arg_names[freed].removesuffix("_ptr")
            shape = tuple(tensors[freed].shape)
            raise RuntimeError(f"{name} has shape {shape} and no storage: its memory has been freed")
        if _INTERPRETED:
            self._by_triton(tensors)
        elif _driver.active.get_current_device() == self.device.index:
            self._enqueue(tensors, pointers)
        else:
            with getattr(torch, self.device.type).device(self.device):  # Triton launches on the current one
                self._enqueue(tensors, pointers)

    def _by_triton(self, tensors: tuple[Tensor | None, ...]) -> triton.compiler.CompiledKernel:
        return self.kernel[self.grid](*tensors, *self.integers, **self.constants)

    def _enqueue(self, tensors: tuple[Tensor | None, ...], pointers: list[int | None]) -> None:
        # What a kernel is compiled for, beside what is the same for all calls of this launch.
        kind = tuple([None if t is None else t.dtype for t in tensors])
        if any(p % 16 for p in pointers if p):
            kind += tuple([p and p % 16 for p in pointers])
        compiled = self._compiled.get(kind)
        if compiled is None or _heard(_runtime.launch_enter_hook) or _heard(_runtime.launch_exit_hook):
            self._compiled[kind] = self._by_triton(tensors)
            return
        stream = _driver.active.get_current_stream(self.device.index)
        none = (None, None, None)  # of the hooks
        of_kernel = (stream, compiled.function, compiled.packed_metadata)
        compiled.run(*self.grid, *of_kernel, *none, *pointers, *self._trailing)


def _heard(hook: object) -> bool:
    """Whether someone wants to hear of launches (a profiler). Triton tells them."""
    return hook is not None and bool(getattr(hook, "calls", True))


def float_bits(value: float, fp64: bool) -> int:
    """The bits of ``value`` as fp64 or fp32: Triton hands a Python float over as fp32 whatever it is needed for."""
    floating, integer = ("<d", "<q") if fp64 else ("<f", "<i")
    return struct.unpack(integer, struct.pack(floating, value))[0]


def fresh(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of ``like``'s shape. (torch.empty takes sizes apart in half the time of a tuple of them.)"""
    if like.is_contiguous():  # the cheaper call, which would keep the strides of a transposed tensor
        return torch.empty_like(like, dtype=dtype)
    return torch.empty(*like.shape, dtype=dtype or like.dtype, device=like.device)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_stride(t: Tensor, n: int) -> int:
    """Elements from one row to the next."""
    return n if t.is_contiguous() else t.stride(0)


def group_stride(parameter: Tensor | None, n: int) -> int:
    """Elements from one group's weight or bias to the next's; 0 where all groups share it, or there is one."""
    return 0 if parameter is None or parameter.numel() == n else n


@functools.cache
def warp_size(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's data-centre GPUs. Triton takes 32 on XPU, and the interpreter has none."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor that copies can fill while its threads work; 0 where none can."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
