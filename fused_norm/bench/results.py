"""Results on disk: JSON lines, each an object with a ``kind``.

``environment`` comes first (`environment.collect`, and ``providers``: why each one cannot run, by operation), then a
``row`` for each thing measured or not measurable, then ``end`` if all that was asked for is there. A run that goes on
where another stopped appends an environment of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: How each line of ours starts: what else a last line without its end may be is not ours to leave out.
LINE_START = b'{"kind": '

WARM, COLD = CACHES = ("warm", "cold")


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


@dataclass
class Row:
    """One provider in one pass of one case; what is unknown is None. ``pass_name`` is ``pass`` in the file.

    Times are milliseconds: ``ms`` the median, ``call_ms`` (CUDA) wall time a call where one follows the other.
    ``vs_torch`` is the median over rounds of torch's time over this one (above 1 is faster), with its quantiles;
    ``vs_copy`` is ``gb_s`` over that of x.clone() in the same rounds, the fraction of the roof. ``peak_bytes`` is the
    memory beyond the inputs, ``extra_bytes`` that beyond the inputs and what the call returns (output or gradients);
    ``peak_vs_torch`` and ``extra_vs_torch`` are this memory over torch's (below 1 is less). ``cache`` is what a call
    finds in the caches: "warm", what the same call left there, or "cold", other data.

    A provider that was not timed has the status "wrong", "error" or "skipped", and a reason. Its pass is "all" where
    that holds for each; its dtype is "all" and its shape empty where it holds for the operation.
    """

    op: str
    pass_name: str
    dtype: str
    m: int | None
    n: int | None
    h: int | None
    provider: str
    cache: str
    status: str = "ok"
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    call_ms: float | None = None
    rounds: int | None = None
    bytes: int | None = None
    gb_s: float | None = None
    vs_torch: float | None = None
    vs_torch_p20: float | None = None
    vs_torch_p80: float | None = None
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
    def shape(self) -> tuple[int, ...]:
        return tuple(d for d in (self.m, self.n, self.h) if d is not None)

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity and no NaN: they are None (a wrong answer's error; its reason names it)."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {"kind": "row"} | {"pass" if k == "pass_name" else k: v for k, v in values.items()}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Row:
        known = {"pass" if f.name == "pass_name" else f.name: f.name for f in fields(cls)}
        return cls(**{known[key]: value for key, value in line.items() if key in known})


@dataclass
class Run:
    """What a results file holds. ``finished``: all that was asked for last is there."""

    environments: list[dict[str, Any]]
    rows: list[Row]
    finished: bool


def read(path: str | Path) -> Run:
    """Read a results file. A last line without its end, of a run that was killed, is left out.

    Raises ValueError for a file that is something else, with the number of the line.
    """
    path = Path(path)
    run = Run([], [], False)
    *lines, cut_short = path.read_bytes().split(b"\n")
    if cut_short and not cut_short.startswith(LINE_START[: len(cut_short)]):
        lines.append(cut_short)
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            kind = line["kind"]
            if kind == "environment":
                run.environments.append(line)
            elif kind == "row":
                run.rows.append(Row.from_json(line))
            elif kind != "end":
                raise ValueError(f"kind {kind!r} is none of environment, row, end")
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path}, line {number}, is no line of benchmark results: {type(e).__name__}: {e}") from e
        run.finished = kind == "end" and bool(line.get("finished"))
    return run


class Writer:
    """Appends lines to a results file; each is on disk before the next is made."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        if self.file.tell():
            self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def write(self, line: dict[str, Any]) -> str:
        """Returns the line's text."""
        text = json.dumps(line, allow_nan=False)
        self.file.write(text.encode() + b"\n")
        self.file.flush()
        return text
