"""How far a long run is: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR = 20


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Counts steps up to ``total`` on ``stream`` (standard error by default).

    Where the stream is no terminal, a step is a line, or none if the last was less than ``quiet_seconds`` ago.
    """

    def __init__(self, total: int, stream: TextIO | None = None, quiet_seconds: float = 0.0) -> None:
        self.total, self.stream, self.quiet_seconds = total, stream or sys.stderr, quiet_seconds
        self.terminal = self.stream.isatty()
        self.done, self.start, self.spoke = 0, time.perf_counter(), -float("inf")
        self.what = ""

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def begin(self, what: str) -> None:
        """Name what runs now."""
        self.what = what
        if self.terminal:
            self._draw()

    def step(self, what: str) -> None:
        """One more is done."""
        self.done += 1
        now = self.seconds()
        if self.terminal:
            self.what = what
            self._draw()
        elif now - self.spoke >= self.quiet_seconds or self.done == self.total:
            self.spoke = now
            print(f"[{self.done}/{self.total} {now:.0f} s] {what}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """A line that stays, above the one that changes."""
        self.close()
        print(text, file=self.stream, flush=True)
        if self.terminal:
            self._draw()

    def close(self) -> None:
        """Take the changing line away."""
        if self.terminal:
            print("\r" + " " * (self._width() - 1) + "\r", end="", file=self.stream, flush=True)

    @staticmethod
    def _width() -> int:
        return max(20, shutil.get_terminal_size().columns)

    def _draw(self) -> None:
        elapsed = self.seconds()
        full = BAR * self.done // max(1, self.total)
        left = f", about {clock(elapsed / self.done * (self.total - self.done))} left" if self.done else ""
        line = f"[{'#' * full}{'.' * (BAR - full)}] {self.done}/{self.total} {clock(elapsed)}{left} {self.what}"
        width = self._width() - 1
        print("\r" + line[:width].ljust(width), end="", file=self.stream, flush=True)
