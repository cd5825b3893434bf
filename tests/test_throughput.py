"""How long a job will take: what like runs took here, or else products of its kinds; and how that is told."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from runs import Stop
from torch.overrides import TorchFunctionMode

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.job import run as job
from featcal_fast.job import throughput
from featcal_fast.job.products import Speeds, measure_products
from featcal_fast.job.throughput import BYTES, EACH, MOST, SPREAD, SPREAD_OF_FEW, expected, remember
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.planning.duration import Duration
from featcal_fast.planning.plan import LayerPlan, Plan

# Of a processor that multiplies bfloat16 ten times as fast as it takes moments: 30 seconds for the plan below.
SPEEDS = Speeds({"forward": 1e11, "moments": 1e10, "fold": 1e10, "solve": 1e9})
FLOPS = {"forward": 1e12, "moments": 1e11, "fold": 0.0, "solve": 1e10}
ALONE = 4 * 30.0


def made(dtype: str = "bfloat16", width: int = 64, times: float = 1.0, **flops: float) -> Plan:
    """A plan of four layers alike."""
    layout = Layout((InputGroup(("up",), width, (width,), None),), {}, None)
    each = {kind: times * count for kind, count in (FLOPS | flops).items()}
    layers = [LayerPlan(index, layout, {}, 0, 0, 0, each) for index in range(4)]
    return Plan("cpu", {"task": 1}, True, layers=layers, dtype=dtype)


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of runs, of none yet, on a machine of those speeds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(throughput, "measure_products", lambda plan: (SPEEDS, SPEEDS))
    return tmp_path / "cache" / "featcal_fast" / "rates.json"


def told(plan: Plan) -> tuple[float, float, str]:
    found = expected(plan)
    assert found is not None
    return found.low, found.high, found.source


def around(seconds: float, spread: float = SPREAD_OF_FEW) -> tuple[Any, Any]:
    return pytest.approx(seconds / spread), pytest.approx(seconds * spread)


def test_without_a_run_the_time_is_that_of_products_measured_now() -> None:
    low, high, source = told(made())
    assert ALONE / 1.5 < low < 1.5 * ALONE < high < 3 * ALONE
    assert source == "by products measured just now"


def test_bytes_that_are_moved_make_the_longest_time_longer() -> None:
    plan = made(times=1e-3)
    assert str(expected(plan)) == "under 10 s"
    plan.bytes_read, plan.bytes_written = {"expert": round(30 * BYTES)}, {"calibrated model": round(10 * BYTES)}
    assert str(expected(plan)) == "under 46 s"


def test_a_run_of_little_but_reading_says_nothing_of_others() -> None:
    remember(made(times=1e-3), 0, 300)
    assert told(made())[2] == "by products measured just now"
    assert told(made(times=1e-3)) == (*around(300), "as a run like it took here")


def test_what_else_the_machine_does_makes_the_longest_time_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high, _ = told(made())
    busy = Speeds({kind: speed / 2 for kind, speed in SPEEDS.by_kind.items()})
    monkeypatch.setattr(throughput, "measure_products", lambda plan: (SPEEDS, busy))
    assert told(made())[0] == low
    assert told(made())[1] > 1.9 * high


def test_the_median_of_long_runs_tells_the_time_and_a_short_one_on_a_busy_machine_does_not() -> None:
    for times in (1.5, 5.0, 1.6):  # of their products' alone
        remember(made(), 0, times * ALONE)
    low, high, source = told(made())
    assert (low, source) == (around(1.6 * ALONE, SPREAD)[0], "as 3 runs like it took here")
    assert 1.6 * ALONE * SPREAD <= high < 5 * ALONE
    before = expected(made())
    remember(made(times=1 / 20), 0, 8 * ALONE / 20)  # 48 seconds
    assert expected(made()) == before


def test_a_short_run_alone_tells_nothing_of_a_long_job_but_of_one_as_short() -> None:
    remember(made(times=1 / 10), 0, 3 * ALONE / 10)  # 36 seconds
    assert told(made())[2] == "by products measured just now"
    assert told(made(times=1 / 10)) == (*around(3 * ALONE / 10), "as a run like it took here")


def test_runs_tell_of_jobs_with_another_share_of_each_kind_of_work() -> None:
    remember(made(), 0, 2 * ALONE)
    assert told(made(forward=9e12))[:2] == around(2 * 4 * (90 + 20))


def test_only_runs_in_the_same_dtype_of_like_width_on_as_many_threads_are_like_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remember(made(), 0, 2 * ALONE)
    measured = "by products measured just now"
    assert told(made(width=100))[2] != measured
    assert told(made(width=200))[2] == told(made(width=20))[2] == told(made("float32"))[2] == measured
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert told(made())[2] == measured


def test_runs_of_processes_that_are_not_set_up_say_nothing_of_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(made(), 0, 2 * ALONE)
    monkeypatch.setattr(throughput, "is_configured", lambda: True)
    assert told(made())[2] == "by products measured just now"
    remember(made(), 0, ALONE)
    assert told(made()) == (*around(ALONE), "as a run like it took here")


def test_of_a_run_that_went_on_with_another_its_own_work_counts_if_it_did_most() -> None:
    remember(made(), 1, 2 * ALONE * 3 / 4)
    assert told(made()) == (*around(2 * ALONE), "as a run like it took here")
    remember(made(), 3, 100 * ALONE)
    remember(made(), 4, 100 * ALONE)
    assert told(made())[:2] == around(2 * ALONE)


def test_a_run_says_what_it_did_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, said = pico.save(pico.job("llama", 1), tmp_path), list[tuple[Plan, int, float]]()

    def note(*arguments: Any) -> None:
        assert (tmp_path / "out" / "report.json").exists(), "whatever goes wrong now, the model is there"
        said.append(arguments)

    monkeypatch.setattr(job, "remember", note)
    with pytest.raises(KeyboardInterrupt):
        ff.calibrate(recipe, out=tmp_path / "out", device="cpu", checkpoint_every=1, progress=Stop(2))
    assert not said
    report = ff.calibrate(recipe, out=tmp_path / "out", device="cpu", resume=True)
    [(plan, first, seconds)] = said
    assert (first, len(plan.layers), plan.dtype, plan.largest_matrix) == (2, 3, "float32", (64, 320))
    assert 0 < seconds < report.seconds


def test_a_gpu_that_is_not_here_has_no_time() -> None:
    plan = made()
    plan.device = "cuda:99"
    remember(plan, 0, 2 * ALONE)
    assert expected(plan) is None


def on_gpu(times: float = 1.0) -> Plan:
    plan = made(times=times)
    plan.device = "cuda"
    return plan


def test_on_a_gpu_runs_of_a_minute_or_of_half_the_work_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert expected(on_gpu()) is None
    remember(on_gpu(1 / 100), 0, 30)  # most of which was not its operations
    assert expected(on_gpu()) is None
    assert told(on_gpu(1 / 100))[:2] == around(30)
    remember(on_gpu(1 / 2), 0, 40)
    assert told(on_gpu()) == (*around(80), "as a run like it took here")
    remember(on_gpu(1 / 10), 0, 60)
    assert told(on_gpu())[2] == "as 2 runs like it took here"


def test_numbers_of_no_run_are_no_error(rates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    remember(on_gpu(), 0, 100)
    [kept] = json.loads(rates.read_text())["runs"]
    for tiny in ({"flops": {"forward": 5e-324}, "seconds": 1e29}, {"width": 5e-324}):
        rates.write_text(json.dumps({"runs": [{**kept, **tiny}]}))
        assert expected(on_gpu()) is None
    rates.write_text(json.dumps({"runs": [{**kept, "flops": {"forward": 1.0}, "seconds": 9e29}]}))
    assert str(expected(on_gpu())).endswith(" days")


def test_the_newest_runs_are_kept_of_each_kind_and_width(rates: Path) -> None:
    remember(made(width=400), 0, 2 * ALONE)
    for number in range(EACH + 5):
        remember(made(), 0, 100 + number)
    kept = json.loads(rates.read_text())["runs"]
    assert [run["seconds"] for run in kept] == [2 * ALONE, *range(105, 105 + EACH)]
    for number in range(MOST):
        kept.append({**kept[0], "device": f"another {number}"})
    rates.write_text(json.dumps({"runs": kept}))
    remember(made(), 0, 500)
    kept = json.loads(rates.read_text())["runs"]
    assert (len(kept), kept[-1]["seconds"]) == (MOST, 500)


def test_runs_that_end_at_once_leave_a_whole_file(rates: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remember(made(), 0, 200 + number), range(16)))
    kept = {run["seconds"] for run in json.loads(rates.read_text())["runs"]}
    assert kept <= set(range(200, 216))
    assert kept
    assert [path.name for path in rates.parent.iterdir()] == [rates.name]


def test_a_file_is_kept_whole_or_as_it_was_whichever_operation_is_refused(
    rates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(made(), 0, 100)
    for number, name in enumerate(("make_folder", "create", "write_at", "sync", "rename", "sync_folder")):
        before = rates.read_text()
        with monkeypatch.context() as patch:
            patch.setattr(files, name, _refuse)
            remember(made(), 0, 200 + number)
        assert rates.read_text() == before or json.loads(rates.read_text())["runs"][-1]["seconds"] == 200 + number
        assert [path.name for path in rates.parent.iterdir()] == [rates.name]


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


KIND = {"device": "x", "threads": 1, "program": False, "dtype": "float32", "width": 64}
RUN = {**KIND, "flops": {"forward": 1e13}, "seconds": 200}
WRONG = [
    *('{"cpu": 2e11}', "[1, 2", "[" * 10**6, "[1]", "7", '{"runs": 5}', '{"runs": [1, null, "run", {}]}'),
    *(
        json.dumps({"runs": [{**RUN, **wrong}]})
        for wrong in (
            *({"seconds": each} for each in (0, -1, "1", None, 1e31, 10**39)),
            *({"flops": each} for each in ({}, 5, {"forward": -1, "fold": 9}, {"forward": "x"}, {"forward": None})),
            *({"width": 0}, {"threads": "8"}, {"device": 7}),
        )
    ),
]


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_garbage_and_the_form_of_before_are_no_runs(text: str, rates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made("float32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(throughput, "processor", lambda: "x")
    rates.parent.mkdir(parents=True)
    rates.write_text(json.dumps({"runs": [RUN]}))
    assert told(plan)[2] == "as a run like it took here"
    rates.write_text(text)
    assert told(plan)[2] == "by products measured just now"
    remember(plan, 0, 2 * ALONE)
    assert told(plan)[2] == "as a run like it took here"


def test_where_nothing_can_be_kept_products_still_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(made(), 0, 2 * ALONE)
    assert told(made())[2] == "by products measured just now"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    remember(made(), 0, 2 * ALONE)
    assert told(made())[2] == "by products measured just now"


class Linears(TorchFunctionMode):
    """What is multiplied as linear modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            self.dtypes.add(arguments[0].dtype)
        return function(*arguments, **(options or {}))


def test_products_are_of_the_plans_kinds_and_widths() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        with Linears() as seen:
            best, now = measure_products(made(dtype, 48))
        assert dtype in str(seen.dtypes), "the forward is what modules call: another product's speed may be another"
        assert best.by_kind.keys() == now.by_kind.keys() == FLOPS.keys()
        assert all(0 < now.by_kind[kind] <= best.by_kind[kind] * (1 + 1e-9) for kind in FLOPS)
    assert best.seconds({"another": 1.0}) == 1 / min(best.by_kind.values())


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (151, 209.1, "150 to 210 s"),
        (0.1, 9, "under 10 s"),
        (9.99, 12.01, "9.9 to 13 s"),
        (99.6, 100.2, "99 to 110 s"),
        (580, 601, "9.6 to 11 min"),
        (3000, 7200, "50 to 120 min"),
        (86400, 2.2 * 86400, "24 to 53 h"),
        (1e6, 2e6, "11 to 24 days"),
        (396, 396, "400 s"),
        (4, 50, "4.0 to 50 s"),
        (0.9, 50, "under 50 s"),
        (math.inf, math.inf, "inf days"),
    ],
)
def test_a_time_has_two_digits_and_both_ends_hold(low: float, high: float, text: str) -> None:
    assert str(Duration(low, high, "")) == text


def test_the_command_tells_a_range_and_how_it_is_known(tmp_path: Path, command: Callable) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(pico.save(pico.job("llama", 1), tmp_path)))
    arguments = ("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    line = "time: under 10 s, by products measured just now, if reading keeps up"
    assert line in command(*arguments)[1]
    plan = ff.plan(tmp_path / "recipe.yaml", device="cpu")
    remember(plan, 0, 1000)
    assert "time: 11 to 25 min, as a run like it took here, if reading keeps up" in command(*arguments)[1]
    assert plan.summary(rate=plan.seconds(1) / 90).splitlines()[3].startswith("time: 90 s, at ")
