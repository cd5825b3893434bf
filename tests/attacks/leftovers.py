"""What lies where an output is made: not what a run has left, but what another one put there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from attacks.core import Variant, attack, attacks, slug
from attacks.good import Job

WORK = ".out.partial"
REASON = "only a run looks at what another one left"
FIRST: dict[str, Any] = {"fingerprint": {"recipe": {}}, "layers": 2, "states": None}
LINE: dict[str, Any] = {"layer": 0, "tensors": {}, "states": None, "stage_ends": False, "reports": [], "kept": {}}


def _manifest(*entries: object) -> Callable[[Job], None]:
    """A manifest whose checksums are right, a model, and a folder outside that is nobody's to remove."""

    def damage(job: Job) -> None:
        texts = [json.dumps(entry).replace('"OUTSIDE"', json.dumps(str(job.root / "outside"))) for entry in entries]
        lines = [f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n" for text in texts]
        job.write(f"{WORK}/manifest", "".join(lines))
        job.write(f"{WORK}/model/model.safetensors", "")
        job.write("../outside/precious", "mine")

    return damage


@attacks(calibrate_only=REASON, options={"fresh": True})
def states_to_be_removed() -> Iterator[Variant]:
    for value in ("OUTSIDE", 5, [], {}, "", "..", "../..", "/", True):
        yield slug(value), ("manifest", "states"), _manifest({**FIRST, "states": value}, LINE)


@attacks(calibrate_only=REASON, options={"resume": True})
def first_lines() -> Iterator[Variant]:
    needles = ("out", ("partial", "manifest", "interrupted"))
    wrong = {"fingerprint": [5, [], "x", {"recipe": 5}, {"\x1b[31mred": {}}], "layers": ["x", None]}
    for key, values in wrong.items():
        for value in values:
            yield f"{key}-{slug(value)}", needles, _manifest({**FIRST, key: value}, LINE)


@attacks(calibrate_only=REASON, options={"resume": True})
def lines() -> Iterator[Variant]:
    for key, values in {
        "layer": [None, "x", 1.5, [], {}, 10**30],
        "tensors": [None, 5, "x", [5], {"x": 5}, {"../../x": "0"}],
        "states": [5, "x", [1], {"file": 5}, {"file": "../../../outside/precious"}],
    }.items():
        for value in values:
            yield f"{key}-{slug(value)}", ("out", ("manifest", "interrupted")), _manifest(FIRST, {**LINE, key: value})


@attack("out", ("partial", "interrupted"), calibrate_only=REASON)
def a_file_in_its_place(job: Job) -> None:
    job.write(WORK, "mine")


@attack("out", ("partial", "interrupted"), calibrate_only=REASON)
def a_link_in_its_place(job: Job) -> None:
    (job.root / "outside").mkdir()
    job.link(WORK, job.root / "outside")


@attack("out", ("partial", "interrupted"), calibrate_only=REASON)
def a_link_to_itself_in_its_place(job: Job) -> None:
    job.link(WORK, WORK)


@attack("out", ("partial", "interrupted", "lock"), calibrate_only=REASON)
def a_pipe_in_its_place(job: Job) -> None:
    job.pipe(WORK)


@attack("out", ("link", "lock"), calibrate_only=REASON)
def a_link_as_lock(job: Job) -> None:
    job.path(WORK).mkdir()
    job.link(f"{WORK}/lock", "../merged/config.json")


@attack("out", ("link", "model"), calibrate_only=REASON, options={"fresh": True})
def a_link_as_model(job: Job) -> None:
    _manifest(FIRST)(job)
    job.link(f"{WORK}/model", job.root / "outside")
