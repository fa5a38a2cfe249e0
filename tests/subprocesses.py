"""Runs a worker script in processes of its own, and gathers the outcomes of the checks in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fused_norm

Outcomes = dict[str, str | None]


def run_worker(script: str, folder: Path, *arguments: str, processes: int = 1, seconds: float = 240) -> list[Outcomes]:
    """What each of ``processes`` runs of tests/``script`` found: {check: None or a traceback}, and its "log".

    The last argument of a run is the file to write its outcomes to; of several, the first is the number of the run. All
    are ended when the time is up, or as soon as one has failed, for which the others would wait.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(fused_norm.__file__).parents[1])}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve in a container
    path = Path(__file__).with_name(script)
    running: list[subprocess.Popen] = []
    try:
        for i in range(processes):
            number = [str(i)] if processes > 1 else []
            command = [sys.executable, str(path), *number, *arguments, str(folder / f"outcomes{i}")]
            with open(folder / f"log{i}", "w") as log:
                running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    found: list[Outcomes] = []
    for i in range(processes):
        outcomes = folder / f"outcomes{i}"
        report = json.loads(outcomes.read_text()) if outcomes.exists() else {}
        found.append({"log": (folder / f"log{i}").read_text()[-3000:]} | report)
    return found


def assert_passed(check: str, found: list[Outcomes]) -> None:
    for i, report in enumerate(found):
        assert check in report, f"process {i} did not come to the end of {check}: {report['log']}"
        assert report[check] is None, f"process {i}: {report[check]}"
