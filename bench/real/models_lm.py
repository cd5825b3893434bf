"""The language model's base, experts, merges and calibrations of a form and seed, and the texts that they are given."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers

import featcal_fast as ff
from bench.harness import process
from bench.real.finetune_lm import Training, expert, load
from bench.real.measure_lm import Sample, continuations, encode
from bench.real.repairs import Repair, decided
from bench.real.texts import PARTS, Text


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        length: tokens that a text is cut at, in training, calibration and measures.
        test, validation, training: texts a domain.
        other: texts of no domain.
        said: continuations of the base, each from the first tokens of a text of no domain.
        given: tokens that they start with.
    """

    length: int = 48
    test: int = 300
    validation: int = 48
    training: int = 3000
    other: int = 64
    said: int = 32
    given: int = 8


@dataclass(frozen=True)
class Given:
    """What a unit's rows are made of.

    Attributes:
        base: its folder.
        texts: by domain and part.
        others: texts of no domain.
        folder: where models are kept.
        form: of the experts.
        seed: of experts and calibration texts.
        training: of the experts.
        sizes: of what is measured.
    """

    base: Path
    texts: Mapping[str, Mapping[str, Sequence[Text]]]
    others: Sequence[Text]
    folder: Path
    form: str
    seed: int
    training: Training
    sizes: Sizes

    @cached_property
    def samples(self) -> dict[str, dict[str, list[Sample]]]:
        """The domains' texts as they are measured, by domain and part."""
        counts = {part: getattr(self.sizes, part) for part in PARTS}
        return {
            domain: {part: self._encoded(parts[part], counts[part]) for part in PARTS}
            for domain, parts in self.texts.items()
        }

    @cached_property
    def apart(self) -> list[Sample]:
        """Texts of no domain."""
        return self._encoded(self.others, self.sizes.other)

    @cached_property
    def said(self) -> list[Sample]:
        """The base's own continuations, of other texts than those of `apart`; none where there are no such texts."""
        starts = self._encoded(self.others[self.sizes.other :], self.sizes.said)
        ids = [sample.ids[: self.sizes.given] for sample in starts if len(sample.ids) >= self.sizes.given]
        if not ids:
            return []
        path = self.folder / f"continuations-{digest([ids, self.base_digest, self.sizes.length])}.json"
        return continuations(self.base_model, ids, self.sizes.length, self.tokenizer.eos_token_id, path)

    @cached_property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def base_model(self) -> Any:
        return load(self.base)

    @cached_property
    def base_digest(self) -> str:
        return sha256((self.base / "model.safetensors").read_bytes()).hexdigest()

    @cached_property
    def experts(self) -> dict[str, Path]:
        """Their folders, by domain; trained unless they are there."""
        return {
            domain: expert(
                self.base,
                [sample.ids for sample in parts["training"]],
                self.form,
                self.training,
                f"{domain} {self.seed} {self.base_digest}",
                self.folder / "experts",
            )
            for domain, parts in self.samples.items()
        }

    def _encoded(self, found: Sequence[Text], count: int) -> list[Sample]:
        encoded = (encode(self.tokenizer, each.text, each.file, self.sizes.length) for each in found)
        return [sample for sample in encoded if sample is not None][:count]


def digest(facts: Any) -> str:
    """A short one of what JSON and dataclasses can hold."""
    return sha256(json.dumps(facts, default=asdict).encode()).hexdigest()[:16]


def merged(by: Given, method: str, scaling: float) -> Any:
    """The model of a merge that the package wrote to a folder, which is gone afterwards."""
    with _work(by, "merge") as work:
        ff.merge(_recipe(by, method, scaling, work), out=work / "out")
        return load(work / "out")


def calibrated(by: Given, repair: Repair, count: int) -> tuple[Any, dict[str, Any]]:
    """The calibrated model, what it took, each layer's drift before and after, and what held-out samples decided.

    As its user runs it: texts and folders in, a folder out, in a process of its own. Nothing stays of them.
    """
    with _work(by, "calibrate") as work:
        (work / "base").symlink_to(by.base.resolve(), target_is_directory=True)
        for domain, parts in by.texts.items():
            lines = [json.dumps({"text": each.text}) for each in parts["training"][: by.sizes.training]]
            (work / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        recipe = _recipe(by, "task_arithmetic", repair.scaling, work) | {
            "samples": count,
            "max_length": by.sizes.length,
            "seed": by.seed,
            "held_out": repair.held_out,
            "settings": {name: value for name, value in asdict(repair.settings).items() if value is not None},
        }
        (work / "recipe.json").write_text(json.dumps(recipe))
        command = [sys.executable, "-m", "bench.workers.ours", str(work), str(work / "out"), "--plan"]
        took = process.last_json(command, OMP_NUM_THREADS="1")
        report = ff.Report.from_json((work / "out" / "report.json").read_text())
        drift = [[layer.drift_before, layer.drift_after] for layer in report.layers]
        return load(work / "out"), {"took": took, "drift": drift, **decided(report)}


@contextmanager
def _work(by: Given, what: str) -> Iterator[Path]:
    by.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=by.folder.resolve(), prefix=f".{what}-") as work:
        yield Path(work)


def _recipe(by: Given, method: str, scaling: float, data: Path) -> dict[str, Any]:
    """Of a merge; the domains' texts are in the folder `data` where it is calibrated."""
    return {
        "base_model": str(by.base.resolve()),
        "merge": {"method": method, "scaling": scaling},
        "experts": {
            domain: {"model": str(path.resolve()), "data": f"{data}/{domain}.jsonl"}
            for domain, path in by.experts.items()
        },
    }
