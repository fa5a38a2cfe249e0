"""``bench/compare.py``: noise passes, a slow-down does not, and a comparison of nothing is none."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fused_norm.bench.results import Row, Writer

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "compare.py"
_spec = importlib.util.spec_from_file_location("bench_compare", SCRIPT)
compare = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = compare
_spec.loader.exec_module(compare)

ENVIRONMENT = {
    "kind": "environment",
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "a" * 40,
    "device": {"type": "cpu", "name": "a CPU"},
    "cpu": "a CPU",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "variables": {},
}
SHAPES = [(512, 768), (4096, 1024), (768, 384), (1000, 1001), (8192, 128), (64, 65536)]
#: torch's milliseconds, and how much faster the others are.
TORCH_MS, RATIOS = 1.0, {"fused:native": 2.0, "fused": 1.9, "compile": 0.8}


def rows_of(seed: int = 0, spread: float = 0.08, between: float = 0.03, rounds: int = 60) -> list[Row]:
    """What two operations, four passes and two dtypes may give: sd ``spread`` in a run, ``between`` from run to run."""
    rng, rows = random.Random(seed), []
    for op in ("layer_norm", "rms_norm"):
        for pass_name in ("forward", "backward", "forward+backward", "forward-nograd"):
            for dtype in ("fp32", "bf16"):
                for m, n in SHAPES:
                    case = (op, pass_name, dtype, m, n, None)
                    ms = TORCH_MS * (1 + rng.gauss(0, between))
                    times = {"ms": ms, "p20_ms": ms * (1 - 0.8 * spread), "p80_ms": ms * (1 + 0.8 * spread)}
                    ones = dict.fromkeys(("vs_torch", "vs_torch_p20", "vs_torch_p80"), 1.0)
                    memory = {"peak_bytes": 4 * m * n, "rounds": rounds}
                    rows.append(Row(*case, "torch", "warm", **times, **ones, **memory))
                    for provider, ratio in RATIOS.items():
                        base = ratio * (1 + rng.gauss(0, between))
                        samples = sorted(base * (1 + rng.gauss(0, spread)) for _ in range(rounds))
                        low, median, high = (samples[int(q * (rounds - 1))] for q in (0.2, 0.5, 0.8))
                        rows.append(
                            Row(
                                *case,
                                provider,
                                "warm",
                                ms=ms / median,
                                p20_ms=ms / high,
                                p80_ms=ms / low,
                                vs_torch=median,
                                vs_torch_p20=low,
                                vs_torch_p80=high,
                                **memory,
                            )
                        )
    return rows


def slower(row: Row, factor: float) -> Row:
    """The same row, of something that takes ``factor`` times as long."""
    times = {f: getattr(row, f) * factor for f in ("ms", "p20_ms", "p80_ms")}
    return replace(row, **times, **{f: getattr(row, f) / factor for f in ("vs_torch", "vs_torch_p20", "vs_torch_p80")})


def changed(rows: list[Row], by, **only: object) -> list[Row]:
    hit = [all(getattr(r, name) == value for name, value in only.items()) for r in rows]
    assert any(hit)
    return [by(r) if h else r for r, h in zip(rows, hit, strict=True)]


def write(path: Path, rows: list[Row], *, end: bool = True, **environment: object) -> Path:
    writer = Writer(path)
    writer.write(ENVIRONMENT | environment)
    for row in rows:
        writer.write(row.to_json())
    if end:
        writer.write({"kind": "end", "finished": True, "seconds": 1.0})
    writer.file.close()
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """Compares two lists of rows; gives the exit status and what was printed."""

    def compare_them(before, after, *argv, environment=None, end=True):
        files = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
        for file in files:
            file.unlink(missing_ok=True)
        write(files[0], before)
        write(files[1], after, end=end, **(environment or {}))
        status = compare.main([*map(str, files), *argv])
        return status, "".join(capsys.readouterr())

    return compare_them


@pytest.mark.parametrize("by", ["torch", "ms"])
@pytest.mark.parametrize("rounds", [5, 60])
def test_noise_passes(run, by, rounds):
    for seed in range(6):
        status, said = run(rows_of(2 * seed, rounds=rounds), rows_of(2 * seed + 1, rounds=rounds), "--by", by)
        assert status == 0 and "REGRESSION" not in said, said
        assert "192 of them ours" in said


def test_a_result_is_no_regression_of_itself(run):
    rows = rows_of()
    status, said = run(rows, rows)
    assert status == 0 and "speed +0%" in said and "differs" not in said


@pytest.mark.parametrize("by", ["torch", "ms"])
def test_a_slow_down_of_a_fifth_is_caught(run, by):
    after = changed(
        rows_of(2), lambda r: slower(r, 1.2), op="rms_norm", pass_name="backward", dtype="bf16", provider="fused:native"
    )
    status, said = run(rows_of(1), after, "--by", by)
    assert status == 1
    told = said[said.index("REGRESSION") :]
    assert "slower as a set, 1:\n  rms_norm backward bf16 fused:native: median speed -" in told
    assert "layer_norm" not in told and "compile" not in told


@pytest.mark.parametrize("by", ["torch", "ms"])
def test_of_one_row_alone_where_runs_are_steady(run, by):
    """As they are on a GPU: a percent or two."""
    quiet = {"spread": 0.02, "between": 0.01}
    where = {"op": "layer_norm", "pass_name": "forward", "dtype": "fp32", "m": 4096, "provider": "fused"}
    for factor, status in ((1.2, 1), (1 / 1.2, 0)):
        after = changed(rows_of(2, **quiet), lambda r, factor=factor: slower(r, factor), **where)
        found, said = run(rows_of(1, **quiet), after, "--by", by)
        assert found == status
        what = "REGRESSION, slower, 1" if status else "\nfaster, 1"
        assert f"{what}:\n  layer_norm forward fp32 4096x1024 fused: " in said and said.count("->") == 1, said


def test_the_least_change_that_counts(run):
    quiet = {"spread": 0.002, "between": 0.001}
    after = changed(rows_of(2, **quiet), lambda r: slower(r, 1.06), op="layer_norm", provider="fused:native")
    assert run(rows_of(1, **quiet), after)[0] == 0
    status, said = run(rows_of(1, **quiet), after, "--change", "0.03")
    assert status == 1 and "slower, 48:" in said and "slower as a set, 8:" in said and "and 28 more" in said


def test_few_rounds_tell_little_of_a_range(run):
    """Five rounds that happen to lie close are no proof; a hundred are."""
    one = next(r for r in rows_of() if r.provider == "fused")
    for rounds, status in ((5, 0), (100, 1)):
        before = replace(one, vs_torch=2.0, vs_torch_p20=1.95, vs_torch_p80=2.05, rounds=rounds)
        assert run([before], [slower(before, 1.15)])[0] == status


def test_others_are_told_and_do_not_count(run):
    after = changed(rows_of(2), lambda r: slower(r, 1.6), provider="compile")
    status, said = run(rows_of(1), after)
    assert status == 0 and "REGRESSION" not in said and "slower, 96 of others:" in said


def test_torch_slower_alone_changes_ratios_and_not_times(run):
    """The other way round than a slow machine: ours as before, the ratio doubled."""
    before = rows_of(spread=0.02)
    fast = [
        replace(r, vs_torch=2 * r.vs_torch, vs_torch_p20=2 * r.vs_torch_p20, vs_torch_p80=2 * r.vs_torch_p80)
        for r in before
    ]
    after = [slower(b, 1.4) if b.provider == "torch" else f for b, f in zip(before, fast, strict=True)]
    assert "\nfaster, 192:" in run(before, after)[1]
    status, said = run(before, after, "--by", "ms")
    assert status == 0 and "slower, 96 of others:" in said and "faster" not in said


def test_a_disturbed_run_is_inconclusive(run):
    busy = changed(rows_of(2), lambda r: slower(r, 1.7), provider="torch")
    worse = changed(busy, lambda r: slower(r, 1.5), provider="fused")
    status, said = run(rows_of(1), worse)
    assert status == 2 and "set aside, 288: something else ran" in said and "REGRESSION" not in said
    assert "of 192 rows of ours that both have, 0 were compared" in said
    # On another machine torch may well take another time.
    status, said = run(rows_of(1), worse, environment={"threads": 4})
    assert status == 1 and "differs threads: 2 there, 4 here" in said and "set aside" not in said
    most = [slower(r, 1.7) if r.provider == "torch" and r.pass_name != "backward" else r for r in rows_of(2)]
    status, said = run(rows_of(1), most)
    assert status == 2 and "of 192 rows of ours that both have, 48 were compared" in said
    # Less than half of a run disturbed leaves enough to compare.
    part = changed(rows_of(2), lambda r: slower(r, 1.7), provider="torch", pass_name="backward")
    status, said = run(rows_of(1), part)
    assert status == 0 and "set aside, 72: something else ran" in said


def test_memory_has_no_noise(run):
    before = rows_of(1)
    after = changed(rows_of(2), lambda r: replace(r, peak_bytes=int(1.3 * r.peak_bytes)), provider="fused", m=512)
    status, said = run(before, after)
    assert status == 1 and "REGRESSION, more memory, 16:" in said and "1.573 MB -> 2.045 MB" in said
    status, said = run(after, before)
    assert status == 0 and "\nless memory, 16:" in said


@pytest.mark.parametrize("status", ["wrong", "error", "skipped"])
@pytest.mark.parametrize("covers", ["row", "case", "operation"])
def test_what_is_ok_no_more_is_a_regression(run, status, covers):
    before = rows_of(1)
    where = {"op": "layer_norm", "dtype": "bf16", "m": 512, "provider": "fused:native"}
    if covers == "row":
        where["pass_name"] = "backward"
    if covers == "operation":
        where = {"op": "layer_norm", "provider": "fused:native"}
    hit = [r for r in before if all(getattr(r, name) == value for name, value in where.items())]
    bad = replace(hit[0], status=status, reason="y: error 0.3", ms=None, vs_torch=None)
    if covers != "row":
        bad.pass_name = "all"
    if covers == "operation":
        bad.dtype, bad.m, bad.n = "all", None, None
    after = [*(r for r in before if r not in hit), bad]
    found, said = run(before, after)
    count = {"row": 1, "case": 4, "operation": 48}[covers]
    assert found == 1 and f"REGRESSION, status, {count}:" in said, said
    assert f"was ok, is {status}: y: error 0.3" in said
    found, said = run(after, before)
    assert found == 0 and f"\nok again, {count}:" in said


def test_another_ones_failure_does_not_count(run):
    after = changed(rows_of(2), lambda r: replace(r, status="wrong", ms=None), provider="compile", op="layer_norm")
    status, said = run(rows_of(1), after)
    assert status == 0 and "status, 48 of others:" in said


def test_rows_that_one_file_alone_has(run):
    before = [r for r in rows_of(1) if r.dtype == "fp32"]
    after = [r for r in rows_of(2) if r.op == "layer_norm"]
    status, said = run(before, after)
    assert status == 0 and "missing, 48:" in said and "new, 48:" in said and "new, 48 of others:" in said


def test_an_interrupted_file_is_compared_as_far_as_it_goes(run, tmp_path, capsys):
    rows = rows_of(2)
    status, said = run(rows_of(1), rows[:100], end=False)
    assert status == 0 and "100 rows, unfinished" in said
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes((tmp_path / "after.jsonl").read_bytes()[:-40])
    assert compare.main([str(tmp_path / "before.jsonl"), str(torn)]) == 0
    assert "99 rows, unfinished" in capsys.readouterr().out


def test_differing_environments_are_named(run):
    environment = {"commit": "b" * 40, "versions": {"torch": "2.14.0"}, "device": {"type": "cpu", "name": "another"}}
    _, said = run(rows_of(1), rows_of(2), environment=environment)
    for line in ("versions.torch: 2.13.0 there, 2.14.0 here", "device.name: a CPU there, another here", "b" * 40):
        assert line in said


def test_rows_without_a_ratio_are_named(run):
    def without(r):
        return replace(r, vs_torch=None, vs_torch_p20=None, vs_torch_p80=None)

    before, after = ([without(r) for r in rows_of(seed) if r.provider != "torch"] for seed in (1, 2))
    status, said = run(before, after)
    assert status == 2 and "no ratio to torch, 288 (--by ms compares these)" in said
    assert run(before, after, "--by", "ms")[0] == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda r: r.op == "layer_norm", lambda r: r.op == "rms_norm"),
        (lambda r: True, lambda r: not compare.is_ours(compare.key(r))),
        (lambda r: False, lambda r: False),
    ],
    ids=["no common row", "none of ours", "empty"],
)
def test_a_comparison_of_nothing_does_not_pass(run, before, after):
    status, said = run([r for r in rows_of(1) if before(r)], [r for r in rows_of(2) if after(r)])
    assert status == 2 and "of 0 rows of ours that both have, 0 were compared" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("op,pass\nlayer_norm,forward\n", "line 1, is no line of"),
        ("", "no line that describes"),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, content, said):
    good, bad = write(tmp_path / "good.jsonl", rows_of()), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    for files in ((good, bad), (bad, good)):
        with pytest.raises(SystemExit) as e:
            compare.main([*map(str, files)])
        assert e.value.code == 2
        told = capsys.readouterr().err
        assert said in told and "bad.jsonl" in told


def test_a_least_change_of_nothing_is_refused(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", rows_of())
    with pytest.raises(SystemExit) as e:
        compare.main([str(good), str(good), "--change", "0"])
    assert e.value.code == 2 and "--change 0.0: it must be above 0" in capsys.readouterr().err


def test_the_script_runs_uninstalled_and_elsewhere(tmp_path):
    files = [write(tmp_path / "a.jsonl", rows_of()), write(tmp_path / "b.jsonl", [slower(r, 1.5) for r in rows_of()])]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, files), "--by", "ms"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "REGRESSION, slower, 192:" in done.stdout, done.stderr
