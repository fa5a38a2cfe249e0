"""What can be said of the GPU kernels without a GPU: ``python bench/static.py``, or ``make static``.

Compiles the Triton kernels as they would be launched, and the CUDA kernels, for every target, and tells of each its
registers, spills, shared memory, occupancy, and how wide it loads and stores; counts in Triton's interpreter the bytes
that a call moves, and its launches; times what the host does for a call, under a driver that launches nothing. How a
kernel is compiled is the tests' own code (tests/test_triton*.py).

Rows go to FILE.part as they are made; a run that ends puts it in the place of FILE, and a table beside it.
``tests/test_static.py`` holds the committed report to its limits.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu import cuda_home  # noqa: E402

#: Of a multiprocessor: 32-bit registers, warps, bytes of shared memory, programs. CUDA C++ Programming Guide, technical
#: specifications by compute capability (8.0, 9.0, 10.0). Registers are given out 256 a warp at a time.
LIMITS = {
    "sm_80": (65536, 64, 163 << 10, 32),
    "sm_90": (65536, 64, 227 << 10, 32),
    "sm_100": (65536, 64, 227 << 10, 32),
}
KERNELS = ("norm", "add_norm", "double_backward", "ticks", "cuda")
#: What is not compiled but counted, each in a process of its own: bytes and launches; the host's time.
COUNTED = {"traffic": {"TRITON_INTERPRET": "1"}, "host": {}}
HOST_CALLS = 2000


def digest(root: Path = ROOT) -> str:
    """Of what is compiled: the CUDA sources, the functions of Triton, and what chooses their launches. A report of
    others says nothing of these."""
    found = hashlib.sha256()
    for path in sorted((root / "csrc/cuda").glob("*.*")):
        if path.suffix in (".cu", ".cuh", ".h"):
            found.update(path.name.encode() + path.read_bytes())
    for path in sorted((root / "fused_norm/backends/triton").glob("*.py")):
        text = path.read_text()
        if path.name == "launch.py":
            found.update(text.encode())
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                found.update(f"{path.name} {decorators} {ast.get_source_segment(text, node)}".encode())
    return found.hexdigest()[:16]


def occupancy(target: str, registers: int, warps: int, shared: int) -> float | None:
    """The share of a multiprocessor's warps that can be resident; None where the limits are not known."""
    if target not in LIMITS:
        return None
    all_registers, most_warps, all_shared, most_programs = LIMITS[target]
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = all_shared // (shared + 1024)  # a kilobyte of each program is the system's
    return min(by_registers, by_shared, most_warps // warps, most_programs) * warps / most_warps


def builds(kernel: str) -> list[tuple]:
    """The variants that are compiled for every target: (the tests' module, its build)."""
    import test_triton as norm
    import test_triton_add_norm as add_norm
    import test_triton_ticks as ticks

    both, sizes = ("forward", "backward"), (4, 2)
    if kernel == "norm":
        found = [norm.Build(p, n, size) for p, size, n in product(both, sizes, (1024, 4096, 65536))]
        found += [norm.Build("forward", 16384, size) for size in sizes] + [norm.Build("reduce", 4096, 4)]
        found += [norm.Build("backward", 8192, size) for size in sizes]
        found += [norm.Build(p, 1001, 4) for p in both] + [norm.Build(p, 4096, 2, True) for p in both]
        return [(norm, b) for b in found + [norm.Build(p, 4096, 2, param_size=4) for p in both]]
    if kernel == "double_backward":
        return [(norm, norm.Build(kernel, n, size)) for size, n in product(sizes, (4096, 65536))]
    if kernel == "add_norm":
        found = [add_norm.Build(p, n, s, p=drop) for p, s, n, drop in product(both, sizes, (8192,), (True, False))]
        return [(add_norm, b) for b in [*found, add_norm.Build("backward", 1001, 4)]]
    paths = ("plain", "soft")
    found = [ticks.Build(p, 32000, size, path) for p, size, path in product(both, sizes, paths)]
    return [(ticks, b) for b in found + [ticks.Build(p, 32000, 2, capped=True) for p in both]]


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """How many loads (``ld``) or stores (``st``) of global memory there are of each width in bytes; as loads count the
    copies to shared memory too, but for those of 4 bytes, which are statistics'."""
    found: dict[str, int] = {}
    widths = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfu](\d+)\b", ptx)
    ]
    if kind == "ld":
        copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        widths += [int(width, 0) for width in copies if int(width, 0) > 4]
    for width in map(str, widths):
        found[width] = found.get(width, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def triton_row(kernel: str, module, build, target: str) -> dict:
    """What the compiler says of one build for one target; widths are PTX's."""
    compiled = module.compiled(build, target)
    warps = compiled.metadata.num_warps
    row = {
        "kernel": kernel,
        "variant": str(build),
        "target": target,
        "warps": warps,
        "shared": compiled.metadata.shared,
    }
    if target.startswith("gfx"):
        numbers = {k: int(v) for k, v in re.findall(r"\.(\w+): *(\d+)\b", compiled.asm["amdgcn"])}
        spills = numbers["sgpr_spill_count"] + numbers["vgpr_spill_count"]
        return row | {
            "registers": numbers["vgpr_count"],
            "spills": spills,
            "stack": numbers["private_segment_fixed_size"],
        }
    from triton_kernels import nvidia_tool

    folder = ROOT / "build" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    usage = nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"], folder)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return row | {
        "registers": registers,
        "spills": local,
        "stack": stack,
        "occupancy": occupancy(target, registers, warps, row["shared"]),
        "loads": accesses(compiled.asm["ptx"], "ld"),
        "stores": accesses(compiled.asm["ptx"], "st"),
    }


def compile_for(target: str, name: str) -> Path:
    """The cubin of csrc/cuda/NAME.cu, kept in the build folder by a name made of what went in."""
    command = [str(cuda_home() / "bin" / "nvcc"), "-std=c++17", "-O3", f"-arch={target}", "-cubin"]
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True).stdout
    found = hashlib.sha256(repr(command).encode() + version)
    for path in sorted((ROOT / "csrc/cuda").iterdir()):
        if path.suffix in (".h", ".cuh") or path.name == f"{name}.cu":
            found.update(path.read_bytes())
    cubin = ROOT / "build" / "static" / f"{name}-{found.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(".part")
        subprocess.run([*command, str(ROOT / f"csrc/cuda/{name}.cu"), "-o", str(part)], check=True)
        part.replace(cubin)
    return cubin


def cuda_rows(target: str) -> Iterator[dict]:
    """The same of every instantiation of the CUDA kernels."""
    import test_cuda_compile as cuda

    for name in ("norm_forward", "norm_backward", "ticks_forward", "ticks_backward"):
        cubin = compile_for(target, name)
        code = dict(cuda.disassembled(cubin))
        for k in cuda.kernels(cubin):
            sass = code.get(k.symbol, "")
            widths = {
                kind: {
                    "16": len(re.findall(rf"\b{op}\.E\S*\.128\b", sass)),
                    "all": len(re.findall(rf"\b{op}\.E\b", sass)),
                }
                for kind, op in (("loads", "LDG(?:STS)?"), ("stores", "STG"))
            }
            row = {"kernel": "cuda", "variant": f"{name} {k.symbol}", "target": target, "registers": k.registers}
            yield row | {"spills": k.local, "stack": k.stack, **widths}


def traffic() -> None:
    """In a process under the interpreter: the bytes and launches of a call, as JSON lines on stdout."""
    import pytest
    import torch
    from triton.runtime import interpreter
    from triton_kernels import Traffic

    from fused_norm.backends import triton as backend

    launches = [0]
    launch = interpreter.GridExecutor.__call__

    def counted(*args, **kwargs):
        launches[0] += 1
        return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", counted)
        moved_by = Traffic(patch)

        def measured(name: str, x: torch.Tensor, given: list[torch.Tensor], units: int, call: Callable) -> tuple:
            """``given``: tensors of x's size that it reads; ``units``: how many of that size an ideal call moves."""
            moved_by.clear()
            launches[0] = 0
            result = call()
            made = [t for t in result if t is not None and t.numel() == x.numel()]
            # A looped row reads back what it has stored itself (the sum of add and norm): that counts as well.
            moved = sum(moved_by.of("load", t) for t in [*given, *made]) + sum(moved_by.of("store", t) for t in made)
            others = moved_by.total("load") + moved_by.total("store") - moved
            place = f"{x.shape[0]}x{x.shape[1]} {x.dtype}".replace("torch.", "")
            numbers = {"bytes": moved, "ideal": units * x.nbytes, "others": others, "launches": launches[0]}
            print(json.dumps({"kernel": "traffic", "variant": name, "target": place, **numbers}), flush=True)
            return result

        for dtype, m, n in product((torch.float32, torch.bfloat16), (16,), (1024, 32768)):
            x, r, dy, ds = (torch.randn(m, n).to(dtype) for _ in range(4))
            w, b, seed = torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype), torch.tensor([1])
            for op, bias in (("layer_norm", b), ("rms_norm", None)):
                rms = bias is None
                forward = partial(backend.norm_forward, x, w, bias, n, 1, 1e-5, rms, True)
                _, stats = measured(f"{op} forward", x, [x], 2, forward)
                backward = partial(backend.norm_backward, dy, x, stats, w, n, 1, rms, dtype, True, True, not rms)
                measured(f"{op} backward", x, [x, dy], 3, backward)
            for op, given, p, beside in (
                ("add_layer_norm", None, 0.0, [ds]),
                ("dropout_add_layer_norm", seed, 0.1, []),
            ):
                forward = partial(backend.add_norm_forward, x, r, w, b, given, n, 1e-5, False, p, True, False)
                _, summed, stats = measured(f"{op} forward", x, [x, r], 4, forward)
                upstream = (dy, *(beside or [None]), summed, stats, w, given, n, False, p, dtype, dtype)
                backward = partial(backend.add_norm_backward, *upstream, True, True, True, True)
                measured(f"{op} backward", x, [dy, summed, *beside], 4, backward)
        for dtype in (torch.float32, torch.bfloat16):
            z, target = torch.randn(16, 32000).to(dtype), torch.arange(16)
            options = (-100, 0.0, 1.0, 1e-3, 0.0)
            forward = partial(backend.ticks_forward, z, target, None, *options)
            loss, stats = measured("ticks forward", z, [z], 1, forward)
            grads = (torch.ones_like(loss), None, z, target, stats, None, *options, True, False, False)
            measured("ticks backward", z, [z], 2, partial(backend.ticks_backward, *grads))


def microseconds(call: Callable[[], object]) -> float:
    """The median of single calls, without garbage collection."""
    for _ in range(100):
        call()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(HOST_CALLS):
            begin = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - begin)
    finally:
        gc.enable()
    return round(statistics.median(times) / 1000, 1)


def host() -> None:
    """In a process of its own: the host's microseconds for a call, as JSON lines on stdout.

    The tensors are a CPU's, whose memory is as fast to get as that of torch's CUDA allocator; nothing computes on them
    but torch's own function, which stands beside ours for a measure of the machine: of a single row, on the CPU.
    """
    import torch
    import triton
    from test_triton_launch import calls
    from triton_kernels import launches_written_down

    import fused_norm
    import fused_norm.functional as FF
    from fused_norm import dispatch
    from fused_norm.backends import triton as backend

    torch.set_num_threads(1)
    n = 1024
    dispatch.unavailable = lambda name, op, device_type: None  # a CPU's tensors stand for a GPU's
    x, one, w, b = torch.randn(64, n), torch.randn(1, n), torch.ones(n), torch.zeros(n)

    def both(function: Callable, x: torch.Tensor, rms: bool, **options: object) -> Callable[[], object]:
        leaves = [t.clone().requires_grad_() for t in ((x, w) if rms else (x, w, b))]
        dy = torch.randn_like(x)
        return lambda: torch.autograd.grad(function(leaves[0], (n,), *leaves[1:], **options), leaves, dy)

    def put(name: str, **numbers: object) -> None:
        print(json.dumps({"kernel": "host", "variant": name, "target": "fp32", **numbers}), flush=True)

    with launches_written_down() as launched, fused_norm.use_backend("triton"):

        def launches(call: Callable[[], object]) -> int:
            call()
            before = len(launched)
            call()
            return len(launched) - before

        for name, args in calls().items():
            call = partial(getattr(backend, name), *args)
            numbers = {"launches": launches(call), "us": microseconds(call)}
            hook = triton.knobs.runtime.launch_enter_hook
            hook.add(print)  # nobody calls it here; with a hook every launch takes Triton's own way
            numbers["triton_us"] = microseconds(call)
            hook.remove(print)
            put(name, **numbers)
        for rms, ours, theirs in (
            (False, FF.layer_norm, torch.nn.functional.layer_norm),
            (True, FF.rms_norm, torch.nn.functional.rms_norm),
        ):
            call, torchs = both(ours, x, rms), both(theirs, one, rms)
            name = f"{ours.__name__} forward+backward with autograd"
            put(name, launches=launches(call), us=microseconds(call), torch_us=microseconds(torchs))
            launched.clear()


def environment() -> dict:
    import torch
    import triton

    from fused_norm.bench import environment as bench

    home = cuda_home()
    nvcc = bench.output_of(str(home / "bin" / "nvcc"), "--version") if home else None
    release = re.search(r"release (\S+),", nvcc)[1] if nvcc else None
    return {
        "kind": "environment",
        "sources": digest(),
        "commit": bench.output_of("git", "rev-parse", "HEAD", cwd=ROOT),
        "cpu": bench.cpu_name(),
        "versions": {"triton": triton.__version__, "torch": torch.__version__, "nvcc": release},
    }


def table(rows: list[dict]) -> str:
    """The least and the most of each kernel on each target, then every call's bytes and launches."""
    names = ("registers", "spills", "stack", "shared", "occupancy")
    lines = [f"{'kernel':<16}{'target':<8}{'variants':>9}" + "".join(f"{name:>14}" for name in names)]
    groups: dict[tuple[str, str], list[dict]] = {}
    for r in rows:
        if r["kernel"] not in COUNTED:
            groups.setdefault((r["kernel"], r["target"]), []).append(r)
    for (kernel, target), group in groups.items():
        line = f"{kernel:<16}{target:<8}{len(group):>9}"
        for name in names:
            values = [r[name] for r in group if r.get(name) is not None]
            form = "{:.0%}" if name == "occupancy" else "{}"
            low, high = (form.format(f(values)) for f in (min, max)) if values else ("-", "-")
            line += f"{low if low == high else f'{low} to {high}':>14}"
        lines.append(line)
    lines += ["", f"{'call':<34}{'shape':<20}{'bytes':>10}{'of ideal':>10}{'others':>10}{'launches':>10}"]
    for r in rows:
        if r["kernel"] == "traffic":
            numbers = f"{r['bytes']:>10}{r['bytes'] / r['ideal']:>10.3f}{r['others']:>10}{r['launches']:>10}"
            lines.append(f"{r['variant']:<34}{r['target']:<20}{numbers}")
    lines += ["", f"{'host, launches stubbed':<54}{'us':>8}{'by Triton':>12}{'torch, CPU':>12}{'launches':>10}"]
    for r in rows:
        if r["kernel"] == "host":
            beside = "".join(f"{r.get(name, '-'):>12}" for name in ("triton_us", "torch_us"))
            lines.append(f"{r['variant']:<54}{r['us']:>8}{beside}{r['launches']:>10}")
    notes = (
        "bytes: of the tensors of x's size; others: parameters, which all programs read and caches hold, statistics,",
        "partial sums. spills: bytes on CUDA, registers on AMD. occupancy: the share of a multiprocessor's warps.",
        "us: the host's time for a call, on this report's machine; by Triton: if Triton's own launcher does it all;",
        "torch, CPU: its own function, forward and backward of one row of 1024 elements, with the arithmetic.",
    )
    return "\n".join([*lines, "", *notes]) + "\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--kernel", choices=(*KERNELS, *COUNTED), action="append", help="these alone")
    p.add_argument("--target", action="append", help="these alone, of sm_80, sm_90, sm_100, gfx942, gfx950")
    p.add_argument("--output", type=Path, default=ROOT / "runs" / "static-gpu.jsonl")
    p.add_argument("--count", choices=COUNTED, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.count:
        (traffic if args.count == "traffic" else host)()
        return 0
    import triton_kernels

    triton_kernels.TARGETS.setdefault("gfx950", ("hip", "gfx950", 64))
    wanted, targets = args.kernel or [*KERNELS, *COUNTED], args.target or [*triton_kernels.TARGETS]
    if unknown := [t for t in targets if t not in triton_kernels.TARGETS]:
        p.error(f"--target {unknown[0]}: none of {', '.join(triton_kernels.TARGETS)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    part = args.output.with_name(args.output.name + ".part")
    with part.open("w") as file:

        def put(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["kind"] == "row":
                rows.append(row)
                print(
                    f"\r{len(rows)} rows: {row['kernel']} {row['target']} {row['variant'][:60]:<60}",
                    end="",
                    file=sys.stderr,
                )

        put(environment())
        for target in targets:
            for kernel in (k for k in wanted if k in KERNELS[:-1]):
                for module, build in builds(kernel):
                    put({"kind": "row"} | triton_row(kernel, module, build, target))
            if "cuda" in wanted and target.startswith("sm_"):
                for row in cuda_rows(target):
                    put({"kind": "row"} | row)
        for name in (k for k in wanted if k in COUNTED):
            command = [sys.executable, str(Path(__file__).resolve()), "--count", name]
            counting = subprocess.Popen(command, env=os.environ | COUNTED[name], stdout=subprocess.PIPE, text=True)
            for line in counting.stdout:
                put({"kind": "row"} | json.loads(line))
            if counting.wait():
                raise SystemExit(f"{name}: its process ended with status {counting.returncode}")
    part.replace(args.output)
    text = table(rows)
    print("\n" + text)
    args.output.with_suffix(".txt").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
