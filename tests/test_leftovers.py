"""What earlier runs left, where it is odd: nothing is lost before somebody looked at it, and nothing is in the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from runs import Case, stopped

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Manifest, held_bytes, states_path, work_path
from featcal_fast.checkpoints.work import OWNER, STATES
from featcal_fast.errors import OutputError, ResumeError


def scratch(folder: Path) -> Path:
    (folder / "scratch").mkdir()
    return folder / "scratch"


@pytest.mark.parametrize("way", [{}, {"resume": True}])
def test_what_another_version_left_stays(way: dict[str, bool], case: Case, tmp_path: Path) -> None:
    manifest = work_path(stopped(case, tmp_path)) / "manifest"
    entries = Manifest(manifest).entries
    manifest.unlink()
    other = Manifest(manifest)
    for entry in entries:
        other.append({name: value for name, value in entry.items() if name != "tensors"})
    for run in (lambda: case.run(tmp_path, **way), lambda: merge(case, tmp_path)):
        with pytest.raises(ResumeError, match="manifest is of another version of featcal_fast; --fresh starts over"):
            run()
    assert Manifest(manifest).entries == other.entries
    case.run(tmp_path, fresh=True)
    case.check(tmp_path)


def merge(case: Case, folder: Path) -> None:
    recipe = {**case.recipe, "merge": {"method": "average"}}
    del recipe["merged_model"]
    ff.merge(recipe, out=folder / "out")


def test_what_cannot_be_looked_at_stays(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_path(stopped(case, tmp_path))
    listing = files.list_folder

    def broken(path: Path) -> list[Path]:
        if path == work:
            raise OSError(5, "Input/output error")
        return listing(path)

    monkeypatch.setattr(files, "list_folder", broken)
    with pytest.raises(OutputError, match="out cannot be written: Input/output error"):
        case.run(tmp_path, resume=True)
    monkeypatch.setattr(files, "list_folder", listing)
    case.resume(tmp_path)


def test_a_run_has_nothing_to_do_with_the_scratch_folder_of_the_one_it_starts_over(case: Case, tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    stopped(case, tmp_path, scratch=folder)
    stopped(case, tmp_path, fresh=True)
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
    case.resume(tmp_path)


def test_a_scratch_folder_that_is_gone_does_not_keep_a_job_from_starting_over(case: Case, tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    stopped(case, tmp_path, scratch=folder)
    shutil.rmtree(folder)
    with pytest.raises(ResumeError, match="is gone, which the interrupted run wrote; --fresh starts over"):
        case.run(tmp_path, resume=True)
    case.run(tmp_path, fresh=True)
    case.check(tmp_path)


def test_a_run_goes_on_where_its_folder_was_moved_to(case: Case, tmp_path: Path) -> None:
    folder = scratch(tmp_path)
    (tmp_path / "there").mkdir()
    stopped(case, tmp_path / "there", scratch=folder)
    (tmp_path / "there").rename(tmp_path / "here")
    case.resume(tmp_path / "here")
    assert list(folder.iterdir()) == []


def test_hidden_states_of_others_are_removed_only_if_nobody_can_want_them(case: Case, tmp_path: Path) -> None:
    """Not what another run can go on from, or whose output may be out of sight; and nothing odd is in the way."""
    folder = scratch(tmp_path)
    (tmp_path / "other").mkdir()
    owners = {
        "ended": tmp_path / "ended",
        "interrupted": stopped(case, tmp_path / "other", scratch=folder),
        "unmounted": tmp_path / "elsewhere" / "out",
        "long": tmp_path / ("x" * 300) / "out",
    }
    for name, owner in owners.items():
        (folder / f"{STATES}{name}").mkdir()
        (folder / f"{STATES}{name}" / OWNER).write_text(str(owner))
    (folder / f"{STATES}nobodys").mkdir()
    (folder / f"{STATES}file").write_text("")
    before = set(folder.iterdir())
    case.run(tmp_path / "mine", scratch=folder)
    assert before - set(folder.iterdir()) == {folder / f"{STATES}ended"}


def test_a_folder_of_hidden_states_that_was_half_made_or_half_removed_is_in_nobodys_way(
    case: Case, tmp_path: Path
) -> None:
    folder = scratch(tmp_path)
    states = states_path(tmp_path / "out", folder)
    states.mkdir()
    (states / "stage-0a").write_text("half")
    case.run(tmp_path, scratch=folder)
    case.check(tmp_path)


def finished(case: Case, folder: Path, **options: Any) -> None:
    """A run whose result cannot be given its name."""
    refused = OSError(39, "Directory not empty")
    with patch.object(files, "rename", side_effect=refused), pytest.raises(OutputError, match="finished model is in"):
        case.run(folder, **options)


@pytest.mark.parametrize("every", [0, 1])
def test_a_finished_model_of_another_recipe_does_not_get_the_name(every: int, case: Case, tmp_path: Path) -> None:
    finished(case, tmp_path, checkpoint_every=every)
    other = Case({**case.recipe, "seed": 7})
    with pytest.raises(ResumeError, match="recipe: seed: 0, now 7"):
        other.run(tmp_path, resume=True)
    case.resume(tmp_path)


def test_a_finished_model_gets_its_name_on_another_number_of_threads(case: Case, tmp_path: Path) -> None:
    finished(case, tmp_path)
    try:
        torch.set_num_threads(2)
        case.resume(tmp_path)
    finally:
        torch.set_num_threads(1)


def test_an_output_may_have_the_longest_name_that_there_is(case: Case, tmp_path: Path) -> None:
    out = tmp_path / ("x" * 255)
    ff.calibrate(case.recipe, out=out, device="cpu", checkpoint_every=1)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_where_compiled_code_is_kept_does_not_matter(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(case, tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # as torch itself does when it first compiles
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    with pytest.raises(ResumeError, match="be others: environment: TORCHINDUCTOR_MAX_AUTOTUNE: absent, now 1; put"):
        case.run(tmp_path, resume=True)
    monkeypatch.delenv("TORCHINDUCTOR_MAX_AUTOTUNE")
    case.resume(tmp_path)


def test_room_that_an_interrupted_run_has_taken_is_there_for_the_next(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scratch(tmp_path)
    out = stopped(case, tmp_path, scratch=folder)
    assert held_bytes(states_path(out, folder)) > 0
    monkeypatch.setattr(files, "free_bytes", lambda _: os.sysconf("SC_PAGE_SIZE"))
    ff.plan({**case.recipe, "out": str(out)}, device="cpu", scratch=folder).check()
    with pytest.raises(ff.FeatCalError, match="kB free"):
        ff.plan({**case.recipe, "out": str(tmp_path / "another")}, device="cpu", scratch=folder)
