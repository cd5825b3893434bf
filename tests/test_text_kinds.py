"""What a text sample is by its keys, of all that people use; what its messages may be; what is told of the rest."""

from __future__ import annotations

import json

import pytest
from data_files import BOS, TEMPLATE, WORDS, ids, rows, save_tokenizer

import featcal_fast as ff
from featcal_fast.data.asked import PROMPT, PROMPT_WITH_INPUT
from featcal_fast.data.batches import load_batches
from featcal_fast.data.kinds import FORMS, TEXT_KINDS
from featcal_fast.data.sources import read_samples
from featcal_fast.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TURNS = [USER, ASSISTANT]


def only(path):
    (sample,) = read_samples(path, 1, 0)
    return sample.values


def asked(instruction, output, more=""):
    return {"instruction": instruction, "input": more, "output": output}


LINES = [
    ({"text": "a"}, {"text": "a"}),
    ({"content": "a"}, {"text": "a"}),
    ({"chosen": "a", "rejected": "b"}, {"text": "a"}),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}),
    ({"messages": TURNS}, {"messages": TURNS}),
    ({"conversations": TURNS}, {"messages": TURNS}),
    ({"conversation": TURNS}, {"messages": TURNS}),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"messages": TURNS}),
    ({"chosen": TURNS, "rejected": TURNS}, {"messages": TURNS}),
    ({"prompt": [USER], "completion": [ASSISTANT]}, {"messages": TURNS}),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, {"messages": TURNS}),
    ({"prompt": "a", "chosen": TURNS, "rejected": TURNS}, {"messages": TURNS}),
    ({"prompt": "a", "chosen": [ASSISTANT], "rejected": []}, {"messages": TURNS}),
    ({"prompt": [USER], "completion": "b"}, {"messages": TURNS}),
    ({"instruction": "a", "input": "c", "output": "b"}, asked("a", "b", "c")),
    ({"instruction": "a", "input": "", "output": "b"}, asked("a", "b")),
    ({"instruction": "a", "input": None, "output": "b"}, asked("a", "b")),
    ({"instruction": "a", "output": "b"}, asked("a", "b")),
    ({"instruction": "a", "context": "c", "response": "b"}, asked("a", "b", "c")),
    ({"question": "a", "answer": "b"}, asked("a", "b")),
    ({"question": "a", "context": "c", "answer": "b"}, asked("a", "b", "c")),
    ({"question": "a", "response": "b"}, asked("a", "b")),
    ({"question": "a", "chosen": "b"}, asked("a", "b")),
    ({"instruction": "a", "input": "c", "chosen": "b", "rejected": "d"}, asked("a", "b", "c")),
    ({"query": "a", "chosen": "b"}, asked("a", "b")),
    ({"input": "a", "chosen": "b"}, asked("a", "b")),
    ({"query": "a", "response": "b"}, asked("a", "b")),
    ({"problem": "a", "solution": "b"}, asked("a", "b")),
    ({"prompt": "a", "response": "b"}, asked("a", "b")),
    ({"input": "a", "output": "b"}, asked("a", "b")),
]
IN_TABLES = {tuple(made): (line, made) for line, made in LINES}  # one of what becomes each form


@pytest.mark.parametrize(("line", "made"), LINES)
def test_every_kind_becomes_one_of_a_few_forms(line, made, write):
    assert only(write(line)) == made
    assert tuple(made) in FORMS


@pytest.mark.parametrize(("line", "made"), IN_TABLES.values(), ids=map(str, IN_TABLES))
def test_columns_are_of_the_same_kinds(line, made, tmp_path, datasets):
    datasets.Dataset.from_list([line]).to_parquet(tmp_path / "data.parquet")
    assert only(tmp_path / "data.parquet") == made


def test_all_kinds_are_tried_above():
    lines = [{*line} for line, _ in LINES]
    assert all(any({*kind} <= line for line in lines) for kind in TEXT_KINDS)


# ---- which kind counts, and what is told of other keys


def test_other_keys_are_ignored_and_told_once(write, bare):
    notes = []
    path = write(
        {"text": "a", "id": 1, "score": float("nan")},
        {"source": "x", "text": "b", "meta": {"c": [None]}},
        {"text": "c"},
    )
    assert sorted(rows(load_batches(path, folders=[bare], notes=notes))) == [ids("a"), ids("b"), ids("c")]
    (note,) = notes
    assert note.startswith(f"{path}: read as text (ignored: ")
    assert {*note.partition("ignored: ")[2].rstrip(")").split(", ")} == {"id", "score", "source", "meta"}
    load_batches(write({"text": "a"}), folders=[bare], notes=notes)
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("lines", "form"),
    [
        ([{"text": "a", "messages": TURNS}, {"text": "b", "prompt": "a", "completion": "b"}], ("text",)),
        ([{"messages": TURNS, "prompt": "a"}, {"text": "b", "messages": TURNS}], ("messages",)),
        ([{"text": None, "messages": TURNS}, {"text": None, "messages": TURNS}], ("messages",)),
        ([{"instruction": "a", "output": "b", "text": "c"}], ("text",)),
    ],
)
def test_the_first_kind_that_all_have_counts(lines, form, write):
    assert {tuple(each.values) for each in read_samples(write(*lines), 9, 0)} == {form}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}, {"txt": "b"}], r"line 2: found the keys txt; expected those of one kind: text; prompt, compl"),
        ([{"text": "a"}, {"messages": TURNS}], r"line \d: found (text|messages), expected .*give each kind its own"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]}],
            r"line \d: found .*as in",
        ),
        ([{"text": None}], r"line 1, text: found NoneType; expected a string"),
        ([{"text": ["a"]}], r"line 1, text: found list; expected a string"),
        ([{"prompt": 5, "completion": "a"}], r"line 1, prompt: found int; expected a string"),
        ([{"prompt": "a", "completion": None}], r"line 1, completion: found NoneType; expected a string"),
        ([{"prompt": "a", "completion": ["b"]}], r"line 1, completion: found \['b'\]; expected a text, or a list of"),
        ([{"txt": "a"}], r"line 1: found the keys txt; expected .*; rename them so$"),
        ([{"instruction": "a", "input": 5, "output": "b"}], r"line 1, input: found int; expected a string"),
        ([{"question": "a", "answer": True}], r"line 1, answer: found bool; expected a string"),
    ],
)
def test_what_is_of_no_kind_is_named(lines, message, write, chat):
    with pytest.raises(DataError, match=message):
        load_batches(write(*lines), folders=[chat])


def test_ignored_keys_are_a_warning_of_plan_and_report(write, tmp_path):
    import pico

    folder = tmp_path / "job"
    recipe = pico.save(pico.job("llama", 2), folder)
    save_tokenizer(folder / "merged")
    path = write({"text": "a b", "id": 1}, {"text": "c d", "id": 2})
    for expert in recipe["experts"].values():
        expert["data"] = str(path)
    expected = f"parts of the data are ignored: {path}: read as text (ignored: id)"
    assert [each for each in ff.plan(recipe, device="cpu").warnings if "ignored" in each] == [expected]
    assert [each for each in ff.calibrate(recipe, device="cpu").warnings if "ignored" in each] == [expected]


# ---- what is asked and answered


def test_what_is_asked_goes_through_the_chat_template(write, chat):
    path = write({"instruction": "a b", "input": "c", "output": "d"}, {"instruction": "e", "output": "f"})
    assert rows(load_batches(path, folders=[chat], batch_size=1)) == [
        [BOS, *ids("user e assistant f")],
        [BOS, *ids("user a b c assistant d")],
    ]


def test_what_is_asked_is_alpacas_prompt_without_a_template(write, tmp_path):
    text = PROMPT.format(instruction="a", output="b") + PROMPT_WITH_INPUT.format(instruction="a", input="c", output="b")
    words = [*WORDS, *dict.fromkeys(word for word in text.split() if word not in WORDS)]
    folder = save_tokenizer(tmp_path / "words", words=words, wrapped=False)
    path = write({"instruction": "a", "input": "c", "output": "b"}, {"instruction": "a", "input": "", "output": "b"})
    short, long = (
        " ".join(words[token] for token in row) for row in rows(load_batches(path, folders=[folder], batch_size=1))
    )
    assert short == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        "### Instruction: a ### Response: b"
    )
    assert long == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request. ### Instruction: a ### Input: c ### Response: b"
    )


def test_an_encoder_decoder_is_asked_and_answers(write, plain, chat):
    for folder in (plain, chat):
        path = write({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d e", "output": "f"})
        (batch,) = load_batches(path, folders=[folder], targets=True)
        assert {(*batch["input_ids"][i].tolist(), *batch["labels"][i].tolist()) for i in range(2)} == {
            tuple(ids("<s> a b </s> <s> c </s>")),
            tuple(ids("<s> d e </s> <s> f </s>")),
        }
    path = write({"text": "a", "messages": TURNS, "instruction": "b", "output": "c"})  # as Alpaca has it
    (batch,) = load_batches(path, folders=[plain], targets=True)
    assert [batch[name].tolist() for name in ("input_ids", "labels")] == [[ids(f"<s> {each} </s>")] for each in "bc"]
    with pytest.raises(DataError, match="line 1: found messages; expected prompt and completion, for the model's dec"):
        load_batches(write({"messages": TURNS}), folders=[chat], targets=True)


# ---- messages


@pytest.mark.parametrize(
    ("message", "made"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, "user a b"),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}, " b"]}, "user a b"),
        ({"role": "user", "content": [{"type": None, "text": "a b", "image_url": None}]}, "user a b"),
        ({"role": "user", "content": "a", "name": "c", "weight": 0}, "user a"),
        ({"from": "human", "value": "a", "weight": 0}, "user a"),
        ({"from": "gpt", "value": "a"}, "assistant a"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, "assistant"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "assistant"),
        ({"role": "assistant", "content": ""}, "assistant"),
        ({"role": "a", "content": "b"}, "a b"),  # which is for the template to say
    ],
)
def test_messages_are_made_what_a_template_takes(message, made, write):
    user, other = only(write({"messages": [USER, message]}))["messages"]
    assert user == USER
    assert f"{other['role']} {other['content']}".rstrip() == made


def test_parts_are_rendered_as_their_text(write, chat):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    path = write({"messages": [{"role": "user", "content": parts}]})
    assert rows(load_batches(path, folders=[chat])) == [[BOS, *ids("user a b")]]


def test_other_keys_of_messages_are_for_the_template(write, tmp_path):
    calls = "{% for c in m.tool_calls %} {{ c.id }}{% endfor %}"
    template = "{% for m in messages %} {{ m.role }} {{ m.name }}" + calls + "{% endfor %}"
    folder = save_tokenizer(tmp_path / "tools", template=template)
    message = {"role": "assistant", "name": "b", "content": None, "tool_calls": [{"id": "c"}, {"id": "d"}]}
    assert rows(load_batches(write({"messages": [message]}), folders=[folder])) == [ids("assistant b c d")]


def test_keys_that_are_null_are_none_of_a_message(write, tmp_path, datasets):
    """A table has every key in all messages; templates ask whether it is there."""
    template = "{% for m in messages %} {{ m.role }}{% if 'tool_calls' in m %} {{ m.tool_calls[0].id }}{% endif %}"
    folder = save_tokenizer(tmp_path / "tools", template=template + "{% endfor %}")
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "table" / "a.parquet")
    for source in (tmp_path / "table", write({"messages": [{**USER, "tool_calls": None}, turns[1]]})):
        assert rows(load_batches(source, folders=[folder])) == [ids("user assistant c")]


def test_messages_may_be_json_texts_or_lists_of_roles_and_contents(write):
    for value in (json.dumps(TURNS), {"role": ["user", "assistant"], "content": ["a", "b"]}):
        assert only(write({"messages": value})) == {"messages": TURNS}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"messages: found 5; expected a list of role and content objects"),
        ([], r"messages: found \[\]; expected a list"),
        ("[1", r"messages: found '\[1'; expected a list"),
        ({"role": "user", "content": "a"}, r"messages: found {.*; expected a list"),
        ([USER, None], r"messages\[1\]: found None; expected an object with role and content, or from and value"),
        ([{"content": "a"}], r"messages\[0\]: found {'content': 'a'}; expected an object with role"),
        ([{"role": 5, "content": "a"}], r"messages\[0\]: found .*; expected an object with role"),
        ([{"role": "user"}], r"messages\[0\].content: found nothing; expected a text, or a list of parts"),
        ([{"role": "user", "content": None, "tool_calls": None}], r"messages\[0\].content: found nothing"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: found 5"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], r"messages\[0\].content: found {"),
        (
            [{"from": "narrator", "value": "a"}],
            r"messages\[0\].from: found 'narrator'; expected one of human, user, gpt",
        ),
        ([{"from": "gpt", "value": ["a", 5]}], r"messages\[0\].value\[1\]: found 5; expected a part that is text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\]: found a part of type 'image_url'; expected a part that is text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\]: found a part of type"),
    ],
)
def test_messages_that_are_none_name_line_and_message(value, message, write, chat):
    with pytest.raises(DataError, match=rf"data.jsonl, line 1, {message}"):
        load_batches(write({"messages": value}), folders=[chat])


def test_images_and_token_ids_count_before_what_is_only_asked(tmp_path, datasets):
    """Of a data set's columns, as they always have."""
    more = {"question": ["a"], "answer": ["b"]}
    datasets.Dataset.from_dict({"input_ids": [[1, 2]], **more}).to_parquet(tmp_path / "a.parquet")
    assert only(tmp_path / "a.parquet")["input_ids"].tolist() == [1, 2]
    assert TEMPLATE.count("content") == 1
