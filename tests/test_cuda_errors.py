"""What the CUDA side says where it cannot run, and what becomes of torch's error when memory runs out. Needs no GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_norm.backends import native

ROOT = Path(__file__).parent.parent

no_cpu = pytest.mark.skipif(native.unavailable("cpu") is not None, reason=str(native.unavailable("cpu")))

#: As csrc/cuda/bindings.cpp has it from torch.
FULL = "norm_forward: no tensor of shape (8, 4): CUDA out of memory. Tried to allocate 2.00 TiB."


class Fails(TorchDispatchMode):
    """Every operator of ours raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_norm":
            raise self.error
        return function(*args, **(kwargs or {}))


def norm_forward() -> object:
    return native.norm_forward(torch.randn(8, 4), None, None, 4, 1, 1e-5, False, True)


def norm_backward() -> object:
    x, stats = torch.randn(8, 4), torch.randn(2, 8)
    return native.norm_backward(x, x, stats, None, 4, 1, False, x.dtype, True, False, False)


def ticks_forward() -> object:
    return native.ticks_forward(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64), None, -100, 0.0, 1.0, 1.0, 0.0)


def ticks_backward(inplace: bool = False) -> object:
    z, target = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    stats, grad = torch.randn(3, 8), torch.randn(8)
    return native.ticks_backward(grad, None, z, target, stats, None, -100, 0.0, 1.0, 1.0, 0.0, True, False, inplace)


def ticks_backward_inplace() -> object:
    return ticks_backward(inplace=True)


each = pytest.mark.parametrize(
    "call", [norm_forward, norm_backward, ticks_forward, ticks_backward, ticks_backward_inplace]
)


@no_cpu
@each
def test_no_memory_is_torchs_own_error(call) -> None:
    first = RuntimeError(FULL)
    with Fails(first), pytest.raises(torch.OutOfMemoryError) as caught:
        call()
    assert type(caught.value) is torch.OutOfMemoryError and str(caught.value) == FULL
    assert caught.value.__cause__ is first and first.__traceback__ is not None


@no_cpu
@each
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("norm_forward: weight has dtype Half, x has Float"),
        ValueError("CUDA out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        NotImplementedError("CUDA out of memory"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_any_other_error_stays_what_it_is(call, error: Exception) -> None:
    with Fails(error), pytest.raises(type(error)) as caught:
        call()
    assert caught.value is error and error.__cause__ is None


@pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 13), reason="torch 2.13 was the first to")
def test_torch_tells_why_a_call_of_the_stable_abi_failed() -> None:
    """What csrc/cuda/bindings.cpp relies on to find out that there is no memory left."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    told = library.torch_exception_get_what_without_backtrace
    told.restype = ctypes.c_char_p
    sizes, strides, handle = (ctypes.c_int64 * 1)(1 << 60), (ctypes.c_int64 * 1)(1), ctypes.c_void_p()
    dtype, device = library.aoti_torch_dtype_float32(), library.aoti_torch_device_type_cpu()
    status = library.aoti_torch_empty_strided(ctypes.c_int64(1), sizes, strides, dtype, device, 0, ctypes.byref(handle))
    assert status != 0 and b"allocate" in told()


@pytest.mark.skipif(native._cuda_missing is not None, reason=str(native._cuda_missing))
def test_without_a_device_the_kernels_say_why_they_cannot_run() -> None:
    code = """
from fused_norm.backends import native
print(native.cuda_reason(0), native.cuda_reason(-1), native.unavailable("cuda"), sep="\\n")
"""
    none = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=none, cwd=ROOT, text=True, capture_output=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first.startswith("the CUDA runtime says of cuda:0: ") and second.startswith(
        "the CUDA runtime says of cuda:-1: "
    )
    assert third.startswith("torch ")
    with pytest.raises(OverflowError):
        native.cuda_reason(1 << 70)
    with pytest.raises(TypeError):
        native.cuda_reason("cuda")
