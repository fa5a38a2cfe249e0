"""``python -m fused_norm``: what it prints, and that its exit status is earned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fused_norm

PACKAGE = Path(fused_norm.__file__).parent


def _run(*arguments: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("FUSED_NORM_BACKEND", "TRITON_INTERPRET")} | environment
    env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], env=env, cwd=path, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report() -> subprocess.CompletedProcess:
    return _run("-m", "fused_norm")


def test_it_succeeds_here(report) -> None:
    assert report.returncode == 0, report.stdout + report.stderr


def test_it_prints_versions_and_devices(report) -> None:
    for word in (fused_norm.__version__, torch.__version__, sys.version.split()[0], "cpu"):
        assert word.lower() in report.stdout.lower(), word
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in report.stdout


def test_it_prints_every_backend_and_why_one_is_missing(report) -> None:
    for name, reason in fused_norm.available_backends().items():
        assert name in report.stdout
        if reason is not None:
            assert reason in report.stdout or " ".join(reason.split()) in " ".join(report.stdout.split()), name


def test_it_checks_forward_and_backward_of_each_available_backend(report) -> None:
    for name, reason in fused_norm.available_backends().items():
        lines = [line for line in report.stdout.splitlines() if name in line]
        assert lines
        if reason is None and name != "reference":
            assert any("ok" in line.lower() or "pass" in line.lower() for line in lines), report.stdout


def test_it_works_without_extension_and_triton(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fused_norm", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    done = _run("-m", "fused_norm", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native" in done.stdout and "triton" in done.stdout


#: Bugs planted in a backend before the report runs, each of which it must find.
BUGS = {
    "y": "out = forward(*a); return out[0] * 1.01, out[1]",
    "dx": "out = backward(*a); return (None if out[0] is None else out[0] * 1.01), *out[1:]",
    "dw": "out = backward(*a); return out[0], (None if out[1] is None else out[1] * 1.01), out[2]",
    "db": "out = backward(*a); return out[0], out[1], (None if out[2] is None else out[2] * 1.01)",
    "exception": "raise RuntimeError('planted')",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_backend_fails_the_check(bug: str) -> None:
    if fused_norm.available_backends()["native"] is not None:
        pytest.skip(f"native: {fused_norm.available_backends()['native']}")
    which = "norm_forward" if bug in ("y", "exception") else "norm_backward"
    script = f"""
    import runpy, sys
    import fused_norm, fused_norm.backends.native as backend
    forward, backward = backend.norm_forward, backend.norm_backward
    def wrong(*a):
        {BUGS[bug]}
    backend.{which} = wrong
    sys.argv = ["fused_norm"]
    runpy.run_module("fused_norm", run_name="__main__", alter_sys=True)
    """
    done = _run("-c", textwrap.dedent(script))
    assert done.returncode not in (0, None), done.stdout
    lines = [line for line in done.stdout.splitlines() if "native" in line]
    assert any(word in line.lower() for line in lines for word in ("fail", "wrong", "planted")), (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("op, what", [("layer_norm", "value"), ("rms_norm", "gradient")])
def test_a_wrong_torch_backend_fails_the_check(op: str, what: str) -> None:
    """Needs no extension: torch's own function is made wrong."""
    change = "y * 1.01" if what == "value" else "y.detach() + 1.01 * (y - y.detach())"
    script = f"""
    import runpy, sys
    import torch.nn.functional as F
    original = F.{op}
    def wrong(*a, **k):
        y = original(*a, **k)
        return {change}
    F.{op} = wrong
    sys.argv = ["fused_norm"]
    runpy.run_module("fused_norm", run_name="__main__", alter_sys=True)
    """
    done = _run("-c", textwrap.dedent(script))
    assert done.returncode not in (0, None), done.stdout + done.stderr


def test_an_unknown_command_is_refused() -> None:
    done = _run("-m", "fused_norm", "no-such-command")
    assert done.returncode == 2 and "no-such-command" in done.stderr
    assert _run("-m", "fused_norm", "--help").returncode == 0
