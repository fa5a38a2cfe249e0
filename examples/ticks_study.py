"""What the ticks loss changes, in small: the study behind docs/ticks.md.

    python examples/ticks_study.py                        # all of it: about three quarters of an hour on a core
    python examples/ticks_study.py --part bert --part kd  # parts of it
    python examples/ticks_study.py --part picture         # docs/ticks-gradient.svg alone: a second

Parts, each with three seeds:

    bert     finetune_bert.py, every second layer of its BERT, with five losses: cross entropy, + 0.001, + 0.1,
             + 1.0 ticks, ticks alone
    lm       pretrain_lm.py with the same five
    kd       the same three layers with cross entropy (bert's run): alone, and taught by all six layers, which were
             trained with cross entropy and the same seed, by cross entropy and by cross entropy + 0.1 ticks
    tokens   the same three layers with cross entropy (bert's run), and lambda times the ticks of masked words beside
             it. The lambda of the lowest mean NLL on dev is chosen; test is looked at for that one and for 0
    picture  the gradients of the losses at the target, by autograd

A run writes its result to --output when it is done, and its checkpoint when it is interrupted: started again, the study
skips what is finished and goes on where it was. At the end the summary, with every run in it, is written to --summary,
and the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import finetune_bert  # first: it sets how OpenMP's threads wait, which torch reads when it is imported
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_norm
import fused_norm.functional as FF

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("bert", "lm", "kd", "tokens", "picture")
METRICS = ("accuracy", "nll", "ece", "entropy")
LOSSES = {  # the name in the tables: (--loss, --ticks-weight)
    "cross entropy": ("cross_entropy", 0.0),
    "+ 0.001 ticks": ("ticks_cross_entropy", 0.001),
    "+ 0.1 ticks": ("ticks_cross_entropy", 0.1),
    "+ 1.0 ticks": ("ticks_cross_entropy", 1.0),
    "ticks alone": ("ticks", 0.0),
}
LAMBDAS = (0.0, 0.001, 0.01, 0.1)
# Small enough for a minute or so on one core; more rows and more epochs would take hours.
BERT = (
    "--norm fused --train-rows 1400 --dev-rows 500 --test-rows 1000 "
    "--epochs 1 --batch-size 16 --lr 1e-4 --max-length 48"
)
SMALL = "--layers 3 --lr 2e-4"
TAUGHT = "--temperature 2 --alpha 0.5 --teacher TEACHER"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. ``options`` are those of finetune_bert.py; TEACHER stands for the checkpoint of the seed's teacher."""

    part: str
    variant: str
    seed: int
    options: str

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() or c == "." else " " for c in self.variant).split()
        return f"{self.part}-{'-'.join(words)}-{self.seed}"


def jobs(part: str, seeds: list[int]) -> list[Job]:
    """Seed by seed, so that what is there early has every variant in it."""
    losses = {name: f"--loss {loss} --ticks-weight {weight}" for name, (loss, weight) in LOSSES.items()}
    plain = losses["cross entropy"]
    if part == "lm":
        variants = losses
    elif part == "bert":
        variants = {name: f"{SMALL} {loss}" for name, loss in losses.items()}
    elif part == "kd":
        variants = {
            "3 layers alone": f"{SMALL} {plain}",
            "taught, cross entropy": f"{SMALL} {plain} {TAUGHT}",
            "taught, + 0.1 ticks": f"{SMALL} {losses['+ 0.1 ticks']} {TAUGHT}",
            "the teacher, 6 layers": plain,
        }
    else:
        variants = {f"lambda = {x:g}": f"{SMALL} {plain}{f' --token-ticks {x:g}' if x else ''}" for x in LAMBDAS}
    return [Job(part, variant, seed, options) for seed in seeds for variant, options in variants.items()]


# ---------------------------------------------------------------- one run


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.output
        self.task: finetune_bert.Task | None = None

    def file(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def checkpoint(self, job: Job) -> Path:
        return self.folder / job.name / "checkpoint.pt"

    def options(self, job: Job) -> str:
        """What decides the result, and is stored beside it."""
        return job.options if job.part == "lm" else f"{self.args.bert} {job.options} --seed {job.seed}"

    def finished(self, job: Job) -> dict | None:
        try:
            result = json.loads(self.file(job).read_text())
        except FileNotFoundError:
            return None
        if result["options"] != self.options(job):
            raise finetune_bert.UsageError(
                f"{self.file(job)} was made with `{result['options']}`, but now it is `{self.options(job)}`: "
                "delete it, or give another --output"
            )
        return result

    def write(self, job: Job, result: dict) -> None:
        partial = self.file(job).with_suffix(".partial")  # a crash while writing leaves nothing half done
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.file(job))

    def run(self, job: Job) -> dict:
        """The result of a job: from its file, or else trained now. finetune_bert.Stop after Ctrl-C."""
        if (result := self.finished(job)) is not None:
            return result
        began = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # the tables alone are printed
            scores = self.language_model(job) if job.part == "lm" else self.bert(job)
        result = {
            **{key: getattr(job, key) for key in ("part", "variant", "seed")},
            "options": self.options(job),
            **scores,
            "wall_seconds": round(time.perf_counter() - began, 1),
        }
        self.write(job, result)
        return result

    def arguments(self, job: Job) -> argparse.Namespace:
        options = self.options(job)
        if "TEACHER" in options:
            teacher = jobs("kd", [job.seed])[-1]
            self.run(teacher)
            options = options.replace("--teacher TEACHER", f"--teacher {shlex.quote(str(self.checkpoint(teacher)))}")
        args = finetune_bert.parse_arguments([*shlex.split(options), "--output", str(self.folder / job.name)])
        args.resume = self.checkpoint(job).exists()
        if self.task is None:
            self.task = finetune_bert.load_task(args)
        return args

    def bert(self, job: Job) -> dict:
        plain = jobs("bert", [job.seed])[0]
        if job != plain and job.options == plain.options:
            result = self.run(plain)
            return {key: result[key] for key in ("dev", "test", "epoch", "train_seconds")}
        args = self.arguments(job)
        (run,) = finetune_bert.train(self.task, args, {})
        scores = {
            "dev": dict(zip(METRICS, run.dev[run.best_epoch()], strict=True)),
            "epoch": run.best_epoch() + 1,
            "train_seconds": round(sum(run.seconds), 1),
        }
        if job.part != "tokens":  # where lambda is to be chosen before test is looked at
            scores["test"] = self.test(run.model)
        if job.part == "bert" or "TEACHER" in job.options:  # teachers, and the models of tokens, are needed again
            self.checkpoint(job).unlink()
        return scores

    def test(self, model: torch.nn.Module) -> dict:
        return finetune_bert.evaluate(model, self.task.test, "test")[0]._asdict()

    def language_model(self, job: Job) -> dict:
        import pretrain_lm

        loss, weight = LOSSES[job.variant]
        file = self.checkpoint(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(
            pretrain_lm.study_config(loss, weight, job.seed),
            threads=self.args.threads,
            checkpoint=file,
            resume=file.exists(),
        )
        try:
            with pretrain_lm.ctrl_c_waits():
                scores = pretrain_lm.train(config)
        except pretrain_lm.Stop as stop:
            raise finetune_bert.Stop(str(stop)) from None
        file.unlink(missing_ok=True)
        other = ("bits_per_byte", "unigram_nll", "test_tokens", "steps", "parameters")
        return {
            "test": {key: scores[key] for key in METRICS},
            **{key: scores[key] for key in other},
            "train_seconds": round(scores["seconds"], 1),
        }

    def choose_lambda(self, results: list[dict]) -> str:
        """The variant of the lowest mean NLL on dev; it and lambda = 0 then get their results on test."""
        nll = {v: mean_and_sd(rs, "dev")["nll"]["mean"] for v, rs in by_variant(results).items()}
        chosen = min(nll, key=nll.get)
        for job in jobs("tokens", self.args.seeds):
            result = self.finished(job)
            if job.variant == chosen and "test" not in result:
                args = self.arguments(job)
                with contextlib.redirect_stdout(sys.stderr):
                    model = finetune_bert.load_best(self.checkpoint(job), self.task.directory, args.device)
                    result["test"] = self.test(model)
                self.write(job, result)
        return chosen


# ---------------------------------------------------------------- the summary and the tables


def by_variant(results: list[dict]) -> dict[str, list[dict]]:
    """In the order in which the variants are named above."""
    variants: dict[str, list[dict]] = {}
    for result in results:
        variants.setdefault(result["variant"], []).append(result)
    return variants


def mean_and_sd(results: list[dict], split: str, against: list[dict] | None = None) -> dict[str, dict]:
    """Of each metric over the seeds, or of its difference from the same seed's in ``against``; the sample's sd."""
    base = {result["seed"]: result[split] for result in against or []}
    summary = {}
    for metric in METRICS:
        values = [
            result[split][metric] - (base[result["seed"]][metric] if against else 0.0)
            for result in results
            if not against or result["seed"] in base
        ]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else None
            summary[metric] = {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}
    return summary


def summarise(part: str, results: list[dict]) -> dict:
    """For each variant and split: mean and sd of each metric, and of its difference from the first variant."""
    variants = by_variant(results)
    first = next(iter(variants))
    summary: dict = {}
    for split, (variant, runs) in itertools.product(("dev", "test"), variants.items()):
        runs = [run for run in runs if split in run]
        if runs:
            entry = summary.setdefault(variant, {})
            entry[split] = mean_and_sd(runs, split)
            against = [run for run in variants[first] if split in run]
            if variant != first and against:
                entry[f"{split}_minus_first"] = mean_and_sd(runs, split, against)
    return summary


def tables(part: str, summary: dict) -> str:
    lines = []
    for split in ("dev", "test"):
        rows = {variant: entry for variant, entry in summary.items() if split in entry}
        if not rows or (split == "dev" and part != "tokens"):
            continue
        lines += [
            f"\n{part}, {split}\n",
            "| | n | accuracy | NLL | ECE | entropy | accuracy, difference | NLL, difference |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for variant, entry in rows.items():
            cells = [cell(entry[split][metric]) for metric in METRICS]
            difference = entry.get(f"{split}_minus_first")
            cells += [cell(difference[m], "+") if difference else "" for m in ("accuracy", "nll")]
            lines.append(f"| {variant} | {entry[split]['nll']['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: dict, sign: str = "") -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    return f"{value['mean']:{sign}.4f}{spread}"


def write_summary(file: Path, parts: dict[str, list[dict]], chosen: str | None, bert: str) -> dict:
    """The parts that were run now; the other parts in the file stay as they are."""
    summary = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    for part, results in parts.items():
        summary["parts"][part] = {
            "torch": torch.__version__,
            "fused_norm": fused_norm.__version__,
            "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            **({"common_options": bert} if part != "lm" else {}),
            **({"chosen_on_dev": chosen} if part == "tokens" else {}),
            "summary": summarise(part, results),
            # The seconds stay in --output: they say how busy the machine was, and are no measurement.
            "runs": [{k: v for k, v in result.items() if not k.endswith("seconds")} for result in results],
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


# ---------------------------------------------------------------- the picture


def focal_loss(logits: Tensor, target: Tensor, reduction: str = "mean", gamma: float = 2.0) -> Tensor:
    """Lin et al., "Focal loss for dense object detection", 2017, for softmax: -(1 - p)^gamma * log p."""
    log_p = -F.cross_entropy(logits, target, reduction="none")
    loss = -((-torch.expm1(log_p)) ** gamma) * log_p
    return loss if reduction == "none" else getattr(loss, reduction)()


CURVES: dict[str, Callable[..., Tensor]] = {
    "cross entropy": F.cross_entropy,
    "cross entropy + 1.0 ticks": lambda z, t, **o: FF.ticks_cross_entropy(z, t, ticks_weight=1.0, **o),
    "cross entropy + 0.1 ticks": lambda z, t, **o: FF.ticks_cross_entropy(z, t, ticks_weight=0.1, **o),
    "ticks": FF.ticks_loss,
    "focal loss, gamma = 2": focal_loss,
}


def gradient_at_target(loss: Callable[..., Tensor], p: Tensor) -> Tensor:
    """-dL/dz_t where the target's probability is ``p``, (M,), by autograd: how hard the loss pulls the target up."""
    logits = torch.stack([p.logit(), torch.zeros_like(p)], dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, torch.zeros(len(p), dtype=torch.long), reduction="sum"), logits)
    return -gradient[:, 0]


def draw(file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    linear = torch.linspace(0.0005, 0.9995, 200, dtype=torch.float64)
    q = torch.logspace(-4, -0.001, 200, dtype=torch.float64)  # 1 - p
    styles = {"cross entropy": ("k", "-"), "ticks": ("tab:red", "-"), "focal loss, gamma = 2": ("tab:green", "--")}
    with plt.rc_context({"svg.hashsalt": "ticks", "svg.fonttype": "path", "font.size": 10}):  # the same file each time
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for name, loss in CURVES.items():
            colour, line = styles.get(name, ("tab:blue" if "0.1" in name else "tab:purple", ":"))
            left.plot(linear, gradient_at_target(loss, linear), line, color=colour, label=name)
            right.plot(q, gradient_at_target(loss, 1 - q) / q, line, color=colour, label=name)
        left.set(
            xlabel="p, the target's probability", ylabel="gradient at the target, $-dL/dz$", xlim=(0, 1), ylim=(0, 2)
        )
        left.legend(frameon=False)
        right.set(xlabel="$1 - p$", ylabel="the same, divided by cross entropy's", xscale="log", yscale="log")
        right.set(xlim=(1, 1e-4), ylim=(5e-5, 4))
        right.text(0.97, 0.72, "better predicted →", transform=right.transAxes, color="0.4", ha="right")
        for axes in (left, right):
            axes.grid(alpha=0.25)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # matplotlib leaves spaces at the ends of lines
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))


# ---------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, detail = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=detail, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="run this part alone; may be given more than once (all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    add("--bert", default=BERT, metavar="OPTIONS", help=f"what all runs of finetune_bert.py share ({BERT})")
    add("--output", type=Path, metavar="DIR", default=Path("runs/ticks_study"), help="(runs/ticks_study)")
    results = ROOT / "bench" / "results" / "ticks-study.json"
    add("--summary", type=Path, metavar="FILE", default=results, help="(bench/results/ticks-study.json)")
    add("--picture", type=Path, metavar="FILE", default=ROOT / "docs" / "ticks-gradient.svg", help="(docs/)")
    return parser.parse_args(argv)


def study(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    parts = args.part or list(PARTS)
    if "picture" in parts:
        draw(args.picture)
        print(f"saved {args.picture}")
    work, results, chosen = Study(args), {}, None
    with finetune_bert.ctrl_c_waits():
        try:
            for part in (part for part in PARTS if part in parts and part != "picture"):
                done = [work.run(job) for job in jobs(part, args.seeds)]
                if part == "tokens":
                    chosen = work.choose_lambda(done)
                    done = [work.run(job) for job in jobs(part, args.seeds)]  # now with test, where there is one
                results[part] = done
                summary = write_summary(args.summary, {part: done}, chosen, args.bert)
        except finetune_bert.Stop as stop:
            print(f"{stop}; the same command goes on from there")
            return 130
    for part in results:
        print(tables(part, summary["parts"][part]["summary"]))
    if chosen:
        print(f"\nchosen on dev: {chosen}")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return study(parse_arguments(argv))
    except (finetune_bert.UsageError, finetune_bert.movie_snippets.DataError) as error:
        print(f"ticks_study: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
