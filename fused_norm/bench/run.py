"""The runner: gate, then time every operation x dtype x shape x pass x provider; each row is on disk as it is made."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from ..progress import Progress
from . import environment, gate, results, timing
from .cases import GROUPS, OPS
from .operation import BASELINE, DIMS, DTYPES, PASSES, Call, Inputs, Op, Provider, as_tuple, gradients
from .providers import default_providers
from .results import CACHES, Row, shape_text
from .shapes import Shape
from .table import HEAD, about, row_line, table

#: The name under which x.clone() runs beside the providers: it reads once, writes once and allocates, as a norm does.
COPY = "copy"

#: The group of operations that runs where none is named.
DEFAULT_GROUP = "norms"

#: What a dimension is where only others are named.
DEFAULT_DIM = {"m": 4096, "n": 1024, "h": 1024}

#: Names of sets of shapes beside each operation's sweeps: its default, its quick ones, and all there are.
DEFAULT_SET, QUICK_SET, ALL_SETS = "default", "quick", "all"

#: Seconds for the rounds of one pass of a case, where no time is set for all of them.
PASS_S = 2.0

INTERRUPTED, REFUSED = 130, 2

#: Of others' providers, one that has used up this part of the time without being timed (by compiling, that is) is left
#: out from then on, so that the rest get through all cases.
UNTIMED_SHARE = 0.4


@dataclass(frozen=True)
class Case:
    op: Op
    dtype: str
    shape: Shape
    cache: str

    def __str__(self) -> str:
        return f"{self.op.name} {self.dtype} {shape_text(self.shape)}"

    def row(self, pass_name: str, provider: str, status: str = "ok", reason: str = "") -> Row:
        sizes = dict(zip(self.op.dims, self.shape, strict=True))
        m, n, h = (sizes.get(dim) for dim in DIMS)
        return Row(self.op.name, pass_name, self.dtype, m, n, h, provider, self.cache, status, reason=reason)


def row_of_operation(op: str, provider: str, cache: str, reason: str) -> Row:
    """That a provider is skipped in all of an operation's cases, or in those that are left."""
    return Row(op, "all", "all", None, None, None, provider, cache, "skipped", reason=reason)


class Sink:
    """All rows of a file: those that it had, and those that are added to it, one by one; ``echo`` prints its lines."""

    def __init__(self, path: Path, rows: list[Row], echo: bool) -> None:
        self.writer, self.rows, self.echo = results.Writer(path), list(rows), echo

    def write(self, line: dict[str, object]) -> None:
        text = self.writer.write(line)
        if self.echo:
            print(text, flush=True)

    def add(self, row: Row) -> None:
        self.write(row.to_json())
        self.rows.append(row)


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
    case: Case,
    pass_name: str,
    inputs: Inputs,
    calls: dict[str, Call],
    verdicts: dict[str, gate.Verdict],
    clock: timing.Clock,
    seconds: float,
    untimed: dict[str, float],
) -> list[Row]:
    """One row for each provider, timed together, and with a copy of x where bytes are counted; adds the seconds of its
    warm-up to ``untimed``."""
    op = case.op
    moved = op.bytes_moved(pass_name, case.shape, inputs.x.dtype)
    contenders = [] if moved is None else [timing.Contender(COPY, lambda: inputs.x.detach().clone)]
    rows = []
    for name, call in calls.items():
        provider, reason = op.providers[name], ""
        if "backward" in pass_name:
            reason = verdicts[name].no_backward
        if pass_name == "backward" and provider.overwrites:
            reason = "writes over its input, so that one graph has one backward"
        if pass_name == "backward" and provider.one_backward:
            reason = provider.one_backward
        if reason:
            rows.append(case.row(pass_name, name, "skipped", reason))
            continue
        own = inputs.without_sharing(provider.overwrites)
        upstream = () if own.timed_upstream is None else as_tuple(own.timed_upstream)
        held = tuple(t for t in (*own.args, *upstream) if t is not None)
        ready, entered = partial(prepare, pass_name, call, own), partial(context, pass_name, provider)
        contenders.append(timing.Contender(name, ready, entered, held))
    samples = timing.time_group(contenders, clock, seconds)
    copy = samples.pop(COPY, None)
    copy_gb_s = 2 * inputs.x.nbytes / copy.median / 1e6 if copy is not None and copy.error is None else None
    baseline = samples.get(BASELINE)
    if baseline is not None and baseline.error is not None:
        baseline = None
    for name, s in samples.items():
        r = case.row(pass_name, name)
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
            ratios = s.ratios(baseline)
            r.vs_torch, r.vs_torch_p20, r.vs_torch_p80 = (timing.quantile(ratios, q) for q in (0.5, 0.2, 0.8))
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
    what gates and warm-ups will need: what they needed for cases of the same operation, or of any. Without a limit each
    group has `PASS_S`."""

    def __init__(self, seconds: float | None, cases: list[tuple[str, int]]) -> None:
        self.seconds = seconds
        self.end = time.perf_counter() + (seconds or 0.0)
        self.cases = cases  # operation and number of passes
        self.done, self.passes_done = 0, 0
        self.overheads: dict[str, list[float]] = {}

    def spent(self) -> bool:
        return self.seconds is not None and time.perf_counter() >= self.end

    def too_much(self, untimed_s: float) -> bool:
        return self.seconds is not None and untimed_s > UNTIMED_SHARE * self.seconds

    def next_group(self) -> float:
        if self.seconds is None:
            return PASS_S
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


def sets_of(op: Op, device_type: str) -> dict[str, tuple[Shape, ...]]:
    """An operation's shapes by the names of their sets."""
    sets = {DEFAULT_SET: op.shapes[device_type], QUICK_SET: op.quick_shapes[device_type]}
    sets |= {name: shapes[device_type] for name, shapes in op.sweeps.items()}
    return sets | {ALL_SETS: tuple(dict.fromkeys(shape for shapes in sets.values() for shape in shapes))}


def grid(args: argparse.Namespace) -> list[Case]:
    """The cases. Shape by shape, so that a run cut short has something to say of every operation and dtype."""
    device_type = torch.device(args.device).type
    cases: list[tuple[int, Case]] = []
    for name in args.op:
        op = OPS[name]
        if any(getattr(args, dim) for dim in DIMS):
            shapes = product(*(getattr(args, dim) or [DEFAULT_DIM[dim]] for dim in op.dims))
        else:
            sets = sets_of(op, device_type)
            chosen = (sets.get(part, ()) if isinstance(part, str) else (part,) for part in args.shapes)
            shapes = [shape for part in chosen for shape in part if len(shape) == len(op.dims)]
        dtypes = args.dtype or op.dtypes[device_type]
        shapes = dict.fromkeys(shapes)
        cases += [(i, Case(op, dtype, shape, args.cache)) for i, shape in enumerate(shapes) for dtype in dtypes]
    return [case for _, case in sorted(cases, key=lambda numbered: numbered[0])]


def passes_of(op: Op, args: argparse.Namespace) -> list[str]:
    return [p for p in op.passes if args.passes is None or p in args.passes]


#: What is to be measured: for each case, the providers of each pass.
Plan = list[tuple[Case, dict[str, list[Provider]]]]


def pending(args: argparse.Namespace, providers: dict[str, list[Provider]], rows: list[Row]) -> Plan:
    """All that is asked for and has no row."""
    there = {(r.op, r.pass_name, r.dtype, r.shape, r.provider, r.cache) for r in rows}

    def missing(case: Case, pass_name: str, p: Provider) -> bool:
        places = product((pass_name, "all"), (p.name, "all"))
        return not any((case.op.name, at, case.dtype, case.shape, who, case.cache) in there for at, who in places)

    plan = []
    for case in grid(args):
        usable = [p for p in providers[case.op.name] if p.takes(DTYPES[case.dtype])]
        todo = {at: [p for p in usable if missing(case, at, p)] for at in passes_of(case.op, args)}
        todo = {at: lacking for at, lacking in todo.items() if lacking}
        if todo:
            plan.append((case, todo))
    return plan


def run(
    args: argparse.Namespace, plan: Plan, sink: Sink, progress: Progress, providers: dict[str, list[Provider]]
) -> None:
    """Fills the sink, as far as the time goes. Of each operation's ``providers`` the baseline runs along where it has
    its row already and others have none: ratios are of one and the same rounds."""
    device = torch.device(args.device)
    clock = timing.make_clock(device, args.cache)
    untimed = {p.name: 0.0 for everyone in providers.values() for p in everyone}
    left_out: set[str] = set()
    budget = Budget(args.seconds, [(case.op.name, len(todo)) for case, todo in plan])
    if plan:
        progress.note(HEAD)
    for case, todo in plan:
        if budget.spent():
            return
        begin, shared, op = time.perf_counter(), 0.0, case.op
        lacking = {p.name for everyone in todo.values() for p in everyone}
        for p in providers[op.name]:
            if p.name not in lacking or p.name in left_out or p.ours or p.name == BASELINE:
                continue
            if budget.too_much(untimed[p.name]):
                left_out.add(p.name)
                reason = f"left out from {case} on: its first calls took {untimed[p.name]:.0f} of {args.seconds:.0f} s"
                sink.add(row_of_operation(op.name, p.name, args.cache, reason))
        lacking -= left_out
        here = [p for p in providers[op.name] if p.name in lacking or (p.name == BASELINE and lacking)]
        progress.begin(f"checking {case}")
        try:
            inputs = op.make_inputs(case.shape, DTYPES[case.dtype], device)
            verdicts, calls = gate.judge(op, inputs, here)
        except RuntimeError as e:  # no memory for the inputs or the truth
            sink.add(case.row("all", "all", "error", gate.describe(e)))
            progress.note(f"{case}: {gate.describe(e)}")
            for _ in todo:
                progress.step(str(case))
            budget.next_case(None)
            continue
        for name, verdict in verdicts.items():
            untimed[name] += verdict.seconds
            if verdict.status != "ok" and name in lacking:
                r = case.row("all", name, verdict.status, verdict.reason)
                add_errors(r, verdict)
                sink.add(r)
                progress.note(f"{case}\n{row_line(r)}")
        for pass_name, everyone in todo.items():
            wanted = {p.name for p in everyone} & calls.keys()
            share = budget.next_group()
            shared += share
            if not wanted:
                progress.step(str(case))
                continue
            where = f"{op.name} {pass_name} {case.dtype} {shape_text(case.shape)}"
            progress.begin(where)
            contenders = {name: call for name, call in calls.items() if name in wanted or name == BASELINE}
            rows = time_pass(case, pass_name, inputs, contenders, verdicts, clock, share, untimed)
            rows = [r for r in rows if r.provider in wanted]
            for r in rows:
                sink.add(r)
            progress.step(where, [row_line(r) for r in rows])
        del inputs, calls
        budget.next_case(time.perf_counter() - begin - shared)


def check(args: argparse.Namespace, providers: dict[str, list[Provider]]) -> int:
    """Judge every provider in every case and time nothing; 1 if one of ours is wrong or fails, else 0.

    Compilers keep what they compile on disk, where a later run finds it: so does one that only times.
    """
    device, status = torch.device(args.device), 0
    for case in grid(args):
        usable = [p for p in providers[case.op.name] if p.takes(DTYPES[case.dtype])]
        try:
            verdicts, _ = gate.judge(case.op, case.op.make_inputs(case.shape, DTYPES[case.dtype], device), usable)
        except RuntimeError as e:  # no memory for the inputs or the truth
            print(f"{case}: {gate.describe(e)}", flush=True)
            continue
        found = "; ".join(f"{name} {v.status}: {v.reason}" for name, v in verdicts.items() if v.status != "ok")
        print(f"{case}: {found or 'all are right'}", flush=True)
        if any(verdicts[p.name].status in ("wrong", "error") for p in usable if p.ours):
            status = 1
    return status


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


def _shapes(text: str) -> list[Shape | str]:
    """Shapes, and names of sets of them."""
    sets = dict.fromkeys(name for op in OPS.values() for name in sets_of(op, "cpu"))
    shapes: list[Shape | str] = []
    for part in text.split(","):
        if part in sets:
            shapes.append(part)
            continue
        if not part[:1].isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is neither a shape, as in 4096x1024, nor of {', '.join(sets)}")
        sizes = _ints(part.replace("x", ","))
        if len(sizes) not in {len(op.dims) for op in OPS.values()}:
            raise argparse.ArgumentTypeError(f"{part!r} is not rows x columns, as in 4096x1024, nor with x hidden")
        shapes.append(tuple(sizes))
    return shapes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench",
        description="Time fused operations: first checked against the fp64 truth, then measured.",
        epilog="Ctrl-C loses nothing: the same command with the same --output goes on where it stopped.",
    )
    everyone = list(dict.fromkeys(name for op in OPS.values() for name in op.providers))
    sets = list(dict.fromkeys(name for op in OPS.values() for name in sets_of(op, "cpu")))
    p.add_argument(
        "--op",
        type=_names(OPS, GROUPS),
        default=GROUPS[DEFAULT_GROUP],
        help=f"of {', '.join(OPS)}, or the groups {', '.join(GROUPS)}; {DEFAULT_GROUP} by default",
    )
    p.add_argument("--pass", dest="passes", type=_names(PASSES), help=f"of {', '.join(PASSES)}; all by default")
    p.add_argument("--provider", type=_names(everyone), help=f"of {', '.join(everyone)}")
    p.add_argument("--dtype", type=_names(DTYPES), help=f"of {', '.join(DTYPES)}; by default an operation's usual ones")
    p.add_argument(
        "--shapes",
        type=_shapes,
        help="rows x columns, as in 4096x1024,64x65536; of linear losses x hidden; or the sets"
        f" {', '.join(sets)} of an operation's table",
    )
    p.add_argument("--m", type=_ints, help="numbers of rows, instead of --shapes")
    p.add_argument("--n", type=_ints, help="numbers of columns or classes, instead of --shapes")
    p.add_argument("--h", type=_ints, help="numbers of hidden features, instead of --shapes")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    p.add_argument(
        "--cache",
        choices=CACHES,
        help="what a call finds in the caches: what the same call just left there (warm, the default on a CPU), or"
        " other data (cold, the default on CUDA)",
    )
    p.add_argument("--threads", type=int, help="torch's CPU threads")
    p.add_argument(
        "--seconds",
        type=float,
        help=f"time for everything, shared among the cases, some of which may not be run; by default {PASS_S:.0f} s for"
        " each pass of each case, and what compiling takes",
    )
    p.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="environment and rows, a JSON object a line; the table (.txt) goes beside it. One that exists is"
        " continued: what has its row there is not measured again",
    )
    p.add_argument("--check", action="store_true", help="judge the answers alone: no times, no rows, no file")
    p.add_argument("--json", action="store_true", help="print what goes to the file instead of the table")
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
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads {args.threads}: at least 1")
    args.shapes = args.shapes or [DEFAULT_SET]
    args.cache = args.cache or timing.DEFAULT_CACHE[device.type]
    cases = grid(args)
    for op in map(OPS.get, args.op):
        if not any(case.op is op for case in cases):
            p.error(f"--shapes has none of {' x '.join(op.dims)} for {op.name}")
        if args.provider and not any(name in op.providers for name in args.provider):
            p.error(f"--provider: {op.name} has none of {', '.join(args.provider)}, but {', '.join(op.providers)}")
        if not passes_of(op, args):
            p.error(f"--pass: {op.name} has none of {', '.join(args.passes)}, but {', '.join(op.passes)}")
    if args.output is None:
        args.output = Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{device.type}.jsonl"
    if args.output.suffix != ".jsonl":
        p.error(f"--output {args.output}: results are JSON lines, in a file named .jsonl")
    return args


def chosen_providers(args: argparse.Namespace) -> dict[str, list[Provider]]:
    """The providers asked for, by operation."""
    chosen = {}
    for op in map(OPS.get, args.op):
        names = args.provider or default_providers(op)
        chosen[op.name] = [op.providers[name] for name in names if name in op.providers]
    return chosen


def open_results(args: argparse.Namespace, env: dict[str, object]) -> tuple[results.Run, Sink]:
    """What the file holds, and the sink that goes on with it. Raises ValueError where that would mix machines, versions
    or settings, and OSError where it cannot be read or written."""
    there = results.read(args.output) if args.output.exists() else results.Run([], [], False)
    differing = environment.differences(there.environments[-1], env) if there.environments else []
    if differing:
        raise ValueError(
            f"{args.output} was measured under other conditions, and its rows and these would not compare:\n  "
            + "\n  ".join(differing)
            + "\nGive another --output, or delete that file to measure anew."
        )
    sink = Sink(args.output, there.rows, args.json)
    if args.json:
        sys.stdout.write(args.output.read_text())
    return there, sink


def main(argv: list[str] | None = None) -> int:
    """The command line. 0: all is well; 1: a provider of ours was wrong or failed (of the others it is only told, they
    have limits of their own); 2: nothing was run; 130: interrupted, its rows kept."""
    try:
        return _main(argv)
    except KeyboardInterrupt:  # before the first case or after the last
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def _main(argv: list[str] | None) -> int:
    begin = time.perf_counter()
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    env = environment.collect(
        device, ["python", *sys.argv] if argv is None else ["python", "-m", "fused_norm", "bench", *argv]
    )
    chosen = chosen_providers(args)
    reasons = {op: {p.name: p.unavailable(device) for p in everyone} for op, everyone in chosen.items()}
    env["providers"] = reasons
    providers = {op: [p for p in everyone if reasons[op][p.name] is None] for op, everyone in chosen.items()}
    if args.check:
        return check(args, providers)
    try:
        there, sink = open_results(args, env)
    except (OSError, ValueError) as e:
        print(f"bench: {e}", file=sys.stderr)
        return REFUSED
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    plan = pending(args, providers, there.rows)
    say(f"{about(env)}\nrows go to {args.output}")
    if there.rows:
        say(f"{len(there.rows)} rows are there already, {sum(len(todo) for _, todo in plan)} passes are left")
    status, notice = 0, ""
    if plan or not there.finished:
        sink.write({"kind": "environment", **env})
        skipped = {}
        for op, everyone in reasons.items():
            for name, reason in everyone.items():
                if reason is not None:
                    skipped[name, reason] = None
                    r = row_of_operation(op, name, args.cache, reason)
                    if r not in there.rows:
                        sink.add(r)
        for name, reason in skipped:
            say(f"skipped: {name}: {reason}")
        progress = Progress(sum(len(todo) for _, todo in plan))
        try:
            run(args, plan, sink, progress, providers)
        except KeyboardInterrupt:
            status, notice = INTERRUPTED, f"Interrupted: the {len(sink.rows)} rows made so far are in {args.output}. "
        left = sum(len(todo) for _, todo in pending(args, providers, sink.rows))
        if left:
            notice = notice or f"The {args.seconds:.0f} s were spent. "
            notice += f"{left} passes are left: the same command with --output {args.output} goes on."
        else:
            sink.write({"kind": "end", "finished": True, "seconds": round(time.perf_counter() - begin, 1)})
        if sys.stdout.isatty() and not args.json:
            progress.erase_notes()
        progress.close()
    text = "\n\n".join(part for part in (table(sink.rows), notice) if part)
    headings = "\n".join(map(about, results.read(args.output).environments))
    args.output.with_suffix(".txt").write_text(f"{headings}\n{text}\n")
    say(notice if args.json else text)
    failed = [r for r in sink.rows if r.status in ("wrong", "error")]
    ours = any(r.provider in OPS[r.op].providers and OPS[r.op].providers[r.provider].ours for r in failed)
    return status or int(ours)
