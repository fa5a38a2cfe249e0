"""Builds the native extensions; everything else about the package is in pyproject.toml.

FUSED_NORM_BUILD chooses:

    auto    (default) what this machine can build: the CPU kernels, the CUDA kernels too where there is a CUDA toolkit,
            or nothing. Never fails: what cannot be built is left out with a warning, and the package does without it.
    off     no extension: pure Python.
    cpu     the CPU kernels, or an error.
    cuda    the CPU and the CUDA kernels, or an error.

Also read: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME, NVCC_FLAGS and TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"; without it the GPUs
present, without any DEFAULT_CUDA_ARCHS); MAX_JOBS.

The extensions use Python's limited API and the libtorch stable ABI, so a wheel built with one Python and torch serves
all Python >= 3.10 and torch >= 2.11, with and without CUDA. torch must be importable while building:
``pip install --no-build-isolation .``
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "off", "cpu", "cuda")
MIN_TORCH = (2, 11)
# Ampere, Hopper and Blackwell data-centre GPUs; the PTX serves what comes after them.
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"
# Where the build leaves word of why an extension is missing; fused_norm.backends.native reads it.
NOTE = "_build_note.txt"

CXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall"]
# No -ffast-math: NaN and infinity must come through. No contraction either: kernels fuse multiply and add where they
# say so, and so give the same bits wherever the compiler inlines them.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
#: By the end of a source's name.
X86_FLAGS = {
    "avx2": [*AVX2_FLAGS, "-DCPU_CAPABILITY_AVX2"],
    # GCC 12's own AVX-512 header trips these two warnings.
    "avx512": [
        *AVX512_FLAGS,
        "-DCPU_CAPABILITY_AVX512",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
}
STABLE_ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


class CannotBuild(Exception):
    """Says why an extension cannot be built here."""


def find_torch() -> Path:
    """torch's directory: its headers and libraries."""
    try:
        import torch
    except Exception as error:
        raise CannotBuild(
            f"torch cannot be imported while building ({error}); install torch first, then use --no-build-isolation"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        raise CannotBuild(f"torch is {torch.__version__}, the extension needs {'.'.join(map(str, MIN_TORCH))} or later")
    return Path(torch.__file__).resolve().parent


def find_cxx() -> list[str]:
    """The C++ compiler: $CXX, or the first of the usual names."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler: {wanted[0] if wanted else 'c++, g++ and clang++'} not found in PATH")


def find_python_headers() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise CannotBuild(f"Python.h is not in {include}; install Python's development headers")
    return include


def find_cuda() -> Path:
    """The CUDA toolkit's directory, known by its headers: the nvcc in PATH may be a script that lies elsewhere."""
    if wanted := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes = [Path(wanted)]
    else:
        nvcc = shutil.which("nvcc")
        homes = [Path(nvcc).resolve().parent.parent] if nvcc else []
        homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/opt/cuda")]
    for home in homes:
        if (home / "include/cuda_runtime.h").exists() and (home / "bin/nvcc").exists():
            return home
    raise CannotBuild(
        f"no CUDA toolkit: looked for bin/nvcc and include/cuda_runtime.h in {', '.join(map(str, homes))}"
    )


def present_gpus() -> str:
    """Compute capabilities of this machine's GPUs ("9.0;9.0"), or nothing."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return ";".join(sorted(set(re.findall(r"^\d+\.\d+$", out, re.MULTILINE))))


def gencode_flags() -> list[str]:
    flags = []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or present_gpus() or DEFAULT_CUDA_ARCHS
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST has {arch!r}, expected numbers like 9.0, 9.0a or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match.group(4):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def check_cpu() -> None:
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the native kernels are built on Linux only, not on {sys.platform}")
    find_cxx()
    find_python_headers()
    find_torch()


def check_cuda() -> None:
    if not list(ROOT.glob("csrc/cuda/*.cu")) or not (ROOT / "csrc/cuda/bindings.cpp").exists():
        raise CannotBuild("csrc/cuda has no kernels")
    find_cuda()
    gencode_flags()


def plan(mode: str) -> tuple[list[Extension], list[str]]:
    """The extensions to build, and a line on each that is left out."""
    if mode not in MODES:
        raise SystemExit(f"FUSED_NORM_BUILD is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "off":
        return [], ["the native extension was not built: FUSED_NORM_BUILD=off"]
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
    kernels = [path for path in relative_glob("csrc/cpu/*.cpp") if is_x86() or instructions(path) not in X86_FLAGS]
    wanted = [("fused_norm._C", "CPU", ["csrc/ops.cpp", "csrc/ops_ticks.cpp", "csrc/python.cpp", *kernels], check_cpu)]
    if mode != "cpu":
        sources = [*relative_glob("csrc/cuda/*.cu"), "csrc/cuda/bindings.cpp"]
        wanted.append(("fused_norm._C_cuda", "CUDA", sources, check_cuda))
    extensions, notes = [], []
    for name, kind, sources, check in wanted:
        try:
            check()
        except CannotBuild as error:
            if mode != "auto":
                raise SystemExit(f"FUSED_NORM_BUILD={mode}: cannot build the {kind} extension: {error}") from error
            notes.append(f"the {kind} extension was not built: {error}")
            if kind == "CPU":
                break  # the CUDA extension needs its operators
        else:
            extensions.append(Extension(name, sources, py_limited_api=limited, optional=mode == "auto"))
    return extensions, notes


def instructions(source: str) -> str:
    """The instruction set that a source of CPU kernels is for: backward_avx2.cpp's is avx2."""
    return Path(source).stem.rpartition("_")[2]


def relative_glob(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def warn(line: str) -> None:
    print(f"fused_norm: WARNING: {line}", file=sys.stderr, flush=True)


def run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.stdout.strip():
        print(result.stdout, file=sys.stderr, flush=True)
    if result.returncode:
        raise CannotBuild(
            f"this command failed with status {result.returncode}: {shlex.join(command)}\n{result.stdout[-2000:]}"
        )


class BuildPy(build_py):
    """Leaves word in the package of why an extension is missing."""

    def run(self):
        super().run()
        if not self.editable_mode:
            write_note(self.build_lib)


def write_note(build_lib: str) -> None:
    if os.path.isdir(os.path.join(build_lib, "fused_norm")):
        Path(build_lib, "fused_norm", NOTE).write_text("".join(f"{line}\n" for line in NOTES))


class BuildExt(build_ext):
    """Compiles each source by the command it needs (nvcc, or g++ for its instruction set); skips what is up to date."""

    def run(self):
        if not self.inplace:  # what an earlier build with other choices left would go into the wheel
            wanted = {self.get_ext_filename(ext.name.rpartition(".")[2]) for ext in self.extensions}
            for path in Path(self.build_lib, "fused_norm").glob("_C*.so"):
                if path.name not in wanted:
                    path.unlink()
        super().run()
        if not self.inplace:
            write_note(self.build_lib)

    def build_extension(self, ext):
        try:
            self.compile_and_link(ext)
        except CannotBuild as error:
            if MODE != "auto":
                raise SystemExit(f"FUSED_NORM_BUILD={MODE}: cannot build {ext.name}: {error}") from error
            NOTES.append(f"{ext.name} was not built: {str(error).splitlines()[0]}")
            warn(f"{ext.name} was not built; the package does without it. {error}")
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def compile_and_link(self, ext):
        is_cuda = ext.name.endswith("_cuda")
        torch_dir, cuda = find_torch(), find_cuda() if is_cuda else None
        objects_dir = Path(self.build_temp).resolve() / ext.name
        objects_dir.mkdir(parents=True, exist_ok=True)
        commands = {}
        for source in ext.sources:
            target = objects_dir / (Path(source).name + ".o")
            commands[target] = self.compile_command(source, target, torch_dir, cuda)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not jobs.isdecimal() or int(jobs) < 1:
            raise CannotBuild(f"MAX_JOBS is {jobs!r}, expected a number of at least 1")
        with ThreadPoolExecutor(int(jobs)) as pool:
            # Slowest first. `any` over a list, not a generator: each result is asked for, so that each error is seen.
            slow = ("backward", "kernels", "norm")
            order = sorted(commands, key=lambda target: not target.name.startswith(slow))
            compiled = any(list(pool.map(lambda target: compile_if_stale(target, commands[target]), order)))

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        link = [*find_cxx(), "-shared", *map(str, commands), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
        if is_cuda:
            lib = cuda / "lib64" if (cuda / "lib64").is_dir() else cuda / "lib"
            link += [f"-L{lib}", "-lcudart_static", "-lpthread", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
        link += [*shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(output)]
        stamp = objects_dir / "link.command"
        if compiled or not output.exists() or not stamp.exists() or stamp.read_text() != digest(link):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)  # a running process keeps the library that it has loaded
            run(link)
            stamp.write_text(digest(link))

    def compile_command(self, source, target, torch_dir, cuda):
        depfile = f"{target}.d"
        if source.endswith(".cu"):
            # Raw pointers only: these sources see no header of torch.
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode_flags()]
            flags += shlex.split(os.environ.get("NVCC_FLAGS", ""))
            compiler = [str(cuda / "bin/nvcc"), "-ccbin", find_cxx()[0]]
            return [*compiler, *flags, "-MD", "-MF", depfile, "-c", source, "-o", str(target)]
        flags = list(CXX_FLAGS)
        if source.startswith("csrc/cpu/"):
            flags += KERNEL_FLAGS
            if is_x86():
                flags += ["-DFUSED_NORM_X86", *X86_FLAGS.get(instructions(source), [])]
        else:
            flags += [*STABLE_ABI_FLAGS, f"-I{find_python_headers()}", f"-isystem{torch_dir / 'include'}"]
            flags += [f"-isystem{cuda / 'include'}"] if cuda else []
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            flags.append("-DPy_LIMITED_API=0x030a0000")
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        return [*find_cxx(), *flags, "-MMD", "-MF", depfile, "-c", source, "-o", str(target)]


def digest(command: list[str]) -> str:
    return hashlib.sha256("\0".join(command).encode()).hexdigest()


def compile_if_stale(target: Path, command: list[str]) -> bool:
    """Compile, unless the object was made by this very command and is newer than every file that went into it."""
    stamp, depfile = Path(f"{target}.command"), Path(f"{target}.d")
    if target.exists() and depfile.exists() and stamp.exists() and stamp.read_text() == digest(command):
        prerequisites = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        made = target.stat().st_mtime
        paths = [ROOT / path for path in prerequisites]
        if all(path.exists() and path.stat().st_mtime <= made for path in paths):
            return False
    stamp.unlink(missing_ok=True)
    print(shlex.join(command), flush=True)
    run(command)
    stamp.write_text(digest(command))
    return True


MODE = os.environ.get("FUSED_NORM_BUILD", "auto").strip().lower() or "auto"
if any(command in sys.argv for command in ("sdist", "egg_info", "dist_info", "clean", "--version", "--help")):
    EXTENSIONS, NOTES = [], []  # nothing is compiled: do not ask for torch or a compiler
else:
    EXTENSIONS, NOTES = plan(MODE)
    for line in NOTES:
        if MODE == "auto":
            warn(line)

limited = any(ext.py_limited_api for ext in EXTENSIONS)
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
