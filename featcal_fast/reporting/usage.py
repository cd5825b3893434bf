"""How a model in a folder is used, as snippets to copy: by transformers, vLLM and lm-evaluation-harness."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

# Decoders that vLLM serves, of the families that are calibrated.
SERVED = {
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
}
# By what transformers' own tables of classes are called (`MODEL_FOR_..._MAPPING_NAMES`), the class that reads them.
AUTO = {
    "FOR_CAUSAL_LM_": "AutoModelForCausalLM",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM_": "AutoModelForSeq2SeqLM",
    "FOR_MASKED_LM_": "AutoModelForMaskedLM",
    "FOR_SEQUENCE_CLASSIFICATION_": "AutoModelForSequenceClassification",
    "FOR_TOKEN_CLASSIFICATION_": "AutoModelForTokenClassification",
    "FOR_IMAGE_CLASSIFICATION_": "AutoModelForImageClassification",
    "": "AutoModel",
}
LONGEST = 100  # characters of a class's name
PLAIN = re.compile(r"[\w./@+~-]+", re.ASCII)  # a path that lm_eval takes as it is
TOKENIZERS = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}
MODULES, CONFIG = "modules.json", "config.json"  # of a folder of sentence-transformers; a model's
PROCESSORS = {"preprocessor_config.json", "processor_config.json"}

SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({})
print(model.encode(["Hello, world!"]).shape)"""
TEXT = 'inputs = tokenizer("{text}", return_tensors="pt")'
GENERATE = """\
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
IMAGE = 'inputs = processor(images=Image.open("image.png").convert("RGB"), return_tensors="pt")'
PAIR = """\
image = Image.open("image.png").convert("RGB")
inputs = processor(text=["a cat", "a dog"], images=image, padding=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))"""
MASKED = """\
inputs = tokenizer(f"Paris is the {tokenizer.mask_token} of France.", return_tensors="pt")
found = model(**inputs).logits.argmax(-1)
print(tokenizer.decode(found[inputs.input_ids == tokenizer.mask_token_id]))"""
LABEL = "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"
LABELS = "print([model.config.id2label[label.item()] for label in model(**inputs).logits.argmax(-1)[0]])"
STATES = "print(model(**inputs).last_hidden_state.shape)"
SAY = TEXT.format(text="Hello, world!")
TEXT_CALLS = {
    "AutoModelForCausalLM": [TEXT.format(text="The capital of France is"), GENERATE],
    "AutoModelForSeq2SeqLM": [TEXT.format(text="translate English to German: Hello!"), GENERATE],
    "AutoModelForMaskedLM": [MASKED],
    "AutoModelForSequenceClassification": [SAY, LABEL],
    "AutoModelForTokenClassification": [SAY, LABELS],
    "AutoModel": [SAY, STATES],
}
IMAGE_CALLS = {"AutoModelForImageClassification": [IMAGE, LABEL], "AutoModel": [IMAGE, STATES]}


def usage(config: Mapping[str, Any], out: str, files: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """How to use the model of a folder.

    Args:
        config: what its `config.json` holds; it may be a stranger's.
        out: the folder, or its name on the hub.
        files: what lies in the folder; without a tokenizer or processor there, what needs one is left out. None where
            both can be expected.

    Returns:
        A title and a snippet each: Python for sentence-transformers, where the folder is one of theirs, and for
        transformers, then commands, where the model is one for them. Nothing of these where `config` names no class
        that transformers has, or lies in a folder in that one.
    """
    names, name = None if files is None else set(files), _architecture(config)
    if names is not None and MODULES in names:
        ours = [] if CONFIG not in names else usage(config, out, names - {MODULES})
        return [("sentence-transformers", SENTENCES.format(python_quoted(out))), *ours]
    if name is None:
        return []
    loader = _loader(config, name)
    read, tools = _reader(config, loader)
    needed = TOKENIZERS if read == "AutoTokenizer" else PROCESSORS
    snippets = [("transformers", _load(loader, out, read, tools if names is None or names & needed else []))]
    if names is None or names & TOKENIZERS:
        if name in SERVED:
            snippets.append(("vLLM", f"vllm serve {shell_quoted(_path(out))}"))
        if loader in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
            snippets.append(("lm-evaluation-harness", _evaluate(_path(out))))
    return snippets


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, where transformers has it."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or len(name) > LONGEST or not name.isidentifier() or not name[0].isupper():
        return None
    known = transformers.__all__  # type: ignore[attr-defined]  # which `dir` takes a third of a second to look through
    return name if name in known else None


def _loader(config: Mapping[str, Any], name: str) -> str:
    """The class of transformers to load with: an automatic one that takes the model for what it is, or its own."""
    from transformers.models.auto import modeling_auto

    kind = config.get("model_type")
    for table, auto in AUTO.items():
        if isinstance(kind, str) and _names(modeling_auto, table).get(kind) == name:
            return auto
    return name


def _names(module: object, table: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(module, f"MODEL_{table}MAPPING_NAMES", {})
    return found


def _reader(config: Mapping[str, Any], loader: str) -> tuple[str, list[str]]:
    """What makes a model's inputs, and how the model is called with them."""
    if config.get("model_type") == "clip" and loader == "AutoModel":
        return "AutoProcessor", [PAIR]
    if "image_size" in config:
        return "AutoImageProcessor", IMAGE_CALLS.get(loader, [])
    if config.get("is_encoder_decoder") and loader == "AutoModel":  # it would want a decoder's inputs, too
        return "AutoTokenizer", []
    return "AutoTokenizer", TEXT_CALLS.get(loader, [])


def _load(loader: str, out: str, read: str, calls: list[str]) -> str:
    """Python that loads a model, and calls it where there is something to make its inputs with."""
    lines = []
    if calls:
        lines += ["from PIL import Image"] if "Image.open" in "".join(calls) else []
        lines += [f"from transformers import {', '.join(sorted((loader, read)))}", ""]
        lines += [f"{'tokenizer' if read == 'AutoTokenizer' else 'processor'} = {read}.from_pretrained(folder)"]
    else:
        lines += [f"from transformers import {loader}", ""]
    lines += [f"model = {loader}.from_pretrained(folder)", *calls]
    lines.insert(lines.index("") + 1, f"folder = {python_quoted(out)}")
    return "\n".join(lines)


def _evaluate(out: str) -> str:
    plain = PLAIN.fullmatch(out) and not out.isdigit()
    arguments = f"pretrained={out}" if plain else json.dumps({"pretrained": out})
    return f"lm_eval --model hf --model_args {shell_quoted(arguments)} --tasks hellaswag --batch_size 8"


def _path(out: str) -> str:
    return f"./{out}" if out.startswith("-") else out  # which would be taken for an option


def python_quoted(text: str) -> str:
    """A text in Python's code."""
    return f'"{text}"' if text.isprintable() and not re.search(r'["\\]', text) else repr(text)


def shell_quoted(text: str) -> str:
    """A text for a shell: as it is, in quotes, or by numbers (bash, zsh) where it cannot be shown."""
    if text.isprintable():
        return shlex.quote(text)
    plain, data = re.compile(r"[\w./=+-]", re.ASCII), text.encode(errors="surrogateescape")
    code = "".join(chr(each) if plain.match(chr(each)) else f"\\x{each:02x}" for each in data)
    return f"$'{code}'"
