"""Every attack is beaten off: one clear error, soon, within bounds, inputs as they were, nothing left."""

from __future__ import annotations

import fnmatch
import os
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from attacks import judge as judging
from attacks.controls import CONTROLS
from attacks.core import Attack, all_attacks
from attacks.good import Goods, Job
from attacks.judge import compare, judge, reads_everything, snapshot, warm_up
from runs import EXHAUSTIVE

import featcal_fast as ff

EACH = 2  # variants of a family that are tried, unless all are asked for
ALL = all_attacks()
SLOW = ("*-catastrophic*", "*/patterns-slow-*")  # takes a second each
# Of the families those that stand for a cause of their own; patterns of names.
ALWAYS = (
    *("recipes/documents-nested-*", "recipes/lines-*", "recipes/experts-that-*", "settings/numbers-*-as-1*"),
    *("settings/patterns-include-catastrophic", "settings/seeds-184*", "settings/merges-scaling-1e+30"),
    *("settings/out-of-range-*-1e+300", "paths/nowhere-*", "paths/outputs-*", "paths/taken-*", "indexes/files-*"),
    *("headers/fields-dtype-F32", "headers/fields-shape-*of*", "headers/others-*", "headers/lengths-922*"),
    *("configs/forward-num-hidden-layers-10000*", "configs/forward-max-position-embeddings--5", "configs/code-*"),
    *("configs/architectures-[5ap]*", "configs/lines-*-merged", "configs/sizes-*-1099511627776"),
    *("experts/decoders-math-*", "experts/with-*", "adapters/values-lora-alpha-1e+308", "adapters/there-twice-*"),
    *("adapters/values-modules-to-save-*", "adapters/patterns-slow-0-target-*", "quantised/parts-quant-map-int64"),
    *("quantised/parts-nested-absmax-*", "quantised/parts-absmax-*", "quantised/states-shape-100*"),
    *(
        "quantised/eight-bit-scales-*",
        "jsonl/lines-nested-*",
        "templates/programs-loops",
        "templates/programs-a-long-text",
    ),
    *("tokenizers/patterns-split-catastrophic", "ready_inputs/unknown-*", "ready_inputs/ids-complex"),
    "ready_inputs/targets-deeper",
    *("ready_inputs/sizes-*", "ready_inputs/encoder-inputs-*", "ready_inputs/pixels-no-width"),
    *("images/files-postscript", "images/folders-*", "processors/values-crop-size-height-*", "changing/*"),
    *("processors/documents-ff-*", "cards/*"),
    *("mergekit/references-signs*", "mergekit/references-*-out"),
)


def chosen() -> list[Attack]:
    """Those that stand for themselves, and of every family some, the same in every run."""
    families: dict[str, list[Attack]] = defaultdict(list)
    for each in ALL.values():
        if not any(fnmatch.fnmatch(each.name, pattern) for pattern in SLOW):
            families[each.family].append(each)
    if EXHAUSTIVE:
        return list(ALL.values())
    draw, found = random.Random(0), {name for pattern in ALWAYS for name in fnmatch.filter(ALL, pattern)}
    for family, members in families.items():
        found |= {each.name for each in (draw.sample(members, min(EACH, len(members))) if family else members)}
    return [each for each in ALL.values() if each.name in found]


@pytest.fixture(scope="session")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Goods:
    made = Goods(tmp_path_factory.mktemp("goods"))
    warm_up(made, tmp_path_factory.mktemp("warm"))
    return made


@pytest.mark.parametrize("attack", chosen(), ids=lambda attack: attack.name)
def test_it_is_beaten_off(attack: Attack, goods: Goods, tmp_path: Path) -> None:
    if attack.as_user and reads_everything():
        pytest.skip("rights of files mean nothing to this user")
    if attack.kind == "gguf":
        pytest.importorskip("gguf")
    verdict = judge(attack, goods.copy(attack.kind, tmp_path))
    assert not verdict.faults, "\n".join(verdict.faults)


def test_there_are_enough_of_them() -> None:
    assert len(chosen()) >= 450
    assert all(fnmatch.filter(ALL, pattern) for pattern in ALWAYS)


@pytest.mark.parametrize("name", CONTROLS)
def test_what_only_looks_odd_is_accepted(name: str, goods: Goods, tmp_path: Path) -> None:
    kind, damage = CONTROLS[name]
    if kind == "gguf":
        pytest.importorskip("gguf")
    job = goods.copy(kind, tmp_path)
    damage(job)
    before = snapshot(tmp_path)
    plan = ff.plan(job.path("recipe.yaml"), device="cpu")
    assert plan.calibrated
    assert not plan.problems
    assert compare(before, snapshot(tmp_path)) == []


# ---------------------------------------------------------------- a judge that passes everything would be of no use


def _judged(goods: Goods, folder: Path, name: str = "recipes/is-missing", **changes: object) -> list[str]:
    attack = replace(ALL[name], **changes)  # type: ignore[arg-type]
    return judge(attack, goods.copy(attack.kind, folder)).faults


def test_the_judge_wants_an_error(goods: Goods, tmp_path: Path) -> None:
    faults = _judged(goods, tmp_path, damage=lambda job: None)
    assert any("plan: it was accepted" in fault for fault in faults)
    assert any("calibrate: it was accepted" in fault for fault in faults)
    assert any("files were changed: job/out" in fault for fault in faults)


def test_the_judge_wants_it_to_name_things(goods: Goods, tmp_path: Path) -> None:
    assert any("'nothing like it'" in fault for fault in _judged(goods, tmp_path, needles=("nothing like it",)))


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("while True: pass", "it hung"),
        ("import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass", "it took 0."),
        ("x = bytearray(600 * 2**20)", "MB"),
        ("open(job.path('merged/config.json'), 'ab').write(b' ')", "merged/config.json"),
        ("job.path('data/new').write_text('')", "data/new"),
        ("(job.root / 'left').mkdir()", "left"),
        ("import os\nfound.append(os.open('/', os.O_RDONLY))", "open files"),
        ("import os\nfound.append(os.fork())\nif not found[-1]: os._exit(0)", "children"),
        ("raise ff.FeatCalError('recipe.yaml is no file: Traceback')", "no sentence"),
    ],
)
def test_the_judge_sees(
    goods: Goods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, fault: str
) -> None:
    job, found = goods.copy("llama", tmp_path), []

    def run(*_: object, **__: object) -> None:
        exec(program, {"ff": ff, "job": job, "found": found})
        raise ff.FeatCalError("recipe.yaml is not a file")

    monkeypatch.setattr(judging, "SECONDS", 0.5)
    monkeypatch.setattr(judging, "USUAL", 60)  # no machine is slow
    monkeypatch.setattr(judging, "BUSY", 1)
    monkeypatch.setattr(ff, "plan", run)
    monkeypatch.setattr(ff, "calibrate", lambda *_, **__: ff.Recipe.load(job.path("recipe.yaml")))
    faults = judge(ALL["recipes/is-missing"], job).faults
    for number in found:  # what was left behind
        os.close(number) if "open" in program else os.waitpid(number, 0)
    assert all(each.startswith("plan:") for each in faults)  # calibrate did as it should
    assert any(fault in each for each in faults), faults


# ---------------------------------------------------------------- through the command line, in processes of their own


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("recipes/lines-bomb", "plan"),
        ("recipes/lines-unknown-key-escape", "calibrate"),
        ("configs/documents-nested", "plan"),
        ("paths/nowhere-out-surrogate", "calibrate"),
        ("headers/lengths-9223372036854775808", "plan"),
        ("adapters/patterns-slow-0-target-modules", "calibrate"),
    ],
)
def test_the_command_says_it_in_one_line(name: str, command: str, goods: Goods, tmp_path: Path) -> None:
    job: Job = goods.copy(ALL[name].kind, tmp_path)
    ALL[name].damage(job)
    before = snapshot(tmp_path)
    arguments = [sys.executable, "-m", "featcal_fast", command, str(job.path("recipe.yaml")), "--device", "cpu"]
    done = subprocess.run(arguments, capture_output=True, timeout=60, check=False)
    said = done.stderr.decode()
    assert done.returncode == 1, said
    assert len(said.strip().splitlines()) == 1, said
    assert not ALL[name].missing(said)
    assert "Traceback" not in said
    assert said.strip().isprintable()
    assert compare(before, snapshot(tmp_path)) == []
