"""The benchmark harness, on tiny sizes on the CPU: what it counts, refuses to time, and leaves behind."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_norm.bench import cases, gate, main, providers, run, timing
from fused_norm.bench.cases import OPS, PASSES, bytes_moved, make_inputs
from fused_norm.bench.providers import PROVIDERS, Provider

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--shapes", "6x8", "--seconds", "2", "--device", "cpu"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bench(tmp_path: Path, *argv: str) -> tuple[int, list[dict[str, str]], dict]:
    out = tmp_path / "result.csv"
    status = main([*TINY, "--output", str(out), *argv])
    return status, rows_of(out), json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine take most of a tiny call's time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plant(monkeypatch):
    """Puts a provider of the given call into the registry."""

    def put(name, call, **kwargs):
        monkeypatch.setitem(PROVIDERS, name, Provider(name, lambda op: call, **kwargs))

    return put


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_by_hand():
    # 3 rows of 5 in bf16: a tensor has 30 bytes, a parameter 10, a statistic of all rows 12 (fp32).
    layer, rms = OPS["layer_norm"], OPS["rms_norm"]
    assert bytes_moved(layer, "forward", 3, 5, torch.bfloat16) == 2 * 30 + 2 * 10 + 2 * 12
    assert bytes_moved(layer, "forward-nograd", 3, 5, torch.bfloat16) == 2 * 30 + 2 * 10
    assert bytes_moved(layer, "backward", 3, 5, torch.bfloat16) == 3 * 30 + 3 * 10 + 2 * 12
    assert bytes_moved(rms, "forward", 3, 5, torch.float64) == 2 * 120 + 40 + 24
    assert bytes_moved(rms, "backward", 3, 5, torch.float32) == 3 * 60 + 2 * 20 + 12


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_bytes_are_two_and_three_units_for_large_tensors(op):
    unit = 4096 * 16384 * 4
    for name, units in (("forward", 2), ("forward-nograd", 2), ("backward", 3), ("forward+backward", 5)):
        assert bytes_moved(op, name, 4096, 16384, torch.float32) / unit == pytest.approx(units, rel=1e-3)


def test_a_row_reports_these_bytes_over_its_median(tmp_path):
    _, rows, _ = bench(tmp_path, "--op", "layer_norm", "--provider", "torch", "--dtype", "bf16")
    assert [r["pass"] for r in rows] == list(PASSES)
    for r in rows:
        moved = bytes_moved(OPS["layer_norm"], r["pass"], 6, 8, torch.bfloat16)
        assert float(r["gb_s"]) == pytest.approx(moved / float(r["ms"]) / 1e6, rel=1e-4)
        assert float(r["vs_copy"]) == pytest.approx(float(r["gb_s"]) / float(r["copy_gb_s"]), rel=1e-4)
        assert float(r["p20_ms"]) <= float(r["ms"]) <= float(r["p80_ms"])
        assert float(r["vs_torch"]) == 1 and int(r["rounds"]) >= timing.MIN_ROUNDS


# ------------------------------------------------------------------------------------------------------------- timing


def test_orders_alternate_and_rotate():
    orders = list(timing.orders(["a", "b", "c"], 6))
    assert orders[:3] == [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]]
    assert all(sorted(o) == ["a", "b", "c"] for o in orders)
    assert {o[0] for o in orders} == {"a", "b", "c"}


class FakeClock:
    """Says that a call takes one millisecond, and writes down who was timed, with what in force."""

    def __init__(self):
        self.log = []

    def host_s(self, call):
        call()
        return 1e-3

    def sample(self, call, host_s, into):
        self.log.append(call())
        into.ms.append(1.0)


def test_rounds_hold_everyone_once_and_warm_up_is_not_timed():
    counts = {"a": 0, "b": 0}

    def contender(name):
        def call():
            counts[name] += 1
            return name

        return timing.Contender(name, lambda: call)

    clock = FakeClock()
    samples = timing.time_group([contender("a"), contender("b")], clock, seconds=0.0)
    assert clock.log == ["a", "b", "b", "a", "b", "a", "a", "b", "a", "b"]
    assert all(len(samples[name].ms) == timing.MIN_ROUNDS for name in "ab")
    assert counts == {"a": timing.MIN_ROUNDS + 3, "b": timing.MIN_ROUNDS + 3}


def test_the_time_bounds_the_rounds():
    contender = timing.Contender("a", lambda: lambda: None)
    assert len(timing.time_group([contender], FakeClock(), seconds=60.0)["a"].ms) == timing.MAX_ROUNDS


def test_a_contender_that_fails_does_not_take_the_others_along():
    def fail():
        raise RuntimeError("no")

    samples = timing.time_group(
        [timing.Contender("bad", lambda: fail), timing.Contender("good", lambda: lambda: None)], FakeClock(), 0.0
    )
    assert str(samples["bad"].error) == "no" and not samples["bad"].ms
    assert samples["good"].error is None and len(samples["good"].ms) == timing.MIN_ROUNDS


def test_quantiles():
    samples = timing.Samples([5.0, 1.0, 3.0, 2.0, 4.0])
    assert samples.median == 3 and [samples.quantile(q) for q in (0, 0.2, 0.8, 1)] == pytest.approx([1, 1.8, 4.2, 5])


def test_what_each_pass_times():
    inputs = make_inputs(OPS["layer_norm"], 4, 8, torch.float32, CPU)
    calls = []

    def call(x, w, b):
        calls.append(torch.is_grad_enabled())
        return F.layer_norm(x, x.shape[-1:], w, b)

    results = {}
    for name in PASSES:
        with run.context(name, None):
            timed = run.prepare(name, call, inputs)
            calls.clear()
            results[name] = (timed(), list(calls))
    assert results["forward"][1] == [True] and results["forward"][0].requires_grad
    assert results["forward-nograd"][1] == [False] and not results["forward-nograd"][0].requires_grad
    assert results["backward"][1] == [] and len(results["backward"][0]) == 3  # dx, dw, db, and no forward
    assert results["forward+backward"][1] == [True] and len(results["forward+backward"][0]) == 3


# --------------------------------------------------------------------------------------------------------------- gate


def judge(call, op="layer_norm", dtype=torch.float32, m=40, n=24):
    inputs = make_inputs(OPS[op], m, n, dtype, CPU)
    verdicts, calls = gate.judge(OPS[op], inputs, [PROVIDERS["torch"], Provider("planted", lambda op: call)])
    assert verdicts["torch"].status == "ok"
    assert ("planted" in calls) == (verdicts["planted"].status == "ok")
    return verdicts["planted"]


class Bent(torch.autograd.Function):
    """layer_norm whose gradients are right but for the one named."""

    @staticmethod
    def forward(ctx, x, w, b, which):
        ctx.save_for_backward(x, w, b)
        ctx.which = which
        y = F.layer_norm(x, x.shape[-1:], w, b)
        return torch.cat([y[:-1], y[-1:] * 1.5]) if which == "y" else y

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            y = F.layer_norm(leaves[0], leaves[0].shape[-1:], *leaves[1:])
        grads = dict(zip(("dx", "dw", "db"), torch.autograd.grad(y, leaves, dy), strict=True))
        if ctx.which == "missing":
            raise NotImplementedError("forward only")
        if ctx.which == "dy":
            dy.zero_()
        if ctx.which in grads:
            grads[ctx.which] = grads[ctx.which] * 1.001
        return *grads.values(), None


@pytest.mark.parametrize("which", ["y", "dx", "dw", "db"])
def test_the_gate_names_the_one_tensor_that_is_wrong(which):
    verdict = judge(lambda x, w, b: Bent.apply(x, w, b, which))
    assert verdict.status == "wrong"
    named = {part.split(":")[0] for part in verdict.reason.split("; ")}
    assert named == ({"y", "y without grad"} if which == "y" else {which})


def test_the_gate_lets_a_right_one_pass():
    verdict = judge(lambda x, w, b: Bent.apply(x, w, b, "none"))
    assert verdict.status == "ok" and set(verdict.errors) == {"y", "y without grad", "dx", "dw", "db"}
    assert judge(lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-6), op="rms_norm").status == "ok"


def test_the_gate_sees_a_block_of_rows_in_the_middle(monkeypatch):
    monkeypatch.setattr(gate, "BLOCK_ELEMENTS", 7 * 24)  # blocks of 7 rows, the last one shorter

    def call(x, w, b):
        y = F.layer_norm(x, x.shape[-1:], w, b)
        return torch.cat([y[:20], y[20:21] * 2, y[21:]])

    assert judge(call).reason.startswith("y: ")
    assert judge(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)).status == "ok"


def test_the_gate_sees_the_path_without_grad():
    def call(x, w, b):
        return F.layer_norm(x, x.shape[-1:], w, b if torch.is_grad_enabled() else None)

    assert judge(call).reason.startswith("y without grad")


@pytest.mark.parametrize("call", [lambda x, w, b: x[:1] * 1, lambda x, w, b: x * float("nan")], ids=["shape", "nan"])
def test_the_gate_refuses_a_wrong_shape_and_nan(call):
    assert judge(call).status in ("wrong", "error")


def test_the_gate_refuses_to_have_inputs_overwritten():
    verdict = judge(lambda x, w, b: Bent.apply(x, w, b, "dy"))
    assert (verdict.status, verdict.reason) == ("wrong", "wrote over its input dy")


def test_an_exception_is_a_verdict():
    def call(x, w, b):
        raise ValueError("first line\nsecond line")

    verdict = judge(call)
    assert (verdict.status, verdict.reason) == ("error", "ValueError: first line")


def test_a_provider_without_backward_is_timed_forward_only(tmp_path, plant):
    plant("half", lambda x, w, b: Bent.apply(x, w, b, "missing"))
    _, rows, _ = bench(tmp_path, "--op", "layer_norm", "--dtype", "fp32", "--provider", "torch,half")
    status = {r["pass"]: (r["status"], r["reason"]) for r in rows if r["provider"] == "half"}
    skipped = ("skipped", "NotImplementedError: forward only")
    assert status == {
        "forward": ("ok", ""),
        "forward-nograd": ("ok", ""),
        "backward": skipped,
        "forward+backward": skipped,
    }


# ------------------------------------------------------------------------------------------------- the command line


def test_a_wrong_provider_is_shown_as_wrong_and_not_timed(tmp_path, plant, capsys):
    plant("fused:wrong", lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 0.1))
    status, rows, _ = bench(tmp_path, "--op", "layer_norm", "--dtype", "fp32", "--provider", "torch,fused:wrong")
    assert status == 1
    wrong = [r for r in rows if r["provider"] == "fused:wrong"]
    assert [(r["status"], r["pass"], r["ms"]) for r in wrong] == [("wrong", "all", "")]
    assert float(wrong[0]["err_y"]) > 1e-3
    assert "fused:wrong: wrong in layer_norm all fp32 6x8: y: error" in capsys.readouterr().out


def test_another_ones_failure_is_told_but_does_not_fail_the_run(tmp_path, plant):
    plant("other", lambda x, w, b: x * w)
    status, rows, _ = bench(tmp_path, "--op", "rms_norm", "--dtype", "fp32", "--provider", "torch,other")
    assert status == 0 and [r["status"] for r in rows if r["provider"] == "other"] == ["wrong"]


def test_a_skipped_provider_says_why(tmp_path, plant, capsys):
    plant("absent", None, unavailable=lambda device: f"not on {device}")
    status, rows, env = bench(tmp_path, "--op", "rms_norm", "--dtype", "fp32", "--provider", "absent,torch")
    assert status == 0 and env["providers"] == {"absent": "not on cpu", "torch": None}
    assert [r["reason"] for r in rows if r["status"] == "skipped"] == ["not on cpu"]
    assert "skipped: absent: not on cpu" in capsys.readouterr().out


def test_csv_environment_and_table(tmp_path, capsys):
    status, rows, env = bench(tmp_path, "--provider", "torch,fused:reference", "--pass", "forward,backward")
    assert status == 0 and env["finished"] is True
    keys = [(r["op"], r["pass"], r["dtype"], r["provider"]) for r in rows]
    ops, passes, dtypes, names = OPS, ("forward", "backward"), ("fp32", "bf16"), ("torch", "fused:reference")
    assert keys == [(o, p, d, n) for o in ops for d in dtypes for p in passes for n in names]
    assert {r["status"] for r in rows} == {"ok"} and all(float(r["ms"]) > 0 for r in rows)
    assert env["device"]["type"] == "cpu" and env["device"]["name"] and env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads() and "--pass forward,backward" in env["command"]
    assert {"date", "commit", "variables", "load"} <= set(env)
    table = (tmp_path / "result.txt").read_text()
    assert "layer_norm backward bf16" in table and "geomean" in table and table.strip() in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(tmp_path, plant, capsys):
    seen = []

    def call(x, w, b):
        # Interrupted in the second case, while the rows of the first must be on disk already.
        if x.shape[0] == 7:
            seen.extend(rows_of(tmp_path / "result.csv"))
            raise KeyboardInterrupt
        return F.layer_norm(x, x.shape[-1:], w, b)

    plant("slow", call)
    status, rows, env = bench(
        tmp_path, "--op", "layer_norm", "--dtype", "fp32", "--shapes", "6x8,7x8", "--provider", "torch,slow"
    )
    assert status == run.INTERRUPTED and env["finished"] is False
    assert len(rows) == len(seen) == 2 * len(PASSES) and {r["m"] for r in rows} == {"6"}
    printed = capsys.readouterr().out
    assert "layer_norm forward fp32" in printed and "Interrupted: the 8 rows" in printed


def test_what_the_time_did_not_suffice_for_is_told(tmp_path, capsys):
    argv = ("--op", "rms_norm", "--dtype", "fp32", "--provider", "torch")
    status, rows, env = bench(tmp_path, *argv, "--shapes", "6x8,7x8", "--seconds", "1e-9")
    assert status == 0 and rows == [] and env["finished"] is False
    assert "with 2 cases" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["compiler", "fused:slow"])
def test_one_that_compiles_for_too_long_is_left_out_from_then_on_unless_ours(tmp_path, plant, name):
    seen = set()

    def call(x, w, b):
        if x.shape not in seen:  # once a shape, as a compiler would
            seen.add(x.shape)
            time.sleep(1.0)
        return F.rms_norm(x, x.shape[-1:], w, 1e-6)

    plant(name, call)
    argv = ("--op", "rms_norm", "--dtype", "fp32", "--provider", f"torch,{name}", "--shapes", "6x8,7x8,8x8")
    _, rows, env = bench(tmp_path, *argv, "--seconds", "2.4")
    rows = [r for r in rows if r["provider"] == name]
    if PROVIDERS[name].ours:
        assert {r["status"] for r in rows} == {"ok"} and {r["m"] for r in rows} >= {"6", "7"}
        return
    assert [(r["m"], r["status"]) for r in rows] == [("6", "ok")] * len(PASSES) + [("7", "skipped")]
    assert "its first calls took 1 of 2 s" in rows[-1]["reason"]
    assert env["finished"] is True


def test_shapes_from_m_and_n_and_the_tables():
    args = run.parse(["--m", "2,3", "--n", "8", "--device", "cpu"])
    assert args.shapes == [(2, 8), (3, 8)]
    assert run.parse(["--n", "8", "--device", "cpu"]).shapes == [(4096, 8)]
    assert run.parse(["--device", "cpu"]).shapes == list(cases.SHAPES["cpu"])
    assert run.parse(["--quick", "--device", "cpu"]).dtype == ["fp32"]
    assert run.parse(["--quick", "--dtype", "bf16", "--device", "cpu"]).dtype == ["bf16"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--provider nobody", "'nobody' is none of torch,"),
        ("--shapes 5", "'5' is not rows x columns"),
        ("--shapes 0x4", "a number below 1"),
        ("--m 2 --shapes 2x2", "not both"),
        ("--device x", "cpu or cuda"),
    ],
)
def test_bad_arguments_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv.split())
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_progress_goes_to_standard_error(capsys):
    progress = run.Progress(2)
    progress.step("layer_norm")
    progress.close()
    assert "[1/2 0 s] layer_norm" in capsys.readouterr().err


def test_every_default_provider_runs_or_says_why_not():
    for name in providers.DEFAULT_PROVIDERS:
        reason = PROVIDERS[name].unavailable(CPU)
        assert reason is None or reason.strip()
    assert "liger" in PROVIDERS["liger"].unavailable(CPU)
    assert "interpreter, which is not timed" in PROVIDERS["fused:triton"].unavailable(CPU)


def test_the_script_runs_uninstalled_and_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *TINY, "--op", "rms_norm", "--dtype", "fp32"]
    done = subprocess.run(
        [*command, "--provider", "torch,fused:reference", "--threads", "1", "--output", "out/a.csv"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "rms_norm forward fp32" in done.stdout
    assert json.loads((tmp_path / "out" / "a.json").read_text())["threads"] == 1
    assert len(rows_of(tmp_path / "out" / "a.csv")) == 2 * len(PASSES)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "gpu.csv"
    argv = ["--device", "cuda", "--shapes", "64x256", "--dtype", "bf16", "--seconds", "20"]
    assert main([*argv, "--provider", "torch,fused", "--output", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == len(OPS) * len(PASSES) * 2
    assert all(float(r["ms"]) > 0 and float(r["call_ms"]) > 0 for r in rows)
