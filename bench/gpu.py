"""Prove a GPU: build the extension here, run GPU tests, gradient checks, sanitizers and the benchmark, and write a
result folder.

``make gpu`` runs this with the system's own Python: torch, triton, pytest and nvcc as they are, no network, nothing
installed. Every step is a process of its own with a time limit; its output goes to a log as it is made, and the summary
is rewritten after every step, so whatever happens later, what was found stays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Seconds a section may take, all its steps together: under nine minutes.
SECTION_LIMIT_S = 530.0

#: Seconds between asking a step to stop (as Ctrl-C does, so that it writes what it has) and killing it.
GRACE_S = 10.0

#: What the benchmark runs, a step each, by the result's name: operations, and seconds given to their cases. Together
#: they stay inside the section's limit, with room for compiling.
BENCHES = {"bench": ("norms", 150), "bench-add-norms": ("add-norms", 140), "bench-ticks": ("ticks", 150)}

#: Test files that run on the real GPU as a whole, beside every test marked gpu.
GPU_TEST_FILES = (
    "tests/test_triton.py",
    "tests/test_triton_add_norm.py",
    "tests/test_triton_ticks.py",
    "tests/test_cuda_native.py",
)

#: Test files whose small tests run under the sanitizers. Most of the last one's tests need a compiler instead of a GPU.
SANITIZED_TEST_FILES = (*GPU_TEST_FILES, "tests/test_cuda_ticks.py")

SECTIONS = ("build", "test", "gradcheck", "sanitize", "bench")

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")

NO_TESTS = 5  # pytest's exit status where it selected none
PASSED = re.compile(r"\b[1-9]\d* passed\b")  # in pytest's last line

#: Here a missing Triton backend fails the tests that want it, instead of skipping them.
TEST_ENV = {"FUSED_NORM_TEST_REQUIRE": "triton"}


@dataclass(frozen=True)
class Step:
    """A command. ``judge(exit status, log text)`` gives None, or why the step failed."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], str | None] = lambda rc, log: None if rc == 0 else f"exit status {rc}"


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
    return python("-m", "pytest", "-p", "no:cacheprovider", *args)


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")


def judge_tests(rc: int, log: str) -> str | None:
    """A run in which every test was skipped proves nothing, so it fails."""
    if rc == NO_TESTS:
        return "no test was selected"
    if rc != 0:
        return f"exit status {rc}"
    return None if PASSED.search(log) else "no test ran"


def judge_sanitizer(rc: int, log: str) -> str | None:
    """Clean means that the tests passed and that the tool itself says so: a tool that cannot attach says nothing."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    if not summaries:
        return f"the sanitizer gave no summary (exit status {rc})"
    dirty = [s for s in summaries if not re.search(r"SUMMARY: 0 (errors|hazards)", s)]
    if dirty:
        return dirty[0]
    if rc == NO_TESTS:
        return "no test was selected"
    if rc != 0:
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


def build_steps() -> list[Step]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    env = {"FUSED_NORM_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    home = cuda_home()
    if home is not None:
        env["CUDA_HOME"] = str(home)
    return [Step("build", python("setup.py", "build_ext", "--inplace"), env)]


def test_steps() -> list[Step]:
    files = [f for f in GPU_TEST_FILES if (ROOT / f).exists()]
    steps = [Step("marked gpu", pytest("tests", "-m", "gpu"), TEST_ENV, judge_tests)]
    return steps + [Step(Path(f).stem, pytest(f), TEST_ENV, judge_tests) for f in files]


def gradcheck_steps(out: Path) -> list[Step]:
    files = ("--json", str(out / "gradcheck.json"), "--junit", str(out / "gradcheck.xml"))
    return [Step("gradcheck", python("-m", "fused_norm", "gradcheck", "--device", "cuda", *files))]


def sanitize_steps() -> list[Step]:
    """Every tool over the tests marked small, without torch's caching allocator, which would hide overruns."""
    tool = find_sanitizer()
    if tool is None:
        message = "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"
        return [Step("find compute-sanitizer", python("-c", f"import sys; sys.exit({message!r})"))]
    files = [f for f in SANITIZED_TEST_FILES if (ROOT / f).exists()]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(
            f"{name} {Path(f).stem}",
            (tool, "--tool", name, "--error-exitcode", "97", "--print-limit", "20", *pytest(f, "-m", "small", "-q")),
            env,
            judge_sanitizer,
        )
        for f in files
        for name in SANITIZER_TOOLS
    ]


def bench_steps(out: Path) -> list[Step]:
    steps = []
    for name, (op, seconds) in BENCHES.items():
        options = ("--device", "cuda", "--op", op, "--seconds", str(seconds), "--output", str(out / f"{name}.jsonl"))
        steps.append(Step(name, python("bench/run.py", *options)))
    return steps


def sections(out: Path, chosen: list[str]) -> dict[str, Callable[[], list[Step]]]:
    """The steps of each chosen section. One that runs without ``build`` builds first if nothing was built yet."""
    steps: dict[str, Callable[[], list[Step]]] = {
        "build": build_steps,
        "test": test_steps,
        "gradcheck": lambda: gradcheck_steps(out),
        "sanitize": sanitize_steps,
        "bench": lambda: bench_steps(out),
    }
    if "build" not in chosen and not any((ROOT / "fused_norm").glob("_C_cuda*.so")):
        first = chosen[0]
        rest = steps[first]
        steps[first] = lambda: build_steps() + rest()
    return {name: steps[name] for name in chosen}


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
    begin = time.monotonic()
    try:
        with log.open("w") as file:
            print("$", *(f"{k}={v}" for k, v in step.env.items()), *step.command, file=file, flush=True)
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                rc = process.wait(max(0.1, limit_s - GRACE_S))
            except BaseException:  # out of time, or Ctrl-C here: either way nothing is left running
                stop(process)
                raise
    except subprocess.TimeoutExpired:
        took = time.monotonic() - begin
        return Outcome(section, step.name, False, took, f"stopped after {took:.0f} s, its time limit")
    except OSError as e:
        return Outcome(section, step.name, False, time.monotonic() - begin, str(e))
    text = log.read_text(errors="replace")
    reason = step.judge(rc, text)
    detail = last_line(text)[:200] if reason is None else f"{reason}; {last_line(text)[:200]}"
    return Outcome(section, step.name, reason is None, time.monotonic() - begin, detail)


def run_sections(
    planned: dict[str, Callable[[], list[Step]]],
    out: Path,
    report: Callable[[list[Outcome]], None],
    limit_s: float = SECTION_LIMIT_S,
) -> list[Outcome]:
    """Run every step of every section, whatever becomes of the others. Within a section, a step may take an equal share
    of the time that is left; what it does not need goes to the next."""
    outcomes: list[Outcome] = []
    for section, make in planned.items():
        deadline = time.monotonic() + limit_s
        try:
            steps = make()
        except Exception as e:
            outcomes.append(Outcome(section, "plan", False, 0.0, f"{type(e).__name__}: {e}"))
            steps = []
        for i, step in enumerate(steps):
            share = (deadline - time.monotonic()) / (len(steps) - i)
            log = out / f"{section}-{re.sub(r'[^A-Za-z0-9]+', '-', step.name)}.log"
            print(f"{section}: {step.name} (at most {share:.0f} s, log in {log})", flush=True)
            outcome = run_step(section, step, log, share)
            print(f"  {'ok' if outcome.ok else 'FAILED'} in {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
            outcomes.append(outcome)
            report(outcomes)
        report(outcomes)
    return outcomes


def summary(outcomes: list[Outcome], out: Path, title: str) -> str:
    lines = [f"# {title}", "", "| section | step | result | seconds | detail |", "| --- | --- | --- | --- | --- |"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|")
        lines.append(f"| {o.section} | {o.step} | {'ok' if o.ok else '**failed**'} | {o.seconds:.0f} | {detail} |")
    for name, (op, _) in BENCHES.items():
        table = out / f"{name}.txt"
        if table.exists():
            lines += ["", f"## Benchmark of the {op}", "", "```", table.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="one section alone; all of them by default")
    parser.add_argument("--output", type=Path, help="the result folder; gpu_results/<device>-<date> by default")
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

    def report(outcomes: list[Outcome]) -> None:
        (out / "summary.md").write_text(summary(outcomes, out, title))

    sys.path.insert(0, str(ROOT))
    try:
        from fused_norm.bench import environment

        env = environment.collect(torch.device("cuda"), ["bench/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    except Exception as e:  # a package that does not import is what the steps are to show
        env = {"device": device, "torch": torch.__version__, "error": f"{type(e).__name__}: {e}"}
    (out / "environment.json").write_text(json.dumps(env, indent=2) + "\n")
    outcomes = run_sections(sections(out, [args.section] if args.section else list(SECTIONS)), out, report)
    failed = [o for o in outcomes if not o.ok]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} steps ok; the results are in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
