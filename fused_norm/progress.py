"""How far a long run is: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
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
        self.noted = 0  # lines of the terminal that notes have taken

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def begin(self, what: str) -> None:
        """Name what runs now."""
        self.what = what
        if self.terminal:
            self._draw()

    def step(self, what: str, rows: Sequence[str] = ()) -> None:
        """One more is done. ``rows`` are lines that stay, headed by ``what``."""
        self.done += 1
        now = self.seconds()
        if self.terminal:
            self.what = what
            if rows:
                self.note("\n".join((what, *rows)))
            else:
                self._draw()
        elif rows or now - self.spoke >= self.quiet_seconds or self.done == self.total:
            self.spoke = now
            print(f"[{self.done}/{self.total} {now:.0f} s] {what}", *rows, sep="\n", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Lines that stay, above the one that changes."""
        self.close()
        print(text, file=self.stream, flush=True)
        if self.terminal:
            self.noted += sum(1 + max(0, len(line) - 1) // self._width() for line in text.split("\n"))
            self._draw()

    def close(self) -> None:
        """Take the changing line away."""
        if self.terminal:
            print("\r" + " " * (self._width() - 1) + "\r", end="", file=self.stream, flush=True)

    def erase_notes(self) -> None:
        """Take the notes away too, if all of them are still on the screen: what follows says the same better."""
        self.close()
        if self.terminal and 0 < self.noted < shutil.get_terminal_size().lines:
            print(f"\x1b[{self.noted}F\x1b[J", end="", file=self.stream, flush=True)

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
