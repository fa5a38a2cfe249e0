"""What got faster or slower between two results of the benchmark: ``python bench/compare.py BEFORE AFTER``.

Rows are matched by operation, pass, dtype, shape, provider and cache, and compared by their ratio to torch, which was
measured in the same rounds: what else the machine did falls on both. ``--by ms`` compares times instead, for a quiet
machine, or where torch is another.

A row has changed if its median moved by ``--change`` or more, the two ranges from p20 to p80 lie apart (each widened by
10/rounds of itself: few rounds tell little of a range), and it moved by more than five times the noise, which is how
far the rows of a set scatter about its median. A set is all shapes of one operation, pass, dtype and provider. One of
four or more has changed if its median moved by ``--change`` or more and by five of its standard errors: that finds
what is too small to be seen in any row.

On one machine, torch's own time should be the same: where it differs by half, something else ran, and the row is set
aside. Peak memory, which has no noise, is compared as well.

Exit status: 1 if something of ours got slower, takes more memory, or is ok no more; 2 if less than half of what both
have of ours could be compared; else 0. Of other providers it is only told.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from fused_norm.bench.environment import differences
from fused_norm.bench.operation import BASELINE
from fused_norm.bench.results import Row, Run, read, shape_text

Key = tuple[str, str, str, tuple[int, ...], str, str]

#: torch's time in one run over that in the other, from which on a row says nothing.
DISTURBED = 1.5

#: Rows in the smallest set that is judged as a whole.
SET_ROWS = 4

#: How many times the noise is more than noise.
SIGMAS = 5.0

#: What of an environment makes torch's times comparable.
SAME_MACHINE = ("device", "cpu", "threads")


def key(row: Row) -> Key:
    return row.op, row.pass_name, row.dtype, row.shape, row.provider, row.cache


def is_ours(key: Key) -> bool:
    return key[4].partition(":")[0] == "fused"


def name(key: Key) -> str:
    op, pass_name, dtype, shape, provider, cache = key
    return " ".join(filter(None, (op, pass_name, dtype, shape_text(shape), provider, "cold" * (cache == "cold"))))


@dataclass(frozen=True)
class Speed:
    """A row's speed: torch's time over its own, or one over milliseconds; above is faster."""

    median: float
    low: float
    high: float

    def widened(self, rounds: int) -> tuple[float, float]:
        factor = 1 + 10 / rounds
        return self.median * (self.low / self.median) ** factor, self.median * (self.high / self.median) ** factor


def speed_to_torch(row: Row) -> Speed | None:
    if row.provider == BASELINE or None in (row.vs_torch, row.vs_torch_p20, row.vs_torch_p80):
        return None
    return Speed(row.vs_torch, row.vs_torch_p20, row.vs_torch_p80)


def speed_in_ms(row: Row) -> Speed | None:
    return None if None in (row.ms, row.p20_ms, row.p80_ms) else Speed(1 / row.ms, 1 / row.p80_ms, 1 / row.p20_ms)


SPEEDS: dict[str, Callable[[Row], Speed | None]] = {"torch": speed_to_torch, "ms": speed_in_ms}


@dataclass
class Comparison:
    """``told`` holds lines by what they tell and whether it is of ours; ``common`` counts our rows that both have;
    ``least`` is how far a row must move, as a logarithm."""

    common: int = 0
    moves: list[Move] = field(default_factory=list)
    noise: float = 0.0
    least: float = 0.0
    disturbed: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    told: dict[tuple[str, bool], list[str]] = field(default_factory=dict)

    def tell(self, what: str, key: Key, line: str) -> None:
        self.told.setdefault((what, is_ours(key)), []).append(line)

    @property
    def ours(self) -> int:
        return sum(is_ours(move.key) for move in self.moves)

    @property
    def regressed(self) -> bool:
        return any(ours and what in REGRESSIONS for what, ours in self.told)


#: What is told, in this order; the first four are regressions.
REGRESSIONS = ("status", "slower", "slower as a set", "more memory")
KINDS = (*REGRESSIONS, "faster", "faster as a set", "less memory", "ok again", "missing", "new")


def percent(log_change: float) -> str:
    return f"{math.expm1(log_change):+.0%}"


def found_in(rows: dict[Key, Row], wanted: Row) -> Row | None:
    """The row of the same key, or one that stands for it: a verdict on all passes, or on all of an operation."""
    places = (
        (wanted.pass_name, wanted.dtype, wanted.shape),
        ("all", wanted.dtype, wanted.shape),
        ("all", "all", ()),
    )
    return next(
        (rows[k] for place in places if (k := (wanted.op, *place, wanted.provider, wanted.cache)) in rows), None
    )


def same_machine(a: Run, b: Run) -> bool:
    return all(a.environments[-1].get(what) == b.environments[-1].get(what) for what in SAME_MACHINE)


@dataclass(frozen=True)
class Move:
    """A row that both have, and its two speeds."""

    key: Key
    was: Speed
    now: Speed
    rounds: tuple[int, int]

    @property
    def log(self) -> float:
        """Above zero is faster."""
        return math.log(self.now.median / self.was.median)

    @property
    def set(self) -> tuple[str, ...]:
        return (*self.key[:3], *self.key[4:])

    @property
    def apart(self) -> bool:
        low, high = self.was.widened(self.rounds[0])
        new_low, new_high = self.now.widened(self.rounds[1])
        return new_high < low or new_low > high


def sets_of(moves: list[Move]) -> dict[tuple[str, ...], list[float]]:
    """The moves of each set that is large enough to be judged as a whole."""
    sets: dict[tuple[str, ...], list[float]] = {}
    for move in moves:
        sets.setdefault(move.set, []).append(move.log)
    return {name: logs for name, logs in sets.items() if len(logs) >= SET_ROWS}


def noise_of(sets: Iterable[list[float]]) -> float:
    """The standard deviation of a row about its set's median, by the median of its absolute values."""
    off = []
    for logs in sets:
        middle, correction = statistics.median(logs), math.sqrt(len(logs) / (len(logs) - 1))
        off += [abs(log - middle) * correction for log in logs]
    return 1.4826 * statistics.median(off) if off else 0.0


def compare(before: Run, after: Run, by: str, change: float) -> Comparison:
    """``change`` is the least relative change that counts."""
    a, b = ({key(r): r for r in run.rows} for run in (before, after))
    result, moves = Comparison(), []
    check_torch = by == "torch" and same_machine(before, after)
    for k, old in a.items():
        if old.status != "ok":
            continue
        new = found_in(b, old)
        if new is None:
            result.tell("missing", k, name(k))
            continue
        if new.status != "ok":
            result.tell("status", k, f"{name(k)}: was ok, is {new.status}: {new.reason}")
            continue
        if old.peak_bytes and new.peak_bytes and apart(old.peak_bytes, new.peak_bytes, 1 + change):
            what = "more memory" if new.peak_bytes > old.peak_bytes else "less memory"
            result.tell(what, k, f"{name(k)}: {old.peak_bytes / 1e6:.4g} MB -> {new.peak_bytes / 1e6:.4g} MB")
        result.common += is_ours(k)
        was, now = SPEEDS[by](old), SPEEDS[by](new)
        torch_ms = [rows[t].ms for rows in (a, b) if (t := (*k[:4], BASELINE, k[5])) in rows and rows[t].ms]
        if was is None or now is None:
            if old.provider != BASELINE:
                result.unmeasured.append(name(k))
        elif check_torch and len(torch_ms) == 2 and apart(*torch_ms, DISTURBED):
            result.disturbed.append(f"{name(k)}: torch took {torch_ms[0]:.4g} ms, then {torch_ms[1]:.4g} ms")
        else:
            moves.append(Move(k, was, now, (old.rounds or 1, new.rounds or 1)))
    for k, new in b.items():
        old = found_in(a, new)
        if new.status == "ok" and old is None:
            result.tell("new", k, name(k))
        elif new.status == "ok" and old.status != "ok":
            result.tell("ok again", k, f"{name(k)}: was {old.status}")
    tell_speeds(result, moves, by, change)
    return result


def tell_speeds(result: Comparison, moves: list[Move], by: str, change: float) -> None:
    result.moves, sets = moves, sets_of(moves)
    result.noise = noise_of(sets.values())
    result.least = max(math.log1p(change), SIGMAS * result.noise)
    for move in moves:
        if move.apart and abs(move.log) >= result.least:
            was, now = (text_of(speed, by) for speed in (move.was, move.now))
            what = "faster" if move.log > 0 else "slower"
            result.tell(what, move.key, f"{name(move.key)}: {was} -> {now}, speed {percent(move.log)}")
    for (op, pass_name, dtype, provider, cache), logs in sets.items():
        middle = statistics.median(logs)
        error = 1.2533 * result.noise / math.sqrt(len(logs))  # of a median
        if abs(middle) >= max(math.log1p(change), SIGMAS * error):
            what = "faster as a set" if middle > 0 else "slower as a set"
            k = (op, pass_name, dtype, (), provider, cache)
            result.tell(what, k, f"{name(k)}: median speed {percent(middle)} over {len(logs)} shapes")


def apart(x: float, y: float, factor: float) -> bool:
    return max(x, y) > factor * min(x, y)


def text_of(speed: Speed, by: str) -> str:
    if by == "torch":
        return f"{speed.median:.3g}x ({speed.low:.3g}-{speed.high:.3g})"
    return f"{1 / speed.median:.4g} ms ({1 / speed.high:.4g}-{1 / speed.low:.4g})"


def heading(label: str, path: Path, run: Run) -> str:
    environment = run.environments[-1]
    commit = str(environment.get("commit"))[:12]
    state = "" if run.finished else ", unfinished"
    return f"{label:<7} {path}: {len(run.rows)} rows{state}, commit {commit}, {environment.get('date')}"


def report(result: Comparison, by: str, most: int = 20) -> str:
    """All that is told, at most so many lines of a kind."""

    def some(lines: list[str]) -> Iterable[str]:
        yield from (f"  {line}" for line in lines[:most])
        if len(lines) > most:
            yield f"  and {len(lines) - most} more"

    measure = "the ratio to torch in the same run" if by == "torch" else "milliseconds"
    text = [f"{len(result.moves)} rows compared by {measure}, {result.ours} of them ours"]
    if result.moves:
        mean = percent(statistics.fmean(move.log for move in result.moves))
        noise, least = math.expm1(result.noise), math.expm1(result.least)
        text.append(f"geometric mean of all: speed {mean}; noise of a row: {noise:.1%}; it must move by {least:.0%}")
    for ours in (True, False):
        for what in KINDS:
            lines = result.told.get((what, ours), [])
            if lines:
                mark = "REGRESSION, " if ours and what in REGRESSIONS else ""
                text += ["", f"{mark}{what}, {len(lines)}{'' if ours else ' of others'}:", *some(lines)]
    if result.disturbed:
        text += ["", f"set aside, {len(result.disturbed)}: something else ran", *some(result.disturbed)]
    if result.unmeasured:
        text += ["", f"no ratio to torch, {len(result.unmeasured)} (--by ms compares these):", *some(result.unmeasured)]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--by", choices=SPEEDS, default="torch", help="what is compared (default: the ratio to torch)")
    p.add_argument("--change", type=float, default=0.1, help="the least relative change that counts (default: 0.1)")
    args = p.parse_args(argv)
    if not args.change > 0:
        p.error(f"--change {args.change}: it must be above 0")
    runs = []
    for path in (args.before, args.after):
        try:
            run = read(path)
        except (OSError, ValueError) as e:
            p.error(str(e))
        if not run.environments:
            p.error(f"{path} has no line that describes the run")
        runs.append(run)
    for label, path, run in zip(("before", "after"), (args.before, args.after), runs, strict=True):
        print(heading(label, path, run))
    for line in differences(runs[0].environments[-1], runs[1].environments[-1]):
        print(f"differs {line}")
    result = compare(*runs, args.by, args.change)
    print("\n" + report(result, args.by))
    if result.regressed:
        return 1
    if result.ours * 2 < max(result.common, 1):
        print(f"\nof {result.common} rows of ours that both have, {result.ours} were compared", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
