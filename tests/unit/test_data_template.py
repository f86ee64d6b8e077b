"""The learnt tokens are what `{% generation %}` marks in transformers; the ids are those of the whole rendering."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_tokenizers import TEMPLATES, make_tokenizer

from mcore_swift.data.encode import Encoder, RawRow
from mcore_swift.data.rows import to_conversation
from mcore_swift.data.settings import DataSettings
from mcore_swift.data.template import ChatTemplate
from mcore_swift.errors import UserError

SHARED = Path(os.environ.get("MCORE_SWIFT_SHARED", Path(__file__).parents[3] / "shared"))


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = {
    "one turn": turns("What is two plus three?", "It is five."),
    "three turns": turns("hello", "hello to you", "why?", "because", "Yes?", "No."),
    "system": turns("hello", "hello", "Is it?", "It is.", system="Say hello."),
    "the answer is in the prompt": turns(
        "It is five. It is five.", "It is five.", "It is five.", "It is five."
    ),
    "template words in the text": turns("assistant\nuser", "\nassistant\n", "[/INST] </s", "S: A: user"),
    "white space around": turns(" hello \n", "\n  five \n\n", "why? ", " because\n"),
    "begins as a tag": turns("hello", "<b>five</b>", "why?", "<think"),
    "empty answer": turns("hello", "", "why?", "because"),
    "many bytes": turns("日本語 🙂", "🙂🙂 ü", "é", "naïve 日本"),
    "thoughts": turns("hello", "<think>\nwhy\n</think>\n\nfive", "Is it?", "<think>\nthen\n</think>\n\nYes."),
    "ends with the user": turns("hello", "five", "why?"),
}


def encode(tokenizer, messages, **settings):
    settings = DataSettings(**settings)
    encoded = Encoder(tokenizer, settings, None).encode([RawRow(0, "here:1", {"messages": messages})])
    assert not encoded.problems, encoded.problems
    return encoded.ids, encoded.weights


def expected(tokenizer, messages, **kwargs):
    """ids, and transformers' own mask of what the template marks as generated."""
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    return np.array(out["input_ids"]), np.array(out["assistant_masks"])


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_mask_is_what_the_template_generates(template, name):
    tokenizer = make_tokenizer(template, trim=False)  # transformers' mask needs offsets that are whole
    messages = CONVERSATIONS[name]
    ids, mask = expected(tokenizer, messages)
    got_ids, got_mask = encode(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    np.testing.assert_array_equal(got_ids, tokenizer(text, add_special_tokens=False)["input_ids"])
    np.testing.assert_array_equal(got_ids, ids)
    learnt = [tokenizer.decode([i]) for i in ids[mask == 1]]
    assert [tokenizer.decode([i]) for i in got_ids[got_mask == 1]] == learnt
    np.testing.assert_array_equal(got_mask, mask)
    assert mask.any()


def test_offsets_trimmed_of_white_space_change_nothing():
    messages = CONVERSATIONS["white space around"]
    ids, mask = encode(make_tokenizer("chatml", trim=False), messages)
    trimmed_ids, trimmed_mask = encode(make_tokenizer("chatml", trim=True), messages)
    np.testing.assert_array_equal(trimmed_ids, ids)
    np.testing.assert_array_equal(trimmed_mask, mask)


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "thinking"])
def test_tokenizer_without_offsets_gives_the_same(template):
    class Slow:
        """The same tokenizer, seen as one of Python: no offsets."""

        is_fast = False

        def __init__(self, fast):
            self._fast = fast

        def __getattr__(self, name):
            return getattr(self._fast, name)

        def __call__(self, text, **kwargs):
            return self._fast(text, **kwargs)

    fast = make_tokenizer(template, trim=False)
    for name in ("three turns", "system", "the answer is in the prompt", "many bytes"):
        for one, other in zip(
            encode(fast, CONVERSATIONS[name]), encode(Slow(fast), CONVERSATIONS[name]), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_tool_calls_are_learnt_and_responses_are_not():
    tokenizer = make_tokenizer("mistral", trim=False)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {
        "tools": tools,
        "messages": [
            {"role": "user", "content": "two plus three?"},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 3}}'},
            {"role": "tool_response", "content": '"5"'},
            {"role": "assistant", "content": "five"},
            {"role": "user", "content": "why?"},
            {"role": "assistant", "content": "because"},
        ],
    }
    conversation = to_conversation(row, {})
    chat = [turn.chat() for turn in conversation.turns]
    assert [len(turn.tool_calls) for turn in conversation.turns] == [
        0,
        2,
        0,
        0,
        0,
        0,
    ]  # parallel calls are one turn
    ids, mask = expected(tokenizer, chat, tools=tools)
    encoded = Encoder(tokenizer, DataSettings(), None).encode([RawRow(0, "here:1", row)])
    np.testing.assert_array_equal(encoded.ids, ids)
    np.testing.assert_array_equal(encoded.weights, mask)


def test_a_template_that_leaves_tool_calls_out_is_refused():
    messages = [
        {"role": "user", "content": "two plus three?"},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {}}'},
    ]
    rows = [RawRow(0, "f.jsonl:7", {"messages": messages})]
    (problem,) = Encoder(make_tokenizer("chatml"), DataSettings(), None).encode(rows).problems
    assert "f.jsonl:7" in str(problem) and "leaves tool calls out" in str(problem)


def test_what_the_template_says_about_a_row_reaches_the_user():
    row = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    (problem,) = (
        Encoder(make_tokenizer("llama2"), DataSettings(), None).encode([RawRow(0, "f:3", row)]).problems
    )
    assert "f:3" in str(problem) and "roles must alternate" in str(problem)


def learnt_text(messages, **settings):
    tokenizer = make_tokenizer("chatml", trim=False)
    ids, weights = encode(tokenizer, messages, **settings)
    return tokenizer.decode(ids[weights > 0]), weights


def test_base_strategies():
    messages = turns("one?", "1", "two?", "2")
    assert learnt_text(messages)[0] == "1<|im_end|>2<|im_end|>"
    assert learnt_text(messages, loss_scale="last_round")[0] == "2<|im_end|>"
    assert learnt_text(messages, loss_scale="all")[1].all()


def test_loss_of_a_message_comes_before_the_strategy():
    messages = turns("one?", "1", "two?", "2")
    messages[1]["loss"], messages[3]["loss"] = True, False
    for strategy in ("default", "last_round"):
        assert learnt_text(messages, loss_scale=strategy)[0] == "1<|im_end|>"
    text, weights = learnt_text(messages, loss_scale="all")
    assert "1<|im_end|>" in text and "2<|im_end|>" not in text and "two?" in text


def test_loss_scale_of_a_message_is_its_weight():
    messages = turns("one?", "1", "two?", "2")
    messages[3]["loss_scale"] = 2.5
    _, weights = learnt_text(messages)
    assert weights.dtype == np.float32 and sorted(set(weights.tolist())) == [0.0, 1.0, 2.5]


def test_system_of_the_row_then_of_the_run():
    tokenizer = make_tokenizer("chatml")
    messages = turns("q", "a")
    assert "RUN" in tokenizer.decode(encode(tokenizer, messages, system="RUN")[0])
    text = tokenizer.decode(encode(tokenizer, turns("q", "a", system="ROW"), system="RUN")[0])
    assert "ROW" in text and "RUN" not in text


def test_no_chat_template_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match="no chat template") as error:
        ChatTemplate(make_tokenizer(None))
    assert "use_chat_template false" in error.value.remedy


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_learnt_whole_and_ends_with_eos(bos):
    tokenizer = make_tokenizer(None, bos=bos)
    ids, weights = encode(
        tokenizer, [{"role": "assistant", "content": "Why, then?"}], use_chat_template=False
    )
    whole = tokenizer("Why, then?", add_special_tokens=True)["input_ids"] + [tokenizer.eos_token_id]
    np.testing.assert_array_equal(ids, whole)
    assert weights[1:].all()  # the first token is nobody's target


# --- the real tokenizer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3():
    folder = SHARED / "tokenizers" / "qwen3"
    if not folder.is_dir():
        pytest.skip("no Qwen3 tokenizer here")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def qwen3_learnt(tokenizer, row, **settings):
    encoded = Encoder(tokenizer, DataSettings(**settings), None).encode([RawRow(0, "here:1", row)])
    assert not encoded.problems, encoded.problems
    conversation = to_conversation(row, {}, settings.get("system"))
    chat = [turn.chat() for turn in conversation.turns]
    kwargs = conversation.template_kwargs
    text = tokenizer.apply_chat_template(chat, tools=conversation.tools, tokenize=False, **kwargs)
    np.testing.assert_array_equal(encoded.ids, tokenizer(text, add_special_tokens=False)["input_ids"])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.weights, [0]])))
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def test_qwen3_turns(qwen3):
    row = {"messages": turns("q1", "<think>\nt1\n</think>\n\na1", "q2", "a2")}
    assert qwen3_learnt(qwen3, row) == ["a1<|im_end|>", "a2<|im_end|>"]
    row = {"messages": turns("q1", "a1", "q2", "<think>\nt2\n</think>\n\na2")}
    assert qwen3_learnt(qwen3, row) == ["a1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]
    row = {"messages": turns("q1", "<b>1", "q2", "<b>2"), "chat_template_kwargs": {"enable_thinking": False}}
    assert qwen3_learnt(qwen3, row) == ["<b>1<|im_end|>", "<b>2<|im_end|>"]


def test_qwen3_tools(qwen3):
    def call(name):
        return {"role": "tool_call", "content": f'{{"name": "{name}", "arguments": {{"x": "é"}}}}'}

    row = {
        "tools": '[{"name": "f", "parameters": {}}]',
        "messages": [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "<think>\nt1\n</think>\n\nlet me see"},
            *(call("f"), call("g")),
            *({"role": "tool", "content": "r1"}, {"role": "tool", "content": "r2"}),
            {"role": "assistant", "content": "a1"},
            {"role": "user", "content": "<tool_response>not one</tool_response>"},
            {"role": "assistant", "content": "a2"},
        ],
    }
    calls = [f'<tool_call>\n{{"name": "{n}", "arguments": {{"x": "é"}}}}\n</tool_call>' for n in "fg"]
    answer = "<think>\nt1\n</think>\n\nlet me see\n" + "\n".join(calls) + "<|im_end|>"
    assert qwen3_learnt(qwen3, row) == [answer, "a1<|im_end|>", "a2<|im_end|>"]
