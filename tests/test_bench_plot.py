"""``bench/plot.py``: what is drawn is what was measured, it can be read, and the same each time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fused_norm.bench.cases import OPS
from fused_norm.bench.results import Row, Writer

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "plot.py"
_spec = importlib.util.spec_from_file_location("bench_plot", SCRIPT)
plot = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = plot
_spec.loader.exec_module(plot)

ENVIRONMENT = {
    "kind": "environment",
    "device": {"type": "cpu", "name": "a CPU"},
    "threads": 2,
    "versions": {"torch": "2.13.0"},
}

SOME = ["torch", "flash-attn", "fused:native"]


def rows_of(op: str, sweep: str = "n", providers: list[str] | None = None) -> list[Row]:
    """Each provider a little slower than the one before, wider rows faster; memory three, four, ... times the input."""
    rows = []
    for i, provider in enumerate(providers or OPS[op].providers):
        for dtype in ("fp32", "bf16"):
            for pass_name in OPS[op].passes:
                for j, (m, n, *h) in enumerate(OPS[op].sweeps[sweep]["cpu"]):
                    row = Row(op, pass_name, dtype, m, n, h[0] if h else None, provider, "warm", ms=1.0)
                    row.vs_copy, row.vs_torch = 0.9 * 0.93**i * (1 - 0.02 * (13 - j)), 2.0 / (1 + i) * (1 + j)
                    row.peak_bytes = (3 + i) * m * n * (4 if dtype == "fp32" else 2)
                    rows.append(row)
    return rows


def write(path: Path, rows: list[Row], **environment: object) -> Path:
    writer = Writer(path)
    writer.write(ENVIRONMENT | environment)
    for row in rows:
        writer.write(row.to_json())
    writer.file.close()
    return path


@pytest.fixture
def draw(tmp_path, capsys):
    def call(*groups: list[Row], **environment: object):
        files = [write(tmp_path / f"{i}.jsonl", rows, **environment) for i, rows in enumerate(groups)]
        try:
            status = plot.main([*map(str, files), "--output", str(tmp_path / "out" / "cpu")])
        finally:
            for file in files:
                file.unlink()
        return status, capsys.readouterr().out, sorted(p.name for p in (tmp_path / "out").glob("*"))

    return call


@pytest.fixture(autouse=True)
def as_the_script_draws():
    with plot.plt.rc_context(plot.RC):
        yield
    plot.plt.close("all")


def test_the_pictures(draw, tmp_path):
    status, _, files = draw(rows_of("layer_norm", providers=SOME), rows_of("linear_ticks_cross_entropy"))
    names = ("memory-norms", "memory-ticks", "ratios-norms", "ratios-ticks", "roof-layer_norm")
    both = [f"cpu-{name}.{end}" for name in names for end in ("png", "svg")]
    roof_of_a_linear_loss = [r for r in rows_of("linear_ticks_cross_entropy") if r.vs_copy]
    assert roof_of_a_linear_loss  # as the file has it here; a real one has none
    assert status == 0 and set(both) <= set(files)
    text = (tmp_path / "out" / "cpu-roof-layer_norm.svg").read_text()
    for wanted in (
        "fused:native",
        "flash-attn",
        "layer_norm backward, bf16",
        "Llama-3 8B",
        "columns (rows x columns = 4M)",
    ):
        assert f"<!-- {wanted} -->" in text, wanted
    assert "<!-- a CPU, 2 threads, torch 2.13.0, warm caches -->" in text
    assert "<!-- Gemma-3 1B -->" not in text  # 262144 columns are its vocabulary, not its width
    assert plot.COLOURS["fused"].lower() in text.lower()
    assert (tmp_path / "out" / "cpu-roof-layer_norm.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_files_give_the_same_bytes(tmp_path):
    file = write(tmp_path / "a.jsonl", rows_of("rms_norm"))
    contents = []
    for seed in ("1", "2"):
        prefix = tmp_path / seed / "x"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": f"{seed}000000000"}
        command = [sys.executable, str(SCRIPT), str(file), "--output", str(prefix)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        contents.append({p.name: p.read_bytes() for p in prefix.parent.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 6
    for name, content in contents[0].items():
        assert b"matplotlib.org" not in content or name.endswith(".svg")
        if name.endswith(".svg"):
            assert b"<dc:date>" not in content and not any(line.endswith(b" ") for line in content.splitlines())


def lines_of(figure, title: str) -> dict[str, list[tuple[float, float]]]:
    (axes,) = (a for a in figure.axes if a.get_title("left") == title)
    lines = (line for line in axes.get_lines() if not line.get_label().startswith("_"))
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in lines}


def test_a_roof_shows_the_rows_of_the_sweep():
    rows = [*rows_of("layer_norm"), *rows_of("layer_norm", "models")]
    ((name, figure),) = plot.roofs(rows)
    found = lines_of(figure, "layer_norm backward, fp32")
    assert name == "roof-layer_norm" and set(found) == set(OPS["layer_norm"].providers)
    expected = {
        (r.n, r.vs_copy)
        for r in rows_of("layer_norm")
        if (r.dtype, r.pass_name, r.provider) == ("fp32", "backward", "liger")
    }
    assert set(found["liger"]) == expected and found["liger"] == sorted(found["liger"])
    assert figure.axes[0].get_ylim()[0] == 0
    # Without a sweep all rows are drawn, those of one width by their geometric mean.
    few = [
        Row("rms_norm", "forward", "fp32", m, n, None, "torch", "warm", vs_copy=v)
        for m, n, v in ((2, 8, 0.2), (3, 8, 0.8), (4, 9, 0.3))
    ]
    ((_, figure),) = plot.roofs(few)
    assert lines_of(figure, "rms_norm forward, fp32")["torch"] == [(8, pytest.approx(0.4)), (9, pytest.approx(0.3))]


def test_ratios_are_geometric_means_from_the_least_to_the_most():
    values = {"fused:native": (2.0, 8.0), "compile": (0.5, 0.5), "torch": (1.0, 1.0)}
    rows = [
        Row("layer_norm", "forward", "fp32", m, 8, None, p, "warm", vs_torch=v)
        for p, pair in values.items()
        for m, v in zip((2, 3), pair, strict=True)
    ]
    ((name, figure),) = plot.ratios(rows)
    (axes,) = figure.axes
    assert name == "ratios-norms"
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches]
    assert spans == [(1, pytest.approx(4.0)), (1, pytest.approx(0.5))]
    assert [text.get_text() for text in axes.texts] == ["4.00x", "0.50x"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["fused:native", "compile", "layer_norm, forward"]
    whiskers = [sorted(line.get_xdata()) for line in axes.get_lines() if len(set(line.get_ydata())) == 1]
    assert whiskers == [[2.0, 8.0], [0.5, 0.5]]


def test_memory_is_over_the_inputs_size():
    ((name, figure),) = plot.memories(rows_of("linear_ticks_cross_entropy"))
    found = lines_of(figure, "linear_ticks_cross_entropy, bf16")
    assert name == "memory-ticks" and all(y == pytest.approx(3) for _, y in found["torch"])
    assert {x for x, _ in found["torch"]} == {
        m * n * 2 for m, n, _ in OPS["linear_ticks_cross_entropy"].sweeps["n"]["cpu"]
    }


@pytest.mark.parametrize("op", ["layer_norm", "ticks_cross_entropy", "linear_ticks_cross_entropy"])
def test_texts_do_not_overlap(op, tmp_path, monkeypatch):
    """With every provider there is, and lines that end close together."""
    rows = rows_of(op)
    for r in rows:
        r.vs_copy, r.peak_bytes = 0.8 + 0.01 * r.vs_copy, int(0.02 * r.peak_bytes) + 3 * r.m * r.n
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    for make in (plot.roofs, plot.memories):
        for name, figure in make(rows):
            plot.save(figure, tmp_path / name, "a caption")
            renderer = figure.canvas.get_renderer()
            texts = [t for axes in figure.axes for t in (*axes.texts, axes._left_title) if t.get_text()]
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
            for (a, one), (b, other) in combinations(boxes, 2):
                across = min(one.x1, other.x1) - max(one.x0, other.x0)
                along = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert min(across, along) < 3, (name, a, b)  # a box is a little larger than what it holds
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for _, box in boxes), name


def test_a_model_is_named_where_the_lines_leave_room():
    for heights, said in (((0.8, 0.9), ["Llama-3 8B"]), ((0.1, 0.3), ["Llama-3 8B"]), ((0.1, 0.9), [])):
        rows = [Row("rms_norm", "forward", "fp32", 2, 4096, None, "torch", "warm", vs_copy=v) for v in heights]
        ((_, figure),) = plot.roofs(rows)
        assert [text.get_text() for text in figure.axes[0].texts] == said


def test_places_are_moved_apart_as_little_as_may_be():
    assert plot.spread([0.1, 0.5, 0.9], 0.1, 1.0) == pytest.approx([0.1, 0.5, 0.9])
    assert plot.spread([0.5, 0.5], 0.1, 1.0) == pytest.approx([0.45, 0.55])
    assert plot.spread([0.2, 0.5, 0.5, 0.5], 0.1, 1.0) == pytest.approx([0.2, 0.4, 0.5, 0.6])
    assert plot.spread([0.96, 0.98, 1.0], 0.1, 0.97) == pytest.approx([0.77, 0.87, 0.97])
    assert plot.spread([], 0.1, 1.0) == []


def luminance(colour) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in plot.matplotlib.colors.to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_providers_can_be_told_apart_and_their_names_read(op):
    looks = {}
    for provider in op.providers:
        style = plot.style(provider)
        look = (style["color"], style["linestyle"], style["marker"], style["markerfacecolor"] == "white")
        if provider != "fused":  # auto is one of the others
            assert look not in looks, (provider, looks[look])
        looks[look] = provider
        assert style["color"] != plot.QUIET
        assert (style["color"] == plot.COLOURS["fused"]) == plot.is_ours(provider)
        assert 1.05 / (luminance(plot.ink(provider)["color"]) + 0.05) > 4.5  # WCAG AA on white


def test_what_there_is_no_data_for_is_named(draw):
    rows = [replace(r, peak_bytes=None) for r in rows_of("layer_norm", providers=["torch", "fused"])]
    status, said, files = draw(rows)
    assert status == 0 and "no data for memory" in said and len(files) == 4
    assert "no data for roof" not in said and "no data for ratios" not in said


def test_nothing_to_draw_is_a_failure(draw):
    failed = [replace(r, status="wrong", reason="y", vs_copy=None, vs_torch=None) for r in rows_of("layer_norm")]
    for rows in ([], failed, [r for r in rows_of("layer_norm", providers=["torch"]) if r.ms is None]):
        status, said, files = draw(rows)
        assert status == 2 and files == []
        assert said.splitlines() == ["no data for roof", "no data for ratios", "no data for memory"]


def test_wrong_rows_are_not_drawn(draw, tmp_path):
    rows = rows_of("layer_norm", providers=["torch", "fused", "liger"])
    draw([replace(r, status="wrong") if r.provider == "liger" else r for r in rows])
    text = (tmp_path / "out" / "cpu-roof-layer_norm.svg").read_text()
    assert "<!-- fused -->" in text and "<!-- liger -->" not in text


def test_cold_and_warm_caches_are_apart(draw):
    warm = rows_of("rms_norm", providers=["torch", "fused"])
    status, _, files = draw([*warm, *(replace(r, cache="cold") for r in warm)])
    assert status == 0 and {"cpu-roof-rms_norm-cold.svg", "cpu-roof-rms_norm-warm.svg"} <= set(files)


def test_other_machines_results_are_refused(tmp_path, capsys):
    files = [write(tmp_path / f"{n}.jsonl", rows_of("layer_norm", providers=["torch"]), threads=n) for n in (1, 2)]
    with pytest.raises(SystemExit) as e:
        plot.main([*map(str, files)])
    assert e.value.code == 2 and "a CPU, 1 thread, torch 2.13.0; a CPU, 2 threads" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("a,b\n", "line 1, is no line of")])
def test_bad_files_are_refused(tmp_path, capsys, content, said):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(SystemExit) as e:
        plot.main([str(bad)])
    assert e.value.code == 2 and said in capsys.readouterr().err
