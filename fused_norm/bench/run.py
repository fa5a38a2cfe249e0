"""The runner: gate, then time every operation x dtype x shape x pass x provider; rows go to a CSV as they are made."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..progress import Progress
from . import cases, environment, gate, timing
from .cases import DTYPES, OPS, PASSES, Inputs, Op
from .providers import BASELINE, DEFAULT_PROVIDERS, PROVIDERS, NormCall, Provider

#: The name under which x.clone() runs beside the providers: it reads once, writes once and allocates, as a norm does.
COPY = "copy"

INTERRUPTED = 130

#: Of others' providers, one that has used up this part of the time without being timed (by compiling, that is) is left
#: out from then on, so that the rest get through all cases.
UNTIMED_SHARE = 0.4


@dataclass
class Row:
    """A line of the CSV. Times are milliseconds; ``vs_torch`` is torch's time over this one (above 1 is faster),
    ``vs_copy`` this bandwidth over the copy's in the same rounds. A provider that was not timed has a status other than
    ok and a reason instead of times; ``all`` stands where its verdict covers every pass (or operation, or dtype)."""

    op: str
    pass_name: str
    dtype: str
    m: int | str
    n: int | str
    provider: str
    status: str = "ok"
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    call_ms: float | None = None
    rounds: int | None = None
    bytes: int | None = None
    gb_s: float | None = None
    vs_torch: float | None = None
    copy_gb_s: float | None = None
    vs_copy: float | None = None
    err_y: float | None = None
    err_dx: float | None = None
    err_dw: float | None = None
    err_db: float | None = None
    reason: str = ""

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}"

    def values(self) -> list[str]:
        return ["" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in asdict(self).values()]


class Sink:
    """Rows, kept in memory for the table and written to the CSV one by one; each is on disk before the next is made."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self._write(["pass" if f.name == "pass_name" else f.name for f in fields(Row)])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(row.values())

    def _write(self, values: list[str]) -> None:
        self.writer.writerow(values)
        self.file.flush()


def prepare(pass_name: str, call: NormCall, inputs: Inputs) -> Callable[[], object]:
    """The function that one sample of this pass calls."""
    x, w, b, dy, leaves = inputs.x, inputs.w, inputs.b, inputs.dy, inputs.leaves
    if pass_name == "backward":
        y = call(x, w, b)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    if pass_name == "forward+backward":
        return lambda: torch.autograd.grad(call(x, w, b), leaves, dy)
    return lambda: call(x, w, b)


def context(pass_name: str, provider: Provider | None) -> AbstractContextManager:
    stack = ExitStack()
    if provider is not None:
        stack.enter_context(provider.context())
    if pass_name == "forward-nograd":
        stack.enter_context(torch.no_grad())
    return stack


def time_pass(
    op: Op,
    pass_name: str,
    dtype_name: str,
    inputs: Inputs,
    calls: dict[str, NormCall],
    verdicts: dict[str, gate.Verdict],
    clock: timing.Clock,
    seconds: float,
    untimed: dict[str, float],
) -> list[Row]:
    """One row for each provider, timed together with a copy of x; adds the seconds of its warm-up to ``untimed``."""
    m, n = inputs.x.shape
    dtype = inputs.x.dtype
    contenders = [timing.Contender(COPY, lambda: inputs.x.detach().clone)]
    rows = []
    for name, call in calls.items():
        if verdicts[name].no_backward and "backward" in pass_name:
            reason = verdicts[name].no_backward
            rows.append(Row(op.name, pass_name, dtype_name, m, n, name, "skipped", reason=reason))
            continue
        ready, entered = partial(prepare, pass_name, call, inputs), partial(context, pass_name, PROVIDERS[name])
        contenders.append(timing.Contender(name, ready, entered))
    samples = timing.time_group(contenders, clock, seconds)
    copy = samples.pop(COPY)
    copy_gb_s = cases.copy_bytes(m, n, dtype) / copy.median / 1e6 if copy.ms else None
    baseline = samples[BASELINE].median if BASELINE in samples and samples[BASELINE].ms else None
    moved = cases.bytes_moved(op, pass_name, m, n, dtype)
    for name, s in samples.items():
        row = Row(op.name, pass_name, dtype_name, m, n, name)
        rows.append(row)
        untimed[name] += s.warm_up_s
        if s.error is not None:
            row.status, row.reason = "error", gate.describe(s.error)
            continue
        gb_s = moved / s.median / 1e6
        row.ms, row.p20_ms, row.p80_ms, row.rounds = s.median, s.quantile(0.2), s.quantile(0.8), len(s.ms)
        row.call_ms = statistics.median(s.call_ms) if s.call_ms else None
        row.bytes, row.gb_s, row.copy_gb_s = moved, gb_s, copy_gb_s
        row.vs_torch = baseline / s.median if baseline else None
        row.vs_copy = gb_s / copy_gb_s if copy_gb_s else None
        add_errors(row, verdicts[name])
    return rows


def add_errors(row: Row, verdict: gate.Verdict) -> None:
    e = verdict.errors
    row.err_y = max(e["y"], e["y without grad"]) if "y" in e else None
    row.err_dx, row.err_dw, row.err_db = e.get("dx"), e.get("dw"), e.get("db")


class Budget:
    """Shares the seconds that are left among the groups that are left, after what gates and warm-ups will need."""

    def __init__(self, seconds: float, groups: int, passes: int) -> None:
        self.end = time.perf_counter() + seconds
        self.groups, self.passes = groups, passes
        self.overheads: list[float] = []

    def spent(self) -> bool:
        return time.perf_counter() >= self.end

    def next_group(self) -> float:
        overhead = statistics.median(self.overheads) if self.overheads else 0.0
        left = self.end - time.perf_counter() - overhead * (self.groups // self.passes)
        share = max(0.0, left / max(1, self.groups))
        self.groups -= 1
        return share


def run(args: argparse.Namespace, sink: Sink, progress: Progress, providers: list[Provider]) -> int:
    """Fills the sink; returns how many cases the time did not suffice for."""
    device = torch.device(args.device)
    clock = timing.make_clock(device)
    # Shape by shape, so that a run cut short has something to say of every operation and dtype.
    grid = [(OPS[op], dtype, m, n) for m, n in args.shapes for op in args.op for dtype in args.dtype]
    untimed = {p.name: 0.0 for p in providers}
    budget = Budget(args.seconds, len(grid) * len(args.passes), len(args.passes))
    for done, (op, dtype, m, n) in enumerate(grid):
        if budget.spent():
            return len(grid) - done
        begin, shared = time.perf_counter(), 0.0
        for p in [p for p in providers if untimed[p.name] > UNTIMED_SHARE * args.seconds]:
            if p.ours or p.name == BASELINE:
                continue
            reason = f"from here on: its first calls took {untimed[p.name]:.0f} of {args.seconds:.0f} s"
            sink.add(Row(op.name, "all", dtype, m, n, p.name, "skipped", reason=reason))
            providers = [q for q in providers if q is not p]
        try:
            inputs = cases.make_inputs(op, m, n, DTYPES[dtype], device)
            verdicts, calls = gate.judge(op, inputs, providers)
        except RuntimeError as e:  # no memory for the inputs or the truth
            sink.add(Row(op.name, "all", dtype, m, n, "all", "error", reason=gate.describe(e)))
            for _ in args.passes:
                budget.next_group()
                progress.step(f"{op.name} {dtype} {m}x{n}")
            continue
        for name, verdict in verdicts.items():
            untimed[name] += verdict.seconds
            if verdict.status != "ok":
                row = Row(op.name, "all", dtype, m, n, name, verdict.status, reason=verdict.reason)
                add_errors(row, verdict)
                sink.add(row)
        for pass_name in args.passes:
            share = budget.next_group()
            shared += share
            for row in time_pass(op, pass_name, dtype, inputs, calls, verdicts, clock, share, untimed):
                sink.add(row)
            progress.step(f"{op.name} {dtype} {m}x{n} {pass_name}")
        budget.overheads.append(max(0.0, time.perf_counter() - begin - shared))
    return 0


def table(rows: list[Row]) -> str:
    """A block for each operation, pass and dtype: a line a shape, a column a provider, the ratios' geometric mean."""
    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.ms is not None:
            blocks.setdefault((r.op, r.pass_name, r.dtype), []).append(r)
    lines = []
    if blocks:
        lines.append("Median ms; torch's time over this one; share of the bandwidth of x.clone() in the same rounds.")
    for key, block in blocks.items():
        names = list(dict.fromkeys(r.provider for r in block))
        shapes = list(dict.fromkeys(r.shape for r in block))
        cell = {(r.shape, r.provider): r for r in block}
        lines += ["", " ".join(key), f"{'':>12} {'copy GB/s':>10}" + "".join(f"  {name:>22}" for name in names)]
        for shape in shapes:
            copy = next((r.copy_gb_s for r in block if r.shape == shape and r.copy_gb_s), math.nan)
            line = f"{shape:>12} {copy:>10.1f}"
            for name in names:
                r = cell.get((shape, name))
                if r is None:
                    line += f"  {'-':>22}"
                    continue
                ratio = f"{r.vs_torch:.2f}x" if r.vs_torch else "-"
                share = f"{r.vs_copy:.0%}" if r.vs_copy else "-"
                line += f"  {r.ms:>9.4g} {ratio:>7} {share:>4}"
            lines.append(line)
        line = f"{'geomean':>12} {'':>10}"
        for name in names:
            ratios = [r.vs_torch for r in block if r.provider == name and r.vs_torch]
            mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None
            line += f"  {'':>9} {f'{mean:.2f}x' if mean else '-':>7} {'':>4}"
        lines.append(line)
    not_timed: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status != "ok":
            not_timed.setdefault((r.provider, r.status, r.reason), []).append(r)
    if not_timed:
        lines += ["", "Not timed:"]
    for (name, status, reason), where in not_timed.items():
        r = where[0]
        place = "" if r.n == "" else f" in {r.op} {r.pass_name} {r.dtype} {r.shape}"
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        lines.append(f"  {name}: {status}{place}{more}: {reason}")
    return "\n".join(lines)


def _names(known: tuple[str, ...] | dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def _ints(text: str) -> list[int]:
    try:
        values = [int(v) for v in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        sizes = _ints(part.replace("x", ","))
        if len(sizes) != 2:
            raise argparse.ArgumentTypeError(f"{part!r} is not rows x columns, as in 4096x1024")
        shapes.append((sizes[0], sizes[1]))
    return shapes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench", description="Time LayerNorm and RMSNorm: first checked against the fp64 truth, then measured."
    )
    p.add_argument("--op", type=_names(OPS), default=list(OPS), help=f"of {', '.join(OPS)}; all by default")
    p.add_argument("--pass", dest="passes", type=_names(PASSES), default=list(PASSES), help=f"of {', '.join(PASSES)}")
    p.add_argument("--provider", type=_names(PROVIDERS), help=f"of {', '.join(PROVIDERS)}")
    p.add_argument("--dtype", type=_names(DTYPES), help=f"of {', '.join(DTYPES)}; fp32,bf16 by default")
    p.add_argument("--shapes", type=_shapes, help="rows x columns, as in 4096x1024,64x65536; a table by default")
    p.add_argument("--m", type=_ints, help="numbers of rows; with --n instead of --shapes, 4096 by default")
    p.add_argument("--n", type=_ints, help="numbers of columns; with --m instead of --shapes, 1024 by default")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    p.add_argument("--threads", type=int, help="torch's CPU threads")
    p.add_argument("--seconds", type=float, help="time to spend; 300 by default. Cases past it are not run")
    p.add_argument("--quick", action="store_true", help="few shapes, fp32, no torch.compile, 30 s")
    p.add_argument("--output", type=Path, help="the CSV; environment (.json) and table (.txt) go beside it")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        p.error(f"--device {args.device}: cpu or cuda")
    if device.type not in cases.SHAPES:
        p.error(f"--device {args.device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch {torch.__version__} sees no GPU")
    if args.m or args.n:
        if args.shapes:
            p.error("--shapes or --m and --n, not both")
        args.shapes = [(m, n) for m in args.m or [4096] for n in args.n or [1024]]
    if not args.shapes:
        args.shapes = list((cases.QUICK_SHAPES if args.quick else cases.SHAPES)[device.type])
    if args.dtype is None:
        args.dtype = ["fp32"] if args.quick else ["fp32", "bf16"]
    if args.provider is None:
        args.provider = [name for name in DEFAULT_PROVIDERS if not (args.quick and name == "compile")]
    if args.seconds is None:
        args.seconds = 30.0 if args.quick else 300.0
    if args.output is None:
        args.output = Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{device.type}.csv"
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line. 0: all is well; 1: a provider of ours was wrong or failed (of the others it is only told, they
    have limits of their own); 130: interrupted, its rows kept."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sink = Sink(args.output)
    env = environment.collect(device, None if argv is None else ["bench", *argv])
    reasons = {name: PROVIDERS[name].unavailable(device) for name in args.provider}
    env["providers"], env["finished"] = reasons, False
    env_path = args.output.with_suffix(".json")
    env_path.write_text(json.dumps(env, indent=2) + "\n")
    print(f"{env['device']['name']}, {env['threads']} threads, torch {torch.__version__}; rows go to {args.output}")
    for name, reason in reasons.items():
        if reason is not None:
            print(f"skipped: {name}: {reason}")
            sink.add(Row("all", "all", "all", "", "", name, "skipped", reason=reason))
    progress = Progress(len(args.op) * len(args.dtype) * len(args.shapes) * len(args.passes), quiet_seconds=15)
    status, text = 0, ""
    try:
        left = run(args, sink, progress, [PROVIDERS[name] for name, reason in reasons.items() if reason is None])
        if left:
            text = f"\n\nThe {args.seconds:.0f} s were spent with {left} cases (operation, dtype, shape) not run."
        env["finished"] = not left
    except KeyboardInterrupt:
        status = INTERRUPTED
        text = f"\n\nInterrupted: the {len(sink.rows)} rows made so far are in {args.output}"
    progress.close()
    text = table(sink.rows) + text
    print(text)
    args.output.with_suffix(".txt").write_text(text + "\n")
    env_path.write_text(json.dumps(env, indent=2) + "\n")
    failed = {r.provider for r in sink.rows if r.status in ("wrong", "error")}
    return status or int(any(name in PROVIDERS and PROVIDERS[name].ours for name in failed))
