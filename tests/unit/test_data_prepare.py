"""From files to steps: what is trained on, the token cache, and what the user is told when rows are bad."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_tokenizers import make_tokenizer

from mcore_swift.data import cache, prepare
from mcore_swift.data.locks import lock
from mcore_swift.errors import UserError

TOKENIZER = make_tokenizer("chatml")


def answer(i):
    return "five " * (i % 7 + 1) + str(i)


def write(path, n=40, start=0):
    rows = [{"query": f"What is {i}?", "response": answer(i)} for i in range(start, start + n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path):
    """prepare() with a cache of the test's own: run(dataset, ...) -> PreparedData."""

    def go(*dataset, tokenizer=TOKENIZER, is_builder=True, barrier=lambda: None, output_dir=None, **args):
        defaults = {"num_train_epochs": 1, "global_batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        args = SimpleNamespace(dataset=[str(path) for path in dataset], **(defaults | args))
        options = {"is_builder": is_builder, "barrier": barrier, "output_dir": output_dir}
        return prepare(args, tokenizer, lock_limit=0.3, **options)

    return go


def texts(steps):
    """What the samples of a Steps or EvalSteps say, in the order of the store."""
    return [TOKENIZER.decode(steps.store.ids(i)) for i in range(len(steps.store))]


def numbers(steps):
    """The row numbers that `write` has put into the samples."""
    return [int(text.split("What is ")[1].split("?")[0]) for text in texts(steps)]


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())


def test_samples_are_the_rows_in_order(run, tmp_path):
    data = run(write(tmp_path / "a.jsonl"))
    assert numbers(data.train) == list(range(40))
    chat = [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": answer(3)}]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    np.testing.assert_array_equal(
        data.train.store.ids(3), TOKENIZER(text, add_special_tokens=False)["input_ids"]
    )
    report = data.report.train
    assert (report.rows, report.samples) == (40, 40) and report.tokens == data.train.store.lengths.sum()
    assert report.learnt_tokens == sum(data.train.store.weights(i).sum() for i in range(40))
    assert data.val is None and data.train.total_steps == 10


def test_several_sources_are_joined(run, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    write(folder / "b.jsonl", 3, start=100)
    write(folder / "c.jsonl", 2, start=200)
    data = run(write(tmp_path / "a.jsonl", 2), folder)
    assert numbers(data.train) == [0, 1, 100, 101, 102, 200, 201]


def test_number_of_rows(run, tmp_path):
    path = write(tmp_path / "a.jsonl", 10)
    some = numbers(run(f"{path}#4").train)
    assert len(set(some)) == 4 and some == sorted(some) and some != [0, 1, 2, 3]
    assert numbers(run(f"{path}#4").train) == some
    assert numbers(run(f"{path}#4", data_seed=1).train) != some
    assert numbers(run(f"{path}#4", dataset_shuffle=False).train) == [0, 1, 2, 3]
    more = numbers(run(f"{path}#23").train)
    assert sorted(np.bincount(more)) == [2] * 7 + [3] * 3 and more[:20] == [*range(10), *range(10)]
    mixed = numbers(run(f"{path}#13", write(tmp_path / "b.jsonl", 3, start=50)).train)
    assert len(mixed) == 16 and mixed[-3:] == [50, 51, 52]


def test_split_is_disjoint_seeded_and_saved(run, tmp_path):
    path, out = write(tmp_path / "a.jsonl", 40), tmp_path / "out"
    for _ in range(2):  # the second from the cache
        data = run(f"{path}#80", split_dataset_ratio=0.25, output_dir=out)
        held_back, trained = numbers(data.val), numbers(data.train)
        assert len(held_back) == 10 and not set(held_back) & set(trained)
        assert sorted(trained) == sorted(2 * sorted(set(range(40)) - set(held_back)))
        saved = [json.loads(line) for line in (out / "val_dataset.jsonl").read_text().splitlines()]
        assert [row["query"] for row in saved] == [f"What is {i}?" for i in held_back]
        (out / "val_dataset.jsonl").unlink()
    assert numbers(run(path, split_dataset_ratio=0.25, data_seed=1).val) != held_back
    assert numbers(run(path, split_dataset_ratio=0.25, dataset_shuffle=False).val) == list(range(30, 40))
    with pytest.raises(UserError, match="leaves none to train on"):
        run(write(tmp_path / "one.jsonl", 1), split_dataset_ratio=0.5)


def test_validation_set_of_its_own(run, tmp_path):
    path, val = write(tmp_path / "a.jsonl", 8), write(tmp_path / "v.jsonl", 6, start=60)
    data = run(path, val_dataset=[str(val)])
    assert numbers(data.train) == list(range(8)) and numbers(data.val) == list(range(60, 66))
    assert data.val.total_steps == 2


def test_packed_rows_hold_every_token_once(run, tmp_path):
    path = write(tmp_path / "a.jsonl")
    plain = run(path)
    for strategy in ("binpack", "sequential"):
        for _ in range(2):  # the second with the saved plan
            packed = run(path, packing=True, max_length=100, packing_strategy=strategy, global_batch_size=1)
            rows = [packed.train.step(k)[0] for k in range(packed.train.total_steps)]
            assert {tuple(row.input_ids.shape) for row in rows} == {(1, 100)}
            ids = [row.input_ids[0, : row.num_tokens].tolist() for row in rows]
            expected = sorted(x for i in range(40) for x in plain.train.store.ids(i).tolist())
            assert sorted(x for row in ids for x in row) == expected
            assert (
                sum(row.num_samples for row in rows) == 40 and packed.report.packs["train"] == len(rows) < 40
            )
    with pytest.raises(UserError, match="below --max_length 100"):
        run(path, packing=True, max_length=100, packing_length=50)


def test_ranks_without_the_builder_get_the_same(run, tmp_path):
    path = write(tmp_path / "a.jsonl")
    builder, other = run(path), run(path, is_builder=False)
    for k in range(builder.train.total_steps):
        assert (
            builder.train.step(k, 1, 2)[0].input_ids.tolist()
            == other.train.step(k, 1, 2)[0].input_ids.tolist()
        )


def test_a_builder_that_fails_meets_the_others_all_the_same(run, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "response": "a"}\n{"query": "q"}\n')
    met = []
    with pytest.raises(UserError, match="a.jsonl:2: no assistant turn"):
        run(path, barrier=lambda: met.append("builder"))
    with pytest.raises(UserError, match="was not built"):
        run(path, is_builder=False, barrier=lambda: met.append("other"))
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "none.jsonl", barrier=lambda: met.append("early"))
    assert met == ["builder", "other", "early"]


# --- bad rows ---------------------------------------------------------------------------------------------------


def bad_rows(path, n=3):
    lines = ['{"query": "q", "response": "a"}', '{"query": ', '{"query": "only"}', "[1]"] * n
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("strict", [None, True])
def test_bad_rows_are_errors_told_together(run, tmp_path, strict):
    path = bad_rows(tmp_path / "a.jsonl")
    other = tmp_path / "b.jsonl"
    other.write_text('{"query": "q", "response": "a"}\n{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(UserError) as error:
        run(path, other, strict=strict)
    text = str(error.value)
    for line in (2, 6, 10):
        assert f"{path}:{line}: not JSON" in text and f"{path}:{line + 1}: no assistant turn" in text
        assert f"{path}:{line + 2}: a row is an object {{...}}, this is an array" in text
    assert f"{other}:2: no assistant turn" in text and "--strict false" in text
    assert folders(tmp_path) == []


def test_a_long_list_of_bad_rows_is_cut(run, tmp_path):
    with pytest.raises(UserError) as error:
        run(bad_rows(tmp_path / "a.jsonl", n=1000))
    text = str(error.value)
    assert text.count("a.jsonl:") == 20 and "and 2980 more rows" in text


def test_strict_false_drops_and_counts(run, tmp_path):
    for _ in range(2):  # the counts stay with the cache
        data = run(bad_rows(tmp_path / "a.jsonl"), strict=False)
        assert data.report.train.dropped == {"not JSON": 3, "no assistant turn": 3, "not an object": 3}
        assert data.report.train.samples == 3
        text = "\n".join(data.report.lines())
        assert "dropped 3 rows: not JSON; e.g. " in text and "a.jsonl:2: not JSON" in text
    with pytest.raises(UserError):  # and do not pass for a run that wants all rows
        run(tmp_path / "a.jsonl")


def test_nothing_left_is_an_error_even_then(run, tmp_path):
    no_json = tmp_path / "a.jsonl"
    no_json.write_text("hello\n" * 3)
    with pytest.raises(UserError, match=r"a.jsonl:1: not JSON"):
        run(no_json, strict=False)
    no_answers = tmp_path / "b.jsonl"
    no_answers.write_text('{"query": "q"}\n' * 3)
    with pytest.raises(UserError, match="no row of --dataset .* is left .3 rows: no assistant turn"):
        run(no_answers, strict=False)
    with pytest.raises(UserError, match="none of its 30 rows is JSON"):
        many = tmp_path / "c.jsonl"
        many.write_text("{\n" * 30)
        run(write(tmp_path / "d.jsonl", 3), many, strict=False, columns=None)


def test_truncation(run, tmp_path):
    path = write(tmp_path / "a.jsonl")
    lengths = run(path).train.store.lengths
    limit = int(np.median(lengths))
    long = int((lengths > limit).sum())
    deleted = run(path, max_length=limit)
    assert deleted.report.train.dropped == {"longer than max_length": long}
    assert deleted.train.store.lengths.tolist() == lengths[lengths <= limit].tolist()
    whole = run(path).train.store
    for side, part in [("left", slice(-limit, None)), ("right", slice(limit))]:
        cut = run(path, max_length=limit, truncation_strategy=side)
        assert cut.report.train.truncated == long and len(cut.train.store) == 40
        for i in range(40):
            np.testing.assert_array_equal(cut.train.store.ids(i), whole.ids(i)[part])
            np.testing.assert_array_equal(cut.train.store.weights(i), whole.weights(i)[part])
    nothing = run(path, max_length=6, truncation_strategy="right", strict=False) if limit < 6 else None
    assert nothing is None
    with pytest.raises(UserError, match="nothing to learn"):
        run(path, max_length=6, truncation_strategy="right")
    with pytest.raises(UserError, match="raise --max_length|longer than max_length"):
        run(path, max_length=6)


def test_split_cuts_documents_and_loses_nothing(run, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("What is it? " * 30 + "\n\n" + "five\n")
    data = run(path, use_chat_template=False, max_length=16, truncation_strategy="split")
    store = data.train.store
    assert store.lengths.max() == 16
    whole = [
        TOKENIZER(t)["input_ids"] + [TOKENIZER.eos_token_id] for t in (("What is it? " * 30).strip(), "five")
    ]
    pieces = [piece for ids in whole for i in range(0, len(ids), 16) if len(piece := ids[i : i + 16]) > 1]
    assert [store.ids(i).tolist() for i in range(len(store))] == pieces


# --- the cache --------------------------------------------------------------------------------------------------


def contents(store):
    return [(store.ids(i).tolist(), store.weights(i).tolist()) for i in range(len(store))]


def test_a_cache_hit_is_what_a_rebuild_gives(run, tmp_path):
    path = write(tmp_path / "a.jsonl")
    first, hit = run(path), run(path)
    assert not first.report.from_cache["train"] and hit.report.from_cache["train"]
    assert hit.report.train == first.report.train and hit.train.fingerprint == first.train.fingerprint
    rebuilt = run(path, load_from_cache_file=False)
    assert not rebuilt.report.from_cache["train"]
    assert contents(first.train.store) == contents(hit.train.store) == contents(rebuilt.train.store)
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(path.read_bytes())
    assert run(copy, dataset_num_proc=2, data_seed=5).report.from_cache["train"]  # same rows, same tokens


def test_what_changes_tokens_changes_the_key(run, tmp_path):
    path = write(tmp_path / "a.jsonl")
    base = run(path)
    others = [
        run(path, system="s"),
        run(path, max_length=25),
        run(path, max_length=25, truncation_strategy="left"),
        run(path, loss_scale="all"),
        run(path, use_chat_template=False),
        run(path, columns={"query": "system"}),
        run(path, strict=False),
        run(f"{path}#7"),
        run(path, tokenizer=make_tokenizer("llama3")),
    ]
    path.write_text(path.read_text().replace("five", "four", 1))
    others.append(run(path))
    assert not any(other.report.from_cache["train"] for other in others)
    assert len({base.train.fingerprint, *(other.train.fingerprint for other in others)}) == len(others) + 1


def test_weights_that_are_no_flags_are_kept(run, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": [turns[0], turns[1] | ({"loss_scale": 1.5} if i == 600 else {})]} for i in range(700)
    ]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )  # the weight comes in the second block of rows
    store = run(path).train.store
    assert [store.weights(i).max() for i in (0, 599, 600, 601)] == [1.0, 1.0, 1.5, 1.0]
    assert store.meta["weights"] == "float32" and len(store) == 700


@pytest.mark.parametrize("damage", ["bits", "short", "no meta", "old format"])
def test_a_broken_cache_is_built_again(run, tmp_path, damage):
    path = write(tmp_path / "a.jsonl")
    first = run(path)
    expected, folder = contents(first.train.store), Path(first.report.cache["train"])
    del first
    ids, meta = folder / "ids.bin", folder / "meta.json"
    if damage == "bits":
        data = bytearray(ids.read_bytes())
        data[8] ^= 1
        ids.write_bytes(data)
    elif damage == "short":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text(meta.read_text().replace('"format": 1', '"format": 0'))
    again = run(path)
    assert not again.report.from_cache["train"] and contents(again.train.store) == expected
    assert folders(tmp_path) == [folder.name]


KILLED = """
import sys, time
sys.path[:0] = sys.argv[3:]
from types import SimpleNamespace
from data_tokenizers import make_tokenizer
from mcore_swift.data import build, prepare
append = build.TokenWriter.append
def slow(self, encoded):
    append(self, encoded)
    print("written", flush=True)
    time.sleep(60)
build.TokenWriter.append = slow
args = SimpleNamespace(dataset=[sys.argv[1]], num_train_epochs=1, global_batch_size=4, cache_dir=sys.argv[2])
prepare(args, make_tokenizer("chatml"), is_builder=True, barrier=lambda: None)
"""


def test_a_kill_while_writing_leaves_no_cache(run, tmp_path):
    path = write(tmp_path / "a.jsonl", 1000)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "cache"), *paths]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "written\n"
        left_over = folders(tmp_path)
        with pytest.raises(
            UserError, match=rf"waited .* for process {process.pid} on .*tokenizes the same data"
        ):
            run(path)  # it holds the lock
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert len(left_over) == 1 and ".tmp-" in left_over[0]
    with pytest.raises(UserError, match="was not built"):
        run(path, is_builder=False)
    data = run(path)  # the lock went with its holder
    assert not data.report.from_cache["train"] and len(data.train.store) == 1000
    assert folders(tmp_path) == [Path(data.report.cache["train"]).name]  # nothing is left lying about


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_one_message_and_nothing_half_written(run, tmp_path, monkeypatch, code):
    path = write(tmp_path / "a.jsonl", 1200)
    written = []

    def write_some(self, array, write=cache._File.write):
        written.append(self.path)
        if len(written) > 5:
            raise OSError(code, os.strerror(code))
        write(self, array)

    monkeypatch.setattr(cache._File, "write", write_some)
    with pytest.raises(UserError) as error:
        run(path)
    assert str(tmp_path / "cache") in error.value.message and "--cache_dir" in error.value.remedy
    assert ("disk is full" in error.value.message) == (code == errno.ENOSPC)
    assert folders(tmp_path) == []


def test_default_place_follows_the_environment(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MCORE_SWIFT_CACHE", str(tmp_path / "mine"))
    data = run(write(tmp_path / "a.jsonl", 4), cache_dir=None)
    assert Path(data.report.cache["train"]).parent == tmp_path / "mine" / "tokens"


def test_processes_give_what_one_gives(run, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", 1200)  # three blocks
    with path.open("a") as file:
        file.write('{"query": "q"}\n')
    one = run(path, strict=False)
    monkeypatch.setattr("mcore_swift.data.build._POOL_WORTH", 0)
    two = run(path, strict=False, dataset_num_proc=2, load_from_cache_file=False)
    assert contents(one.train.store) == contents(two.train.store)
    assert one.report.train.dropped == two.report.train.dropped == {"no assistant turn": 1}
    with pytest.raises(UserError, match="a.jsonl:1201: no assistant turn"):
        run(path, dataset_num_proc=2)


def test_lock_waits_for_its_turn(tmp_path):
    with lock(tmp_path / "l", 1, "x"):
        start = time.monotonic()
        with pytest.raises(UserError, match="waited .* s for process"), lock(tmp_path / "l", 0.1, "x"):
            raise AssertionError("held twice")
        assert 0.1 <= time.monotonic() - start < 5
    with lock(tmp_path / "l", 0, "x"):
        pass
