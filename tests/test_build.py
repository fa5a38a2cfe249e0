"""The build: what setup.py makes of each FUSED_NORM_BUILD on machines that lack this or that.

No kernel is compiled here in earnest: a stand-in for the compiler is all that these questions need.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="extensions are built on Linux only"),
]
pytest.importorskip("setuptools")

#: Stands in for the C++ compiler: writes the files it is asked for, and a line about itself into $FAKE_LOG.
FAKE_CXX = """#!{python}
import os, sys
arguments = sys.argv[1:]
sources = [a for a in arguments if a.endswith(".cpp")]
if any(source.endswith(os.environ.get("FAKE_FAILS", "nothing")) for source in sources):
    sys.exit("error: no such luck")
output = arguments[arguments.index("-o") + 1]
open(output, "w").close()
if "-MF" in arguments:
    headers = " ".join(os.environ.get("FAKE_HEADERS", "").split())
    with open(arguments[arguments.index("-MF") + 1], "w") as f:
        f.write(output + ": " + sources[0] + " " + headers + "\\n")
with open(os.environ["FAKE_LOG"], "a") as f:
    f.write(os.path.basename(output) + "\\n")
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that a build reads."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fused_norm"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


@pytest.fixture
def bin_dir(tmp_path):
    """The whole PATH of a build: empty, so that there is no compiler and no nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


@pytest.fixture
def fake_cxx(bin_dir):
    path = bin_dir / "c++"
    path.write_text(FAKE_CXX.format(python=sys.executable))
    path.chmod(0o755)
    return path


def build(tree, bin_dir, mode, *command, **env):
    """Run setup.py as pip would, with nothing in PATH but ``bin_dir`` and no CUDA toolkit."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS")}
    clean |= {"PATH": str(bin_dir), "FUSED_NORM_BUILD": mode, "CUDA_HOME": str(tree / "no-cuda")}
    clean |= {"FAKE_LOG": str(tree / "fake.log")} | env
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, env=clean, text=True, capture_output=True
    )


def wheel_of(tree, bin_dir, mode, **env):
    result = build(tree, bin_dir, mode, "bdist_wheel", **env)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel, result.stderr


def extensions_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.endswith(".so"))


def installed(wheel, tmp_path, code):
    """What ``code`` prints with the wheel unpacked into a folder: what pip does with a wheel, less the network."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = {**os.environ, "PYTHONPATH": str(site)}
    env.pop("FUSED_NORM_BACKEND", None)
    result = subprocess.run([sys.executable, "-c", code], cwd=site, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


WORKS = """
import torch, fused_norm
import fused_norm.functional as FF
x = torch.randn(3, 5, requires_grad=True)
y = FF.layer_norm(x, (5,))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (5,)))
y.backward(torch.randn(3, 5))
print(fused_norm.available_backends()["native"])
"""


def test_off(tree, bin_dir, tmp_path):
    wheel, _ = wheel_of(tree, bin_dir, "off")
    assert wheel.name.endswith("-py3-none-any.whl") and not extensions_in(wheel)
    assert "FUSED_NORM_BUILD=off" in installed(wheel, tmp_path, WORKS)


def test_auto_without_a_compiler(tree, bin_dir, tmp_path):
    wheel, warnings = wheel_of(tree, bin_dir, "auto")
    assert wheel.name.endswith("-py3-none-any.whl") and not extensions_in(wheel)
    assert "WARNING" in warnings and "no C++ compiler" in warnings
    assert "no C++ compiler" in installed(wheel, tmp_path, WORKS)


def test_auto_without_torch(tree, bin_dir, fake_cxx, tmp_path):
    hidden = tmp_path / "hidden" / "torch"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no torch here')")
    wheel, warnings = wheel_of(tree, bin_dir, "auto", PYTHONPATH=str(hidden.parent))
    assert wheel.name.endswith("-py3-none-any.whl") and not extensions_in(wheel)
    assert "torch cannot be imported" in warnings and "--no-build-isolation" in warnings
    assert "torch cannot be imported" in installed(wheel, tmp_path, WORKS)


def test_auto_when_compiling_fails(tree, bin_dir, fake_cxx, tmp_path):
    wheel, warnings = wheel_of(tree, bin_dir, "auto", FAKE_FAILS="kernels_default.cpp")
    assert not extensions_in(wheel)
    assert "WARNING" in warnings and "no such luck" in warnings
    assert "was not built" in installed(wheel, tmp_path, WORKS)


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_explicit_without_a_compiler(tree, bin_dir, mode):
    result = build(tree, bin_dir, mode, "bdist_wheel")
    assert result.returncode != 0
    assert f"FUSED_NORM_BUILD={mode}" in result.stderr and "no C++ compiler" in result.stderr


def test_explicit_when_compiling_fails(tree, bin_dir, fake_cxx):
    result = build(tree, bin_dir, "cpu", "build_ext", FAKE_FAILS="ops.cpp")
    assert result.returncode != 0
    assert "FUSED_NORM_BUILD=cpu" in result.stderr and "no such luck" in result.stderr


def test_cuda_without_a_toolkit(tree, bin_dir, fake_cxx):
    result = build(tree, bin_dir, "cuda", "build_ext")
    assert result.returncode != 0
    assert "FUSED_NORM_BUILD=cuda" in result.stderr and "no CUDA toolkit" in result.stderr


def test_an_unknown_mode(tree, bin_dir):
    result = build(tree, bin_dir, "gpu", "build_ext")
    assert result.returncode != 0
    assert "'gpu'" in result.stderr and "auto, off, cpu, cuda" in result.stderr


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded Python has no abi3")
def test_the_wheel_is_abi3(tree, bin_dir, fake_cxx):
    wheel, _ = wheel_of(tree, bin_dir, "cpu")
    assert "-cp310-abi3-" in wheel.name
    assert extensions_in(wheel) == ["fused_norm/_C.abi3.so"]


def test_only_what_changed_is_built_again(tree, bin_dir, fake_cxx):
    log = tree / "fake.log"

    def built(**env):
        log.unlink(missing_ok=True)
        result = build(tree, bin_dir, "cpu", "build_ext", "--inplace", FAKE_HEADERS="csrc/cpu/vec.h", **env)
        assert result.returncode == 0, result.stderr
        return set(log.read_text().split()) if log.exists() else set()

    everything = built()
    assert {"ops.cpp.o", "kernels_default.cpp.o", "_C.abi3.so"} <= everything or sysconfig.get_config_var(
        "Py_GIL_DISABLED"
    )
    assert list((tree / "fused_norm").glob("_C*.so"))
    assert built() == set()
    future = time.time() + 100
    os.utime(tree / "csrc/ops.cpp", (future, future))
    assert {name for name in built() if name.endswith(".o")} == {"ops.cpp.o"}
    assert built(CXXFLAGS="-DOTHER") == everything  # other flags: all of it


def test_sdist_has_every_source(tree, bin_dir):
    result = build(tree, bin_dir, "auto", "sdist")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" not in result.stderr  # nothing is compiled: nothing to warn of
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"csrc/cpu/vec.h", "csrc/ops.cpp"} <= sources
    assert any(name.endswith(".cu") for name in sources) and any(name.endswith(".cuh") for name in sources)
    assert sources - names == set()
    assert {"setup.py", "fused_norm/py.typed", "LICENSE"} <= names
