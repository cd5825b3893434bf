"""Tokenizers, images and batches that the tests of calibration data are made of."""

from __future__ import annotations

import torch

WORDS = ("<pad>", "<s>", "</s>", "user", "assistant", *"abcdefghij")
PAD, BOS, EOS = 0, 1, 2
A = WORDS.index("a")
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def save_tokenizer(folder, words=WORDS, template=None, wrapped=True, **options):
    """A tokenizer of whole words, ids in the order of `words`; `wrapped` adds <s> and </s> around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        tokens = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    wrapper.chat_template = template
    wrapper.save_pretrained(folder)
    return folder


def save_image(path, color, size=(12, 8)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def rows(batches, name="input_ids"):
    return [row for batch in batches for row in batch[name].tolist()]


def texts(batches):
    """The unpadded token ids of every row."""
    return [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
