"""The runner: gate, then time every operation x dtype x shape x pass x provider; rows go to a CSV as they are made."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..progress import Progress
from . import environment, gate, timing
from .cases import GROUPS, OPS
from .operation import BASELINE, DIMS, DTYPES, PASSES, Call, Inputs, Op, Provider, Shape, as_tuple, gradients
from .providers import default_providers

#: The name under which x.clone() runs beside the providers: it reads once, writes once and allocates, as a norm does.
COPY = "copy"

#: The group of operations that runs where none is named.
DEFAULT_GROUP = "norms"

#: What a dimension is where only others are named.
DEFAULT_DIM = {"m": 4096, "n": 1024, "h": 1024}

Case = tuple[Op, str, Shape]

INTERRUPTED = 130

#: Of others' providers, one that has used up this part of the time without being timed (by compiling, that is) is left
#: out from then on, so that the rest get through all cases.
UNTIMED_SHARE = 0.4


@dataclass
class Row:
    """A line of the CSV. Times are milliseconds; ``vs_torch`` is torch's time over this one (above 1 is faster),
    ``vs_copy`` this bandwidth over the copy's in the same rounds. ``peak_bytes`` is the memory beyond the inputs,
    ``extra_bytes`` that beyond the inputs and what the call returns (output or gradients); ``peak_vs_torch`` and
    ``extra_vs_torch`` are this memory over torch's (below 1 is less). A provider that was not timed has a status other
    than ok and a reason instead of times; ``all`` stands where its verdict covers every pass or every dtype."""

    op: str
    pass_name: str
    dtype: str
    m: int | str
    n: int | str
    h: int | str
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
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    peak_vs_torch: float | None = None
    extra_vs_torch: float | None = None
    err_y: float | None = None
    err_dx: float | None = None
    err_dw: float | None = None
    err_db: float | None = None
    reason: str = ""

    @property
    def shape(self) -> str:
        return shape_text(d for d in (self.m, self.n, self.h) if d != "")

    def as_dict(self) -> dict[str, Any]:
        return {"pass" if key == "pass_name" else key: value for key, value in asdict(self).items()}

    def values(self) -> list[str]:
        return ["" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in asdict(self).values()]


def shape_text(shape: Iterable[int | str]) -> str:
    return "x".join(map(str, shape))


def row(op: Op, pass_name: str, dtype: str, shape: Shape, provider: str, status: str = "ok", reason: str = "") -> Row:
    """A row; ``shape`` is empty where it covers every shape."""
    sizes = dict(zip(op.dims, shape, strict=False))
    m, n, h = (sizes.get(dim, "") for dim in DIMS)
    return Row(op.name, pass_name, dtype, m, n, h, provider, status, reason=reason)


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


def prepare(pass_name: str, call: Call, inputs: Inputs) -> Callable[[], object]:
    """The function that one sample of this pass calls."""
    args, leaves, upstream = inputs.args, inputs.leaf_tensors, inputs.timed_upstream
    if pass_name == "backward":
        y = call(*args)
        return lambda: gradients(y, leaves, upstream, retain_graph=True)
    if pass_name == "forward+backward":
        return lambda: gradients(call(*args), leaves, upstream)
    return lambda: call(*args)


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
    shape: Shape,
    inputs: Inputs,
    calls: dict[str, Call],
    verdicts: dict[str, gate.Verdict],
    clock: timing.Clock,
    seconds: float,
    untimed: dict[str, float],
) -> list[Row]:
    """One row for each provider, timed together, and with a copy of x where bytes are counted; adds the seconds of its
    warm-up to ``untimed``."""
    moved = op.bytes_moved(pass_name, shape, inputs.x.dtype)
    contenders = [] if moved is None else [timing.Contender(COPY, lambda: inputs.x.detach().clone)]
    rows = []
    for name, call in calls.items():
        provider, reason = op.providers[name], ""
        if "backward" in pass_name:
            reason = verdicts[name].no_backward
        if pass_name == "backward" and provider.overwrites:
            reason = "writes over its input, so that one graph has one backward"
        if reason:
            rows.append(row(op, pass_name, dtype_name, shape, name, "skipped", reason))
            continue
        own = inputs.without_sharing(provider.overwrites)
        upstream = () if own.timed_upstream is None else as_tuple(own.timed_upstream)
        held = tuple(t for t in (*own.args, *upstream) if t is not None)
        ready, entered = partial(prepare, pass_name, call, own), partial(context, pass_name, provider)
        contenders.append(timing.Contender(name, ready, entered, held))
    samples = timing.time_group(contenders, clock, seconds)
    copy = samples.pop(COPY, None)
    copy_gb_s = 2 * inputs.x.nbytes / copy.median / 1e6 if copy is not None and copy.ms else None
    baseline = samples.get(BASELINE)
    if baseline is not None and not baseline.ms:
        baseline = None
    for name, s in samples.items():
        r = row(op, pass_name, dtype_name, shape, name)
        rows.append(r)
        untimed[name] += s.warm_up_s
        if s.error is not None:
            r.status, r.reason = "error", gate.describe(s.error)
            continue
        r.ms, r.p20_ms, r.p80_ms, r.rounds = s.median, s.quantile(0.2), s.quantile(0.8), len(s.ms)
        r.call_ms = statistics.median(s.call_ms) if s.call_ms else None
        r.peak_bytes, r.extra_bytes = s.peak.peak, s.peak.extra
        if moved is not None:
            r.bytes, r.gb_s, r.copy_gb_s = moved, moved / s.median / 1e6, copy_gb_s
            r.vs_copy = r.gb_s / copy_gb_s if copy_gb_s else None
        if baseline is not None:
            r.vs_torch = baseline.median / s.median
            r.peak_vs_torch = s.peak.peak / baseline.peak.peak if baseline.peak.peak else None
            r.extra_vs_torch = s.peak.extra / baseline.peak.extra if baseline.peak.extra else None
        add_errors(r, verdicts[name])
    return rows


def add_errors(row: Row, verdict: gate.Verdict) -> None:
    e = verdict.errors
    outputs = [error for key, error in e.items() if key.removesuffix(" without grad") in ("y", "summed")]
    row.err_y = max(outputs, default=None)
    row.err_dx, row.err_dw, row.err_db = e.get("dx"), e.get("dw"), e.get("db")


class Budget:
    """Shares the seconds that are left among the groups of rounds that are left, one for each pass of each case, after
    what gates and warm-ups will need: what they needed for cases of the same operation, or of any."""

    def __init__(self, seconds: float, cases: list[tuple[str, int]]) -> None:
        self.end = time.perf_counter() + seconds
        self.cases = cases  # operation and number of passes
        self.done, self.passes_done = 0, 0
        self.overheads: dict[str, list[float]] = {}

    def spent(self) -> bool:
        return time.perf_counter() >= self.end

    def next_group(self) -> float:
        later = self.cases[self.done + 1 :]
        groups = self.cases[self.done][1] - self.passes_done + sum(passes for _, passes in later)
        self.passes_done += 1
        known = [s for overheads in self.overheads.values() for s in overheads]
        usual = statistics.median(known) if known else 0.0
        needed = sum(statistics.median(self.overheads[op]) if op in self.overheads else usual for op, _ in later)
        return max(0.0, (self.end - time.perf_counter() - needed) / groups)

    def next_case(self, overhead: float | None) -> None:
        """The case is done; ``overhead`` is what it took beyond the shares of its groups, None if it could not run."""
        if overhead is not None:
            self.overheads.setdefault(self.cases[self.done][0], []).append(max(0.0, overhead))
        self.done, self.passes_done = self.done + 1, 0


def grid(args: argparse.Namespace) -> list[Case]:
    """The cases. Shape by shape, so that a run cut short has something to say of every operation and dtype."""
    device_type = torch.device(args.device).type
    cases: list[tuple[int, Case]] = []
    for name in args.op:
        op = OPS[name]
        if args.shapes is not None:
            shapes = [shape for shape in args.shapes if len(shape) == len(op.dims)]
        elif any(getattr(args, dim) for dim in DIMS):
            shapes = product(*(getattr(args, dim) or [DEFAULT_DIM[dim]] for dim in op.dims))
        else:
            shapes = (op.quick_shapes if args.quick else op.shapes)[device_type]
        dtypes = args.dtype or (["fp32"] if args.quick else op.dtypes[device_type])
        cases += [(i, (op, dtype, shape)) for i, shape in enumerate(shapes) for dtype in dtypes]
    return [case for _, case in sorted(cases, key=lambda numbered: numbered[0])]


def passes_of(op: Op, args: argparse.Namespace) -> list[str]:
    return [p for p in op.passes if args.passes is None or p in args.passes]


def run(
    args: argparse.Namespace, cases: list[Case], sink: Sink, progress: Progress, providers: dict[str, list[Provider]]
) -> int:
    """Fills the sink, with each operation's providers; returns how many cases the time did not suffice for."""
    device = torch.device(args.device)
    clock = timing.make_clock(device)
    untimed = {p.name: 0.0 for everyone in providers.values() for p in everyone}
    left_out: set[str] = set()
    budget = Budget(args.seconds, [(op.name, len(passes_of(op, args))) for op, _, _ in cases])
    for done, (op, dtype, shape) in enumerate(cases):
        if budget.spent():
            return len(cases) - done
        begin, shared = time.perf_counter(), 0.0
        where = f"{op.name} {dtype} {shape_text(shape)}"
        for p in providers[op.name]:
            if untimed[p.name] > UNTIMED_SHARE * args.seconds and p.name not in left_out:
                if p.ours or p.name == BASELINE:
                    continue
                left_out.add(p.name)
                reason = f"from here on: its first calls took {untimed[p.name]:.0f} of {args.seconds:.0f} s"
                sink.add(row(op, "all", dtype, shape, p.name, "skipped", reason))
        try:
            inputs = op.make_inputs(shape, DTYPES[dtype], device)
            here = [p for p in providers[op.name] if p.name not in left_out and p.takes(DTYPES[dtype])]
            verdicts, calls = gate.judge(op, inputs, here)
        except RuntimeError as e:  # no memory for the inputs or the truth
            sink.add(row(op, "all", dtype, shape, "all", "error", gate.describe(e)))
            for _ in passes_of(op, args):
                progress.step(where)
            budget.next_case(None)
            continue
        for name, verdict in verdicts.items():
            untimed[name] += verdict.seconds
            if verdict.status != "ok":
                r = row(op, "all", dtype, shape, name, verdict.status, verdict.reason)
                add_errors(r, verdict)
                sink.add(r)
        for pass_name in passes_of(op, args):
            share = budget.next_group()
            shared += share
            for r in time_pass(op, pass_name, dtype, shape, inputs, calls, verdicts, clock, share, untimed):
                sink.add(r)
            progress.step(f"{where} {pass_name}")
        del inputs, calls
        budget.next_case(time.perf_counter() - begin - shared)
    return 0


def _geomean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v]
    return math.exp(statistics.fmean(logs)) if logs else None


def _block(
    title: str, head: str, block: list[Row], cells: Callable[[Row], str], last: Callable[[list[Row]], str], width: int
) -> Iterator[str]:
    """A line a shape, a column a provider; ``head`` names what stands before the columns, ``last`` ends each."""
    names = list(dict.fromkeys(r.provider for r in block))
    shapes = list(dict.fromkeys(r.shape for r in block))
    cell = {(r.shape, r.provider): r for r in block}
    start = max(12, *map(len, shapes))
    yield from ("", title, f"{'':>{start}} {head:>10}" + "".join(f"  {name:>{width}}" for name in names))
    for shape in shapes:
        copy = next((r.copy_gb_s for r in block if r.shape == shape and r.copy_gb_s), None)
        first = f"{copy:.1f}" if copy is not None and head else ""
        line = f"{shape:>{start}} {first:>10}"
        for name in names:
            line += f"  {cells(cell[shape, name]) if (shape, name) in cell else '-':>{width}}"
        yield line
    ends = "".join(f"  {last([r for r in block if r.provider == name]):>{width}}" for name in names)
    yield f"{'geomean':>{start}} {'':>10}{ends}"


def _time_cell(r: Row) -> str:
    ratio = f"{r.vs_torch:.2f}x" if r.vs_torch else "-"
    share = f"{r.vs_copy:.0%}" if r.vs_copy else "-"
    return f"{r.ms:>9.4g} {ratio:>7} {share:>4}"


def _time_end(rows: list[Row]) -> str:
    mean = _geomean(r.vs_torch for r in rows)
    return f"{f'{mean:.2f}x' if mean else '-':>7} {'':>4}"


def _memory_cell(r: Row) -> str:
    def part(size: int, ratio: float | None) -> str:
        return f"{size / 1e6:>8.4g} {f'({ratio:.2f})' if ratio is not None else '':>6}"

    return f"{part(r.peak_bytes, r.peak_vs_torch)} {part(r.extra_bytes, r.extra_vs_torch)}"


def _memory_end(rows: list[Row]) -> str:
    means = (_geomean(r.peak_vs_torch for r in rows), _geomean(r.extra_vs_torch for r in rows))
    peak, extra = (f"({mean:.2f})" if mean else "" for mean in means)
    return f"{peak:>6} {'':>8} {extra:>6}"


def table(rows: list[Row]) -> str:
    """For each operation, pass and dtype a block with times; for forward+backward one with memory besides."""
    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.ms is not None:
            blocks.setdefault((r.op, r.pass_name, r.dtype), []).append(r)
    lines = []
    if blocks:
        lines.append("Median ms; torch's time over this one; share of the bandwidth of x.clone() in the same rounds.")
        lines.append("Memory: peak MB beyond the inputs (over torch's); beyond what is returned too (over torch's).")
        notes = {op: OPS[op].note for op, _, _ in blocks if OPS[op].note}
        lines += [line for op, note in notes.items() for line in textwrap.wrap(f"{op}: {note}.", 120)]
    for key, block in blocks.items():
        lines += _block(" ".join(key), "copy GB/s", block, _time_cell, _time_end, 22)
        if key[1] == "forward+backward":
            lines += _block(f"{' '.join(key)}: memory", "", block, _memory_cell, _memory_end, 31)
    not_timed: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status != "ok":
            not_timed.setdefault((r.provider, r.status, r.reason), []).append(r)
    if not_timed:
        lines += ["", "Not timed:"]
    for (name, status, reason), where in not_timed.items():
        r = where[0]
        place = "" if r.shape == "" else f" in {r.op} {r.pass_name} {r.dtype} {r.shape}"
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        lines.append(f"  {name}: {status}{place}{more}: {reason}")
    return "\n".join(lines)


def _names(known: Collection[str], groups: Mapping[str, list[str]] | None = None) -> Callable[[str], list[str]]:
    """For argparse: a list of known names, or of groups that stand for several."""
    groups = groups or {}

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in known and name not in groups:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*groups, *known))}")
        return list(dict.fromkeys(one for name in names for one in groups.get(name, [name])))

    return parse


def _ints(text: str) -> list[int]:
    try:
        values = [int(v) for v in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        sizes = _ints(part.replace("x", ","))
        if len(sizes) not in {len(op.dims) for op in OPS.values()}:
            raise argparse.ArgumentTypeError(f"{part!r} is not rows x columns, as in 4096x1024, nor with x hidden")
        shapes.append(tuple(sizes))
    return shapes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench", description="Time fused operations: first checked against the fp64 truth, then measured."
    )
    everyone = list(dict.fromkeys(name for op in OPS.values() for name in op.providers))
    p.add_argument(
        "--op",
        type=_names(OPS, GROUPS),
        default=GROUPS[DEFAULT_GROUP],
        help=f"of {', '.join(OPS)}, or the groups {', '.join(GROUPS)}; {DEFAULT_GROUP} by default",
    )
    p.add_argument("--pass", dest="passes", type=_names(PASSES), help=f"of {', '.join(PASSES)}; all by default")
    p.add_argument("--provider", type=_names(everyone), help=f"of {', '.join(everyone)}")
    p.add_argument("--dtype", type=_names(DTYPES), help=f"of {', '.join(DTYPES)}; by default an operation's usual ones")
    p.add_argument("--shapes", type=_shapes, help="rows x columns, as in 4096x1024,64x65536; of linear losses x hidden")
    p.add_argument("--m", type=_ints, help="numbers of rows, instead of --shapes")
    p.add_argument("--n", type=_ints, help="numbers of columns or classes, instead of --shapes")
    p.add_argument("--h", type=_ints, help="numbers of hidden features, instead of --shapes")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    p.add_argument("--threads", type=int, help="torch's CPU threads")
    p.add_argument("--seconds", type=float, help="time to spend; 300 by default. Cases past it are not run")
    p.add_argument("--quick", action="store_true", help="few shapes, fp32, no torch.compile, 30 s")
    p.add_argument("--output", type=Path, help="the CSV; environment and rows (.json) and table (.txt) go beside it")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        p.error(f"--device {args.device}: cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        p.error(f"--device {args.device}: cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch {torch.__version__} sees no GPU")
    if args.shapes and any(getattr(args, dim) for dim in DIMS):
        p.error("--shapes or --m, --n and --h, not both")
    for op in map(OPS.get, args.op):
        if args.shapes and not any(len(shape) == len(op.dims) for shape in args.shapes):
            p.error(f"--shapes has none of {' x '.join(op.dims)} for {op.name}")
        if args.provider and not any(name in op.providers for name in args.provider):
            p.error(f"--provider: {op.name} has none of {', '.join(args.provider)}, but {', '.join(op.providers)}")
        if not passes_of(op, args):
            p.error(f"--pass: {op.name} has none of {', '.join(args.passes)}, but {', '.join(op.passes)}")
    if args.seconds is None:
        args.seconds = 30.0 if args.quick else 300.0
    if args.output is None:
        args.output = Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{device.type}.csv"
    return args


def chosen_providers(args: argparse.Namespace) -> dict[str, list[Provider]]:
    """The providers asked for, by operation."""
    chosen = {}
    for op in map(OPS.get, args.op):
        names = args.provider or default_providers(op, args.quick)
        chosen[op.name] = [op.providers[name] for name in names if name in op.providers]
    return chosen


def main(argv: list[str] | None = None) -> int:
    """The command line. 0: all is well; 1: a provider of ours was wrong or failed (of the others it is only told, they
    have limits of their own); 130: interrupted, its rows kept."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sink = Sink(args.output)
    env = environment.collect(device, None if argv is None else ["bench", *argv])
    chosen = chosen_providers(args)
    reasons = {op: {p.name: p.unavailable(device) for p in everyone} for op, everyone in chosen.items()}
    env["providers"], env["finished"] = reasons, False
    env_path = args.output.with_suffix(".json")
    env_path.write_text(json.dumps(env, indent=2) + "\n")
    print(f"{env['device']['name']}, {env['threads']} threads, torch {torch.__version__}; rows go to {args.output}")
    told = set()
    for op, everyone in reasons.items():
        for name, reason in everyone.items():
            if reason is not None:
                sink.add(row(OPS[op], "all", "all", (), name, "skipped", reason))
                if (name, reason) not in told:
                    print(f"skipped: {name}: {reason}")
                told.add((name, reason))
    providers = {op: [p for p in everyone if reasons[op][p.name] is None] for op, everyone in chosen.items()}
    cases = grid(args)
    progress = Progress(sum(len(passes_of(op, args)) for op, _, _ in cases), quiet_seconds=15)
    status, text = 0, ""
    try:
        left = run(args, cases, sink, progress, providers)
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
    env["rows"] = [r.as_dict() for r in sink.rows]
    env_path.write_text(json.dumps(env, indent=2) + "\n")
    failed = [r for r in sink.rows if r.status in ("wrong", "error")]
    ours = any(r.provider in OPS[r.op].providers and OPS[r.op].providers[r.provider].ours for r in failed)
    return status or int(ours)
