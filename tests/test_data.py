"""Calibration data: what is read from where, what the batches hold, and which mistakes are named how."""

import json
import sys
from pathlib import Path

import pytest
import torch
from data_files import BOS, EOS, PAD, TEMPLATE, WORDS, A, assert_same, ids, rows, save_image, save_tokenizer
from safetensors.torch import save_file

from featcal_fast.data.batches import load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.errors import DataError

# ---- text


def test_texts_are_tokenized_sorted_by_length_and_padded_on_the_right(write, plain):
    path = write({"text": "a b c"}, "", {"text": "d"}, "   ", {"text": "e f"})
    first, second = load_batches(path, folders=[plain], batch_size=2)
    assert list(first) == ["input_ids", "attention_mask"]
    assert first["input_ids"].tolist() == [[BOS, *ids("d"), EOS, PAD], [BOS, *ids("e f"), EOS]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert second["input_ids"].tolist() == [[BOS, *ids("a b c"), EOS]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1, 1]]
    assert {tensor.dtype for batch in (first, second) for tensor in batch.values()} == {torch.int64}


def test_prompt_and_completion_are_one_text(write, bare):
    path = write({"completion": " c d", "prompt": "a b"})
    assert rows(load_batches(path, folders=[bare])) == [ids("a b c d")]


def test_for_an_encoder_decoder_the_completion_is_the_labels(write, plain):
    path = write({"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "e f"})
    (batch,) = load_batches(path, folders=[plain], targets=True)
    assert batch["input_ids"].tolist() == [ids("<s> a </s> <pad> <pad>"), ids("<s> a b c </s>")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [ids("<s> e f </s>"), [*ids("<s> d </s>"), -100]]
    with pytest.raises(DataError, match="line 1: found text; expected prompt and completion"):
        load_batches(write({"text": "a"}), folders=[plain], targets=True)


def test_messages_go_through_the_template_with_one_bos(write, chat):
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    batches = load_batches(write({"messages": messages}), folders=[chat])
    assert rows(batches) == [[BOS, *ids("user a b assistant c")]]


def test_texts_are_truncated_at_their_end_whatever_the_tokenizer_says(write, tmp_path):
    folder = save_tokenizer(tmp_path / "left", template=TEMPLATE, truncation_side="left", padding_side="left")
    path = write({"text": "a b c d e"}, {"text": "f"})
    (batch,) = load_batches(path, folders=[folder], max_length=4)
    assert batch["input_ids"].tolist() == [[BOS, *ids("f"), EOS, PAD], [BOS, *ids("a b"), EOS]]
    path = write({"messages": [{"role": "user", "content": "a b c d e"}]})
    assert rows(load_batches(path, folders=[folder], max_length=4)) == [[BOS, *ids("user a b")]]


def test_without_a_usable_pad_token_padding_is_zero(write, bare, tmp_path):
    path = write({"text": "a"}, {"text": "b c"})
    (batch,) = load_batches(path, folders=[bare])
    assert batch["input_ids"].tolist() == [[A, 0], [A + 1, A + 2]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    added = save_tokenizer(tmp_path / "added", wrapped=False, pad_token="<new>")  # id 15, one too many
    (batch,) = load_batches(path, folders=[added])
    assert batch["input_ids"].tolist() == [[A, len(WORDS)], [A + 1, A + 2]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    (batch,) = load_batches(path, folders=[added], limits=Limits(vocab_size=len(WORDS)))
    assert batch["input_ids"].tolist() == [[A, 0], [A + 1, A + 2]]


def test_the_draw_is_seeded_and_without_replacement(write, bare):
    lines = [" ".join(WORDS[A + int(digit)] for digit in f"{i:02}") for i in range(40)]
    path = write(*({"text": line} for line in lines))
    batches = load_batches(path, folders=[bare], samples=8, batch_size=3, seed=1)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:8].tolist()
    assert rows(batches) == [ids(lines[i]) for i in drawn]
    assert_same(batches, load_batches(path, folders=[bare], samples=8, batch_size=3, seed=1))
    other = rows(load_batches(path, folders=[bare], samples=8, batch_size=3, seed=2))
    assert sorted(other) != sorted(rows(batches))
    assert sorted(rows(load_batches(path, folders=[bare], samples=100))) == sorted(map(ids, lines))


def test_the_first_folder_that_has_a_tokenizer_wins(write, tmp_path, plain):
    (tmp_path / "empty").mkdir()
    backwards = save_tokenizer(tmp_path / "backwards", words=WORDS[:A] + WORDS[:A:-1] + ("a",))
    path = write({"text": "a"})
    assert rows(load_batches(path, folders=[tmp_path / "empty", plain, backwards])) == [[BOS, A, EOS]]
    assert rows(load_batches(path, folders=[backwards, plain])) == [[BOS, len(WORDS) - 1, EOS]]


def test_messages_pass_over_a_tokenizer_without_template(write, plain, chat):
    path = write({"messages": [{"role": "user", "content": "a"}]})
    assert rows(load_batches(path, folders=[plain, chat])) == [[BOS, *ids("user a")]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}, '{"text": "b"'], r"data\.jsonl, line 2: found invalid JSON"),
        ([{"text": "a"}, "", '"b"'], r"data\.jsonl, line 3: found a JSON str; expected an object"),
        ([{"txt": "a", "id": 1}], r"line 1: found the keys txt, id; expected those of one kind: text; prompt, c"),
        ([{"prompt": "a"}], r"line 1: found the keys prompt; expected"),
        ([{}], r"line 1: found the keys nothing; expected"),
        ([{"text": 5}], r"line 1, text: found int; expected a string"),
        ([{"prompt": "a", "completion": None}], r"line 1, completion: found NoneType; expected a string"),
        ([{"text": "a"}, {"text": ""}], r"line 2 .*zero tokens"),
        ([{"text": "\ud800"}], r"line 1 .*cannot be tokenized"),
        ([{"messages": "a"}], r"line 1, messages: found 'a'; expected a list"),
        ([{"messages": []}], r"line 1, messages: found \[\]; expected a list"),
        ([{"messages": [1]}], r"line 1, messages\[0\]: found 1; expected an object with role and content"),
        ([{"messages": [{"role": "user"}]}], r"line 1, messages\[0\].content: found nothing; expected a text"),
        ([""], r"data\.jsonl: found zero samples"),
    ],
)
def test_malformed_lines_are_named(write, chat, lines, message):
    with pytest.raises(DataError, match=message):
        load_batches(write(*lines), folders=[chat])


def test_bytes_that_are_not_text_are_named(tmp_path, plain):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: found invalid JSON"):
        load_batches(path, folders=[plain])


def test_mixed_kinds_name_both_lines(write, chat):
    path = write({"text": "a"}, {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match=r"line \d: found (text|messages), expected (text|messages) as in .*line \d"):
        load_batches(path, folders=[chat])


def test_a_template_that_refuses_is_named(write, tmp_path):
    folder = save_tokenizer(tmp_path / "strict", template="{{ raise_exception('no such role') }}")
    path = write({"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match=r"line 1: the chat template of .*strict rejects .*no such role"):
        load_batches(path, folders=[folder])


def test_missing_tokenizer_and_template_name_the_folders(write, tmp_path, plain):
    empty = tmp_path / "empty"
    with pytest.raises(DataError, match=f"data.jsonl: found no tokenizer in {empty}, {tmp_path}"):
        load_batches(write({"text": "a"}), folders=[empty, tmp_path])
    with pytest.raises(DataError, match=f"no tokenizer with a chat template in {empty}, {plain}"):
        load_batches(write({"messages": [{"role": "user", "content": "a"}]}), folders=[empty, plain])


def test_a_broken_tokenizer_is_named_not_passed_over(write, tmp_path, plain):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"broken: AutoTokenizer cannot load it"):
        load_batches(write({"text": "a"}), folders=[broken, plain])


def test_lengths_that_do_not_fit_are_named(write, plain):
    path = write({"text": "a b"})
    with pytest.raises(DataError, match=r"data\.jsonl: found max_length 9.* lower max_length to 8"):
        load_batches(path, folders=[plain], max_length=9, limits=Limits(8))
    assert rows(load_batches(path, folders=[plain], max_length=8, limits=Limits(8))) == [[BOS, *ids("a b"), EOS]]
    with pytest.raises(DataError, match=r"line 1: found max_length 2, expected more than the 2 special tokens"):
        load_batches(path, folders=[plain], max_length=2)


def test_a_token_outside_the_vocabulary_is_named(write, plain):
    path = write({"text": "a"}, {"text": "b j"})
    message = (
        rf"line 2 \(tokenizer of {plain}\), input_ids: found token id 14, expected 0 to 13 \(vocabulary of the model\)"
    )
    with pytest.raises(DataError, match=message):
        load_batches(path, folders=[plain], limits=Limits(vocab_size=14))
    assert len(load_batches(path, folders=[plain], limits=Limits(vocab_size=15))) == 1


# ---- ready inputs


def save_tensors(folder, **tensors):
    path = folder / "ready.safetensors"
    save_file({name: torch.as_tensor(tensor) for name, tensor in tensors.items()}, path)
    return path


def test_ready_inputs_keep_their_rows_together_in_drawn_order(tmp_path):
    pixels = torch.arange(10 * 3 * 2 * 2).reshape(10, 3, 2, 2).to(torch.bfloat16)
    tokens = torch.arange(10, 40, dtype=torch.int32).reshape(10, 3)
    mask = torch.tensor([[True, True, i % 2 == 0] for i in range(10)])
    path = save_tensors(
        tmp_path, pixel_values=pixels, input_ids=tokens, attention_mask=mask, labels=tokens[:, 0].clone()
    )
    batches = load_batches(path, folders=[], samples=5, batch_size=3, seed=4, max_length=1, limits=Limits(3))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(4))[:5]
    assert [len(batch["input_ids"]) for batch in batches] == [3, 2]
    for name, tensor in (("input_ids", tokens), ("attention_mask", mask), ("labels", tokens[:, 0])):
        merged = torch.cat([batch[name] for batch in batches])
        assert merged.dtype == torch.int64
        assert merged.tolist() == tensor[drawn].long().tolist()
    merged = torch.cat([batch["pixel_values"] for batch in batches])
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, pixels[drawn])
    assert_same(batches, load_batches(path, folders=[], samples=5, batch_size=3, seed=4))
    assert rows(batches) != rows(load_batches(path, folders=[], samples=5, batch_size=3, seed=5))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": [[1], [2]], "a": [[1.0]]}, r"ready.*, a: found 1 in .*, expected 2 samples as in input_ids"),
        ({"input_ids": [[1, 2, 3, 4]]}, r"ready.*, sample 0, input_ids: found 4 tokens, expected at most 3"),
        (
            {"input_ids": [[1], [5]]},
            r"sample 1, input_ids: found token id 5, expected 0 to 4 \(vocabulary of the model\)",
        ),
        ({"input_ids": [[1, -1]]}, r"sample 0, input_ids: found token id -1, expected 0 to 4"),
        ({"decoder_input_ids": [[7]]}, r"sample 0, decoder_input_ids: found token id 7"),
        ({"input_ids": [1, 2]}, r"input_ids: found torch.int64 of shape \[\], expected one or more integers"),
        ({"input_ids": [[1.0]]}, r"input_ids: found torch.float32 of shape \[1\]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids: found torch.int64 of shape \[0\]"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}, r"sample 1, attention_mask: found only zeros"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, r"attention_mask: found other values than 0 and 1"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, r"attention_mask: found shape \[2\], expected \[1\]"),
        ({"pixel_values": [[1.0], [float("nan")]]}, r"sample 1, pixel_values: found values that are not finite"),
        ({"pixel_values": [[float("inf")]]}, r"sample 0, pixel_values: found values that are not finite"),
        ({"pixel_values": torch.zeros(0, 3, 2, 2)}, r"ready.safetensors: found zero samples"),
        ({"scale": 1.0}, r"ready.safetensors: found zero samples"),
        ({}, r"ready.safetensors: found zero samples"),
    ],
)
def test_unusable_ready_inputs_are_named(tmp_path, tensors, message):
    with pytest.raises(DataError, match=message):
        load_batches(save_tensors(tmp_path, **tensors), folders=[], limits=Limits(3, 5))


def test_a_broken_safetensors_file_is_named(tmp_path):
    path = save_tensors(tmp_path, input_ids=[[1, 2]])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"ready\.safetensors: cannot be read as safetensors"):
        load_batches(path, folders=[])


def test_negative_ids_are_refused_without_a_vocabulary_size(tmp_path):
    with pytest.raises(DataError, match=r"found token id -1, expected 0 or more"):
        load_batches(save_tensors(tmp_path, input_ids=[[-1]]), folders=[])


# ---- images


def test_images_are_found_in_subfolders_and_processed(tmp_path, vision):
    folder = tmp_path / "pictures"
    colors = {"b/1.PNG": (255, 0, 128), "a/2.bmp": (0, 255, 0), "c.webp": (255, 255, 255)}
    for name, color in colors.items():
        save_image(folder / name, color)
    save_image(folder / ".cache" / "old.png", (7, 7, 7))
    (folder / "labels.txt").write_text("not an image")
    (batch,) = load_batches(folder, folders=[tmp_path, vision])
    assert list(batch) == ["pixel_values"]
    pixels = batch["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((3, 3, 4, 4), torch.float32)
    drawn = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    expected = torch.tensor([colors[sorted(colors)[i]] for i in drawn]) / 127.5 - 1
    torch.testing.assert_close(pixels, expected[:, :, None, None].expand(3, 3, 4, 4), atol=0.02, rtol=0)


def test_an_image_processor_inside_a_processor_config_is_found(tmp_path, vision):
    save_image(tmp_path / "pictures" / "a.png", (255, 255, 255))
    config = json.loads((vision / "preprocessor_config.json").read_text())
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    (batch,) = load_batches(tmp_path / "pictures", folders=[tmp_path / "text", tmp_path / "both"])
    torch.testing.assert_close(batch["pixel_values"], torch.ones(1, 3, 4, 4))


def test_image_batches_are_deterministic(tmp_path, vision):
    for i in range(12):
        save_image(tmp_path / "pictures" / f"{i:02}.png", (i * 20, 0, 0))
    first, again, other = (
        load_batches(tmp_path / "pictures", folders=[vision], samples=4, batch_size=3, seed=seed) for seed in (0, 0, 1)
    )
    assert [len(batch["pixel_values"]) for batch in first] == [3, 1]
    assert_same(first, again)
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])


def test_unreadable_images_are_named(tmp_path, vision):
    folder = tmp_path / "pictures"
    save_image(folder / "fine.png", (1, 2, 3))
    (folder / "broken.jpg").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"broken\.jpg: cannot be read as an image"):
        load_batches(folder, folders=[vision])


def test_images_of_different_size_after_processing_are_named(tmp_path, vision):
    config = json.loads((vision / "preprocessor_config.json").read_text())
    (vision / "preprocessor_config.json").write_text(json.dumps({**config, "do_center_crop": False}))
    save_image(tmp_path / "pictures" / "wide.png", (0, 0, 0), size=(16, 8))
    save_image(tmp_path / "pictures" / "square.png", (0, 0, 0), size=(8, 8))
    with pytest.raises(DataError, match=r"\.png, pixel_values: found shape .* as in .*\.png; give samples of one"):
        load_batches(tmp_path / "pictures", folders=[vision])
    assert len(load_batches(tmp_path / "pictures", folders=[vision], batch_size=1)) == 2


def test_a_missing_image_processor_names_the_folders(tmp_path):
    save_image(tmp_path / "pictures" / "a.png", (0, 0, 0))
    with pytest.raises(DataError, match=f"found no image processor in {tmp_path}, elsewhere; copy"):
        load_batches(tmp_path / "pictures", folders=[tmp_path, Path("elsewhere")])


def test_missing_pillow_says_what_to_install(tmp_path, vision, monkeypatch):
    save_image(tmp_path / "pictures" / "a.png", (0, 0, 0))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pictures: cannot be read without pillow; pip install pillow"):
        load_batches(tmp_path / "pictures", folders=[vision])


# ---- sources that are nothing


@pytest.mark.parametrize("name", ["absent.jsonl", "org/absent.jsonl", "absent", "/no/such/folder", "a b/c"])
def test_missing_sources_are_named(name):
    with pytest.raises(DataError, match=rf"^{name}: no such file or folder \(looked for .*{name}\); expected a .jsonl"):
        load_batches(name, folders=[])


@pytest.mark.parametrize("name", ["data.doc", "data.pt", "data", "data.gz"])
def test_unknown_file_types_list_the_supported_ones(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(DataError, match=rf"{name}: found the unknown file type .*\.jsonl .*\.safetensors .*images"):
        load_batches(tmp_path / name, folders=[])


def test_empty_sources_are_named(tmp_path):
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(DataError, match=r"data\.jsonl: found zero samples"):
        load_batches(tmp_path / "data.jsonl", folders=[])
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: found no images, parquet or arrow files, nor texts; expected a"):
        load_batches(tmp_path / "folder", folders=[])


def test_batches_of_texts_have_as_many_tokens_as_a_chunk_takes(write, bare):
    lengths = [9, 1, 4, 2, 2, 1, 3, 12]
    path = write(*({"text": " ".join("a" * length)} for length in lengths))
    batches = load_batches(path, folders=[bare], batch_tokens=8)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 2), (2, 4), (1, 9), (1, 12)]


def test_a_file_that_cannot_be_read_is_named(write, bare, monkeypatch):
    path = write({"text": "a"})

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("featcal_fast.files.open_to_read", denied)
    with pytest.raises(DataError, match=r"data.jsonl: cannot be read: Permission denied"):
        load_batches(path, folders=[bare])
