"""The norms where a device has native and Triton kernels: the table, and that its choices are carried out."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_norm
import fused_norm.functional as FF
from fused_norm import dispatch
from fused_norm.backends import by_size

FUNCTIONS = ("norm_forward", "norm_backward")
SIZES = (8, 4, 2)
ROOT = Path(__file__).parents[1]


def test_the_table_says_what_it_rests_on() -> None:
    """Figures have the file that they come from; without one the table says that nothing was measured."""
    table = json.loads((ROOT / "fused_norm" / "backends" / "by_size.json").read_text())
    assert table == by_size.TABLE and set(table) == {"basis", "results", "rules"}
    if table["results"] is None:
        assert "not measured" in table["basis"]
    else:
        assert (ROOT / table["results"]).exists()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_rules_are_in_order_and_hold_for_all_rows(function: str) -> None:
    *bounded, last = by_size.TABLE["rules"][function]
    assert set(last) == {"backend", "because"}
    for size in SIZES:
        bounds = [rule["columns"][str(size)] for rule in bounded]
        assert bounds == sorted(bounds)
    for rule in (*bounded, last):
        assert rule["backend"] in ("native", "triton") and rule["because"]
        assert set(rule) <= {"columns", "capability", "whole_chunks", "backend", "because"}
        assert "columns" not in rule or set(rule["columns"]) == {str(size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_bound_is_the_last_of_its_rule(function: str, size: int) -> None:
    rules = by_size.TABLE["rules"][function]
    for before, rule, after in zip([None, *rules], rules, rules[1:], strict=False):
        bound, capability = rule["columns"][str(size)], rule.get("capability", 0)
        if before is not None and before["columns"][str(size)] == bound:
            continue  # there is nothing between them
        assert by_size.choose(function, bound, size, capability) == rule["backend"]
        if after.get("columns", {}).get(str(size)) != bound:
            assert by_size.choose(function, bound + 16, size, 120) == after["backend"]
        if capability:
            assert by_size.choose(function, bound, size, capability - 1) == rules[-1]["backend"]
        if rule.get("whole_chunks"):
            assert by_size.choose(function, bound - 1, size, capability) == rules[-1]["backend"]
    assert by_size.choose(function, 1 << 40, size, 75) == rules[-1]["backend"]


def test_no_aligned_row_is_read_twice_that_some_kernel_reads_once() -> None:
    """On sm_90, where Triton's kernels loop over a row, native ones hold it."""
    pytest.importorskip("triton")
    from fused_norm.backends.triton import launch

    for function, chosen in (("norm_forward", launch.forward_launch), ("norm_backward", launch.backward_launch)):
        for size, n in itertools.product(SIZES, (4096, 4112, 8192, 8208, 16384, 16400, 32768, 32784, 65536, 131072)):
            if chosen(n, size).looped:
                assert by_size.choose(function, n, size, 90) == "native", (function, n, size)
        widest = max(n for n in (4096, 8192, 16384) if by_size.choose(function, n, 4, 75) == "triton")
        assert widest == 16384  # an older device has no clusters: Triton's, looped or not


@pytest.fixture
def recorded(monkeypatch):
    """dispatch's ``auto`` on a CPU as on a CUDA device of ``capability``; which backends served."""
    seen: list[tuple[str, str]] = []
    capability = {"now": (9, 0)}

    def fake(name: str) -> SimpleNamespace:
        from fused_norm import reference

        def function(what: str):
            def run(*args):
                seen.append((what, name))
                return getattr(reference, what)(*args)

            return run

        return SimpleNamespace(**{what: function(what) for what in FUNCTIONS})

    monkeypatch.setattr(by_size, "_BACKENDS", {"native": fake("native"), "triton": fake("triton")})
    monkeypatch.setattr(by_size, "_serving", functools.cache(by_size._serving.__wrapped__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["now"])
    monkeypatch.setattr(dispatch, "_auto", lambda op, device_type: by_size)
    monkeypatch.setattr(by_size.native, "cuda_reason", lambda index: None)
    return SimpleNamespace(seen=seen, capability=capability)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 1024, 2049, 9000, 40000, 600000])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_each_pass_goes_where_the_table_says(recorded, op: str, capability, n: int, dtype: torch.dtype) -> None:
    recorded.capability["now"] = capability
    x, w = torch.randn(2, n).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
    y = getattr(FF, op)(x, (n,), w)
    y.backward(torch.randn(2, n).to(dtype))
    major, minor = capability
    wanted = [(f, by_size.choose(f, n, dtype.itemsize, 10 * major + minor)) for f in FUNCTIONS]
    assert recorded.seen == wanted
    with torch.no_grad():
        torch.testing.assert_close(y, getattr(torch.nn.functional, op)(x, (n,), w), atol=2e-2, rtol=2e-2)


def test_the_choice_does_not_know_the_number_of_rows(recorded) -> None:
    for m in (1, 3, 4096):
        FF.layer_norm(torch.randn(m, 96), (96,))
    assert {name for _, name in recorded.seen} == {by_size.choose("norm_forward", 96, 4, 90)}


def test_a_device_that_the_extension_has_no_code_for_is_tritons(recorded, monkeypatch) -> None:
    monkeypatch.setattr(by_size.native, "cuda_reason", lambda index: "it has no code for sm_75")
    FF.layer_norm(torch.randn(3, 96), (96,))
    assert recorded.seen == [("norm_forward", "triton")]
    assert by_size.choose("norm_forward", 96, 4, 90) == "native"


def test_dispatch_chooses_it_on_cuda_where_both_can_run(monkeypatch) -> None:
    auto = dispatch._auto.__wrapped__
    monkeypatch.setattr(dispatch, "unavailable", lambda name, op, device_type: None)
    assert auto("norm", "cuda") is by_size
    assert auto("ticks", "cuda").__name__ == "fused_norm.backends.triton"
    assert auto("norm", "cpu").__name__ == "fused_norm.backends.native"
    for missing, left in (("native", "triton"), ("triton", "native")):
        monkeypatch.setattr(
            dispatch, "unavailable", lambda name, op, device_type, gone=missing: "gone" if name == gone else None
        )
        assert auto("norm", "cuda").__name__ == f"fused_norm.backends.{left}"


def test_a_compiled_graph_goes_by_the_same_table(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_auto", lambda op, device_type: by_size)
    plan = dispatch._plan("norm", "cuda", "auto")
    assert re.fullmatch(r"auto \S+", plan)
    with fused_norm.use_backend("reference"), dispatch.planned(plan):
        assert dispatch.select("norm", "cuda") is by_size


def test_it_is_nobodys_to_ask_for_by_name() -> None:
    assert "by_size" not in dispatch.BACKENDS
    with pytest.raises(ValueError, match="by_size"), fused_norm.use_backend("by_size"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 4096, 65536])
def test_on_a_gpu_each_pass_runs_on_the_kernels_that_the_table_names(n: int) -> None:
    if any(fused_norm.available_backends()[name] is not None for name in ("native", "triton")):
        pytest.skip("native or triton cannot run here")
    x = torch.randn(3, n, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = FF.layer_norm(x, (n,))
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        torch.cuda.synchronize()
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (n,)), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(dx).all()
    major, minor = torch.cuda.get_device_capability()
    names = " ".join(event.key for event in profile.key_averages())
    for function in FUNCTIONS:
        native = by_size.choose(function, n, 4, 10 * major + minor) == "native"
        # The names of native kernels stand in a namespace.
        assert (f"fused_norm::{function}" in names) == native, (function, names)
