"""bench/targets.py: whether rows of a benchmark reach what is to be reached, on rows that are made up."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fused_norm.bench.cases import OPS
from fused_norm.bench.results import Row, Writer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def targets():
    spec = importlib.util.spec_from_file_location("bench_targets", ROOT / "bench" / "targets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_targets"] = module
    spec.loader.exec_module(module)
    return module


def row(op: str, at: str, dtype: str, shape: tuple[int, ...], provider: str = "fused", **values) -> Row:
    m, n, h = (*shape, None)[:3]
    return Row(op, at, dtype, m, n, h, provider, "cold", **{"ms": 1.0, **values})


def everything(targets) -> list[Row]:
    """Rows of a run that reaches every target by a hair, each case with a slower torch, its best peer and Liger."""
    rows = []
    for op in OPS.values():
        for shape in op.sweeps["gpu"]["cuda"]:
            for at in op.passes:
                for dtype in ("fp32", "bf16"):
                    case = op.name, at, dtype, shape
                    share = 0.75 if "softcap" in op.name else 0.92
                    ours = {"vs_copy": share, "vs_torch": 2.0, "call_ms": 3.0, "peak_bytes": 100}
                    rows += [
                        row(*case, **ours),
                        row(*case, "torch", ms=2.0, vs_torch=1.0, call_ms=3.0),
                        row(*case, "compile", ms=0.99, vs_torch=2.0 * 1.019),
                        row(*case, "ce:torch", ms=0.9, vs_torch=2.0 * 1.14),
                        row(*case, "ce:liger", ms=0.1, vs_torch=20.0, peak_bytes=100),
                        row(*case, "fused:native", ms=0.1, vs_torch=20.0, vs_copy=9.0),
                    ]
    return rows


def states(targets, rows: list[Row]) -> dict[str, str]:
    return {v.target.title: v.state for v in targets.judge(rows)}


def changed(rows: list[Row], op: str, at: str, shape: tuple[int, ...], provider: str = "fused", **values) -> list[Row]:
    """The rows with those values in one case, in every dtype."""
    assert any((r.op, r.pass_name, r.shape, r.provider) == (op, at, shape, provider) for r in rows)
    return [
        replace(r, **values) if (r.op, r.pass_name, r.shape, r.provider) == (op, at, shape, provider) else r
        for r in rows
    ]


def test_without_rows_nothing_is_measured(targets):
    assert set(states(targets, []).values()) == {targets.NOT_MEASURED}
    assert set(states(targets, [row("layer_norm", "forward", "fp32", (6, 8), vs_copy=0.1)]).values()) == {
        targets.NOT_MEASURED
    }


def test_all_are_reached_where_each_case_is_just_inside(targets):
    verdicts = targets.judge(everything(targets))
    assert [v.target.title for v in verdicts if v.state != targets.REACHED] == []
    assert all(v.measured == v.cases > 0 and v.missed == 0 and v.worst for v in verdicts)


def test_every_target_has_a_title_and_a_limit_of_its_own_kind(targets):
    titles = [t.title for t in targets.TARGETS]
    assert len(set(titles)) == len(titles)
    assert all((t.least is None) != (t.most is None) for t in targets.TARGETS)


LARGE, WIDE = (16384, 4096), (2048, 32768)
LINEAR = "linear_ticks_cross_entropy"
#: What is changed in one case of a run that reaches all, and patterns of the titles of the targets then missed.
MISSES = [
    ("layer_norm", "forward", LARGE, "fused", {"vs_copy": 0.919}, ["s, forward fp32.*N 768", "s, forward bf16.*N 768"]),
    ("rms_norm", "forward", WIDE, "fused", {"vs_copy": 0.91}, ["s, forward bf16.*N 768"]),
    ("rms_norm", "forward", WIDE, "fused", {"vs_copy": 0.84}, ["s, forward fp32.*above", "s, forward bf16.*N 768"]),
    ("layer_norm", "backward", LARGE, "fused", {"vs_copy": 0.84}, ["backward fp32.*N 768", "backward bf16.*N 768"]),
    ("layer_norm", "backward", (4096, 16384), "fused", {"vs_copy": 0.84}, ["backward bf16.*N 768"]),
    (
        "rms_norm",
        "backward",
        (1024, 65536),
        "fused",
        {"vs_copy": 0.74},
        ["backward fp32.*above", "backward bf16.*above"],
    ),
    ("layer_norm", "forward", (4096, 1024), "fused", {"vs_copy": 0.1}, []),  # too small for the roof
    ("ticks_cross_entropy", "backward", (4096, 262144), "fused", {"vs_copy": 0.89}, ["^ticks_cross_entropy, backward"]),
    ("ticks_cross_entropy", "forward", (512, 32000), "fused", {"vs_copy": 0.1}, []),  # too few rows
    ("softcap_ticks_cross_entropy", "forward", (8192, 32000), "fused", {"vs_copy": 0.74}, ["^softcap.*, forward"]),
    ("layer_norm", "backward", (1, 4096), "compile", {"vs_torch": 2.0 * 1.021}, ["^norms, time"]),
    ("rms_norm", "forward", LARGE, "compile", {"vs_torch": None, "ms": 0.97}, ["^norms, time"]),
    ("add_rms_norm", "forward", LARGE, "compile", {"vs_torch": 2.05}, ["^add-norms, time"]),
    ("ticks_cross_entropy", "forward", (512, 32000), "compile", {"vs_torch": 2.05}, ["^ticks, time"]),
    ("layer_norm", "forward+backward", (4096, 1024), "torch", {"vs_torch": 2.01}, ["4096x1024, device"]),
    ("rms_norm", "forward+backward", (4096, 1024), "fused", {"call_ms": 3.01}, ["4096x1024, calls"]),
    (LINEAR, "forward+backward", (8192, 152064, 4096), "ce:torch", {"vs_torch": 2.31}, ["^linear ticks, time"]),
    (LINEAR, "forward+backward", (8192, 32000, 4096), "ce:liger", {"peak_bytes": 99}, ["^linear ticks, memory"]),
    ("layer_norm", "forward", (512, 768), "fused", {"status": "wrong", "ms": None}, ["^norms, time"]),
]


@pytest.mark.parametrize("miss", MISSES, ids=lambda miss: f"{miss[0]}-{miss[1]}-{miss[2][1]}-{miss[4]}")
def test_one_case_outside_misses_its_target_and_no_other(targets, miss):
    *where, values, patterns = miss
    found = states(targets, changed(everything(targets), *where, **values))
    missed = {title for title, state in found.items() if state == targets.MISSED}
    expected = [[title for title in found if re.search(pattern, title)] for pattern in patterns]
    assert all(len(titles) == 1 for titles in expected), expected
    assert missed == {titles[0] for titles in expected}


def test_a_case_without_its_row_is_not_measured_and_one_outside_is_missed_all_the_same(targets):
    rows = everything(targets)
    some = [r for r in rows if not (r.op == "layer_norm" and r.shape == LARGE and r.pass_name == "forward")]
    title = "norms, forward fp32, share of the copy's bandwidth, N 768 to 16384"
    assert states(targets, some)[title] == targets.NOT_MEASURED
    (verdict,) = [v for v in targets.judge(some) if v.target.title == title]
    assert verdict.measured == verdict.cases - 1
    some = changed(some, "rms_norm", "forward", LARGE, vs_copy=0.5)
    (verdict,) = [v for v in targets.judge(some) if v.target.title == title]
    assert (verdict.state, verdict.missed, verdict.value) == (targets.MISSED, 1, 0.5)
    assert verdict.worst == "rms_norm forward fp32 16384x4096"


def test_the_last_of_a_cases_rows_counts_and_a_failure_of_every_pass_is_a_miss(targets):
    rows = everything(targets)
    title = "ticks_cross_entropy, forward, share of the copy's bandwidth, M >= 4096"
    case = "ticks_cross_entropy", "forward", "fp32", (8192, 32000)
    assert states(targets, [*rows, row(*case, vs_copy=0.5)])[title] == targets.MISSED
    assert states(targets, [row(*case, vs_copy=0.5), *rows])[title] == targets.REACHED
    broken = row("ticks_cross_entropy", "all", "fp32", (8192, 32000), status="error", ms=None)
    (verdict,) = [v for v in targets.judge([*rows, broken]) if v.target.title == title]
    assert verdict.state == targets.MISSED and verdict.wrong == ("ticks_cross_entropy forward fp32 8192x32000",)


def test_without_liger_its_memory_is_not_measured(targets):
    rows = [r for r in everything(targets) if r.provider != "ce:liger"]
    found = states(targets, rows)
    assert found.pop("linear ticks, memory over Liger's") == targets.NOT_MEASURED
    assert set(found.values()) == {targets.REACHED}


def test_the_command_line(targets, tmp_path, capsys):
    def write(rows: list[Row]) -> str:
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        writer = Writer(path)
        for r in rows:
            writer.write(r.to_json())
        return str(path)

    rows = everything(targets)
    assert targets.main([write(rows)]) == 0
    assert capsys.readouterr().out.count("| **reached** |") == len(targets.TARGETS)
    assert targets.main([write(changed(rows, "layer_norm", "forward", LARGE, vs_copy=0.5))]) == 1
    printed = capsys.readouterr().out
    assert "| **missed** | 0.500 | layer_norm forward fp32 16384x4096 | 10 of 10, 1 outside |" in printed
    assert targets.main([str(tmp_path / "absent.jsonl")]) == 2
