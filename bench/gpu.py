"""Prove a GPU: build the extension here, run GPU tests, gradient checks, sanitizers, the benchmark and the measurements
that launches are chosen by, and write a result folder.

``make gpu`` runs this with the system's own Python: torch, triton, pytest and nvcc as they are, no network, nothing
installed. Every step is a process of its own with a time limit; its output goes to a log as it is made, and the summary
is rewritten after every step, so whatever happens later, what was found stays. In the folder:

    summary.md          every step, which targets are reached (targets.py), what tuning proposes, the tables
    steps.jsonl         an object for each step; a later run with this folder replaces its own sections' alone
    SECTION-STEP.log    what the step printed
    bench.jsonl, .txt   rows and tables of the benchmark;  bench-*.png, .svg  its pictures, where matplotlib is
    tune.jsonl, .md     rows of the launches that were tried, and what they propose
    gradcheck.json, .xml, environment.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Seconds a section may take, all its steps together: under nine minutes.
SECTION_LIMIT_S = 530.0

#: Sections in their order, and what each takes of a ``--budget`` beside the others.
SECTIONS = {"build": 1.0, "test": 3.0, "gradcheck": 1.0, "sanitize": 3.0, "bench": 4.0, "tune": 2.0}

#: Seconds between asking a step to stop (as Ctrl-C does, so that it writes what it has) and killing it.
GRACE_S = 10.0

#: Seconds that a process of ours takes to start, and to write its tables at the end.
START_S = 15.0

#: In a step's command: the seconds that it is given, less what starting and stopping take.
SECONDS = "{seconds}"

#: Processes side by side: no more than these, than the CPUs, or than what this much of the GPU's memory each allows.
MOST_WORKERS, WORKER_BYTES = 12, 5 << 30

#: The kernels' own tests, which run before all others.
KERNEL_TEST_FILES = (
    "tests/test_sanitized.py",
    "tests/test_triton.py",
    "tests/test_triton_add_norm.py",
    "tests/test_triton_ticks.py",
    "tests/test_cuda_native.py",
    "tests/test_cuda_norm_backward.py",
    "tests/test_cuda_ticks.py",
)

#: Tests that take much of the GPU's memory, or look at what it is doing: nothing runs beside them.
ALONE_TEST_FILE = "tests/test_gpu_devices.py"

#: Test files whose small tests run under the sanitizers. The first calls every kernel by every path.
_UNSANITIZED = ("tests/test_triton_add_norm.py", "tests/test_cuda_norm_backward.py")  # it has their kernels
SANITIZED_TEST_FILES = tuple(f for f in KERNEL_TEST_FILES if f not in _UNSANITIZED)

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: Each sanitizer process listens on ports of its own, from here on.
SANITIZER_PORT, SANITIZER_PORTS = 49152, 16

#: The benchmark's steps in the order of what matters, for time may run out: name, operations, further options, and the
#: part of the section's time, in seconds. torch.compile comes last: it alone needs as long as all the rest.
BENCHES = (
    ("norms", "norms", (), 150.0),
    ("ticks", "ticks_cross_entropy,softcap", (), 70.0),
    ("linear-ticks", "linear_ticks_cross_entropy", ("--dtype", "bf16"), 50.0),
    ("add-norms", "add-norms", (), 80.0),
    ("compile", "norms,add-norms,ticks_cross_entropy,softcap", ("--provider", "torch,compile"), 60.0),
)
BENCH_PASSES = "forward,backward,forward+backward"

#: Rows of the calls that only compile our kernels: how many there are changes no kernel.
PREPARED_ROWS = 256

SANITIZER_STATUS = 97  # a sanitizer's exit status where it has found something
NO_TESTS = 5  # pytest's exit status where it selected none
PASSED = re.compile(r"\b[1-9]\d* passed\b")  # in pytest's last line

#: Here a missing backend fails the tests that want it, instead of skipping them.
TEST_ENV = {"FUSED_NORM_TEST_REQUIRE": "native,triton"}


@dataclass(frozen=True)
class Step:
    """A command. ``judge(exit status, log text)`` gives None, or why the step failed. Steps in a row that are
    ``beside`` others run side by side. ``weight`` is the part of its section's time that it takes."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], str | None] = lambda rc, log: None if rc == 0 else f"exit status {rc}"
    beside: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Outcome:
    section: str
    step: str
    ok: bool
    seconds: float
    detail: str


def python(*args: str) -> tuple[str, ...]:
    return (sys.executable, *args)


def pytest(*args: str) -> tuple[str, ...]:
    # A test that hangs leaves its stack in the log.
    options = ("-p", "no:cacheprovider", "-o", "faulthandler_timeout=150", "--durations", "10")
    return python("-m", "pytest", *options, *args)


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def judge_tests(rc: int, log: str) -> str | None:
    """A run in which every test was skipped proves nothing, so it fails."""
    if rc == NO_TESTS:
        return "no test was selected"
    if rc != 0:
        return f"exit status {rc}"
    return None if PASSED.search(log) else "no test ran"


def kernels() -> list[str]:
    """The names of all kernels in the sources: parts of what a GPU's tools call them."""
    kinds = (
        ("csrc/cuda/*.cuh", r"__global__.*?\b(\w+_kernel)\("),
        ("fused_norm/backends/triton/*.py", r"^def (\w+_kernel)\("),
    )
    texts = [(pattern, file.read_text()) for files, pattern in kinds for file in ROOT.glob(files)]
    return sorted({name for pattern, text in texts for name in re.findall(pattern, text, re.DOTALL | re.MULTILINE)})


def others_errors(log: str, ours: list[str]) -> int:
    """Of a sanitizer's reports those that name the place in a kernel which is none of ours (torch's own)."""
    reports = re.split(r"^========= (?! )", log, flags=re.MULTILINE)[1:]
    places = [re.findall(r"^=========\s+at (.*)\+0x", report, re.MULTILINE) for report in reports]
    return sum(bool(at) and not any(name in line for line in at for name in ours) for at in places)


def judge_sanitizer(rc: int, log: str) -> str | None:
    """Clean means that the tests passed and that the tool itself says so: a tool that cannot attach says nothing.

    What is reported of kernels that are not ours does not count, if it is all there is.
    """
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    if not summaries:
        return f"the sanitizer gave no summary (exit status {rc})"
    blind = re.search(r"^=========.*overflow.*barrier.*", log, re.MULTILINE | re.IGNORECASE)
    if blind:
        return blind.group().strip("= ")
    found = re.search(r"SUMMARY: (\d+)", summaries[-1])
    dirty = int(found.group(1)) if found else 1
    if dirty and dirty != others_errors(log, kernels()):
        return summaries[-1]
    if rc == NO_TESTS:
        return "no test was selected"
    if rc not in (0, SANITIZER_STATUS if dirty else 0):
        return f"exit status {rc}"
    return None if PASSED.search(log) else "no test ran"


def cuda_home() -> Path | None:
    """By its headers: what stands before nvcc on PATH may be a shim."""
    named = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in (*named, *beside, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def find_sanitizer() -> str | None:
    home = cuda_home()
    folders = [] if home is None else [home / "bin", home / "compute-sanitizer"]
    found = [shutil.which("compute-sanitizer"), *(shutil.which("compute-sanitizer", path=str(f)) for f in folders)]
    return next((f for f in found if f), None)


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def workers() -> int:
    """How many processes may run side by side."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(MOST_WORKERS, cpus(), memory // WORKER_BYTES))


def build_steps() -> list[Step]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    env = {"FUSED_NORM_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(cpus())}
    home = cuda_home()
    if home is not None:
        env["CUDA_HOME"] = str(home)
    wanted = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())
    there = importlib.metadata.version("setuptools")
    if int(there.partition(".")[0]) < int(wanted[1]):
        raise RuntimeError(f"setuptools is {there}, and reading pyproject.toml needs {wanted[1]} or later")
    return [Step("build", python("setup.py", "build_ext", "--inplace"), env)]


def present(files: tuple[str, ...]) -> list[str]:
    return [f for f in files if (ROOT / f).exists()]


def test_steps(side: int) -> list[Step]:
    """All tests that need a GPU, each of them in one of ``side`` processes: the kernels' own, then the rest, then those
    that must be alone."""
    files = present((*KERNEL_TEST_FILES, ALONE_TEST_FILE))
    selected = {"kernels": present(KERNEL_TEST_FILES), "others": ["tests", *(f"--ignore={f}" for f in files)]}
    on_gpu = ("-m", "gpu")
    steps = [
        Step(f"{name} {i} of {side}", pytest(*which, *on_gpu, "--shard", f"{i}/{side}"), TEST_ENV, judge_tests, True)
        for name, which in selected.items()
        for i in range(1, side + 1)
    ]
    alone = present((ALONE_TEST_FILE,))
    return [*steps, *(Step("alone", pytest(f, *on_gpu), TEST_ENV, judge_tests) for f in alone)]


def gradcheck_steps(out: Path) -> list[Step]:
    files = ("--json", str(out / "gradcheck.json"), "--junit", str(out / "gradcheck.xml"))
    return [Step("gradcheck", python("-m", "fused_norm", "gradcheck", "--device", "cuda", *files))]


def sanitizer_options(tool: str) -> tuple[str, ...]:
    """Our kernels alone are looked into, which is many times faster. Except by initcheck: it must see who wrote what
    ours read, torch's kernels among them. torch and Triton try CUDA calls that fail, which is no error of a kernel."""
    ours = ("--kernel-name", f"regex={'|'.join(kernels())}", "--print-limit", "20")
    # A block's mailboxes have two barriers each, which stand in no table of the compiler's.
    barriers = ("--num-cuda-barriers", "16")
    return {
        "memcheck": (*ours, "--report-api-errors", "no", "--padding", "64"),
        "racecheck": (*ours, *barriers, "--racecheck-num-workers", "2"),
        "initcheck": ("--print-limit", "1000"),
        "synccheck": (*ours, *barriers),
    }[tool]


def sanitize_steps() -> list[Step]:
    """Every tool over the tests marked small, without torch's caching allocator, which would hide overruns."""
    program = find_sanitizer()
    if program is None:
        message = "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"
        return [Step("find compute-sanitizer", python("-c", f"import sys; sys.exit({message!r})"))]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **TEST_ENV}
    steps = []
    parts = [(f, (), "") for f in present(SANITIZED_TEST_FILES)]
    if parts:  # the first has as many kernels as all others together
        file, others = parts[0][0], ("-k", "not clusters")
        parts[:1] = [(file, (*others, "--shard", f"{i}/3"), f" {i} of 3") for i in (1, 2, 3)]
        parts.append((file, ("-k", "clusters"), " clusters"))
    for f, selected, which in parts:
        for tool in SANITIZER_TOOLS:
            port = SANITIZER_PORT + SANITIZER_PORTS * len(steps)
            options = ("--tool", tool, "--error-exitcode", str(SANITIZER_STATUS), *sanitizer_options(tool))
            # Triton's compilers are processes too, and have no kernels.
            process = ("--target-processes", "application-only", "--port", str(port), "--launch-timeout", "120")
            command = (program, *options, *process, *pytest(f, "-m", "small", "-q", *selected))
            steps.append(Step(f"{tool} {Path(f).stem}{which}", command, env, judge_sanitizer, True))
    return steps


def bench_steps(out: Path) -> list[Step]:
    """First our kernels are compiled, side by side, so that the timed steps, which are alone, find them on disk."""
    from fused_norm.bench.cases import GROUPS, OPS
    from fused_norm.bench.providers import default_providers
    from fused_norm.bench.results import shape_text

    names = [op for group in GROUPS.values() for op in group]
    everyone = dict.fromkeys(p for op in names for p in ("fused", *default_providers(OPS[op])) if p != "compile")
    steps = []
    for op in (name for name in names if not name.startswith("linear")):  # its kernels are those of ticks
        shapes = dict.fromkeys((PREPARED_ROWS, *shape[1:]) for shape in OPS[op].sweeps["gpu"]["cuda"])
        shared = ("--device", "cuda", "--check", "--op", op, "--shapes", ",".join(map(shape_text, shapes)))
        for dtype in OPS[op].dtypes["cuda"]:
            command = python("bench/run.py", *shared, "--dtype", dtype, "--provider", "fused,fused:triton,fused:native")
            steps.append(Step(f"prepare {op} {dtype}", command, beside=True, weight=45.0))
    results = out / "bench.jsonl"
    for name, op, options, weight in BENCHES:
        if "--provider" not in options:
            options = (*options, "--provider", ",".join(everyone))
        passes = [] if name == "linear-ticks" else ["--pass", BENCH_PASSES]
        shared = ("--device", "cuda", "--op", op, "--shapes", "gpu", *passes, *options)
        command = python("bench/run.py", *shared, "--seconds", SECONDS, "--output", str(results))
        steps.append(Step(name, command, weight=weight))
    if importlib.util.find_spec("matplotlib") is None:
        command = python("-c", "print('matplotlib is not installed: no pictures')")
    else:
        command = python("bench/plot.py", str(results), "--output", str(out / "bench"))
    return [*steps, Step("pictures", command, weight=20.0)]


def tune_steps(out: Path, side: int) -> list[Step]:
    """Likewise: what is to be tried is compiled side by side, then timed alone."""
    prepare = [("bench/tune.py", "--prepare", f"{i}/{side}") for i in range(1, side + 1)]
    steps = [Step(f"prepare {i} of {side}", python(*c), beside=True) for i, c in enumerate(prepare, 1)]
    command = python("bench/tune.py", "--seconds", SECONDS, "--output", str(out / "tune.jsonl"))
    return [*steps, Step("tune", command, weight=3.0)]


def built() -> bool:
    """Whether the CUDA extension is there, and no older than its sources."""
    made = [f.stat().st_mtime for f in (ROOT / "fused_norm").glob("_C_cuda*.so")]
    return bool(made) and max(made) >= max((f.stat().st_mtime for f in (ROOT / "csrc").rglob("*.*")), default=0.0)


def sections(out: Path, chosen: list[str]) -> dict[str, Callable[[], list[Step]]]:
    """The steps of each chosen section. Without ``build`` the first builds before, if these sources were not built."""
    steps: dict[str, Callable[[], list[Step]]] = {
        "build": build_steps,
        "test": lambda: test_steps(workers()),
        "gradcheck": lambda: gradcheck_steps(out),
        "sanitize": sanitize_steps,
        "bench": lambda: bench_steps(out),
        "tune": lambda: tune_steps(out, workers()),
    }
    if "build" not in chosen and not built():
        first = chosen[0]
        rest = steps[first]
        steps[first] = lambda: build_steps() + rest()
    return {name: steps[name] for name in chosen}


#: The processes of the steps that run now.
_running: set[subprocess.Popen] = set()


def stop(process: subprocess.Popen) -> None:
    """Ask the step's whole process group to stop, as Ctrl-C does; then kill what is left of it."""
    for sig, wait in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sig)
            process.wait(wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run_step(section: str, step: Step, log: Path, limit_s: float) -> Outcome:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = f"{max(5.0, limit_s - GRACE_S - START_S):.0f}"
    command = [given if part == SECONDS else part for part in step.command]
    begin = time.monotonic()
    try:
        with log.open("w") as file:
            print("$", *(f"{k}={v}" for k, v in step.env.items()), *command, file=file, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            _running.add(process)
            try:
                rc = process.wait(max(0.1, limit_s - GRACE_S))
            except BaseException:  # out of time, or Ctrl-C here: either way nothing is left running
                stop(process)
                raise
            finally:
                _running.discard(process)
    except subprocess.TimeoutExpired:
        took = time.monotonic() - begin
        return Outcome(section, step.name, False, took, f"stopped after {took:.0f} s, its time limit")
    except OSError as e:
        return Outcome(section, step.name, False, time.monotonic() - begin, str(e))
    text = log.read_text(errors="replace")
    reason = step.judge(rc, text)
    detail = last_line(text)[:200] if reason is None else f"{reason}; {last_line(text)[:200]}"
    return Outcome(section, step.name, reason is None, time.monotonic() - begin, detail)


class Shares:
    """Shares the time until ``deadline`` among steps by their weights, in rounds of ``side`` where they run side by
    side; what a step does not need goes to those after it."""

    def __init__(self, groups: list[list[Step]], side: int, deadline: float) -> None:
        self.left, self.side, self.deadline = [list(group) for group in groups], side, deadline
        self.lock = threading.Lock()

    def _cost(self, group: list[Step]) -> float:
        if not group[0].beside:
            return sum(step.weight for step in group)
        return math.ceil(len(group) / self.side) * max(step.weight for step in group)

    def next(self, step: Step) -> float:
        """Seconds for this step, which starts now."""
        with self.lock:
            cost = sum(self._cost(group) for group in self.left if group)
            next(group for group in self.left if step in group).remove(step)
            return (self.deadline - time.monotonic()) * step.weight / cost


def run_steps(
    section: str, steps: list[Step], out: Path, side: int, deadline: float, done: Callable[[Outcome], None]
) -> None:
    groups = [list(group) for _, group in groupby(steps, key=lambda step: step.beside)]
    shares = Shares(groups, side, deadline)
    threads = {"OMP_NUM_THREADS": str(max(1, cpus() // side)), "OMP_WAIT_POLICY": "PASSIVE"}

    def run(step: Step) -> Outcome:
        share = shares.next(step)
        log = out / f"{section}-{re.sub(r'[^A-Za-z0-9]+', '-', step.name)}.log"
        print(f"{section}: {step.name} (at most {share:.0f} s, log in {log})", flush=True)
        if step.beside:
            step = replace(step, env={**threads, **step.env})
        return run_step(section, step, log, share)

    for group in groups:
        with ThreadPoolExecutor(side if group[0].beside else 1) as pool:
            futures = [pool.submit(run, step) for step in group]
            try:
                for future in as_completed(futures):
                    done(future.result())
            except BaseException:  # Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                for process in tuple(_running):
                    stop(process)
                raise


def run_sections(
    planned: dict[str, Callable[[], list[Step]]],
    out: Path,
    report: Callable[[list[Outcome]], None],
    limit_s: float = SECTION_LIMIT_S,
    side: int = 1,
    budget_s: float | None = None,
) -> list[Outcome]:
    """Run every step of every section, whatever becomes of the others, ``side`` of them side by side where they may.

    A section has ``limit_s``, or its part of what is left of ``budget_s`` if that is less.
    """
    outcomes: list[Outcome] = []
    end = None if budget_s is None else time.monotonic() + budget_s

    def done(outcome: Outcome) -> None:
        state = "ok" if outcome.ok else "FAILED"
        print(f"  {outcome.step}: {state} in {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
        outcomes.append(outcome)
        report(outcomes)

    left = list(planned)
    for section, make in planned.items():
        limit = limit_s
        if end is not None:
            part = SECTIONS[section] / sum(SECTIONS[name] for name in left)
            limit = min(limit, (end - time.monotonic()) * part)
        left.remove(section)
        deadline = time.monotonic() + limit
        try:
            steps = make()
        except Exception as e:
            done(Outcome(section, "plan", False, 0.0, f"{type(e).__name__}: {e}"))
            continue
        run_steps(section, steps, out, side, deadline, done)
    return outcomes


def earlier(out: Path, chosen: list[str]) -> list[Outcome]:
    """The outcomes that the folder has of sections which do not run now."""
    try:
        lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [Outcome(**line) for line in lines if line["section"] not in chosen]


def targets_reached(out: Path) -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        import targets

        from fused_norm.bench.results import read

        return targets.markdown(targets.judge(read(out / "bench.jsonl").rows))
    except Exception as e:  # a package that does not import, or a file that is none: what is there is told all the same
        return f"Not known: {type(e).__name__}: {e}"
    finally:
        sys.path.pop(0)


def summary(outcomes: list[Outcome], out: Path, title: str) -> str:
    lines = [f"# {title}", "", "| section | step | result | seconds | detail |", "| --- | --- | --- | --- | --- |"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|")
        lines.append(f"| {o.section} | {o.step} | {'ok' if o.ok else '**failed**'} | {o.seconds:.0f} | {detail} |")
    if (out / "bench.jsonl").exists():
        lines += ["", "## Targets", "", targets_reached(out)]
    if (out / "tune.md").exists():
        lines += ["", "## Launches", "", (out / "tune.md").read_text().rstrip()]
    if (out / "bench.txt").exists():
        lines += ["", "## Benchmark", "", "```", (out / "bench.txt").read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    def seconds(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text)

    parser = argparse.ArgumentParser(prog="make gpu", description="Prove a GPU, and write a result folder.")
    parser.add_argument("--section", choices=SECTIONS, help="one section alone; all of them by default")
    parser.add_argument(
        "--output",
        type=Path,
        help="the result folder; gpu_results/<device>-<date> by default. One that exists keeps what it has of other"
        " sections",
    )
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="time for everything, shared by the sections")
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print(f"make gpu: {sys.executable} has no torch, so nothing was run.")
        return 2
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA GPU on this machine, so nothing was run.")
        return 2
    device = torch.cuda.get_device_name()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    out = args.output or ROOT / "gpu_results" / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    title = f"fused_norm on {device}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
    chosen = [args.section] if args.section else list(SECTIONS)
    before = earlier(out, chosen)

    def report(outcomes: list[Outcome]) -> None:
        order = list(SECTIONS).index
        everyone = sorted((*before, *outcomes), key=lambda o: order(o.section))
        (out / "steps.jsonl").write_text("".join(json.dumps(asdict(o)) + "\n" for o in everyone))
        (out / "summary.md").write_text(summary(everyone, out, title))

    sys.path.insert(0, str(ROOT))
    try:
        from fused_norm.bench import environment

        env = environment.collect(torch.device("cuda"), ["bench/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    except Exception as e:  # a package that does not import is what the steps are to show
        env = {"device": device, "torch": torch.__version__, "error": f"{type(e).__name__}: {e}"}
    (out / "environment.json").write_text(json.dumps(env, indent=2) + "\n")
    outcomes = run_sections(sections(out, chosen), out, report, side=workers(), budget_s=args.budget)
    failed = [o for o in outcomes if not o.ok]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} steps ok; the results are in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
