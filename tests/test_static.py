"""The static report of the GPU kernels: that the committed one is of these kernels, and within its limits."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import static  # noqa: E402

REPORT = ROOT / "bench" / "results" / "static-gpu.jsonl"

#: Bytes over the ideal's where a row is too wide to be held and read twice, by the call; all others are at 1.
LOOPED = {
    "layer_norm forward": 3 / 2,
    "rms_norm forward": 3 / 2,
    "layer_norm backward": 5 / 3,
    "rms_norm backward": 5 / 3,
}
LOOPED |= dict.fromkeys(("add_layer_norm backward", "dropout_add_layer_norm backward"), 3 / 2)
LOOPED |= dict.fromkeys(("add_layer_norm forward", "dropout_add_layer_norm forward"), 5 / 4)


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    return [json.loads(line) for line in REPORT.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["kind"] == "row"]


def test_the_report_is_of_these_kernels(lines: list[dict]) -> None:
    assert lines[0]["sources"] == static.digest(), "the GPU kernels have changed: run make static"


def test_the_report_has_every_variant(rows: list[dict]) -> None:
    found = {(r["kernel"], r["variant"], r["target"]) for r in rows}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"):
        for kernel in static.KERNELS[:-1]:
            missing = {(kernel, str(build), target) for _, build in static.builds(kernel)} - found
            assert not missing, missing
    cuda = collections.Counter((r["variant"].split()[0], r["target"]) for r in rows if r["kernel"] == "cuda")
    instantiations = {"norm_forward": 48, "norm_backward": 28, "ticks_forward": 24, "ticks_backward": 24}
    assert cuda == {(k, t): n for k, n in instantiations.items() for t in ("sm_80", "sm_90", "sm_100")}


def test_nothing_spills(rows: list[dict]) -> None:
    for r in (r for r in rows if r["kernel"] not in static.COUNTED):
        assert r["stack"] == 0 and r["spills"] == 0, r


def test_aligned_rows_move_16_bytes_at_a_time(rows: list[dict]) -> None:
    """Narrow are single numbers alone: statistics, a pivot, a seed, a loss. (Of CUDA: test_cuda_compile.py.)"""
    aligned = [r for r in rows if "loads" in r and r["kernel"] != "cuda" and "1001" not in r["variant"]]
    assert aligned
    for r in aligned:
        stores_rows = not r["variant"].startswith("reduce") and (r["kernel"], r["variant"][:7]) != ("ticks", "forward")
        assert r["loads"].get("16", 0) > 0 and (r["stores"].get("16", 0) > 0 or not stores_rows), r
        assert sum(k for width, k in r["loads"].items() if width != "16") <= 8, r
        assert sum(k for width, k in r["stores"].items() if width != "16") <= 5, r


def test_a_quarter_of_the_warps_are_resident(rows: list[dict]) -> None:
    """Of a width that is no multiple of 4 an eighth, on sm_80 and sm_90."""
    known = [r for r in rows if r.get("occupancy") is not None]
    assert known
    for r in known:
        assert r["occupancy"] >= (0.125 if "1001" in r["variant"] else 0.25), r


def test_bytes_and_launches(rows: list[dict]) -> None:
    """A row that is held moves what it must, and in layer norm's forward its pivot; a looped one what LOOPED says."""
    traffic = [r for r in rows if r["kernel"] == "traffic"]
    assert len(traffic) >= 36
    for r in traffic:
        most = LOOPED.get(r["variant"], 1) if "x32768" in r["target"] else 1
        assert 1 <= r["bytes"] / r["ideal"] <= most + 0.001, r
        assert r["launches"] <= (2 if "backward" in r["variant"] else 1), r


def test_the_host_launches_no_more_than_it_must_and_faster_than_triton(rows: list[dict]) -> None:
    host = {r["variant"]: r for r in rows if r["kernel"] == "host"}
    two = {"norm_backward", "norm_double_backward", "add_norm_backward"}
    one = {"norm_forward", "add_norm_forward", "ticks_forward", "ticks_backward"}
    whole = {f"{op} forward+backward with autograd" for op in ("layer_norm", "rms_norm")}
    assert set(host) == one | two | whole
    for name, r in host.items():
        assert r["launches"] == (3 if name in whole else 2 if name in two else 1), r
        assert name in whole or r["us"] < r["triton_us"] / 2, r


def test_readings() -> None:
    ptx = "ld.global.L1::evict_first.v4.b32 {a}, [b];\nld.global.b16 x;\nst.global.v2.b32 y;\nld.shared.b32 z;"
    assert static.accesses(ptx, "ld") == {"16": 1, "2": 1} and static.accesses(ptx, "st") == {"8": 1}
    ptx = "cp.async.cg.shared.global.L2::cache_hint [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2, %rd2;\n"
    ptx += "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
    ptx += "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;\n"
    ptx += "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;\n"
    assert static.accesses(ptx, "ld") == {"16": 2, "8": 1} and static.accesses(ptx, "st") == {}
    # 128 registers in programs of 256 threads: two of them, 16 of 64 warps; 96 kB of shared memory leave room for one.
    assert static.occupancy("sm_90", 128, 8, 0) == 0.25
    assert static.occupancy("sm_80", 128, 8, 96 << 10) == 0.125
    assert static.occupancy("gfx942", 128, 8, 0) is None


@pytest.mark.slow
def test_one_row_of_the_report_comes_out_again(rows: list[dict]) -> None:
    """Compiled afresh, if by the compiler that made the report."""
    import triton

    module, build = static.builds("norm")[0]
    fresh = static.triton_row("norm", module, build, "sm_90")
    (there,) = (r for r in rows if (r["variant"], r["target"], r["kernel"]) == (str(build), "sm_90", "norm"))
    keys = ("warps", "loads", "stores") if triton.__version__ < "3.9" else tuple(fresh)
    assert {k: fresh[k] for k in keys} == {k: there[k] for k in keys}
