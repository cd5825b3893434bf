"""Messages of a conversation, in OpenAI's form or ShareGPT's, made what chat templates take."""

from __future__ import annotations

from typing import Any

from featcal_fast.errors import DataError, shown
from featcal_fast.untrusted.documents import DocumentError, parse_json

# What ShareGPT's `from` says, as a `role`.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of parts that hold text


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with a `role` and a `content` that is a text; others that are not null are kept, for the template.

    Args:
        value: a list of objects with `role` and `content`, or `from` and `value`; or that as a JSON text, as a table of
            texts has it; or as an object of lists. A content may be a list of parts that are text, which are joined;
            where there are tool calls it may be missing.
        where: it was found.

    Raises:
        DataError: it is none of these; names the message.
    """
    found = _parsed(value) if isinstance(value, str) else value
    if isinstance(found, dict) and found and all(isinstance(each, list) for each in found.values()):
        rows = zip(*found.values(), strict=False)
        found = [dict(zip(found, row, strict=True)) for row in rows]
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: found {shown(value)}; expected a list of role and content objects")
    return [_message(each, f"{where}[{i}]") for i, each in enumerate(found)]


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except DocumentError:
        return None


def _message(message: Any, where: str) -> dict[str, Any]:
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if _has(message, keys[0])), None)
    if keys is None:
        raise DataError(f"{where}: found {shown(message)}; expected an object with role and content, or from and value")
    role, content = message[keys[0]], message.get(keys[1])
    if keys[0] == "from":
        if role not in ROLES:
            raise DataError(f"{where}.from: found {shown(role)}; expected one of {', '.join(ROLES)}")
        role = ROLES[role]
    calls = message.get("tool_calls") or message.get("function_call")
    text = "" if content is None and calls else _content(content, f"{where}.{keys[1]}")
    # Tables have all keys in every message, where they are null if it has none of the kind; templates ask for keys.
    others = {key: each for key, each in message.items() if key not in keys and each is not None}
    return {**others, "role": role, "content": text}


def _has(message: Any, key: str) -> bool:
    return isinstance(message, dict) and isinstance(message.get(key), str)


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        found = "nothing" if content is None else shown(content)
        raise DataError(f"{where}: found {found}; expected a text, or a list of parts that are text")
    return content


def _part(part: Any, where: str) -> str:
    text = part
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        text = part.get("text")
    if not isinstance(text, str):
        found = f"a part of type {shown(part['type'])}" if isinstance(part, dict) and "type" in part else shown(part)
        raise DataError(f"{where}: found {found}; expected a part that is text: models are given texts alone")
    return text
