"""Try a wheel under several interpreters: ``python tests/check_wheel.py dist/fused_norm-*.whl PYTHON...``

Each interpreter must have torch. The wheel is installed without its dependencies into a folder of its own, so nothing
in the interpreter's environment changes, and a smoke test runs there: the extension is loaded, and forward and backward
agree with fp64.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = """
import sys, torch
import fused_norm
from fused_norm.backends import native
from fused_norm.testing import NormResult, assert_norm_close, norm_truth
import fused_norm.functional as FF

folder = sys.argv[1]
assert fused_norm.__file__.startswith(folder), fused_norm.__file__
assert native.unavailable("cpu") is None, native.unavailable("cpu")
assert native._C.__file__.startswith(folder), native._C.__file__
torch.manual_seed(0)
for capability in native.cpu_capabilities():
    native.set_cpu_capability(capability)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        shapes = (64, 515), (515,), (515,), (64, 515)
        x, weight, bias, dy = (torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
        for rms in (False, True):
            leaves = [t.clone().requires_grad_() for t in ((x, weight) if rms else (x, weight, bias))]
            results = []
            for module in (FF, torch.nn.functional):
                if rms:
                    y = module.rms_norm(leaves[0], (515,), leaves[1], 1e-5)
                else:
                    y = module.layer_norm(leaves[0], (515,), *leaves[1:], 1e-5)
                results.append(NormResult(y.detach(), *torch.autograd.grad(y, leaves, dy)))
            assert_norm_close(results[0], norm_truth(x, weight, None if rms else bias, dy, 515, 1e-5, rms), results[1])
print("torch", torch.__version__, "python", sys.version.split()[0], *native.cpu_capabilities())
print("cuda:", native.unavailable("cuda"))
"""


def check(wheel: Path, python: str) -> bool:
    if os.sep in python:  # a path: it is run from another folder (and not resolved: a venv's python is a link)
        python = os.path.abspath(python)
    with tempfile.TemporaryDirectory() as folder:
        install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, str(wheel)]
        # Not from here: the current folder would come before the wheel.
        smoke = [python, "-c", SMOKE, os.path.realpath(folder)]
        env = {**os.environ, "PYTHONPATH": os.path.realpath(folder), "FUSED_NORM_BACKEND": "native"}
        for command in (install, smoke):
            result = subprocess.run(
                command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if result.returncode:
                print(f"{python}: FAILED\n{result.stdout}")
                return False
    print(f"{python}: ok: {'; '.join(result.stdout.splitlines())}")
    return True


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__)
        return 2
    wheel = Path(arguments[0]).resolve()
    if "-abi3-" not in wheel.name:
        print(f"{wheel.name} is not an abi3 wheel")
        return 1
    results = [check(wheel, python) for python in arguments[1:]]  # each, also after a failure
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
