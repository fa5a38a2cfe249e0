"""How much memory a call takes: the highest sum of what torch's allocator holds during it, beyond what it held before.

What C++ operators allocate for their own use counts; what a library takes from elsewhere (a matrix product's packing
buffers, a kernel's stack) does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._autograd import DeviceType


@dataclass(frozen=True)
class Peak:
    """Bytes: ``peak`` beyond what was there before the call, ``extra`` beyond what the call returns as well."""

    peak: int
    extra: int


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def returned_bytes(result: object, held: tuple[Tensor, ...]) -> int:
    """Bytes of the storages in a result, those that belong to ``held`` left out."""
    seen = {t.untyped_storage().data_ptr() for t in held}
    total = 0
    for t in _tensors(result):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C waits for the end: the profiler, started or stopped by half, takes the process down with it."""
    if threading.current_thread() is not threading.main_thread():  # no signal arrives here, nor may a handler be set
        yield
        return
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


def cpu_peak(call: Callable[[], object], held: tuple[Tensor, ...]) -> Peak:
    """The profiler writes down every allocation and release of torch's CPU allocator; releases of memory that is older
    than the call are not among them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints two lines each time
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _interrupted_afterwards(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        if e.device_type() == DeviceType.CPU:
            live += e.nbytes()
            highest = max(highest, live)
    return Peak(highest, highest - returned_bytes(result, held))


def cuda_peak(call: Callable[[], object], held: tuple[Tensor, ...], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    highest = torch.cuda.max_memory_allocated(device) - before
    return Peak(highest, highest - returned_bytes(result, held))
