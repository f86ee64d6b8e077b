"""Files to rows to conversations, and what the user is told when that fails."""

import csv
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mcore_swift.data import check_sources
from mcore_swift.data.problems import RowError
from mcore_swift.data.readers import count_rows, parse_row, read_rows
from mcore_swift.data.rows import to_conversation
from mcore_swift.data.sources import parse_source
from mcore_swift.errors import UserError

ROWS = [{"query": f"q {i}", "response": f'a "{i}",\nline ü'} for i in range(5)]


def write(path, rows=ROWS):
    """`rows` in the format of the extension."""
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def args(*dataset, **other):
    return SimpleNamespace(dataset=[str(path) for path in dataset], **other)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}")
    assert [parse_row(row.data) for row in read_rows(path)] == ROWS
    assert count_rows(path) == len(ROWS)
    assert check_sources(args(path)) == []


def test_json_may_hold_one_object_a_line_or_spread_out(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    spread = tmp_path / "spread.json"
    spread.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    for path in (lines, spread):
        assert [parse_row(row.data) for row in read_rows(path)] == ROWS


def test_lines_are_counted_in_every_text_format(tmp_path):
    assert [row.line for row in read_rows(write(tmp_path / "a.jsonl"))] == [1, 3, 5, 7, 9]
    array = tmp_path / "a.json"
    array.write_text('[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}\n]')
    assert [row.line for row in read_rows(array)] == [2, 4, 5]
    assert [row.line for row in read_rows(write(tmp_path / "a.csv"))] == [2, 4, 6, 8, 10]


def test_array_larger_than_a_block_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_swift.data.readers._BLOCK", 64)
    rows = [{"text": "x" * n, "n": n} for n in range(0, 400, 7)]
    path = write(tmp_path / "big.json", rows)
    assert [row.data for row in read_rows(path)] == rows
    assert [row.line for row in read_rows(path)] == [2 + 4 * i for i in range(len(rows))]


def test_txt_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  \ntwo \n")
    assert [(row.line, row.data) for row in read_rows(path)] == [(1, {"text": "one"}), (4, {"text": "two"})]


def test_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.json", "sub/c.csv"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [path.name for path in parse_source(str(tmp_path)).files] == ["a.json", "b.jsonl", "c.csv"]


def test_number_sign_takes_rows_unless_it_is_part_of_the_name(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert parse_source(f"{path}#12").take == 12
    odd = write(tmp_path / "b#3.jsonl")
    assert parse_source(str(odd)).take is None
    with pytest.raises(UserError, match="takes no row"):
        parse_source(f"{path}#0")


def test_all_wrong_sources_are_told_together(tmp_path):
    write(tmp_path / "train.jsonl")
    broken = tmp_path / "broken.json"
    broken.write_text('[\n{"a": 1},\n{"a" 2}\n]')
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"query": \n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "data.xyz").touch()
    (tmp_path / "none").mkdir()
    names = ("trian.jsonl", "bad.jsonl", "empty.jsonl", "data.xyz", "none")
    text = "\n".join(
        map(str, check_sources(args(*(tmp_path / n for n in names), "org/data", "ms::org/other#5")))
    )
    assert "trian.jsonl: no such file" in text and f"did you mean {tmp_path / 'train.jsonl'}" in text
    assert f"{bad}:2: not JSON" in text
    assert "empty.jsonl: the file has no rows" in text
    assert "extension .xyz is unknown" in text and ".parquet" in text
    assert "none: the folder holds no file of rows" in text
    assert (
        "org/data" in text
        and "only local paths are read" in text
        and "--repo-type dataset org/other " in text
    )
    with pytest.raises(UserError, match=r"broken.json:3: not JSON"):
        list(read_rows(broken))


def test_cut_off_array_is_an_error(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text('[{"a": 1},\n {"a": 2}')
    with pytest.raises(UserError, match=r"cut.json:2.* ends within the array"):
        list(read_rows(path))


def test_ragged_csv_row_is_the_mistake_of_one_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("query,response\nq,a\nq,a,b\nq,a\n")
    rows = list(read_rows(path))
    assert parse_row(rows[0].data) == {"query": "q", "response": "a"} and rows[1].line == 3
    with pytest.raises(RowError, match="3 values under 2 columns"):
        parse_row(rows[1].data)


def test_unknown_names_in_columns(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert check_sources(args(path, columns={"query": "query"})) == []
    (error,) = check_sources(args(path, columns='{"qery": "query"}'))
    assert "'qery'" in error.message and "query, response" in error.remedy
    (error,) = check_sources(args(path, columns='{"qery"'))
    assert "--columns is not JSON" in error.message


def test_check_is_quick_and_needs_no_heavy_import(tmp_path):
    path = write(tmp_path / "a.jsonl")
    code = (
        "import sys; from types import SimpleNamespace; from mcore_swift.data import check_sources;"
        f"assert check_sources(SimpleNamespace(dataset=[{str(path)!r}])) == [];"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    big = tmp_path / "big.jsonl"
    big.write_text('{"query": "q", "response": "a"}\n' * 300_000)
    start = time.perf_counter()
    assert check_sources(args(big)) == []
    assert time.perf_counter() - start < 0.1  # reads one line of it, not 300,000


# --- rows -------------------------------------------------------------------------------------------------------


def said(row, columns=None, system=None):
    return [(turn.role, turn.content) for turn in to_conversation(row, columns or {}, system).turns]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "model", "content": "a"},
            ]
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"query": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a", "id": 5},
        {"problem": "q", "solution": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"input": "q", "answers": ["a", "b"]},
    ],
)
def test_formats(row):
    assert said(row) == QA


def test_alpaca_joins_instruction_and_input():
    assert said({"instruction": "i", "input": "x", "output": "y"}) == [("user", "i\nx"), ("assistant", "y")]


def test_history_and_system():
    row = {"system": "s", "query": "q2", "response": "a2", "history": [["q1", "a1"]]}
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert said(row) == [("system", "s"), *turns]
    assert said({"query": "q", "response": "a"}, system="run") == [("system", "run"), *QA]
    own = {"messages": [{"role": "system", "content": "own"}, *({"role": r, "content": c} for r, c in QA)]}
    assert said(own, system="run")[0] == ("system", "own")


def test_columns_rename():
    assert (
        said({"Frage": "q", "Antwort": "a", "query": "other"}, {"Frage": "query", "Antwort": "response"})
        == QA
    )


def test_neighbouring_answers_are_one():
    roles = [("user", "q"), ("assistant", "a"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in roles]}
    assert said(row) == [("user", "q"), ("assistant", "ab")]


def test_tool_calls_of_every_spelling_are_the_same():
    function = {"name": "f", "arguments": {"x": 1}}
    text = json.dumps(function)
    spellings = [
        [{"role": "tool_call", "content": text}, {"role": "tool_response", "content": "r"}],
        [{"from": "function_call", "value": text}, {"from": "observation", "value": "r"}],
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "tool", "content": "r"},
        ],
        [
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "r"},
        ],
        [
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "call00000", "name": "f", "input": {"x": 1}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "call00000", "content": "r"}],
            },
        ],
    ]
    user = {"role": "user", "content": "q"}
    chats = [
        [turn.chat() for turn in to_conversation({"messages": [user, *spelling]}, {}).turns]
        for spelling in spellings
    ]
    call = {"id": "call00000", "type": "function", "function": function}
    assert chats[0][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chats[0][2] == {"role": "tool", "content": "r", "name": "f", "tool_call_id": "call00000"}
    assert all(chat == chats[0] for chat in chats)


def test_bare_function_specifications_are_wrapped():
    function = {"name": "f", "parameters": {}}
    for tools in ([function], json.dumps([function]), [{"type": "function", "function": function}]):
        assert to_conversation({"query": "q", "response": "a", "tools": tools}, {}).tools == [
            {"type": "function", "function": function}
        ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"id": 5, "question": "q"}, r"no assistant turn.*id, question.*--columns"),
        ({"query": "q", "response": ""}, "column response is empty"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "message 1 has the unknown role 'robot'"),
        ({"messages": [{"content": "q"}]}, "message 1 has no role"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "message 2 has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content .its keys: role"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}},
            "chosen and rejected are for preference learning",
        ),
        ({"messages": "no json"}, "column messages is text that is not JSON"),
        ({"messages": [{"role": "tool_call", "content": "{"}]}, "message 1: the tool call is not JSON"),
        (
            {"messages": [{"role": "user", "content": "q", "loss": True}]},
            "only assistant messages can be learnt",
        ),
        ({"query": "<image>", "response": "a", "images": ["a.png"]}, "the row has images"),
        ({"query": "q", "response": "a", "history": ["q1"]}, "history is not a list of pairs"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, says):
    with pytest.raises(RowError) as error:
        to_conversation(row, {})
    import re

    assert re.search(says, error.value.message)
