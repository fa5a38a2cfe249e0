"""Which backend serves a call, and what is said when one cannot."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, OPS, assert_same_bits, call, leaf

import fused_norm
import fused_norm.functional as FF

BACKENDS = ("triton", "native", "torch", "reference")
PACKAGE = Path(fused_norm.__file__).parent


def _norm() -> torch.Tensor:
    return FF.layer_norm(torch.randn(3, 8), (8,))


# ------------------------------------------------------------------------------------------------- available_backends


def test_available_backends_names_each_and_gives_reasons() -> None:
    found = fused_norm.available_backends()
    assert set(found) == set(BACKENDS)
    assert found["torch"] is None and found["reference"] is None
    for name, reason in found.items():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10), name


def test_available_backends_is_the_callers_to_change() -> None:
    fused_norm.available_backends()["torch"] = "broken"
    assert fused_norm.available_backends()["torch"] is None


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_by_name_runs_or_says_why_not(name: str) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    reason = fused_norm.available_backends()[name]
    if reason is None and not (name == "triton" and torch.cuda.is_available()):
        with fused_norm.use_backend(name):
            y = FF.layer_norm(x, (8,))
            y.backward(torch.ones_like(y))
        torch.testing.assert_close(y, F.layer_norm(x, (8,)))
        return
    with pytest.raises(RuntimeError) as caught, fused_norm.use_backend(name):
        FF.layer_norm(x, (8,))
    assert name in str(caught.value)
    assert torch.cuda.is_available() or reason in str(caught.value)


@pytest.mark.parametrize("name", ["nativ", "", "TORCH", "cuda"])
def test_an_unknown_name_raises_and_lists_the_names(name: str) -> None:
    with pytest.raises(ValueError) as caught, fused_norm.use_backend(name):
        pass
    assert repr(name) in str(caught.value)
    for known in ("auto", *BACKENDS):
        assert known in str(caught.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_backend_is_torchs_function_bit_for_bit(op: str, dtype: torch.dtype) -> None:
    x, w, b, dy = (torch.randn(*s).to(dtype) for s in ((40, 96), (96,), (96,), (40, 96)))
    results = []
    with fused_norm.use_backend("torch"):
        for namespace in (FF, F):
            leaves = [leaf(x), leaf(w)] + ([leaf(b)] if op == "layer_norm" else [])
            y = call(op, namespace, leaves[0], (96,), *leaves[1:])
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for a, e in zip(*results, strict=True):
        assert_same_bits(a, e)


# ------------------------------------------------------------------------------------------------------- use_backend


class Served:
    """Which backend served ``_norm()``: seen by whether the reference recorded a call."""

    def __init__(self, calls) -> None:
        self.calls = calls

    def by_reference(self) -> bool:
        before = len(self.calls.forward)
        _norm()
        return len(self.calls.forward) > before


@pytest.fixture
def served(reference_calls) -> Served:
    return Served(reference_calls)


def test_the_reference_serves_only_by_name(served: Served) -> None:
    assert not served.by_reference()
    with fused_norm.use_backend("auto"):
        assert not served.by_reference()


def test_use_backend_nests_and_restores(served: Served) -> None:
    with fused_norm.use_backend("reference"):
        assert served.by_reference()
        with fused_norm.use_backend("torch"):
            assert not served.by_reference()
            with fused_norm.use_backend("reference"):
                assert served.by_reference()
            assert not served.by_reference()
        assert served.by_reference()
        with fused_norm.use_backend("auto"):
            assert not served.by_reference()
        assert served.by_reference()
    assert not served.by_reference()


def test_use_backend_restores_after_an_exception(served: Served) -> None:
    with fused_norm.use_backend("reference"):
        with pytest.raises(KeyError), fused_norm.use_backend("torch"):
            raise KeyError
        assert served.by_reference()
    with pytest.raises(ValueError), fused_norm.use_backend("reference"), fused_norm.use_backend("no such"):
        pass
    assert not served.by_reference()


def test_use_backend_is_local_to_the_thread(served: Served) -> None:
    inside, checked, seen = threading.Event(), threading.Event(), {}

    def worker() -> None:
        with fused_norm.use_backend("reference"):
            seen["worker, inside"] = served.by_reference()
            inside.set()
            checked.wait(10)

    thread = threading.Thread(target=worker)
    thread.start()
    assert inside.wait(10)
    seen["main, meanwhile"] = served.by_reference()
    checked.set()
    thread.join()
    seen["main, after"] = served.by_reference()
    assert seen == {"worker, inside": True, "main, meanwhile": False, "main, after": False}


def test_a_new_thread_starts_from_the_default(served: Served) -> None:
    seen = []
    with fused_norm.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(served.by_reference()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_use_backend_is_local_to_the_task(served: Served) -> None:
    async def task(name: str, log: list) -> None:
        with fused_norm.use_backend(name):
            for _ in range(3):
                log.append(served.by_reference())
                await asyncio.sleep(0)

    async def both() -> tuple[list, list]:
        one, two = [], []
        await asyncio.gather(task("reference", one), task("torch", two))
        return one, two

    assert asyncio.run(both()) == ([True] * 3, [False] * 3)


def test_backends_are_chosen_without_touching_global_state() -> None:
    """Choosing one costs the others nothing: torch's own function is what it was."""
    before = F.layer_norm, torch.layer_norm, torch.nn.LayerNorm
    with fused_norm.use_backend("reference"):
        _norm()
        assert (F.layer_norm, torch.layer_norm, torch.nn.LayerNorm) == before


def test_auto_takes_native_before_torch_on_a_cpu(monkeypatch) -> None:
    if fused_norm.available_backends()["native"] is not None:
        pytest.skip(f"native: {fused_norm.available_backends()['native']}")
    import fused_norm.backends.native as native

    seen, original = [], native.norm_forward
    monkeypatch.setattr(native, "norm_forward", lambda *a, **k: seen.append(1) or original(*a, **k))
    _norm()
    assert seen == [1]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_every_backend_keeps_the_contract(name: str, groups: int, rms: bool) -> None:
    """Arguments by position, and what comes back: dtypes and shapes of ``fused_norm.backends``."""
    if (reason := fused_norm.available_backends()[name]) is not None:
        pytest.skip(f"{name}: {reason}")
    module = importlib.import_module("fused_norm.reference" if name == "reference" else f"fused_norm.backends.{name}")
    assert module.unavailable("cpu") is None
    assert isinstance(module.unavailable("meta"), str) or name == "reference"
    x, dy, w, b = (torch.randn(s).bfloat16() for s in ((2, 3, 8), (6, 8), (groups, 8), (groups, 8)))
    y, stats = module.norm_forward(x, w, b, 8, groups, 1e-5, rms, True)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous() and not y._is_view()
    assert stats.shape == (1 if rms else 2, 6) and stats.dtype == torch.float32
    no_stats = module.norm_forward(x, w, b, 8, groups, 1e-5, rms, False)[1]
    assert no_stats is None or no_stats.shape == (0, 6)
    dx, dw, db = module.norm_backward(dy, x, stats, w, 8, groups, rms, torch.float32, True, True, True)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    assert dw.shape == db.shape == (groups, 8) and dw.dtype == db.dtype == torch.float32
    module.norm_backward(dy, x, stats, None, 8, groups, rms, torch.float32, True, False, False)
    ddx, ddw = torch.randn(6, 8).bfloat16(), torch.randn(groups, 8)
    args = ddx, ddw, ddw, dy, x, stats, w.float(), 8, groups, rms, torch.float32
    grad_dy, grad_x, grad_w = module.norm_double_backward(*args, True, True, True)
    assert grad_dy.shape == grad_x.shape == x.shape and grad_dy.dtype == grad_x.dtype == x.dtype
    assert grad_w.shape == (groups, 8) and grad_w.dtype == torch.float32
    args = None, None, ddw, None, x, stats, None, 8, groups, rms, torch.float32
    assert module.norm_double_backward(*args, True, False, False)[0].shape == x.shape


# ----------------------------------------------------------------------------------------------- other processes

BLOCK = """
import logging, sys
class Blocker:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def _python(
    code: str, *, blocked: tuple[str, ...] = (), path: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("FUSED_NORM_BACKEND", "TRITON_INTERPRET")} | environment
    env["PYTHONPATH"] = str(path)
    script = BLOCK.format(names=blocked) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=path, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it installs where there is no compiler: without extensions."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, root / "fused_norm", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return root


WORKS = """
    logging.basicConfig(level=logging.INFO, format="%(name)s|%(levelname)s|%(message)s")
    import torch, torch.nn.functional as F, fused_norm, fused_norm.functional as FF
    print(fused_norm.available_backends())
    for op, ns in (("layer_norm", (FF, F)), ("rms_norm", (FF, F))):
        for _ in range(3):
            x, w = torch.randn(5, 24, requires_grad=True), torch.ones(24, requires_grad=True)
            dy = torch.randn(5, 24)
            ours, theirs = (getattr(n, op)(x, (24,), w) for n in ns)
            torch.testing.assert_close(ours, theirs)
            for a, b in zip(torch.autograd.grad(ours, (x, w), dy), torch.autograd.grad(theirs, (x, w), dy)):
                torch.testing.assert_close(a, b)
    model = torch.nn.Sequential(torch.nn.LayerNorm(24))
    assert fused_norm.patch(model).swapped
    model(torch.randn(2, 24)).sum().backward()
    loss = FF.ticks_cross_entropy(torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 8, -100]))
    loss.backward()
    print("worked")
"""


def test_without_extension_and_triton_it_works_and_logs_once(pure_python: Path) -> None:
    done = _python(WORKS, blocked=("triton",), path=pure_python)
    assert done.returncode == 0 and "worked" in done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fused_norm|")]
    assert len(lines) == 2, done.stderr  # for the norms and for ticks
    assert all("native" in line and "torch" in line for line in lines) and "norm" in lines[0] and "ticks" in lines[1]
    reasons = eval(done.stdout.splitlines()[0])
    assert reasons["torch"] is None and reasons["reference"] is None
    assert reasons["native"] and "triton" in reasons["triton"].lower()
    assert reasons["native"] in lines[0]


def test_without_triton_alone_it_works() -> None:
    done = _python(WORKS, blocked=("triton",))
    assert done.returncode == 0 and "worked" in done.stdout, done.stderr
    reasons = eval(done.stdout.splitlines()[0])
    assert "triton" in reasons["triton"].lower()
    # On a CPU triton is not the first choice, so its absence is not a fall-back.
    assert "fused_norm|" not in done.stderr or reasons["native"] is not None


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_missing_backend_by_name_raises_with_the_reason(name: str, pure_python: Path) -> None:
    code = f"""
    import torch, fused_norm, fused_norm.functional as FF
    reason = fused_norm.available_backends()[{name!r}]
    try:
        with fused_norm.use_backend({name!r}):
            FF.layer_norm(torch.randn(2, 4), (4,))
    except RuntimeError as error:
        assert {name!r} in str(error) and reason in str(error), (error, reason)
        FF.layer_norm(torch.randn(2, 4), (4,))
        print("raised")
    """
    done = _python(code, blocked=("triton",), path=pure_python)
    assert "raised" in done.stdout, done.stdout + done.stderr
    by_environment = _python(
        "import torch, fused_norm.functional as FF; FF.layer_norm(torch.randn(2, 4), (4,))",
        blocked=("triton",), path=pure_python, FUSED_NORM_BACKEND=name,
    )  # fmt: skip
    assert by_environment.returncode != 0 and "RuntimeError" in by_environment.stderr and name in by_environment.stderr


def test_an_extension_that_does_not_load_is_reported_not_raised(pure_python: Path, tmp_path: Path) -> None:
    """A broken or foreign binary, such as one built for another torch: the package imports, and says what is wrong."""
    shutil.copytree(pure_python / "fused_norm", tmp_path / "fused_norm")
    for directory in (tmp_path / "fused_norm", tmp_path / "fused_norm" / "backends"):
        (directory / "_C.abi3.so").write_bytes(b"not an extension")
    done = _python(WORKS, path=tmp_path)
    assert done.returncode == 0 and "worked" in done.stdout, done.stderr
    assert eval(done.stdout.splitlines()[0])["native"]


def test_the_environment_chooses(tmp_path: Path) -> None:
    code = """
    import torch, fused_norm, fused_norm.reference as reference, fused_norm.functional as FF
    seen, original = [], reference.norm_forward
    reference.norm_forward = lambda *a, **k: seen.append(1) or original(*a, **k)
    x = torch.randn(2, 4)
    FF.layer_norm(x, (4,)); print(len(seen))
    with fused_norm.use_backend("torch"): FF.layer_norm(x, (4,))
    print(len(seen))
    import threading
    t = threading.Thread(target=lambda: FF.layer_norm(x, (4,))); t.start(); t.join(); print(len(seen))
    """
    assert _python(code, FUSED_NORM_BACKEND="reference").stdout.split() == ["1", "1", "2"]
    assert _python(code, FUSED_NORM_BACKEND="auto").stdout.split() == ["0", "0", "0"]
    assert _python(code).stdout.split() == ["0", "0", "0"]


def test_a_bad_environment_value_raises_and_names_it() -> None:
    done = _python(
        "import torch, fused_norm.functional as FF; FF.layer_norm(torch.randn(2, 4), (4,))", FUSED_NORM_BACKEND="nativ"
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ValueError" in last and "'nativ'" in last and "reference" in last


def test_importing_is_quiet_and_starts_nothing() -> None:
    """No output, no CUDA context, no compiler, no triton: those come with the first call that needs them."""
    code = """
    import threading
    import torch
    before = threading.active_count(), set(sys.modules)
    import fused_norm
    assert not torch.cuda.is_initialized()
    assert "triton" not in set(sys.modules) - before[1] and "torch._inductor" not in set(sys.modules) - before[1]
    assert threading.active_count() == before[0]
    assert not logging.getLogger("fused_norm").handlers or all(
        isinstance(h, logging.NullHandler) for h in logging.getLogger("fused_norm").handlers)
    assert not logging.getLogger().handlers
    """
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "fused_norm" not in done.stderr


def test_nothing_is_logged_where_the_first_choice_serves(caplog: pytest.LogCaptureFixture) -> None:
    if fused_norm.available_backends()["native"] is not None:
        pytest.skip("native is missing")
    with caplog.at_level(logging.DEBUG, logger="fused_norm"):
        _norm()
        with fused_norm.use_backend("reference"):
            _norm()
    assert not caplog.records
