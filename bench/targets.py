"""What a GPU is to reach, and whether the rows of a benchmark say that it does: ``python bench/targets.py FILE...``.

The targets are data, `TARGETS`; :func:`judge` is a pure function of the rows. A target is reached where every case of
it was measured and is inside its limit, missed where one is outside (or ours was wrong), else not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from fused_norm.bench.cases import GROUPS, OPS
from fused_norm.bench.operation import BASELINE
from fused_norm.bench.results import Row, read, shape_text
from fused_norm.bench.shapes import Shape

#: The provider that is judged: what a user gets.
OURS = "fused"

REACHED, MISSED, NOT_MEASURED = "reached", "missed", "not measured"

EVERY_PASS = ("forward", "backward", "forward+backward")
DTYPES = ("fp32", "bf16")


def times(ours: Row, other: Row) -> float:
    """Our time over the other's; by the ratios to torch where both have one: those are of one and the same rounds."""
    if ours.vs_torch and other.vs_torch:
        return other.vs_torch / ours.vs_torch
    return ours.ms / other.ms


def of_the_copy(ours: Row, others: list[Row]) -> float | None:
    return ours.vs_copy


def of_the_best_peer(ours: Row, others: list[Row]) -> float | None:
    """Of those that compute the same function."""
    return max((times(ours, r) for r in others if not r.provider.startswith(("fused", "ce:"))), default=None)


def of_torch(ours: Row, others: list[Row]) -> float | None:
    return next((times(ours, r) for r in others if r.provider == BASELINE), None)


def of_torch_back_to_back(ours: Row, others: list[Row]) -> float | None:
    """Wall time a call where one follows the other: launches included."""
    return next((ours.call_ms / r.call_ms for r in others if r.provider == BASELINE and r.call_ms), None)


def of_the_materialised(ours: Row, others: list[Row]) -> float | None:
    """Of the fastest that makes all logits; one that computes cross entropy alone is among them."""
    whole = (BASELINE, "torch:float", "ce:torch")
    return max((times(ours, r) for r in others if r.provider in whole), default=None)


def of_ligers_memory(ours: Row, others: list[Row]) -> float | None:
    return next((ours.peak_bytes / r.peak_bytes for r in others if r.provider == "ce:liger" and r.peak_bytes), None)


@dataclass(frozen=True)
class Target:
    """``measure(our row, the rows of others in that case)`` is to be at least ``least``, or at most ``most``, in every
    case of these operations, passes and dtypes whose shape is one of ``shapes``: of their table's set "gpu", between
    these numbers of columns and with so many rows and elements."""

    title: str
    measure: Callable[[Row, list[Row]], float | None]
    ops: tuple[str, ...]
    passes: tuple[str, ...]
    dtypes: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    columns: tuple[int, int] = (1, 1 << 62)
    rows: int = 1
    elements: int = 1
    shape: Shape | None = None

    def has(self, shape: Shape) -> bool:
        if self.shape is not None:
            return shape == self.shape
        (m, n), (low, high) = shape[:2], self.columns
        return low <= n <= high and m >= self.rows and m * n >= self.elements

    def cases(self) -> list[tuple[str, str, str, Shape]]:
        """Operation, pass, dtype and shape of each case."""
        return [
            (op, at, dtype, shape)
            for op in self.ops
            for shape in OPS[op].sweeps["gpu"]["cuda"]
            if self.has(shape)
            for at in self.passes
            if at in OPS[op].passes
            for dtype in self.dtypes
        ]

    def holds(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= self.most

    @property
    def limit(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


def _roof() -> Iterable[Target]:
    """Of x.clone()'s bandwidth in the same rounds, where there is too much for the caches."""
    large = {"ops": tuple(GROUPS["norms"]), "elements": 1 << 26}
    for at, dtype, last, usual, wider in (
        ("forward", "fp32", 16384, 0.92, 0.85),
        ("forward", "bf16", 32768, 0.92, 0.85),
        ("backward", "fp32", 8192, 0.85, 0.75),
        ("backward", "bf16", 16384, 0.85, 0.75),
    ):
        title = f"norms, {at} {dtype}, share of the copy's bandwidth"
        common = {"measure": of_the_copy, "passes": (at,), "dtypes": (dtype,), **large}
        yield Target(f"{title}, N 768 to {last}", least=usual, columns=(768, last), **common)
        yield Target(f"{title}, N above {last}", least=wider, columns=(last + 1, 1 << 62), **common)
    for op, least in (("ticks_cross_entropy", 0.9), ("softcap_ticks_cross_entropy", 0.75)):
        for at in ("forward", "backward"):
            title = f"{op}, {at}, share of the copy's bandwidth, M >= 4096"
            yield Target(title, of_the_copy, (op,), (at,), DTYPES, least=least, rows=4096)


def _times() -> Iterable[Target]:
    ticks = ("ticks_cross_entropy", "softcap_ticks_cross_entropy")
    for group, ops in (("norms", GROUPS["norms"]), ("add-norms", GROUPS["add-norms"]), ("ticks", ticks)):
        title = f"{group}, time over the best peer's"
        yield Target(title, of_the_best_peer, tuple(ops), EVERY_PASS, DTYPES, most=1.02)
    for measure, what in ((of_torch, "device time"), (of_torch_back_to_back, "calls back to back")):
        title = f"norms, forward+backward fp32 4096x1024, {what} over torch's"
        passes = ("forward+backward",)
        yield Target(title, measure, tuple(GROUPS["norms"]), passes, ("fp32",), most=1.0, shape=(4096, 1024))
    linear = {"ops": ("linear_ticks_cross_entropy",), "passes": ("forward+backward",), "dtypes": ("bf16",)}
    yield Target("linear ticks, time over that with the logits in memory", of_the_materialised, most=1.15, **linear)
    yield Target("linear ticks, memory over Liger's", of_ligers_memory, most=1.0, **linear)


TARGETS: tuple[Target, ...] = (*_roof(), *_times())


@dataclass(frozen=True)
class Verdict:
    """``worst`` is the measured case furthest from the limit, with its value; ``wrong`` are cases in which ours gave a
    wrong answer or failed."""

    target: Target
    state: str
    measured: int
    cases: int
    missed: int
    worst: str = ""
    value: float | None = None
    wrong: tuple[str, ...] = ()


def judge(rows: Iterable[Row], targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """Each target by the rows of one device. Of rows of the same case and provider the last one counts."""
    by_case: dict[tuple, dict[str, Row]] = {}
    for r in rows:
        by_case.setdefault((r.op, r.pass_name, r.dtype, r.shape), {})[r.provider] = r
    return [_verdict(target, by_case) for target in targets]


def _verdict(target: Target, by_case: dict[tuple, dict[str, Row]]) -> Verdict:
    found: list[tuple[float, str]] = []
    wrong = []
    cases = target.cases()
    for op, at, dtype, shape in cases:
        here = by_case.get((op, at, dtype, shape), {})
        name = f"{op} {at} {dtype} {shape_text(shape)}"
        failed = [by_case.get((op, "all", dtype, shape), {}).get(OURS), here.get(OURS)]
        if any(r is not None and r.status in ("wrong", "error") for r in failed):
            wrong.append(name)
        ours = here.get(OURS)
        if ours is None or ours.ms is None:
            continue
        value = target.measure(ours, [r for r in here.values() if r.ms is not None and r.provider != OURS])
        if value is not None:
            found.append((value, name))
    missed = [value for value, _ in found if not target.holds(value)]
    if missed or wrong:
        state = MISSED
    else:
        state = REACHED if cases and len(found) == len(cases) else NOT_MEASURED
    value, worst = (min if target.least is not None else max)(found, default=(None, ""))
    return Verdict(target, state, len(found), len(cases), len(missed), worst, value, tuple(wrong))


def markdown(verdicts: list[Verdict]) -> str:
    """A table with a line for each target."""
    lines = ["| target | limit | | worst | where | measured |", "| --- | --- | --- | --- | --- | --- |"]
    for v in verdicts:
        state = v.state if v.state == NOT_MEASURED else f"**{v.state}**"
        missed = f", {v.missed} outside" if v.missed else ""
        where = "; ".join((*([v.worst] if v.worst else []), *(f"wrong or failed: {name}" for name in v.wrong)))
        value = "" if v.value is None else f"{v.value:.3f}"
        measured = f"{v.measured} of {v.cases}{missed}"
        lines.append(f"| {v.target.title} | {v.target.limit} | {state} | {value} | {where} | {measured} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if all are reached, 1 if not, 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="targets", description="Which targets the rows of a GPU's benchmark reach.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    try:
        rows = [row for path in parser.parse_args(argv).files for row in read(path).rows]
    except (OSError, ValueError) as e:
        print(f"targets: {e}", file=sys.stderr)
        return 2
    verdicts = judge(rows)
    print(markdown(verdicts))
    return int(any(v.state != REACHED for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
