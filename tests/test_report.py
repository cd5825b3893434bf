"""What `report.json` says: by its schema, of every kind of run; and what is read of one."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pico
import pytest
from forms import expert_at, factors, write_adapter
from jsonschema import Draft202012Validator, ValidationError
from runs import contents, stopped
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast.checkpoints import Manifest, work_path
from featcal_fast.errors import CheckpointError, ResumeError
from featcal_fast.job import run as job
from featcal_fast.reporting.clock import PHASES, Clock
from featcal_fast.reporting.inputs import DataInput, InputFile, Inputs, ModelInput
from featcal_fast.reporting.report import GroupReport, LayerReport, Peaks, RankReport, Report

SCHEMA = json.loads(resources("featcal_fast.reporting").joinpath("report.schema.json").read_text())
PARTS = SCHEMA["$defs"]
VALIDATOR = Draft202012Validator(SCHEMA)
Written = dict[str, Any]


def check(report: Report) -> Written:
    """A report must be as its schema says, come back as it was, and add up; what is written of it."""
    text = report.to_json()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    VALIDATOR.validate(written)
    assert next(iter(written)) == "schema_version"
    assert Report.from_json(text) == report
    assert report.seconds == pytest.approx(sum(report.phases.values()))
    assert 0 < sum(layer.seconds for layer in report.layers) < report.seconds
    return written


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """A folder with a job of two layers and two tasks, and its recipe."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, pico.save(pico.job("llama", 2, layers=2), folder)


@pytest.fixture(scope="module")
def written(saved: tuple[Path, Written]) -> Written:
    """Its report, as JSON: of a run that has all that there may be to say."""
    folder, recipe = saved
    settings = {"auto": True, "ridge_lambda": 1.0, "anchor_rho": 1.0}
    return check(ff.calibrate({**recipe, "held_out": 0.2, "settings": settings}, out=folder / "once", device="cpu"))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == f"urn:featcal-fast:report:{Report.schema_version}"
    assert SCHEMA["properties"]["schema_version"]["const"] == Report.schema_version


def objects(schema: Any) -> Iterator[Written]:
    """Every part of a schema that says what keys an object has."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from objects(each)


def test_every_key_is_needed_and_described_and_no_other_allowed() -> None:
    found = list(objects(SCHEMA))
    assert len(found) > 10
    for each in found:
        keys = each["properties"]
        assert each["additionalProperties"] is False
        assert all(value["description"] for value in keys.values())
        assert set(each.get("required", ())) == (set() if "headers" in keys else set(keys))


@pytest.mark.parametrize(
    ("schema", "cls"),
    [
        (SCHEMA["properties"]["settings"], ff.Settings),
        (SCHEMA["properties"]["peaks"], Peaks),
        (SCHEMA["properties"]["inputs"], Inputs),
        (PARTS["rank"], RankReport),
        (PARTS["layer"], LayerReport),
        (PARTS["group"], GroupReport),
        (PARTS["model"], ModelInput),
        (PARTS["file"], InputFile),
        (PARTS["task"], DataInput),
    ],
)
def test_the_schema_has_the_code_s_keys(schema: Written, cls: type) -> None:
    assert schema["properties"].keys() == {item.name for item in fields(cls)}


def test_the_schema_has_the_clock_s_phases() -> None:
    assert list(SCHEMA["properties"]["phases"]["properties"]) == list(PHASES)


def places(value: Any) -> Iterator[tuple[Written, str]]:
    """Every key of every object in a report, with the object; of lists only the first item, of the recipe none."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield value, key
            if key != "recipe":
                yield from places(each)
    elif isinstance(value, list) and value:
        yield from places(value[0])


def test_a_key_that_is_missing_or_unknown_does_not_pass(written: Written) -> None:
    needed = [set(each["required"]) for each in objects(SCHEMA) if "required" in each]
    edited, tried = copy.deepcopy(written), set()
    del edited["layers"][1:]  # all of it is looked at each time
    edited["ranks"] = [asdict(RankReport(["task0 1/2"], "cpu"))]  # this run had none
    for names in edited["contents"].values():
        names.clear()
    for place, key in list(places(edited)):
        if set(place) in needed:  # else its keys are names, of tasks or files
            tried.add(key)
            value = place.pop(key)
            with pytest.raises(ValidationError, match=f"'{key}' is a required property"):
                VALIDATOR.validate(edited)
            place[key] = value
            place["unknown"] = value
            with pytest.raises(ValidationError, match="'unknown' was unexpected"):
                VALIDATOR.validate(edited)
            del place["unknown"]
    VALIDATOR.validate(edited)
    assert tried == set.union(*needed)


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("1", ("schema_version",)),
        (2, ("schema_version",)),
        (-1.0, ("seconds",)),
        (None, ("seconds",)),
        (0.5, ("calibrated_weights",)),
        ("elsewhere", ("layers", 0, "groups", 0, "space")),
        ("float16", ("layers", 0, "groups", 0, "solver_steps", 0)),
        ("abc", ("contents", "headers", "model.safetensors")),
        ("pickle", ("inputs", "models", "base model", "form")),
        ("0" * 63, ("inputs", "data", "task0", "sha256")),
    ],
)
def test_a_wrong_value_does_not_pass(value: object, keys: tuple[str | int, ...], written: Written) -> None:
    edited: Any = copy.deepcopy(written)
    place = edited
    for key in keys[:-1]:
        place = place[key]
    assert keys[-1] in place or isinstance(keys[-1], int)
    place[keys[-1]] = value
    with pytest.raises(ValidationError):
        VALIDATOR.validate(edited)


def test_inputs(saved: tuple[Path, Written], written: Written) -> None:
    folder, recipe = saved
    models, data = written["inputs"]["models"], written["inputs"]["data"]
    assert list(models) == ["merged model", "base model", "expert task0", "expert task1"]
    assert models["expert task1"]["reference"] == recipe["experts"]["task1"]["model"]
    for label, name in (("base model", "base"), ("expert task0", "task0")):
        found = {path.name: path for path in (folder / name).iterdir()}
        assert models[label]["files"].keys() == found.keys()
        assert models[label]["form"], models[label]["revision"] == ("checkpoint", None)
        for own, said in models[label]["files"].items():
            content = found[own].read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = hashlib.sha256(content[: 8 + size]).hexdigest() if own.endswith(".safetensors") else None
            assert said == {
                "bytes": len(content),
                "modified_ns": found[own].stat().st_mtime_ns,
                "sha256": None if header else hashlib.sha256(content).hexdigest(),
                "header_sha256": header,
                "hub_sha256": None,
            }
    task = data["task0"]
    assert (task["samples"], task["batches"], task["files"], task["left_out"]) == (20, 5, 1, {})
    assert task["bytes"] == (folder / "task0.safetensors").stat().st_size
    assert task["sha256"] != data["task1"]["sha256"]


def test_peaks_and_phases(written: Written) -> None:
    peaks, phases = written["peaks"], written["phases"]
    assert peaks["device_bytes"] is peaks["planned_device_bytes"] is None
    assert peaks["host_bytes"] > 2**26
    assert peaks["planned_host_bytes"] > 2**26
    assert phases["scanning"] == 0
    assert all(seconds > 0 for phase, seconds in phases.items() if phase != "scanning")


def changed(recipe: Written, folder: Path, what: str) -> Written:
    """The same job, otherwise."""
    base = load_file(Path(recipe["base_model"]) / "model.safetensors")
    adapter = write_adapter(folder / "lora", factors(base, layers=2))
    ways: dict[str, Callable[[], Written]] = {
        "an adapter": lambda: expert_at(recipe, "task0", f"{recipe['experts']['task1']['model']}+{adapter}"),
        "merged on the fly": lambda: {"merged_model": None, "merge": {"method": "average"}},
        "experts compressed": lambda: {"expert_storage": "host-int8"},
        "float64": lambda: {"settings": {"solve_dtype": "float64", "include": ["q_proj", "down_proj"]}},
    }
    return {key: value for key, value in {**recipe, **ways[what]()}.items() if value is not None}


@pytest.mark.parametrize("what", ["an adapter", "merged on the fly", "experts compressed", "float64"])
def test_other_jobs(what: str, saved: tuple[Path, Written], tmp_path: Path) -> None:
    recipe = changed(saved[1], tmp_path, what)
    (tmp_path / "scratch").mkdir()
    scratch, scan = (tmp_path / "scratch", True) if what == "float64" else (None, False)
    report = ff.calibrate(recipe, out=tmp_path / "out", device="cpu", scratch=scratch, scan=scan)
    written = check(report)
    models = report.inputs.models
    steps = {tuple(group.solver_steps) for layer in report.layers for group in layer.groups}
    if what == "an adapter":
        assert models["expert task0"].form == "lora"
        assert models["expert task0, base model"] == replace(
            models["expert task1"], reference=models["expert task0"].reference
        )
        weights = models["expert task0"].files["adapter_model.safetensors"]
        content = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
        assert weights.sha256 == hashlib.sha256(content).hexdigest()
    elif what == "merged on the fly":
        assert (models["merged model"].form, models["merged model"].files) == ("merge", {})
    elif what == "experts compressed":
        assert all(0 < error < 0.1 for error in written["storage_error"].values())
    else:
        assert [warning.partition(":")[0] for warning in report.warnings] == ["fewer samples than asked for"]
        assert report.inputs.data["task0"].samples_asked == 256
        assert report.phases["scanning"] > 0
        assert report.bytes_written["hidden states"] > 0
        assert steps == {("float64",)}


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_other_families_in_memory(kind: str) -> None:
    models = pico.job(kind, 2)
    report = ff.calibrate_model(models.merged, base=models.base, experts=models.experts, batches=models.batches)
    written = check(report)
    assert written["inputs"] == {"models": {}, "data": {}}
    assert written["recipe"] is written["out"] is written["peaks"]["planned_host_bytes"] is None
    assert written["contents"] == {}


def test_a_run_that_went_on(case: Any, tmp_path: Path) -> None:
    stopped(case, tmp_path)
    first = json.loads((tmp_path / ".out.partial" / "manifest").read_text().splitlines()[-1].partition(" ")[2])
    case.resume(tmp_path)
    text = (tmp_path / "out" / "report.json").read_text()
    report = Report.from_json(text)
    assert check(report)["phases"].keys() == first["phases"].keys()
    assert all(report.phases[phase] >= seconds for phase, seconds in first["phases"].items())
    assert all(seconds > 0 for phase, seconds in first["phases"].items() if phase not in ("scanning", "finishing"))
    assert contents(tmp_path / "out") == case.whole


def test_a_snapshot_of_the_hub_s_cache(
    saved: tuple[Path, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit, and what the hub says of its weights; no link out of it is followed, and nothing large read."""
    recipe = copy.deepcopy(saved[1])
    model, commit, name = tmp_path / "models--org--name", "0123456789abcdef" * 2 + "01234567", "ab" * 32
    snapshot = model / "snapshots" / commit
    shutil.copytree(recipe["experts"]["task0"]["model"], snapshot)
    (model / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(model / "blobs" / name)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    (snapshot / "vocabulary.txt").write_text("a" * 2000)
    monkeypatch.setattr("featcal_fast.job.provenance.LARGEST", 1999)
    (tmp_path / "secret.json").write_text('"1234"')
    (snapshot / "other.json").symlink_to(tmp_path / "secret.json")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "a.json").write_text("{}")
    recipe["experts"]["task0"]["model"] = str(model)
    found = ff.calibrate(recipe, out=tmp_path / "out", device="cpu").inputs.models["expert task0"]
    assert (found.reference, found.revision) == (str(model), commit)
    assert found.files["model.safetensors"].hub_sha256 == name
    assert found.files["model.safetensors"].header_sha256
    assert found.files["model.safetensors"].sha256 is None
    assert found.files["other.json"].sha256 is found.files["vocabulary.txt"].sha256 is None
    assert found.files["sub/a.json"] == InputFile(2, (snapshot / "sub" / "a.json").stat().st_mtime_ns)
    assert found.files["config.json"].sha256
    assert found.files["config.json"].hub_sha256 is None


def report(**values: Any) -> Report:
    group = GroupReport(["q"], 64, 128, "input", "float32", 0.1, solver_steps=["float32"])
    return Report(ff.Settings(), "clip", "cpu", {"a": 5}, [LayerReport(0, 0.5, 0.4, 0.1, [group], ["norm"])], **values)


def test_numbers_that_are_not_finite_are_null() -> None:
    text = report(storage_error={"a": math.nan, "b": math.inf, "c": 0.5}).to_json()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert written["storage_error"] == {"a": None, "b": None, "c": 0.5}
    again = Report.from_json(text)
    assert math.isnan(again.storage_error["a"])
    assert again.to_json() == text
    VALIDATOR.validate({**written, "phases": dict.fromkeys(PHASES, 0)})


def test_a_report_from_before_there_were_versions() -> None:
    """What it has is read, with defaults for what it has not."""
    old = json.loads(report(seconds=2.0, kept={"head": "outside"}).to_json())
    for key in ("schema_version", "phases", "peaks", "inputs"):
        del old[key]
    del old["layers"][0]["groups"][0]["solver_steps"]
    found = Report.from_json(json.dumps({**old, "another key": 1}))
    assert (found.seconds, found.kept, found.tokens) == (2.0, {"head": "outside"}, {"a": 5})
    assert (found.inputs, found.layers[0].groups[0].solver_steps) == (Inputs(), [])
    assert found.schema_version == 1


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r.update(schema_version=2), "schema_version: found 2, expected 1 or less; a newer featcal_fast"),
        (lambda r: r.update(schema_version=10**39), "schema_version: found 1000"),
        (lambda r: r.update(schema_version=True), "schema_version: found True, expected a whole number"),
        (lambda r: r.update(schema_version=0), "schema_version: found 0, expected a whole number"),
        (lambda r: r.update(schema_version="1"), "schema_version: found '1', expected a whole number"),
        (lambda r: r.pop("settings"), "settings: missing"),
        (lambda r: r.update(settings=[]), r"settings: found \[\], expected an object"),
        (lambda r: r["settings"].update(ridge_lambda="x"), "settings.ridge_lambda: found 'x'"),
        (lambda r: r.update(layers={}), r"layers: found {}, expected a list"),
        (lambda r: r["layers"][0].update(groups=[1]), r"layers\[0\].groups\[0\]: found 1, expected an object"),
        (lambda r: r["layers"][0].update(index=0.5), r"layers\[0\].index: found 0.5, expected a whole number"),
        (lambda r: r["layers"][0].update(drift_after="0"), r"layers\[0\].drift_after: found '0', expected a number"),
        (lambda r: r.update(tokens={"a": None}), "tokens.a: found None, expected a whole number"),
        (lambda r: r.update(out=1), "out: found 1, expected a text"),
        (lambda r: r.update(peaks={"host_bytes": "1"}), "peaks.host_bytes: found '1', expected a whole number"),
        (lambda r: r.update(warnings=["a", None]), r"warnings\[1\]: found None, expected a text"),
        (lambda r: r.update(inputs={"models": {"a\x1b": 1}}), r"inputs.models.a\\x1b: found 1, expected an object"),
    ],
)
def test_a_report_of_another_form_is_one_error(edit: Callable[[Written], object], said: str) -> None:
    values = json.loads(report().to_json())
    edit(values)
    with pytest.raises(ff.FeatCalError, match=said):
        Report.from_json(json.dumps(values))


def test_check_reads_older_reports_and_no_newer_ones(
    saved: tuple[Path, Written], written: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(saved[0] / "once", out)
    old = {key: value for key, value in written.items() if key not in ("schema_version", "phases", "peaks", "inputs")}
    (out / "report.json").write_text(json.dumps(old))
    assert ff.check(out).whole
    for version, said in ((2, "a newer featcal_fast wrote it"), (None, "expected a whole number"), (-1, "found -1")):
        (out / "report.json").write_text(json.dumps({**written, "schema_version": version}))
        found = ff.check(out)
        assert found.status == 2
        assert "report.json is of another version: schema_version: found" in found.summary()
        assert said in found.summary()


@pytest.mark.parametrize("text", ["", "[]", "1", "[" * 10**5, '{"seconds": NaN}', '{"a": 1, "a": 2}', "\ud800"])
def test_what_is_no_report_is_one_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="report: it cannot be read"):
        Report.from_json(text)


def test_a_finished_run_whose_report_was_changed(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks only its name, and is not given that."""

    def fail(_work: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.WorkFolder, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            case.run(tmp_path)
    path = tmp_path / ".out.partial" / "model" / "report.json"
    whole = path.read_text()
    for text in ("{}", whole.replace('"schema_version": 1', '"schema_version": 2'), "\udc80"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ResumeError, match=r"report.json is not as the finished run wrote it.*--fresh starts"):
            case.run(tmp_path, resume=True)
    path.write_text(whole)
    case.resume(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phases", {"opening": "1"}),
        ("phases", [1.0]),
        ("bytes_read", {"base model": None}),
        ("reports", [1]),
        ("reports", [{"index": 0}]),
    ],
)
def test_a_manifest_of_another_form_is_refused(key: str, value: object, case: Any, tmp_path: Path) -> None:
    manifest = Manifest(work_path(stopped(case, tmp_path)) / "manifest")
    manifest.append({**manifest.entries[-1], key: value})
    with pytest.raises(ResumeError, match="is of another version of featcal_fast; --fresh starts over"):
        case.resume(tmp_path)


def test_a_clock_counts_each_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("featcal_fast.reporting.clock.time.perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    passes(1)
    with clock("accumulating"):
        passes(2)
        with clock("reading"):
            passes(4)
        passes(8)
        with suppress(ZeroDivisionError), clock("solving"):
            passes(16)
            raise ZeroDivisionError
        passes(32)
    passes(64)
    assert {phase: seconds for phase, seconds in clock.seconds.items() if seconds} == {
        **{"opening": 65, "reading": 4, "accumulating": 42, "solving": 16},
    }
    assert list(clock.seconds) == list(PHASES)
