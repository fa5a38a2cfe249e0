"""The CUDA kernels under nvcc: no spills, registers within bounds, accesses as wide as they are meant to be.

Needs the CUDA toolkit and no GPU.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_compile"
#: One of those in the static report (bench/static.py): each takes minutes, and tests/test_static.py holds that report,
#: of sm_80, sm_90 and sm_100, to these sources.
ARCHITECTURES = ("sm_90",)

#: The 65536 of a multiprocessor by fused_norm::Keep: three blocks of 256 threads that hold their rows in registers, one
#: of 1024 that holds a row in shared memory, three of 256 with a slice each.
MOST_REGISTERS = (80, 64, 80)


def cuda_home() -> Path | None:
    """A toolkit that has its headers: an nvcc found on PATH may be a script that stands before it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc is not None:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates += sorted(map(str, Path("/usr/local").glob("cuda-*")))
    for home in map(Path, filter(None, candidates)):
        if (home / "include" / "cuda_runtime.h").exists() and (home / "bin" / "nvcc").exists():
            return home
    return None


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    home, triton = cuda_home(), find_spec("triton")
    places = [home / "bin"] if home else []
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


pytestmark = [pytest.mark.slow, pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit here")]


@dataclass(frozen=True)
class Kernel:
    """One instantiation as ptxas reports it."""

    symbol: str
    registers: int
    stack: int
    spilled: int

    @property
    def switches(self) -> tuple[bool, bool, int]:
        """IS_RMS, VECTOR, KEEP: the last three of the template's arguments."""
        rms, vector, keep = re.search(r"Lb([01])ELb([01])ELNS_4KeepE([012])EE", self.symbol).groups()
        return rms == "1", vector == "1", int(keep)


def compile_for(architecture: str, name: str = "norm_forward") -> tuple[Path, str]:
    """The cubin of csrc/cuda/NAME.cu and what ptxas said, kept in the build folder by a name made of what went in."""
    home = cuda_home()
    command = [str(home / "bin" / "nvcc"), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True).stdout
    sources = sorted(p for p in KERNELS.iterdir() if p.suffix in (".h", ".cuh") or p.name == f"{name}.cu")
    digest = hashlib.sha256(repr(command).encode() + version)
    for path in sources:
        digest.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    cubin = BUILD / f"{name}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        source = str(KERNELS / f"{name}.cu")
        done = subprocess.run([*command, source, "-o", str(cubin)], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stdout + done.stderr)
    return cubin, log.read_text()


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[Path, str]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES), strict=True))


def kernels(log: str) -> list[Kernel]:
    pattern = (
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers"
    )
    return [Kernel(s, int(r), int(frame), int(a) + int(b)) for s, frame, a, b, r in re.findall(pattern, log)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    found = kernels(compiled[architecture][1])
    # 6 pairs of types, layer and rms; in registers, in shared memory, in slices, element by element.
    assert len(found) == 6 * 2 * 4
    for kernel in found:
        assert kernel.stack == 0 and kernel.spilled == 0, kernel
        assert kernel.registers <= MOST_REGISTERS[kernel.switches[2]], kernel


def disassembled(cubin: Path) -> Iterator[tuple[str, str]]:
    """Each function of the cubin and its machine code."""
    text = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], check=True, text=True, capture_output=True).stdout
    _, *pieces = re.split(r"Function : (\S+)", text)
    yield from zip(pieces[::2], pieces[1::2], strict=True)


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump here (CUDA toolkit, triton)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_rows_move_16_bytes_at_a_time(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    seen = 0
    for symbol, code in disassembled(compiled[architecture][0]):
        rms, vector, keep = Kernel(symbol, 0, 0, 0).switches
        accesses = re.findall(r"\b(LDG|STG|LDGSTS)\.E((?:\.[A-Z0-9]+)*)", code)
        wide = [kind for kind, suffix in accesses if ".128" in suffix]
        narrow = [kind for kind, suffix in accesses if ".128" not in suffix]
        assert not re.search(r"\b(LDL|STL)\b", code), symbol  # no register array in local memory
        assert ("UCGABAR" in code) == (keep == 2), symbol  # clusters, to sums over slices alone
        if not vector:
            assert not wide, symbol
            continue
        seen += 1
        # Four chunks of x in flight, of a slice straight to shared memory, then weight and bias; one store a chunk.
        assert wide.count("LDGSTS" if keep == 2 else "LDG") >= 4 and wide.count("STG") >= 1, (symbol, accesses)
        # What is narrow: the pivot (layer only), and rstd and mean.
        assert narrow.count("LDG") <= (0 if rms else 1) and "LDGSTS" not in narrow, (symbol, accesses)
        assert narrow.count("STG") <= (1 if rms else 2), (symbol, accesses)
    assert seen == 6 * 2 * 3
