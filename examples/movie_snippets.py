"""The data of finetune_bert.py: one-sentence movie reviews, each with the mean rating that people gave it.

The 10,605 snippets were gathered by Pang and Lee [1] and rated by twenty people each, from -4 to 4, for VADER [2],
whose source package carries them. They are downloaded from there once, checked against the digests below, and kept in
$FUSED_NORM_CACHE (by default ~/.cache/fused_norm); they are not part of this repository.

[1] B. Pang and L. Lee, "Seeing stars: exploiting class relationships for sentiment categorization with respect to
    rating scales", ACL 2005.
[2] C. J. Hutto and E. Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text",
    ICWSM 2014.

A file of your own (`--data FILE`) is UTF-8 text, one row a line, in either of two tab-separated formats:

    label <tab> text              label is 0 (negative) or 1 (positive)
    id <tab> rating <tab> text    the original's: above 0 is positive, and rows with |rating| < 0.5 are left out
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = "vaderSentiment==3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # an archive inside the archive
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MEMBER_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
ROWS, POSITIVE_ROWS = 10_070, 4_995  # what the file must come to once read

BRING_YOUR_OWN = "Or bring your own: --model DIR --data FILE (the formats of FILE are in examples/movie_snippets.py)."


class DataError(Exception):
    """The data could not be had, or is not what it should be; the message says what to do."""


class Row(NamedTuple):
    label: int  # 1 positive, 0 negative
    text: str


class Split(NamedTuple):
    train: list[Row]
    dev: list[Row]
    test: list[Row]


def load(path: Path | None = None) -> Split:
    """The rows of `path`, or of the movie snippets, without duplicates, as train, dev and test."""
    rows = read(path or download())
    if path is None and (len(rows), sum(row.label for row in rows)) != (ROWS, POSITIVE_ROWS):
        raise DataError(
            f"the movie snippets came to {len(rows)} rows, {sum(row.label for row in rows)} of them positive; "
            f"{ROWS} and {POSITIVE_ROWS} were expected"
        )
    return split(rows)


def download() -> Path:
    """The file of movie snippets, from the cache or else by pip; its digest is checked either way."""
    cache = Path(os.environ.get("FUSED_NORM_CACHE") or Path.home() / ".cache" / "fused_norm")
    file = cache / Path(MEMBER).name
    if file.exists():
        if hashlib.sha256(file.read_bytes()).hexdigest() != MEMBER_SHA256:
            raise DataError(f"{file} is not the file it should be (its SHA-256 differs): delete it and run again")
        return file

    with tempfile.TemporaryDirectory() as folder:
        # With a digest in the requirements, pip refuses any other archive before it runs anything inside it.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "vaderSentiment"]
        print(f"downloading the movie snippets ({PACKAGE}, 2.4 MB) to {file}", flush=True)
        done = subprocess.run([*pip, "-r", requirements, "-d", folder], capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode != 0 or not archives:
            raise DataError(
                f"could not download the movie snippets: `{' '.join(pip[1:])} {PACKAGE}` failed:\n"
                f"{(done.stderr or done.stdout).strip()}\n{BRING_YOUR_OWN}"
            )
        # The one member is read, and nothing is unpacked to the disk.
        with tarfile.open(archives[0]) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, ARCHIVE))) as inner:
            text = _member(inner, MEMBER)

    if (digest := hashlib.sha256(text).hexdigest()) != MEMBER_SHA256:
        raise DataError(f"{MEMBER} has SHA-256 {digest}, expected {MEMBER_SHA256}: it is not used. {BRING_YOUR_OWN}")
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_bytes(text)
    partial.replace(file)
    return file


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"there is no file {name} in the downloaded archive. {BRING_YOUR_OWN}")
    return file.read()


def read(path: Path) -> list[Row]:
    """The rows of a file in either format, the first of each set of duplicates (letter case and spacing apart)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the data from {path}: {error}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.split("\t", 2)
        try:
            if len(fields) == 2 and fields[0].strip() in ("0", "1"):
                row = Row(int(fields[0]), fields[1].strip())
            elif len(fields) == 3:
                rating = float(fields[1])
                if abs(rating) < 0.5:
                    continue  # people could not tell either
                row = Row(int(rating > 0), fields[2].strip())
            else:
                raise ValueError
        except ValueError:
            raise DataError(
                f"{path}, line {number}: expected `0 or 1 <tab> text` or `id <tab> rating <tab> text`, "
                f"found {line[:60]!r}"
            ) from None
        rows.setdefault(" ".join(row.text.lower().split()), row)
    if len(rows) < 20 or len({row.label for row in rows.values()}) < 2:
        raise DataError(f"{path} holds {len(rows)} usable rows: at least 20, and both classes, are needed")
    return list(rows.values())


def split(rows: list[Row]) -> Split:
    """A fifth for test, a tenth for dev, the rest for train: the same rows whatever --seed and --train-rows say."""
    rows = sorted(rows, key=lambda row: row.text)
    random.Random(0).shuffle(rows)
    test, dev = len(rows) // 5, len(rows) // 10
    return Split(train=rows[test + dev :], dev=rows[test : test + dev], test=rows[:test])
