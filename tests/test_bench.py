"""The benchmark harness, on tiny sizes on the CPU: what it counts, refuses to time, and leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_norm
from fused_norm.bench import gate, losses, main, memory, operation, providers, results, run, table, timing
from fused_norm.bench.cases import GROUPS, OPS
from fused_norm.bench.operation import PASSES, Provider

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--shapes", "6x8", "--device", "cpu"]
NORMS, LOSSES = (OPS["layer_norm"], OPS["rms_norm"]), (OPS["ticks_cross_entropy"], OPS["linear_ticks_cross_entropy"])
ADD_NORMS = [op for op in OPS.values() if op.group == "add-norms"]
#: A small case of each loss.
SHAPE = {
    "ticks_cross_entropy": (12, 33),
    "linear_ticks_cross_entropy": (12, 33, 7),
    "softcap_ticks_cross_entropy": (12, 33),
}


def lines_of(text: str, kind: str) -> list[dict]:
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def bench(tmp_path: Path, *argv: str) -> tuple[int, list[dict], dict]:
    """The exit status, the file's rows and its last environment, with whether it has come to its end."""
    out = tmp_path / "result.jsonl"
    status = main([*TINY, "--output", str(out), *argv])
    text = out.read_text()
    environment = lines_of(text, "environment")[-1]
    return status, lines_of(text, "row"), environment | {"finished": results.read(out).finished}


@pytest.fixture(autouse=True)
def one_thread_and_few_rounds(monkeypatch):
    """Threads that wait for each other on a busy machine take most of a tiny call's time."""
    monkeypatch.setattr(run, "PASS_S", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plant(monkeypatch):
    """Gives an operation, or each of both norms, a provider of the given call."""

    def put(name, call, ops=NORMS, **kwargs):
        for op in ops:
            monkeypatch.setitem(op.providers, name, Provider(name, lambda: call, **kwargs))

    return put


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_by_hand():
    # 3 rows of 5 in bf16: a tensor has 30 bytes, a parameter 10, a statistic of all rows 12 (fp32).
    layer, rms = (op.bytes_moved for op in NORMS)
    assert layer("forward", (3, 5), torch.bfloat16) == 2 * 30 + 2 * 10 + 2 * 12
    assert layer("forward-nograd", (3, 5), torch.bfloat16) == 2 * 30 + 2 * 10
    assert layer("backward", (3, 5), torch.bfloat16) == 3 * 30 + 3 * 10 + 2 * 12
    assert rms("forward", (3, 5), torch.float64) == 2 * 120 + 40 + 24
    assert rms("backward", (3, 5), torch.float32) == 3 * 60 + 2 * 20 + 12


def test_bytes_of_the_ticks_loss_by_hand():
    # 3 rows of 5 classes in bf16: logits have 30 bytes, targets 24 (int64), losses 12 and three statistics 36 (fp32).
    ticks, linear = (op.bytes_moved for op in LOSSES)
    assert ticks("forward", (3, 5), torch.bfloat16) == 30 + 24 + 12 + 36
    assert ticks("forward-nograd", (3, 5), torch.bfloat16) == 30 + 24 + 12
    assert ticks("backward", (3, 5), torch.bfloat16) == 2 * 30 + 24 + 36 + 4
    assert ticks("forward", (3, 5), torch.float64) == 120 + 24 + 24 + 72
    assert linear("forward+backward", (3, 5, 2), torch.float32) is None


@pytest.mark.parametrize(
    ("op", "units"),
    [
        *((op, (2, 2, 3, 5)) for op in NORMS),
        (LOSSES[0], (1, 1, 2, 3)),
        (OPS["add_layer_norm"], (4, 4, 4, 8)),
        (OPS["dropout_add_layer_norm"], (4, 4, 4, 8)),
        (OPS["dropout_add_rms_norm"], (4, 4, 5, 9)),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_bytes_are_whole_units_for_large_tensors(op, units):
    unit = 4096 * 16384 * 4
    for name, count in zip(("forward", "forward-nograd", "backward", "forward+backward"), units, strict=True):
        assert op.bytes_moved(name, (4096, 16384), torch.float32) / unit == pytest.approx(count, rel=1e-3)


def test_a_row_reports_these_bytes_over_its_median(tmp_path):
    _, rows, _ = bench(tmp_path, "--op", "layer_norm", "--provider", "torch", "--dtype", "bf16")
    assert [r["pass"] for r in rows] == list(PASSES)
    for r in rows:
        moved = OPS["layer_norm"].bytes_moved(r["pass"], (6, 8), torch.bfloat16)
        assert r["gb_s"] == pytest.approx(moved / r["ms"] / 1e6)
        assert r["vs_copy"] == pytest.approx(r["gb_s"] / r["copy_gb_s"])
        assert r["p20_ms"] <= r["ms"] <= r["p80_ms"]
        assert r["vs_torch"] == r["vs_torch_p20"] == r["vs_torch_p80"] == 1 and r["rounds"] >= timing.MIN_ROUNDS


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

    def peak(self, call, held):
        call()
        return memory.Peak(0, 0)

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


def test_ratios_are_taken_round_by_round():
    ours, theirs = timing.Samples([1.0, 2.0, 4.0]), timing.Samples([2.0, 8.0, 4.0])
    assert ours.ratios(theirs) == [2.0, 4.0, 1.0]


def test_the_ratio_and_its_spread_in_a_row(tmp_path, monkeypatch):
    """A machine that slows down twofold changes both times, and no ratio; the ratios' own spread shows."""

    class Slowing(FakeClock):
        def sample(self, call, host_s, into):
            round_ = len(into.ms)
            torch_s = [10.0, 20.0, 40.0, 80.0, 160.0][round_]
            into.ms.append(torch_s if id(into) == self.first else torch_s / [1.0, 2.0, 3.0, 4.0, 5.0][round_])

        def peak(self, call, held):
            return memory.Peak(2, 1)

    op = OPS["layer_norm"]
    inputs = op.make_inputs((4, 8), torch.float32, CPU)
    calls = {name: op.providers[name].make() for name in ("torch", "fused:reference")}
    verdicts = dict.fromkeys(calls, gate.Verdict("ok"))
    clock = Slowing()
    time_group = timing.time_group

    def noting_torch(contenders, clock, seconds):
        samples = [timing.Samples() for _ in contenders]
        clock.first = id(samples[1])  # after the copy
        made = iter(samples)
        monkeypatch.setattr(timing, "Samples", lambda: next(made))
        return time_group(contenders, clock, seconds)

    monkeypatch.setattr(timing, "time_group", noting_torch)
    case = run.Case(op, "fp32", (4, 8), "warm")
    _, ours = run.time_pass(case, "forward", inputs, calls, verdicts, clock, 0.0, dict.fromkeys(calls, 0.0))
    assert (ours.vs_torch_p20, ours.vs_torch, ours.vs_torch_p80) == pytest.approx((1.8, 3.0, 4.2))
    assert (ours.p20_ms, ours.ms) == pytest.approx((10.0, 40 / 3))


class LoggedClock(timing.CpuClock):
    """Writes down when it evicts."""

    def __init__(self, cache, log):
        super().__init__(cache)
        self.log = log

    def evict(self):
        self.log.append("evict")
        super().evict()


def test_cold_evicts_before_each_call_and_warm_calls_once_before(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    log = []
    clock = LoggedClock("cold", log)
    assert clock.filler.nbytes == 2 << 16
    clock.sample(lambda: log.append("call"), 1e-6, timing.Samples())
    clock.sample(lambda: log.append("call"), 1e-6, timing.Samples())
    assert log == ["evict", "call", "evict", "call"]
    log.clear()
    samples = timing.Samples()
    LoggedClock("warm", log).sample(lambda: log.append("call"), timing.CPU_SAMPLE_S / 10, samples)
    assert log == ["call"] * 11 and len(samples.ms) == 1


def test_neither_eviction_nor_the_call_before_is_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    costs = iter([7.0, 2.0])  # of the calls, as they come

    def call():
        now[0] += next(costs)

    warm = timing.Samples()
    timing.CpuClock("warm").sample(call, 2.0, warm)
    assert warm.ms == [2e3]
    cold, clock = timing.Samples(), timing.CpuClock("cold")
    monkeypatch.setattr(clock, "evict", lambda: now.__setitem__(0, now[0] + 50.0))
    costs = iter([3.0])
    clock.sample(call, 2.0, cold)
    assert cold.ms == [3e3]


def test_the_size_of_this_machines_caches():
    size = timing.last_level_cache_bytes()
    assert size is None or 1 << 18 <= size <= 1 << 36
    assert timing.CpuClock("cold").filler.nbytes == 2 * (size or timing.CPU_CACHE_BYTES)


def test_one_that_fails_in_the_midst_of_the_rounds_has_no_times():
    calls = []

    def fail_late():
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of memory")

    contenders = [timing.Contender("bad", lambda: fail_late), timing.Contender("good", lambda: lambda: None)]
    samples = timing.time_group(contenders, FakeClock(), 0.0)
    assert str(samples["bad"].error) == "out of memory" and len(samples["good"].ms) == timing.MIN_ROUNDS


def test_what_each_pass_times():
    inputs = OPS["layer_norm"].make_inputs((4, 8), torch.float32, CPU)
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


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
def test_a_loss_is_timed_with_the_upstream_gradient_of_loss_backward_and_judged_with_another(op):
    inputs = op.make_inputs(SHAPE[op.name], torch.float64, CPU)
    timed = run.prepare("forward+backward", op.baseline, inputs)()
    for leaf, grad in zip(inputs.leaf_tensors, timed, strict=True):
        (expected,) = torch.autograd.grad(op.baseline(*inputs.args), leaf)
        assert torch.equal(grad, expected) and inputs.upstream.item() == pytest.approx(0.7)
    found, _ = gate.answer(op.providers["torch"], op, op.baseline, inputs)
    torch.testing.assert_close(found["dx"], timed[0] * inputs.upstream)


# ------------------------------------------------------------------------------------------------------------- memory

KB = 1000  # elements of 4 bytes, so that sizes below are multiples of 4000 bytes


def test_the_peak_of_a_call_whose_memory_is_known():
    def call():
        a = torch.empty(5 * KB)
        b = torch.empty(3 * KB)
        del a
        c = torch.empty(4 * KB)  # 7 live, after a peak of 8
        del b, c
        return torch.empty(2 * KB)

    assert memory.cpu_peak(call, ()) == memory.Peak(8 * 4 * KB, 6 * 4 * KB)


def test_memory_inside_operators_counts_and_what_is_older_does_not():
    z, target = torch.randn(40, 25 * KB), torch.zeros(40, dtype=torch.int64)
    with torch.no_grad():
        peak = memory.cpu_peak(lambda: F.cross_entropy(z, target), (z,))
        assert peak.peak == pytest.approx(z.nbytes, rel=1e-3)  # log_softmax's result, which no Python code sees
        transposed = torch.randn(25 * KB, 40).t()
        peak = memory.cpu_peak(lambda: F.layer_norm(transposed, (25 * KB,)), (transposed,))
        assert peak.peak == pytest.approx(2 * z.nbytes, rel=1e-3)  # a contiguous copy, and the result
        assert peak.extra == pytest.approx(z.nbytes, rel=1e-3)
        old = [torch.empty(9 * KB)]
        assert memory.cpu_peak(lambda: (old.clear(), torch.empty(KB))[1], ()) == memory.Peak(4 * KB, 0)


def test_what_is_returned_counts_once_and_only_if_it_is_new():
    a = torch.empty(KB)
    assert memory.returned_bytes((a, [a[:3], a.view(10, 100)], None), ()) == 4 * KB
    assert memory.returned_bytes((a[5:], torch.empty(KB)), (a,)) == 4 * KB
    assert memory.cpu_peak(lambda: a.zero_(), (a,)) == memory.Peak(0, 0)


def test_memory_of_the_eager_formula(tmp_path):
    """log_softmax's result, and in its backward the gradient that reaches it and the one that leaves it: three times
    the logits, one of which is returned."""
    status, rows, _ = bench(
        tmp_path, "--op", "ticks_cross_entropy", "--shapes", "30x4000", "--provider", "torch", "--dtype", "fp32"
    )
    assert status == 0
    (r,) = (r for r in rows if r["pass"] == "forward+backward")
    logits = 30 * 4000 * 4
    assert r["peak_bytes"] == pytest.approx(3 * logits, rel=0.01)
    assert r["peak_bytes"] - r["extra_bytes"] == logits
    assert r["peak_vs_torch"] == r["extra_vs_torch"] == 1
    (r,) = (r for r in rows if r["pass"] == "forward-nograd")
    assert r["peak_bytes"] == pytest.approx(logits, rel=0.01)


# --------------------------------------------------------------------------------------------------------------- gate


def judge(call, op="layer_norm", dtype=torch.float32, m=40, n=24):
    return judge_among(OPS[op], OPS[op].make_inputs((m, n), dtype, CPU), Provider("planted", lambda: call))


def judge_among(op, inputs, planted):
    verdicts, calls = gate.judge(op, inputs, [op.providers["torch"], planted])
    assert verdicts["torch"].status == "ok"
    verdict = verdicts[planted.name]
    assert (planted.name in calls) == (verdict.status == "ok")
    return verdict


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


@pytest.mark.parametrize("op", ADD_NORMS, ids=lambda op: op.name)
@pytest.mark.parametrize("which", ["", "y", "summed", "dx", "dr", "mask"])
def test_the_gate_of_the_add_norms(op, which):
    """Each output and gradient is judged, with the mask that this very call draws."""
    calls = []

    def call(x, r, w, b):
        calls.append(1)
        if which == "mask" and op.name.startswith("dropout") and len(calls) == 2:
            x = torch.cat([x[:1] * 0, x[1:]])  # another mask without grad than with
        if which == "dx":
            x = Scaled.apply(x)
        if which == "dr":
            r = Scaled.apply(r)
        y, summed = op.fused(x, r, w, b)
        return y * (1.1 if which == "y" else 1.0), summed * (1.1 if which == "summed" else 1.0)

    verdict = judge_among(op, op.make_inputs((40, 24), torch.float32, CPU), Provider("planted", lambda: call))
    if not which or (which == "mask" and not op.name.startswith("dropout")):
        assert verdict.status == "ok", verdict.reason
        assert {"y", "summed", "dx", "dr", "dw", "y without grad", "summed without grad"} <= verdict.errors.keys()
    else:
        assert verdict.status == "wrong"
        assert which == "mask" or any(part.startswith(which) for part in verdict.reason.split("; ")), verdict.reason


def test_the_gate_sees_a_block_of_rows_in_the_middle(monkeypatch):
    monkeypatch.setitem(operation.BLOCK_ELEMENTS, "cpu", 7 * 24)  # blocks of 7 rows, the last one shorter

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


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
@pytest.mark.parametrize("rows", [5, 1000])
def test_the_truth_of_a_loss_is_the_formulas(monkeypatch, op, rows):
    shape = SHAPE[op.name]
    monkeypatch.setitem(operation.BLOCK_ELEMENTS, "cpu", rows * shape[1])  # blocks of 5, 5 and 2 rows, or one
    inputs = op.make_inputs(shape, torch.float32, CPU)
    exact = {k: t.detach().double().requires_grad_() if k in inputs.leaves else t for k, t in inputs.tensors.items()}
    lp = F.log_softmax(F.linear(*list(exact.values())[:2]) if "w" in exact else exact["x"], -1)
    lp = lp[torch.arange(shape[0]), exact["target"]]
    assert lp.exp().min() < 0.1 and lp.exp().max() > 0.6  # what is to be told apart differs near p = 1 alone
    for function, weight in (("", losses.TICKS_WEIGHT), (losses.CE, 0.0)):
        y = (-lp + weight * (lp.exp() - lp)).mean()
        grads = torch.autograd.grad(y, [exact[k] for k in inputs.leaves], inputs.upstream.double(), retain_graph=True)
        truth = op.truths[function](inputs)
        assert list(truth) == ["y", *(f"d{k}" for k in inputs.leaves)]
        for found, expected in zip(truth.values(), (y.detach(), *grads), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)


def test_the_truth_of_capped_logits_is_the_formulas():
    op = OPS["softcap_ticks_cross_entropy"]
    inputs = op.make_inputs(SHAPE[op.name], torch.float32, CPU)
    z = (10 * inputs.x.detach().double()).requires_grad_()  # where the cap bends them
    lp = F.log_softmax(30 * torch.tanh(z / 30), -1)[torch.arange(12), inputs.tensors["target"]]
    y = (-lp + 1e-3 * (lp.exp() - lp)).mean()
    truth = op.truths[""](dataclasses.replace(inputs, tensors={**inputs.tensors, "x": z}))
    torch.testing.assert_close(truth["y"], y.detach(), rtol=1e-11, atol=1e-15)
    (dx,) = torch.autograd.grad(y, z, inputs.upstream.double())
    torch.testing.assert_close(truth["dx"], dx, rtol=1e-11, atol=1e-15)
    for provider in ("torch", "fused:reference"):
        assert judge_among(op, inputs, op.providers[provider]).status == "ok"
    uncapped = Provider("planted", lambda: OPS["ticks_cross_entropy"].baseline)
    assert judge_among(op, inputs, uncapped).status == "wrong"


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is off by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
def test_the_gate_names_the_gradient_of_a_loss_that_is_wrong(op):
    inputs = op.make_inputs(SHAPE[op.name], torch.float32, CPU)
    for at, leaf in enumerate(inputs.leaves):

        def call(*args, at=at):
            return op.baseline(*(Scaled.apply(t) if i == at else t for i, t in enumerate(args)))

        verdict = judge_among(op, inputs, Provider("planted", lambda call=call: call))
        assert verdict.status == "wrong" and verdict.reason.startswith(f"d{leaf}: ") and ";" not in verdict.reason
    verdict = judge_among(op, inputs, Provider("planted", lambda: lambda *args: op.baseline(*args) * 1.001))
    assert [part.split(":")[0] for part in verdict.reason.split("; ")] == [
        "y",
        "y without grad",
        *map("d{}".format, inputs.leaves),
    ]


@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
def test_cross_entropy_alone_is_judged_by_its_own_truth(op):
    inputs = op.make_inputs(SHAPE[op.name], torch.float32, CPU)
    ce = op.providers["ce:torch"]
    assert ce.function == losses.CE and judge_among(op, inputs, ce).status == "ok"
    assert judge_among(op, inputs, Provider("planted", ce.make)).reason.startswith("y: ")
    ticks = Provider("planted", op.providers["torch"].make, function=losses.CE)
    assert judge_among(op, inputs, ticks).reason.startswith("y: ")
    assert all(p.function == losses.CE for name, p in op.providers.items() if name.startswith("ce:"))
    assert all(p.function == "" for name, p in op.providers.items() if not name.startswith("ce:"))


class Inplace(torch.autograd.Function):
    """Cross entropy and ticks whose forward writes the gradient over the logits, as peers do."""

    @staticmethod
    def forward(ctx, x, target):
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            y = losses.ticks_formula(leaf, target)
        x.detach().copy_(*torch.autograd.grad(y, leaf))
        ctx.save_for_backward(x)
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0].mul_(dy), None


def test_one_that_is_known_to_write_over_its_input_gets_a_copy(tmp_path, plant):
    op = OPS["ticks_cross_entropy"]
    inputs = op.make_inputs(SHAPE[op.name], torch.float32, CPU)
    before = inputs.x.detach().clone()
    assert judge_among(op, inputs, Provider("planted", lambda: Inplace.apply)).reason == "wrote over its input x"
    told = Provider("planted", lambda: Inplace.apply, overwrites=("x",))
    assert judge_among(op, inputs, told).status == "ok" and torch.equal(inputs.x.detach(), before)
    calls, untimed = {"planted": Inplace.apply}, {"planted": 0.0}
    plant("planted", Inplace.apply, (op,), overwrites=("x",))
    case, clock = run.Case(op, "fp32", SHAPE[op.name], "warm"), FakeClock()
    run.time_pass(case, "forward+backward", inputs, calls, {"planted": gate.Verdict("ok")}, clock, 0.0, untimed)
    assert len(clock.log) == 2 * timing.MIN_ROUNDS and torch.equal(inputs.x.detach(), before)
    plant("inplace", Inplace.apply, (op,), overwrites=("x",))
    _, rows, _ = bench(
        tmp_path, "--op", op.name, "--dtype", "fp32", "--shapes", "30x4000", "--provider", "torch,inplace"
    )
    assert all(r["status"] == "ok" for r in rows if r["provider"] == "torch")
    found = {r["pass"]: r for r in rows if r["provider"] == "inplace"}
    assert found["backward"]["status"] == "skipped" and "writes over its input" in found["backward"]["reason"]
    fb = found["forward+backward"]  # the gradient is the input's memory: nothing that is returned is new
    assert fb["status"] == "ok" and fb["peak_bytes"] == fb["extra_bytes"]


def test_a_check_judges_everyone_and_times_nothing(tmp_path, plant, capsys, monkeypatch):
    monkeypatch.setattr(timing, "time_group", None)
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--check", "--op", "norms", "--dtype", "fp32", "--provider"]
    assert main([*argv, "torch,fused:reference"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{op.name} fp32 6x8: all are right" for op in NORMS]
    plant("planted", lambda *args: OPS["layer_norm"].baseline(*args) * 1.1, ops=[OPS["layer_norm"]])
    assert main([*argv, "torch,planted"]) == 0
    assert "layer_norm fp32 6x8: planted wrong: y: error" in capsys.readouterr().out
    plant("fused:planted", lambda *args: OPS["layer_norm"].baseline(*args) * 1.1, ops=[OPS["layer_norm"]])
    assert main([*argv, "torch,fused:planted"]) == 1
    assert not list(tmp_path.iterdir())


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
    assert [(r["status"], r["pass"], r["ms"]) for r in wrong] == [("wrong", "all", None)]
    assert wrong[0]["err_y"] > 1e-3
    printed = capsys.readouterr()
    assert "fused:wrong: wrong in layer_norm all fp32 6x8: y: error" in printed.out
    assert re.search(r"^ +fused:wrong +wrong: y: error", printed.err, re.MULTILINE)
    # In the table it stands beside the others, without numbers.
    assert len(re.findall(r"^ +torch +\d.*\n +fused:wrong +wrong$", printed.out, re.MULTILINE)) == len(PASSES)


def test_another_ones_failure_is_told_but_does_not_fail_the_run(tmp_path, plant):
    plant("other", lambda x, w, b: x * w)
    status, rows, _ = bench(tmp_path, "--op", "rms_norm", "--dtype", "fp32", "--provider", "torch,other")
    assert status == 0 and [r["status"] for r in rows if r["provider"] == "other"] == ["wrong"]


def test_a_skipped_provider_says_why(tmp_path, plant, capsys):
    plant("absent", None, unavailable=lambda device: f"not on {device}")
    status, rows, env = bench(tmp_path, "--op", "norms", "--dtype", "fp32", "--provider", "absent,torch")
    assert status == 0
    assert env["providers"] == {op: {"absent": "not on cpu", "torch": None} for op in ("layer_norm", "rms_norm")}
    skipped = [(r["op"], r["reason"]) for r in rows if r["status"] == "skipped"]
    assert skipped == [("layer_norm", "not on cpu"), ("rms_norm", "not on cpu")]
    printed = capsys.readouterr().out
    assert printed.count("skipped: absent: not on cpu") == 1 and "absent: skipped (and 1 more): not on cpu" in printed


def test_lines_and_environment(tmp_path):
    status, rows, env = bench(tmp_path, "--provider", "torch,fused:reference", "--pass", "forward,backward")
    assert status == 0 and env["finished"] is True
    keys = [(r["op"], r["pass"], r["dtype"], r["provider"]) for r in rows]
    ops, passes, dtypes, names = (
        GROUPS["norms"],
        ("forward", "backward"),
        ("fp32", "bf16"),
        ("torch", "fused:reference"),
    )
    assert keys == [(o, p, d, n) for o in ops for d in dtypes for p in passes for n in names]
    assert {(r["status"], r["cache"], r["m"], r["n"], r["h"]) for r in rows} == {("ok", "warm", 6, 8, None)}
    assert all(r["ms"] > 0 for r in rows)
    assert env["device"]["type"] == "cpu" and env["device"]["name"] and env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert env["command"].startswith("python -m fused_norm bench") and "--pass forward,backward" in env["command"]
    assert {"date", "commit", "uncommitted_changes", "variables", "load", "providers"} <= set(env)
    lines = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["environment", *["row"] * len(rows), "end"]
    assert lines[-1]["seconds"] > 0
    assert [r.to_json() for r in results.read(tmp_path / "result.jsonl").rows] == rows


@pytest.fixture
def slow(plant):
    """A provider that is called once for the cases of each number of rows, which it lists, and may be interrupted."""
    seen = []

    def call(x, w, b):
        if seen[-1:] != [x.shape[0]]:
            seen.append(x.shape[0])
        if x.shape[0] == slow.interrupted_at:
            raise KeyboardInterrupt
        return F.layer_norm(x, x.shape[-1:], w, b)

    slow = types.SimpleNamespace(seen=seen, interrupted_at=None)
    plant("slow", call)
    return slow


TWO = ("--op", "layer_norm", "--dtype", "fp32", "--shapes", "6x8,7x8", "--provider", "torch,slow")


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path, slow, capsys):
    slow.interrupted_at = 7
    status, rows, env = bench(tmp_path, *TWO)
    assert status == run.INTERRUPTED and env["finished"] is False
    assert len(rows) == 2 * len(PASSES) and {r["m"] for r in rows} == {6}
    printed = capsys.readouterr().out
    assert "layer_norm forward fp32" in printed and "Interrupted: the 8 rows" in printed
    assert f"4 passes are left: the same command with --output {tmp_path / 'result.jsonl'} goes on" in printed
    slow.interrupted_at = None
    slow.seen.clear()
    before = (tmp_path / "result.jsonl").read_text()
    status, after, env = bench(tmp_path, *TWO)
    assert status == 0 and env["finished"] is True and slow.seen == [7]
    assert after[:8] == rows and {r["m"] for r in after[8:]} == {7} and len(after) == 4 * len(PASSES)
    text = (tmp_path / "result.jsonl").read_text()
    assert text.startswith(before) and len(lines_of(text, "environment")) == 2
    assert "geomean" in (tmp_path / "result.txt").read_text()
    # All is there: nothing runs, and the file stays as it is.
    slow.seen.clear()
    status, _, _ = bench(tmp_path, *TWO)
    assert status == 0 and not slow.seen and (tmp_path / "result.jsonl").read_text() == text


def test_a_file_cut_short_in_the_midst_of_a_line_goes_on(tmp_path, slow):
    """What a kill leaves: the line is measured anew, with torch beside it, which keeps the row that it has."""
    _, rows, _ = bench(tmp_path, *TWO)
    out = tmp_path / "result.jsonl"
    lines = out.read_bytes().split(b"\n")
    assert b'"slow"' in lines[6]  # the environment, then the third pass's second row
    out.write_bytes(b"\n".join(lines[:6]) + b"\n" + lines[6][:50])
    run_ = results.read(out)
    assert len(run_.rows) == 5 and run_.finished is False
    slow.seen.clear()
    status, after, env = bench(tmp_path, *TWO)
    assert status == 0 and env["finished"] is True and slow.seen == [6, 7]
    key = ("pass", "m", "provider")
    assert [[r[k] for k in key] for r in after] == [[r[k] for k in key] for r in rows]
    assert after[:5] == rows[:5] and after[5]["ms"] != rows[5]["ms"] and after[5]["vs_torch"] > 0
    assert all(json.loads(line) for line in out.read_text().splitlines())


def test_a_provider_more_joins_a_file_and_the_baseline_runs_beside_it(tmp_path, slow):
    _, rows, _ = bench(tmp_path, *TWO[:-1], "torch")
    _, after, env = bench(tmp_path, *TWO)
    assert env["finished"] and after[: len(rows)] == rows
    assert {r["provider"] for r in after[len(rows) :]} == {"slow"} and len(after) == 2 * len(rows)
    assert all(r["vs_torch"] > 0 and r["rounds"] >= timing.MIN_ROUNDS for r in after[len(rows) :])


def test_cache_modes_stand_in_one_file_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 4096)
    argv = ("--op", "rms_norm", "--dtype", "fp32", "--provider", "torch", "--pass", "forward")
    bench(tmp_path, *argv)
    _, rows, _ = bench(tmp_path, *argv, "--cache", "cold")
    assert [r["cache"] for r in rows] == ["warm", "cold"]
    text = (tmp_path / "result.txt").read_text()
    assert "rms_norm forward fp32, warm caches" in text and "rms_norm forward fp32, cold caches" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 64}, "threads: 64 there, 1 here"),
        ({"commit": "abc"}, "commit: abc there, "),
        ({"device": {"type": "cpu", "name": "Other CPU", "isa": "AVX9"}}, "device.name: Other CPU there, "),
        ({"versions": {"torch": "1.0"}}, f"versions.torch: 1.0 there, {torch.__version__} here"),
        ({"variables": {"OMP_FAST": "1"}}, "variables.OMP_FAST: 1 there, None here"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_rows_of_other_conditions_are_not_mixed(tmp_path, capsys, monkeypatch, change, said):
    collect = run.environment.collect
    argv = ("--op", "rms_norm", "--dtype", "fp32", "--provider", "torch", "--pass", "forward")
    monkeypatch.setattr(run.environment, "collect", lambda *a: collect(*a) | change)
    bench(tmp_path, *argv)
    monkeypatch.setattr(run.environment, "collect", collect)
    before = (tmp_path / "result.jsonl").read_text()
    capsys.readouterr()
    status, _, _ = bench(tmp_path, *argv, "--shapes", "9x9")
    assert status == 2 and (tmp_path / "result.jsonl").read_text() == before
    printed = capsys.readouterr()
    assert said in printed.err and "Give another --output, or delete that file" in printed.err and not printed.out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("op,ms\nlayer_norm,1\n", "line 1, is no line of benchmark results"),
        ('{"kind": "environment"}\n{"kind": "other"}\n', "line 2, is no line of benchmark results"),
        ('{"kind": "row", "op": "layer_norm"}\n', "line 1, is no line"),
        ("precious", "line 1, is no line"),
    ],
)
def test_what_is_no_results_file_is_left_alone(tmp_path, capsys, content, said):
    out = tmp_path / "result.jsonl"
    out.write_text(content)
    assert main([*TINY, "--output", str(out)]) == 2
    assert out.read_text() == content and said in capsys.readouterr().err


def test_json_prints_the_files_lines_and_nothing_else(tmp_path, slow, capsys):
    for interrupted_at in (7, None, None):
        slow.interrupted_at = interrupted_at
        bench(tmp_path, *TWO, "--json")
        printed = capsys.readouterr()
        assert printed.out == (tmp_path / "result.jsonl").read_text()
        assert "rows go to" in printed.err
        assert ("goes on" in printed.err) == (interrupted_at is not None)
    assert len(lines_of(printed.out, "row")) == 4 * len(PASSES)


def test_json_has_no_infinity(tmp_path, plant):
    plant("other", lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-6) * float("nan"))
    _, rows, _ = bench(tmp_path, "--op", "rms_norm", "--dtype", "fp32", "--provider", "torch,other")
    assert "NaN" not in (tmp_path / "result.jsonl").read_text()
    (r,) = (r for r in rows if r["provider"] == "other")
    assert (r["status"], r["err_y"]) == ("wrong", None) and "y: error inf" in r["reason"]


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    """Rows stay, the table is printed, the status is 130, and the same command goes on."""
    out = tmp_path / "a.jsonl"
    shapes = ",".join(f"{64 + i}x64" for i in range(12))
    argv = ["--op", "layer_norm", "--dtype", "fp32", "--shapes", shapes, "--provider", "torch"]
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *argv, "--device", "cpu", "--threads", "1"]
    command += ["--output", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and lines_of_whole(out, "row")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == run.INTERRUPTED, stderr
    rows = len(results.read(out).rows)
    assert 1 <= rows < 48 and f"Interrupted: the {rows} rows made so far are in {out}." in stdout
    assert "layer_norm forward fp32, warm caches" in stdout and "Traceback" not in stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"{rows} rows are there already, {48 - rows} passes are left" in done.stdout
    found = results.read(out)
    assert found.finished and len(found.rows) == 48 and len(found.environments) == 2


def test_ctrl_c_waits_for_the_profiler():
    done = []

    def call() -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        done.append("call")
        return torch.ones(4)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        memory.cpu_peak(call, ())
    assert done == ["call"] and signal.getsignal(signal.SIGINT) is before
    assert memory.cpu_peak(lambda: torch.ones(4), ()).peak == 16  # the profiler was stopped, and starts again


def lines_of_whole(path: Path, kind: str) -> list[dict]:
    return lines_of(path.read_text().rpartition("\n")[0], kind)


def test_what_the_time_did_not_suffice_for_is_told(tmp_path, capsys):
    argv = ("--op", "rms_norm", "--dtype", "fp32", "--provider", "torch")
    status, rows, env = bench(tmp_path, *argv, "--shapes", "6x8,7x8", "--seconds", "1e-9")
    assert status == 0 and rows == [] and env["finished"] is False
    assert "The 0 s were spent. 8 passes are left: the same command with --output" in capsys.readouterr().out


def test_the_time_is_shared_by_what_cases_of_an_operation_needed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    budget = run.Budget(100.0, [("small", 2), ("large", 1), ("small", 2), ("large", 1)])
    assert budget.next_group() == pytest.approx(100 / 6)  # nothing is known yet
    clock[0] = 10.0
    assert budget.next_group() == pytest.approx(90 / 5)
    clock[0] = 20.0
    budget.next_case(overhead=2.0)
    assert budget.next_group() == pytest.approx((80 - 2 - 2) / 4)  # two cases, for each of which any case's is taken
    clock[0] = 60.0
    budget.next_case(overhead=20.0)
    assert budget.next_group() == pytest.approx((40 - 20) / 3)  # small is under way, large is to come
    clock[0] = 70.0
    assert budget.next_group() == pytest.approx((30 - 20) / 2)
    budget.next_case(None)
    clock[0] = 120.0
    assert budget.next_group() == 0 and budget.spent()
    unlimited = run.Budget(None, [("small", 2)])
    assert unlimited.next_group() == run.PASS_S and not unlimited.spent() and not unlimited.too_much(1e9)


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
    if OPS["rms_norm"].providers[name].ours:
        assert {r["status"] for r in rows} == {"ok"} and {r["m"] for r in rows} >= {6, 7}
        return
    assert [(r["m"], r["status"]) for r in rows] == [(6, "ok")] * len(PASSES) + [(None, "skipped")]
    assert "left out from rms_norm fp32 7x8 on: its first calls took 1 of 2 s" in rows[-1]["reason"]
    assert env["finished"] is False  # it may have its turn in a run that goes on


def cases_of(*argv: str) -> list[tuple[str, str, tuple[int, ...]]]:
    cases = run.grid(run.parse([*argv, "--device", "cpu"]))
    return [(case.op.name, case.dtype, case.shape) for case in cases]


def test_shapes_from_m_and_n_and_the_tables():
    def shapes(*argv):
        return [shape for _, _, shape in cases_of("--op", "rms_norm", "--dtype", "fp32", *argv)]

    assert shapes("--m", "2,3", "--n", "8") == [(2, 8), (3, 8)]
    assert shapes("--n", "8") == [(4096, 8)]
    assert shapes() == list(OPS["rms_norm"].shapes["cpu"])
    op = OPS["rms_norm"]
    assert shapes("--shapes", "quick") == list(op.quick_shapes["cpu"])
    assert shapes("--shapes", "models,6x8,6x8") == [*op.sweeps["models"]["cpu"], (6, 8)]
    sweeps = [shape for sweep in op.sweeps.values() for shape in sweep["cpu"]]
    everything = {*op.shapes["cpu"], *op.quick_shapes["cpu"], *sweeps}
    assert set(shapes("--shapes", "all")) == everything
    assert len(shapes("--shapes", "all")) == len(everything)


def test_cases_go_shape_by_shape_and_each_operation_takes_those_it_has():
    assert {name for name, _, _ in cases_of()} == set(GROUPS["norms"])
    norms_then = cases_of("--op", "norms", "--shapes", "6x8,7x8")
    assert norms_then == [(op, d, s) for s in ((6, 8), (7, 8)) for op in GROUPS["norms"] for d in ("fp32", "bf16")]
    ticks, linear = GROUPS["ticks"]
    assert cases_of("--op", "ticks", "--shapes", "6x8,5x6x7", "--dtype", "bf16") == [
        (ticks, "bf16", (6, 8)),
        (linear, "bf16", (5, 6, 7)),
    ]
    assert cases_of("--op", linear, "--m", "3", "--h", "4,5", "--n", "6") == [
        (linear, "fp32", (3, 6, 4)),
        (linear, "fp32", (3, 6, 5)),
    ]
    by_default = cases_of("--op", "ticks")
    assert by_default[:3] == [
        (ticks, "fp32", (1024, 30522)),
        (ticks, "bf16", (1024, 30522)),
        (linear, "fp32", (512, 32000, 512)),
    ]


def test_one_that_is_the_same_as_another_in_some_dtypes_runs_in_the_rest_alone(tmp_path):
    argv = (
        "--op",
        "ticks",
        "--shapes",
        "12x33,12x33x7",
        "--provider",
        "torch,torch:float",
        "--pass",
        "forward+backward",
    )
    status, rows, _ = bench(tmp_path, *argv, "--dtype", "fp32,bf16")
    assert status == 0 and {r["status"] for r in rows} == {"ok"}
    runs = {(r["op"], r["dtype"]): r["peak_bytes"] for r in rows if r["provider"] == "torch:float"}
    assert set(runs) == {(op.name, "bf16") for op in LOSSES}
    in_bf16 = next(r for r in rows if (r["op"], r["dtype"], r["provider"]) == (LOSSES[0].name, "bf16", "torch"))
    assert runs[LOSSES[0].name, "bf16"] > 1.3 * in_bf16["peak_bytes"]  # there are copies in fp32


def test_both_losses_run(tmp_path, capsys):
    argv = (
        "--op",
        "ticks",
        "--dtype",
        "fp32",
        "--shapes",
        "12x33,12x33x7",
        "--provider",
        "torch,ce:torch,fused:reference",
    )
    status, rows, env = bench(tmp_path, *argv)
    assert status == 0 and env["finished"], rows
    found = {(r["op"], r["pass"], r["provider"]): r for r in rows}
    for op in LOSSES:
        for name in op.passes:
            for provider in ("torch", "ce:torch", "fused:reference"):
                r = found.pop((op.name, name, provider))
                assert r["status"] == "ok" and r["ms"] > 0 and r["peak_bytes"] > 0, r
                assert r["err_y"] < 1e-5 and r["err_dx"] < 1e-5
                assert (r["m"], r["n"]) == (12, 33)
                linear = op.name == "linear_ticks_cross_entropy"
                assert (r["h"], bool(r["err_dw"]), bool(r["gb_s"]), bool(r["vs_copy"])) == (
                    (7, True, False, False) if linear else (None, False, True, True)
                )
    assert not found
    printed = capsys.readouterr().out
    assert "ce:* compute cross entropy alone" in " ".join(printed.split())
    assert "\n12x33x7 " in printed


def test_the_tables_look():
    op = OPS["layer_norm"]

    def made(shape, provider, ms, ratio, **values):
        case = run.Case(op, "bf16", shape, "warm")
        r = case.row("forward", provider)
        r.ms, r.p20_ms, r.p80_ms, r.gb_s, r.copy_gb_s, r.vs_copy = ms, 0.9 * ms, 1.2 * ms, 10 / ms, 20.0, 0.5 / ms
        r.vs_torch, r.vs_torch_p20, r.vs_torch_p80 = ratio, 0.95 * ratio, 1.1 * ratio
        r.peak_bytes, r.extra_bytes, r.peak_vs_torch = 8_392_704, 4096, 1.0
        return dataclasses.replace(r, **values)

    wrong = run.Case(op, "bf16", (64, 65536), "warm").row("all", "liger", "wrong", "dx: error 0.3 > 0.02")
    rows = [
        made((4096, 1024), "torch", 2.0, 1.0),
        made((4096, 1024), "fused:native", 0.5, 4.0),
        made((64, 65536), "torch", 12345.6, 1.0),
        made((64, 65536), "fused:native", 0.012345, 0.987),
        wrong,
        run.row_of_operation("layer_norm", "quack", "warm", "quack-kernels is not installed"),
    ]
    text = table.table(rows)
    assert (
        text.split("\n", 4)[4]
        == """\
layer_norm forward bf16, warm caches
shape           provider                 ms       p20-p80   GB/s  roof  vs torch     p20-p80  peak MB        extra MB
4096x1024       x.clone()                                   20.0  100%
                torch                 2.000   1.800-2.400   5.00   25%     1.00x  0.950-1.10    8.393 (1.00)   0.0041
                fused:native         0.5000 0.4500-0.6000   20.0  100%     4.00x   3.80-4.40    8.393 (1.00)   0.0041
64x65536        x.clone()                                   20.0  100%
                torch                 12346   11111-14815  0.001    0%     1.00x  0.950-1.10    8.393 (1.00)   0.0041
                fused:native         0.0123 0.0111-0.0148    810 4050%    0.987x  0.938-1.09    8.393 (1.00)   0.0041
                liger                 wrong
geomean         torch                                               0%     1.00x  least 1.00          (1.00)
                fused:native                                      636%     1.99x least 0.987          (1.00)

Not timed:
  liger: wrong in layer_norm all bf16 64x65536: dx: error 0.3 > 0.02
  quack: skipped: quack-kernels is not installed"""
    )
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--provider nobody", "'nobody' is none of torch,"),
        ("--op nothing", "'nothing' is none of norms, add-norms, ticks, softcap, layer_norm,"),
        ("--op linear_ticks_cross_entropy --shapes 4x5", "none of m x n x h for linear_ticks_cross_entropy"),
        ("--op linear_ticks_cross_entropy --pass backward", "has none of backward, but forward+backward,"),
        ("--op norms --provider ce:torch", "layer_norm has none of ce:torch, but torch,"),
        ("--h 4 --shapes 2x2", "not both"),
        ("--shapes 5", "'5' is not rows x columns"),
        ("--shapes large", "'large' is neither a shape, as in 4096x1024, nor of default, quick, models,"),
        ("--cache hot", "invalid choice: 'hot'"),
        ("--threads 0", "--threads 0: at least 1"),
        ("--output a.csv", "a.csv: results are JSON lines"),
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


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_default_provider_runs_or_says_why_not(op):
    for name in providers.default_providers(op):
        reason = op.providers[name].unavailable(CPU)
        assert reason is None or reason.strip()
    liger = [p for name, p in op.providers.items() if name in ("liger", "ce:liger")]
    assert all("liger" in p.unavailable(CPU) for p in liger)
    assert len(liger) == (op.group in ("norms", "ticks") or op.name == "add_rms_norm")  # of the others it has none
    assert "interpreter, which is not timed" in op.providers["fused:triton"].unavailable(CPU)


def test_torchs_own_linear_cross_entropy_is_a_provider(tmp_path):
    op = OPS["linear_ticks_cross_entropy"]
    inputs = op.make_inputs(SHAPE[op.name], torch.float32, CPU)
    for name in ("ce:torch-linear", "ce:torch-chunked"):
        reason = op.providers[name].unavailable(CPU)
        if reason is not None:
            assert "2.13 has" in reason and not hasattr(F, "linear_cross_entropy")
            continue
        verdict = judge_among(op, inputs, op.providers[name])
        assert verdict.status == "ok", verdict.reason


def test_the_script_runs_uninstalled_and_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *TINY, "--op", "rms_norm", "--dtype", "fp32"]
    done = subprocess.run(
        [*command, "--provider", "torch,fused:reference", "--threads", "1", "--output", "out/a.jsonl"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "rms_norm forward fp32" in done.stdout
    found = results.read(tmp_path / "out" / "a.jsonl")
    assert found.environments[0]["threads"] == 1 and found.environments[0]["command"].startswith("python ")
    assert len(found.rows) == 2 * len(PASSES)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    argv = ["--device", "cuda", "--op", "norms,ticks", "--shapes", "64x256,64x512x32", "--dtype", "bf16"]
    argv += ["--provider", "torch,fused", "--seconds", "20", "--output", str(out)]
    assert main(argv) == 0 and main([*argv, "--cache", "warm"]) == 0
    rows = results.read(out).rows
    ops = (op for op in OPS.values() if op.group in ("norms", "ticks"))
    assert len(rows) == 2 * sum(len(op.passes) for op in ops) * 2
    assert all(r.ms > 0 and r.call_ms > 0 for r in rows) and {r.cache for r in rows} == {"cold", "warm"}


@pytest.mark.gpu
def test_memory_on_a_gpu():
    device = torch.device("cuda")

    def call():
        a, b = torch.empty(5 << 20, device=device), torch.empty(3 << 20, device=device)
        del a
        return b

    assert memory.cuda_peak(call, (), device) == memory.Peak(8 << 22, 5 << 22)


@pytest.mark.parametrize(
    "command, said",
    [
        ("small_call.py --rounds 2", r"FF\.layer_norm +\d+\.\d\d +\d+\.\d\dx torch's"),
        ("derivatives.py --repeats 1", r"per-sample gradients.* \d+\.\d\d$"),
    ],
)
def test_the_other_scripts_run(command: str, said: str) -> None:
    """They call parts of the package by name, which may move."""
    if fused_norm.available_backends()["native"] is not None:
        pytest.skip("the native backend is missing here")
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout, re.MULTILINE), done.stdout
