"""A row of any known format -> a conversation."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from .messages import Conversation, Turn, read_messages
from .problems import RowError

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
SYSTEM = ("system", "system_prompt")
MESSAGES = ("messages", "conversation", "conversations")
_PREFERENCE = ("chosen", "rejected")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def to_conversation(
    row: Mapping[str, Any], columns: Mapping[str, str], system: str | None = None
) -> Conversation:
    """The conversation of a row.

    The format is recognized by its columns, after renaming them by `columns`: messages / conversation(s), alpaca
    (instruction, input, output), or else a query and a response under any of the usual names (`QUERY`, `RESPONSE`).
    system: the system prompt of rows without their own. Raises RowError.
    """
    row = _renamed(row, columns)
    if media := [name for name in _MEDIA if row.get(name)]:
        raise RowError(
            "images, video or audio", f"the row has {media[0]}; only text can be trained on for now"
        )
    if name := next((name for name in MESSAGES if row.get(name)), None):
        turns = read_messages(_parsed(name, row[name]))
    else:
        turns = _question_and_answer(row)
    if turns[0].role != "system":
        own = next((row[name] for name in SYSTEM if row.get(name)), None) or system
        if own:
            turns.insert(0, Turn("system", str(own)))
    if not any(turn.role == "assistant" for turn in turns):
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
        pairs = " and ".join(name for name in _PREFERENCE if name in row)
        hint = f"; {pairs} are for preference learning, which is not supported yet" if pairs else ""
        raise RowError("no assistant turn", f"no assistant turn, so nothing to learn (only {roles}){hint}")
    return Conversation(turns, _tools(row.get("tools")), _template_kwargs(row.get("chat_template_kwargs")))


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if value is not None and name not in columns}
    return kept | {new: row[old] for old, new in columns.items() if row.get(old) is not None}


def _parsed(name: str, value: Any) -> Any:
    """Parse a list that CSV, or a careless exporter, has stored as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(value)  # Python's repr, single quotes
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(
                f"{name} is not JSON", f"column {name} is text that is not JSON: {error.msg}"
            ) from None


def _question_and_answer(row: dict[str, Any]) -> list[Turn]:
    if row.get("instruction") is not None and ("input" in row or "output" in row):
        query = str(row["instruction"])
        if row.get("input"):
            query = f"{query}\n{row['input']}" if query else str(row["input"])
        query_name = "instruction"
    else:
        query_name = next((name for name in QUERY if name in row), None)
        query = None if query_name is None else str(row[query_name])
    response_name = next((name for name in RESPONSE if name in row and name != query_name), None)
    if response_name is None:
        raise RowError(
            "no assistant turn",
            "no assistant turn: none of its columns is known to hold an answer (it has: "
            f"{', '.join(row) or 'none'}); name it with --columns",
        )
    response = row[response_name]
    if isinstance(response, list | tuple):
        response = response[0] if response else ""
    turns = _history(row.get("history"))
    if query is not None:
        turns.append(Turn("user", query))
    if query is not None and response == "":
        raise RowError("empty answer", f"no assistant turn: column {response_name} is empty")
    turns.append(Turn("assistant", str(response)))
    return turns


def _history(history: Any) -> list[Turn]:
    turns = []
    for pair in _parsed("history", history) if history else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("history is no pairs", 'history is not a list of pairs ["question", "answer"]')
        turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
    return turns


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Function specifications in OpenAI's form; a bare `{"name": ..., "parameters": ...}` is wrapped."""
    tools = _parsed("tools", tools) if tools else None
    if not tools:
        return None
    tools = [_parsed("tools", tool) for tool in (tools if isinstance(tools, list) else [tools])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is no list of functions", "tools is not a JSON list of function specifications")
    return [
        {"type": "function", "function": tool} if "function" not in tool and "name" in tool else tool
        for tool in tools
    ]


def _template_kwargs(kwargs: Any) -> dict[str, Any]:
    kwargs = _parsed("chat_template_kwargs", kwargs) if kwargs else {}
    if not isinstance(kwargs, dict):
        raise RowError("chat_template_kwargs is no object", "chat_template_kwargs is not a JSON object")
    return {key: value for key, value in kwargs.items() if value is not None}
