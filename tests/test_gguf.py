"""Experts in GGUF files: the tensors that transformers makes of them, whose tokens they are, and hostile headers."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pico
import pytest
import torch
import transformers
from data_files import WORDS, save_tokenizer
from forms import expert_at
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, GgufExpert, find_checkpoint, find_expert
from featcal_fast.checkpoints.gguf_file import Place, read_header, read_values
from featcal_fast.inputs.models import RecipeModels

gguf = pytest.importorskip("gguf")
from gguf_files import ARCHITECTURES, rounded, write  # noqa: E402 (it needs the package)

WEIGHTS = "model.safetensors"
LOADED = sorted(ARCHITECTURES.keys() - {"mixtral", "Gemma", "Granite", "SmolLM3"})  # by transformers


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Any]:
    """A pico model's checkpoint, and its config."""
    made = pico.KINDS[kind]() if kind in pico.KINDS else pico.decoder(kind, head_dim=16)
    model = pico.perturbed(made, 0.1, 1).to(dtype)
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS), model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_expert_has_the_tensors_that_were_converted(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, layouts and values; a norm that the converter adds one to is rounded twice."""
    state, config = saved(kind, tmp_path / "base", dtype)
    path = write(tmp_path / "expert.gguf", state, config, ARCHITECTURES[kind])
    expert = find_expert(str(path), tmp_path, "expert", Checkpoint(tmp_path / "base", "base"))
    assert isinstance(expert, GgufExpert)
    assert expert.tensors.keys() == state.keys()
    for name, value in expert.read(expert.tensors).items():
        assert (tuple(value.shape), value.dtype) == (expert.tensors[name].shape, dtype)
        off = 1e-6 if kind.lower().startswith("gemma") and name.endswith("norm.weight") else 0
        assert torch.allclose(value, state[name], rtol=0, atol=off), name
    assert expert.bytes_read == expert.stored_bytes(expert.tensors)


@pytest.mark.parametrize("kind", LOADED)
def test_an_expert_has_the_tensors_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    state, config = saved(kind, tmp_path / "base")
    path = write(
        tmp_path / "expert.gguf",
        state,
        config,
        ARCHITECTURES[kind],
        lambda name: "Q8_0" if ".attn_" in name and kind != "gpt2" else "F32",
        [f"t{row}" for row in range(config.vocab_size)],
    )
    own = None if kind == "mistral" else config  # a Llama there
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=own, dtype=torch.float32)
    expected = theirs.state_dict()
    expert = find_expert(str(path), tmp_path, "expert", Checkpoint(tmp_path / "base", "base"))
    found = expert.read(expert.tensors)
    assert found.keys() == state.keys()
    for name, value in found.items():
        assert torch.equal(value, _of_stack(expected, name)), name


def _of_stack(state: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of a model's; of an expert's matrices, which it has in two stacks, one."""
    before, _, after = name.partition(".experts.")
    if not after:
        return state[name]
    index, matrix, _ = after.split(".")
    gate, up = state[f"{before}.experts.gate_up_proj"][int(index)].chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": state[f"{before}.experts.down_proj"][int(index)]}[matrix]


@pytest.mark.parametrize("kind", [each.name for each in gguf.GGML_QUANT_SIZES])
def test_values_are_what_the_package_makes_of_their_blocks(kind: str, tmp_path: Path) -> None:
    """Of any type, from any block on, and in pieces."""
    type_ = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = 40
    data = numpy.random.default_rng(0).integers(0, 255, blocks * size, dtype=numpy.uint8)
    (tmp_path / "x.gguf").write_bytes(b"beginning" + data.tobytes())
    place = Place("x.gguf", (blocks * values,), kind, 9, (values, size))
    try:
        with numpy.errstate(all="ignore"):  # of random scales some are none
            expected = torch.from_numpy(numpy.array(gguf.dequantize(data[None], type_))).reshape(-1)
    except NotImplementedError:
        return  # headers with such are refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcal_fast.checkpoints.gguf_file.PIECE", 7 * values)
        found = read_values(tmp_path / "x.gguf", place, 3 * values, 30 * values, torch.float32, "x")
    assert torch.equal(found.view(torch.int32), expected[3 * values : 33 * values].view(torch.int32))  # none, too


# End to end


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return pico.save(pico.job("llama", 2, layers=1), tmp_path)


def as_gguf(root: Path, name: str = "task0", kind: str = "F32", **options: Any) -> Path:
    state = load_file(root / name / WEIGHTS)
    config = Checkpoint(root / name, "x").config
    return write(root / f"{name}.gguf", state, config, "llama", kind, **options)


def calibrated(recipe: dict[str, Any], out: str, **changes: object) -> tuple[dict[str, Tensor], ff.Report]:
    folder = Path(recipe["out"]).parent / out
    report = ff.calibrate({**recipe, **changes}, out=folder)
    return load_file(folder / WEIGHTS), report


def test_a_gguf_expert_is_the_expert_dequantised_beforehand(recipe: dict, tmp_path: Path) -> None:
    path = as_gguf(tmp_path, kind=(kind := "Q4_0"))
    state = load_file(tmp_path / "task0" / WEIGHTS)
    plain = {name: value if value.ndim == 1 else rounded(value, kind) for name, value in state.items()}
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_bytes((tmp_path / "task0" / "config.json").read_bytes())
    save_file(plain, tmp_path / "before" / WEIGHTS, {"format": "pt"})
    found, report = calibrated(recipe, "found", **expert_at(recipe, "task0", path))
    expected, _ = calibrated(recipe, "expected", **expert_at(recipe, "task0", tmp_path / "before"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    about = report.inputs.models["expert task0"]
    assert (about.form, list(about.files)) == ("gguf", ["task0.gguf"])


def test_a_merge_reads_gguf_experts_and_memory_keeps_them(recipe: dict, tmp_path: Path) -> None:
    job = {key: value for key, value in recipe.items() if key != "merged_model"}
    job |= {"merge": {"method": "task_arithmetic", "scaling": 0.5}}
    path = as_gguf(tmp_path)
    merged = [
        ff.merge({**job, **change}, out=tmp_path / f"{len(change)}") for change in ({}, expert_at(job, "task0", path))
    ]
    assert_same(*(load_file(folder / WEIGHTS) for folder in merged))
    expected, _ = calibrated(job, "expected")
    assert_same(calibrated(job, "kept", **expert_at(job, "task0", path), expert_storage="host")[0], expected)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_a_file_and_a_split_set_are_experts(recipe: dict, tmp_path: Path) -> None:
    """All of a set counts, and changes of any file are seen."""
    path, base = as_gguf(tmp_path), Checkpoint(tmp_path / "base", "base")
    expected = find_expert(str(path), tmp_path, "x", base)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "m.gguf").write_bytes(path.read_bytes())
    (tmp_path / "one" / "README.md").write_text("a card")
    state, config = load_file(tmp_path / "task0" / WEIGHTS), base.config
    (tmp_path / "set").mkdir()
    for number, part in enumerate((list(state)[:5], list(state)[5:]), start=1):
        some = {name: state[name] for name in part}
        write(tmp_path / "set" / f"m-{number:05}-of-00002.gguf", some, config, "llama")
    for reference in ("one", "one/m.gguf", "set", "set/m-00001-of-00002.gguf"):
        found = find_expert(reference, tmp_path, "x", base)
        assert_same(found.read(found.tensors), expected.read(expected.tensors))
    _, report = calibrated(recipe, "o", **expert_at(recipe, "task0", tmp_path / "set"))
    assert len(report.inputs.models["expert task0"].files) == 2
    (tmp_path / "set" / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ff.FeatCalError, match=r"m-00002-of-00002.gguf is missing, one of 2 files"):
        find_expert("set", tmp_path, "x", base)
    (tmp_path / "one" / "other.gguf").write_bytes(b"")
    with pytest.raises(ff.FeatCalError, match=r"one holds 2 GGUF files of several models .* name one of the files"):
        find_expert("one", tmp_path, "x", base)


# Vocabularies


def texts(recipe: dict[str, Any], root: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """The recipe with texts, and a tokenizer of the merged model."""
    save_tokenizer(root / "merged", words)
    (root / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "d e f g", "b a"))
    )
    experts = {task: {**expert, "data": str(root / "texts.jsonl")} for task, expert in recipe["experts"].items()}
    return {**recipe, "experts": experts, "samples": 3, "max_length": 8}


def reordered(root: Path, order: list[int]) -> dict[str, Tensor]:
    """An expert whose tokens have other ids."""
    state = load_file(root / "task0" / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][order].contiguous()
    return state


def test_tokens_are_known_by_their_text(recipe: dict, tmp_path: Path) -> None:
    """An expert whose ids are others is given its own: the result is the same."""
    words = (*WORDS, *(f"w{row}" for row in range(100 - len(WORDS))))
    recipe = texts(recipe, tmp_path, words)
    expected, _ = calibrated(recipe, "expected")
    job = {**recipe, **expert_at(recipe, "task0", as_gguf(tmp_path, tokens=words))}
    assert RecipeModels(ff.Recipe.load(job)).tokens["task0"].table is None
    order = list(range(99, -1, -1))
    config = Checkpoint(tmp_path / "task0", "x").config
    path = write(tmp_path / "other.gguf", reordered(tmp_path, order), config, tokens=[words[row] for row in order])
    assert_same(calibrated(recipe, "b", **expert_at(recipe, "task0", path))[0], expected)


def test_tokens_that_an_expert_lacks_are_not_taken_for_others(recipe: dict, tmp_path: Path) -> None:
    words = (*WORDS, *(f"w{row}" for row in range(100 - len(WORDS))))
    recipe = texts(recipe, tmp_path, words)
    own = [f"{word}!" if word == "d" else word for word in words]
    _, report = calibrated(recipe, "o", **expert_at(recipe, "task0", as_gguf(tmp_path, tokens=own)))
    (reason,) = report.inputs.data["task0"].left_out
    assert "with a token that expert task0 does not have, such as 'd'" in reason
    with pytest.raises(ff.FeatCalError, match=r"expert task0: .*task0.gguf does not tell which tokens its rows are"):
        calibrated(recipe, "p", **expert_at(recipe, "task0", as_gguf(tmp_path)))


# What is refused


@pytest.mark.parametrize("role", ["base_model", "merged_model"])
def test_only_experts_may_be_gguf_files(role: str, recipe: dict, tmp_path: Path) -> None:
    path = as_gguf(tmp_path)
    with pytest.raises(ff.FeatCalError, match=rf"{role.replace('_', ' ')}: .*task0.gguf is a GGUF file, .*convert it"):
        ff.plan({**recipe, role: str(path)})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ff.FeatCalError, match=r"task0, base model: .*task0.gguf is a GGUF file"):
        ff.plan({**recipe, **expert_at(recipe, "task0", Path(f"{path}+{tmp_path}/lora"))})
    path.unlink()
    with pytest.raises(ff.FeatCalError, match=r"task0: .*task0.gguf: there is no such file; expected a GGUF file"):
        ff.plan({**recipe, **expert_at(recipe, "task0", path)})


def test_what_is_said_makes_a_base_of_a_folder_with_one_and_of_the_same_bits(recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    path = as_gguf(tmp_path, kind="Q8_0").rename(tmp_path / "only" / "base.gguf")
    with pytest.raises(ff.FeatCalError, match=rf"{re.escape(str(path))} is a GGUF file, ") as error:
        ff.plan({**recipe, "base_model": str(tmp_path / "only")})
    said = re.search(r"AutoModelForCausalLM\.from_pretrained\(.*\)\.save_pretrained\(a new folder\)", str(error.value))
    assert said is not None
    code = said[0].replace("a new folder", repr(str(tmp_path / "new")))
    exec(code, {name: getattr(transformers, name, None) for name in ("AutoModelForCausalLM", "GgufConfig")})
    base = find_checkpoint("new", tmp_path, "base")
    assert {value.dtype for value in base.read(base.tensors).values()} == {torch.bfloat16}
    assert_same(base.read(base.tensors), find_expert(str(path), tmp_path, "expert", base).read(base.tensors))
    assert ff.plan({**recipe, "base_model": str(tmp_path / "new")}, device="cpu").fits


def test_the_package_is_asked_for_where_it_is_missing(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_gguf(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ff.FeatCalError, match=r"task0.gguf: .* pip install featcal-fast\[gguf\]"):
        ff.plan({**recipe, **expert_at(recipe, "task0", path)})


def _other(**values: Any) -> Callable[[Path], Path]:
    return lambda root: as_gguf(root, **values)


def _with(change: Callable[[dict[str, Tensor]], Any], architecture: str = "llama") -> Callable[[Path], Path]:
    def made(root: Path) -> Path:
        state, config = load_file(root / "task0" / WEIGHTS), Checkpoint(root / "task0", "x").config
        change(state)
        return write(root / "other.gguf", state, config, architecture)

    return made


def _unknown(root: Path) -> Path:
    (root / "mmproj.gguf").write_bytes(head(entry("general.architecture", 8, text("clip")), entries=1))
    return root / "mmproj.gguf"


Q = "model.layers.0.self_attn.q_proj.weight"
FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "architecture": (_with(lambda state: None, "qwen2"), "is of the architecture qwen2, but the base model .* 'llama'"),
    "unknown architecture": (_unknown, "architecture 'clip', expected one of llama, granite"),
    "heads": (_other(attention__head_count=8), r"llama.attention.head_count: found 8, expected the 4 of the base"),
    "epsilon": (_other(attention__layer_norm_rms_epsilon=1e-3), "layer_norm_rms_epsilon: found 0.001"),
    "rope": (_other(rope__freq_base=5e5), "llama.rope.freq_base: found 500000.0, expected the 10000"),
    "linear rope": (
        _other(rope__scaling__type="linear", rope__scaling__factor=4.0),
        "llama.rope.scaling.type: found 'linear', expected the 'default' of the base",
    ),
    "llama3 rope": (_other(others={"rope_freqs.weight": torch.ones(8)}), "scaling.type: found 'llama3', expected the "),
    "layers": (_other(block_count=5), "llama.block_count: found 5, expected the "),
    "shape": (
        _with(lambda state: state.update({Q: torch.ones(32, 64)})),
        r"blk.0.attn_q.weight has the shape \(32, 64\)",
    ),
    "missing": (_with(lambda state: state.pop(Q)), "has no tensor blk.0.attn_q.weight, which is .*q_proj.weight of"),
    "superfluous": (
        _with(lambda state: state.update({f"{Q[:-6]}bias": torch.ones(64)})),
        "has a tensor blk.0.attn_q.bias, which is none of the base model",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_model_of_the_bases_kind_is_told_so(case: str, recipe: dict, tmp_path: Path) -> None:
    made, message = FOREIGN[case]
    with pytest.raises(ff.FeatCalError, match=rf"expert task0: .*gguf.*{message}"):
        ff.plan({**recipe, **expert_at(recipe, "task0", made(tmp_path))})


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_llama3s_rotary_angles_are_known_by_their_factors(tmp_path: Path) -> None:
    """As the converter writes them, and no word of them beside: 8 where waves are long, 1 where they are short."""
    model = pico.llama(1, rope_parameters=LLAMA3)
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base", "base")
    state, factors = load_file(tmp_path / "base" / WEIGHTS), torch.full((8,), 8.0)
    factors[0] = 1

    def opened(*others: Tensor) -> object:
        named = dict.fromkeys(["rope_freqs.weight"][: len(others)], *others)
        path = write(tmp_path / "expert.gguf", state, base.config, others=named)
        return find_expert(str(path), tmp_path, "expert", base)

    assert opened(factors)
    with pytest.raises(ff.FeatCalError, match=r"scaling.type: found 'default', expected the 'llama3' of the base"):
        opened()
    with pytest.raises(ff.FeatCalError, match=r"rope_freqs.weight: found \[2.0, 16.0, .* expected the \[1.0, 7.99"):
        opened(2 * factors)
    with pytest.raises(ff.FeatCalError, match=r"rope_freqs.weight: found \(7,\), expected the \(8,\) of the base"):
        opened(factors[1:])
    base = Checkpoint(tmp_path / "base", "base")
    base.config.rope_parameters["factor"] = "8"
    with pytest.raises(ff.FeatCalError, match=r"base/config.json describes no rotary angles: TypeError"):
        opened(factors)


def test_values_that_are_not_finite_are_told_of(recipe: dict, tmp_path: Path) -> None:
    path = _with(lambda state: state.update({Q: torch.full((64, 64), torch.inf)}))(tmp_path)
    expert = find_expert(str(path), tmp_path, "expert", Checkpoint(tmp_path / "base", "base"))
    with pytest.raises(ff.FeatCalError, match=r"expert: .*gguf: tensor blk.0.attn_q.weight .* is not finite"):
        expert.read([Q])


# Headers


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(
    *parts: bytes, tensors: int | None = None, entries: int = 0, version: int = 3, data: bytes = b"\0" * 64
) -> bytes:
    count = len(parts) - entries if tensors is None else tensors
    begin = b"GGUF" + struct.pack("<IQQ", version, count, entries) + b"".join(parts)
    return begin + b"\0" * (-len(begin) % 32) + data


def numbers(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it begins with b'', expected b'GGUF'"),
    "a pointer": (b"version https://git-lfs", "begins with"),
    "cut off": (b"GGUF\3", "ends within its header"),
    "version": (head(version=1), "found version 1, expected 2 or 3"),
    "other bytes": (head(version=3 << 24), "the other order of bytes"),
    "tensors": (head(tensors=2**63), "it counts 9223372036854775808 tensors"),
    "entries": (head(entries=2**64 - 1, tensors=0), "0 tensors and 18446744073709551615 entries"),
    "endless key": (head(struct.pack("<Q", 2**63), entries=1), "ends within its header"),
    "endless text": (head(entry("a", 8, struct.pack("<Q", 2**62)), entries=1), "ends within its header"),
    "endless list": (head(entry("a", 9, numbers(4, 2**62, b"")), entries=1), "ends within its header"),
    "endless texts": (head(entry("a", 9, numbers(8, 2**62, b"")), entries=1), "counts 4611686018427387904 texts"),
    "list in a list": (head(entry("a", 9, numbers(9, 2, b"")), entries=1), "a list of the type 9, which is none"),
    "type": (head(entry("a", 99, b"1234"), entries=1), "of the type 99, which is none"),
    "twice": (head(entry("a", 4, b"1234"), entry("a", 4, b"1234"), entries=2), "its key 'a' is there twice"),
    "alignment of zero": (head(entry("general.alignment", 4, b"\0" * 4), entries=1), "general.alignment is 0"),
    "alignment": (head(entry("general.alignment", 4, b"\3\0\0\0"), entries=1), "general.alignment is 3"),
    "huge alignment": (head(entry("general.alignment", 10, struct.pack("<Q", 2**62)), entries=1), "a power of two"),
    "text alignment": (head(entry("general.alignment", 8, text("32")), entries=1), "general.alignment is '32'"),
    "name": (head(tensor("a\x1b[2J")), "a tensor is called"),
    "no name": (head(tensor("")), "a tensor is called ''"),
    "long name": (head(tensor("a" * 501)), "a tensor is called"),
    "bytes for a name": (head(tensor(b"\xff\xfe")), "a tensor is called"),
    "dimensions": (head(tensor("a", (1,) * 5)), "tensor a has 5 dimensions"),
    "endless dimensions": (head(text("a") + struct.pack("<I", 2**32 - 1)), "tensor a has 4294967295 dimensions"),
    "huge shape": (head(tensor("a", (2**62, 4))), "tensor a has the shape"),
    "empty shape": (head(tensor("a", (0, 4))), "tensor a has the shape"),
    "kind": (head(tensor("a", kind=77)), "tensor a is of the type 77, which cannot be dequantised"),
    "integers": (head(tensor("a", kind=26)), "tensor a is of the type I32, which cannot be dequantised"),
    "no block": (head(tensor("a", (33,), 8)), "tensor a has rows of 33, expected whole blocks of 32"),
    "behind the file": (head(tensor("a", (17,))), "tensor a, F32 of shape \\(17,\\), lies at"),
    "far behind": (head(tensor("a", offset=2**63)), "tensor a, F32 of shape"),
    "overlapping": (head(tensor("a"), tensor("b", offset=8)), "tensor b, F32 of shape .* with another one up to"),
    "doubled": (head(tensor("a"), tensor("a", offset=32)), "tensor a, F32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused_at_once(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ff.FeatCalError, match=rf"x: {tmp_path}/x.gguf.*{message}"):
        read_header([tmp_path / "x.gguf"], "x")


def test_a_header_is_read_as_the_package_reads_it(recipe: dict, tmp_path: Path) -> None:
    path = as_gguf(tmp_path, kind="Q4_0", tokens=[f"t{row}\n" for row in range(100)])
    found, reader = read_header([path], "x"), gguf.GGUFReader(path)
    assert found.places.keys() == {each.name for each in reader.tensors}
    for each in reader.tensors:
        place = found.places[each.name]
        assert (place.shape, place.start) == (tuple(each.shape.tolist()[::-1]), each.data_offset)
        assert (place.kind, place.nbytes) == (each.tensor_type.name, each.n_bytes)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found.values == fields


def test_a_long_header_is_read_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(head(entry("a", 9, numbers(0, 5000, bytes(5000))), tensor("w"), entries=1))
    monkeypatch.setattr("featcal_fast.checkpoints.gguf_file.USUAL_HEADER", 100)
    assert list(read_header([tmp_path / "x.gguf"], "x").places) == ["w"]
    monkeypatch.setattr("featcal_fast.checkpoints.gguf_file.MAX_HEADER", 200)
    with pytest.raises(ff.FeatCalError, match="it has a header above 200 bytes"):
        read_header([tmp_path / "x.gguf"], "x")


def test_a_gguf_file_is_no_full_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ff.FeatCalError, match="only experts may be GGUF files"):
        find_checkpoint("x.gguf", tmp_path, "x")
