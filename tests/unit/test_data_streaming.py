"""Streamed rows give the samples that prepared ones give, resume at the very row, and are told of when they are bad."""

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_tokenizers import make_tokenizer

from mcore_swift.data import Prefetcher, check_sources, prepare
from mcore_swift.data.readers import read_rows, read_rows_from
from mcore_swift.data.sources import parse_source
from mcore_swift.data.streaming import chunks
from mcore_swift.data.streaming.rows import RowStream
from mcore_swift.errors import UserError

ROWS = 90


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("chatml")


@pytest.fixture
def rows(tmp_path):
    """Two files of rows of all lengths."""
    for name, first, count in (("a", 0, 50), ("b", 50, ROWS - 50)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(first, first + count):
                answer = " ".join(["number", str(i)] * (1 + i * 7 % 11))
                file.write(json.dumps({"query": f"say {i}", "response": answer}) + "\n")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def data(tokenizer, tmp_path, dataset, **flags):
    given = {
        "dataset": dataset,
        "cache_dir": str(tmp_path / "cache"),
        "max_length": 256,
        "global_batch_size": 4,
        "train_iters": 40,
        "streaming": True,
        "shuffle_buffer_size": 30,
        "dataloader_num_workers": 0,
        "padding_free": False,
    }
    args = SimpleNamespace(**(given | flags))
    return prepare(args, tokenizer, is_builder=True, barrier=lambda: None, wait_limit=60).train


def tensors(batch):
    return [batch.input_ids, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert (x is None and y is None) or x.equal(y)


def samples(batches):
    """Token ids of every sample, as tuples."""
    found = []
    for batch in batches:
        for row in range(batch.input_ids.shape[0]):
            ids = batch.input_ids[row]
            edges = batch.cu_seqlens.tolist() if batch.cu_seqlens is not None else [0, len(ids)]
            for start, end in zip(edges, edges[1:], strict=False):
                real = ids[start:end][~batch.padding[row, start:end]]
                found += [tuple(real.tolist())] if len(real) else []
    return found


IN_ORDER = {"dataset_shuffle": False, "train_dataloader_shuffle": False}
LAYOUTS = {
    "padded": {"micro_batch_size": 2},
    "packed": {"packing": True, "packing_length": 300, "padding_free": True},
    "sequential": {"packing": True, "packing_length": 300, "padding_free": True, "packing_strategy": "sequential"},
    "concat": {"packing": True, "packing_length": 300, "padding_free": True, "packing_strategy": "concat",
               "use_chat_template": False, "loss_scale": "all"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_in_order_are_those_of_prepared_data(tokenizer, tmp_path, rows, layout, monkeypatch):
    """A chunk that holds all rows is the prepared data set."""
    monkeypatch.setattr(chunks, "LONGEST_CHUNK", 1 << 40)
    flags = LAYOUTS[layout] | IN_ORDER | {"shuffle_buffer_size": 10 * ROWS}
    streamed = data(tokenizer, tmp_path, rows, **flags)
    prepared = data(tokenizer, tmp_path, rows, **flags, streaming=False, num_train_epochs=None)
    for k in range(len(prepared._order) // 4 + 3):  # into the second pass
        assert_same(streamed.step(k), prepared.step(k))
        assert streamed.info(k) == prepared.info(k)
    streamed.close()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_pass_has_every_sample_once_in_another_order(tokenizer, tmp_path, rows, layout):
    flags = LAYOUTS[layout] | {"global_batch_size": 2}
    prepared = data(tokenizer, tmp_path, rows, **flags, streaming=False, num_train_epochs=1, train_iters=None)
    expected = Counter(s for k in range(len(prepared) + 1) for s in samples(prepared.step(k)))
    expected = Counter(dict.fromkeys(expected, 1))
    assert len(expected) == ROWS
    streamed, seen, passes = data(tokenizer, tmp_path, rows, **flags), [], []
    while len(seen) < ROWS:
        k = len(passes)
        seen += samples(streamed.step(k))
        passes.append(streamed.epoch(k))
        streamed.info(k)
    assert passes == sorted(passes) and passes[-1] < 1 <= streamed.epoch(k + 1)
    assert Counter(seen[:ROWS]) == expected
    assert seen != sorted(seen, key=len) and seen[:20] != samples(prepared.step(0))[:20]
    streamed.close()
    assert not list((tmp_path / "cache").glob("stream-*")), "nothing is left behind"


def test_ranks_get_shares_of_a_step_that_does_not_depend_on_them(tokenizer, tmp_path, rows):
    one = data(tokenizer, tmp_path, rows, global_batch_size=8)
    two = data(tokenizer, tmp_path, rows, global_batch_size=8, micro_batch_size=2)
    for k in range(6):
        whole = Counter(samples(one.step(k)))
        shares = [Counter(samples(two.step(k, rank, 2))) for rank in range(2)]
        assert shares[0] + shares[1] == whole and not shares[0] & shares[1]
    for steps in (one, two):
        steps.close()


@pytest.mark.parametrize("layout", ["padded", "packed", "concat"])
@pytest.mark.parametrize("batch", [4, 2])
def test_a_resumed_stream_goes_on_at_the_very_row(tokenizer, tmp_path, rows, layout, batch):
    """Also with another global batch: what was consumed counts."""
    flags = LAYOUTS[layout] | {"micro_batch_size": 1}
    whole = data(tokenizer, tmp_path, rows, **flags)
    expected = []
    for k in range(20):
        expected.append(samples(whole.step(k)))
        whole.info(k)
        if k == 8:  # while later chunks are there already
            state = json.loads(json.dumps(whole.state_dict(9)))
    again = data(tokenizer, tmp_path, rows, **flags | {"global_batch_size": batch})
    assert again.load_state_dict(state) == []
    found = [s for k in range(9, 9 + 11 * 4 // batch) for s in samples(again.step(k))]
    assert found == [s for of_step in expected[9:] for s in of_step]
    changed = data(tokenizer, tmp_path, rows[:1], **flags)
    assert "has changed" in changed.load_state_dict(state)[0]
    for steps in (whole, again, changed):
        steps.close()


def test_a_process_of_its_own_tokenizes_no_further_than_it_is_asked_to(tokenizer, tmp_path, rows):
    inside = data(tokenizer, tmp_path, rows, shuffle_buffer_size=5)
    outside = data(tokenizer, tmp_path, rows, shuffle_buffer_size=5, dataloader_num_workers=2)
    folder = outside._source.folder
    with Prefetcher(outside.step, 0, 30, workers=2, ahead=2) as batches:
        for k, of_step in batches:
            assert samples(of_step) == samples(inside.step(k))
            outside.info(k)
            # asked for: the steps ahead; beyond them two chunks, and the one that the last step was in
            assert len(list(folder.glob("chunk-*"))) <= (4 + 2) * 4 // 5 + 2 + 2
    process = outside._source._process
    outside.close()
    assert process.poll() is not None and not folder.exists()
    inside.close()


def test_bad_rows_are_left_out_and_counted_or_stop_the_run(tokenizer, tmp_path, rows, caplog):
    bad = tmp_path / "bad.jsonl"
    lines = Path(rows[0]).read_text().splitlines()
    bad.write_text(
        "\n".join(
            [*lines[:3], "{broken", *lines[3:], json.dumps({"query": "long", "response": "x y " * 400})]
        )
    )
    steps = data(tokenizer, tmp_path, [str(bad)])
    with caplog.at_level("WARNING"):
        assert len({s for k in range(12) for s in samples(steps.step(k))}) == 48
    steps.close()
    assert "bad.jsonl:4: not JSON" in caplog.text
    strict = data(tokenizer, tmp_path, [str(bad)], strict=True)
    with pytest.raises(UserError, match=r"bad.jsonl:4: not JSON"):
        strict.step(0)
    strict.close()
    nothing = data(tokenizer, tmp_path, rows, max_length=3)
    with pytest.raises(UserError, match="no row can be used"):
        nothing.step(0)
    nothing.close()


def test_waiting_for_rows_has_a_limit(tokenizer, tmp_path, rows):
    steps = data(tokenizer, tmp_path, rows)
    steps._source._made, steps._source.limit = None, 0.1  # as a process that does not read itself
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not read and tokenized within"):
        steps.step(0)
    assert time.monotonic() - started < 5
    steps.close()


def test_weights_mix_sources_and_the_first_n_rows_are_taken(rows):
    sources = [parse_source(f"{rows[0]}#4"), parse_source(rows[1])]
    stream = RowStream(sources, [3, 1], seed=1)
    drawn, states = [], []
    for _ in range(40):
        states.append(stream.state())
        drawn.append(stream.next())
    names = [file.name for file, _ in drawn]
    assert all(abs(names[:n].count("a.jsonl") - 0.75 * n) <= 1 for n in range(1, 41))
    assert [row.line for file, row in drawn if file.name == "a.jsonl"] == [1, 2, 3, 4] * 7 + [1, 2]
    again = RowStream(sources, [3, 1], seed=1)
    again.seek(json.loads(json.dumps(states[17])))
    assert [again.next() for _ in range(23)] == drawn[17:]


def test_files_of_every_format_are_gone_on_with_in_their_middle(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"row {i}"} for i in range(25)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "x.txt").write_text("\n".join(row["text"] for row in rows))
    (tmp_path / "x.csv").write_text("\n".join(["text", *(row["text"] for row in rows)]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=7)
    for path in sorted(tmp_path.iterdir()):
        expected = list(read_rows(path))
        places = list(read_rows_from(path))
        assert [row for row, _ in places] == expected and len(expected) == 25
        for at in (0, 13, 24):
            assert [row for row, _ in read_rows_from(path, places[at][1])] == expected[at + 1 :]


def test_what_a_stream_cannot_be_is_refused(tokenizer, tmp_path, rows):
    with pytest.raises(UserError, match="train_iters"):
        data(tokenizer, tmp_path, rows, train_iters=None)
    (tmp_path / "x.idx").write_bytes(b"")
    args = SimpleNamespace(dataset=[str(tmp_path / "x.idx")], streaming=True, use_chat_template=False)
    assert any("token ids" in str(error) for error in check_sources(args))


def test_a_process_that_is_killed_is_told_of(tokenizer, tmp_path, rows):
    steps = data(tokenizer, tmp_path, rows, shuffle_buffer_size=5, dataloader_num_workers=1)
    steps.step(0)
    steps._source._process.kill()
    with pytest.raises(UserError, match="was killed .exit code -9."):
        steps.step(20)
    steps.close()
