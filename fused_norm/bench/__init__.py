"""The benchmark harness: ``main(argv)`` is the command line, the modules beside it are tables and small functions.

``operation`` says what an operation brings: inputs, truth, the bytes each pass must move, shapes, providers; ``norms``,
``add_norms`` and ``losses`` are those there are, ``cases`` their names, ``providers`` the implementations compared.
``gate`` decides whether a provider's answer is right; ``timing`` and ``memory`` measure; ``environment`` describes the
machine; ``run`` puts them together. Only torch is needed: triton, liger-kernel and cut-cross-entropy are used where
installed.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark's command line and return its exit status."""
    from .run import main as run_main

    return run_main(argv)
