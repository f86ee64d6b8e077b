"""The form of a conversation that all dataset formats are converted to and that chat templates take."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .problems import RowError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}


@dataclass
class Turn:
    """One message: role system, user, assistant or tool.

    tool_calls: a list of `{"id": str, "type": "function", "function": {"name": str, "arguments": dict | str}}`.
    loss: whether an assistant turn is learnt (None: the run's strategy decides); loss_scale: its weight.
    """

    role: str
    content: str
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    loss: bool | None = None
    loss_scale: float | None = None
    name: str | None = None
    call_id: str | None = None

    def chat(self) -> dict[str, Any]:
        """The message as `apply_chat_template` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.role == "tool":
            message |= {"name": self.name or "", "tool_call_id": self.call_id or ""}
        return message


@dataclass
class Conversation:
    """One row: its turns, the tools that it may call, and variables for the chat template."""

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def assistants(self) -> list[int]:
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]


def read_messages(messages: Any) -> list[Turn]:
    """Turns of a `messages` / `conversations` value: role/content, from/value, or human/assistant pairs.

    Tool calls in every known spelling become `tool_calls` of an assistant turn; adjacent assistant turns are joined.
    Raises RowError.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError("messages is no list", "messages is not a list of messages")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RowError(
                "a message is no object", f"message {number} is not an object with a role and a content"
            )
        for turn in _read_message(
            number, {key: value for key, value in message.items() if value is not None}
        ):
            _append(turns, turn)
    _name_calls(turns)
    return turns


def _read_message(number: int, message: dict[str, Any]) -> list[Turn]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role is None:
        pair = [Turn(ROLES[key], _text(number, message[key])) for key in _PAIR if key in message]
        if pair:
            return pair
        raise RowError(
            "a message has no role", f"message {number} has no role (its keys: {', '.join(message)})"
        )
    if role not in ROLES:
        raise RowError("unknown role", f"message {number} has the unknown role {role!r}")
    role = ROLES[role]
    says_more = message.keys() & {"tool_calls", "reasoning_content"}
    if content is None and role in ("user", "assistant", "tool_call") and not says_more:
        keys = ", ".join(message)
        raise RowError("a message has no content", f"message {number} has no content (its keys: {keys})")
    loss, scale = _loss(number, role, message)
    if role == "tool_call":
        return [Turn("assistant", "", _calls_of_text(number, content), loss, scale)]
    if isinstance(content, list):
        turns = _read_parts(number, role, content)
    else:
        turns = [Turn(role, _text(number, content))]
    for turn in turns:
        turn.loss, turn.loss_scale = loss, scale
        if turn.role == "tool":
            turn.name, turn.call_id = message.get("name"), turn.call_id or message.get("tool_call_id")
    if role == "assistant":
        turns[-1].tool_calls += [_call(number, call) for call in message.get("tool_calls") or ()]
        if reasoning := message.get("reasoning_content"):
            turns[0].content = _think(reasoning) + turns[0].content
    return turns


_PAIR = ("system", "human", "user", "assistant", "gpt", "bot")


def _think(text: str) -> str:
    """Reasoning as part of the text, in the form that templates of reasoning models split off again."""
    text = text.strip("\n")
    return f"<think>\n{text}\n</think>\n\n"


def _loss(number: int, role: str, message: dict[str, Any]) -> tuple[bool | None, float | None]:
    loss, scale = message.get("loss"), message.get("loss_scale")
    if loss is not None and not isinstance(loss, bool) and loss not in (0, 1):
        raise RowError("loss is no bool", f"message {number}: loss is {loss!r}, not true or false")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0):
        raise RowError(
            "loss_scale is no weight", f"message {number}: loss_scale is {scale!r}, not a number of 0 or more"
        )
    if role not in ("assistant", "tool_call") and loss:
        raise RowError(
            "loss on a prompt", f"message {number}: loss is true, but only assistant messages can be learnt"
        )
    return None if loss is None else bool(loss), None if scale is None else float(scale)


def _text(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, int | float):
        return str(content)
    raise RowError("content is no text", f"message {number}: its content is neither text nor a list of parts")


def _read_parts(number: int, role: str, parts: list[Any]) -> list[Turn]:
    """The turns of a content list: text, reasoning, tool calls and results, under OpenAI's or Anthropic's names."""
    turn, results = Turn(role, ""), []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get("text") or part.get("value") or "" if kind else ""
        if kind == "text":
            turn.content += value
        elif kind in ("reasoning", "thinking"):
            turn.content += _think(part.get("thinking") or value)
        elif kind in ("tool_call", "function_call"):
            turn.tool_calls += _calls_of_text(number, value)
        elif kind == "tool_use":
            call = {"name": part.get("name"), "arguments": part.get("input", {})}
            turn.tool_calls.append(_call(number, {"id": part.get("id"), "function": call}))
        elif kind == "tool_result":
            content = part.get("content")
            text = (
                _read_parts(number, "tool", content)[0].content
                if isinstance(content, list)
                else _text(number, content)
            )
            results.append(Turn("tool", text, call_id=part.get("tool_use_id")))
        else:
            raise RowError(
                "part of unknown type",
                f"message {number} has a part of type {kind!r}; only text is trained on",
            )
    return results + [turn] if turn.content or turn.tool_calls or not results else results


def _calls_of_text(number: int, content: Any) -> list[dict[str, Any]]:
    """`{"name": ..., "arguments": ...}`, or a list of them, as text or already parsed."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except json.JSONDecodeError as error:
            raise RowError(
                "tool call is not JSON", f"message {number}: the tool call is not JSON: {error.msg}"
            ) from None
    return [_call(number, call) for call in (content if isinstance(content, list) else [content])]


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else {}
    function = function if isinstance(function, dict) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise RowError("tool call without a name", f"message {number}: a tool call names no function")
    if isinstance(arguments, str):
        with suppress(json.JSONDecodeError):  # not JSON: the model learns this exact text
            arguments = json.loads(arguments)
    call_id = call.get("id")
    arguments = {} if arguments is None else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _append(turns: list[Turn], turn: Turn) -> None:
    """Add a turn; consecutive assistant turns are joined, since they are one answer."""
    last = turns[-1] if turns else None
    if last is None or turn.role != "assistant" or last.role != "assistant":
        turns.append(turn)
        return
    if (last.loss, last.loss_scale) != (turn.loss, turn.loss_scale):
        raise RowError(
            "loss differs within an answer", "neighbouring assistant messages have different loss settings"
        )
    if turn.content and last.tool_calls:
        raise RowError(
            "text after a tool call", "an assistant message follows a tool call that has no response"
        )
    last.content += turn.content
    last.tool_calls += turn.tool_calls


def _name_calls(turns: list[Turn]) -> None:
    """Give each tool call an id of nine characters, as some templates require, and each response its call's id."""
    waiting: list[dict[str, Any]] = []
    number = 0
    for turn in turns:
        for call in turn.tool_calls:
            call["id"] = call["id"] or f"call{number:05d}"
            number += 1
        if turn.tool_calls:
            waiting = list(turn.tool_calls)
        elif turn.role == "tool" and waiting:
            known = [call for call in waiting if call["id"] == turn.call_id]
            call = known[0] if known else waiting[0]
            waiting.remove(call)
            turn.call_id, turn.name = call["id"], turn.name or call["function"]["name"]
