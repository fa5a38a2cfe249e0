"""What a process of its own checks for tests/test_threads.py: fork, spawn, and the first calls of a process.

``python worker_processes.py OUTCOMES`` runs every check, in an order that matters, and writes {name: None or a
traceback} as JSON. A process that forks must be one that nothing else uses, and its child is waited for with a limit:
after a fork the parent's OpenMP pool is gone, and torch's own operations hang in the child if they would wake it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_norm.functional as FF
from fused_norm import dispatch

LARGE, SMALL = (2000, 768), (3, 16)


def _run(shape: tuple[int, int], namespace=FF) -> list[Tensor]:
    """Both norms, forward and backward, of the same numbers in every process."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    results = []
    for op in ("layer_norm", "rms_norm"):
        leaves = x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True)
        y = getattr(namespace, op)(leaves[0], (shape[1],), leaves[1])
        results += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    return results


def _check(expected: list[Tensor], shape: tuple[int, int]) -> None:
    for i, (a, e) in enumerate(zip(_run(shape), expected, strict=True)):
        assert torch.equal(a, e), f"result {i} differs"


def _forked(child: Callable[[], None], seconds: float) -> str:
    """How a forked child that runs ``child`` ends: "ok", "failed" or "hung"."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "ok" if status == 0 else "failed"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


class Rows(torch.utils.data.Dataset):
    """A dataset that normalises its rows, in whatever process it is asked for them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x = torch.full((64, 768), float(index)).add_(torch.arange(768.0)).requires_grad_()
        y = FF.layer_norm(x, (768,))
        (dx,) = torch.autograd.grad(y, x, torch.arange(768.0).sin().expand(64, 768))
        return torch.stack((y.detach(), dx))


def fork() -> None:
    """A child of a process whose pool of threads has run: the same bits, in one thread as DataLoader's workers have
    it, and for small tensors as it is."""
    torch.set_num_threads(2)
    large, small = _run(LARGE), _run(SMALL)

    def one_thread() -> None:
        torch.set_num_threads(1)
        for _ in range(2):
            _check(large, LARGE)
        _check(small, SMALL)

    assert _forked(one_thread, 60) == "ok"
    assert _forked(lambda: _check(small, SMALL), 60) == "ok"
    # The parent is as it was.
    _check(large, LARGE)

    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    expected = torch.stack([Rows()[i] for i in range(8)])
    assert torch.equal(torch.cat(list(loader)), expected)

    context = multiprocessing.get_context("fork")
    process = context.Process(target=one_thread)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def fork_before_any_call() -> None:
    """A child of a process that has only imported the package may use every thread."""
    torch.set_num_threads(2)

    def child() -> None:
        torch.set_num_threads(2)
        first = _run(LARGE)
        _check(first, LARGE)

    assert _forked(child, 60) == "ok"


def fork_as_torch() -> None:
    """Large tensors in a child that still believes in the parent's threads: no worse than torch's own norm there."""
    torch.set_num_threads(2)
    _run(LARGE)
    _run(LARGE, F)
    theirs = _forked(lambda: _run(LARGE, F) and None, 3)
    ours = _forked(lambda: _run(LARGE) and None, 3 if theirs == "hung" else 60)
    assert ours in ("ok", theirs), (ours, theirs)


def spawn() -> None:
    context = multiprocessing.get_context("spawn")
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context=context)
    expected = torch.stack([Rows()[i] for i in range(8)])
    assert torch.equal(torch.cat(list(loader)), expected)


def first_calls_at_once() -> None:
    """The first calls of a process, which choose and load the backend, made by many threads together."""
    count = 8
    barrier, results, errors = threading.Barrier(count), {}, []

    def work(i: int) -> None:
        try:
            barrier.wait(30)
            results[i] = _run(SMALL)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and len(results) == count, errors
    for result in results.values():
        for a, e in zip(result, results[0], strict=True):
            assert torch.equal(a, e)


def one_warning() -> None:
    """Where the extension is missing it is said once, however many threads find out together."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("fused_norm").addHandler(handler)
    original = dispatch.unavailable

    def slow(name: str, op: str, device_type: str) -> str | None:
        time.sleep(0.05)  # long enough for every thread to ask
        return "it is taken away" if name == "native" else original(name, op, device_type)

    dispatch.unavailable = slow
    dispatch._auto.cache_clear()
    try:
        first_calls_at_once()
    finally:
        dispatch.unavailable = original
        dispatch._auto.cache_clear()
    assert len(said) == 1 and "it is taken away" in said[0], said


#: Those that need a process in which nothing has run come first.
CHECKS = (fork_before_any_call, first_calls_at_once, fork, fork_as_torch, spawn, one_warning)


def main() -> None:
    outcomes: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check()
            outcomes[check.__name__] = None
        except Exception:
            outcomes[check.__name__] = traceback.format_exc()
        with open(sys.argv[1], "w") as file:  # after each check: one that hangs shows as the first that is missing
            json.dump(outcomes, file)


if __name__ == "__main__":
    main()
