"""The README's Python runs as it stands, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_is_python_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in block:
        for package in ("transformers", "accelerate"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})


def test_the_tests_that_it_names_exist() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", README.read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        source = (README.parent / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, (file, test)
