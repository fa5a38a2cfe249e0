"""examples/pretrain_lm.py from end to end, on a GPT of two narrow layers and a folder of made-up Python files."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["total", "count", "value", "result", "items", "found"]


@pytest.fixture(scope="module")
def script():
    """The module, imported as the interpreter runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("pretrain_lm")


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    """An empty folder to work in; threads and signals are put back."""
    monkeypatch.chdir(tmp_path)
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    torch.set_num_threads(threads)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def write_files(folder: Path, names: list[str]) -> None:
    for name in names:
        draw = random.Random(name)
        lines = [f"def {draw.choice(NAMES)}_{draw.choice(NAMES)}(self):\n    return self\n" for _ in range(60)]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_files(folder, [f"package{i % 3}/module{i}.py" for i in range(20)])
    return folder


@pytest.fixture
def small(script, text):
    """27 steps; dev is looked at after 10 and 20, a checkpoint is written after 8, 16, 24 and 27."""
    return script.Config(
        steps=27,
        batch_size=8,
        context=16,
        vocabulary=300,
        layers=2,
        width=16,
        heads=2,
        lr=2e-2,
        dev_every=10,
        dev_tokens=256,
        test_tokens=512,
        text=text,
        threads=1,
        save_every=8,
    )


def as_arguments(config) -> list[str]:
    arguments = ["--device", "cpu"]
    for key in {field.name for field in fields(config)} - {"device", "checkpoint", "resume"}:
        arguments += [f"--{key.replace('_', '-')}", str(getattr(config, key))]
    return arguments


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two checkpoints differ by as much as a bit; the seconds are left out."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {a.keys() ^ b.keys()}"]
        return [d for key in a if key != "seconds" for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: lengths {len(a)} and {len(b)}"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} and {b}"]


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------- the whole run


def test_the_command_from_end_to_end(script, small, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert script.main([*as_arguments(replace(small, seed=3)), "--output", "out/metrics.json"]) == 0
    output, error = capsys.readouterr()
    for line in ("accuracy of the next token", "NLL, nats a token", "NLL, bits a byte", "entropy", "calibration error"):
        assert re.search(rf"^  {line}.* \d+\.\d{{4}}", output, re.MULTILINE), f"no line {line!r}:\n{output}"
    assert re.search(r"^  27 steps in .* s, \d+ tokens/s$", output, re.MULTILINE)
    assert "A sample:\n\n\ndef " in output and "[27/27" in error and "step 20: loss" in error
    assert (tmp_path / "runs/pretrain_lm/curves.png").read_bytes().startswith(b"\x89PNG")

    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["config"]["seed"] == 3 and metrics["config"]["loss"] == "ticks_cross_entropy"
    assert metrics["steps"] == len(metrics["losses"]) == 27 and [step for step, _ in metrics["dev"]] == [10, 20]
    assert metrics["nll"] < 0.6 * metrics["unigram_nll"] and metrics["accuracy"] > 0.5  # the names are chance, no more
    assert load(tmp_path / "runs/pretrain_lm/checkpoint.pt")["losses"] == metrics["losses"]


@pytest.mark.parametrize("loss", ["cross_entropy", "ticks_cross_entropy", "ticks"])
def test_the_loss_goes_down(script, small, loss):
    metrics = script.train(replace(small, loss=loss, ticks_weight=0.1))
    first, last = metrics["losses"][0], sum(metrics["losses"][-5:]) / 5
    floor = {"cross_entropy": 0, "ticks_cross_entropy": 0.1, "ticks": 1}[loss]  # ticks is 1 where p is 1
    assert floor < last < 0.4 * first
    assert metrics["dev"][1][1] < metrics["dev"][0][1] and metrics["nll"] < 0.6 * metrics["unigram_nll"]
    assert {"accuracy", "nll", "ece", "entropy", "steps", "seconds"} <= metrics.keys()


def test_without_matplotlib_all_but_the_plot_is_there(script, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes its import fail
    assert script.main([*as_arguments(replace(small, steps=2)), "--output", "metrics.json"]) == 0
    assert "No plot: matplotlib is missing: pip install 'fused_norm[examples]'" in capsys.readouterr().out
    assert (tmp_path / "metrics.json").is_file()


def test_the_study_runs_differ_in_what_is_studied_alone(script):
    a, b = script.study_config("cross_entropy", 0.0, 0), script.study_config("ticks", 0.5, 7)
    assert (b.loss, b.ticks_weight, b.seed, b.threads, b.checkpoint) == ("ticks", 0.5, 7, 1, None)
    assert replace(a, loss="ticks", ticks_weight=0.5, seed=7) == b


# ----------------------------------------------------------------------------------------------- the loss and the model


@pytest.mark.parametrize(
    ("loss", "ticks_weight", "ce", "ticks"),
    [("cross_entropy", 0.7, 1, 0), ("ticks_cross_entropy", 0.7, 1, 0.7), ("ticks", 0.7, 0, 1)],
)
def test_the_loss_and_its_gradients_are_the_formula(script, small, loss, ticks_weight, ce, ticks):
    torch.manual_seed(0)
    model = script.LanguageModel(50, small).double()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # predictions from sure to unsure
    tokens = torch.randint(50, (3, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    value = script.loss_of(model, inputs, targets, replace(small, loss=loss, ticks_weight=ticks_weight))
    gradients = torch.autograd.grad(value, list(model.parameters()))

    log_p = (model(inputs) @ model.embedding.weight.T).log_softmax(-1).gather(-1, targets[..., None])
    truth = (ce * -log_p + ticks * (log_p.exp() - log_p)).mean()
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)
    for (name, _), ours, theirs in zip(
        model.named_parameters(), gradients, torch.autograd.grad(truth, list(model.parameters())), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm(), name


def test_a_later_token_changes_no_earlier_hidden_state(script, small):
    torch.manual_seed(1)
    model = script.LanguageModel(50, small)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = torch.randint(50, (2, 16))
    before = model.logits(model(tokens))
    for position in range(16):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        after = model.logits(model(changed))
        assert torch.equal(after[:, :position], before[:, :position]), f"token {position} is seen before its turn"
        moved = (after[:, position:] - before[:, position:]).abs().amax(-1)
        assert (moved > 1e-4).all(), f"token {position} is not seen by all that come after it"


def test_learning_rate_rises_and_falls(script, small):
    config = replace(small, steps=100, lr=2.0)
    rates = [script.learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([2 * (100 - step) / 90 for step in range(10, 100)])


# ----------------------------------------------------------------------------------------------- checkpoint and resume


@pytest.mark.parametrize("step", [1, 10, 13, 24])  # 10: a look at dev comes after it; 24: a checkpoint
def test_interrupted_and_resumed_equals_uninterrupted(step, script, small, tmp_path, capsys, monkeypatch):
    arguments = as_arguments(small)
    assert script.main([*arguments, "--checkpoint", "whole.pt", "--output", "whole.json"]) == 0
    original, calls = script.train_step, []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", press_ctrl_c)
        assert script.main([*arguments, "--checkpoint", "parts.pt", "--output", "parts.json"]) == 130
    assert f"stopped after step {step} of 27; add --resume to go on from parts.pt" in capsys.readouterr().out
    assert len(load(tmp_path / "parts.pt")["losses"]) == step and not (tmp_path / "parts.json").exists()

    torch.manual_seed(12345)  # a new process does not start where the old one stopped
    assert script.main([*arguments, "--checkpoint", "parts.pt", "--output", "parts.json", "--resume"]) == 0
    assert f"resumed parts.pt after step {step} of 27" in capsys.readouterr().out
    whole, parts = load(tmp_path / "whole.pt"), load(tmp_path / "parts.pt")
    assert len(whole["optimizer"]["state"]) == len(whole["model"]) and not differences(whole, parts)
    whole, parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts"))
    assert all(whole[key] == parts[key] for key in ("nll", "accuracy", "ece", "entropy", "dev", "sample"))


def test_a_finished_run_resumes_to_the_same_metrics(script, small, tmp_path):
    config = replace(small, checkpoint=tmp_path / "done.pt")
    first, again = script.train(config), script.train(replace(config, resume=True))
    assert not differences(first, again)


def test_interrupted_writing_keeps_the_old_checkpoint(script, small, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    config = replace(small, checkpoint=file)
    save, saved = torch.save, []

    def power_cut(state, where):
        saved.append(where)
        if len(saved) == 2:
            Path(where).write_bytes(b"half a checkpoi")
            raise KeyboardInterrupt
        save(state, where)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", power_cut)
        with pytest.raises(KeyboardInterrupt):
            script.train(config)
    assert len(load(file)["losses"]) == 8, "the first checkpoint is gone"
    resumed = script.train(replace(config, resume=True))
    assert not differences(resumed["losses"], script.train(small)["losses"])


def test_ctrl_c_twice_stops_at_once(script, small, tmp_path, capsys, monkeypatch):
    def impatient(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(script, "train_step", impatient)
    assert script.main([*as_arguments(small), "--checkpoint", "checkpoint.pt"]) == 130
    assert "stopped at once" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists(), "a half-done step was saved"


def test_resume_refuses_what_would_not_be_the_same_run(script, small, tmp_path, capsys):
    write_files(tmp_path / "text", [f"module{i}.py" for i in range(10)])
    arguments = [*as_arguments(replace(small, steps=2, text=tmp_path / "text")), "--checkpoint", "c.pt"]
    assert script.main([*arguments, "--resume"]) == 1
    assert "there is no checkpoint c.pt" in capsys.readouterr().err
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--resume", "--threads", "1", "--save-every", "1"]) == 0
    assert script.main([*arguments, "--resume", "--ticks-weight", "0.5"]) == 1
    assert "--ticks-weight is 0.5, but c.pt was made with 0.001" in capsys.readouterr().err
    with (tmp_path / "text/module3.py").open("a") as file:
        file.write("pass\n")
    script.load_corpus.cache_clear()
    assert script.main([*arguments, "--resume"]) == 1
    assert re.search(r"the text is \w{64}, but c\.pt was made with \w{64}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "focal"}, r"'focal' is not a loss; the losses are cross_entropy, ticks_cross_entropy, ticks"),
        ({"vocabulary": 256}, r"a vocabulary of 256 is too small"),
        ({"width": 18, "heads": 4}, r"a width of 18 is not divided evenly by 4 heads"),
        ({"context": 4096, "batch_size": 1}, r"the dev files come to 0 windows of 4096 tokens; it takes 1$"),
        ({"batch_size": 10**6}, r"the train files come to \d+ windows of 16 tokens; it takes 1000000$"),
        ({"text": Path("nowhere")}, r"nowhere holds 0 readable \*\.py files"),
    ],
)
def test_what_will_not_do_is_a_message(changes, message, script, small):
    with pytest.raises(script.UsageError, match=message):
        script.train(replace(small, **changes))


# ------------------------------------------------------------------------------------------------------------- the text


def any_text(draw: random.Random) -> str:
    """Words, spaces and punctuation of ASCII, and characters from all of Unicode, lone surrogates included."""
    kinds = [
        lambda: draw.choice(NAMES).title(),
        lambda: chr(draw.randrange(128)),
        lambda: chr(draw.randrange(0x110000)),
        lambda: chr(draw.randrange(0xD800, 0xE000)),
        lambda: draw.choice([" ", "  ", "\n", "\n    ", "\r\n", "\t", "_", "\0", "é", "e\u0301", "\u2028", "😀"]),
    ]
    return "".join(draw.choice(kinds)() for _ in range(draw.randrange(30)))


def test_tokenizer_gives_back_any_text(script):
    draw = random.Random(0)
    for tokenizer in (script.Tokenizer([], 257), script.Tokenizer([any_text(draw) for _ in range(300)], 600)):
        for example in ["", "\ud83d\ude00", *(any_text(draw) for _ in range(2000))]:
            ids = tokenizer.encode(example)
            assert tokenizer.decode(ids) == example
            assert int(tokenizer.lengths[ids].sum()) == len(example.encode("utf-8", "surrogatepass"))
    assert len(tokenizer) == 600


def test_tokenizer_knows_the_frequent_pieces_and_splits_the_others(script):
    tokenizer = script.Tokenizer([" total" * 9 + " count" * 5 + " found" * 2], 258)
    assert tokenizer.tokens[256:] == [b" total", b" count"]
    assert tokenizer.encode(" total count") == [256, 257]
    assert tokenizer.encode(" totals") == [256, ord("s")]
    assert tokenizer.encode(" found") == list(b" found")
    assert tokenizer.decode([256, 0xFF]) == " total\ufffd", "a model may write what is no UTF-8"
    assert script.PIECE.findall("\n\n    readHTTPServer(my_x, 12345)  #") == (
        ["\n\n    ", "read", "HTTP", "Server", "(", "my", "_", "x", ",", " 123", "45", ")", "  ", "#"]
    )


def test_the_split_is_by_file_and_always_the_same(script, small, tmp_path):
    names = [f"module{i}.py" for i in range(20)]
    left_out = ["test/a.py", "inner/tests/b.py", "site-packages/c/d.py", "_sysconfigdata__x.py", "readme.txt"]
    write_files(tmp_path / "one", names)
    write_files(tmp_path / "two", [*left_out, *reversed(names)])
    (tmp_path / "two/latin.py").write_bytes(b"# \xe9\n")
    one, two = (script.load_corpus(tmp_path / folder, 400) for folder in ("one", "two"))
    assert (one.fingerprint, one.files, one.train, one.dev, one.test) == (
        (two.fingerprint, two.files, two.train, two.dev, two.test)
    )
    files = {name: (tmp_path / "one" / name).read_text() + "\0" for name in names}
    parts = [one.tokenizer.decode(part) for part in (one.train, one.dev, one.test)]
    assert [part.count("\0") for part in parts] == [16, 2, 2]
    for text in files.values():
        assert sum(text in part for part in parts) == 1
    assert one.bytes == sum(map(len, files.values()))
    assert script.Tokenizer([parts[0]], 400).tokens == one.tokenizer.tokens, "dev or test had a say in the vocabulary"
    assert one.test == [n for name in ("module4.py", "module3.py") for n in one.tokenizer.encode(files[name])]


def test_the_standard_library_is_text_enough(script):
    config = script.Config()
    corpus = script.load_corpus(config.text, config.vocabulary)
    assert corpus.files > 300 and len(corpus.tokenizer) == config.vocabulary
    tokens = config.steps * config.batch_size * config.context
    assert len(corpus.train) > tokens, "the default run would see the text more than once"
    assert corpus.bytes > 3 * sum(map(len, (corpus.train, corpus.dev, corpus.test)))


def test_windows_hold_every_token_once(script):
    windows = script.Windows(list(range(103)), 10)
    assert windows.inputs.flatten().tolist() == list(range(100))
    assert windows.targets.flatten().tolist() == list(range(1, 101))
    for part, rows in ((10, [0]), (20, [0, 9]), (40, [0, 3, 6, 9]), (10**6, list(range(10)))):
        assert windows.spread(part).tolist() == rows

    epochs = [[windows.rows_of_step(3 * epoch + i, 3, seed=0).tolist() for i in range(3)] for epoch in range(2)]
    for epoch in epochs:
        assert len({row for rows in epoch for row in rows}) == 9, "a window came twice in an epoch"
    assert epochs[0] != epochs[1] and epochs[0][0] != windows.rows_of_step(0, 3, seed=1).tolist()


# ----------------------------------------------------------------------------------------------------------- evaluation


def direct_metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """From the definitions, a row at a time, in Python's own numbers."""
    nll, entropy, right, bins = 0.0, 0.0, 0, [[] for _ in range(15)]
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        e = [math.exp(z - max(row)) for z in row]
        p = [x / sum(e) for x in e]
        best = p.index(max(p))
        nll -= math.log(p[target])
        entropy -= sum(x * math.log(x) for x in p if x > 0)
        right += best == target
        bins[next(b for b in range(15) if p[best] <= (b + 1) / 15 or b == 14)].append((p[best], best == target))
    n = len(targets)
    gaps = [abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b)) * len(b) for b in bins if b]
    return {"accuracy": right / n, "nll": nll / n, "entropy": entropy / n, "ece": sum(gaps) / n}


def test_scores_are_the_definitions(script):
    logits = torch.randn(400, 7) * torch.linspace(0.1, 6, 400)[:, None]
    confidence, best = logits.softmax(-1).max(-1)
    # Too sure in one bin and too unsure in the next, so that bins put together or cut elsewhere come to less.
    mostly_right = (confidence * 15).ceil() % 2 == 0
    targets = torch.where(torch.rand(400) < torch.where(mostly_right, 1.0, 0.1), best, (best + 1) % 7)
    scores = script.Scores()
    for z, t in zip(logits.split(37), targets.split(37), strict=True):
        scores.add(z, t)
    assert (scores.bins[0] > 0).sum() > 10
    assert scores.metrics() == pytest.approx(direct_metrics(logits, targets), rel=1e-5)


def test_certain_predictions_are_scored(script):
    scores = script.Scores()
    scores.add(torch.tensor([[200.0, 0.0], [200.0, 0.0], [0.0, 200.0], [0.0, 200.0]]), torch.tensor([0, 0, 1, 0]))
    assert scores.metrics() == {"accuracy": 0.75, "nll": 50.0, "ece": 0.25, "entropy": 0.0}


def test_evaluation_holds_few_logits_at_once(script, small, monkeypatch):
    torch.manual_seed(2)
    model = script.LanguageModel(40, replace(small, context=32))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    windows = script.Windows(torch.randint(40, (1500,)).tolist(), 32)
    add, seen = script.Scores.add, []

    def spy(self, logits, targets):
        seen.append((logits, targets))
        add(self, logits, targets)

    monkeypatch.setattr(script.Scores, "add", spy)
    rows = windows.spread(10**6)
    metrics = script.evaluate(model, windows, rows, "cpu")
    assert max(len(logits) for logits, _ in seen) == script.EVAL_ROWS < sum(len(t) for _, t in seen)
    whole = model.logits(model(windows.inputs)).flatten(0, 1)
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), whole, rtol=1e-4, atol=1e-4)
    assert metrics == pytest.approx(direct_metrics(whole, windows.targets.flatten()), rel=1e-4)


def test_bits_per_byte_and_frequencies_are_over_the_tokens_tested(script, small):
    metrics = script.train(replace(small, steps=1))
    corpus = script.load_corpus(small.text, small.vocabulary)
    count = (len(corpus.test) - 1) // 16
    rows = torch.linspace(0, count - 1, 32).long().tolist()  # 512 tokens
    tested = [token for row in rows for token in corpus.test[row * 16 + 1 : row * 16 + 17]]
    size = sum(len(corpus.tokenizer.tokens[token]) for token in tested)
    assert metrics["test_tokens"] == len(tested) == 512
    assert metrics["bits_per_byte"] == pytest.approx(metrics["nll"] * 512 / math.log(2) / size)
    total = len(corpus.train) + len(corpus.tokenizer)
    nll = [-math.log((corpus.train.count(token) + 1) / total) for token in tested]
    assert metrics["unigram_nll"] == pytest.approx(sum(nll) / 512)
