"""The benchmark harness: ``main(argv)`` is the command line, the modules beside it are tables and small functions.

``cases`` holds the operations, the shapes and the bytes each pass must move; ``providers`` the implementations
compared; ``gate`` decides whether a provider's answer is right; ``timing`` measures; ``environment`` describes the
machine; ``run`` puts them together. Only torch is needed: triton and liger-kernel are used where installed.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark's command line and return its exit status."""
    from .run import main as run_main

    return run_main(argv)
