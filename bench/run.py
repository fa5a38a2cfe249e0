"""Benchmark the norms, or the losses: ``python bench/run.py --help``. The harness is ``fused_norm.bench``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from fused_norm.bench.run import main

if __name__ == "__main__":
    sys.exit(main())
