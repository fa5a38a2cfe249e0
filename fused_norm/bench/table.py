"""Results as text, in lines of at most 120 columns."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from .cases import OPS
from .results import Row, shape_text

HEAD = (
    f"{'shape':<14}  {'provider':<18} {'ms':>8} {'p20-p80':>13} {'GB/s':>6} {'roof':>5}"
    f" {'vs torch':>9} {'p20-p80':>11} {'peak MB':>8} {'':>6} {'extra MB':>8}"
)

LEGEND = """\
ms: median of the rounds, and 20th to 80th percentile. GB/s: the bytes of an ideal pass over it. roof: that over the
GB/s of x.clone() in the same rounds. vs torch: torch's time over this one (above 1 is faster), median over rounds and
percentiles. peak MB: memory beyond the inputs, and (over torch's); extra MB: beyond what is returned too."""


def about(env: dict[str, Any]) -> str:
    """An environment on one line: what the numbers were measured on."""
    commit = (
        f"commit {env['commit'][:10]}{' with changes' if env['uncommitted_changes'] else ''}" if env["commit"] else ""
    )
    load = f"load {env['load'][0]:.1f} on {env['cpus']} CPUs before" if env["load"] else ""
    device, threads, version = env["device"]["name"], f"{env['threads']} threads", f"torch {env['versions']['torch']}"
    return ", ".join(part for part in (device, threads, load, version, commit, env["date"][:10]) if part)


def _number(value: float | None, digits: int = 4) -> str:
    """With so many significant digits, but never an exponent."""
    if value is None:
        return ""
    places = digits if value <= 0 else digits - 1 - math.floor(math.log10(value))
    return f"{value:.{min(max(places, 0), digits)}f}"


def _range(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None else f"{_number(low, digits)}-{_number(high, digits)}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value, 3)}x"


def _line(shape: str, provider: str, *cells: str) -> str:
    ms, spread, gb_s, roof, ratio, ratio_spread, peak, peak_ratio, extra = (*cells, *[""] * (9 - len(cells)))
    return (
        f"{shape:<14}  {provider:<18} {ms:>8} {spread:>13} {gb_s:>6} {roof:>5}"
        f" {ratio:>9} {ratio_spread:>11} {peak:>8} {peak_ratio:>6} {extra:>8}"
    ).rstrip()


def row_line(r: Row, shape: str = "") -> str:
    """One row; what was not timed has its status and reason instead of numbers."""
    if r.ms is None:
        return f"{shape:<14}  {r.provider:<18} {r.status}: {r.reason}"
    return _line(
        shape,
        r.provider,
        _number(r.ms),
        _range(r.p20_ms, r.p80_ms, 4),
        _number(r.gb_s, 3),
        _percent(r.vs_copy),
        _times(r.vs_torch),
        _range(r.vs_torch_p20, r.vs_torch_p80, 3),
        _number(r.peak_bytes / 1e6) if r.peak_bytes is not None else "",
        f"({r.peak_vs_torch:.2f})" if r.peak_vs_torch is not None else "",
        _number(r.extra_bytes / 1e6) if r.extra_bytes is not None else "",
    )


def _geomean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v]
    return math.exp(statistics.fmean(logs)) if logs else None


def _mean_line(shape: str, provider: str, rows: list[Row]) -> str:
    ratios = [r.vs_torch for r in rows if r.vs_torch]
    peak = _geomean(r.peak_vs_torch for r in rows)
    least = f"least {_number(min(ratios), 3)}" if ratios else ""
    roof, ratio = _percent(_geomean(r.vs_copy for r in rows)), _times(_geomean(ratios))
    return _line(shape, provider, "", "", "", roof, ratio, least, "", f"({peak:.2f})" if peak else "")


def _block(title: str, rows: list[Row], failed: list[Row]) -> Iterator[str]:
    """A line for each shape's roof and each provider in it, wrong ones included; geometric means at the end."""
    shapes = list(dict.fromkeys(r.shape for r in rows))
    yield from ("", title, HEAD)
    for shape in shapes:
        here = [r for r in rows if r.shape == shape]
        first = shape_text(shape)
        copy = next((r.copy_gb_s for r in here if r.copy_gb_s), None)
        if copy is not None:
            yield _line(first, "x.clone()", "", "", _number(copy, 3), "100%")
            first = ""
        for r in here:
            yield row_line(r, first)
            first = ""
        yield from (_line("", r.provider, r.status) for r in failed if r.shape == shape)
    if len(shapes) > 1:
        first = "geomean"
        for provider in dict.fromkeys(r.provider for r in rows):
            yield _mean_line(first, provider, [r for r in rows if r.provider == provider])
            first = ""


def table(rows: list[Row]) -> str:
    """For each operation, pass, dtype and cache mode a block; then what was not timed, and why."""
    blocks: dict[tuple[str, str, str, str], list[Row]] = {}
    for r in rows:
        if r.ms is not None:
            blocks.setdefault((r.op, r.pass_name, r.dtype, r.cache), []).append(r)
    lines = LEGEND.splitlines() if blocks else []
    for op in dict.fromkeys(op for op, *_ in blocks):
        if op in OPS and OPS[op].note:
            lines += textwrap.wrap(f"{op}: {OPS[op].note}.", 120)
    failed = [r for r in rows if r.status in ("wrong", "error")]
    for key, block in blocks.items():
        op, pass_name, dtype, cache = key
        here = [
            r for r in failed if (r.op, r.dtype, r.cache) == (op, dtype, cache) and r.pass_name in (pass_name, "all")
        ]
        lines += _block(f"{op} {pass_name} {dtype}, {cache} caches", block, here)
    not_timed: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.status != "ok":
            not_timed.setdefault((r.provider, r.status, r.reason), []).append(r)
    if not_timed:
        lines += ["", "Not timed:"]
    for (name, status, reason), where in not_timed.items():
        r = where[0]
        place = f" in {r.op} {r.pass_name} {r.dtype} {shape_text(r.shape)}" if r.shape else ""
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        lines += textwrap.wrap(
            f"{name}: {status}{place}{more}: {reason}", 120, initial_indent="  ", subsequent_indent="    "
        )
    return "\n".join(lines)
