"""Pictures of benchmark results: ``python bench/plot.py FILE... [--output PREFIX]``.

Three kinds, each as SVG and PNG, from the files of one device:

    PREFIX-roof-OPERATION   the share of x.clone()'s bandwidth against the number of columns
    PREFIX-ratios-GROUP     torch's time over each provider's: geometric mean of all shapes, from the least to the most
    PREFIX-memory-GROUP     peak memory of forward and backward, over the input's size, against that size

The same files give the same bytes. Exit status 2 if nothing could be drawn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

try:
    import matplotlib
except ImportError:
    sys.exit("bench/plot.py needs matplotlib: pip install 'fused_norm[bench]'")

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from fused_norm.bench.cases import OPS
from fused_norm.bench.operation import BASELINE, DTYPES, PASSES
from fused_norm.bench.results import Row, read

#: Inches, at 100 dots each: a README is 800 dots wide.
WIDTH, PANEL_HEIGHT = 8.0, 2.5

#: By package. Okabe and Ito's colours, which the colour-blind tell apart, and two of Tol's.
COLOURS = {
    "fused": "#0072B2",
    "torch": "#555555",
    "compile": "#E69F00",
    "liger": "#009E73",
    "quack": "#D55E00",
    "flash-attn": "#CC79A7",
    "apex": "#56B4E9",
    "transformer-engine": "#999933",
    "cut": "#882255",
}
#: Dashes and marker, by what follows the package: "-" and "o" for what has no line here.
VARIANTS = {
    "native": ("-", "D"),
    "triton": ("--", "s"),
    "inplace": ("-.", "^"),
    "reference": (":", "v"),
    "float": (":", "v"),
    "exact": ("--", "s"),
    "compile": (":", "v"),
    "linear": ("--", "s"),
    "chunked": (":", "v"),
}
QUIET = "#777777"

RC = {
    "svg.hashsalt": "fused_norm",  # else the names inside an SVG are random
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "white",  # not transparent: black on a dark page could not be read
}


def is_ours(provider: str) -> bool:
    return provider.partition(":")[0] == "fused"


def style(provider: str) -> dict[str, object]:
    """Colour, line and marker, the same in every picture; ``ce:x`` is as x, with open markers."""
    base = provider.removeprefix("ce:")
    package = next((p for p in COLOURS if base == p or base.startswith((f"{p}:", f"{p}-"))), "")
    colour = COLOURS.get(package, QUIET)
    line, marker = VARIANTS.get(base[len(package) + 1 :], ("-", "o"))
    return {
        "color": colour,
        "linestyle": line,
        "marker": marker,
        "markerfacecolor": "white" if provider != base else colour,
        "markersize": 4.5 if is_ours(base) else 3,
        "linewidth": 2.4 if is_ours(base) else 1.2,
        "zorder": 3 if is_ours(base) else 2,
    }


def ink(provider: str) -> dict[str, object]:
    """For text: a line's colour can be too light to read."""
    rgb = matplotlib.colors.to_rgb(style(provider)["color"])
    weight = "bold" if is_ours(provider) else "normal"
    return {"color": tuple(0.6 * part for part in rgb), "fontweight": weight}


def number(value: float) -> str:
    """1024 as 1k, 1048576 as 1M: sizes are powers of two, or near them."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def input_bytes(row: Row) -> int:
    """Of x, or of the logits that a linear loss stands for."""
    return row.m * row.n * DTYPES[row.dtype].itemsize


def geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def in_order(names: Iterable[str]) -> list[str]:
    """Ours last, so that they are drawn over the others."""
    return sorted(dict.fromkeys(names), key=is_ours)


def curves(
    rows: list[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> dict[str, list[tuple[float, float]]]:
    """For each provider its points by x, the geometric mean where there are several at one."""
    found: dict[str, dict[float, list[float]]] = {}
    for r in rows:
        found.setdefault(r.provider, {}).setdefault(x(r), []).append(y(r))
    return {p: [(at, geomean(found[p][at])) for at in sorted(found[p])] for p in in_order(found)}


def draw_curves(axes: Axes, found: dict[str, list[tuple[float, float]]]) -> None:
    for provider, points in found.items():
        axes.plot(*zip(*points, strict=True), **style(provider), label=provider, clip_on=False)


def spread(places: list[float], gap: float, top: float) -> list[float]:
    """Rising places, moved apart to ``gap`` at least and each as little as may be, not past the top: runs of those that
    are too close are centred on their mean."""
    runs: list[list[float]] = []
    for i, place in enumerate(places):
        runs.append([place - i * gap])
        while len(runs) > 1 and statistics.fmean(runs[-2]) > statistics.fmean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    moved = [statistics.fmean(run) for run in runs for _ in run]
    return [min(place, top - (len(places) - 1) * gap) + i * gap for i, place in enumerate(moved)]


def label_curves(axes: Axes) -> None:
    """Names at the right ends of the lines. The layout must be known: they must not overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    ends = sorted(((to_axes.transform(line.get_xydata()[-1])[1], line) for line in lines), key=lambda end: end[0])
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    places = spread([at for at, _ in ends], gap=9.5 / height, top=0.97)
    for (_, line), place in zip(ends, places, strict=True):
        provider = line.get_label()
        axes.annotate(provider, (1.03, place), xycoords="axes fraction", va="center", fontsize=8, **ink(provider))


def powers(axes: Axes, values: Iterable[float], unit: str = "") -> None:
    """A logarithmic x axis with a few powers of two."""
    low, high = (math.log2(end(values)) for end in (min, max))
    step = max(1, math.ceil((high - low) / 5))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.03 * (high - low) - 0.2), 2 ** (high + 0.03 * (high - low) + 0.2))
    axes.xaxis.set_major_locator(FixedLocator([2.0**e for e in range(math.ceil(low - 0.2), math.ceil(high + 1), step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v) + unit))


def grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure, panels = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.5 + PANEL_HEIGHT * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat:
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, panels.tolist()


def sweep(rows: list[Row]) -> tuple[list[Row], str]:
    """The rows of equal traffic, where three widths or more have it; else all."""
    widths: dict[int, set[int]] = {}
    for r in rows:
        widths.setdefault(r.m * r.n, set()).add(r.n)
    elements = max(widths, key=lambda e: len(widths[e]))
    if len(widths[elements]) < 3:
        return rows, "rows as measured"
    return [r for r in rows if r.m * r.n == elements], f"rows x columns = {number(elements)}"


def roofs(rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """A figure for each operation: a row of panels for each dtype, a column for each pass."""
    rows = [r for r in rows if r.vs_copy]
    for op in dict.fromkeys(r.op for r in rows):
        of_op, which = sweep([r for r in rows if r.op == op])
        passes = [p for p in ("forward", "backward") if any(r.pass_name == p for r in of_op)] or [of_op[0].pass_name]
        dtypes = [d for d in DTYPES if any(r.dtype == d and r.pass_name in passes for r in of_op)]
        figure, panels = grid(len(dtypes), len(passes))
        top = max(1.0, *(r.vs_copy for r in of_op if r.pass_name in passes)) * 1.08
        for dtype, line in zip(dtypes, panels, strict=True):
            for pass_name, axes in zip(passes, line, strict=True):
                here = [r for r in of_op if (r.dtype, r.pass_name) == (dtype, pass_name)]
                if not here:
                    axes.set_visible(False)
                    continue
                axes.set_title(f"{op} {pass_name}, {dtype}")
                axes.axhline(1.0, color=QUIET, linewidth=0.8)
                draw_curves(axes, curves(here, lambda r: r.n, lambda r: r.vs_copy))
                powers(axes, [r.n for r in here])
                name_models(axes, here, top)
                axes.set_ylim(0, top)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        for axes in panels[-1]:
            axes.set_xlabel(f"columns ({which})")
        for line in panels:
            line[0].set_ylabel("share of x.clone()'s bandwidth")
        yield f"roof-{op}", figure


def name_models(axes: Axes, rows: list[Row], top: float) -> None:
    """The models that have these widths, the last of several, where the lines leave room below or above."""
    for n in sorted({r.n for r in rows}):
        heights = [r.vs_copy / top for r in rows if r.n == n]
        name = OPS[rows[0].op].model_names((1, n)).split(", ")[-1] if rows[0].op in OPS else ""
        below, above = min(heights) > 0.36, max(heights) < 0.64
        if below or above:
            text = {"rotation": 90, "fontsize": 6.5, "color": QUIET, "ha": "center", "va": "bottom" if below else "top"}
            axes.annotate(name, (n, 0.02 if below else 0.98), xycoords=("data", "axes fraction"), zorder=1, **text)


def ratios(rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """A figure for each group of operations: a column of panels for each dtype, bars by operation and pass."""
    rows = [r for r in rows if r.vs_torch and r.provider != BASELINE]
    for group, members in by_group(rows):
        dtypes = [d for d in DTYPES if any(r.dtype == d for r in members)]
        pairs = [
            (op, p)
            for op in dict.fromkeys(r.op for r in members)
            for p in PASSES
            if any((r.op, r.pass_name) == (op, p) for r in members)
        ]
        bars: list[tuple[float, str, str, str]] = []
        headings: list[tuple[float, str]] = []
        at = 0.0
        for op, pass_name in pairs:
            headings.append((at, f"{op}, {pass_name}"))
            at += 1.0
            for provider in reversed(in_order(r.provider for r in members if (r.op, r.pass_name) == (op, pass_name))):
                bars.append((at, op, pass_name, provider))
                at += 1.0
            at += 0.5
        figure, panels = plt.subplots(
            1,
            len(dtypes),
            figsize=(WIDTH, 0.8 + 0.155 * at),
            layout="constrained",
            squeeze=False,
            sharex=True,
            sharey=True,
        )
        for dtype, axes in zip(dtypes, panels[0], strict=True):
            axes.set_title(dtype)
            for place, op, pass_name, provider in bars:
                here = [
                    r.vs_torch
                    for r in members
                    if (r.op, r.pass_name, r.provider, r.dtype) == (op, pass_name, provider, dtype)
                ]
                if here:
                    draw_bar(axes, place, provider, here)
            axes.set_xscale("log", base=2)
            axes.axvline(1.0, color="#333333", linewidth=1)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="x", alpha=0.25, linewidth=0.6)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel("times as fast as torch")
            axes.set_axisbelow(True)
            axes.margins(x=0.12)
        axes = panels[0][0]
        axes.set_ylim(at, -1)
        axes.set_yticks(
            [p for p, *_ in bars] + [p for p, _ in headings], [b[3] for b in bars] + [t for _, t in headings]
        )
        for label, (*_, provider) in zip(axes.get_yticklabels(), [*bars, *((None,) for _ in headings)], strict=True):
            label.set(fontsize=8, **({"fontweight": "bold"} if provider is None else ink(provider)))
        yield f"ratios-{group}", figure


def draw_bar(axes: Axes, place: float, provider: str, values: list[float]) -> None:
    """From 1 to the geometric mean; a line from the least to the most; the mean in figures."""
    mean, ours = geomean(values), is_ours(provider)
    colour = style(provider)["color"]
    axes.barh(place, mean - 1.0, left=1.0, height=0.8, color=colour, alpha=1.0 if ours else 0.55)
    if len(values) > 1:
        axes.plot([min(values), max(values)], [place, place], color="#222222", linewidth=0.8, solid_capstyle="butt")
    axes.annotate(
        f"{mean:.2f}x" if mean < 9.995 else f"{mean:.1f}x",
        (max(mean, *values, 1.0), place),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        fontweight="bold" if ours else "normal",
    )


def by_group(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for r in rows:
        groups.setdefault(OPS[r.op].group if r.op in OPS else r.op, []).append(r)
    yield from groups.items()


def memories(rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """A figure for each group of operations: a row of panels for each operation, a column for each dtype."""
    rows = [r for r in rows if r.peak_bytes and r.pass_name == "forward+backward"]
    for group, members in by_group(rows):
        ops = list(dict.fromkeys(r.op for r in members))
        dtypes = [d for d in DTYPES if any(r.dtype == d for r in members)]
        figure, panels = grid(len(ops), len(dtypes))
        for op, line in zip(ops, panels, strict=True):
            for dtype, axes in zip(dtypes, line, strict=True):
                here = [r for r in members if (r.op, r.dtype) == (op, dtype)]
                if not here:
                    axes.set_visible(False)
                    continue
                axes.set_title(f"{op}, {dtype}")
                draw_curves(axes, curves(here, input_bytes, lambda r: r.peak_bytes / input_bytes(r)))
                powers(axes, [input_bytes(r) for r in here], "iB")
                axes.set_ylim(0, None)
        for axes in panels[-1]:
            axes.set_xlabel("size of the input (a linear loss: its logits)")
        for line in panels:
            line[0].set_ylabel("peak memory / size of the input")
        yield f"memory-{group}", figure


KINDS = {"roof": roofs, "ratios": ratios, "memory": memories}

NOTES = {"ratios": "; bars: geometric mean of all shapes, lines: least to most", "memory": "; forward+backward"}


def save(figure: Figure, path: Path, caption: str) -> None:
    figure.suptitle(caption, x=0.01, ha="left", fontsize=8, color=QUIET)
    figure.canvas.draw()  # the labels' places depend on the panels'
    for axes in figure.axes:
        label_curves(axes)
    svg = path.with_name(path.name + ".svg")
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    # matplotlib leaves spaces at the ends of lines
    svg.write_text("".join(f"{line.rstrip()}\n" for line in svg.read_text().splitlines()))
    figure.savefig(path.with_name(path.name + ".png"), dpi=200, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("files", type=Path, nargs="+", metavar="FILE")
    p.add_argument("--output", type=Path, metavar="PREFIX", help="default: the first file without its suffix")
    args = p.parse_args(argv)
    rows: list[Row] = []
    captions: list[str] = []
    for path in args.files:
        try:
            run = read(path)
        except (OSError, ValueError) as e:
            p.error(str(e))
        for environment in run.environments:
            count, on_cpu = environment["threads"], environment["device"]["type"] == "cpu"
            threads = f", {count} thread{'s' * (count > 1)}" if on_cpu else ""
            captions.append(f"{environment['device']['name']}{threads}, torch {environment['versions']['torch']}")
        rows += [r for r in run.rows if r.status == "ok"]
    if len(set(captions)) > 1:
        p.error(f"results of different machines or versions: {'; '.join(dict.fromkeys(captions))}")
    prefix = args.output or args.files[0].with_suffix("")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    drawn = 0
    with plt.rc_context(RC):
        for kind, make in KINDS.items():
            before = drawn
            for cache in sorted({r.cache for r in rows}):
                for name, figure in make([r for r in rows if r.cache == cache]):
                    end = f"-{cache}" if Counter(r.cache for r in rows).keys() > {cache} else ""
                    path = prefix.with_name(f"{prefix.name}-{name}{end}")
                    save(figure, path, f"{captions[0]}, {cache} caches{NOTES.get(kind, '')}")
                    print(f"{path}.svg, .png")
                    drawn += 1
            if drawn == before:
                print(f"no data for {kind}")
    return 0 if drawn else 2


if __name__ == "__main__":
    sys.exit(main())
