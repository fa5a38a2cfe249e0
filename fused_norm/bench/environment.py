"""What a result must be read with: device, driver, versions, commit, command, date, threads."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Variables that change how fast things run; folders of caches (``_DIR``), which torch sets itself, do not.
ENV_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_NUM", "ATEN_CPU_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "FUSED_NORM_")
ENV_NAMES = ("LD_PRELOAD", "MALLOC_ARENA_MAX", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

PACKAGES = (
    "fused_norm",
    "triton",
    "liger-kernel",
    "quack-kernels",
    "flash-attn",
    "apex",
    "transformer-engine",
    "cut-cross-entropy",
    "numpy",
)

#: What must be the same for two rows to stand side by side.
COMPARED = ("device", "cpu", "threads", "versions", "commit", "sources_diff", "variables")


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": cpu_name(), "isa": torch.backends.cpu.get_cpu_capability()}
    p = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory_bytes": p.total_memory,
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _matters(variable: str) -> bool:
    return variable in ENV_NAMES or (variable.startswith(ENV_PREFIXES) and not variable.endswith("_DIR"))


def _source() -> dict[str, Any]:
    """The commit, whether tracked files differ from it, and a hash of how the sources do; None where this package is no
    part of a git repository."""
    here = Path(__file__).resolve()
    root = here.parents[2]
    if output_of("git", "ls-files", "--error-unmatch", str(here), cwd=root) is None:
        return {"commit": None, "uncommitted_changes": None, "sources_diff": None}
    diff = output_of("git", "diff", "HEAD", "--", "fused_norm", "csrc", "setup.py", cwd=root)
    return {
        "commit": output_of("git", "rev-parse", "HEAD", cwd=root),
        "uncommitted_changes": bool(output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=root)),
        "sources_diff": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
    }


def collect(device: torch.device, argv: list[str] | None = None) -> dict[str, Any]:
    """Everything as plain values that JSON can hold."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv if argv is None else argv),
        **_source(),
        "device": describe(device),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "variables": {k: v for k, v in sorted(os.environ.items()) if _matters(k)},
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What keeps the rows of two environments apart, a line each with both values."""

    def flat(environment: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for key in COMPARED:
            value = environment.get(key)
            values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        return values

    a, b = flat(there), flat(here)
    return [f"{k}: {a.get(k)} there, {b.get(k)} here" for k in dict.fromkeys((*a, *b)) if a.get(k) != b.get(k)]
