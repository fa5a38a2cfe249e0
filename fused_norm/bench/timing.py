"""How it is measured: rounds in which every contender runs once, in an order that changes, and medians over them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .memory import Peak, cpu_peak, cuda_peak
from .results import COLD, WARM

MIN_ROUNDS, MAX_ROUNDS = 5, 100

#: A CPU sample holds as many calls as fill this time, so that the clock's own cost does not show.
CPU_SAMPLE_S = 200e-6

#: What a call finds in the caches unless asked for otherwise, by device type. A GPU's L2 is small beside what a model
#: does between two uses of a tensor; on a CPU an operation mostly reads what the one before it has written.
DEFAULT_CACHE = {"cpu": WARM, "cuda": COLD}

#: What the last-level caches are taken to be where the system does not tell.
CPU_CACHE_BYTES = 128 << 20

#: Back-to-back calls in one sample of a CUDA call's cost, and the milliseconds that they should not exceed together.
CUDA_CALLS, CUDA_CALLS_MS = 10, 50.0


@dataclass(frozen=True)
class Contender:
    """Something to time: ``prepare()`` gives the call that is timed; ``context()`` is entered around it, untimed.

    ``held`` are tensors that the call may return without having made them.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    context: Callable[[], AbstractContextManager] = nullcontext
    held: tuple[Tensor, ...] = ()


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between the sorted values."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass
class Samples:
    """Milliseconds a call, one number a round. On CUDA ``ms`` is device time, and ``call_ms`` wall time a call where
    one follows the other; on a CPU there is one kind of time and ``call_ms`` stays empty."""

    ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    peak: Peak | None = None
    error: Exception | None = None
    warm_up_s: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def quantile(self, q: float) -> float:
        return quantile(self.ms, q)

    def ratios(self, other: Samples) -> list[float]:
        """The other's time over this one, round by round: what slows a whole round down cancels out."""
        return [theirs / own for own, theirs in zip(self.ms, other.ms, strict=True)]


def last_level_cache_bytes() -> int | None:
    """Bytes of all last-level caches of this machine's CPUs together, None where the system does not tell."""
    found: dict[tuple[int, str], int] = {}
    try:
        for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            kib = int(size.removesuffix("K"))
            found[level, (index / "shared_cpu_list").read_text()] = kib << 10
    except (OSError, ValueError):
        return None
    last = max((level for level, _ in found), default=None)
    return sum(size for (level, _), size in found.items() if level == last) or None


class CpuClock:
    """Wall time. Warm: the same call ran just before, so its parameters, and whatever else fits, are in the caches, and
    a short call is repeated; without that, what other contenders left would decide. Cold: a buffer twice the size of
    the last-level caches is read before each call, by all threads, and there is one call a sample.

    The buffer is read instead of written: written lines would be flushed to memory in the midst of the timed call. It
    takes the place of the interpreter's own data too, which is much of what a short call then waits for.
    """

    def __init__(self, cache: str) -> None:
        self.cold = cache == COLD
        if self.cold:
            self.filler = torch.ones(2 * (last_level_cache_bytes() or CPU_CACHE_BYTES) // 4)

    def host_s(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak(self, call: Callable[[], object], held: tuple[Tensor, ...]) -> Peak:
        return cpu_peak(call, held)

    def evict(self) -> None:
        torch.sum(self.filler)

    def sample(self, call: Callable[[], object], host_s: float, into: Samples) -> None:
        if self.cold:
            self.evict()
            repeats = 1
        else:
            call()
            repeats = max(1, min(1000, int(CPU_SAMPLE_S / max(host_s, 1e-7))))
        start = time.perf_counter()
        for _ in range(repeats):
            out = call()
        into.ms.append((time.perf_counter() - start) * 1e3 / repeats)
        del out  # the last result is freed outside the timed region


class CudaClock:
    """Device time by events. Cold: the L2 is filled by other data before each call. Warm: the same call ran just
    before.

    The filler reads its buffer instead of writing it: written lines would be flushed to memory in the midst of the
    timed kernel and be charged to it. The device first sleeps for longer than the host needs to enqueue everything, so
    that the time between the events holds no waiting for the host.
    """

    def __init__(self, device: torch.device, cache: str) -> None:
        self.device, self.cold = device, cache == COLD
        if self.cold:
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self.filler = torch.ones(max(4 * l2, 256 << 20) // 4, device=device)
            self.sink = torch.empty((), device=device)

    def host_s(self, call: Callable[[], object]) -> float:
        """Seconds the host needs to enqueue one call, device work not included where it need not wait."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        out = call()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        del out
        return elapsed

    def peak(self, call: Callable[[], object], held: tuple[Tensor, ...]) -> Peak:
        return cuda_peak(call, held, self.device)

    def evict(self) -> None:
        torch.sum(self.filler, dim=0, out=self.sink)

    def sample(self, call: Callable[[], object], host_s: float, into: Samples) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e9 * 2 * (2 * host_s + 100e-6)))  # cycles of a clock near 2 GHz; two calls if warm
        if self.cold:
            self.evict()
        else:
            call()
        start.record()
        out = call()
        end.record()
        torch.cuda.synchronize(self.device)
        into.ms.append(start.elapsed_time(end))
        calls = max(1, min(CUDA_CALLS, int(CUDA_CALLS_MS / max(into.ms[-1], 1e-3))))
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        torch.cuda.synchronize(self.device)
        into.call_ms.append((time.perf_counter() - begin) * 1e3 / calls)
        del out


Clock = CpuClock | CudaClock


def make_clock(device: torch.device, cache: str) -> Clock:
    return CudaClock(device, cache) if device.type == "cuda" else CpuClock(cache)


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """An order for each round: every second one reversed, each pair starting one place further on."""
    for r in range(rounds):
        at = (r // 2) % len(names) if names else 0
        order = names[at:] + names[:at]
        yield order[::-1] if r % 2 else order


def time_group(contenders: list[Contender], clock: Clock, seconds: float) -> dict[str, Samples]:
    """Samples for each contender, all from the same rounds: as many as fit in ``seconds``, between the two bounds.

    Each is called three times first, untimed: the first call compiles, the second tells how much memory one takes, the
    third how long. One that raises has its error for a result, and the others go on.
    """
    samples = {c.name: Samples() for c in contenders}
    ready: dict[str, tuple[Contender, Callable[[], object], float]] = {}
    for c in contenders:
        begin = time.perf_counter()
        try:
            with c.context():
                call = c.prepare()
                call()
                samples[c.name].peak = clock.peak(call, c.held)
                ready[c.name] = (c, call, clock.host_s(call))
        except Exception as e:
            samples[c.name].error = e
        samples[c.name].warm_up_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for r, order in enumerate(orders(list(ready), MAX_ROUNDS)):
        if r >= MIN_ROUNDS and (time.perf_counter() - begin) * (r + 1) / r > seconds:
            break
        for name in order:
            c, call, host_s = ready[name]
            if samples[name].error is not None:
                continue
            try:
                with c.context():
                    clock.sample(call, host_s, samples[name])
            except Exception as e:
                samples[name].error = e
    return samples
