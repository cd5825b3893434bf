"""Float32 products stay float32 ones, and the process's switches end as they began, however contradictory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from multiprocessing import get_context

import pico
import pytest
import torch
import torch.nn.functional as F
from featcal_kernels import cpu
from torch import Tensor

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.chain import Chain
from featcal_fast.layer.precision import OTHERS, PARENTS, PRODUCTS, ieee_float32
from featcal_fast.streaming.hidden_states import HiddenStates

NEWER = hasattr(torch._C, "_set_fp32_precision_setter")
STEPS = 3000


@pytest.fixture
def apart() -> Iterator[Callable]:
    """Runs a function in a process of its own: not every state of the switches can be put back by hand."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda work, *args: pool.submit(work, *args).result()


def ways() -> dict[str, Callable[[], object]]:
    """How a process may set the switches."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    found: dict[str, Callable[[], object]] = {"nothing": lambda: None}
    for level in ("highest", "high", "medium"):
        found[level] = partial(torch.set_float32_matmul_precision, level)
    for allowed in (False, True):
        found[f"cublas {allowed}"] = partial(setattr, products, "allow_tf32", allowed)
        found[f"cudnn {allowed}"] = partial(setattr, cudnn, "allow_tf32", allowed)
    if NEWER:
        owners = {
            "all": torch.backends,
            "cuda": cudnn,
            "cuda matmul": products,
            "cuda conv": cudnn.conv,
            "cuda rnn": cudnn.rnn,
            "mkldnn matmul": torch.backends.mkldnn.matmul,
            "mkldnn conv": torch.backends.mkldnn.conv,
            "mkldnn rnn": torch.backends.mkldnn.rnn,
        }
        for value in ("none", "ieee", "tf32", "bf16"):
            for name, owner in owners.items():
                if value != "bf16" or "cuda" not in name:
                    found[f"{name} {value}"] = partial(setattr, owner, "fp32_precision", value)
            found[f"mkldnn {value}"] = partial(write, ("mkldnn", "all"), value)  # its attribute sets another's
    return found


def read(key: tuple[str, str]) -> str:
    return torch._C._get_fp32_precision_getter(*key)


def write(key: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*key, value)


def older_readings() -> list[object]:
    """What the older switches read as, or that they refuse."""
    found: list[object] = []
    for reading in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.mkldnn.allow_tf32,
    ):
        found.append("refused")
        with suppress(RuntimeError, AttributeError):
            found[-1] = reading()
    return found


def readings() -> list[object]:
    """What every switch reads as, now and whatever it might inherit: so its own value, too."""
    if not NEWER:
        return older_readings()
    found: list[object] = []
    with ExitStack() as stack:
        for parent in (None, *PARENTS):  # from here on these inherit nothing, and read as they are
            if parent is not None:
                stack.callback(write, parent, read(parent))
                write(parent, "none")
            found.append([read(key) for key in (*PARENTS, *PRODUCTS, *OTHERS)] + older_readings())
        for value in ("ieee", "tf32", "bf16"):
            write(PARENTS[0], value)
            found.append([read(key) for key in (*PARENTS, *PRODUCTS, *OTHERS)] + older_readings())
    return found


def check_nothing_is_rounded() -> None:
    if NEWER:
        found = {key: read(key) for key in (*PRODUCTS, *OTHERS)}
        assert set(found.values()) == {"ieee"}, found
    else:
        assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.allow_tf32 is False


def walk(seed: int) -> int:
    """Set the switches at random, one after the other; how many states that led to."""
    rng, every, states = random.Random(seed), ways(), set()
    # What torch starts with, for cuDNN's, is lost once they are set: first only what leaves them alone.
    shy = [name for name in every if not name.startswith(("cudnn", "cuda conv", "cuda rnn"))]
    for step in range(STEPS):
        name = rng.choice(shy if step < STEPS // 3 else list(every))
        every[name]()
        before = readings()
        states.add(str(before))
        with suppress(KeyError), ieee_float32():
            check_nothing_is_rounded()
            inside = readings()
            if NEWER:
                with cpu._exact_bf16_products():
                    assert read(("mkldnn", "matmul")) == "bf16"
            with suppress(ValueError), ieee_float32():
                check_nothing_is_rounded()
                if rng.random() < 0.5:
                    raise ValueError
            assert readings() == inside, f"step {step}, {name}: what was within"
            if rng.random() < 0.5:
                raise KeyError
        assert readings() == before, f"step {step}, {name}: {before} became {readings()}"
    return len(states)


def test_whatever_was_set_nothing_is_rounded_and_all_is_put_back(apart: Callable) -> None:
    assert apart(walk, 0) > (STEPS / 4 if NEWER else 5)


def calibrated(ways_to_set: list[str]) -> tuple[set[str], list[dict[str, Tensor]]]:
    """Calibrate with switches set in some ways, by the engine and the reference.

    Returns:
        What was done while products could be rounded, and the results.
    """
    seen, results = set(), []
    torch.set_num_threads(1)

    def noting(name: str, work: Callable) -> Callable:
        def run(*args: object) -> object:
            try:
                check_nothing_is_rounded()
            except (AssertionError, RuntimeError):
                seen.add(f"{way}: {name}")
            return work(*args)

        return run

    loop = import_module("featcal_fast.calibrate")
    for owner, name in (
        (HiddenStates, "enter"),
        (BatchCalls, "run"),
        (Chain, "add"),
        (loop, "solve_together"),
        (reference, "stage_inputs"),
        (reference, "solve_weight"),
    ):
        setattr(owner, name, noting(name, getattr(owner, name)))
    for way in ways_to_set:
        ways()[way]()
        for run in (ff.calibrate_model, reference.calibrate_model):
            job = pico.job("clip", 2)
            run(job.merged, base=job.base, experts=job.experts, batches=job.batches)
            results.append({name: parameter.detach() for name, parameter in job.merged.named_parameters()})
    return seen, results


def test_no_product_of_a_run_is_rounded(apart: Callable) -> None:
    """From the patch embedding to the solve, in the engine and in the reference."""
    newer = ["cuda matmul tf32", "mkldnn matmul bf16", "all bf16"] if NEWER else []
    seen, found = apart(calibrated, ["nothing", "medium", *newer])
    assert seen == set()
    for number, result in enumerate(found):
        for name, value in result.items():
            assert torch.equal(value, found[number % 2][name]), name


def sums(device: str) -> list[Tensor]:
    """A product and a convolution that are exact in float32, and lose the fraction where operands are rounded."""
    x, ones = torch.full((256, 256), 1 + 2.0**-12, device=device), torch.ones(256, 256, device=device)
    return [x @ ones, F.conv2d(x.view(8, 32, 16, 16), ones[:32].view(64, 32, 2, 2))]


def exact(device: str) -> tuple[bool, bool]:
    """Whether sums are exact where operands may be rounded, and within the context."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    if NEWER:
        torch.backends.fp32_precision = "bf16" if device == "cpu" else "tf32"
    outside = sums(device)
    with ieee_float32():
        inside = sums(device)
    return all((x.frac() > 0).all() for x in outside), all((x.frac() > 0).all() for x in inside)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operands_are_not_rounded(apart: Callable, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    outside, inside = apart(exact, device)
    assert inside
    if outside:
        pytest.skip("this device rounds no float32 operands, whatever it is allowed")
