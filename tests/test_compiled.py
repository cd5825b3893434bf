"""Compiled forwards: the same results, compiled a few times whatever passes, and no harm where compiling fails.

Most tests put another backend in the C++ compiler's place: one that runs the graphs as they are, or looks at them.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pico
import pytest
import torch
from test_engine import calibrated, update_errors
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward import compiled
from featcal_fast.forward import runner as runners
from featcal_fast.forward.calls import BatchCalls, Origin, stage_inputs
from featcal_fast.forward.runner import BlockRunner, should_compile
from featcal_fast.models import find_structure
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport

COMPILED = ff.Settings(compile_blocks=True)
GRAPHS: list[torch.fx.GraphModule] = []


def as_they_are(graph: torch.fx.GraphModule, _inputs: Any) -> Callable:
    """The backend that runs graphs as they are; one for all tests, which so find what others compiled."""
    GRAPHS.append(graph)
    return graph.forward


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", as_they_are)


class Backend:
    """A backend of a test's own, which keeps the graphs: as torch.compile traces them, or `lowered` for a compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lowered: bool = False) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=self._keep) if lowered else self._keep)

    def _keep(self, graph: torch.fx.GraphModule, _inputs: Any) -> Callable:
        self.graphs.append(graph)
        return self.runs(graph.forward)

    def runs(self, forward: Callable) -> Callable:
        return forward


def warned(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if "compiled" in str(each.message)]


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name


def entering(model: nn.Module, batch: pico.Batch) -> tuple[nn.Module, Tensor, BatchCalls]:
    """A model's first block, and what enters it."""
    structure = find_structure(model.requires_grad_(False), "model")
    return structure.blocks[0], *stage_inputs(structure, batch)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["clip", "gemma3", "qwen2-moe", "t5", "bert"])
def test_every_family_is_compiled_and_gives_the_same_bits(
    kind: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(pico.T5, "num_layers", 1)
    monkeypatch.setitem(pico.T5, "num_decoder_layers", 1)
    job, before = pico.job(kind, 1), len(GRAPHS)
    assert_equal(calibrated(ff.calibrate_model, job, COMPILED), calibrated(ff.calibrate_model, job, ff.Settings()))
    if kind == "qwen2-moe" and warned(recwarn):
        pytest.skip("the routed experts of these versions of torch and transformers run as they are")
    assert len(GRAPHS) >= before + 3  # the expert's, the student's, the advance
    assert not warned(recwarn)


@pytest.mark.usefixtures("plain")
def test_layers_tasks_and_shapes_of_chunks_share_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts padded or not, and one alone: three forms of a call, and three forwards of each."""
    monkeypatch.setattr(runners, "_known", {})
    before = len(GRAPHS)
    for layers in (4, 6):
        job = pico.job("llama", 2, layers=layers)
        for task, (texts, *_) in job.batches.items():
            sizes = [(4, 20), (4, 17), (3, 18), (2, 20), (3, 9)]
            padded = [{name: value[:rows, :width] for name, value in texts.items()} for rows, width in sizes]
            alone = [{name: value[1:2, :width] for name, value in texts.items()} for width in (20, 18)]
            whole = [{"input_ids": texts["input_ids"][:rows, :width]} for rows, width in sizes]
            job.batches[task] = [*padded, *alone, *whole]
        assert_equal(calibrated(ff.calibrate_model, job, COMPILED), calibrated(ff.calibrate_model, job, ff.Settings()))
        assert len(GRAPHS) - before == 3 * 3


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scale)


@pytest.mark.parametrize("layers", [3, 20])
def test_what_differs_from_layer_to_layer_is_not_mixed_up(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant is compiled in (GPT-2's scores may be divided by the layer's number), until it is too often."""
    hidden, backend, runner = torch.randn(2, 5, 8), Backend(monkeypatch), BlockRunner(True)
    with warnings.catch_warnings(record=True) as caught:
        for number in range(layers):
            block = Scaled(0.1 * (1 + number))
            assert torch.equal(runner.run(BatchCalls([()], [{}]), 0, block, hidden), block(hidden))
    assert len(backend.graphs) == min(layers, 8)
    assert [("limit" in message) for message in warned(caught)] == [True] * (layers > 8)


def test_the_students_forward_leaves_out_what_no_feature_needs_and_a_bfloat16_one_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, backend, lower = pico.job("vit", 1), Backend(monkeypatch, lowered=True), {"forward_dtype": "bfloat16"}
    calibrated(ff.calibrate_model, job, COMPILED)
    found = calibrated(ff.calibrate_model, job, replace(COMPILED, **lower))
    products = [
        [node.meta["val"].dtype for node in graph.graph.nodes if node.target is torch.ops.aten.addmm.default]
        for graph in backend.graphs
    ]
    for dtype, some in ((torch.float32, products[:3]), (torch.bfloat16, products[3:])):
        assert sorted(some, key=len) == [[dtype] * 5, [dtype] * 6, [dtype] * 6]  # the student's without fc2
    assert_equal(found, calibrated(ff.calibrate_model, job, ff.Settings(**lower)))


@pytest.fixture(scope="module")
def compiler() -> None:
    """torch.compile as it is; without a C++ compiler it cannot be tested."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("compiler")
def test_compiled_the_engine_matches_the_float64_reference() -> None:
    job = pico.job("llama", 2)
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings())
    found = calibrated(ff.calibrate_model, job, COMPILED)
    for name, (error, rounding) in update_errors(found, judge, job.merged).items():
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"
    assert_equal(calibrated(ff.calibrate_model, job, COMPILED), found)


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compiled_a_bfloat16_block_is_no_farther_from_the_exact_one(recwarn: pytest.WarningsRecorder) -> None:
    model = pico.job("llama", 1).merged
    batch, names = pico.texts(1, 0)[0], ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    found: list[dict[str, Tensor]] = []
    for dtype, compile in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        block, hidden, calls = entering(copy.deepcopy(model).bfloat16().to(dtype), batch)
        seen: dict[str, Tensor] = {}
        out = BlockRunner(compile).capture(calls, 0, block, hidden, names, seen.__setitem__)
        assert out is not None
        found.append({**seen, "out": out})
    exact, plain, ours = found
    for name, value in exact.items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] - value).norm() <= 2 * (plain[name] - value).norm(), name
    assert not warned(recwarn)


class Broken(Backend):
    def runs(self, forward: Callable) -> Callable:
        raise RuntimeError("no compiler here\nand more")


@pytest.mark.parametrize(("kind", "block", "kinds"), [("clip", "CLIPEncoderLayer", 1), ("t5", "T5Block", 4)])
def test_what_cannot_be_compiled_runs_as_it_is_after_one_warning(
    kind: str, block: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, however many kinds of blocks there are."""
    job, backend = pico.job(kind, 2), Broken(monkeypatch)
    with pytest.warns(UserWarning, match="cannot be compiled") as caught:
        found = calibrated(ff.calibrate_model, job, COMPILED)
    (message,) = warned(caught)
    assert message.startswith(f"{block}: its forward cannot be compiled")
    assert "(RuntimeError: no compiler here)" in message
    assert "settings.compile_blocks: false" in message
    assert len(backend.graphs) == kinds
    assert_equal(found, calibrated(ff.calibrate_model, job, ff.Settings()))


@pytest.mark.usefixtures("plain")
def test_a_blocks_own_error_is_the_one_that_is_raised() -> None:
    block, hidden, calls = entering(pico.llama(), pico.texts(1, 0)[0])
    calls.origin = Origin("expert math", "model.layers", "math", 2, slice(0, 4))
    with pytest.warns(UserWarning, match="LlamaDecoderLayer"), pytest.raises(UnsupportedModelError) as found:
        BlockRunner(True).run(calls, 0, block, hidden[..., :-1])
    with pytest.raises(UnsupportedModelError) as expected:
        calls.run(0, block, hidden[..., :-1])
    assert str(found.value) == str(expected.value)
    assert str(found.value).startswith(
        "expert math, model.layers.0: running its layer on batch 2, samples 0 to 3 of task math: RuntimeError: "
    )


@torch.no_grad()
def test_hooks_of_others_run_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden, calls = entering(pico.llama(), pico.texts(1, 0)[0])
    backend, runner, ran = Backend(monkeypatch), BlockRunner(True), []
    block.mlp.register_forward_hook(lambda *_: ran.append(1))
    with pytest.warns(UserWarning, match="it has hooks"):
        runner.run(calls, 0, block, hidden)
    runner.run(calls, 0, block, hidden)
    assert (len(ran), len(backend.graphs)) == (2, 0)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden + 1
        return x.add_(self.linear(self.norm(x)))


def test_an_input_that_is_overwritten_is_seen_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden, seen = Overwriting().requires_grad_(False), torch.randn(3, 5, 8), {}
    backend = Backend(monkeypatch)
    with pytest.warns(UserWarning, match="overwrites the input of norm in place"):
        BlockRunner(True).capture(
            BatchCalls([()], [{}]), 0, block, hidden, ["norm", "linear"], lambda name, x: seen.update({name: x.clone()})
        )
    assert torch.equal(seen["norm"], hidden + 1)
    assert not backend.graphs


class Full(Backend):
    """Has room for two samples, and once, while something is compiled, for one."""

    refused = 0

    def runs(self, forward: Callable) -> Callable:
        self._take(len(self.graphs) == 2)

        def run(*values: Any) -> Any:
            self._take(any(isinstance(x, Tensor) and x.ndim == 3 and len(x) > 2 for x in values))
            return forward(*values)

        return run

    def _take(self, too_much: bool) -> None:
        if too_much:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_halves_the_chunks(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    job, device = pico.job("llama", 1, layers=2), Full(monkeypatch)
    found = calibrated(ff.calibrate_model, job, COMPILED)
    expected = calibrated(ff.calibrate_model, job, ff.Settings())
    assert device.refused == 2  # four samples, then two
    for name, (error, rounding) in update_errors(found, copy.deepcopy(expected).double(), job.merged).items():
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"
    assert not warned(recwarn)


@torch.no_grad()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_nothing_of_a_forward_that_fails_is_held(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor until garbage is collected: fewer samples pass next, in the memory that it took."""
    held = []

    class Fails(Backend):
        def runs(self, forward: Callable) -> Callable:
            def run(*values: Any) -> Any:
                features = torch.zeros(8)
                held.append(weakref.ref(features))
                raise error("too large")

            return run

    Fails(monkeypatch)
    block, hidden, calls = entering(pico.llama(), pico.texts(1, 0)[0])
    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            BlockRunner(True).run(calls, 0, block, hidden)
        assert [each() for each in held] == [None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("plain")
@torch.no_grad()
def test_nothing_of_a_block_or_a_chunk_is_held() -> None:
    model, runner, held = pico.llama(), BlockRunner(True), []
    for batch in pico.texts(2, 0):
        block, hidden, calls = entering(copy.deepcopy(model), batch)
        seen: dict[str, Tensor] = {}
        runner.capture(calls, 0, block, hidden, ["mlp.down_proj"], seen.__setitem__)
        held += [weakref.ref(each) for each in (*seen.values(), hidden, block, block.mlp.down_proj.weight)]
        del block, hidden, calls, seen
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


@pytest.mark.usefixtures("plain")
def test_the_host_waits_no_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `test_engine.py` counts it, once all is compiled."""
    job, reads, layers = pico.job("bert", 2), [], []
    ff.calibrate_model(job.copy().merged, base=job.base, experts=job.experts, batches=job.batches, settings=COMPILED)

    class Layers(Progress):
        def layer(self, report: LayerReport) -> None:
            layers.append(len(reads))

    def counted(name: str) -> Callable:
        method = getattr(Tensor, name)
        return lambda tensor, *args: (reads.append(name), method(tensor, *args))[1]

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy"):
        monkeypatch.setattr(Tensor, name, counted(name))
    ff.calibrate_model(
        job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=COMPILED, progress=Layers()
    )
    assert [after - before for before, after in pairwise(layers)] == [2]


def test_it_is_a_setting_that_a_report_names(tmp_path: Any) -> None:
    for value in ("yes", 1, 0.5):
        with pytest.raises(ff.FeatCalError, match=r"settings.compile_blocks: found .*, expected true, false or null"):
            ff.Settings(compile_blocks=value)
    assert [
        should_compile(ff.Settings(compile_blocks=value), torch.device(device))
        for value in (None, False, True)
        for device in ("cpu", "cuda")
    ] == [False, True, False, False, True, True]
    recipe = pico.save(pico.job("vit", 1), tmp_path)
    ff.calibrate({**recipe, "settings": {"compile_blocks": False}})
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["compile_blocks"] is False


def test_a_plan_counts_what_lives_longer_and_no_more_arithmetic(tmp_path: Any) -> None:
    recipe = pico.save(pico.job("llama", 2), tmp_path)
    plain, ours = (ff.plan({**recipe, "settings": {"compile_blocks": value}}, device="cpu") for value in (False, True))
    assert ours.flops == plain.flops
    for before, after in zip(plain.layers, ours.layers, strict=True):
        assert (before.system, before.scratch) == (after.system, after.scratch)
        assert after.working > before.working
    assert ours.host["compiler"] > 0
    assert "compiler" not in plain.host


@pytest.mark.usefixtures("plain")
@torch.no_grad()
def test_compiled_or_not_the_same_is_reported() -> None:
    block, hidden, calls = entering(pico.llama(), pico.texts(1, 0)[0])
    names, outputs, found = ["mlp.down_proj", "self_attn.v_proj"], ["mlp.up_proj", "self_attn.v_proj"], []
    for runner in (BlockRunner(True), BlockRunner(False)):
        given: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}
        out = runner.capture(calls, 0, block, hidden, names, given.__setitem__, outputs, made.__setitem__)
        assert out is not None
        found.append([*(given[name] for name in names), *(made[name] for name in outputs), out])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
