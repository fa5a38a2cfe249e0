"""Measure what launches are chosen by: ``python bench/tune.py --output FILE.jsonl``, on a GPU.

For each norm pass, dtype and width: the native kernels, the Triton kernels as fused_norm/backends/triton/launch.py has
them launched, and launches around that choice; for the ticks loss native against Triton. All of a case are timed in the
same rounds, beside x.clone(), once their answers are right. FILE.jsonl gets a row for each, as the benchmark's files
have them, and goes on where it stopped; FILE.md and FILE.json propose, case by case, the fastest launch and backend,
and say how far behind the present ones are. It changes nothing: who changes a number names the file that justifies it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

import fused_norm
from fused_norm.bench import environment, gate, run, timing
from fused_norm.bench.cases import OPS
from fused_norm.bench.operation import DTYPES, Inputs, Op, Provider, gradients
from fused_norm.bench.results import Row, shape_text
from fused_norm.progress import Progress

NATIVE, PRESENT = "native", "triton"

PASSES = ("forward", "backward")
#: Widths, those of models first; rows as many as make this many elements.
COLUMNS = (4096, 1024, 8192, 768, 2048, 16384, 32768, 65536, 262144)
ELEMENTS = 1 << 26
#: Rows of these widths also where launches and the last wave of programs count.
FEW_ROWS, FEW_ROWS_COLUMNS = 4096, (1024, 4096)
CLASSES, LOGITS_ROWS = (128256, 32000, 262144), 4096

#: The most partial sums of dw and db: half and twice what there are, and twice an H100's multiprocessors.
PARTS = (128, 256, 264, 512)
#: How many tiles a program has in hand at once.
STAGES = (1, 2, 3, 4)

#: Times this near each other count as one.
SAME = 0.02

#: Rows of the calls that only compile: how many there are changes no kernel.
PREPARED_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """A launch of a Triton norm kernel as it differs from the present choice, and the most partial sums."""

    changes: dict[str, object] = field(default_factory=dict)
    parts: int | None = None

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.changes.items()]
        return " ".join([PRESENT, *words, *([f"parts={self.parts}"] if self.parts else [])])


def candidates(pass_name: str, n: int, element_size: int, **device: int) -> list[Candidate]:
    """Launches around the present one, which comes first: half and twice of each number, whole rows and looped.

    ``device`` is what the present choice knows of a device: ``warp_size`` and ``shared_memory``.
    """
    from fused_norm.backends.triton import launch

    forward = pass_name == "forward"
    choose = partial(launch.forward_launch if forward else launch.backward_launch, **device)
    now = choose(n, element_size)
    whole = 1 << (n - 1).bit_length()
    changes: list[dict[str, object]] = []
    for warps in (now.num_warps // 2, now.num_warps * 2):
        changes.append({"num_warps": warps})
        changes += [{"rows": rows, "num_warps": warps} for rows in (now.rows // 2, now.rows * 2)]
        if now.looped:
            changes += [{"block_n": block, "num_warps": warps} for block in (now.block_n // 2, now.block_n * 2)]
    changes += [{"rows": rows} for rows in (now.rows // 2, now.rows * 2)]
    if now.looped:
        changes += [{"block_n": block} for block in (now.block_n // 2, now.block_n * 2)]
        changes += [{"rows": 1, "block_n": whole, "num_warps": w, "looped": False} for w in (16, 32) if whole <= 32768]
    else:
        looped = choose(1 << 20, element_size)  # the widest row's
        if n >= looped.block_n:
            changes.append({f.name: getattr(looped, f.name) for f in fields(looped)})
    if now.looped or not forward:  # forward of a row that is held has one tile
        changes += [{"stages": value} for value in STAGES]
    found = [Candidate()]
    for change in changes:
        new = replace(now, **change)
        fits = 1 <= new.num_warps <= 32 and 1 <= new.rows <= 64 and new.block_n >= 16
        if new.looped and forward:
            fits = fits and new.rows == 1
        if fits and new != now:
            differs = [f.name for f in fields(new) if getattr(new, f.name) != getattr(now, f.name)]
            found.append(Candidate({name: getattr(new, name) for name in differs}))
    if not forward:
        found += [Candidate(parts=parts) for parts in PARTS if parts != launch.MAX_PARTS]
    return list({c.name: c for c in found}.values())


class Launched:
    """A context in which the Triton kernels of a pass are launched as a candidate says, from caches of its own: what it
    has launched once it launches again without further ado."""

    def __init__(self, pass_name: str, candidate: Candidate) -> None:
        from fused_norm.backends.triton import launch, norm

        name = f"{pass_name}_launch"
        choose = getattr(launch, name)
        self.values: list[tuple[object, str, object]] = []
        if candidate.changes:
            changed = functools.cache(lambda *args, **named: replace(choose(*args, **named), **candidate.changes))
            self.values.append((launch, name, changed))
        if candidate.parts is not None:
            self.values.append((launch, "MAX_PARTS", candidate.parts))
        if not self.values:
            return
        partition = launch.backward_partition
        self.values.append((launch, "backward_partition", functools.cache(partition.__wrapped__)))
        for key, value in vars(norm).items():
            if hasattr(value, "cache_info") and value.__module__ == norm.__name__:
                self.values.append((norm, key, functools.cache(value.__wrapped__)))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        before = [(module, name, getattr(module, name)) for module, name, _ in self.values]
        for module, name, value in self.values:
            setattr(module, name, value)
        try:
            with fused_norm.use_backend("triton"):
                yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


@dataclass(frozen=True)
class Tuned:
    """A case of one pass, with all that is tried in it as the providers of its operation."""

    case: run.Case
    pass_name: str

    def __str__(self) -> str:
        return f"{self.case.op.name} {self.pass_name} {self.case.dtype} {shape_text(self.case.shape)}"


def known_of(device: torch.device) -> dict[str, int]:
    from fused_norm.backends.triton import common

    return {"warp_size": common.warp_size(device), "shared_memory": common.shared_memory(device)}


def tuned(
    op: Op, pass_name: str, dtype: str, shape: tuple[int, ...], cache: str, device: dict[str, int] | None = None
) -> Tuned:
    everyone = [Provider(NATIVE, lambda: op.fused, context=partial(fused_norm.use_backend, "native"))]
    tried = [Candidate()]
    if op.group == "norms":
        tried = candidates(pass_name, shape[1], DTYPES[dtype].itemsize, **(device or {}))
    everyone += [Provider(c.name, lambda: op.fused, context=Launched(pass_name, c)) for c in tried]
    return Tuned(run.Case(replace(op, providers={p.name: p for p in everyone}), dtype, shape, cache), pass_name)


def plan(args: argparse.Namespace, cache: str, device: dict[str, int] | None = None) -> list[Tuned]:
    """The cases, by width: what a run cut short has done, it has done for both dtypes and passes."""
    norm, ticks = OPS["layer_norm"], OPS["ticks_cross_entropy"]
    cases = []
    for n in args.n:
        few = [FEW_ROWS] if args.elements == ELEMENTS and n in FEW_ROWS_COLUMNS else []
        for m in (max(1, args.elements // n), *few):
            cases += [(norm, at, dtype, (m, n)) for dtype in args.dtype for at in PASSES]
    for v in args.classes:
        cases += [(ticks, at, dtype, (args.rows, v)) for dtype in args.dtype for at in PASSES]
    return [tuned(*case, cache, device) for case in cases]


def available(device: torch.device) -> dict[str, str | None]:
    """Why a backend cannot serve here, or None."""
    from fused_norm import dispatch

    return {name: dispatch.unavailable(name, "norm", device.type) for name in ("native", "triton")}


def usable(t: Tuned, missing: dict[str, str | None]) -> list[Provider]:
    return [p for p in t.case.op.providers.values() if missing[p.name.partition(" ")[0]] is None]


def compile_only(
    cases: list[Tuned], part: tuple[int, int], device: torch.device, missing: dict[str, str | None]
) -> None:
    """Call each Triton launch once, of the part's: compiled kernels stay on disk, where the timed run finds them."""
    i, n = part
    everyone = [(t, p) for t in cases for p in usable(t, missing) if p.name != NATIVE]
    inputs: dict[tuple, Inputs] = {}
    for t, p in everyone[i::n]:
        op, dtype, columns = t.case.op, t.case.dtype, t.case.shape[1]
        key = op.name, dtype, columns
        if key not in inputs:
            inputs = {key: op.make_inputs((PREPARED_ROWS, columns), DTYPES[dtype], device)}
        own = inputs[key]
        try:
            with p.context():
                y = p.make()(*own.args)
                gradients(y, own.leaf_tensors, own.upstream)
        except Exception as e:
            print(f"{t} {p.name}: {gate.describe(e)}", flush=True)


def measure(cases: list[Tuned], args: argparse.Namespace, sink: run.Sink, device: torch.device, missing: dict) -> bool:
    """Fills the sink, as far as the time goes; True if all is there."""
    there = {(r.op, r.pass_name, r.dtype, r.shape, r.provider) for r in sink.rows}

    def lacking(t: Tuned) -> list[Provider]:
        place = (t.case.op.name, t.pass_name, t.case.dtype, t.case.shape)
        return [p for p in usable(t, missing) if (*place, p.name) not in there]

    todo = [t for t in cases if lacking(t)]
    clock = timing.make_clock(device, args.cache)
    budget = run.Budget(args.seconds, [(t.case.op.name, 1) for t in todo])
    progress = Progress(len(todo))
    for t in todo:
        if budget.spent():
            progress.close()
            return False
        case, op = t.case, t.case.op
        begin, wanted = time.perf_counter(), {p.name for p in lacking(t)}
        progress.begin(str(t))
        # Those that have a row already run along: the rows of one case are of the same rounds.
        inputs = op.make_inputs(case.shape, DTYPES[case.dtype], device)
        verdicts, calls = gate.judge(op, inputs, usable(t, missing))
        for name in wanted - calls.keys():
            sink.add(case.row(t.pass_name, name, verdicts[name].status, verdicts[name].reason))
        share = budget.next_group()
        untimed = dict.fromkeys(calls, 0.0)
        rows = run.time_pass(case, t.pass_name, inputs, calls, verdicts, clock, share, untimed)
        for row in rows:
            sink.add(row)
        del inputs, calls
        budget.next_case(time.perf_counter() - begin - share)
        progress.step(str(t))
    progress.close()
    return True


def proposals(rows: Iterable[Row]) -> list[dict[str, object]]:
    """For each case the times (ms) of the native kernels, of the present Triton launch and of the fastest one, how far
    the present one is behind it, and which backend is the faster as both are. Of a provider's rows the last counts."""
    cases: dict[tuple, dict[str, Row]] = {}
    for r in rows:
        cases.setdefault((r.op, r.pass_name, r.dtype, r.m, r.n), {})[r.provider] = r
    found = []
    for (op, at, dtype, m, n), by_name in cases.items():
        times = {name: r.ms for name, r in by_name.items() if r.ms is not None}
        tried = {name: ms for name, ms in times.items() if name != NATIVE}
        best = min(tried, key=tried.get, default=None)
        present, native = times.get(PRESENT), times.get(NATIVE)
        behind = None if present is None else present / tried[best] - 1
        serve = None
        if present is not None and native is not None:
            serve = "either" if abs(native / present - 1) <= SAME else NATIVE if native < present else PRESENT
        found.append(
            {
                "op": op,
                "pass": at,
                "dtype": dtype,
                "m": m,
                "n": n,
                "native_ms": native,
                "triton_ms": present,
                "serve": serve,
                "best": best,
                "best_ms": tried.get(best),
                "best_vs_copy": None if best is None else by_name[best].vs_copy,
                "behind": behind,
                "tried": len(tried),
                "failed": sorted(name for name, r in by_name.items() if r.status in ("wrong", "error")),
            }
        )
    return found


def broken(row: Row) -> bool:
    """A wrong answer, or one that failed to come; a launch that was only tried may be more than a device can hold."""
    return row.status == "wrong" or (row.status == "error" and row.provider in (NATIVE, PRESENT))


def markdown(found: list[dict[str, object]]) -> str:
    lines = ["| case | native ms | triton ms | serve by | fastest launch | its ms | of the roof | present is behind |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for p in found:
        keep = p["behind"] is not None and p["behind"] <= SAME
        launch = "as it is" if keep else (p["best"] or "none").removeprefix(f"{PRESENT} ")
        failed = f"; wrong or failed: {', '.join(p['failed'])}" if p["failed"] else ""
        cells = [f"{p['op']} {p['pass']} {p['dtype']} {p['m']}x{p['n']}"]
        cells += [text(p["native_ms"], ".4f"), text(p["triton_ms"], ".4f"), p["serve"] or "", f"{launch}{failed}"]
        cells += [text(p["best_ms"], ".4f"), text(p["best_vs_copy"], ".0%"), text(p["behind"], ".1%")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def seconds(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text)

    def number(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def numbers(text: str) -> list[int]:
        return [number(part) for part in text.split(",") if part]

    def dtypes(text: str) -> list[str]:
        if unknown := set(text.split(",")) - DTYPES.keys():
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(DTYPES)}")
        return text.split(",")

    def part(text: str) -> tuple[int, int]:
        i, n = map(int, text.split("/"))
        if not 1 <= i <= n:
            raise ValueError
        return i - 1, n

    p = argparse.ArgumentParser(prog="tune", description="Measure launches, and propose the fastest.")
    p.add_argument("--output", type=Path, default=Path("runs") / "tune.jsonl", metavar="FILE.jsonl")
    p.add_argument("--seconds", type=seconds, help=f"time for everything; by default {run.PASS_S:.0f} s a case")
    p.add_argument("--prepare", type=part, metavar="I/N", help="only compile the I-th part of N of what is to be tried")
    p.add_argument("--n", type=numbers, default=list(COLUMNS), help="columns of the norms")
    p.add_argument("--elements", type=number, default=ELEMENTS, help="of a norm's input; rows follow")
    p.add_argument("--classes", type=numbers, default=list(CLASSES), help="of the ticks loss")
    p.add_argument("--rows", type=number, default=LOGITS_ROWS, help="of its logits")
    p.add_argument("--dtype", type=dtypes, default=["fp32", "bf16"])
    p.add_argument("--device", default="cuda", help="cuda; cpu in Triton's interpreter, to try this script")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: all was measured; 1: the time was spent before, or something of ours was wrong; 2: nothing could be run."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return run.REFUSED
    missing = available(device)
    if missing["triton"] is not None:
        print(f"tune: triton: {missing['triton']}", file=sys.stderr)
        return run.REFUSED
    args.cache, args.json = timing.DEFAULT_CACHE[device.type], False
    cases = plan(args, args.cache, known_of(device))
    if args.prepare is not None:
        compile_only(cases, args.prepare, device, missing)
        return 0
    env = environment.collect(device, ["bench/tune.py", *(sys.argv[1:] if argv is None else argv)])
    env["providers"] = missing
    try:
        _, sink = run.open_results(args, env)
    except (OSError, ValueError) as e:
        print(f"tune: {e}", file=sys.stderr)
        return run.REFUSED
    sink.write({"kind": "environment", **env})
    finished = interrupted = False
    try:
        finished = measure(cases, args, sink, device, missing)
    except KeyboardInterrupt:
        interrupted = True
    if finished:
        sink.write({"kind": "end", "finished": True})
    found = proposals(sink.rows)
    args.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(f"{markdown(found)}\n")
    print(markdown(found))
    if interrupted:
        return run.INTERRUPTED
    return int(not finished or any(broken(r) for r in sink.rows))


if __name__ == "__main__":
    sys.exit(main())
