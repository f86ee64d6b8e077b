"""Render a conversation with the tokenizer's own chat template and locate the assistant turns in the text.

The text of the messages is never searched for. Instead, the conversation is rendered once more with invisible marks
inside the messages: the position of a mark in the result is that of its message, whatever the template strips,
reorders or adds. Removing the marks must give the plain rendering exactly. The text between a message and the next
is found in the same way, by rendering only the first messages of the conversation:

    text:     ...<user>How<|im_end|>\\n<|im_start|>assistant\\nThus.<|im_end|>\\n<user>...
                          ^ mark                                ^ mark
                           |------------ header -----------||== learnt ===|

- header: the text after the previous message's mark, if the conversation is rendered up to that message with the
  generation prompt, as in inference. A turn starts where the header ends.
- tail: the text after the turn's own mark if the conversation ends there, cut after the end-of-turn token.

Some templates do not tolerate marks, for example because they test the first or last characters of a message. For
them, prefixes are compared: the turn is what a rendering with the message adds to the one without. If that fails too,
the row is refused.
"""

from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .messages import Conversation, Turn
from .problems import RowError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode, which do not occur in exchanged text


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the character spans [start, end) of its assistant turns, in order."""

    text: str
    spans: list[tuple[int, int]]


class _CannotMark(Exception):
    """The marked rendering differs from the plain one in more than the marks."""


class ChatTemplate:
    """The chat template of a transformers tokenizer.

    enable_thinking: passed to the template unless None; a row's chat_template_kwargs take precedence.
    Raises UserError when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, enable_thinking: bool | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or ''} has no chat template, so rows "
                "cannot be rendered as conversations",
                "use the tokenizer of an instruct or chat model (chat_template.jinja or chat_template in "
                "tokenizer_config.json), or train on plain text: `megatron pt`, --use_chat_template false",
            )
        self._tokenizer = tokenizer
        self._kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = {
            str(t) for t in (*tokenizer.all_special_tokens, *(t for t in added if t.special)) if str(t)
        }
        self._no_think = self._empty_thinking()

    def render(self, conversation: Conversation) -> Rendered:
        """The text of the whole conversation and its assistant turns. Raises RowError."""
        turns = conversation.turns
        text = self._render(conversation, turns)
        try:
            spans = self._spans_by_marks(conversation, text)
        except _CannotMark:
            spans = self._spans_by_prefixes(conversation, text)
        spans = [(self._after_empty_thinking(text, start), end) for start, end in spans]
        ordered = all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        if not ordered or any(start > end for start, end in spans):
            raise _unlocatable()
        return Rendered(text, spans)

    def _render(self, conversation: Conversation, turns: list[Turn], prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [turn.chat() for turn in turns],
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **(self._kwargs | conversation.template_kwargs),
            )
        except (
            Exception
        ) as error:  # jinja raises anything: its own errors, raise_exception, TypeError in an expression
            raise RowError(
                "chat template refuses the row", f"the chat template refuses it: {error}"
            ) from None

    # --- by marks -------------------------------------------------------------------------------------------

    def _spans_by_marks(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        marked = [_mark(index, turn) for index, turn in enumerate(conversation.turns)]
        whole = self._render(conversation, marked)
        bare, places = _take_marks_out(whole)
        if bare != text:
            raise _CannotMark
        spans = []
        for i in conversation.assistants():
            if f"e{i}" not in places:
                if conversation.turns[i].tool_calls:
                    raise RowError(
                        "tool calls not rendered", "the tokenizer's chat template leaves tool calls out"
                    )
                raise _CannotMark
            start = self._start(conversation, marked, i, text, places)
            upto = whole if i == len(marked) - 1 else self._render(conversation, marked[: i + 1])
            own = places[f"e{i}"]
            spans.append((start, own + self._tail(_after_mark(upto, f"e{i}"), text[own:])))
        return spans

    def _start(
        self, conversation: Conversation, marked: list[Turn], i: int, text: str, places: dict[str, int]
    ) -> int:
        content = places.get(f"b{i}")  # absent if the template drops the beginning of the content
        before = places.get(f"e{i - 1}")
        if before is None:
            if content is None:
                raise _CannotMark
            return content
        header = _after_mark(self._render(conversation, marked[:i], prompt=True), f"e{i - 1}")
        common = _common_prefix(header, text[before : before + len(header)])
        if common < len(header) and content is None:
            # the prompt adds text ("<think>") that the rendered turn lacks: use the header of a plain answer
            plain = _mark(i, Turn("assistant", "x"))
            between = _after_mark(self._render(conversation, [*marked[:i], plain]), f"e{i - 1}")
            content = before + min(common, len(between.split(_OPEN)[0]))
        start = before + common
        return start if content is None else min(start, content)

    def _tail(self, tail: str, text: str) -> int:
        """Number of characters of `text`, which follows a turn's content, that belong to the turn.

        tail: what follows the content if the conversation ends there.
        """
        common = _common_prefix(tail, text)
        cut = self._after_last_special(tail[:common])
        if cut == 0 and common < len(tail):
            raise _CannotMark
        return cut or len(tail)

    # --- by prefixes ----------------------------------------------------------------------------------------

    def _spans_by_prefixes(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        turns, spans = conversation.turns, []
        for i in conversation.assistants():
            before = self._render(conversation, turns[:i], prompt=True) if i else ""
            upto = text if i == len(turns) - 1 else self._render(conversation, turns[: i + 1])
            if not (text.startswith(before) and text.startswith(upto) and len(before) < len(upto)):
                raise _unlocatable()
            cut = self._after_last_special(upto[len(before) :])
            rest = upto[len(before) + cut :]
            spans.append((len(before), len(before) + cut if cut and not rest.strip() else len(upto)))
        return spans

    def _after_last_special(self, tail: str) -> int:
        """The end of the last special token in a piece of template text; 0 if there is none."""
        return max((tail.rfind(token) + len(token) for token in self._special if token in tail), default=0)

    # --- thinking -------------------------------------------------------------------------------------------

    def _empty_thinking(self) -> str:
        """What a hybrid-thinking template puts before an answer without thoughts; "" for other templates.

        With enable_thinking false it is part of the prompt, not generated by the model. So it is not a target, as in
        ms-swift (`ignore_empty_think`).
        """
        asked = Conversation([Turn("user", "x")])
        try:
            prompt = self._render(asked, asked.turns, prompt=True)
            silent = self._render(
                replace(asked, template_kwargs={"enable_thinking": False}), asked.turns, prompt=True
            )
        except RowError:
            return ""
        return silent[len(prompt) :] if silent.startswith(prompt) else ""

    def _after_empty_thinking(self, text: str, start: int) -> int:
        return (
            start + len(self._no_think)
            if self._no_think and text.startswith(self._no_think, start)
            else start
        )


def _mark(index: int, turn: Turn) -> Turn:
    """The turn with an end mark (and, for an answer, a begin mark).

    Prompts are marked in their middle, because templates test how they begin and end; answers at both ends of their
    text, inside the white space that templates strip; tool calls after the last function's name.
    """
    end, content = f"{_OPEN}e{index}{_CLOSE}", turn.content
    if _OPEN in content:
        raise _CannotMark
    if turn.role != "assistant":
        half = len(content) // 2
        return replace(turn, content=content[:half] + end + content[half:])
    core = content.strip()
    if core:
        lead = content[: content.index(core)]
        begin = f"{_OPEN}b{index}{_CLOSE}"
        trail = content[len(lead) + len(core) :]
        content = lead + begin + core + ("" if turn.tool_calls else end) + trail
    elif not turn.tool_calls:
        content = content + end
    if not turn.tool_calls:
        return replace(turn, content=content)
    *others, last = turn.tool_calls
    last = {**last, "function": {**last["function"], "name": last["function"]["name"] + end}}
    return replace(turn, content=content, tool_calls=[*others, last])


def _take_marks_out(marked: str) -> tuple[str, dict[str, int]]:
    """(text without marks, position of each mark in it). Raises _CannotMark if a mark occurs twice."""
    pieces = marked.split(_OPEN)
    bare, places = [pieces[0]], {}
    at = len(pieces[0])
    for piece in pieces[1:]:
        name, _, rest = piece.partition(_CLOSE)
        if name in places:
            raise _CannotMark
        places[name] = at
        bare.append(rest)
        at += len(rest)
    return "".join(bare), places


def _after_mark(marked: str, name: str) -> str:
    """The text after the mark `name`, without other marks. Raises _CannotMark if the mark is missing."""
    _, found, rest = marked.partition(f"{_OPEN}{name}{_CLOSE}")
    if not found:
        raise _CannotMark
    return _take_marks_out(rest)[0] if _OPEN in rest else rest


def _common_prefix(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unlocatable() -> RowError:
    return RowError(
        "assistant turns not found",
        "the chat template rewrites this conversation so that its assistant turns cannot be told apart; make it "
        "a row for each turn",
    )
