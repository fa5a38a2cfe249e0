"""bench/e2e.py on tiny models: all variants train as the stock model does, time is put down to the right operators."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fused_norm
import fused_norm.functional as FF

pytest.importorskip("transformers", reason="the models are those of transformers")

SCRIPT = Path(__file__).parents[1] / "bench" / "e2e.py"
TINY = ["--layers", "2", "--width", "32", "--batch", "2", "--length", "8", "--vocabulary", "50", "--device", "cpu"]


@pytest.fixture(scope="module")
def e2e():
    spec = importlib.util.spec_from_file_location("e2e", SCRIPT)
    module = sys.modules["e2e"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["e2e"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(e2e, tmp_path, capsys):
    """Runs the command; gives its status, its JSON and what it printed."""

    def run(*arguments: str) -> tuple[int, dict, str]:
        status = e2e.main([*TINY, "--output", str(tmp_path / "result"), *arguments])
        printed = capsys.readouterr().out
        assert (tmp_path / "result.txt").read_text() == printed
        return status, json.loads((tmp_path / "result.json").read_text()), printed

    return run


ONE_EACH = ["--dropout", "0", "--steps", "4", "--profile-steps", "0", "--warmup", "1"]


def test_without_dropout_all_variants_train_alike(measured):
    variants = ("stock", "norms", "patched", "loss")
    status, results, printed = measured(*ONE_EACH, "--variants", *variants)
    assert status == 0 and results["models"].keys() == {"bert", "gpt2", "llama"}
    for name, result in results["models"].items():
        assert not result["interrupted"] and tuple(result["variants"]) == variants
        stock = result["variants"]["stock"]
        assert len(set(stock["losses"])) == 4
        for variant, row in result["variants"].items():
            # The fused loss has 0.001 ticks beside cross entropy: as many, at an even guess, plus a probability.
            classes = 2 if name == "bert" else 50
            share = 1.001 if variant == "loss" else 1
            ours = [loss - (0.001 / classes if variant == "loss" else 0) for loss in row["losses"]]
            assert ours == pytest.approx([share * loss for loss in stock["losses"]], abs=1e-4)
            assert len(row["seconds"]) == len(row["cpu_seconds"]) == 4 and min(row["cpu_seconds"]) > 0
            assert row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
        assert result["logits_off"].keys() == {*variants} and max(result["logits_off"].values()) < 1e-5
        assert re.match(r"5 norms swapped, 0 left; 0 residual", result["variants"]["norms"]["note"])
        assert re.match(r"5 norms swapped, 0 left; [2-9] residual", result["variants"]["patched"]["note"])
    for key in ("commit", "device", "versions", "command", "load", "threads"):
        assert results["environment"][key]
    assert len(re.findall(r"^  patched( +\d\S+ \(\S+ to \S+\)){3}   5 norms", printed, re.MULTILINE)) == 3


def test_compiled_variants_train_alike(measured, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    status, results, _ = measured(*ONE_EACH, "--models", "bert", "--variants", "compiled", "stock", "both")
    rows = results["models"]["bert"]["variants"]
    assert status == 0 and tuple(rows) == ("stock", "compiled", "both")
    for row in rows.values():
        assert row["losses"] == pytest.approx(rows["stock"]["losses"], abs=1e-4)


def test_the_patched_variants_run_our_kernels(e2e, monkeypatch):
    calls = []
    for name in ("add_layer_norm", "layer_norm", "ticks_cross_entropy"):
        function = getattr(FF, name)

        def spy(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(FF, name, spy)
    size = e2e.Size(2, 32, 50, 2, 8, 0.1)
    stock, one = e2e.build("bert", size), e2e.batch("bert", size, torch.device("cpu"), 0)
    expected = {"stock": [0, 0, 0], "norms": [0, 5, 0], "patched": [4, 1, 0], "loss": [4, 1, 1]}
    for name, counts in expected.items():
        variant = e2e.make_variant(name, stock)
        calls.clear()
        variant.step(*one)
        assert [calls.count(n) for n in ("add_layer_norm", "layer_norm", "ticks_cross_entropy")] == counts, name
        moved = [not torch.equal(p, q) for p, q in zip(variant.model.parameters(), stock.parameters(), strict=True)]
        assert any(moved) and not any(p.requires_grad and p.grad is not None for p in stock.parameters())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_orders_are_balanced(e2e, count):
    names = [*"abcd"[:count]]
    turns = [order for _, order in zip(range(2 * count), e2e.orders(names), strict=False)]
    for a in names:
        assert [sum(turn[i] == a for turn in turns) for i in range(count)] == [2] * count
        assert all(sum(turn.index(a) < turn.index(b) for turn in turns) == count for b in names if b != a)


def test_ratios_are_of_paired_steps(e2e):
    result = {
        "variants": {
            "stock": {"seconds": [1.0, 2.0, 8.0, 4.0, 6.0], "cpu_seconds": [3.0] * 5},
            "patched": {"seconds": [0.5, 1.0, 2.0, 4.0, 12.0], "cpu_seconds": [2.0] * 5},
            "short": {"seconds": [2.0], "cpu_seconds": [6.0]},
        }
    }
    e2e.summarize(result)
    assert result["variants"]["patched"]["ratio"] == [0.75, 2.0, 3.0]  # of 2, 2, 4, 1, 0.5
    assert result["variants"]["patched"]["ms"][1] == 2000.0
    assert result["variants"]["stock"]["ratio"] == [1.0, 1.0, 1.0]
    assert result["variants"]["short"]["ratio"] == [0.5, 0.5, 0.5]
    assert [row["cpu_ratio"][1] for row in result["variants"].values()] == [1.0, 1.5, 0.5]
    alone = {"variants": {"patched": {"seconds": [1.0], "cpu_seconds": [1.0]}}}
    e2e.summarize(alone)
    assert "ms" in alone["variants"]["patched"] and "ratio" not in alone["variants"]["patched"]


def test_an_interrupted_run_keeps_its_rows(measured, e2e, monkeypatch):
    step, calls = e2e.Variant.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2 + 3 * 2 + 2:  # warm-up, three steps of both, and half of the fourth
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(e2e.Variant, "step", interrupted)
    options = ["--models", "bert", "llama", "--variants", "stock", "patched", "--warmup", "1", "--steps", "9"]
    status, results, printed = measured(*options)
    assert status == 130 and results["models"].keys() == {"bert"}
    rows = results["models"]["bert"]["variants"]
    assert results["models"]["bert"]["interrupted"] and ", interrupted" in printed
    assert sorted(len(row["seconds"]) for row in rows.values()) == [3, 4]
    assert all(row["ratio"] for row in rows.values())


def test_a_run_that_dies_has_left_its_rows(e2e, tmp_path, monkeypatch):
    step, calls = e2e.Variant.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return step(self, *args)

    monkeypatch.setattr(e2e.Variant, "step", dying)
    with pytest.raises(MemoryError):
        options = ["--models", "bert", "--variants", "stock", "--warmup", "0", "--steps", "9"]
        e2e.main([*TINY, *options, "--output", str(tmp_path / "result")])
    results = json.loads((tmp_path / "result.json").read_text())
    assert len(results["models"]["bert"]["variants"]["stock"]["seconds"]) == 5
    assert "5 steps of 9, interrupted" in (tmp_path / "result.txt").read_text()


def test_warming_up_leaves_no_trace(measured):
    losses = []
    for steps in ("0", "3"):
        options = ["--models", "bert", "--variants", "stock", "patched", "--steps", "3", "--profile-steps", "0"]
        rows = measured(*options, "--warmup", steps)[1]["models"]["bert"]["variants"]
        losses.append({name: row["losses"] for name, row in rows.items()})
    assert losses[0] == losses[1]


def test_a_variant_that_cannot_run_leaves_the_others(measured, monkeypatch):
    def compile(model):
        def fail(**inputs):
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    status, results, printed = measured("--models", "gpt2", "--steps", "2", "--profile-steps", "0", "--warmup", "1")
    rows = results["models"]["gpt2"]["variants"]
    assert status == 0 and rows["compiled"]["failed"] == "RuntimeError: no compiler here"
    assert "compiled  RuntimeError: no compiler here\n" in printed
    assert len(rows["patched"]["seconds"]) == len(rows["stock"]["seconds"]) == 2


# ------------------------------------------------------------------------------------------------- where the time goes


def kinds(e2e, function, model: nn.Module, norms: bool = True) -> dict[tuple[str, bool], set[str]]:
    """(name of an operator, whether it ran in backward): the kinds it was put down to."""
    with e2e.marked(model, norms=norms), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        function()
    events, found = profiler.events(), {}
    kinds_of = e2e.kinds_of_events(events)
    for event in events:
        ancestors, backward = event, False
        while ancestors is not None:
            backward |= ancestors.name.startswith("autograd::engine")
            ancestors = ancestors.cpu_parent
        found.setdefault((event.name, backward), set()).add(kinds_of[event.id])
    return found


def test_operators_of_backward_count_as_what_they_are_the_gradient_of(e2e):
    x = torch.randn(64, 32, requires_grad=True)
    found = kinds(e2e, lambda: F.dropout(x, 0.5).sum().backward(), nn.Identity())
    assert found["aten::bernoulli_", False] == found["aten::mul", False] == found["aten::mul", True] == {"dropout"}

    found = kinds(e2e, lambda: (x * 3).sum().backward(), nn.Identity())
    assert found["aten::mul", False] == found["aten::mul", True] == {"other"}

    constant = torch.ones(64, 32)  # an operator that makes no node is recorded with the number of the next one
    found = kinds(e2e, lambda: (F.dropout(constant, 0.5), (x * 3).sum().backward()), nn.Identity())
    assert found["aten::mul", True] == {"other"}

    w = torch.randn(32, 32, requires_grad=True)
    found = kinds(e2e, lambda: (F.linear(x, w) + x).square().sum().backward(), nn.Identity())
    assert found["aten::mm", True] == {"matmul"} and found["aten::add", False] == {"add"}


def test_norms_of_elementary_operators_are_known(e2e):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, x = LlamaRMSNorm(32), torch.randn(4, 32, requires_grad=True)
    found = kinds(e2e, lambda: norm(x).sum().backward(), norm)
    for name in ("aten::pow", "aten::rsqrt", "aten::mean"):
        assert found[name, False] == {"norm"}
    assert found["aten::mul", False] == found["aten::mul", True] == {"norm"}
    assert not norm._forward_hooks and not norm._forward_pre_hooks, "the marks are taken off"

    fused = nn.Sequential(nn.LayerNorm(32))
    fused_norm.patch(fused)
    assert any("norm" in k for k in kinds(e2e, lambda: fused(x).sum().backward(), fused, norms=False).values())
    x, y = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    found = kinds(e2e, lambda: FF.add_layer_norm(x, y, (32,), dropout_p=0.5)[0].sum().backward(), nn.Identity())
    assert {k for kind in found.values() for k in kind} >= {"add + norm"}
    assert not {k for kind in found.values() for k in kind} & {"norm", "dropout", "add"}


def test_the_breakdown_shows_what_patch_did(measured):
    variants = ["stock", "norms", "patched"]
    status, results, printed = measured("--steps", "1", "--profile-steps", "3", "--variants", *variants)
    assert status == 0
    for name, result in results["models"].items():
        stock, norms, patched = (result["breakdown"][v] for v in variants)
        assert stock["add + norm"] == norms["add + norm"] == 0 < patched["add + norm"]
        assert all(parts[kind] > 0 for parts in (stock, norms) for kind in ("norm", "matmul", "optimizer", "loss"))
        if name == "bert":  # dropout is left in the embeddings alone, no residual connection
            assert 0 < patched["dropout"] < stock["dropout"] and patched["add"] < stock["add"]
        if name == "llama":
            assert stock["dropout"] == 0
        assert all(parts["outside operators"] > 0 for parts in result["breakdown"].values())
    assert len(re.findall(r"^  add \+ norm +0\.00 ", printed, re.MULTILINE)) == 3


def test_the_parts_are_the_whole(e2e):
    size, device = e2e.Size(1, 32, 50, 2, 8, 0.0), torch.device("cpu")
    variant = e2e.make_variant("stock", e2e.build("bert", size))
    began = time.perf_counter()
    parts = e2e.profiled_step(variant, e2e.batch("bert", size, device, 0), device)
    whole = (time.perf_counter() - began) * 1e3
    assert all(ms >= 0 for ms in parts.values()) and 0 < sum(parts.values()) < whole


def test_the_breakdown_takes_the_least_of_each_operator(e2e, monkeypatch):
    a, b, outside = ("matmul", "aten::mm", 0), ("matmul", "aten::mm", 1), (e2e.OUTSIDE, "", 0)
    steps = [{a: 1.0, b: 5.0, outside: 9.0}, {a: 4.0, b: 2.0, outside: 8.0}, {a: 3.0, b: 3.0, outside: 7.0}]
    monkeypatch.setattr(e2e, "profiled_step", lambda variant, one, device: steps[one])
    variant = e2e.Variant("stock", nn.Identity(), nn.Identity(), F.cross_entropy, None)
    parts = e2e.breakdown([variant], [0, 1, 2], torch.device("cpu"))["stock"]
    assert parts["matmul"] == 3.0 and parts[e2e.OUTSIDE] == 7.0 and sum(parts.values()) == 10.0


@pytest.mark.parametrize("arguments", [["--dropout", "1"], ["--steps", "0"], ["--warmup", "-1"], ["--variants", "no"]])
def test_unusable_arguments_are_refused(e2e, arguments, capsys):
    with pytest.raises(SystemExit):
        e2e.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
