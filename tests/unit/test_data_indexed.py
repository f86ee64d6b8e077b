"""Datasets of token ids: as megatron-core writes and reads them, cut, streamed, and refused when broken."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_tokenizers import make_tokenizer

from mcore_swift.data import prepare
from mcore_swift.data.check import check_sources
from mcore_swift.data.corpora import IndexedStore, JoinedStore, StreamStore
from mcore_swift.data.indexed import IndexedTokens, write_indexed
from mcore_swift.data.sources import parse_source
from mcore_swift.errors import UserError

DOCUMENTS = [[5, 6, 7], list(range(20, 45)), [], [9], list(range(100, 113))]
VOCABULARY = 200


@pytest.fixture
def prefix(tmp_path):
    write_indexed(tmp_path / "corpus", DOCUMENTS, np.uint16)
    return tmp_path / "corpus"


def store(prefix, documents=None, max_length=10, how="delete", vocab_size=VOCABULARY):
    return IndexedStore(prefix.with_suffix(".idx"), documents, max_length, how, vocab_size)


def samples(store):
    return [list(map(int, store.ids(sample))) for sample in range(len(store.lengths))]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_core_writes_is_read(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])  # a document of two sequences
    builder.add_document(torch.tensor([6]), [1])
    builder.add_item(torch.tensor([7, 8]))
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    found = IndexedTokens(tmp_path / "theirs.idx")
    documents = [
        found.tokens[start : start + length].tolist()
        for start, length in zip(found.starts, found.lengths, strict=True)
    ]
    assert documents == [[1, 2, 3, 4, 5], [6], [7, 8]] and found.tokens.dtype == dtype


def test_megatron_core_reads_what_is_written(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(str(prefix))
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]


def test_documents_are_cut_at_max_length(prefix):
    long = DOCUMENTS[1]
    pieces = [[5, 6, 7], long[:10], long[10:20], long[20:], DOCUMENTS[4][:10], DOCUMENTS[4][10:]]
    cut = store(prefix)
    assert samples(cut) == pieces and cut.lengths.tolist() == [len(piece) for piece in pieces]
    assert (cut.report.rows, cut.report.samples, cut.report.tokens, cut.report.truncated) == (5, 6, 41, 0)
    assert cut.report.dropped == {"nothing to learn": 2}  # the empty one and that of one token
    assert store(prefix, how="right").report.truncated == 2
    assert samples(store(prefix, how="right")) == [[5, 6, 7], long[:10], DOCUMENTS[4][:10]]
    assert samples(store(prefix, how="left")) == [[5, 6, 7], long[-10:], DOCUMENTS[4][-10:]]
    assert samples(store(prefix, max_length=None)) == [DOCUMENTS[0], long, DOCUMENTS[4]]
    assert samples(store(prefix, documents=np.array([4, 0]))) == [*pieces[4:], [5, 6, 7]]


@pytest.mark.parametrize("length", [2, 7, 16, 41, 100])
def test_rows_of_a_stream_share_one_token_and_leave_none_out(prefix, length):
    base = store(prefix, max_length=None)
    rows = samples(StreamStore(base, length, None))
    flat = [token for document in samples(base) for token in document]
    assert rows[0] + [token for row in rows[1:] for token in row[1:]] == flat
    assert all(len(row) == length for row in rows[:-1]) and 2 <= len(rows[-1]) <= length
    shuffled = StreamStore(base, length, 3)
    again = samples(shuffled)
    assert sorted(again[0] + [token for row in again[1:] for token in row[1:]]) == sorted(flat)
    assert [len(shuffled.weights(row)) for row in range(len(again))] == [len(row) for row in again]


def test_several_stores_are_numbered_one_after_the_other(prefix):
    joined = JoinedStore([store(prefix), store(prefix, how="right")])
    assert samples(joined) == samples(store(prefix)) + samples(store(prefix, how="right"))
    assert joined.report.samples == 9 and joined.report.dropped == {"nothing to learn": 4}


def test_an_id_beyond_the_vocabulary_is_named(prefix):
    with pytest.raises(UserError, match=r"corpus\.bin: token 112 \(document 4\).*vocabulary has 112"):
        store(prefix, vocab_size=112).check()
    store(prefix, vocab_size=113).check()


def broken(prefix, how):
    idx, binary = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    data = bytearray(idx.read_bytes())
    if how == "no bin":
        binary.unlink()
    elif how == "short bin":
        binary.write_bytes(binary.read_bytes()[:-2])
    elif how == "short idx":
        data = data[:-8]
    elif how == "other magic":
        data[:9] = b"NOTMMIDX0"
    elif how == "other version":
        data[9] = 7
    elif how == "floats":
        data[17] = 7
    elif how == "header only":
        data = data[:20]
    elif how == "pointers":
        struct.pack_into("<q", data, 34 + 4 * 5 + 8, 1)
    elif how == "documents":
        struct.pack_into("<q", data, 34 + 12 * 5, 1)
    idx.write_bytes(data)
    return {"no bin": binary, "short bin": binary}.get(how, idx)


BROKEN = {
    "no bin": "no such file",
    "short bin": "has 82 bytes, and corpus.idx describes 84",
    "short idx": "is cut short",
    "other magic": "is no index",
    "other version": "version 7",
    "floats": "no integer type",
    "header only": "is cut short",
    "pointers": "do not lie end to end",
    "documents": "document index",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_refused_before_anything_starts(prefix, how):
    path = broken(prefix, how)
    args = SimpleNamespace(dataset=[str(prefix)], use_chat_template=False)
    (error,) = check_sources(args)
    assert str(path) in error.message and BROKEN[how] in error.message and error.remedy


@pytest.mark.parametrize("end", ["", ".bin", ".idx", "#3"])
def test_all_ways_to_name_it(prefix, end):
    source = parse_source(f"{prefix}{end}")
    assert source.is_indexed and source.files == (prefix.with_suffix(".idx"),)
    assert source.take == (3 if end == "#3" else None)


def test_fine_tuning_refuses_token_ids(prefix):
    (error,) = check_sources(SimpleNamespace(dataset=[str(prefix)]))
    assert "megatron pt" in error.remedy


def prepared(tmp_path, *datasets, **flags):
    values = {
        "dataset": list(map(str, datasets)), "use_chat_template": False, "loss_scale": "all", "max_length": 10,
        "global_batch_size": 2, "train_iters": 4, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    args = SimpleNamespace(**(values | flags))
    return prepare(args, make_tokenizer(), is_builder=True, barrier=lambda: None, output_dir=tmp_path / "out")


def tokens_of(steps, k):
    rows = []
    for batch in steps.step(k):
        rows += [int(token) for token in batch.input_ids[0][: batch.num_tokens]]
    return rows


def test_steps_on_token_ids_beside_rows_of_text(tmp_path, prefix):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(4)))
    data = prepared(tmp_path, prefix, tmp_path / "rows.jsonl", train_dataloader_shuffle=False)
    assert data.report.train.rows == 9 and data.report.train.samples == 10
    assert tokens_of(data.train, 0) == DOCUMENTS[0] + DOCUMENTS[1][:10]
    assert [line.split(":")[0] for line in data.report.corpora] == [str(prefix), str(tmp_path / "rows.jsonl")]
    batch = data.train.step(0)[0]
    assert batch.labels[0, :3].tolist() == [6, 7, 0] and batch.loss_mask[0, :3].tolist() == [1, 1, 0]


def test_a_stream_fills_every_row(tmp_path, prefix):
    flags = {"packing": True, "packing_strategy": "concat", "train_dataloader_shuffle": False}
    data = prepared(tmp_path, prefix, **flags)
    flat = [token for number in (0, 1, 4) for token in DOCUMENTS[number]]
    assert data.report.packs == {"train": 5}
    assert tokens_of(data.train, 0) == flat[:10] + flat[9:19]
    batch = data.train.step(0)[0]
    assert batch.cu_seqlens.tolist() == [0, 10] and batch.labels[0, 2] == DOCUMENTS[1][0]


def test_some_documents_are_held_back(tmp_path, prefix):
    data = prepared(tmp_path, prefix, split_dataset_ratio=0.4, max_length=30)
    assert data.report.train.rows == 3 and data.report.val.rows == 2
    assert data.report.train.tokens + data.report.val.tokens == 41


def test_ids_of_another_tokenizer_are_refused(tmp_path, prefix):
    write_indexed(prefix, [[1, 2, 60000]], np.uint16)
    with pytest.raises(UserError, match=r"token 60000 \(document 0\) is no id of the model"):
        prepared(tmp_path, prefix)
