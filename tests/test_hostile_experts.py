"""Parts of quantised weights and of adapters that would be read as something else, or would take forever."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from forms import FORMS, factors, quantised, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import find_checkpoint, find_expert
from featcal_fast.checkpoints.targets import Targets

W = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and experts of it in quantised forms."""
    root = tmp_path_factory.mktemp("experts")
    pico.llama(layers=1).save_pretrained(root / "base")
    for form in ("nf4", "nf4-double", "int8"):
        quantised(root / "base", root / form, FORMS[form], root / f"before-{form}")
    return root


def state(tensors: Tensors, **changes: object) -> None:
    values = json.loads(tensors[STATE].numpy().tobytes())
    tensors[STATE] = torch.frombuffer(bytearray(json.dumps({**values, **changes}).encode()), dtype=torch.uint8)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def described(**changes: object) -> Callable[[Tensors], None]:
    return lambda tensors: state(tensors, **changes)


SCALES, MAP = f"{W}.absmax", f"{W}.quant_map"
SCB = "model.layers.0.self_attn.q_proj.SCB"
PARTS: list[tuple[str, Callable[[Tensors], None], str]] = [
    (
        "nf4",
        put(MAP, Tensor.long),
        rf"tensor {MAP} has shape \(16,\) and torch.int64, expected \(16,\) and torch.float32",
    ),
    ("nf4", put(MAP, lambda t: t[:15]), rf"tensor {MAP} has shape \(15,\) .* expected \(16,\)"),
    ("nf4", put(MAP, lambda t: t[:, None]), rf"tensor {MAP} has shape \(16, 1\)"),
    ("nf4", put(MAP, lambda t: t * 1e38), rf"tensor {MAP} has the values .*, expected some from -1 to 1"),
    ("nf4", put(MAP, lambda t: t * torch.nan), rf"tensor {MAP} has the values \[nan, .*, expected some from -1 to 1"),
    ("nf4", described(quant_type="fp4"), r"has the quant_type 'fp4', expected nf4"),
    ("nf4", put(MAP, Tensor.half), rf"tensor {MAP} has shape \(16,\) and torch.float16"),
    (
        "nf4",
        put(SCALES, lambda t: t.to(torch.uint8)),
        rf"tensor {SCALES} has .* torch.uint8, expected .* torch.float32",
    ),
    ("nf4", put(SCALES, lambda t: t[1:]), rf"tensor {SCALES} has shape \(63,\)"),
    ("nf4", put(STATE, Tensor.long), r"quant_state.* has .* of torch.int64, expected at most 65536 of torch.uint8"),
    ("nf4", put(STATE, lambda t: t.repeat(1000)), r"quant_state.* bytes of torch.uint8, expected at most 65536"),
    ("nf4", put(STATE, lambda t: t[:0]), r"quant_state.* does not describe a quantised weight"),
    ("nf4", put(STATE, lambda t: torch.full((60_000,), 91, dtype=torch.uint8)), r"nested more than 64 levels deep"),
    ("nf4", described(shape=[10**30]), rf"tensor {W} has 2048 bytes, expected 5"),
    ("nf4", described(shape=[64, 65]), rf"tensor {W} has 2048 bytes, expected 2080"),
    ("nf4", described(shape=[4096.0]), r"does not describe a quantised weight: .*found the shape \[4096.0\]"),
    ("nf4", described(shape=[-64, -64]), r"found the shape \[-64, -64\]"),
    ("nf4", described(shape=[]), r"found the shape \[\]"),
    ("nf4", described(shape=[1] * 100), r"found the shape \[1, 1"),
    ("nf4", described(shape=None), r"found the shape None"),
    ("nf4", described(blocksize=63), r"found the block sizes \[63\], expected powers of two"),
    ("nf4", described(blocksize=0), r"found the block sizes \[0\]"),
    ("nf4", described(blocksize=2**40), r"found the block sizes \[1099511627776\]"),
    ("nf4", described(blocksize=True), r"found the block sizes \[True\]"),
    ("nf4", described(blocksize=128), rf"tensor {SCALES} has shape \(64,\) .*expected \(32,\)"),
    ("nf4", described(dtype="int8"), "found nf4 of int8, expected NF4"),
    ("nf4", described(dtype=["float32"]), r"found the dtype \['float32'\]"),
    (
        "nf4",
        described(nested_blocksize=256),
        rf"tensor {SCALES} has .* torch.float32, expected \(64,\) and torch.uint8",
    ),
    ("nf4-double", put(f"{W}.nested_absmax", Tensor.long), r"nested_absmax has .* torch.int64"),
    ("nf4-double", put(f"{W}.nested_quant_map", Tensor.double), r"nested_quant_map has .* torch.float64"),
    ("nf4-double", put(f"{W}.nested_quant_map", lambda t: t[:16]), r"nested_quant_map has shape \(16,\)"),
    (
        "nf4-double",
        put(SCALES, Tensor.float),
        rf"tensor {SCALES} has .* torch.float32, expected \(64,\) and torch.uint8",
    ),
    ("nf4-double", described(nested_offset="nan"), r"found the nested_offset 'nan'"),
    ("nf4-double", described(nested_offset=float("nan")), r"does not describe a quantised weight.*found NaN"),
    ("nf4-double", described(nested_offset=1e300), r"found the nested_offset 1e\+300"),
    (
        "nf4",
        lambda tensors: tensors.update({STATE.replace("nf4", "fp4"): tensors[STATE].clone()}),
        rf"tensor {W} is described twice; nobody can tell which of both counts",
    ),
    ("nf4-double", described(nested_blocksize=3), r"found the block sizes \[64, 3\]"),
    ("nf4-double", described(nested_dtype="float16"), r"found nf4 of float32"),
    ("int8", put(SCB, Tensor.long), rf"tensor {SCB} has shape \(64,\) and torch.int64, expected \(64,\) and torch"),
    ("int8", put(SCB, lambda t: t[:1]), rf"tensor {SCB} has shape \(1,\)"),
    ("int8", put(W, lambda t: t.to(torch.uint8)), r"LLM.int8 of .*stored as"),
    ("int8", put(W, lambda t: t[:, :0]), r"LLM.int8 of .*stored as"),
    ("int8", put(f"{W}_format", lambda t: torch.zeros(9)), r"weight_format has shape \(9,\) and torch.float32"),
    ("int8", put(f"{W}_format", lambda t: torch.ones((), dtype=torch.uint8)), r"found LLM.int8 in tiles"),
]


@pytest.mark.parametrize(("form", "change", "message"), PARTS, ids=[message[:70] for _, _, message in PARTS])
def test_a_part_of_a_quantised_weight_is_what_it_must_be(
    form: str, change: Callable[[Tensors], None], message: str, saved: Path, tmp_path: Path
) -> None:
    """Before anything is computed with it."""
    folder = tmp_path / form
    shutil.copytree(saved / form, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ff.FeatCalError, match=rf"expert: {folder}.*{message}") as error:
        find_expert(form, tmp_path, "expert", find_checkpoint("base", saved, "base model"))
    assert len(str(error.value)) < 900


def test_not_a_number_in_scales_is_found_on_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "nf4", tmp_path / "nf4")
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    tensors[SCALES][:] = torch.nan
    save_file(tensors, tmp_path / "nf4" / "model.safetensors")
    expert = find_expert("nf4", tmp_path, "expert", find_checkpoint("base", saved, "base model"))
    with pytest.raises(ff.FeatCalError, match=rf"tensor {W} is not finite once dequantised"):
        expert.read([W])


# Adapters


def adapter(
    saved: Path, folder: Path, change: Callable[[Tensors], None] = lambda tensors: None, **config: object
) -> object:
    tensors = factors(load_file(saved / "base" / "model.safetensors"), layers=1)
    change(tensors)
    write_adapter(folder, tensors, **config)
    return find_expert(str(folder), folder.parent, "expert", find_checkpoint("base", saved, "base model"))


EXPONENTIAL = r"(([a-z0-9_.])+)+!"
Q = "model.layers.0.self_attn.q_proj"
NUMBERS = "a number of at most 1,000,000"
ADAPTERS: list[tuple[dict[str, object], str]] = [
    ({"target_modules": EXPONENTIAL}, "target_modules: .*takes longer than 1"),
    ({"rank_pattern": {EXPONENTIAL: 4}}, "rank_pattern: .*takes longer than 1"),
    ({"target_modules": "(" * 10**5}, "target_modules: .*regular expression"),
    ({"target_modules": "q_("}, r"target_modules: found a pattern .*'q_\(' is not a regular expression"),
    ({"lora_alpha": 1e308}, f"lora_alpha: found 1e\\+308, expected {NUMBERS}"),
    ({"lora_alpha": 10**39}, f"lora_alpha: found 1000000.*, expected {NUMBERS}"),
    ({"lora_alpha": int("9" * 400)}, "adapter_config.json is not valid JSON: found an integer of 400 digits"),
    ({"lora_alpha": float("nan")}, "adapter_config.json is not valid JSON: found NaN"),
    ({"lora_alpha": True}, f"lora_alpha: found True, expected {NUMBERS}"),
    ({"alpha_pattern": {"q_proj": 1e30}}, "alpha_pattern: found .*1e\\+30.*, expected"),
    ({"r": 10**30}, "has rank 4, expected the 1000000000000000000000000000000 of adapter_config.json"),
    ({"r": 10**30, "use_rslora": True}, "has rank 4, expected the 1000000000000000000000000000000"),
    ({"r": 0}, "r: found 0, expected an integer above 0"),
    ({"use_rslora": "yes"}, "use_rslora: found 'yes', expected true or false"),
    ({"fan_in_fan_out": 2}, "fan_in_fan_out: found 2, expected true or false"),
    ({"modules_to_save": ["a"] * 101}, "modules_to_save: found .*, expected a list of at most 100 names"),
    ({"peft_type": ["\x1b[2J" * 99]}, "found peft_type .*, expected LORA"),
    ({"init_lora_weights": "pissa" * 999}, "found init_lora_weights 'pissa"),
]


@pytest.mark.parametrize(("config", "message"), ADAPTERS, ids=[message[:60] for _, message in ADAPTERS])
def test_an_adapters_config_is_bounded(config: dict, message: str, saved: Path, tmp_path: Path) -> None:
    started = time.process_time()
    with pytest.raises(ff.FeatCalError, match=rf"expert: .*{message}") as error:
        adapter(saved, tmp_path / "adapter", **config)
    assert time.process_time() - started < 5
    assert len(str(error.value)) < 900
    assert str(error.value).isprintable()


def _twice(tensors: Tensors) -> None:
    for factor in "AB":
        tensors[f"{Q.removeprefix('model.')}.lora_{factor}.weight"] = tensors[f"{Q}.lora_{factor}.weight"].clone()


def _embedded(tensors: Tensors) -> None:
    tensors[f"{Q}.lora_embedding_A"], tensors[f"{Q}.lora_embedding_B"] = torch.ones(4, 64), torch.ones(64, 4)


def _other_name(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


TENSORS: list[tuple[Callable[[Tensors], None], str]] = [
    (_twice, r"lora_A.weight and \S+lora_A.weight are for the same tensor; nobody can tell which of them counts"),
    (_other_name(f"{Q}.lora_embedding_A", torch.ones(4, 64)), "its factor lora_embedding_B is missing"),
    (_embedded, r"lora_\S+ and .*lora_\S+ are for the same tensor"),
    (_other_name("model.embed_tokens.weight", torch.ones(0, 64)), r"embed_tokens.weight has shape \(0, 64\), but"),
    (_other_name(f"{Q}.base_layer.lora_A.weight", torch.ones(4, 64)), "are for the same tensor"),
    (_other_name(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.bool)), "has dtype torch.bool, expected plain"),
    (_other_name(f"{Q}.lora_B.bias", torch.ones(64)), "is no part of a plain LoRA adapter"),
    (_other_name("model.norm.weight", torch.ones(64).long()), "norm.weight has dtype torch.int64, but .*torch.float32"),
    (_other_name("model.norm.weight", torch.ones(64).bool()), "norm.weight has dtype torch.bool, but .*torch.float32"),
    (_other_name("../../x", torch.ones(64)), r"tensor base_model.model.../../x adapts ../../x, which the base model"),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(64), "norm.weight": torch.ones(64)}),
        r"norm.weight are for the same tensor",
    ),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message[:40] for _, message in TENSORS])
def test_tensors_of_an_adapter_are_what_they_must_be(change, message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ff.FeatCalError, match=rf"expert: .*adapter_model.safetensors.*{message}"):
        adapter(saved, tmp_path / "adapter", change)


def test_the_name_of_a_base_is_bounded(saved: Path, tmp_path: Path) -> None:
    bad = {f"{Q}.lora_A.weight": torch.ones(4, 32)}
    with pytest.raises(ff.FeatCalError, match=r"adapter_config.json names 'xxx") as error:
        adapter(saved, tmp_path / "adapter", lambda t: t.update(bad), base_model_name_or_path="x" * 10**5)
    assert len(str(error.value)) < 900


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "b.ocks"]},
        {"target_modules": r".*layers\.\d\.(self_attn|mlp)\.[qv]_proj", "exclude_modules": ["v_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
        {"target_modules": r"q_proj"},
    ],
    ids=str,
)
def test_targets_are_pefts(values: dict) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = [
        f"{root}.{number}.{part}"
        for root in ("model.layers", "model.blocks")
        for number in (0, 1, 12)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.q_proj")
    ]
    config = peft.LoraConfig(**values)
    expected = {name for name in modules if check_target_module_exists(config, name) in (True, 1)}
    expected |= {name for name in modules if type(check_target_module_exists(config, name)).__name__ == "Match"}
    assert Targets(values, "expert").named(modules)[0] == expected


def test_patterns_of_layers_are_bounded() -> None:
    values = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": EXPONENTIAL}
    with pytest.raises(ff.FeatCalError, match=r"expert: layers_pattern: .*takes longer than 1"):
        Targets(values, "expert").named([f"{'many_layers.' * 5}0.q_proj"])


def test_patterns_of_ranks_are_pefts() -> None:
    other = pytest.importorskip("peft.utils.other")
    modules = [f"model.layers.{number}.self_attn.{part}_proj" for number in range(12) for part in "qkv"]
    for keys in (
        ["q_proj", r"layers\.1\.self_attn\.k_proj", "k_proj"],
        [r".*\.1\d\..*", "v_proj", "model.layers.3.self_attn.q_proj"],
        [r"self_attn.[qk]_proj", r"1.self_attn.v_proj"],
    ):
        patterns = {key: number for number, key in enumerate(keys)}
        expected = {name: patterns.get(other.get_pattern_key(keys, name), -1) for name in modules}
        assert Targets({"rank_pattern": patterns}, "expert").by_pattern("rank_pattern", modules, -1) == expected


def test_an_adapter_of_many_modules_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for every module would take minutes."""
    from featcal_fast.checkpoints import targets

    asked: list[int] = []
    plain = targets.full_matches
    monkeypatch.setattr(targets, "full_matches", lambda patterns, names: asked.append(1) or plain(patterns, names))
    modules = [f"model.layers.{number}.q_proj" for number in range(800)]
    values = {"target_modules": r".*\.q_proj", "rank_pattern": dict.fromkeys(modules[:300], 4)}
    found = Targets(values, "expert")
    assert found.named(modules)[0] == set(modules)
    assert found.by_pattern("rank_pattern", modules, 8)[modules[299]] == 4
    assert len(asked) == 2
