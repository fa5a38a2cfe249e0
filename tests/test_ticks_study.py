"""examples/ticks_study.py on the small BERT of test_finetune.py: runs are resumed, shared, chosen and averaged."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import signal
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_finetune import EXAMPLES, make_small

import fused_norm.functional as FF


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("ticks_study")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    arguments = [*make_small(tmp_path_factory.mktemp("small")), "--norm", "fused", "--epochs", "1"]
    return shlex.join(arguments[: arguments.index("--threads")] + arguments[-4:])


@pytest.fixture
def study(script, small, tmp_path, monkeypatch):
    """The example's main() on the small model, one seed, in an empty folder; threads are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "SMALL", "--layers 1")
    threads = torch.get_num_threads()

    def run(*arguments: str, output: str = "out") -> int:
        files = ["--output", output, "--summary", f"{output}.json", "--bert", small]
        return script.main([*files, "--seeds", "0", *arguments])

    yield run
    torch.set_num_threads(threads)


def scores(file: Path) -> list[dict]:
    """All runs in a summary, without the seconds."""
    parts = json.loads(file.read_text())["parts"].values()
    return [{k: v for k, v in run.items() if "seconds" not in k} for part in parts for run in part["runs"]]


def test_an_interrupted_study_goes_on_where_it_was(study, script, tmp_path, capsys, monkeypatch):
    train_step, calls = script.finetune_bert.train_step, []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == 10:  # in the second of five runs of seven steps
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(script.finetune_bert, "train_step", press_ctrl_c)
    assert study("--part", "bert") == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    first, second = (f"bert-{name}-0" for name in ("cross-entropy", "0.001-ticks"))
    finished = tmp_path / "out" / f"{first}.json"
    assert [file.name for file in (tmp_path / "out").glob("*.json")] == [finished.name]
    assert (tmp_path / "out" / second / "checkpoint.pt").exists()
    before = finished.stat().st_mtime_ns

    assert study("--part", "bert") == 0
    assert len(calls) == 5 * 7, "a step was done twice, or left out"
    assert finished.stat().st_mtime_ns == before
    assert not list((tmp_path / "out").glob("*/checkpoint.pt"))
    output = capsys.readouterr().out
    assert "| cross entropy | 1 |" in output and "| ticks alone | 1 |" in output

    assert study("--part", "bert", output="whole") == 0
    assert len(calls) == 10 * 7
    assert scores(tmp_path / "out.json") == scores(tmp_path / "whole.json")
    assert len({run["test"]["nll"] for run in scores(tmp_path / "out.json")}) == 5, "the losses are one and the same"

    assert study("--part", "bert") == 0
    assert len(calls) == 10 * 7, "a finished study trained again"
    assert study("--part", "bert", "--bert", "--norm torch") == 1
    assert "was made with `--model" in capsys.readouterr().err


def test_distillation_and_tokens(study, script, tmp_path, capsys, monkeypatch):
    """Runs with the same options are one run; test is looked at for lambda = 0 and the chosen one alone."""
    monkeypatch.setattr(script, "LAMBDAS", (0.0, 0.1, 5.0))
    tested, test, evaluate = [], script.Study.test, script.finetune_bert.evaluate

    def spy(self, model):
        tested.append(hasattr(model, "word_head"))
        return test(self, model)

    def better_with_words(model, data, title):
        metrics, predicted = evaluate(model, data, title)
        if title.startswith("dev") and hasattr(model, "word_head"):
            metrics = metrics._replace(nll=0.01 if not better_with_words.called else 0.02)
            better_with_words.called = True
        return metrics, predicted

    better_with_words.called = False
    monkeypatch.setattr(script.Study, "test", spy)
    monkeypatch.setattr(script.finetune_bert, "evaluate", better_with_words)
    assert study("--part", "kd", "--part", "tokens") == 0
    assert "chosen on dev: lambda = 0.1" in capsys.readouterr().out
    runs = {run["variant"]: run for run in scores(tmp_path / "out.json")}
    assert len(runs) == 7
    assert runs["3 layers alone"]["test"] == runs["lambda = 0"]["test"]
    assert len({runs[v]["test"]["nll"] for v in runs if v.startswith("taught") or "teacher" in v}) == 3
    assert "test" in runs["lambda = 0.1"] and "test" not in runs["lambda = 5"]
    assert tested.count(True) == 1

    # The weights that were tested are those of the run chosen, not new ones.
    args = script.finetune_bert.parse_arguments(
        [*shlex.split(runs["lambda = 0.1"]["options"]), "--output", str(tmp_path)]
    )
    task = script.finetune_bert.load_task(args)
    file = tmp_path / "out" / "tokens-lambda-0.1-0" / "checkpoint.pt"
    model = script.finetune_bert.load_best(file, task.directory, "cpu")
    assert evaluate(model, task.test, "test")[0]._asdict() == runs["lambda = 0.1"]["test"]

    trained = []
    monkeypatch.setattr(script.finetune_bert, "train", lambda *args: trained.append(args))
    assert study("--part", "kd", "--part", "tokens") == 0
    assert not trained and tested.count(True) == 1


def test_the_language_model_is_trained_by_its_own_example(study, script, tmp_path, monkeypatch):
    """With a stand-in for pretrain_lm.py, which has tests of its own."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        loss: str
        ticks_weight: float
        seed: int
        threads: int | None = None
        checkpoint: Path | None = None
        resume: bool = False

    class Stop(Exception):
        pass

    configs = []

    def train(config: Config) -> dict:
        configs.append(config)
        if len(configs) == 2:
            config.checkpoint.write_text("")
            raise Stop(7)
        keys = (*script.METRICS, "bits_per_byte", "unigram_nll", "test_tokens", "steps", "parameters", "seconds")
        return dict.fromkeys(keys, config.ticks_weight)

    lm = SimpleNamespace(study_config=Config, train=train, Stop=Stop, ctrl_c_waits=script.finetune_bert.ctrl_c_waits)
    monkeypatch.setitem(sys.modules, "pretrain_lm", lm)
    assert study("--part", "lm") == 130
    assert study("--part", "lm") == 0
    assert [config.resume for config in configs] == [False, False, True, False, False, False]
    assert [(c.loss, c.ticks_weight) for i, c in enumerate(configs) if i != 1] == list(script.LOSSES.values())
    assert [run["test"]["nll"] for run in scores(tmp_path / "out.json")] == [0.0, 0.001, 0.1, 1.0, 0.0]


def test_mean_and_spread(script):
    def runs(variant: str, values: list[float]) -> list[dict]:
        return [
            {"variant": variant, "seed": seed, "test": dict.fromkeys(script.METRICS, value)}
            for seed, value in enumerate(values)
        ]

    base, other = [0.5, 0.7, 0.6], [0.8, 0.9, 0.55]
    summary = script.summarise("bert", runs("a", base) + runs("b", other))
    assert list(summary) == ["a", "b"]
    for variant, values in (("a", base), ("b", other)):
        for metric in script.METRICS:
            assert summary[variant]["test"][metric] == pytest.approx(
                {"mean": sum(values) / 3, "sd": statistics.stdev(values), "n": 3}
            )
    differences = [0.3, 0.2, -0.05]
    assert summary["b"]["test_minus_first"]["nll"] == pytest.approx(
        {"mean": 0.15, "sd": statistics.stdev(differences), "n": 3}
    )
    assert "| b | 3 | 0.7500 ± 0.1803 |" in script.tables("bert", summary)
    assert "| +0.1500 ± 0.1803 |" in script.tables("bert", summary)
    (alone,) = script.summarise("bert", runs("a", [0.5])).values()
    assert alone["test"]["nll"] == {"mean": 0.5, "sd": None, "n": 1}


@pytest.mark.parametrize(
    ("loss", "pull"),
    [
        (FF.ticks_loss, lambda p: 1 - p),
        (lambda z, t: FF.ticks_cross_entropy(z, t, ticks_weight=1.0), lambda p: 2 - p),
        (lambda z, t: FF.ticks_cross_entropy(z, t, ticks_weight=0.0), torch.ones_like),
    ],
    ids=["ticks", "cross entropy + ticks", "cross entropy"],
)
def test_what_a_loss_makes_of_true_frequencies(loss, pull):
    """docs/ticks.md: the expected loss is least at p where the frequencies are p/pull(p), scaled to sum to 1."""
    logits = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    p = logits.detach().softmax(-1)
    frequencies = p / pull(p)
    frequencies = frequencies / frequencies.sum(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(loss(logits, frequencies), logits)
    assert gradient.abs().max() < 1e-14
    (elsewhere,) = torch.autograd.grad(loss(logits, frequencies.flip(-1)), logits)
    assert elsewhere.abs().max() > 1e-3


def test_the_tables_in_the_docs_are_those_of_the_results(script):
    summary = json.loads((EXAMPLES.parent / "bench" / "results" / "ticks-study.json").read_text())
    page = (EXAMPLES.parent / "docs" / "ticks.md").read_text()
    assert summary["parts"].keys() == {"bert", "lm", "kd", "tokens"}
    for part, results in summary["parts"].items():
        again = script.summarise(part, results["runs"])
        assert script.tables(part, again) == script.tables(part, results["summary"])
        for line in script.tables(part, again).splitlines():
            assert line in page or not line.startswith("|"), f"docs/ticks.md lacks {line}"


def test_the_gradients_that_are_drawn(script, tmp_path):
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    q, log_p = 1 - p, p.log()
    expected = {
        "cross entropy": q,
        "cross entropy + 1.0 ticks": q + q**2,
        "cross entropy + 0.1 ticks": q + 0.1 * q**2,
        "ticks": q**2,
        "focal loss, gamma = 2": q**2 * (q - 2 * p * log_p),
    }
    assert expected.keys() == script.CURVES.keys()
    for name, loss in script.CURVES.items():
        torch.testing.assert_close(script.gradient_at_target(loss, p), expected[name], rtol=1e-9, atol=0)
    for file in (tmp_path / "a.svg", tmp_path / "b.svg"):
        script.draw(file)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
