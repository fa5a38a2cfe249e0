"""Many threads, tasks, processes and streams at once: the results are those of one alone, to the bit.

The kernels hold no state, a choice of backend is the thread's (or the task's) own, and what torch's norms survive,
forks among it, ours do.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import worker_processes
from cases import OPS, NormCase, assert_same_bits, call, draw, exception_of, leaf, run
from subprocesses import Outcomes, assert_passed, run_worker
from torch import Tensor

import fused_norm
import fused_norm.functional as FF
from fused_norm.testing import NormResult

THREADS = 8
CASES = [
    NormCase("layer_norm", 300, 768, torch.float32),  # large enough to be spread over the pool
    NormCase("rms_norm", 300, 768, torch.bfloat16, param_dtype=torch.float32),
    NormCase("layer_norm", 3, 16, torch.float64),
    NormCase("rms_norm", 2, 5000, torch.float32),
]


def _together(work: Callable[[int], object], count: int = THREADS) -> list:
    """The results of ``work(0)``, ``work(1)``, ..., each in a thread of its own; all start at once."""
    barrier = threading.Barrier(count)

    def start(i: int) -> object:
        barrier.wait(30)
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [f.result(timeout=120) for f in [pool.submit(start, i) for i in range(count)]]


def _assert_same(a: NormResult, b: NormResult, what: str = "") -> None:
    for name in ("y", "dx", "dw", "db"):
        assert_same_bits(getattr(a, name), getattr(b, name), f"{what} {name}")


def _backends() -> list[str]:
    return [b for b in ("native", "torch", "reference") if fused_norm.available_backends()[b] is None]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """{thread: the backends of ours whose forward or backward ran in it}."""
    seen: dict[int, set[str]] = {}
    modules = {"reference": "fused_norm.reference", "native": "fused_norm.backends.native"}
    for name in set(modules) & set(_backends()):
        module = importlib.import_module(modules[name])
        for function in ("norm_forward", "norm_backward"):
            original = getattr(module, function)

            def recorded(*args, original=original, name=name):
                seen.setdefault(threading.get_ident(), set()).add(name)
                return original(*args)

            monkeypatch.setattr(module, function, recorded)
    return seen


# ------------------------------------------------------------------------------------------------------------ threads


def test_threads_on_inputs_of_their_own(place) -> None:
    inputs = [draw(CASES[i % len(CASES)], place.device) for i in range(THREADS)]
    expected = [run(CASES[i % len(CASES)], inputs[i]) for i in range(THREADS)]

    def work(i: int) -> list[NormResult]:
        with fused_norm.use_backend(place.backend):
            return [run(CASES[i % len(CASES)], inputs[i]) for _ in range(4)]

    for i, results in enumerate(_together(work)):
        for result in results:
            _assert_same(result, expected[i], f"thread {i}")


@pytest.mark.parametrize("op", OPS)
def test_threads_on_one_module(op: str, place) -> None:
    """The same module and the same input: ``.grad`` is the sum, and the outputs are all alike."""
    module = (fused_norm.LayerNorm if op == "layer_norm" else fused_norm.RMSNorm)(64).to(place.device)
    x, dy = torch.randn(20, 64, device=place.device), torch.randn(20, 64, device=place.device)
    inner = leaf(x)
    y = module(inner)
    y.backward(dy)
    once = [t.grad.clone() for t in (inner, *module.parameters())]
    module.zero_grad()
    inner.grad = None

    def work(i: int) -> Tensor:
        with fused_norm.use_backend(place.backend):
            out = module(inner)
        out.backward(dy)
        return out.detach()

    for out in _together(work):
        assert_same_bits(out, y.detach())
    # Eight times the same number: a sum whose order does not show, as long as none is lost.
    for t, g in zip((inner, *module.parameters()), once, strict=True):
        torch.testing.assert_close(t.grad, THREADS * g, rtol=1e-5, atol=1e-5)


def test_threads_with_backends_of_their_own(served: dict[int, set[str]]) -> None:
    """The choice does not leak from one thread into another, nor does it end with another's block."""
    names, case = _backends(), CASES[2]
    inputs = draw(case)
    expected = {}
    for name in names:
        with fused_norm.use_backend(name):
            expected[name] = run(case, inputs)
    ours: dict[int, str] = {}
    served.clear()
    main = threading.get_ident()

    def work(i: int) -> None:
        name = names[i % len(names)]
        ours[threading.get_ident()] = name
        for _ in range(20):
            with fused_norm.use_backend(name):
                _assert_same(run(case, inputs), expected[name], name)

    with fused_norm.use_backend("reference"):
        _together(work)
        run(case, inputs)
    assert len(ours) == THREADS
    for thread, name in ours.items():
        assert served.get(thread, set()) == ({name} if name != "torch" else set()), name
    assert served[main] == {"reference"}


def test_backward_in_another_thread(served: dict[int, set[str]]) -> None:
    """Backward runs on forward's backend, whoever calls it and whatever that thread has chosen."""
    case = CASES[0]
    inputs = draw(case)
    with fused_norm.use_backend("reference"):
        expected = run(case, inputs)
        x, w, b = leaf(inputs.x), leaf(inputs.weight), leaf(inputs.bias)
        y = call(case.op, FF, x, (case.n,), w, b)
    served.clear()

    def work(i: int) -> list[Tensor]:
        with fused_norm.use_backend("torch"):
            return list(torch.autograd.grad(y, (x, w, b), inputs.dy, retain_graph=True))

    for grads in _together(work, 3):
        for g, e in zip(grads, (expected.dx, expected.dw, expected.db), strict=True):
            assert_same_bits(g, e)
    assert set().union(*served.values()) == {"reference"} and threading.get_ident() not in served


def test_errors_in_one_thread_do_not_disturb_others(place) -> None:
    case = CASES[0]
    inputs = draw(case, place.device)
    expected = run(case, inputs)

    def work(i: int) -> object:
        with fused_norm.use_backend(place.backend):
            if i % 2 == 0:
                return [run(case, inputs) for _ in range(3)]
            bad = [(inputs.x, (case.n + 1,)), (inputs.x, ()), (inputs.x.long(), (case.n,))]
            return [type(exception_of(FF.layer_norm, *arguments)) for arguments in bad * 5]

    for i, result in enumerate(_together(work)):
        if i % 2:
            assert result == [RuntimeError, RuntimeError, NotImplementedError] * 5
        else:
            for r in result:
                _assert_same(r, expected)
    with fused_norm.use_backend(place.backend):
        _assert_same(run(case, inputs), expected)


def test_number_of_threads_changed_meanwhile() -> None:
    """``set_num_threads`` at any moment, from any thread: the bits of our kernels do not move."""
    if "native" not in _backends():
        pytest.skip(fused_norm.available_backends()["native"])
    before, stop = torch.get_num_threads(), threading.Event()
    inputs = [draw(case) for case in CASES]
    with fused_norm.use_backend("native"):
        expected = [run(case, i) for case, i in zip(CASES, inputs, strict=True)]

    def work(i: int) -> None:
        if i == 0:
            for count in (1, 3, 2, 1, 4) * 200:
                torch.set_num_threads(count)
                if stop.wait(0.002):
                    return
            return
        with fused_norm.use_backend("native"):
            for k in range(12):
                torch.set_num_threads(1 + (i + k) % 3)
                for case, given, e in zip(CASES, inputs, expected, strict=True):
                    _assert_same(run(case, given), e)
        stop.set()

    try:
        _together(work, 4)
    finally:
        torch.set_num_threads(before)


def test_grad_mode_is_the_threads_own(place) -> None:
    x = torch.randn(4, 16, device=place.device, requires_grad=True)

    def work(i: int) -> bool:
        with fused_norm.use_backend(place.backend), torch.set_grad_enabled(i % 2 == 0):
            return all(FF.rms_norm(x, (16,)).requires_grad == (i % 2 == 0) for _ in range(20))

    assert all(_together(work))


def test_a_context_carries_the_choice_into_a_thread(served: dict[int, set[str]]) -> None:
    """A plain thread starts from the default; one that is given the context, as asyncio.to_thread does, keeps it."""
    x = torch.randn(4, 16)

    def where() -> set[str]:
        served.pop(threading.get_ident(), None)
        FF.layer_norm(x, (16,))
        return served.get(threading.get_ident(), set())

    async def tasks() -> list[set[str]]:
        async def task(name: str) -> list[set[str]]:
            with fused_norm.use_backend(name):
                first = await asyncio.to_thread(where)
                await asyncio.sleep(0)
                plain = await asyncio.get_running_loop().run_in_executor(None, where)
                return [first, where(), plain]

        return await asyncio.gather(*(task(n) for n in ("reference", "torch")))

    default = where()
    reference, torchs = asyncio.run(tasks())
    assert reference == [{"reference"}, {"reference"}, default]
    assert torchs == [set(), set(), default]
    with fused_norm.use_backend("reference"):
        context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(context.run, where).result() == {"reference"}
        assert pool.submit(where).result() == default


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Outcomes]:
    """What a process of its own found in the checks of worker_processes.py."""
    return run_worker("worker_processes.py", tmp_path_factory.mktemp("alone"))


@pytest.mark.skipif(not hasattr(torch.multiprocessing, "get_context"), reason="no multiprocessing here")
@pytest.mark.parametrize("check", [c.__name__ for c in worker_processes.CHECKS])
def test_in_a_process_of_its_own(check: str, alone: list[Outcomes]) -> None:
    assert_passed(check, alone)


# ----------------------------------------------------------------------------------------------- CUDA: streams, devices


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_threads_with_streams_of_their_own(op: str) -> None:
    case = NormCase(op, 64, 512, torch.bfloat16)
    inputs = [draw(case, "cuda") for _ in range(4)]
    expected = [run(case, i) for i in inputs]
    torch.cuda.synchronize()

    def work(i: int) -> list[NormResult]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(case, inputs[i]) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return results

    for i, results in enumerate(_together(work, 4)):
        for result in results:
            _assert_same(result, expected[i], f"thread {i}")
