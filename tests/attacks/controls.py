"""Inputs that look odd and are good: whoever refuses these, refuses people's work."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable

import torch

from attacks.core import Damage
from attacks.good import WEIGHTS, Job

Odd = tuple[str, Damage]  # the kind of job, and what is odd about it
CONTROLS: dict[str, Odd] = {}


def control(kind: str = "llama") -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        CONTROLS[damage.__name__.replace("_", "-")] = kind, damage
        return damage

    return register


MODELS = ("base", "merged", "math", "code")


@control()
def names_in_many_scripts(job: Job) -> None:
    job.path("math").rename(job.path("数学 モデル"))
    job.path("data/math.safetensors").rename(job.path("data/Ünïcödé дані.safetensors"))
    job.recipe(
        experts={
            "数学": {"model": "数学 モデル", "data": "data/Ünïcödé дані.safetensors"},
            "код 🙂": {"model": "code", "data": "data/code.safetensors"},
        }
    )


@control()
def spaces_and_quotes_in_names(job: Job) -> None:
    job.path("math").rename(job.path("my model's (v2) #1 & co; $HOME"))
    job.expert(model="my model's (v2) #1 & co; $HOME")
    job.recipe(out="an output, too")


@control()
def a_name_of_two_hundred_letters(job: Job) -> None:
    job.path("math").rename(job.path("m" * 200))
    job.expert(model="m" * 200)
    job.recipe(out="o" * 250)


@control()
def absolute_paths_and_dots(job: Job) -> None:
    job.expert(model=str(job.path("math")), data="../job/./data//math.safetensors")


@control()
def experts_named_by_numbers_and_words(job: Job) -> None:
    job.recipe("experts")
    job.line(
        "experts:\n  1: {model: math, data: data/math.safetensors}\n  'no': {model: code, data: data/code.safetensors}"
    )


@control()
def dates_and_words_that_are_texts(job: Job) -> None:
    job.path("math").rename(job.path("2024-13-45"))
    job.line("expert_storage: disk")
    job.expert(model="2024-13-45")
    job.edit("recipe.yaml", lambda data: data.replace(b"'2024-13-45'", b"2024-13-45").replace(b"out: out", b"out: on"))


@control()
def numbers_in_many_ways(job: Job) -> None:
    job.line("settings: {ridge_lambda: 1e-5, anchor_rho: 2, teacher_alpha: .3, covariance_eps: 1.0e-08}")


@control()
def anchors_used_honestly(job: Job) -> None:
    job.recipe("experts")
    job.line(
        "experts:\n  math: &shared {model: math, data: data/math.safetensors, samples: 3}\n"
        "  code: {<<: *shared, model: code, data: data/code.safetensors}"
    )


@control()
def comments_and_a_byte_order_mark(job: Job) -> None:
    job.edit("recipe.yaml", lambda data: b"\xef\xbb\xbf# a job\n" + data.replace(b"\n", b"\r\n") + b"# end")


@control()
def recipes_are_json_too(job: Job) -> None:
    import yaml

    job.write("recipe.yaml", json.dumps(yaml.safe_load(job.path("recipe.yaml").read_text()), indent=4))


@control()
def more_samples_than_there_are(job: Job) -> None:
    job.recipe(samples=10**6, batch_size=10**6, seed=2**63 - 1)


@control()
def a_billion_samples(job: Job) -> None:
    """In a file that takes no room: only those that are drawn are read."""
    header = json.dumps({"input_ids": {"dtype": "U8", "shape": [2**30, 1], "data_offsets": [0, 2**30]}}).encode()
    job.write("data/math.safetensors", len(header).to_bytes(8, "little") + header)
    job.sparse("data/math.safetensors", 8 + len(header) + 2**30)


@control("nf4")
def a_quantised_base(job: Job) -> None:
    job.recipe(base_model="math")


@control("scaled")
def a_quantised_merged_model(job: Job) -> None:
    job.recipe(merged_model="math")


@control()
def configs_that_tell_of_what_was_undone(job: Job) -> None:
    job.json("math/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    job.json("merged/config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    job.write("base/hf_quant_config.json", "{}")


@control("gguf")
def a_gguf_file_beside_others(job: Job) -> None:
    job.path("models").mkdir()
    job.path("math.gguf").rename(job.path("models/math.gguf"))
    job.write("models/other.gguf", b"no such file")
    job.expert(model="models/math.gguf")


@control()
def two_experts_of_one_folder(job: Job) -> None:
    job.expert(task="code", model="math", data="data/math.safetensors")


@control()
def an_output_beside_a_folder_of_its_name(job: Job) -> None:
    job.path("out").mkdir()


@control()
def an_output_with_new_parents(job: Job) -> None:
    job.recipe(out="new/deep/out")


@control()
def keys_that_nobody_knows(job: Job) -> None:
    for model in MODELS:
        job.json(f"{model}/config.json", mine={"a": [1, None, 2.5]}, **{"☃": "snow", "training_args": {"lr": 1e-5}})


@control()
def large_and_small_numbers(job: Job) -> None:
    job.json("merged/config.json", limit=10**30, tiny=1e-300, negative=-(10**30))


@control()
def configs_that_differ_where_it_does_not_matter(job: Job) -> None:
    for i, model in enumerate(MODELS):
        job.json(
            f"{model}/config.json",
            _name_or_path=f"org/{model}",
            transformers_version=f"4.{40 + i}.0",
            use_cache=bool(i % 2),
            bos_token_id=i,
            attention_dropout=0.1 * i,
            initializer_range=0.01 + 0.01 * i,
        )


@control()
def the_theta_of_old_in_all(job: Job) -> None:
    for model in MODELS:
        job.json(f"{model}/config.json", "rope_parameters", rope_theta=10000.0)


@control()
def the_theta_of_old_in_one(job: Job) -> None:
    job.json("math/config.json", "rope_parameters", rope_theta=10000.0)


@control()
def experts_in_half_precision(job: Job) -> None:
    from safetensors.torch import load_file, save_file

    for model, dtype in (("math", torch.float16), ("code", torch.bfloat16)):
        found = load_file(job.path(f"{model}/{WEIGHTS}"))
        save_file({name: value.to(dtype) for name, value in found.items()}, job.path(f"{model}/{WEIGHTS}"))
        job.json(f"{model}/config.json", dtype=str(dtype).removeprefix("torch."))


@control()
def files_beside_the_model(job: Job) -> None:
    job.write("merged/README.md", "# A model\n")
    job.write("merged/assets/plot.png", b"\x89PNG")
    job.write("merged/.cache/huggingface/x.lock", "")
    job.write("merged/pytorch_model.bin", b"cos\nsystem\n(S'touch run'\ntR.")
    job.write("merged/notes 📝.txt", "")
    job.write("merged/optimizer.json", "NaN, and no JSON at all")


@control()
def a_card_of_noise(job: Job) -> None:
    job.write("merged/README.md", b"---\nlicense: [\n---\n\xff\0\x1b[2J")


@control()
def metadata_in_headers(job: Job) -> None:
    job.header(f"math/{WEIGHTS}", lambda header: {"__metadata__": {"format": "pt", "note": "☃" * 1000}, **header})


@control()
def a_header_padded_with_spaces(job: Job) -> None:
    job.header(f"math/{WEIGHTS}", lambda header: json.dumps(header).encode() + b" " * 4096)


@control()
def a_link_within_a_folder(job: Job) -> None:
    job.write("merged/LICENSE", "free")
    job.link("merged/LICENSE.txt", "LICENSE")
    job.path(f"math/{WEIGHTS}").rename(job.path("math/weights.safetensors"))
    job.link(f"math/{WEIGHTS}", "weights.safetensors")


@control()
def a_folder_that_is_a_link(job: Job) -> None:
    (job.root / "models").mkdir()
    job.path("math").rename(job.root / "models" / "math")
    job.link("math", job.root / "models" / "math")


@control("hub")
def a_model_in_the_hubs_cache(job: Job) -> None:
    assert job.path("base/snapshots/abc/config.json").is_symlink()


@control("sharded")
def a_model_in_two_files(job: Job) -> None:
    job.json("merged/model.safetensors.index.json", metadata={"total_size": 10**12, "by": "hand"}, note=None)


@control("texts")
def lines_of_windows_and_blank_ones(job: Job) -> None:
    job.edit("data/math.jsonl", lambda data: b"\r\n\r\n" + data.replace(b"\n", b"\r\n") + b"  \r\n")


@control("texts")
def lines_with_other_keys(job: Job) -> None:
    lines = [{"id": 1, "text": "a b"}, {"text": "c", "meta": {"a": [None, "\x1b[31m"]}, "": 5, "k" * 5000: 1}]
    job.write("data/math.jsonl", "".join(json.dumps(each) + "\n" for each in lines))


@control("texts")
def a_folder_of_packed_files(job: Job) -> None:
    job.write("data/math/1.jsonl.gz", gzip.compress(job.path("data/math.jsonl").read_bytes()))
    job.write("data/math/2.jsonl", b"")
    job.write("data/math/README.md", "notes")
    job.write("data/code.json", json.dumps({"data": [{"instruction": "a", "input": None, "output": "b"}] * 3}))
    job.expert(data="data/math")
    job.expert(task="code", data="data/code.json")


@control("texts")
def a_table_of_a_spreadsheet(job: Job) -> None:
    job.write("data/math.csv", '\ufeff"text";"n"\r\n"a; ""b""\r\n c";1\r\nd;\r\n')
    values = json.loads(job.path("merged/tokenizer.json").read_text())
    values["model"]["unk_token"] = "a"
    job.write("merged/tokenizer.json", json.dumps(values))
    job.expert(data="data/math.csv")


@control("texts")
def a_last_line_without_an_end(job: Job) -> None:
    job.edit("data/math.jsonl", lambda data: data.rstrip())


@control("texts")
def long_texts_are_cut(job: Job) -> None:
    job.write("data/math.jsonl", json.dumps({"text": "a b c " * 20_000}) + "\n" + json.dumps({"text": "d"}))


@control("texts")
def a_tokenizer_without_limits(job: Job) -> None:
    job.json("merged/tokenizer_config.json", model_max_length=int(1e30), mine={"a": 1})


@control("texts")
def texts_in_many_scripts(job: Job) -> None:
    job.write(
        "data/math.jsonl", json.dumps({"text": "a ☃ b 数"}) + "\n" + json.dumps({"text": "c é 🙂"}, ensure_ascii=False)
    )
    values = json.loads(job.path("merged/tokenizer.json").read_text())
    values["model"]["unk_token"] = "a"
    job.write("merged/tokenizer.json", json.dumps(values))


@control("texts")
def a_template_with_loops_and_conditions(job: Job) -> None:
    job.write(
        "merged/chat_template.jinja",
        "{%- set n = namespace(i=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set n.i = n.i + 1 -%}"
        "{{ 'user ' + m.content | trim }}{%- else -%}{{ ' assistant ' + m['content'] }}{%- endif -%}{%- endfor -%}",
    )


@control("clip")
def images_of_many_kinds(job: Job) -> None:
    from PIL import Image

    folder = job.path("data/images/more/deep")
    folder.mkdir(parents=True)
    for mode, file in {
        "L": "gray.PNG",
        "RGBA": "alpha.png",
        "P": "palette.png",
        "1": "bits.png",
        "CMYK": "print.jpg",
    }.items():
        Image.new(mode, (30, 20)).save(folder / file)
    Image.new("RGB", (300, 2)).save(folder / "wide ☃.webp")
    Image.new("RGB", (17, 33)).save(folder / "odd.bmp")
    job.write("data/images/notes.txt", "not an image")
    job.write("data/images/.hidden.png", "not an image either")


@control("clip")
def a_large_photograph(job: Job) -> None:
    from PIL import Image

    Image.new("L", (6000, 4000)).save(job.path("data/images/photo.png"), compress_level=1)


@control("adapter")
def an_adapter_as_peft_writes_it(job: Job) -> None:
    job.json(
        "math/adapter_config.json",
        base_model_name_or_path="org/base",
        bias="none",
        inference_mode=True,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=False,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        layers_to_transform=None,
        loftq_config={},
        corda_config=None,
        revision=None,
        peft_version="0.99",
    )


@control("adapter")
def an_adapter_beside_its_bases_config(job: Job) -> None:
    shutil.copy(job.path("base/config.json"), job.path("math/config.json"))


@control("adapter")
def patterns_that_are_regular_expressions(job: Job) -> None:
    job.json(
        "math/adapter_config.json",
        target_modules=r".*\.layers\.\d+\.self_attn\.(q|v)_proj",
        rank_pattern={"q_proj|v_proj": 2},
    )


@control("nf4")
def an_expert_in_four_bits(job: Job) -> None:
    assert job.path("math").is_dir()


@control("int8")
def an_expert_in_eight_bits(job: Job) -> None:
    assert job.path("math").is_dir()
