"""``python -m fused_norm gradcheck``: run the gradient checks of :mod:`fused_norm.testing` and say what became of them.

Exit status: 0 if all gradients are right (what torch's own functions are known to get wrong does not count), 1 if some
are not, 2 for arguments that make no sense, 130 if interrupted. An interrupted run prints and writes what it has.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from . import __version__, dispatch, testing
from .bench import environment
from .progress import Progress
from .testing import GradCheck, GradResult

INTERRUPTED = 130

MARKS = {"ok": "ok", "fail": "FAIL", "xfail": "xfail", "xpass": "XPASS"}

_SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: What is left out: (operation, backend, device, reason).
Skip = tuple[str, str, str, str]


def replay(check: GradCheck, seed: int) -> str:
    """The command that runs this check alone, on the same numbers."""
    interpreter = "TRITON_INTERPRET=1 " if check.interpreted else ""
    return f"{interpreter}python -m fused_norm gradcheck --only {check} --seed {seed}"


def select(checks: list[GradCheck], only: list[str]) -> list[GradCheck]:
    """Those whose name holds one of the texts; a text that is a name means that check alone."""
    names = {str(check) for check in checks}
    whole, parts = [t for t in only if t in names], [t for t in only if t not in names]
    return [c for c in checks if not only or str(c) in whole or any(part in str(c) for part in parts)]


# ---------------------------------------------------------------------------------------------------------- the report


def _dtypes(check: GradCheck) -> str:
    return "+".join(_SHORT[d] for d in (check.dtype, check.param_dtype) if d is not None)


def _cell(result: GradResult | None) -> str:
    if result is None:
        return "-"
    mark = MARKS[result.status]
    if result.status not in ("ok", "fail") or result.worst is None or not math.isfinite(result.worst.ratio):
        return mark
    if result.status == "fail" and result.worst.ratio <= 1:  # something else failed
        return mark
    ratio = result.worst.ratio
    return f"{mark} {ratio:.2f}" if ratio < 100 else f"{mark} {ratio:.0e}"


def table(checks: list[GradCheck], results: dict[GradCheck, GradResult]) -> str:
    """A line for each operation, backend and device; a block for vjp and jvp by dtype, and one for the modes in fp64.

    A number is the largest error as a share of its limit; - is a check there is not, or that was not run.
    """
    blocks: dict[str, list[GradCheck]] = {}
    for check in checks:
        blocks.setdefault(check.mode if check.mode in ("vjp", "jvp") else "fp64", []).append(check)
    label = max((len(f"{c.op} {c.backend} {c.device}") for c in checks), default=0)
    lines = ["", "Largest error as a share of its limit:"]
    for block, members in blocks.items():
        column = (lambda c: c.mode) if block == "fp64" else _dtypes
        columns = list(dict.fromkeys(map(column, members)))
        rows = dict.fromkeys((c.op, c.backend, c.device) for c in members)
        cells = {((c.op, c.backend, c.device), column(c)): _cell(results.get(c)) for c in members}
        widths = [max(len(name), *(len(cells.get((row, name), "-")) for row in rows)) for name in columns]
        header = zip(columns, widths, strict=True)
        lines += ["", f"{block:<{label}}" + "".join(f"  {name:<{width}}" for name, width in header)]
        for row in rows:
            line = f"{' '.join(row):<{label}}"
            for name, width in zip(columns, widths, strict=True):
                line += f"  {cells.get((row, name), '-'):<{width}}"
            lines.append(line.rstrip())
    return "\n".join(line.rstrip() for line in lines)


def _indented(text: str, by: str = "    ") -> str:
    return "\n".join(by + line for line in text.splitlines())


def _remarks(results: list[GradResult], skipped: list[Skip], seed: int) -> list[str]:
    """What the table has no room for: what was not checked, what torch gets wrong, and the failures in full."""
    lines: list[str] = []
    left_out: dict[tuple[str, str, str], list[str]] = {}
    for op, backend, device, reason in skipped:
        left_out.setdefault((backend, device, reason), []).append(op)
    if left_out:
        lines += ["", "Not checked:"]
    for (backend, device, reason), ops in left_out.items():
        lines.append(f"  {backend} on {device} ({', '.join(ops)}): {reason}")
    known: dict[str, list[str]] = {}
    for result in results:
        limit = result.check.expected_failure
        if result.status == "xfail" and limit is not None:
            known.setdefault(limit.reason, []).append(str(result.check))
    if known:
        lines += ["", "Expected failures, of torch's own functions:"]
    for reason, names in known.items():
        lines += [f"  {reason}:", *(f"    {name}" for name in names)]
    passed = [r for r in results if r.status == "xpass"]
    if passed:
        lines += ["", f"Unexpected passes: torch {torch.__version__} gets right what it was known to get wrong:"]
    for result in passed:
        limit = result.check.expected_failure
        lines.append(f"  {result.check}" + (f" ({limit.reason})" if limit is not None else ""))
    failed = [r for r in results if r.status == "fail"]
    if failed:
        lines += ["", "Failures:"]
    for result in failed:
        lines += [f"  {result.check}", _indented(result.failure or "")]
        if result.detail:
            lines.append(_indented(result.detail))
        lines.append(f"    replay: {replay(result.check, seed)}")
    return lines


def _counts(checks: list[GradCheck], results: list[GradResult]) -> dict[str, int]:
    counts = Counter(r.status for r in results)
    names = {"ok": "passed", "fail": "failed", "xfail": "failed as expected", "xpass": "passed unexpectedly"}
    said = {words: counts[status] for status, words in names.items()}
    return {**said, "not run": len(checks) - len(results)}


def _summary(counts: dict[str, int], seconds: float, seed: int) -> str:
    words = [f"{n} {what}" for what, n in counts.items() if n or what in ("passed", "failed")]
    return f"{', '.join(words)}, in {seconds:.0f} s with seed {seed}"


# ----------------------------------------------------------------------------------------------------------- the files


def _number(value: float | None) -> float | str | None:
    """JSON has neither inf nor NaN."""
    return value if value is None or math.isfinite(value) else str(value)


def write_json(
    path: Path, facts: dict[str, Any], checks: list[GradCheck], results: list[GradResult], skipped: list[Skip]
) -> None:
    entries = []
    for r in results:
        limit = r.check.expected_failure
        entries.append(
            {
                "name": str(r.check),
                "operation": r.check.op,
                "backend": r.check.backend,
                "device": r.check.device,
                "dtype": str(r.check.dtype).removeprefix("torch."),
                "param_dtype": str(r.check.param_dtype or r.check.dtype).removeprefix("torch."),
                "mode": r.check.mode,
                "result": r.status,
                "worst": None if r.worst is None else r.worst.name,
                "error": None if r.worst is None else _number(r.worst.error),
                "limit": None if r.worst is None else _number(r.worst.limit),
                "seconds": round(r.seconds, 4),
                "failure": r.failure,
                "detail": r.detail,
                "expected_failure": None if limit is None else limit.reason,
                "replay": replay(r.check, facts["seed"]),
            }
        )
    ran = {r.check for r in results}
    document = {
        **facts,
        "summary": _counts(checks, results),
        "checks": entries,
        "not_run": [str(c) for c in checks if c not in ran],
        "skipped": [dict(zip(("operation", "backend", "device", "reason"), s, strict=True)) for s in skipped],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _xml_text(text: str) -> str:
    """XML 1.0 has no control characters, such as those that colour a terminal."""
    return "".join(c if c in "\t\n" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" else "?" for c in text)


def write_junit(
    path: Path, facts: dict[str, Any], checks: list[GradCheck], results: list[GradResult], skipped: list[Skip]
) -> None:
    by_check = {r.check: r for r in results}
    suite = ElementTree.Element("testsuite", name="fused_norm gradcheck", timestamp=facts["date"])
    properties = ElementTree.SubElement(suite, "properties")
    flat = {"seed": facts["seed"], "command": facts["command"], "finished": facts["finished"], **facts["versions"]}
    flat |= {f"device {d['type']}": d["name"] for d in facts["devices"]}
    for name, value in flat.items():
        ElementTree.SubElement(properties, "property", name=name, value=_xml_text(str(value)))
    for check in checks:
        result = by_check.get(check)
        case = ElementTree.SubElement(
            *(suite, "testcase"),
            classname=f"fused_norm.{check.op}.{check.backend}.{check.device}",
            name=str(check),
            time=f"{result.seconds if result else 0:.3f}",
        )
        if result is None:
            ElementTree.SubElement(case, "skipped", message="not run: interrupted before")
        elif result.status == "fail":
            text = result.failure or ""
            failure = ElementTree.SubElement(case, "failure", message=_xml_text(text.partition("\n")[0]))
            failure.text = _xml_text("\n".join([text, *filter(None, [result.detail]), replay(check, facts["seed"])]))
        elif check.expected_failure is not None:
            reason = check.expected_failure.reason
            if result.status == "xfail":
                ElementTree.SubElement(case, "skipped", message=_xml_text(f"expected failure: {reason}"))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml_text(f"unexpected pass: {reason}")
    for op, backend, device, reason in skipped:
        name = f"{op}-{backend}-{device}"
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"fused_norm.{op}.{backend}.{device}", name=name, time="0"
        )
        ElementTree.SubElement(case, "skipped", message=_xml_text(reason))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("time", f"{sum(r.seconds for r in results):.3f}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


# ------------------------------------------------------------------------------------------------------------- the run


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fused_norm gradcheck",
        description="Check the derivatives of every operation, on every backend, in every dtype and mode.",
        epilog="Exit status: 0 all right, 1 not, 2 wrong arguments, 130 interrupted (what was found is kept).",
    )
    p.add_argument("--device", action="append", help="device type, such as cuda; may be repeated; default: all present")
    p.add_argument(
        "--backend", action="append", choices=dispatch.BACKENDS, help="may be repeated; default: all available"
    )
    p.add_argument(
        *("--only",),
        action="append",
        default=[],
        metavar="TEXT",
        help="the checks whose name holds this, or is this; may be repeated",
    )
    p.add_argument("--seed", type=int, default=0, help="draws other random inputs; default: 0")
    p.add_argument("--list", action="store_true", help="print the names of the checks, and run none")
    p.add_argument("--junit", metavar="FILE", type=Path, help="write the results as JUnit XML")
    p.add_argument("--json", metavar="FILE", type=Path, help="write the results as JSON, with errors and limits")
    return p


def _facts(devices: list[str], argv: list[str], seed: int) -> dict[str, Any]:
    facts = environment.collect(torch.device("cpu"), ["python", "-m", "fused_norm", "gradcheck", *argv])
    facts["versions"] = {**facts["versions"], "fused_norm": __version__}
    facts["devices"] = [environment.describe(torch.device(device)) for device in devices]
    del facts["device"]
    return {**facts, "seed": seed, "finished": False}


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if missing := set(options.device or ()) - set(dispatch.device_types()):
        parser.error(f"no {', '.join(sorted(missing))} device here; there is {', '.join(dispatch.device_types())}")
    devices = list(dict.fromkeys(options.device or dispatch.device_types()))
    backends = list(dict.fromkeys(options.backend or ())) or None
    for backend in backends or ():
        reasons = [dispatch.unavailable(backend, "norm", device) for device in devices]
        if None not in reasons:
            parser.error(f"backend {backend} was asked for, but cannot run on {', '.join(devices)}: {reasons[-1]}")
    checks = select(list(testing.gradchecks(devices, backends)), options.only)
    skipped = list(testing.not_checked(devices, backends))
    if not checks:
        parser.error(f"no check is named like {' or '.join(map(shlex.quote, options.only))}; --list shows the names")
    if options.list:
        print("\n".join(map(str, checks)))
        return 0
    facts = _facts(devices, argv, options.seed)
    files = [(p, write) for p, write in ((options.junit, write_junit), (options.json, write_json)) if p is not None]
    for path, write in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, facts, checks, [], skipped)  # better known before the checks than after
        except OSError as error:
            parser.error(f"cannot write {path}: {error.strerror}")

    print(f"fused_norm {__version__}, torch {torch.__version__}: {len(checks)} checks, seed {options.seed}", flush=True)
    results: dict[GradCheck, GradResult] = {}
    progress = Progress(len(checks), sys.stdout)
    status = 0
    try:
        for check in checks:
            progress.begin(str(check))
            results[check] = result = check.result(options.seed)
            line = f"{MARKS[result.status]:<5} {check} ({result.seconds:.2f} s)"
            if result.status in ("fail", "xpass") and progress.terminal:
                progress.note(line)
            progress.step(line)
            if result.status == "fail" and not progress.terminal:
                progress.note(_indented(result.failure or ""))
    except KeyboardInterrupt:
        status = INTERRUPTED
    progress.close()
    done = list(results.values())
    facts["finished"] = len(done) == len(checks)
    print(table(checks, results))
    for line in _remarks(done, skipped, options.seed):
        print(line)
    counts = _counts(checks, done)
    print("\n" + ("interrupted: " if status else "") + _summary(counts, progress.seconds(), options.seed))
    for path, write in files:
        write(path, facts, checks, done, skipped)
    return status or int(any(r.status == "fail" for r in done))
