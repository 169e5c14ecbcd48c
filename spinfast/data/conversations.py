"""A row's turns -> messages in one form, and which of their assistant turns are learnt from.

Read are OpenAI's form (role, content, tool_calls, weight), what TRL, Axolotl, ms-swift and LLaMA-Factory add to it, and
ShareGPT's (from, value). A message here has `role` and `content` (text, "" beside tool calls), and where the row has
them `tool_calls` ({"type": "function", "function": {"name", "arguments": an object}}), `reasoning_content`,
`weight` 0 where it is not learnt from, and whatever other keys the row gives a turn, for templates that know them.
Whether turns may stand in an order is the chat template's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from spinfast.errors import UserError

Message = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(["user", "human"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "model", "function_call", "tool_call"], "assistant"),
    **dict.fromkeys(["tool", "function", "ipython", "observation", "tool_response", "function_response"], "tool"),
}
CALLS = ("function_call", "tool_call")  # ShareGPT roles whose value is the call itself, as JSON
REASONING = ("reasoning_content", "reasoning", "thinking")
LEARN, MASK = ("weight", "train", "training", "trainable", "loss"), ("mask", "masked")
PARTIAL = ("train_detail", "training_detail")  # Axolotl's marks on parts of a turn
READ = ("role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *LEARN, *MASK, *PARTIAL)


class RowError(UserError):
    """A row that is no example. The message says expected and got; `reason` is what rejections are counted by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def turns(value: Any) -> list[dict[str, Any]]:
    """A row's list of turns (or the JSON of one, as CSV holds it) as messages; empty system turns are left out."""
    value = _parsed(value)
    if value is None:
        raise RowError("no conversation", "no conversation: it is null")
    if not isinstance(value, list) or not all(isinstance(given, dict) for given in value):
        raise RowError("not a conversation", f"expected a list of turns, got {str(value)[:60]!r}")
    messages = []
    for number, given in enumerate(value, 1):
        role = given.get("role") or given.get("from")
        role = role.lower() if isinstance(role, str) else role
        if not isinstance(role, str) or role not in ROLES:
            raise RowError("unknown role", f"turn {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        content = given.get("value") if given.get("content") is None else given["content"]
        if content or ROLES[role] not in ("system", "developer"):  # empty: how many data sets write "no system turn"
            messages.append(_message(given, role, content, f"turn {number} ({role})"))
    return messages


def turn(role: str, content: Any, what: str) -> dict[str, Any]:
    """One message of a text column; `what` names it in errors."""
    return {"role": role, "content": text(content, what)}


def text(content: Any, what: str) -> str:
    """A text, given as such or as a list of text parts; `what` names it in errors."""
    if content is None or content == []:
        raise RowError("empty text", f"no {what}: it is null")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(_part(part, what) for part in content)
    if not isinstance(content, str):
        raise RowError("not text", f"{what}: expected text, got {type(content).__name__}")
    if not content.strip():
        raise RowError("empty text", f"no {what}: it is empty")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise RowError("invalid Unicode", f"{what}: half of a surrogate pair; it cannot be written as UTF-8")
    return content


def learnt(conversation: Sequence[Message], which: Literal["first", "last", "all"], start: int = 0) -> list[int]:
    """Positions of the assistant turns that are learnt from, from `start` on.

    An assistant turn answers a user's or a tool's: what stands before the first of these (a greeting) is context.
    Turns of weight 0 are never among them.
    """
    roles = [message["role"] for message in conversation]
    asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), len(roles))
    answers = [i for i in range(max(start, asked), len(roles)) if roles[i] == "assistant"]
    positions = [i for i in answers if conversation[i].get("weight", 1)]
    if not positions:
        why = "every assistant turn is marked as not learnt from"
        if not answers:
            why = "the conversation has no assistant turn after a user's"
        raise RowError("no answer", f"no answer: {why}")
    return {"first": positions[:1], "last": positions[-1:], "all": positions}[which]


def with_system(conversation: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation, with `system` before it where it has no system turn of its own."""
    if system is None or (conversation and conversation[0]["role"] in ("system", "developer")):
        return list(conversation)
    return [{"role": "system", "content": system}, *conversation]


def template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's own variables of the chat template: `tools`, and what its `chat_template_kwargs` holds."""
    variables = _parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(variables, dict):
        raise RowError(
            "not template variables", f"chat_template_kwargs: expected an object, got {str(variables)[:60]!r}"
        )
    tools = _parsed(row.get("tools")) or []
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("not tools", f"tools: expected a list of function schemas, got {str(row['tools'])[:60]!r}")
    variables = {name: value for name, value in variables.items() if value is not None}
    return {"tools": tools, **variables} if tools else variables


def unpadded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """An Arrow row whose values are as they were before they were Arrow's."""
    return {column: unpadded(value) for column, value in row.items()}


def unpadded(value: Any) -> Any:
    """Without the keys of null value that Arrow gives every object of a column so that all have the same keys."""
    if isinstance(value, dict):
        return {key: unpadded(inner) for key, inner in value.items() if inner is not None}
    return [unpadded(inner) for inner in value] if isinstance(value, list) else value


def _message(given: Mapping[str, Any], name: str, content: Any, what: str) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if key not in READ and value is not None}
    message["role"] = role = ROLES[name]
    calls = _parsed(content if name in CALLS else given.get("tool_calls") or given.get("function_call"))
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_tool_call(_parsed(call), what) for call in calls]
    if name in CALLS or ((calls or role == "tool") and not content):
        message["content"] = ""
    else:
        message["content"] = text(content, what)
    if reasoning := next((given[key] for key in REASONING if given.get(key)), None):
        message["reasoning_content"] = text(reasoning, f"{what}'s reasoning")
    return message | _weight(given, role, what)


def _weight(given: Mapping[str, Any], role: str, what: str) -> dict[str, int]:
    marks = {key: given[key] for key in (*LEARN, *MASK) if given.get(key) is not None}
    partial = [key for key in marks if marks[key] not in (0, 1)] + [key for key in PARTIAL if given.get(key)]
    if partial:
        raise RowError(
            "turn learnt in part",
            f"{what}: {partial[0]} is {str(given[partial[0]])[:60]!r}; a turn is learnt from whole (1) or not (0)",
        )
    learnt = [bool(value) != (key in MASK) for key, value in marks.items()]
    if role != "assistant" and any(learnt):
        raise RowError("turn of another marked as learnt", f"{what}: only assistant turns are learnt from; unmark it")
    return {} if all(learnt) else {"weight": 0}


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = _parsed(function.get("arguments") or {}) if isinstance(function, dict) else None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            "not a tool call", f"{what}: expected a name and arguments that are a JSON object, got {str(call)[:60]!r}"
        )
    kept = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _part(part: Mapping[str, Any], what: str) -> str:
    if isinstance(part.get("text"), str):
        return part["text"]
    raise RowError("not text", f"{what}: has a part of type {part.get('type')!r}; only text is learnt from")


def _parsed(value: Any) -> Any:
    """What JSON text stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value
