"""What ``make gpu`` does around its steps: no step's failure, hang or crash may cost another step's result."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    return module


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def alive(pid: int) -> bool:
    """Running, and not merely waiting for its parent to read its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_a_gpu_it_says_so_in_a_sentence_and_exits_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--section", "test", "--output", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1 and "sees no CUDA GPU on this machine, so nothing was run." in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["-1", "0", "inf", "nan"])
def test_a_budget_that_is_none_is_named(gpu, budget, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--budget", budget])
    assert f"--budget: invalid seconds value: '{budget}'" in capsys.readouterr().err


def test_no_section_is_lost_to_another(gpu, tmp_path):
    reports = []

    def report(outcomes):
        reports.append([o.step for o in outcomes])

    def broken_plan():
        raise RuntimeError("no plan")

    child = tmp_path / "child.pid"
    hang = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('so far', flush=True)\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import time, signal;"
        " signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(c.pid))\n"
        "time.sleep(600)\n"
    )
    planned = {
        "build": lambda: [gpu.Step("fails", script("import sys; print('bad luck'); sys.exit(3)"))],
        "plan": broken_plan,
        "missing": lambda: [gpu.Step("absent", (str(tmp_path / "absent"),))],
        "test": lambda: [gpu.Step("hangs", script(hang)), gpu.Step("after it", script("print('still here')"))],
        "bench": lambda: [gpu.Step("fine", script("import os; print(os.environ['A'])"), {"A": "given"})],
    }
    begin = time.monotonic()
    outcomes = gpu.run_sections(planned, tmp_path, report, limit_s=8.0)
    assert time.monotonic() - begin < 20
    assert [(o.section, o.step, o.ok) for o in outcomes] == [
        ("build", "fails", False),
        ("plan", "plan", False),
        ("missing", "absent", False),
        ("test", "hangs", False),
        ("test", "after it", True),
        ("bench", "fine", True),
    ]
    details = {o.step: o.detail for o in outcomes}
    assert details["fails"] == "exit status 3; bad luck" and details["plan"] == "RuntimeError: no plan"
    assert "its time limit" in details["hangs"] and details["fine"] == "given"
    assert "so far" in (tmp_path / "test-hangs.log").read_text()
    assert not alive(int(child.read_text())), "the step's own child outlived it"
    assert reports[0] == ["fails"] and ["fails", "plan", "absent", "hangs"] in reports  # told after every step


def test_a_step_out_of_time_may_write_what_it_has(gpu, tmp_path):
    text = "import time\ntry:\n print('begun', flush=True); time.sleep(600)\nexcept KeyboardInterrupt:\n print('kept')"
    outcome = gpu.run_step("bench", gpu.Step("slow", script(text)), tmp_path / "log", 4.0)
    assert not outcome.ok and outcome.seconds < 4.5
    assert (tmp_path / "log").read_text().splitlines()[-2:] == ["begun", "kept"]


def test_steps_see_the_checkout_first(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    step = gpu.Step("path", script("import os; print(os.environ['PYTHONPATH'], os.getcwd())"))
    assert gpu.run_step("test", step, tmp_path / "log", 60.0).detail == f"{ROOT}:/elsewhere {ROOT}"


@pytest.mark.parametrize(
    ("rc", "log", "said"),
    [
        (0, "==== 3 passed, 2 skipped in 1s ====", None),
        (0, "==== 5 skipped in 1s ====", "no test ran"),
        (1, "==== 1 failed, 3 passed in 1s ====", "exit status 1"),
        (5, "==== no tests ran ====", "no test was selected"),
    ],
)
def test_what_counts_as_tested(gpu, rc, log, said):
    assert gpu.judge_tests(rc, log) == said


REPORT, TORCHS = (
    f"""========= Uninitialized __global__ memory read of size 4 bytes
=========     at {kernel}+0x1a0 in file.py:32
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: launch [0x16a3] in __triton_launcher.so
"""
    for kernel in ("norm_forward_kernel", "void at::native::reduce_kernel<float>(T1)")
)
COPIED = """========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
"""


@pytest.mark.parametrize(
    ("rc", "log", "said"),
    [
        (0, "3 passed in 1s\n========= ERROR SUMMARY: 0 errors", None),
        (0, "3 passed\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        (97, "3 passed\n========= ERROR SUMMARY: 12 errors", "ERROR SUMMARY: 12 errors"),
        (
            0,
            "1 passed\n==== RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            "RACECHECK SUMMARY: 1 hazard",
        ),
        (0, "3 passed\nError: Device not supported", "no summary"),
        (0, "3 skipped in 1s\n========= ERROR SUMMARY: 0 errors", "no test ran"),
        (1, "1 failed, 2 passed\n========= ERROR SUMMARY: 0 errors", "exit status 1"),
        (97, f"3 passed\n{REPORT}" + "========= ERROR SUMMARY: 1 error", "ERROR SUMMARY: 1 error"),
        (97, f"3 passed\n{TORCHS}" + "========= ERROR SUMMARY: 1 error", None),
        (97, f"3 passed\n{TORCHS}{TORCHS}{REPORT}" + "========= ERROR SUMMARY: 3 errors", "3 errors"),
        (97, f"3 passed\n{TORCHS}" + "========= ERROR SUMMARY: 2 errors", "2 errors"),  # one is not shown
        (
            97,
            f"3 passed\n{TORCHS}{COPIED}" + "========= ERROR SUMMARY: 2 errors",
            "2 errors",
        ),  # of which kernel?
        (1, f"1 failed, 3 passed\n{TORCHS}" + "========= ERROR SUMMARY: 1 error", "exit status 1"),
        (
            0,
            "3 passed\n========= Warning: Detected overflow of tracked cuda::barrier structures.\n"
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "Detected overflow of tracked cuda::barrier",
        ),
    ],
)
def test_what_counts_as_clean_under_a_sanitizer(gpu, rc, log, said):
    verdict = gpu.judge_sanitizer(rc, log)
    assert verdict is None if said is None else said in verdict


def test_setuptools_too_old_for_the_build_are_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "75.3.0")
    monkeypatch.setattr(gpu, "cuda_home", lambda: None)
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match=r"setuptools is 75\.3\.0, and reading pyproject\.toml needs 77"):
        gpu.build_steps()
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "77.0.1")
    (step,) = gpu.build_steps()
    assert step.env["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_a_section_alone_builds_first_where_nothing_is_built(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "build_steps", lambda: [gpu.Step("build", script(""))])
    monkeypatch.setattr(gpu, "gradcheck_steps", lambda out: [gpu.Step("check", script(""))])
    (tmp_path / "fused_norm").mkdir()

    def names(*chosen: str) -> list[str]:
        return [step.name for step in gpu.sections(tmp_path, list(chosen))["gradcheck"]()]

    assert names("gradcheck") == ["build", "check"] and names("build", "gradcheck") == ["check"]
    (tmp_path / "fused_norm" / "_C_cuda.abi3.so").touch()
    assert names("gradcheck") == ["check"]
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    newer = tmp_path / "csrc" / "cuda" / "norm.h"
    newer.touch()
    os.utime(newer, (time.time() + 9, time.time() + 9))
    assert names("gradcheck") == ["build", "check"]


# --------------------------------------------------------------------------------------------------------- side by side


def test_steps_that_hang_beside_others_take_no_ones_time(gpu, tmp_path):
    hang, quick = script("import time; time.sleep(600)"), script("print('done')")
    commands = [hang, quick, quick, hang, quick, hang, quick]
    steps = [gpu.Step(f"step {i}", c, beside=True) for i, c in enumerate(commands)] + [gpu.Step("alone", quick)]
    begin = time.monotonic()
    outcomes = gpu.run_sections({"test": lambda: steps}, tmp_path, lambda outcomes: None, limit_s=24.0, side=3)
    assert time.monotonic() - begin < 24
    assert {o.step: o.ok for o in outcomes} == {s.name: s.command == quick for s in steps}
    assert outcomes[-1].step == "alone"
    assert all("its time limit" in o.detail for o in outcomes if not o.ok)


def test_steps_run_side_by_side_as_many_as_may_and_share_the_cpus(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "cpus", lambda: 8)
    text = "import os, time; print(time.time(), os.environ.get('OMP_NUM_THREADS')); time.sleep(1); print(time.time())"
    steps = [gpu.Step(f"step {i}", script(text), beside=True) for i in range(5)]
    steps.append(gpu.Step("alone", script("import os; print(os.environ.get('OMP_NUM_THREADS'))")))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpu.run_sections({"test": lambda: steps}, tmp_path, lambda outcomes: None, limit_s=60.0, side=2)
    spans = []
    for i in range(5):
        begun, end = (tmp_path / f"test-step-{i}.log").read_text().splitlines()[-2:]
        assert begun.split()[1] == "4"
        spans.append((float(begun.split()[0]), float(end)))
    together = [sum(a <= begun < b for a, b in spans) for begun, _ in spans]
    assert max(together) == 2
    assert (tmp_path / "test-alone.log").read_text().splitlines()[-1] == "None"


def test_ctrl_c_leaves_nothing_running(tmp_path):
    """Also of steps that run side by side, each in a session of its own."""
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu
from pathlib import Path
gpu.GRACE_S = 1.0
text = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
steps = [gpu.Step(f"s{{i}}", (sys.executable, "-c", text, f"{tmp_path}/pid{{i}}"), beside=True) for i in range(3)]
gpu.run_sections({{"test": lambda: steps}}, Path({str(tmp_path)!r}), lambda outcomes: None, side=2)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = [tmp_path / f"pid{i}" for i in range(2)]
    end = time.monotonic() + 60
    while not all(p.exists() and p.read_text() for p in pids):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert not any(alive(int(p.read_text())) for p in pids) and not (tmp_path / "pid2").exists()


def test_how_the_time_is_shared(gpu, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    beside = [gpu.Step(f"b{i}", (), beside=True, weight=2.0) for i in range(5)]
    alone = [gpu.Step(f"a{i}", (), weight=weight) for i, weight in enumerate((1.0, 3.0))]
    shares = gpu.Shares([beside, alone], 2, 100.0)
    # Five side by side in twos are three rounds of weight 2, then come 1 and 3: ten parts.
    assert shares.next(beside[0]) == pytest.approx(20.0)
    # Four that are left are two rounds: 4 + 4 parts.
    assert shares.next(beside[1]) == pytest.approx(25.0)
    now[0] = 20.0
    assert shares.next(beside[2]) == pytest.approx(80.0 * 2 / 8)
    assert shares.next(beside[3]) == pytest.approx(80.0 * 2 / 6)
    now[0] = 40.0
    assert shares.next(beside[4]) == pytest.approx(60.0 * 2 / 6)
    now[0] = 60.0
    assert shares.next(alone[0]) == pytest.approx(10.0)
    assert shares.next(alone[1]) == pytest.approx(40.0)


def test_a_step_is_told_the_seconds_that_it_has(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "START_S", 2.0)
    step = gpu.Step("timed", (*script("import sys; print(sys.argv[1])"), gpu.SECONDS))
    assert gpu.run_step("bench", step, tmp_path / "log", 60.0).detail == "57"
    assert gpu.run_step("bench", step, tmp_path / "log", 6.0).detail == "5"


def test_a_budget_is_shared_among_the_sections(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SECTIONS", {"build": 1.0, "test": 3.0, "bench": 4.0})
    one = lambda: [gpu.Step("one", script(""))]  # noqa: E731
    planned = dict.fromkeys(gpu.SECTIONS, one)
    gpu.run_sections(planned, tmp_path, lambda outcomes: None, budget_s=800.0)
    limits = [float(n) for n in re.findall(r"at most (\d+) s", capsys.readouterr().out)]
    # A section that took next to nothing leaves its part to the rest, and none has more than a section may.
    assert limits == [pytest.approx(v, abs=3) for v in (100, 800 * 3 / 7, gpu.SECTION_LIMIT_S)]


def test_shards_are_all_tests_and_each_once():
    def names(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_targets.py", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return [line for line in done.stdout.splitlines() if "::" in line]

    parts = [names("--shard", f"{i}/3") for i in (1, 2, 3)]
    assert all(parts) and sorted(itertools.chain(*parts)) == sorted(names())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--shard", "4/3"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 4 and "'4/3' is not I/N with I from 1 to N" in done.stderr


# ------------------------------------------------------------------------------------------------------------- sections


def test_every_test_of_a_gpu_runs_in_one_step(gpu):
    steps = gpu.test_steps(3)
    by_kind = {kind: [s for s in steps if s.name.startswith(kind)] for kind in ("kernels", "others", "alone")}
    assert [len(found) for found in by_kind.values()] == [3, 3, 1]
    for kind, found in by_kind.items():
        for i, step in enumerate(found, 1):
            command = list(step.command)
            assert command[command.index("-m", 4) + 1] == "gpu" and step.beside == (kind != "alone")
            assert step.judge is gpu.judge_tests and step.env["FUSED_NORM_TEST_REQUIRE"] == "native,triton"
            assert kind == "alone" or command[-2:] == ["--shard", f"{i}/3"]
    assert set(gpu.KERNEL_TEST_FILES) <= set(by_kind["kernels"][0].command)
    ignored = {part.removeprefix("--ignore=") for part in by_kind["others"][0].command if part.startswith("--ignore=")}
    assert ignored == {*gpu.KERNEL_TEST_FILES, gpu.ALONE_TEST_FILE} and "tests" in by_kind["others"][0].command
    assert gpu.ALONE_TEST_FILE in by_kind["alone"][0].command
    assert all((ROOT / f).exists() for f in ignored)


def test_the_kernels_are_all_that_the_sources_have(gpu):
    found = gpu.kernels()
    texts = [f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    assert sum(text.count("__global__") for text in texts) <= len(found)
    for text in texts:
        for declared in re.findall(r"__global__(.*?)\{", text, re.DOTALL):
            if declared.split() == ["void", "probe()"]:
                continue  # of device.cu: it is asked for and never launched
            assert any(f"{name}(" in declared for name in found), declared
    jitted = set()
    for file in (ROOT / "fused_norm" / "backends" / "triton").glob("*.py"):
        text = file.read_text()
        jitted |= set(re.findall(r"^@triton\.jit\(do_not_specialize.*?^def (\w+)\(", text, re.MULTILINE | re.DOTALL))
    assert jitted and jitted <= set(found), jitted - set(found)  # kernels; what they call specialises on nothing


def test_a_missing_sanitizer_is_a_failed_step(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    (outcome,) = gpu.run_sections({"sanitize": gpu.sanitize_steps}, tmp_path, lambda outcomes: None)
    assert not outcome.ok and "neither on PATH nor in CUDA_HOME/bin" in outcome.detail


def test_every_sanitizer_runs_over_every_small_gpu_test(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    steps = gpu.sanitize_steps()
    assert all(s.beside for s in steps) and len({s.name for s in steps}) == len(steps)
    for tool in gpu.SANITIZER_TOOLS:
        for file in gpu.SANITIZED_TEST_FILES:
            shards = [s.command[-1] for s in steps if s.command[2] == tool and file in s.command]
            apart = ["1/3", "2/3", "3/3", "clusters"]
            assert shards == (apart if file == "tests/test_sanitized.py" else ["-q"])
        assert ("--num-cuda-barriers" in gpu.sanitizer_options(tool)) == (tool in ("racecheck", "synccheck"))
    assert {Path(f).stem for f in gpu.SANITIZED_TEST_FILES} >= {
        "test_sanitized",
        "test_triton_ticks",
        "test_cuda_ticks",
    }
    ports = set()
    for step in steps:
        assert step.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and step.judge is gpu.judge_sanitizer
        assert step.command[:2] == ("/cuda/bin/compute-sanitizer", "--tool") and "small" in step.command
        tool, options = step.command[2], step.command[: step.command.index(sys.executable)]
        assert step.command[step.command.index(sys.executable) + 1 :][:2] == ("-m", "pytest")
        assert options[options.index("--target-processes") + 1] == "application-only"
        ports.add(int(options[options.index("--port") + 1]))
        # All kernels of ours and none of torch's, but for initcheck, which must see who wrote what ours read.
        assert ("--kernel-name" in options) == (tool != "initcheck")
        if tool != "initcheck":
            pattern = options[options.index("--kernel-name") + 1].removeprefix("regex=")
            assert all(re.search(pattern, f"_ZN10fused_norm12_GLOBAL__{name}IffEEv") for name in gpu.kernels())
            assert not re.search(pattern, "void at::native::(anonymous)::vectorized_layer_norm_kernel<float, float>")
    assert min(b - a for a in ports for b in ports if b > a) >= 10


def test_gradients_are_checked_on_the_gpu_and_the_files_go_to_the_result_folder(gpu, tmp_path):
    (step,) = gpu.sections(tmp_path, ["build", "gradcheck"])["gradcheck"]()
    command = list(step.command)
    assert command[:6] == [sys.executable, "-m", "fused_norm", "gradcheck", "--device", "cuda"]
    from fused_norm.gradcheck import _parser

    options = _parser().parse_args(command[4:])
    assert options.json == tmp_path / "gradcheck.json" and options.junit == tmp_path / "gradcheck.xml"


def test_the_benchmark_covers_every_operation_and_pass_that_a_target_needs(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import targets

    from fused_norm.bench.cases import OPS
    from fused_norm.bench.run import grid, parse, passes_of

    measured, compared, timed, sure = set(), set(), [], []
    steps = gpu.bench_steps(tmp_path)
    for step in steps[:-1]:
        command = [part if part != gpu.SECONDS else "60" for part in step.command]
        assert command[1] == "bench/run.py"
        options = parse(command[2:])
        assert options.device == "cuda" and options.check == step.beside
        if options.check:
            sure.append(step)
            continue
        timed.append(step)
        assert options.output == tmp_path / "bench.jsonl" and options.seconds == 60
        for case in grid(options):
            for at in passes_of(case.op, options):
                found = compared if step.name == "compile" else measured
                found.add((case.op.name, at, case.dtype, case.shape))
        assert "torch" in options.provider and ("compile" in options.provider) == (step.name == "compile")
        assert step.name == "compile" or {"fused", "fused:triton", "fused:native", "liger"} <= set(options.provider)
    assert {case for t in targets.TARGETS for case in t.cases()} <= measured
    assert compared < measured and {op for op, *_ in measured} == set(OPS)
    # Those that compile come first, and what matters least comes last.
    assert steps[: len(sure)] == sure and [s.name for s in timed] == [name for name, *_ in gpu.BENCHES]
    assert steps[-1].name == "pictures" and "bench/plot.py" in " ".join(steps[-1].command)


def test_tuning_compiles_side_by_side_and_times_alone(gpu, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tune

    *prepared, timed = gpu.tune_steps(tmp_path, 3)
    parts = [tune.parse(list(step.command[2:])).prepare for step in prepared]
    assert parts == [(0, 3), (1, 3), (2, 3)] and all(step.beside for step in prepared) and not timed.beside
    options = tune.parse([part if part != gpu.SECONDS else "60" for part in timed.command[2:]])
    assert options.output == tmp_path / "tune.jsonl" and options.seconds == 60 and options.prepare is None
    assert all(step.command[1] == "bench/tune.py" for step in (*prepared, timed))


def test_without_matplotlib_the_pictures_are_left_out_with_a_word(gpu, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    step = gpu.bench_steps(tmp_path)[-1]
    outcome = gpu.run_step("bench", step, tmp_path / "log", 60.0)
    assert outcome.ok and outcome.detail == "matplotlib is not installed: no pictures"


def test_the_workflow_runs_every_section_on_its_own(gpu):
    """So that no section's failure, or its time limit, hides another's result; all into one folder."""
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    named = re.findall(r"^ +- run: make gpu SECTION=(\w+) ARGS=\"--output gpu_results/run\"$", text, re.MULTILINE)
    assert named == list(gpu.SECTIONS)
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    triggers = workflow[True]  # YAML 1.1 reads `on` so
    assert set(triggers) == {"workflow_dispatch", "schedule", "pull_request"}
    after_build = [s for s in job["steps"] if "SECTION" in s.get("run", "")][1:]
    assert all("cancelled()" in s["if"] for s in after_build)
    assert job["timeout-minutes"] * 60 > len(gpu.SECTIONS) * gpu.SECTION_LIMIT_S


def test_the_summary_shows_failures_targets_and_tables(gpu, tmp_path):
    from fused_norm.bench.results import Row, Writer

    (tmp_path / "bench.txt").write_text("layer_norm forward fp32\n")
    (tmp_path / "tune.md").write_text("a launch\n")
    row = Row("layer_norm", "forward", "fp32", 16384, 4096, None, "fused", "cold", ms=1.0, vs_copy=0.5)
    Writer(tmp_path / "bench.jsonl").write(row.to_json())
    outcomes = [gpu.Outcome("test", "a", True, 1.0, "3 passed"), gpu.Outcome("bench", "b", False, 2.0, "x | y")]
    text = gpu.summary(outcomes, tmp_path, "A GPU")
    assert "| test | a | ok | 1 | 3 passed |" in text and "| bench | b | **failed** | 2 | x \\| y |" in text
    assert "layer_norm forward fp32" in text and "a launch" in text
    assert "| **missed** | 0.500 | layer_norm forward fp32 16384x4096 |" in text and "| not measured |" in text
    (tmp_path / "bench.jsonl").write_text("rubbish\n")
    assert "Not known: ValueError" in gpu.summary(outcomes, tmp_path, "A GPU")


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 1)])
def test_the_result_folder(gpu, tmp_path, monkeypatch, code, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU 80GB")
    monkeypatch.setattr(gpu, "workers", lambda: 2)
    steps = {"test": lambda: [gpu.Step("one", script(f"import sys; print('done'); sys.exit({code})"))]}
    asked = []
    monkeypatch.setattr(gpu, "sections", lambda out, chosen: asked.append(chosen) or steps)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--section", "test"]) == status and gpu.main([]) == status
    assert asked == [["test"], ["build", "test", "gradcheck", "sanitize", "bench", "tune"]]
    folders = list((tmp_path / "gpu_results").iterdir())
    assert all(folder.name.startswith("Some-GPU-80GB-") for folder in folders)
    for name in ("environment.json", "summary.md", "steps.jsonl", "test-one.log"):
        assert (folders[0] / name).read_text().strip()
    assert ("**failed**" in (folders[0] / "summary.md").read_text()) == bool(status)


def test_a_later_run_into_the_same_folder_keeps_other_sections(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU 80GB")
    monkeypatch.setattr(gpu, "workers", lambda: 2)

    def run(section: str, text: str) -> tuple[list[tuple[str, str, bool]], str]:
        monkeypatch.setattr(gpu, "sections", lambda out, chosen: {section: lambda: [gpu.Step("one", script(text))]})
        gpu.main(["--section", section, "--output", str(tmp_path)])
        lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
        return [(r["section"], r["detail"], r["ok"]) for r in lines], (tmp_path / "summary.md").read_text()

    assert run("bench", "print('a')")[0] == [("bench", "a", True)]
    assert run("test", "print('b')")[0] == [("test", "b", True), ("bench", "a", True)]
    steps, text = run("bench", "import sys; sys.exit('c')")
    assert steps == [("test", "b", True), ("bench", "exit status 1; c", False)]
    assert "| test | one | ok |" in text and "| bench | one | **failed** |" in text
    (tmp_path / "steps.jsonl").write_text("rubbish\n")
    assert run("test", "print('b')")[0] == [("test", "b", True)]
