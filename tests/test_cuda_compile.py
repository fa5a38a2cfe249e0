"""The CUDA kernels as they are built: no spills, registers within bounds, accesses as wide as they are meant to be.

Needs cuobjdump, and an extension that was built for one of the architectures; no GPU.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

#: Those that a build without TORCH_CUDA_ARCH_LIST has.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

#: The 65536 of a multiprocessor by fused_norm::Keep: three blocks of 256 threads that hold their rows in registers, one
#: of 1024 that holds a row in shared memory, three of 256 with a slice each.
MOST_REGISTERS = (80, 64, 80)


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump here (CUDA toolkit, triton)")
pytestmark = needs_cuobjdump


def dump(*options: str, cwd: Path | None = None) -> str:
    return subprocess.run([cuobjdump(), *options], check=True, text=True, capture_output=True, cwd=cwd).stdout


@dataclass(frozen=True)
class Kernel:
    """What one instantiation takes; local memory beside the stack frame."""

    symbol: str
    registers: int
    stack: int
    local: int

    @property
    def switches(self) -> tuple[bool, bool, int]:
        """IS_RMS, VECTOR, KEEP: the last three of the template's arguments."""
        rms, vector, keep = re.search(r"Lb([01])ELb([01])ELNS_4KeepE([012])EE", self.symbol).groups()
        return rms == "1", vector == "1", int(keep)


def kernels(cubin: Path) -> list[Kernel]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)\s.*?LOCAL:(\d+)", dump("-res-usage", str(cubin)))
    return [Kernel(symbol, *map(int, numbers)) for symbol, *numbers in found]


def disassembled(cubin: Path) -> Iterator[tuple[str, str]]:
    """Each function of the cubin and its machine code."""
    _, *pieces = re.split(r"Function : (\S+)", dump("--dump-sass", str(cubin)))
    yield from zip(pieces[::2], pieces[1::2], strict=True)


@functools.cache
def _cubins() -> tempfile.TemporaryDirectory:
    """The extension's cubins, one for each architecture and source, until this process ends."""
    extension = find_spec("fused_norm._C_cuda")
    if extension is None:
        pytest.skip("the CUDA extension is not built")
    folder = tempfile.TemporaryDirectory()
    dump("-xelf", "all", extension.origin, cwd=Path(folder.name))
    return folder


def cubin_of(architecture: str, name: str) -> Path:
    """What csrc/cuda/NAME.cu became in the extension."""
    cubins = list(Path(_cubins().name).glob(f"*.{architecture}.cubin"))
    if not cubins:
        pytest.skip(f"the CUDA extension was not built for {architecture}")
    (cubin,) = [c for c in cubins if any(name in k.symbol for k in kernels(c))]
    return cubin


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(architecture: str) -> None:
    found = kernels(cubin_of(architecture, "norm_forward"))
    # 6 pairs of types, layer and rms; in registers, in shared memory, in slices, element by element.
    assert len(found) == 6 * 2 * 4
    for kernel in found:
        assert kernel.stack == kernel.local == 0, kernel
        assert kernel.registers <= MOST_REGISTERS[kernel.switches[2]], kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_rows_move_16_bytes_at_a_time(architecture: str) -> None:
    seen = 0
    for symbol, code in disassembled(cubin_of(architecture, "norm_forward")):
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
