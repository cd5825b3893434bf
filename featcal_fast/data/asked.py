"""What is asked and answered, in the forms that a model may be given it."""

from __future__ import annotations

from typing import Any

# The prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), with and without an input.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


def as_turns(instruction: str, input: str, output: str) -> dict[str, Any]:
    """Two messages, for a chat template."""
    asked = {"role": "user", "content": _question(instruction, input)}
    return {"messages": [asked, {"role": "assistant", "content": output}]}


def as_prompt(instruction: str, input: str, output: str) -> dict[str, str]:
    """One text, for a tokenizer without a chat template."""
    prompt = PROMPT_WITH_INPUT if input else PROMPT
    return {"text": prompt.format(instruction=instruction, input=input, output=output)}


def as_pair(instruction: str, input: str, output: str) -> dict[str, str]:
    """For an encoder and a decoder."""
    return {"prompt": _question(instruction, input), "completion": output}


def _question(instruction: str, input: str) -> str:
    return f"{instruction}\n\n{input}" if input else instruction
