"""What ``make gpu`` does around its steps: no step's failure, hang or crash may cost another step's result."""

from __future__ import annotations

import importlib.util
import os
import re
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
    ],
)
def test_what_counts_as_clean_under_a_sanitizer(gpu, rc, log, said):
    verdict = gpu.judge_sanitizer(rc, log)
    assert verdict is None if said is None else said in verdict


def test_a_section_alone_builds_first_where_nothing_is_built(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "build_steps", lambda: [gpu.Step("build", script(""))])
    (tmp_path / "fused_norm").mkdir()
    benches = ["bench", "bench-add-norms", "bench-ticks"]
    assert [s.name for s in gpu.sections(tmp_path, ["bench"])["bench"]()] == ["build", *benches]
    assert [s.name for s in gpu.sections(tmp_path, ["build", "bench"])["bench"]()] == benches
    (tmp_path / "fused_norm" / "_C_cuda.abi3.so").touch()
    assert [s.name for s in gpu.sections(tmp_path, ["bench"])["bench"]()] == benches


def test_a_missing_sanitizer_is_a_failed_step(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    (outcome,) = gpu.run_sections({"sanitize": gpu.sanitize_steps}, tmp_path, lambda outcomes: None)
    assert not outcome.ok and "neither on PATH nor in CUDA_HOME/bin" in outcome.detail


def test_every_sanitizer_runs_over_every_small_gpu_test(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    for name in gpu.SANITIZED_TEST_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    steps = gpu.sanitize_steps()
    assert len(steps) == len(gpu.SANITIZER_TOOLS) * len(gpu.SANITIZED_TEST_FILES)
    assert {Path(f).stem for f in gpu.SANITIZED_TEST_FILES} >= {"test_triton_ticks", "test_cuda_ticks"}
    for step in steps:
        assert step.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and step.judge is gpu.judge_sanitizer
        assert step.command[:2] == ("/cuda/bin/compute-sanitizer", "--tool") and "small" in step.command


def test_gradients_are_checked_on_the_gpu_and_the_files_go_to_the_result_folder(gpu, tmp_path):
    (step,) = gpu.sections(tmp_path, ["build", "gradcheck"])["gradcheck"]()
    command = list(step.command)
    assert command[:6] == [sys.executable, "-m", "fused_norm", "gradcheck", "--device", "cuda"]
    from fused_norm.gradcheck import _parser

    options = _parser().parse_args(command[4:])
    assert options.json == tmp_path / "gradcheck.json" and options.junit == tmp_path / "gradcheck.xml"


def test_the_benchmark_covers_every_operation_within_the_sections_time(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from fused_norm.bench.cases import OPS
    from fused_norm.bench.run import parse

    covered, seconds = set(), 0.0
    for step in gpu.bench_steps(tmp_path):
        command = list(step.command)
        assert command[1] == "bench/run.py"
        options = parse(command[2:])
        assert options.device == "cuda" and options.output == tmp_path / f"{step.name}.jsonl"
        covered.update(options.op)
        seconds += options.seconds + 2 * gpu.GRACE_S
    assert covered == set(OPS) and seconds < gpu.SECTION_LIMIT_S


def test_the_workflow_runs_every_section_on_its_own(gpu, tmp_path):
    """So that no section's failure, or its time limit, hides another's result."""
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    named = re.findall(r"^ +- run: make gpu SECTION=(\w+) ARGS=\"--output gpu_results/(\w+)\"$", text, re.MULTILINE)
    assert [section for section, _ in named] == list(gpu.sections(tmp_path, list(gpu.SECTIONS)))
    assert all(section == folder for section, folder in named)
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    triggers = workflow[True]  # YAML 1.1 reads `on` so
    assert set(triggers) == {"workflow_dispatch", "schedule", "pull_request"}
    after_build = [s for s in job["steps"] if "SECTION" in s.get("run", "")][1:]
    assert all("cancelled()" in s["if"] for s in after_build)


def test_the_summary_shows_failures_and_the_table(gpu, tmp_path):
    (tmp_path / "bench.txt").write_text("layer_norm forward fp32\n")
    (tmp_path / "bench-ticks.txt").write_text("ticks_cross_entropy forward fp32\n")
    outcomes = [gpu.Outcome("test", "a", True, 1.0, "3 passed"), gpu.Outcome("bench", "b", False, 2.0, "x | y")]
    text = gpu.summary(outcomes, tmp_path, "A GPU")
    assert "| test | a | ok | 1 | 3 passed |" in text and "| bench | b | **failed** | 2 | x \\| y |" in text
    assert "layer_norm forward fp32" in text and "ticks_cross_entropy forward fp32" in text


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 1)])
def test_the_result_folder(gpu, tmp_path, monkeypatch, code, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU 80GB")
    steps = {"test": lambda: [gpu.Step("one", script(f"import sys; print('done'); sys.exit({code})"))]}
    asked = []
    monkeypatch.setattr(gpu, "sections", lambda out, chosen: asked.append(chosen) or steps)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--section", "test"]) == status and gpu.main([]) == status
    assert asked == [["test"], ["build", "test", "gradcheck", "sanitize", "bench"]]
    folders = list((tmp_path / "gpu_results").iterdir())
    assert all(folder.name.startswith("Some-GPU-80GB-") for folder in folders)
    for name in ("environment.json", "summary.md", "test-one.log"):
        assert (folders[0] / name).read_text().strip()
    assert ("**failed**" in (folders[0] / "summary.md").read_text()) == bool(status)
