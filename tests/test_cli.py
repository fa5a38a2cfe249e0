"""``python -m fused_norm``: what it prints, and that its exit status is earned."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

import fused_norm
from fused_norm import gradcheck, progress, testing
from fused_norm.__main__ import main
from fused_norm.backends import native

PACKAGE = Path(fused_norm.__file__).parent


def _run(*arguments: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("FUSED_NORM_BACKEND", "TRITON_INTERPRET")} | environment
    env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *arguments], env=env, cwd=path, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report() -> subprocess.CompletedProcess:
    return _run("-m", "fused_norm")


def test_it_succeeds_here(report) -> None:
    assert report.returncode == 0, report.stdout + report.stderr


def test_it_prints_versions_and_devices(report) -> None:
    for word in (fused_norm.__version__, torch.__version__, sys.version.split()[0], "cpu"):
        assert word.lower() in report.stdout.lower(), word
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in report.stdout


def test_it_prints_every_backend_and_why_one_is_missing(report) -> None:
    for name, reason in fused_norm.available_backends().items():
        assert name in report.stdout
        if reason is not None:
            assert reason in report.stdout or " ".join(reason.split()) in " ".join(report.stdout.split()), name


def test_it_checks_forward_and_backward_of_each_available_backend(report) -> None:
    for name, reason in fused_norm.available_backends().items():
        lines = [line for line in report.stdout.splitlines() if name in line]
        assert lines
        if reason is None and name != "reference":
            assert any("ok" in line.lower() or "pass" in line.lower() for line in lines), report.stdout


def test_it_works_without_extension_and_triton(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fused_norm", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n")
    done = _run("-m", "fused_norm", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native" in done.stdout and "triton" in done.stdout


#: Bugs planted in a backend before the report is made, each of which it must find.
BUGS = {
    "y": lambda out: (out[0] * 1.01, out[1]),
    "dx": lambda out: (None if out[0] is None else out[0] * 1.01, *out[1:]),
    "dw": lambda out: (out[0], None if out[1] is None else out[1] * 1.01, out[2]),
    "db": lambda out: (*out[:2], None if out[2] is None else out[2] * 1.01),
    "exception": lambda out: 1 / 0,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_backend_fails_the_check(bug: str, capsys, monkeypatch) -> None:
    if fused_norm.available_backends()["native"] is not None:
        pytest.skip(f"native: {fused_norm.available_backends()['native']}")
    name = "norm_forward" if bug in ("y", "exception") else "norm_backward"
    right = getattr(native, name)
    monkeypatch.setattr(native, name, lambda *args: BUGS[bug](right(*args)))
    assert main([]) == 1
    out = capsys.readouterr().out
    wrong = re.search(r"^  native +cpu +WRONG\n((    .*\n)+)", out, re.MULTILINE)
    assert wrong and ("ZeroDivisionError" if bug == "exception" else bug) in wrong[1], out
    assert re.search(r"^  torch +cpu +ok$", out, re.MULTILINE), out


@pytest.mark.parametrize("op, what", [("layer_norm", "value"), ("rms_norm", "gradient")])
def test_a_wrong_torch_backend_fails_the_check(op: str, what: str, capsys, monkeypatch) -> None:
    """Needs no extension: torch's own function is made wrong."""
    original = getattr(F, op)

    def wrong(*args, **options):
        y = original(*args, **options)
        return y * 1.01 if what == "value" else y.detach() + 1.01 * (y - y.detach())

    monkeypatch.setattr(F, op, wrong)
    assert main([]) == 1
    assert re.search(rf"^  torch +cpu +WRONG\n    {op}", out := capsys.readouterr().out, re.MULTILINE), out


def test_an_unknown_command_is_refused() -> None:
    done = _run("-m", "fused_norm", "no-such-command")
    assert done.returncode == 2 and "no-such-command" in done.stderr
    assert _run("-m", "fused_norm", "--help").returncode == 0


# ------------------------------------------------------------------------------------------------------------ gradcheck

QUICK = ["--device", "cpu", "--backend", "reference"]


def _gradcheck(capsys, *arguments: str) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of the command."""
    try:
        status = gradcheck.main(list(arguments))
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.fixture
def wrong_rms(monkeypatch) -> None:
    """A truth that rms_norm's dx misses by far, in fp32 alone."""
    op = testing.OPERATIONS["rms_norm"]

    def another_truth(sample, upstream):
        y, dx, *others = op.vjp(sample, upstream)
        return y, dx * (1.01 if sample.inputs["x"].dtype == torch.float32 else 1), *others

    monkeypatch.setitem(testing.OPERATIONS, "rms_norm", dataclasses.replace(op, vjp=another_truth))


@pytest.fixture
def interrupted(monkeypatch) -> None:
    """Ctrl-C during the third check."""
    result, calls = testing.GradCheck.result, []

    def until(self, seed=0):
        calls.append(self)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return result(self, seed)

    monkeypatch.setattr(testing.GradCheck, "result", until)


def test_gradcheck_passes_from_the_command_line(tmp_path: Path) -> None:
    done = _run("-m", "fused_norm", "gradcheck", *QUICK, "--only", "vjp", "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\[1/40 \d+ s\] ok    layer_norm-reference-cpu-float64-vjp \(\d", done.stdout, re.MULTILINE)
    assert re.search(r"^40 passed, 0 failed, in \d+ s with seed 0$", done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "a.json").read_text())["finished"] is True


def test_list_prints_the_names_and_runs_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(testing.GradCheck, "result", lambda *a: pytest.fail("it ran"))
    status, out, _ = _gradcheck(capsys, *QUICK, "--list")
    assert status == 0
    assert out.splitlines() == [str(c) for c in testing.gradchecks(["cpu"], ["reference"])]
    _, out, _ = _gradcheck(capsys, *QUICK, "--list", "--only", "ticks_loss", "--only", "hessian")
    names = out.splitlines()
    assert names and all("ticks_loss" in name or "hessian" in name for name in names)
    assert "layer_norm-reference-cpu-float64-hessian" in names


def test_only_a_whole_name_is_that_check_alone() -> None:
    names = ["norm-reference-cpu-float64-vjp", "add_norm-reference-cpu-float64-vjp"]
    checks = [testing.GradCheck(name.partition("-")[0], "reference", "cpu", torch.float64, "vjp") for name in names]
    assert gradcheck.select(checks, names[:1]) == checks[:1]
    assert gradcheck.select(checks, ["norm-reference"]) == checks
    assert gradcheck.select(checks, []) == checks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "no-such-check"], "no check is named like no-such-check"),
        (["--device", "toaster"], "no toaster device here; there is cpu"),
        (["--backend", "triton", "--device", "cpu"], "backend triton was asked for, but cannot run on cpu"),
        (["--seed", "x"], "invalid int value"),
    ],
)
def test_arguments_without_sense_are_refused(capsys, monkeypatch, arguments: list[str], said: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, out, err = _gradcheck(capsys, *arguments)
    assert status == 2 and said in err and not out


@pytest.mark.parametrize("option", ["--json", "--junit"])
def test_an_unwritable_file_is_told_before_the_checks(capsys, tmp_path: Path, option: str) -> None:
    status, out, err = _gradcheck(capsys, *QUICK, "--only", "vjp", option, str(tmp_path))
    assert status == 2 and f"cannot write {tmp_path}: Is a directory" in err and not out
    (tmp_path / "file").touch()
    status, out, err = _gradcheck(capsys, *QUICK, "--only", "vjp", option, str(tmp_path / "file" / "a"))
    assert status == 2 and "cannot write" in err and not out


def test_a_failure_is_told_in_full_with_the_command_that_replays_it(capsys, wrong_rms) -> None:
    status, out, _ = _gradcheck(capsys, *QUICK, "--only", "rms_norm-reference-cpu-float", "--only", "x", "--seed", "5")
    assert status == 1
    table, _, failures = out.partition("Failures:")
    name = "rms_norm-reference-cpu-float32-vjp"
    assert re.search(r"^rms_norm reference cpu +ok 0\.\d\d +FAIL \de\+04 +ok", table, re.MULTILINE)
    assert f"\n  {name}\n    3x4x37: dx: error 0.0099 > limit" in failures
    assert "1 failed" in failures.splitlines()[-1]
    command = re.search(r"replay: python -m fused_norm gradcheck (.*)$", failures, re.MULTILINE)[1]
    assert command == f"--only {name} --seed 5"
    status, again, _ = _gradcheck(capsys, *command.split())
    assert status == 1 and "1 checks, seed 5" in again
    assert failures.splitlines()[2] in again, "the same numbers"


def test_expected_failures_and_what_is_not_checked_are_told(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    junit, report = tmp_path / "new" / "a.xml", tmp_path / "a.json"
    files = ["--junit", str(junit), "--json", str(report)]
    status, out, _ = _gradcheck(capsys, "--device", "cpu", "--only", "torch-cpu-float64-hessian", *files)
    assert status == 0
    assert re.search(r"^layer_norm torch cpu +xfail$", out, re.MULTILINE)
    assert (
        "loses terms of its Hessian's mixed blocks under torch.func:\n    layer_norm-torch-cpu-float64-hessian" in out
    )
    assert f"triton on cpu ({', '.join(testing.OPERATIONS)}): on a CPU Triton only has its interpreter" in out
    assert "6 passed, 0 failed, 2 failed as expected" in out.splitlines()[-1]

    (suite,) = ElementTree.parse(junit).getroot()
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert "expected failure: torch's" in cases["layer_norm-torch-cpu-float64-hessian"].find("skipped").get("message")
    assert list(cases["rms_norm-torch-cpu-float64-hessian"]) == []
    assert "interpreter" in cases["rms_norm-triton-cpu"].find("skipped").get("message")
    skipped = len(json.loads(report.read_text())["skipped"])
    assert skipped and suite.get("tests") == str(8 + skipped) and suite.get("skipped") == str(2 + skipped)
    assert suite.get("failures") == "0"

    entry = json.loads(report.read_text())["checks"][0]
    assert entry["result"] == "xfail" and "d2/dw dx" in entry["failure"] and entry["expected_failure"]


def test_an_unexpected_pass_is_told_and_no_failure(capsys, monkeypatch, tmp_path: Path) -> None:
    limit = testing.TorchLimit(lambda check: True, "error", "known")
    op = dataclasses.replace(testing.OPERATIONS["rms_norm"], torch_limits=(limit,))
    monkeypatch.setitem(testing.OPERATIONS, "rms_norm", op)
    path = tmp_path / "a.xml"
    status, out, _ = _gradcheck(
        capsys, "--device", "cpu", "--only", "rms_norm-torch-cpu-float64-vjp", "--junit", str(path)
    )
    assert status == 0 and "XPASS" in out and "1 passed unexpectedly" in out.splitlines()[-1]
    assert "rms_norm-torch-cpu-float64-vjp (known)" in out
    assert "unexpected pass: known" in path.read_text()


def test_json_and_junit_hold_everything(capsys, wrong_rms, tmp_path: Path) -> None:
    junit, report = tmp_path / "a.xml", tmp_path / "a.json"
    arguments = [*QUICK, "--only", "rms_norm-reference-cpu-float", "--seed", "7"]
    assert _gradcheck(capsys, *arguments, "--junit", str(junit), "--json", str(report))[0] == 1

    document = json.loads(report.read_text())
    assert document["seed"] == 7 and document["finished"] is True and document["not_run"] == []
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["fused_norm"] == fused_norm.__version__
    assert [d["type"] for d in document["devices"]] == ["cpu"]
    assert document["command"].startswith("python -m fused_norm gradcheck --device cpu --backend reference --only")
    checks = {entry["name"]: entry for entry in document["checks"]}
    assert document["summary"] == {
        "passed": len(checks) - 1,
        "failed": 1,
        "failed as expected": 0,
        "passed unexpectedly": 0,
        "not run": 0,
    }
    bad = checks["rms_norm-reference-cpu-float32-vjp"]
    assert bad["result"] == "fail" and bad["worst"] == "dx" and bad["error"] == pytest.approx(0.0099, rel=0.01)
    assert 0 < bad["limit"] < 1e-6 and bad["seconds"] > 0 and "dx: error" in bad["failure"]
    assert bad["replay"] == "python -m fused_norm gradcheck --only rms_norm-reference-cpu-float32-vjp --seed 7"
    good = checks["rms_norm-reference-cpu-float16+float32-jvp"]
    assert good["result"] == "ok" and good["error"] <= good["limit"] and good["failure"] is None
    assert (good["dtype"], good["param_dtype"], good["mode"]) == ("float16", "float32", "jvp")
    assert checks["rms_norm-reference-cpu-float64-gradcheck"]["error"] is None  # finite differences give no number

    root = ElementTree.parse(junit).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    properties = {p.get("name"): p.get("value") for p in suite.find("properties")}
    assert properties["seed"] == "7" and properties["torch"] == torch.__version__ and "device cpu" in properties
    cases = [case for case in suite.iter("testcase") if case.get("name") in checks]
    assert len(cases) == len(checks) and all(float(case.get("time")) >= 0 for case in cases)
    (failure,) = suite.iter("failure")
    assert "dx: error" in failure.get("message") and bad["replay"] in failure.text
    assert suite.get("failures") == "1"


def test_control_characters_do_not_break_the_xml(capsys, monkeypatch, tmp_path: Path) -> None:
    def coloured(*args):
        raise RuntimeError("\x1b[31mred\x00 & <b>")

    op = dataclasses.replace(testing.OPERATIONS["rms_norm"], vjp=coloured)
    monkeypatch.setitem(testing.OPERATIONS, "rms_norm", op)
    path = tmp_path / "a.xml"
    assert _gradcheck(capsys, *QUICK, "--only", "rms_norm-reference-cpu-float64-vjp", "--junit", str(path))[0] == 1
    (failure,) = ElementTree.parse(path).getroot().iter("failure")
    assert failure.get("message") == "3x4x37: RuntimeError: ?[31mred? & <b>" and "Traceback" in failure.text


def test_interrupted_it_keeps_what_it_has(capsys, interrupted, tmp_path: Path) -> None:
    junit, report = tmp_path / "a.xml", tmp_path / "a.json"
    arguments = [*QUICK, "--only", "ticks_loss-reference-cpu-float64", "--junit", str(junit), "--json", str(report)]
    status, out, _ = _gradcheck(capsys, *arguments)
    assert status == 130
    assert re.match(r"interrupted: 2 passed, 0 failed, 10 not run", out.splitlines()[-1])
    assert re.search(r"^ticks_loss reference cpu +- +- +- +-$", out, re.MULTILINE)
    document = json.loads(report.read_text())
    assert document["finished"] is False and len(document["checks"]) == 2 and len(document["not_run"]) == 10
    skipped = [s.get("message") for s in ElementTree.parse(junit).getroot().iter("skipped")]
    assert skipped.count("not run: interrupted before") == 10


# ----------------------------------------------------------------------------------------------------------- progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = _Terminal()
    bar = progress.Progress(4, stream)
    bar.begin("first")
    bar.step("first done")
    bar.note("this stays")
    bar.begin("a name longer than the line, " * 5)
    bar.close()
    text = stream.getvalue()
    assert text.count("\n") == 1 and "this stays\n" in text
    drawn = [part for part in text.replace("\n", "\r").split("\r") if part.strip()]
    assert drawn[0].startswith("[....................] 0/4 0:00 first")
    assert drawn[1].startswith("[#####...............] 1/4 0:00, about 0:00 left first done")
    assert all(len(part) <= 79 for part in drawn)
    assert text.endswith("\r") and not text.rsplit("\r", 2)[1].strip(), "nothing of it is left"


def test_elsewhere_progress_is_lines_and_not_too_many() -> None:
    stream = io.StringIO()
    bar = progress.Progress(100, stream, quiet_seconds=3600)
    for i in range(100):
        bar.begin(str(i))
        bar.step(str(i))
    bar.close()
    assert stream.getvalue().splitlines() == ["[1/100 0 s] 0", "[100/100 0 s] 99"]


def test_rows_of_a_step_stay_above_the_bar(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = _Terminal()
    bar = progress.Progress(2, stream)
    bar.step("first", ["a row", "another"])
    lines = stream.getvalue().replace("\r", "\n").split("\n")
    assert [line for line in lines if line.strip()] == [
        "first",
        "a row",
        "another",
        next(line for line in lines if line.startswith("[##########..........] 1/2 0:00")),
    ]
    elsewhere = io.StringIO()
    bar = progress.Progress(2, elsewhere, quiet_seconds=3600)
    bar.step("first", ["a row"])
    bar.step("second", ["another"])
    assert elsewhere.getvalue().splitlines() == ["[1/2 0 s] first", "a row", "[2/2 0 s] second", "another"]


@pytest.mark.parametrize("lines, erased", [("8", True), ("5", False)])
def test_notes_are_erased_only_while_all_are_on_the_screen(monkeypatch, lines: str, erased: bool) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", lines)
    stream = _Terminal()
    bar = progress.Progress(1, stream)
    bar.note("one\ntwo")
    bar.note("x" * 100)  # two lines of the terminal
    bar.step("done", ["row"])
    bar.erase_notes()
    assert stream.getvalue().endswith("\x1b[6F\x1b[J") == erased


# --------------------------------------------------------------------------------------------------------------- bench


def test_bench_gives_one_quick_answer_as_json(tmp_path: Path) -> None:
    command = "-m fused_norm bench --op layer_norm --m 4 --n 96 --dtype bf16 --provider torch,fused --json"
    done = _run(*command.split(), "--device", "cpu", "--output", str(tmp_path / "a.jsonl"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["environment", *["row"] * 8, "end"]
    assert {line["provider"] for line in lines[1:-1]} == {"torch", "fused"}
    assert all(line["ms"] > 0 and (line["m"], line["n"]) == (4, 96) for line in lines[1:-1])
    assert "[4/4 " in done.stderr and "layer_norm backward bf16 4x96" in done.stderr


def test_bench_without_an_output_leaves_its_rows_in_runs(tmp_path: Path) -> None:
    command = "-m fused_norm bench --op rms_norm --m 4 --n 8 --dtype fp32 --provider torch --pass forward --device cpu"
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").glob("bench-*-cpu.jsonl")
    assert f"rows go to runs/{path.name}" in done.stdout and len(path.read_text().splitlines()) == 3
    assert "rms_norm forward fp32, warm caches" in path.with_suffix(".txt").read_text()
