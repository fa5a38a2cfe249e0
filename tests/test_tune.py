"""bench/tune.py: what it tries, how it makes the kernels take it, what it leaves behind and what it proposes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_norm
from fused_norm.bench import results, run, timing
from fused_norm.bench.cases import OPS
from fused_norm.bench.operation import Provider
from fused_norm.bench.results import Row

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "tune.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("bench_tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_tune"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("option", ["--seconds=-3", "--seconds=nan", "--n=0", "--rows=-1", "--dtype=fp32,foo"])
def test_options_that_make_no_sense_are_named(tune, option, capsys):
    with pytest.raises(SystemExit):
        tune.parse([option])
    name, value = option.split("=")
    assert name in (err := capsys.readouterr().err) and value.removeprefix("fp32,") in err


# ----------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("at", ["forward", "backward"])
def test_candidates_are_around_the_present_launch_and_can_be_launched(tune, at, size):
    from fused_norm.backends.triton import launch

    choose = getattr(launch, f"{at}_launch")
    for n in (64, *tune.COLUMNS):
        now, found = choose(n, size), tune.candidates(at, n, size)
        assert found[0] == tune.Candidate() and found[0].name == "triton"
        assert len({c.name for c in found}) == len(found) >= 4
        for c in found[1:]:
            new = replace(now, **c.changes)
            assert (new != now) != (c.parts is not None)
            assert 1 <= new.num_warps <= 32 and 1 <= new.rows <= 64
            assert new.looped or new.block_n >= n
            assert at == "backward" or not new.looped or new.rows == 1
        assert {c.parts for c in found} - {None} == (set() if at == "forward" else {128, 264, 512})
        if now.num_warps < 32:
            assert tune.Candidate({"num_warps": now.num_warps * 2}) in found


@pytest.mark.parametrize(
    "at, n, expected", [("forward", 4096, []), ("forward", 65536, [2, 3, 4]), ("backward", 4096, [2, 3, 4])]
)
def test_other_stages_are_tried_where_there_are_several_tiles(tune, at, n, expected):
    from fused_norm.backends.triton import launch

    tried = [c.changes["stages"] for c in tune.candidates(at, n, 4) if set(c.changes) == {"stages"}]
    assert tried == expected  # on a device of unknown shared memory the launch itself has 1
    room = {"warp_size": 32, "shared_memory": 228 << 10}
    now = getattr(launch, f"{at}_launch")(n, 4, **room).stages
    there = tune.candidates(at, n, 4, **room)
    assert [c.changes["stages"] for c in there if set(c.changes) == {"stages"}] == [
        s for s in (1, 2, 3, 4) if expected and s != now
    ]


def test_a_candidate_is_what_the_kernels_launch_and_only_while_it_is_in_force(tune):
    from fused_norm import dispatch
    from fused_norm.backends.triton import launch, norm

    def state() -> dict[str, object]:
        return {**vars(launch), **{f"norm.{key}": value for key, value in vars(norm).items()}}

    before = state()
    forward = tune.Launched("forward", tune.Candidate({"num_warps": 2, "rows": 4}))
    with forward():
        config = launch.forward_launch(4096, 4, 32)
        assert (config.num_warps, config.rows) == (2, 4)
        made = norm._forward_launch
        assert made.cache_info().currsize == 0 and dispatch._chosen.get() == "triton"
        assert launch.backward_launch is before["backward_launch"]
    assert state() == before and dispatch._chosen.get() != "triton"
    with forward():
        assert norm._forward_launch is made  # what it has launched it keeps
    now = launch.backward_partition(4096, 1, 1)
    with tune.Launched("backward", tune.Candidate(parts=512))():
        assert launch.backward_partition(4096, 1, 1).parts == 2 * now.parts
        assert launch.backward_launch(4096, 4) == before["backward_launch"](4096, 4)
    assert launch.backward_partition(4096, 1, 1) == now and state() == before
    with tune.Launched("backward", tune.Candidate())():
        assert state() == before  # the present launch, from the caches that all calls have


def test_the_cases(tune):
    cases = tune.plan(tune.parse([]), "cold")
    names = [str(t) for t in cases]
    assert len(set(names)) == len(names)
    assert names[:4] == [f"layer_norm {at} {d} 16384x4096" for d in ("fp32", "bf16") for at in ("forward", "backward")]
    assert {"layer_norm backward bf16 4096x1024", "layer_norm forward fp32 256x262144"} < set(names)
    assert {"ticks_cross_entropy backward fp32 4096x262144"} < set(names)
    for t in cases:
        providers = list(t.case.op.providers)
        assert providers[:2] == ["native", "triton"] and (len(providers) > 2) == (t.case.op.name == "layer_norm")
    assert all(t.case.shape[0] * t.case.shape[1] <= 1 << 30 for t in cases)


# ------------------------------------------------------------------------------------------------------------ measuring


def stub_case(tune, calls: dict[str, object]) -> object:
    op = replace(OPS["layer_norm"], providers={name: Provider(name, lambda f=f: f) for name, f in calls.items()})
    return tune.Tuned(run.Case(op, "fp32", (6, 8), "warm"), "backward")


def measured(tune, path: Path, cases: list, missing: dict[str, str | None] | None = None) -> tuple[bool, list[Row]]:
    args = argparse.Namespace(seconds=None, cache="warm")
    there = results.read(path).rows if path.exists() else []
    sink = run.Sink(path, there, echo=False)
    done = tune.measure(cases, args, sink, CPU, missing or {"native": None, "triton": None})
    return done, results.read(path).rows


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(run, "PASS_S", 0.0)


def test_a_wrong_candidate_is_no_candidate_and_all_are_timed_in_the_same_rounds(
    tune, tmp_path, few_rounds, monkeypatch
):
    right = OPS["layer_norm"].baseline
    groups = []
    time_group = timing.time_group
    monkeypatch.setattr(timing, "time_group", lambda c, *a: groups.append([x.name for x in c]) or time_group(c, *a))
    calls = {"native": right, "triton": right, "triton rows=2": lambda *a: right(*a) * 1.1, "triton rows=4": right}
    done, rows = measured(tune, tmp_path / "t.jsonl", [stub_case(tune, calls)])
    assert done and groups == [["copy", "native", "triton", "triton rows=4"]]
    by_name = {r.provider: r for r in rows}
    assert by_name["triton rows=2"].status == "wrong" and by_name["triton rows=2"].ms is None
    assert all(r.pass_name == "backward" for r in rows)
    assert all(by_name[name].ms > 0 and by_name[name].vs_copy > 0 for name in groups[0][1:])
    (proposal,) = tune.proposals(rows)
    assert proposal["failed"] == ["triton rows=2"] and proposal["best"] in ("triton", "triton rows=4")
    assert "wrong or failed: triton rows=2" in tune.markdown([proposal])


def test_what_has_its_row_is_not_measured_again(tune, tmp_path, few_rounds):
    right, path = OPS["layer_norm"].baseline, tmp_path / "t.jsonl"
    calls = {"native": right, "triton": right}
    assert len(measured(tune, path, [stub_case(tune, calls)])[1]) == 2
    before = path.read_text()
    assert measured(tune, path, [stub_case(tune, calls)])[0] and path.read_text() == before
    _, rows = measured(tune, path, [stub_case(tune, {**calls, "triton rows=2": right})])
    # The new one beside the others: their times are of the same rounds, and the last of a row's counts.
    assert [r.provider for r in rows] == ["native", "triton", "native", "triton", "triton rows=2"]


def test_a_backend_that_is_missing_is_left_out(tune, tmp_path, few_rounds):
    right = OPS["layer_norm"].baseline
    calls = {"native": right, "triton": right}
    _, rows = measured(tune, tmp_path / "t.jsonl", [stub_case(tune, calls)], {"native": "not built", "triton": None})
    assert [r.provider for r in rows] == ["triton"]
    assert tune.proposals(rows)[0]["serve"] is None


def test_time_that_is_spent_leaves_the_rest(tune, tmp_path):
    right = OPS["layer_norm"].baseline
    cases = [stub_case(tune, {"native": right, "triton": right}) for _ in range(2)]
    args = argparse.Namespace(seconds=0.0, cache="warm")
    sink = run.Sink(tmp_path / "t.jsonl", [], echo=False)
    assert not tune.measure(cases, args, sink, CPU, {"native": None, "triton": None}) and not sink.rows


# ------------------------------------------------------------------------------------------------------------ proposals


def row(provider: str, ms: float | None, at: str = "forward", n: int = 4096, **values) -> Row:
    return Row("layer_norm", at, "fp32", 16384, n, None, provider, "cold", ms=ms, **values)


def test_proposals(tune):
    rows = [
        row("native", 0.9),
        row("triton", 1.0, vs_copy=0.8),
        row("triton num_warps=8", 0.8, vs_copy=0.95),
        row("triton rows=2", None, status="error"),
        row("native", 1.2, "backward"),
        row("triton", 2.0, "backward"),  # of an earlier run
        row("triton", 1.0, "backward", vs_copy=0.7),
        row("triton parts=512", 0.99, "backward"),
        row("native", 1.0, n=1024),
        row("triton", 1.01, n=1024),
        row("native", 1.0, n=768),
    ]
    forward, backward, same, alone = tune.proposals(rows)
    assert (forward["serve"], forward["best"], forward["best_ms"]) == ("native", "triton num_warps=8", 0.8)
    assert forward["behind"] == pytest.approx(0.25) and forward["best_vs_copy"] == 0.95
    assert forward["failed"] == ["triton rows=2"] and forward["tried"] == 2
    assert backward["serve"] == "triton" and backward["behind"] == pytest.approx(1 / 0.99 - 1)
    assert same["serve"] == "either" and same["behind"] == 0
    assert (alone["serve"], alone["best"], alone["behind"], alone["native_ms"]) == (None, None, None, 1.0)
    text = tune.markdown([forward, backward, same, alone]).splitlines()
    assert "| native | num_warps=8; wrong or failed: triton rows=2 | 0.8000 | 95% | 25.0% |" in text[2]
    assert "| triton | as it is | 0.9900 |" in text[3] and "| either | as it is |" in text[4]
    json.dumps([forward, backward, same, alone], allow_nan=False)


# ----------------------------------------------------------------------------------------------------- the whole script


def test_the_script_in_the_interpreter(tmp_path):
    """Every row is on disk, a file that was cut short goes on, and the proposal is written."""
    out = tmp_path / "tune.jsonl"
    options = ["--device", "cpu", "--n", "64", "--elements", "256", "--classes", "", "--dtype", "fp32"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def call(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), *options, "--output", str(out), *more]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    done = call("--prepare", "1/30")  # a tile of 256 rows takes the interpreter its time
    assert done.returncode == 0 and "rror" not in done.stdout, done.stdout + done.stderr
    assert not out.exists()

    def finish() -> None:
        """As often as it takes: a run out of time says so, and the next goes on."""
        for _ in range(20):
            done = call("--seconds", "6")
            if done.returncode == 0:
                return
            assert done.returncode == 1 and not results.read(out).finished, done.stdout + done.stderr
        raise AssertionError(done.stdout + done.stderr)

    finish()
    whole = results.read(out)
    native = fused_norm.available_backends()["native"] is None
    names = {(r.op, r.pass_name): [] for r in whole.rows}
    for r in whole.rows:
        names[r.op, r.pass_name].append(r.provider)
        assert r.status == "ok" and r.ms > 0 and r.vs_copy > 0, r
    assert whole.finished and set(names) == {("layer_norm", "forward"), ("layer_norm", "backward")}
    assert all(("native" in found) == native and "triton" in found for found in names.values())
    assert len(names["layer_norm", "backward"]) > len(names["layer_norm", "forward"]) > 5
    proposals = json.loads(out.with_suffix(".json").read_text())
    assert len(proposals) == 2 and "| layer_norm forward fp32 4x64 |" in out.with_suffix(".md").read_text()
    # One case's last row is lost, and half of the next line.
    lines = out.read_text().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if '"pass": "backward"' in line)
    out.write_text("".join(lines[:lost]) + lines[lost][:40])
    finish()
    again = results.read(out)
    assert again.finished and len(again.environments) >= 2
    assert sorted({(r.op, r.pass_name, r.provider) for r in again.rows}) == sorted(
        {(r.op, r.pass_name, r.provider) for r in whole.rows}
    )
    assert [r.ms for r in again.rows if r.pass_name == "forward"][:5] == [
        r.ms for r in whole.rows if r.pass_name == "forward"
    ][:5]


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path / "t.jsonl")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "sees no GPU" in done.stderr and not list(tmp_path.iterdir())
