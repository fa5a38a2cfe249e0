"""Whole training steps (forward, loss, backward, AdamW) of BERT-, GPT-2- and Llama-shaped models, stock and patched.

    python bench/e2e.py                                            # all three on this machine: minutes on 2 cores
    python bench/e2e.py --models bert --steps 60 --output FILE     # FILE.json and FILE.txt
    python bench/e2e.py --models llama --layers 16 --width 2048 --batch 4 --length 2048 --dtype bf16 --device cuda

Models of transformers, randomly initialised from a configuration; BERT classifies sentences, as in fine-tuning, the
others predict the next token. Each variant has its own copy with the same parameters, and all train in lock-step on the
same batches: one step of each, in an order that rotates from step to step, so that a busy machine slows all alike.

    stock      the model as transformers builds it
    norms      fused_norm.patch(model, residual=False): the norms alone
    patched    fused_norm.patch(model): dropout and residual connection fused with the norm after them too
    loss       patched, and FF.ticks_cross_entropy for F.cross_entropy (which computes a little more; not by default)
    compiled   torch.compile of stock
    both       torch.compile of patched (not by default)

The ratio is the stock model's time by the variant's, of the same step: the median over steps and its quartiles; above 1
the variant is faster. Masks of fused dropout differ from torch's of the same seed, so that losses agree statistically;
before timing, logits without dropout are compared. The breakdown is torch.profiler's own time of operators, of each the
least of some steps, gathered by what an operator serves: those of backward count as the operator of forward whose
gradient they compute. The shares tell the kinds of operators apart; the speed of a step is told by the ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: steadier timings where cores are shared
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import fused_norm
import fused_norm.functional as FF
from fused_norm.bench import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ("stock", "norms", "patched", "loss", "compiled", "both")
LABELS = 2


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    vocabulary: int
    batch: int
    length: int
    dropout: float


#: MiniLM-L6 whole, on batches of `make run`; the others of about its size, so that they fit a CPU.
SIZES = {
    "bert": Size(6, 384, 30522, 16, 64, 0.1),
    "gpt2": Size(6, 384, 16384, 4, 128, 0.1),
    "llama": Size(6, 384, 16384, 4, 128, 0.0),
}


def build(name: str, size: Size) -> nn.Module:
    """The model, on the CPU in fp32; heads are 32 wide, or 64 from a width of 512 on, as in the models of that size."""
    import transformers

    heads = max(1, size.width // (64 if size.width >= 512 else 32))
    common = {"vocab_size": size.vocabulary}
    if name == "bert":
        config = transformers.BertConfig(
            **common,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            intermediate_size=4 * size.width,
            hidden_dropout_prob=size.dropout,
            attention_probs_dropout_prob=size.dropout,
            max_position_embeddings=max(512, size.length),
            num_labels=LABELS,
        )
        return transformers.BertForSequenceClassification(config)
    if name == "gpt2":
        config = transformers.GPT2Config(
            **common,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=heads,
            n_positions=max(1024, size.length),
            resid_pdrop=size.dropout,
            embd_pdrop=size.dropout,
            attn_pdrop=size.dropout,
            use_cache=False,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        **common,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=max(8, size.width * 8 // 3 // 64 * 64),
        max_position_embeddings=max(2048, size.length),
        attention_dropout=size.dropout,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def batch(name: str, size: Size, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids (batch, length), and the classes to predict, as many as rows of the logits."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length), generator=generator)
    target = torch.randint(LABELS, (size.batch,), generator=generator)
    if name != "bert":
        target = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
    return tokens.to(device), target.to(device)


# ---------------------------------------------------------------- variants


def fused_loss(logits: Tensor, target: Tensor) -> Tensor:
    return FF.ticks_cross_entropy(logits, target, ticks_weight=1e-3)


@dataclass
class Variant:
    name: str
    model: nn.Module
    call: Callable[..., Any]  # the model, or what torch.compile made of it
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of this process
    losses: list[float] = field(default_factory=list)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.call(input_ids=tokens).logits

    def step(self, tokens: Tensor, target: Tensor) -> Tensor:
        logits = self.logits(tokens)
        loss = self.loss(logits.flatten(0, -2), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def make_variant(name: str, stock: nn.Module) -> Variant:
    model, note = copy.deepcopy(stock), ""
    if name in ("norms", "patched", "loss", "both"):
        report = fused_norm.patch(model, residual=name != "norms")
        note = str(report).partition("\n")[0].removeprefix("fused_norm: ")
    call = torch.compile(model) if name in ("compiled", "both") else model
    return Variant(name, model, call, fused_loss if name == "loss" else F.cross_entropy, new_optimizer(model), note)


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def orders(names: list[Any]) -> Iterator[list[Any]]:
    """Each variant comes first as often as any other, and before another as often as after it."""
    turn = 0
    while True:
        at = turn % len(names)
        rotated = names[at:] + names[:at]
        yield rotated if turn // len(names) % 2 == 0 else rotated[::-1]
        turn += 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def difference_of_logits(variants: list[Variant], tokens: Tensor) -> dict[str, float]:
    """Without dropout: the largest difference of a variant's logits from the first one's, by the largest logit.

    Not of compiled variants: they would compile once more, for eval, what the timing does not run.
    """
    logits = {}
    for variant in variants:
        if variant.call is not variant.model:
            continue
        variant.model.eval()
        logits[variant.name] = variant.model(input_ids=tokens).logits.float()
        variant.model.train()
    first = next(iter(logits.values()))
    return {name: ((z - first).abs().max() / first.abs().max()).item() for name, z in logits.items()}


# ---------------------------------------------------------------- where the time goes

#: Kind of operator: beginnings of the names of those that belong to it. The first that fits counts, and an operator
#: inside another counts as that other.
KINDS = {
    "optimizer": ("Optimizer.", "aten::_fused_adamw", "aten::_foreach", "aten::zero_"),
    "dropout": ("aten::dropout", "aten::native_dropout", "aten::bernoulli"),
    "add + norm": ("fused_norm::add_norm", "fused_norm::triton_add_norm", "AddNorm"),
    "norm": (
        *("kind::norm", "aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", "aten::_fused_rms_norm"),
        *("fused_norm::norm", "fused_norm::triton_norm", "Norm"),
    ),
    "attention": ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product", "aten::softmax", "aten::_softmax"),
    "loss": (
        *("aten::cross_entropy_loss", "aten::log_softmax", "aten::_log_softmax", "aten::nll_loss"),
        *("fused_norm::ticks", "fused_norm::triton_ticks", "Ticks"),
    ),
    "matmul": ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul", "aten::bmm", "aten::baddbmm"),
    "activation": ("kind::activation", "aten::gelu", "aten::silu", "aten::tanh", "aten::relu"),
    "embedding": ("aten::embedding",),
    "add": ("aten::add",),
}
OTHER, OUTSIDE = "other", "outside operators"


def kind_of(name: str) -> str | None:
    return next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), None)


@contextmanager
def marked(model: nn.Module, norms: bool) -> Iterator[None]:
    """What transformers writes in elementary operators (RMSNorm, GPT-2's GELU) is known by the module they run in.

    ``norms``: not of a patched model, where a norm with a hook on it is not fused with what stands before it.
    """
    handles, open_ranges = [], []

    def mark(module: nn.Module, kind: str) -> None:
        def enter(module: nn.Module, args: object) -> None:
            open_ranges.append(record_function(f"kind::{kind}"))
            open_ranges[-1].__enter__()

        def leave(module: nn.Module, args: object, output: object) -> None:
            open_ranges.pop().__exit__(None, None, None)

        handles.extend([module.register_forward_pre_hook(enter), module.register_forward_hook(leave)])

    for module in model.modules():
        name = type(module).__name__.lower()
        if any(module.children()):
            continue
        if norms and "norm" in name:
            mark(module, "norm")
        elif any(part in name for part in ("activation", "gelu", "silu")):
            mark(module, "activation")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ancestry(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def kinds_of_events(events: list[Any]) -> dict[int, str]:
    """Event id: its kind. In backward, that of the forward operator which made the node of the graph."""
    engine, of_node = "autograd::engine::", {}

    def in_backward(event: Any) -> bool:
        return any(e.name.startswith(engine) for e in _ancestry(event))

    def forward_kind(event: Any) -> str | None:
        found = None
        for e in _ancestry(event):
            found = kind_of(e.name) or found  # the outermost that has one
        return found

    # Operators outside and inside the one that makes a node are recorded with the node's number too. The last to start
    # is the one: what it calls itself runs below autograd, and has none.
    for event in sorted((e for e in events if e.sequence_nr >= 0), key=lambda e: e.time_range.start):
        if not in_backward(event):
            of_node[event.sequence_nr] = forward_kind(event)
    found = {}
    for event in events:
        kind = None
        if in_backward(event):
            for e in _ancestry(event):
                if e.sequence_nr in of_node and e.sequence_nr >= 0:
                    kind = of_node[e.sequence_nr]
                    break
            # Gradients of a tensor used twice are added outside any node; custom nodes go by their names.
            kind = kind or forward_kind(event)
        else:
            kind = forward_kind(event)
        found[event.id] = kind or OTHER
    return found


Operator = tuple[str, str, int]  # kind, name, and how many of the kind and name came before in the step


def profiled_step(variant: Variant, one: tuple[Tensor, Tensor], device: torch.device) -> dict[Operator, float]:
    """Milliseconds of each operator of one step: device time on a GPU, else the CPU's.

    What a step takes and no operator is "outside operators": Python, and the profiler's own work.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    patched = variant.name in ("norms", "patched", "loss")
    with marked(variant.model, norms=not patched), profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        variant.step(*one)
        synchronize(device)
        wall = time.perf_counter() - began
    # An operator knows the time of the kernels that it launched; events of the device would count them once more.
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    kinds, seen = kinds_of_events(events), Counter()
    found: dict[Operator, float] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        kind_and_name = kinds[event.id], event.name
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[(*kind_and_name, seen[kind_and_name])] = us / 1e3
        seen[kind_and_name] += 1
    return found | {(OUTSIDE, "", 0): wall * 1e3 - sum(found.values())}


def breakdown(variants: list[Variant], batches: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Any]:
    """Milliseconds of each kind of operator in a step of each variant: of every single operator the least of the
    steps, as a busy machine interrupts now one and now another."""
    least: dict[str, dict[Operator, float]] = {variant.name: {} for variant in variants}
    for one, order in zip(batches, orders(variants), strict=False):
        for variant in order:
            for operator, ms in profiled_step(variant, one, device).items():
                least[variant.name][operator] = min(ms, least[variant.name].get(operator, ms))
    result = {name: dict.fromkeys([*KINDS, OTHER, OUTSIDE], 0.0) for name in least}
    for name, operators in least.items():
        for (kind, *_), ms in operators.items():
            result[name][kind] += ms
    return result


# ---------------------------------------------------------------- measuring and writing it down


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def summarize(result: dict[str, Any]) -> None:
    """Medians and ratios from the seconds of the steps that all variants have done."""
    for row in result["variants"].values():
        if row["seconds"]:
            row["ms"] = [s * 1e3 for s in quartiles(row["seconds"])]
        for key, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
            pairs = list(zip(result["variants"].get("stock", row)[key], row[key], strict=False))
            if pairs and "stock" in result["variants"]:
                row[ratio] = list(quartiles([a / b for a, b in pairs]))


def table(results: dict[str, Any]) -> str:
    about = results["environment"]
    lines = [
        f"Training steps on {about['device']['name']}, {about['threads']} threads, load {about['load']} at the start;"
        f" torch {about['versions']['torch']}, transformers {about['versions']['transformers']},"
        f" commit {(about['commit'] or 'unknown')[:7]}{' and changes' if about['uncommitted_changes'] else ''},"
        f" {about['date']}.",
        f"{about['command']}",
        "Median milliseconds of a step with quartiles; the stock model's time by this one's, step by step, likewise:",
        "by the clock, and of the CPU in all threads of the process, which other processes disturb less.",
    ]
    for name, result in results["models"].items():
        size, done = result["size"], max(len(row["seconds"]) for row in result["variants"].values())
        lines += [
            "",
            f"{name}: {size['layers']} layers of {size['width']}, vocabulary {size['vocabulary']},"
            f" {size['batch']} x {size['length']} tokens, dropout {size['dropout']:g}, {result['dtype']},"
            f" {result['parameters'] / 1e6:.1f} M parameters, {done} steps of {result['steps']}"
            + (", interrupted" if result["interrupted"] else ""),
            f"  {'':<10}{'ms a step':>26}{'stock / this':>26}{'the same, CPU time':>26}",
        ]
        for variant, row in result["variants"].items():
            if row.get("failed"):
                lines.append(f"  {variant:<10}{row['failed']}")
            elif "ms" in row:
                low, middle, high = row["ms"]
                cells = f"{middle:9.2f} ({low:.2f} to {high:.2f})".rjust(26)
                for ratio in ("ratio", "cpu_ratio"):
                    if ratio in row:
                        low, middle, high = row[ratio]
                        cells += f"{middle:9.3f} ({low:.3f} to {high:.3f})".rjust(26)
                off = result["logits_off"].get(variant)
                notes = [row["note"], f"logits {off:.0e} off" if off else ""]
                lines.append(f"  {variant:<10}{cells}   {', '.join(n for n in notes if n)}".rstrip())
        parts = result["breakdown"]
        if parts:
            lines.append(f"  {'profiled, least ms':<20}" + "".join(f"{v:>18}" for v in parts))
            for kind in [*KINDS, OTHER, OUTSIDE]:
                if any(p[kind] >= 0.005 for p in parts.values()):
                    cells = [f"{p[kind]:9.2f} ({p[kind] / sum(p.values()):6.1%})" for p in parts.values()]
                    lines.append(f"  {kind:<20}" + "".join(c.rjust(18) for c in cells))
            lines.append(
                f"  {'sum':<20}" + "".join(f"{sum(p.values()):9.2f}         ".rjust(18) for p in parts.values())
            )
    return "\n".join(lines) + "\n"


class Sink:
    """Writes what there is so far: an interrupted run keeps its rows."""

    def __init__(self, stem: Path | None, results: dict[str, Any]) -> None:
        self.stem, self.results = stem, results

    def save(self) -> None:
        for result in self.results["models"].values():
            summarize(result)
        if self.stem is not None:
            for suffix, text in ((".json", json.dumps(self.results, indent=1)), (".txt", table(self.results))):
                partial = self.stem.with_name(self.stem.name + suffix + ".partial")
                partial.write_text(text)
                partial.replace(self.stem.with_name(self.stem.name + suffix))


def measure(name: str, size: Size, args: argparse.Namespace, results: dict[str, Any], sink: Sink) -> None:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    stock = build(name, size).to(device, DTYPES[args.dtype]).train()
    result = results["models"][name] = {
        "size": vars(size),
        "dtype": args.dtype,
        "parameters": sum(p.numel() for p in stock.parameters()),
        "steps": args.steps,
        "interrupted": True,  # until it is not
        "variants": {},
        "logits_off": {},
        "breakdown": {},
    }
    variants: dict[str, Variant] = {}
    warm = batch(name, size, device, 0)
    for variant_name in args.variants:
        variant, row = make_variant(variant_name, stock), {"seconds": [], "cpu_seconds": [], "losses": []}
        result["variants"][variant_name] = row
        try:
            for i in range(args.warmup):
                torch.manual_seed(i)
                variant.step(*warm)
        except Exception as error:  # no compiler for torch.compile, say: the others are worth having
            if variant_name == "stock":
                raise
            row["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            continue
        row |= {key: getattr(variant, key) for key in ("note", "seconds", "cpu_seconds", "losses")}
        variants[variant_name] = variant
        # The steps before changed the parameters, each by its own masks.
        variant.model.load_state_dict(stock.state_dict())
        variant.optimizer.load_state_dict(
            torch.optim.AdamW(variant.model.parameters(), lr=1e-5, fused=True).state_dict()
        )
    result["logits_off"] = difference_of_logits(list(variants.values()), warm[0])
    for step, order in zip(range(args.steps), orders(list(variants)), strict=False):
        one = batch(name, size, device, 1 + step)
        for variant in (variants[n] for n in order):
            torch.manual_seed(step)
            synchronize(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            loss = variant.step(*one)
            synchronize(device)
            variant.seconds.append(time.perf_counter() - began)
            variant.cpu_seconds.append(time.process_time() - cpu_began)
            variant.losses.append(loss.item())
        sink.save()
    if args.profile_steps:
        batches = [batch(name, size, device, 1 + args.steps + i) for i in range(args.profile_steps)]
        eager = [v for v in variants.values() if v.call is v.model]  # a compiled model's operators have other names
        result["breakdown"] = breakdown(eager, batches, device)
    result["interrupted"] = False
    sink.save()


# ---------------------------------------------------------------- the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
        return int(text)

    def not_negative(text: str) -> int:
        if int(text) < 0:
            raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
        return int(text)

    def probability(text: str) -> float:
        if not 0 <= float(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
        return float(text)

    summary, _, detail = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=detail, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=list(SIZES), help="(all)")
    default = [v for v in VARIANTS if v not in ("loss", "both")]
    add("--variants", nargs="+", choices=VARIANTS, default=default, help=f"({' '.join(default)})")
    for option in ("layers", "width", "vocabulary", "batch", "length"):
        sizes = ", ".join(f"{name} {getattr(size, option)}" for name, size in SIZES.items())
        add(f"--{option}", type=positive, help=f"({sizes})")
    add("--dropout", type=probability, help="(bert and gpt2 0.1, llama 0)")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and activations (fp32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(cuda where there is one, else cpu)")
    add("--threads", type=positive, help="CPU threads (as many as torch takes)")
    add("--steps", type=positive, default=40, help="timed steps of each variant (40)")
    add("--warmup", type=not_negative, default=2, help="steps before, torch.compile's compilation among them (2)")
    add("--profile-steps", type=not_negative, default=10, help="steps under the profiler; 0 for no breakdown (10)")
    add("--seed", type=int, default=0, help="of the parameters (0)")
    add("--output", type=Path, metavar="STEM", help="write STEM.json and STEM.txt, anew after each step")
    args = parser.parse_args(argv)
    args.variants = [v for v in VARIANTS if v in args.variants]
    return args


def size_of(name: str, args: argparse.Namespace) -> Size:
    given = {o: getattr(args, o) for o in vars(SIZES[name]) if getattr(args, o) is not None}
    return Size(**{**vars(SIZES[name]), **given})


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        import transformers
    except ModuleNotFoundError:
        print("e2e: transformers is missing: pip install 'fused_norm[examples]'", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch._inductor")
    if args.threads:
        torch.set_num_threads(args.threads)
    about = environment.collect(torch.device(args.device), None if argv is None else ["bench/e2e.py", *argv])
    about["versions"]["transformers"] = transformers.__version__
    results: dict[str, Any] = {"environment": about, "models": {}}
    sink = Sink(args.output, results)
    status = 0
    try:
        for name in args.models:
            measure(name, size_of(name, args), args, results, sink)
    except KeyboardInterrupt:
        status = 130
    sink.save()
    if results["models"]:
        print(table(results), end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
