"""Conversations -> token ids and, for each token, how much it counts as a target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .messages import Conversation
from .naming import with_names
from .problems import Problem, RowError
from .readers import parse_row
from .rows import to_conversation
from .settings import DataSettings
from .template import ChatTemplate

Span = tuple[int, int, float]  # characters [start, end) and their weight
# not the user's mistake: dropped and counted, even where other bad rows are errors
DROPPED = ("longer than max_length", "nothing to learn", "empty document")


@dataclass
class Encoded:
    """Samples of consecutive rows, laid end to end.

    ids int32 [n]; weights uint8 or float32 [n] (weight of a token as a target); lengths int64 [samples];
    rows int64 [samples]: the number of the row that each sample is from; truncated: number of samples that were cut;
    parsed: number of rows that were valid JSON, or of a format that is not JSON.
    """

    ids: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    problems: list[Problem]
    truncated: int = 0
    parsed: int = 0


@dataclass(frozen=True)
class RawRow:
    """A row to be sent to a worker: its number in the source, its place for messages, and its data."""

    number: int
    where: str
    data: Any


class Encoder:
    """Turns raw rows into samples; one per process. max_length: in tokens; None: no limit."""

    def __init__(self, tokenizer: Any, settings: DataSettings, max_length: int | None) -> None:
        self._settings, self._max_length = settings, max_length
        self._template = (
            ChatTemplate(tokenizer, settings.enable_thinking) if settings.use_chat_template else None
        )
        self._tokens = _Tokens(tokenizer)

    def check(self, rows: Sequence[RawRow]) -> list[Problem]:
        """Only look for mistakes in the format of the rows, which is cheap: for a run that has already failed."""
        return [problem for _, problem in self._conversations(rows) if isinstance(problem, Problem)]

    def encode(self, rows: Sequence[RawRow]) -> Encoded:
        """The samples of `rows`, with the problems of rows that give none."""
        problems: list[Problem] = []
        texts: list[tuple[RawRow, str, list[Span]]] = []
        parsed = 0
        for row, conversation in self._conversations(rows):
            if isinstance(conversation, Problem):
                problems.append(conversation)
                parsed += conversation.kind not in ("not JSON", "not UTF-8", "not an object")
                continue
            parsed += 1
            try:
                texts.append((row, *self._text(conversation)))
            except RowError as error:
                problems.append(Problem(row.where, error.kind, error.message))
        ids, weights, numbers, truncated = [], [], [], 0
        encoded = self._tokens(
            [text for _, text, _ in texts], [spans for _, _, spans in texts], self._template is None
        )
        for (row, _, _), (sample, weight) in zip(texts, encoded, strict=True):
            try:
                pieces = self._fit(sample, weight)
            except RowError as error:
                problems.append(Problem(row.where, error.kind, error.message))
                continue
            truncated += sum(len(piece) for piece, _ in pieces) < len(sample)
            for piece, piece_weight in pieces:
                ids.append(piece)
                weights.append(piece_weight)
                numbers.append(row.number)
        return Encoded(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            weights=np.concatenate(weights) if weights else np.zeros(0, np.uint8),
            lengths=np.array([len(x) for x in ids], np.int64),
            rows=np.array(numbers, np.int64),
            problems=problems,
            truncated=truncated,
            parsed=parsed,
        )

    def _conversations(self, rows: Sequence[RawRow]) -> list[tuple[RawRow, Conversation | Problem]]:
        found: list[tuple[RawRow, Conversation | Problem]] = []
        s = self._settings
        for row in rows:
            try:
                named = with_names(parse_row(row.data), s.model_name, s.model_author)
                found.append((row, to_conversation(named, s.columns, s.system)))
            except RowError as error:
                found.append((row, Problem(row.where, error.kind, error.message)))
        return found

    def _text(self, conversation: Conversation) -> tuple[str, list[Span]]:
        if self._template is None:
            return self._plain(conversation)
        rendered = self._template.render(conversation)
        weights = self._turn_weights(conversation)
        spans = [(start, end, w) for (start, end), w in zip(rendered.spans, weights, strict=True)]
        if self._settings.loss_scale == "all":
            spans = [(0, len(rendered.text), 1.0), *spans]  # later spans win
        return rendered.text, spans

    def _plain(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Pre-training: the messages concatenated, without a template."""
        if conversation.tools or any(turn.tool_calls for turn in conversation.turns):
            raise RowError("tool calls in plain text", "tools and tool calls need the chat template (drop "
                           "--use_chat_template false)")  # fmt: skip
        text, spans = "", []
        weights = iter(self._turn_weights(conversation))
        learn_all = self._settings.loss_scale == "all"
        for turn in conversation.turns:
            start, text = len(text), text + turn.content
            weight = next(weights) if turn.role == "assistant" else float(learn_all)
            spans.append((start, len(text), weight))
        if not text:
            raise RowError("empty document")
        return text, spans

    def _turn_weights(self, conversation: Conversation) -> list[float]:
        """Weight of each assistant turn: the strategy's or the message's own `loss`, times `loss_scale`."""
        turns = conversation.turns
        last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        weights = []
        for i in conversation.assistants():
            learnt = self._settings.loss_scale != "last_round" or i > last_user
            turn = turns[i]
            learnt = learnt if turn.loss is None else turn.loss
            weights.append(float(learnt) * (1.0 if turn.loss_scale is None else turn.loss_scale))
        return weights

    def _fit(self, ids: np.ndarray, weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Apply --truncation_strategy. Raises RowError for a sample to be dropped."""
        limit, strategy = self._max_length, self._settings.truncation_strategy
        pieces = [(ids, weights)]
        if limit is not None and len(ids) > limit:
            if strategy == "delete":
                raise RowError("longer than max_length", f"{len(ids)} tokens, more than --max_length {limit}")
            if strategy == "left":
                pieces = [(ids[-limit:], weights[-limit:])]
            elif strategy == "right":
                pieces = [(ids[:limit], weights[:limit])]
            else:
                pieces = [(ids[a : a + limit], weights[a : a + limit]) for a in range(0, len(ids), limit)]
        pieces = [(i, w) for i, w in pieces if w[1:].any()]  # the first token is never a target
        if not pieces:
            cut = " after it was cut to --max_length" if limit is not None and len(ids) > limit else ""
            raise RowError("nothing to learn", f"no token of it is learnt{cut}")
        return pieces


class _Tokens:
    """Text -> ids and weights per token. A fast tokenizer uses its own threads and gives character offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self._bos = _prefix_ids(tokenizer)
        self._fast = _untrimmed(tokenizer.backend_tokenizer) if getattr(tokenizer, "is_fast", False) else None

    def __call__(
        self, texts: list[str], spans: list[list[Span]], document: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [n], weights [n]) of each text; a `document` also gets the tokenizer's BOS and EOS."""
        if self._fast is None:
            pairs = [self._slow(text, own) for text, own in zip(texts, spans, strict=True)]
        else:
            pairs = []
            for encoding, own in zip(
                self._fast.encode_batch(texts, add_special_tokens=False), spans, strict=True
            ):
                ids = np.array(encoding.ids, np.int32)
                pairs.append((ids, _weights(encoding.offsets, len(ids), own)))
        return [self._document(*pair) for pair in pairs] if document else pairs

    def _document(self, ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = weights[-1] if len(weights) else np.uint8(1)  # EOS has the weight of the text that it ends
        if self._bos:
            ids = np.concatenate([np.array(self._bos, np.int32), ids])
            weights = np.concatenate([np.zeros(len(self._bos), weights.dtype), weights])
        if self._eos is not None and (not len(ids) or ids[-1] != self._eos):
            ids = np.append(ids, np.int32(self._eos))
            weights = np.append(weights, last)
        return ids, weights

    def _slow(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers without offsets: find a character's token by comparing the ids of the text before or after
        it with those of the whole text."""
        ids = self._ids(text)

        def place(at: int) -> int:
            before, after = self._ids(text[:at]), self._ids(text[at:])
            if len(before) <= len(ids) and np.array_equal(before, ids[: len(before)]):
                return len(before)
            if len(after) <= len(ids) and np.array_equal(after, ids[len(ids) - len(after) :]):
                return len(ids) - len(after)
            n = min(len(before), len(ids))  # a token spans the place: take the first that differs
            differ = np.flatnonzero(before[:n] != ids[:n])
            return int(differ[0]) if len(differ) else n

        weights = np.zeros(len(ids), np.float32)
        for start, end, weight in spans:
            weights[place(start) : place(end)] = weight
        return ids, _small(weights)

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _untrimmed(backend: Any) -> Any:
    """The backend, or a copy of it (a second for large vocabularies) if its offsets leave white space out."""
    state = backend.post_processor.__getstate__() if backend.post_processor is not None else b""
    if b'"trim_offsets":true' not in state and not backend.padding and not backend.truncation:
        return backend
    copy = type(backend).from_str(backend.to_str())
    copy.post_processor = None  # it trims them, and special tokens are not added anyway
    copy.no_padding()
    copy.no_truncation()
    return copy


def _weights(offsets: list[tuple[int, int]], n: int, spans: list[Span]) -> np.ndarray:
    """Weight of each token: that of the last span it overlaps."""
    weights = np.zeros(n, np.float32)
    if len(spans) == 1 and spans[0][0] == 0 and n and spans[0][1] >= offsets[-1][1]:
        weights[:] = spans[0][2]  # a whole document: no need for offsets
        return _small(weights)
    table = np.array(offsets, np.int64).reshape(n, 2)
    for start, end, weight in spans:
        first = np.searchsorted(table[:, 1], start, side="right")
        last = np.searchsorted(table[:, 0], end, side="left")
        weights[first:last] = weight
    return _small(weights)


def _small(weights: np.ndarray) -> np.ndarray:
    """The weights as uint8 if all are 0 or 1, as they nearly always are."""
    small = weights.astype(np.uint8)
    return small if np.array_equal(small, weights) and small.max(initial=0) <= 1 else weights


def _prefix_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS, for models that were trained with it)."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return full[:at]
    return []
