"""``python -m fused_norm``: what is here and whether it is right; ``gradcheck`` and ``bench`` for more."""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__, dispatch, testing


def _versions() -> list[tuple[str, str]]:
    rows = [("fused_norm", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    try:
        import triton

        rows.append(("triton", triton.__version__))
    except ImportError:
        rows.append(("triton", "not installed"))
    rows.append(("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"))
    for i in range(torch.accelerator.device_count()):
        device = torch.accelerator.current_accelerator()
        rows.append((f"{device.type}:{i}", torch.get_device_module(device).get_device_name(i)))
    return rows


def report() -> int:
    """Print versions, devices and backends, check each available backend, and return the exit status."""
    for name, value in _versions():
        print(f"{name:<12} {value}")
    print("\nbackends")
    for name, reason in dispatch.available_backends().items():
        print(f"  {name:<10} {'available' if reason is None else 'not available: ' + reason}")
    print("\nself-check: output and gradients against the fp64 truth")
    checks = [c for c in testing.gradchecks() if c.mode == "vjp"]
    failures = 0
    groups: dict[tuple[str, str], list[str]] = {}
    for check, failure, _ in testing.run_gradchecks(checks):
        group = groups.setdefault((check.backend, check.device), [])
        if failure is not None:
            group.append(f"{check}: {failure}")
            failures += 1
    for (backend, device), wrong in groups.items():
        print(f"  {backend:<10} {device:<5} {'ok' if not wrong else 'WRONG'}")
        for line in wrong:
            print(f"    {line}")
    print("\n" + (f"{failures} of {len(checks)} checks failed" if failures else f"all {len(checks)} checks hold"))
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    """Dispatch to the sub-command; without one print the report."""
    if not argv:
        return report()
    if argv[0] == "gradcheck":
        from .gradcheck import main as gradcheck

        return gradcheck(argv[1:])
    if argv[0] == "bench":
        from .bench.run import main as bench

        return bench(argv[1:])
    usage = "usage: python -m fused_norm [gradcheck | bench] [--help]"
    if argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"unknown command {argv[0]!r}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
