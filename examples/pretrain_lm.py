"""Train a small GPT on Python's own standard library, token by token, with the ticks loss.

    python examples/pretrain_lm.py                    # cross entropy + 0.001 ticks: a few minutes on 2 cores
    python examples/pretrain_lm.py --resume           # go on after Ctrl-C: the weights come out bit for bit the same
    python examples/pretrain_lm.py --loss ticks       # or cross_entropy, to compare

The text is the *.py files of the standard library, which every Python has (without its tests and its tables of
character codes). A tenth of the files is dev, a tenth is test, and a split is by file: no part of a test file was
trained on. The vocabulary is made from the training files. It is large for so small a model, so the classifier is a
large share of the work; fused_norm's linear loss takes hidden states and the classifier's weight, and the logits of a
batch are never in memory at once. Test is looked at once, at the end.

`train(Config(...))` does the same from Python and returns the metrics.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: steadier timings where cores are shared
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_norm
import fused_norm.functional as FF
from fused_norm.progress import Progress

LOSSES = ("cross_entropy", "ticks_cross_entropy", "ticks")
EVAL_BATCH_SIZE = 16  # windows
EVAL_ROWS = 256  # rows whose logits are in memory at once
BINS = 15  # of the expected calibration error


class Stop(Exception):
    """Ctrl-C was pressed and the current step is complete and saved; the argument is the number of steps done."""


class UsageError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class Config:
    """A run. The defaults take a few minutes on 2 cores."""

    loss: str = "ticks_cross_entropy"  # one of LOSSES
    ticks_weight: float = 0.001  # for ticks_cross_entropy: the loss is cross entropy + this * ticks
    seed: int = 0  # of the first weights, the order of the windows, and the sample
    steps: int = 600
    batch_size: int = 16  # windows a step
    context: int = 128  # tokens a window
    vocabulary: int = 8192
    layers: int = 3
    width: int = 192
    heads: int = 4
    lr: float = 4e-3  # the peak, after a tenth of the steps; it falls to 0 at the end, both linearly
    dev_every: int = 50  # steps
    dev_tokens: int = 8192
    test_tokens: int = 65536
    text: Path | None = None  # a folder of *.py files; None is the standard library
    device: str = "cpu"
    threads: int | None = None
    checkpoint: Path | None = None
    save_every: int = 100  # steps
    resume: bool = False


def study_config(loss: str, ticks_weight: float, seed: int) -> Config:
    """A run for comparing losses: small enough for one core and little more than a minute."""
    return Config(
        loss,
        ticks_weight,
        seed,
        steps=500,
        batch_size=8,
        vocabulary=4096,
        layers=2,
        width=128,
        lr=4e-3,
        dev_every=100,
        test_tokens=32768,
        threads=1,
    )


# ---------------------------------------------------------------- the text


# Words with the space before them, CamelCase apart; numbers by three digits; punctuation in runs; new lines with the
# indentation after them. Every character is in some piece, so the pieces of a text joined are the text.
PIECE = re.compile(
    r"\n[ \n]*| ?[A-Z]+(?![a-z])| ?[A-Z]?[a-z]+| ?[0-9]{1,3}| ?_+| ?[^\w\s]+|[ \t]+|.",
    re.DOTALL,
)
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
END_OF_FILE = "\0"  # no source file holds one


class Tokenizer:
    """Text as numbers and back: the 256 bytes, then the most frequent pieces of ``texts``.

    A piece outside the vocabulary becomes its longest known beginning, the longest known beginning of what is left, and
    so on, at worst single bytes: so nothing is unknown, and ``decode(encode(text)) == text`` for every string.
    """

    def __init__(self, texts: list[str], size: int) -> None:
        if size <= 256:
            raise UsageError(f"a vocabulary of {size} is too small: 256 bytes and at least one piece are needed")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(PIECE.findall(text))
        frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
        longer = [data for data in map(self._bytes, frequent) if len(data) > 1]
        self.tokens = [bytes([byte]) for byte in range(256)] + longer[: size - 256]
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self.lengths = torch.tensor([len(token) for token in self.tokens])  # in bytes
        self._split = functools.cache(self._split)

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def _bytes(text: str) -> bytes:
        return text.encode("utf-8", "surrogatepass")  # a str may hold halves of surrogate pairs, which UTF-8 refuses

    def _split(self, piece: str) -> tuple[int, ...]:
        data, ids = self._bytes(piece), []
        while data:
            end = next(end for end in range(len(data), 0, -1) if data[:end] in self.ids)
            ids.append(self.ids[data[:end]])
            data = data[end:]
        return tuple(ids)

    def encode(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._split, PIECE.findall(text))))

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens. Where their bytes are no UTF-8, as a model may write, U+FFFD stands for them."""
        data = b"".join(self.tokens[number] for number in ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


class Windows:
    """Tokens cut into windows: ``inputs`` and, one token on, their ``targets``, both of (windows, context)."""

    def __init__(self, tokens: list[int], context: int) -> None:
        self.count = (len(tokens) - 1) // context
        used = torch.tensor(tokens[: self.count * context + 1])
        self.inputs, self.targets = (t.view(self.count, context) for t in (used[:-1], used[1:]))

    def rows_of_step(self, step: int, size: int, seed: int) -> Tensor:
        """Which windows step ``step`` trains on: every epoch is a new order, and the step and the seed decide it."""
        epoch, batch = divmod(step, self.count // size)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return order[batch * size : (batch + 1) * size]

    def spread(self, tokens: int) -> Tensor:
        """Windows for so many tokens (all, where there are fewer), evenly spread over the text."""
        return torch.linspace(0, self.count - 1, max(1, min(self.count, tokens // self.inputs.shape[1]))).long()


@dataclass(frozen=True)
class Corpus:
    """The text, as tokens."""

    fingerprint: str  # of every file and its name
    files: int
    bytes: int
    tokenizer: Tokenizer
    train: list[int]
    dev: list[int]
    test: list[int]


@functools.lru_cache(maxsize=2)  # a study trains on the same text many times over
def load_corpus(folder: Path | None, vocabulary: int) -> Corpus:
    """Reads the *.py files under ``folder``; a hash of a file's name decides where it stands and so its part."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    texts = {}
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        if NOT_TEXT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):  # that is how it was built
            try:
                texts[name.as_posix()] = file.read_text("utf-8") + END_OF_FILE
            except UnicodeDecodeError:
                continue  # a few are in other encodings, on purpose
            except OSError as error:
                raise UsageError(f"cannot read {file}: {error}") from error
    if len(texts) < 3:
        raise UsageError(f"{root} holds {len(texts)} readable *.py files: train, dev and test need at least one each")
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    ordered = [texts[name] for name in names]
    digest = hashlib.sha256("\0".join([*names, *ordered]).encode())
    tenth = max(1, len(ordered) // 10)
    parts = ordered[2 * tenth :], ordered[tenth : 2 * tenth], ordered[:tenth]
    tokenizer = Tokenizer(parts[0], vocabulary)
    tokens = [[number for text in part for number in tokenizer.encode(text)] for part in parts]
    return Corpus(digest.hexdigest(), len(names), sum(len(text.encode()) for text in ordered), tokenizer, *tokens)


# ---------------------------------------------------------------- the model and its loss


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = fused_norm.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = fused_norm.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    """A causal transformer, norms first. ``forward`` returns hidden states, and the classifier is the embedding."""

    def __init__(self, vocabulary: int, config: Config) -> None:
        super().__init__()
        if config.width % config.heads:
            raise UsageError(f"a width of {config.width} is not divided evenly by {config.heads} heads")
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = fused_norm.LayerNorm(config.width)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the outputs of 2 * layers matrices add up in the residual stream
                layers = 2 * config.layers if name.endswith("out.weight") else 1
                nn.init.normal_(p, std=(layers * p.shape[1]) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)


def loss_of(model: LanguageModel, inputs: Tensor, targets: Tensor, config: Config) -> Tensor:
    """The mean loss of the tokens, from hidden states: their logits are made and used up a part at a time."""
    args = model(inputs), model.embedding.weight, targets
    if config.loss == "ticks":
        return FF.linear_ticks_loss(*args)
    ticks_weight = config.ticks_weight if config.loss == "ticks_cross_entropy" else 0.0
    return FF.linear_ticks_cross_entropy(*args, ticks_weight=ticks_weight)


def build_optimizer(model: LanguageModel, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: Config) -> float:
    warm = max(1, config.steps // 10)
    return config.lr * min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm))


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, step: int, config: Config
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    loss = loss_of(model, inputs, targets, config)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()  # which also waits for a GPU to finish


# ---------------------------------------------------------------- evaluation


class Scores:
    """Sums over predictions, added to a few rows at a time."""

    def __init__(self) -> None:
        self.rows, self.correct, self.nll, self.entropy = 0, 0, 0.0, 0.0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # how many, the sum of their confidence, how many right

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """``logits`` (M, V) and ``targets`` (M,)."""
        log_p = logits.float().log_softmax(-1)
        confidence, predicted = log_p.max(-1)
        confidence, right = confidence.exp().double().cpu(), (predicted == targets).cpu()
        self.rows += len(targets)
        self.correct += int(right.sum())
        self.nll += F.nll_loss(log_p, targets, reduction="sum").item()
        self.entropy -= (log_p.exp() * log_p).sum().item()
        of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin b is (b / BINS, (b + 1) / BINS]
        self.bins += torch.stack(
            [torch.bincount(of, w, BINS) for w in (torch.ones_like(confidence), confidence, right)]
        )

    def metrics(self) -> dict[str, float]:
        """Accuracy, NLL and entropy in nats a prediction, and the expected calibration error of the top prediction."""
        return {
            "accuracy": self.correct / self.rows,
            "nll": self.nll / self.rows,
            "ece": ((self.bins[2] - self.bins[1]).abs().sum() / self.rows).item(),
            "entropy": self.entropy / self.rows,
        }


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Windows, rows: Tensor, device: str) -> dict[str, float]:
    """The metrics of :class:`Scores` over these windows, with the logits of EVAL_ROWS rows in memory at a time."""
    model.eval()
    scores = Scores()
    for batch in rows.split(EVAL_BATCH_SIZE):
        hidden = model(windows.inputs[batch].to(device)).flatten(0, 1)
        targets = windows.targets[batch].to(device).flatten()
        for h, t in zip(hidden.split(EVAL_ROWS), targets.split(EVAL_ROWS), strict=True):
            scores.add(model.logits(h), t)
    model.train()
    return scores.metrics()


def unigram_nll(train: list[int], targets: Tensor, vocabulary: int) -> float:
    """What predicting every token by its frequency in training alone would score: the least that must be beaten."""
    counts = torch.bincount(torch.tensor(train), minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[targets].mean().item()


@torch.no_grad()
def write(model: LanguageModel, tokenizer: Tokenizer, prompt: str, length: int, config: Config) -> str:
    """``prompt`` and what the model adds to it, drawn at temperature 0.8."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = tokenizer.encode(prompt)
    for _ in range(length):
        hidden = model(torch.tensor([ids[-config.context :]], device=config.device))[0, -1]
        p = (model.logits(hidden).float() / 0.8).softmax(-1).cpu()
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
    return tokenizer.decode(ids)


# ---------------------------------------------------------------- Ctrl-C and the checkpoint

stop_requested = threading.Event()


def on_ctrl_c(signum: int, frame: object) -> None:
    if stop_requested.is_set():
        raise KeyboardInterrupt  # pressed twice: stop now, without saving
    stop_requested.set()


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Here Ctrl-C (or a polite kill) only asks for a stop; `train` grants it between two steps."""
    stop_requested.clear()
    previous = {number: signal.signal(number, on_ctrl_c) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class State:
    """What a run is made of besides its Config. The number of steps done is len(losses).

    No random state is in it: the order of the windows follows from the seed and the step, and training draws nothing.
    """

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    losses: list[float]
    dev: list[tuple[int, float]]  # after how many steps, NLL
    seconds: float = 0.0


def settings(config: Config, corpus: Corpus) -> dict[str, str]:
    """What must be the same for a resumed run to give what an uninterrupted one gives."""
    free = ("checkpoint", "save_every", "resume", "threads", "text")
    same = {key: str(value) for key, value in asdict(config).items() if key not in free}
    return {**same, "text": corpus.fingerprint}


def save_checkpoint(state: State, config: Config, corpus: Corpus) -> None:
    if config.checkpoint is None:
        return
    config.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = config.checkpoint.with_name(config.checkpoint.name + ".partial")
    torch.save(
        {
            "settings": settings(config, corpus),
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            **{key: getattr(state, key) for key in ("losses", "dev", "seconds")},
        },
        partial,
    )
    partial.replace(config.checkpoint)  # a crash while writing leaves the previous checkpoint whole


def load_checkpoint(state: State, config: Config, corpus: Corpus) -> None:
    if config.checkpoint is None or not config.checkpoint.is_file():
        raise UsageError(f"--resume: there is no checkpoint {config.checkpoint}")
    checkpoint = torch.load(config.checkpoint, map_location=config.device, weights_only=True)
    for key, now in settings(config, corpus).items():
        if (then := checkpoint["settings"].get(key)) != now:
            option = "the text" if key == "text" else f"--{key.replace('_', '-')}"
            raise UsageError(f"--resume: {option} is {now}, but {config.checkpoint} was made with {then}")
    state.model.load_state_dict(checkpoint["model"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.losses, state.dev, state.seconds = (checkpoint[key] for key in ("losses", "dev", "seconds"))


# ---------------------------------------------------------------- training


def train(config: Config, verbose: bool = False) -> dict:
    """Train, then evaluate on test.

    Returns:
        The metrics of the last weights on test: ``accuracy`` of the next token, ``nll`` and ``entropy`` in nats a
        token, ``bits_per_byte``, ``ece``, and ``unigram_nll`` for comparison; ``steps``, ``seconds`` in training steps,
        ``tokens_per_second``, ``parameters``, ``losses`` of every step, ``dev`` as (steps done, NLL), and a ``sample``.

    Raises:
        UsageError: a setting or a text that will not do.
        Stop: in :func:`ctrl_c_waits`, after Ctrl-C; config.checkpoint, if it is not None, holds all that was done.
    """
    if config.loss not in LOSSES:
        raise UsageError(f"{config.loss!r} is not a loss; the losses are {', '.join(LOSSES)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    corpus = load_corpus(config.text, config.vocabulary)
    parts = [Windows(tokens, config.context) for tokens in (corpus.train, corpus.dev, corpus.test)]
    for windows, name, needed in zip(parts, ("train", "dev", "test"), (config.batch_size, 1, 1), strict=True):
        if windows.count < needed:
            raise UsageError(
                f"the {name} files come to {windows.count} windows of {config.context} tokens; it takes {needed}"
            )
    train_windows, dev_windows, test_windows = parts
    dev_rows, test_rows = dev_windows.spread(config.dev_tokens), test_windows.spread(config.test_tokens)

    torch.manual_seed(config.seed)  # the first weights
    model = LanguageModel(len(corpus.tokenizer), config).to(config.device)
    state = State(model, build_optimizer(model, config), losses=[], dev=[])
    parameters = sum(p.numel() for p in model.parameters())
    if config.resume:
        load_checkpoint(state, config, corpus)
    done = len(state.losses)
    if verbose:
        if config.resume:
            print(f"resumed {config.checkpoint} after step {done} of {config.steps}")
        print(
            f"{corpus.files} files, {corpus.bytes / 1e6:.1f} MB, {len(corpus.tokenizer)} kinds of token; "
            f"{len(corpus.train)} tokens to train on\n"
            f"{parameters / 1e6:.2f} million parameters, {model.embedding.weight.numel() / parameters:.0%} of them the "
            f"classifier, which is the embedding\n"
            f"torch {torch.__version__} on {config.device}, {torch.get_num_threads()} threads; loss: "
            f"{config.loss}{f', {config.ticks_weight:g}' if config.loss == 'ticks_cross_entropy' else ''}",
            flush=True,
        )
    bar = Progress(config.steps - done, quiet_seconds=10) if verbose else None

    for step in range(done, config.steps):
        if stop_requested.is_set():
            save_checkpoint(state, config, corpus)
            if bar:
                bar.close()
            raise Stop(step)
        rows = train_windows.rows_of_step(step, config.batch_size, config.seed)
        inputs, targets = (t[rows].to(config.device) for t in (train_windows.inputs, train_windows.targets))
        began = time.perf_counter()
        state.losses.append(train_step(model, state.optimizer, inputs, targets, step, config))
        state.seconds += time.perf_counter() - began
        if (step + 1) % config.dev_every == 0:
            nll = evaluate(model, dev_windows, dev_rows, config.device)["nll"]
            state.dev.append((step + 1, nll))
            if bar:
                bar.note(f"step {step + 1}: loss {statistics.fmean(state.losses[-20:]):.4f}, dev NLL {nll:.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_checkpoint(state, config, corpus)
        if bar:
            bar.step(f"loss {state.losses[-1]:.4f}")
    if bar:
        bar.begin("test")
    metrics = evaluate(model, test_windows, test_rows, config.device)
    if bar:
        bar.close()
    targets = test_windows.targets[test_rows]
    tokens = config.steps * config.batch_size * config.context
    return {
        **metrics,
        "bits_per_byte": metrics["nll"] / math.log(2) / corpus.tokenizer.lengths[targets].double().mean().item(),
        "unigram_nll": unigram_nll(corpus.train, targets, len(corpus.tokenizer)),
        "test_tokens": targets.numel(),
        "steps": config.steps,
        "seconds": state.seconds,
        "tokens_per_second": tokens / state.seconds,
        "parameters": parameters,
        "losses": state.losses,
        "dev": state.dev,
        "sample": write(model, corpus.tokenizer, "\n\ndef ", 80, config),
    }


# ---------------------------------------------------------------- what comes out


def print_metrics(metrics: dict) -> None:
    n = metrics["test_tokens"]
    print(
        f"\n  test, {n} tokens\n"
        f"  accuracy of the next token   {metrics['accuracy']:.4f}\n"
        f"  NLL, nats a token            {metrics['nll']:.4f}   ({metrics['unigram_nll']:.4f} by frequencies alone)\n"
        f"  NLL, bits a byte             {metrics['bits_per_byte']:.4f}\n"
        f"  entropy, nats a token        {metrics['entropy']:.4f}\n"
        f"  calibration error, {BINS} bins   {metrics['ece']:.4f}\n"
        f"  {metrics['steps']} steps in {metrics['seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s\n"
        f"\nA sample:\n{metrics['sample']}\n"
    )


def plot(file: Path, metrics: dict, config: Config) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses, dev = metrics["losses"], metrics["dev"]
    window = max(1, len(losses) // 20)
    means = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 7))
    top.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=1)
    top.plot(range(1, len(losses) + 1), means, color="tab:blue", label=f"mean of {window} steps")
    top.set_ylabel(
        {
            "cross_entropy": "cross entropy",
            "ticks": "ticks",
            "ticks_cross_entropy": f"cross entropy + {config.ticks_weight:g} ticks",
        }[config.loss]
    )
    top.legend()
    bottom.plot([step for step, _ in dev], [nll for _, nll in dev], "o-", color="tab:orange", label="dev")
    bottom.plot([config.steps], [metrics["nll"]], "x", color="tab:red", label="test, at the end")
    bottom.axhline(metrics["unigram_nll"], linestyle=":", color="tab:grey", label="frequencies alone, test")
    bottom.set_ylabel("NLL, nats a token")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
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
    folder = Path("runs/pretrain_lm")

    def add(name: str, help: str, **options) -> None:
        default = getattr(Config, name[2:].replace("-", "_"))
        parser.add_argument(name, default=default, help=f"{help} ({default:g})" if default else help, **options)

    parser.add_argument("--loss", choices=LOSSES, default=Config.loss, help=f"({Config.loss})")
    add("--ticks-weight", "of ticks_cross_entropy: the loss is cross entropy + this * ticks", type=float)
    add("--steps", "training steps", type=positive)
    add("--batch-size", "windows a step", type=positive)
    add("--context", "tokens a window", type=positive)
    add("--vocabulary", "how many kinds of token at most", type=positive)
    add("--layers", "of the transformer", type=positive)
    add("--width", "of the hidden states", type=positive)
    add("--heads", "of attention", type=positive)
    add("--lr", "peak of the learning rate", type=float)
    add("--dev-every", "steps between two looks at dev", type=positive)
    add("--dev-tokens", "tokens of each look at dev", type=positive)
    add("--test-tokens", "tokens of the one look at test", type=positive)
    add("--seed", "of the first weights, the order of the text and the sample (0)", type=int)
    add("--threads", "CPU threads (as many as torch takes)", type=positive)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(cuda where there is one, else cpu)")
    add("--text", "a folder of *.py files (the standard library)", type=Path, metavar="DIR")
    checkpoint = folder / "checkpoint.pt"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=checkpoint, help=f"({checkpoint})")
    add("--save-every", "steps between two checkpoints", type=positive)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    for name, default in (("--output", folder / "metrics.json"), ("--plot", folder / "curves.png")):
        parser.add_argument(name, type=Path, metavar="FILE", default=default, help=f"({default})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    try:
        with ctrl_c_waits():
            metrics = train(config, verbose=True)
        print_metrics(metrics)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
        args.output.write_text(json.dumps({"config": asked, **metrics}, indent=1) + "\n")
        print(f"Saved {args.output} and {config.checkpoint} (--resume starts from it).")
        try:
            plot(args.plot, metrics, config)
            print(f"Saved {args.plot}.")
        except ModuleNotFoundError as error:
            print(f"No plot: {error.name} is missing: pip install 'fused_norm[examples]'")
        return 0
    except Stop as stop:
        print(f"stopped after step {stop} of {config.steps}; add --resume to go on from {config.checkpoint}")
        return 130
    except UsageError as error:
        print(f"pretrain_lm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped at once: nothing more was saved", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
