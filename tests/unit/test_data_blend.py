"""Blends: in proportion at every moment, ended as asked, the same for any number of ranks and after a resume."""

import json
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from data_tokenizers import make_tokenizer

from mcore_swift.config import MegatronPretrainArguments, parse
from mcore_swift.data import prepare
from mcore_swift.data.blend import Blended
from mcore_swift.errors import UserError

CASES = [((30, 50), (0.5, 0.5)), ((30, 50), (7, 3)), ((10, 200, 35), (0.2, 0.7, 0.1)), ((1, 9), (1, 2))]


def corpora_of(blend, sizes, places):
    return np.searchsorted(np.cumsum(sizes), blend.units(np.asarray(places)), side="right")


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("sizes, weights", CASES)
def test_units_come_when_they_are_due_until_the_epoch_ends(sizes, weights, stopping):
    """Against the definition, in exact fractions, one unit at a time."""
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    taken, expected = [0] * len(sizes), []
    while True:
        due = [(count + Fraction(1, 2)) / share for count, share in zip(taken, shares, strict=True)]
        corpus = due.index(min(due))
        if stopping == "first_exhausted" and taken[corpus] == sizes[corpus]:
            break
        taken[corpus] += 1
        expected.append(corpus)
        if stopping == "all_exhausted" and all(n >= size for n, size in zip(taken, sizes, strict=True)):
            break
    blend = Blended(sizes, weights, stopping, seed=1, shuffle=True)
    assert len(blend) == len(expected) and blend.counts.tolist() == taken
    found = corpora_of(blend, sizes, range(len(blend)))
    # where two are due at the same time, floating point may take the other one first
    assert Counter(found.tolist()) == Counter(expected)
    for n in range(1, len(blend) + 1):
        counts = np.bincount(found[:n], minlength=len(sizes))
        assert np.abs(counts - n * blend.weights).max() < 1.5, n


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("sizes, weights", CASES)
def test_every_corpus_goes_on_where_it_was(sizes, weights, stopping):
    """Over many epochs no unit of a corpus comes more than once more often than another of the same corpus."""
    blend = Blended(sizes, weights, stopping, seed=1, shuffle=True)
    found = Counter(blend.units(np.arange(7 * len(blend))).tolist())
    start = 0
    for size in sizes:
        often = [found[unit] for unit in range(start, start + size)]
        assert max(often) - min(often) <= 1
        start += size


def test_a_tiny_weight_of_a_large_corpus_is_refused():
    with pytest.raises(UserError, match="a large corpus has a small weight"):
        Blended((10, 10**6), (1, 1e-9), "all_exhausted", 1, True)


@pytest.fixture
def files(tmp_path):
    """Two corpora, whose words tell them apart: 12 rows of a, 40 of b."""
    for name, rows in (("a", 12), ("b", 40)):
        lines = [json.dumps({"text": f"{name} {n} " + name * (n % 7)}) for n in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def prepared(tmp_path, files, **flags):
    values = {
        "dataset": files, "use_chat_template": False, "loss_scale": "all", "max_length": 24,
        "global_batch_size": 4, "train_iters": 40, "cache_dir": str(tmp_path / "cache"),
        "interleave_prob": [3, 1],
    }  # fmt: skip
    return prepare(
        SimpleNamespace(**(values | flags)), make_tokenizer(), is_builder=True, barrier=lambda: None
    )


def step_of(steps, k, dp_size=1):
    """Tokens of the samples of a step, sorted."""
    found = []
    for rank in range(dp_size):
        for batch in steps.step(k, rank, dp_size):
            edges = [edge for edge in batch.cu_seqlens.tolist() if edge <= batch.num_tokens]
            ids = batch.input_ids[0].tolist()
            found += [tuple(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return sorted(found)


@pytest.mark.parametrize("packing", ["binpack", "concat", None])
def test_a_blend_of_files(tmp_path, files, packing):
    flags = {"packing": True, "packing_strategy": packing} if packing else {}
    steps = prepared(tmp_path, files, **flags).train
    all_of_them = [step_of(steps, k) for k in range(40)]
    assert all_of_them == [step_of(prepared(tmp_path, files, **flags).train, k, 4) for k in range(40)]
    resumed = prepared(tmp_path, files, **flags).train
    assert resumed.load_state_dict(steps.state_dict(17)) == []
    assert [step_of(resumed, k) for k in range(17, 40)] == all_of_them[17:]
    letters = make_tokenizer().decode([token for step in all_of_them for row in step for token in row])
    if packing is None:  # three samples of a for each of b
        assert letters.count("a ") == 3 * letters.count("b ")
    else:  # three packed rows: more or less of the tokens
        assert 2 < letters.count("a ") / letters.count("b ") < 6
    other = prepared(tmp_path, files, **flags, stopping_strategy="all_exhausted").train
    assert "has changed" in other.load_state_dict(steps.state_dict(17))[0]


def test_the_report_tells_the_share_of_each_corpus(tmp_path, files):
    data = prepared(tmp_path, files)
    first, second = data.report.corpora
    assert first.startswith(f"{files[0]}: weight 0.75, ") and ", 1 times in an epoch" in first
    assert second.startswith(f"{files[1]}: weight 0.25, ") and ", 0.1 times in an epoch" in second
    taken = [
        sum(batch.num_tokens for k in range(4) for batch in data.train.step(k)),
        data.train.units.tokens.sum(),
    ]
    assert len(data.train._order) == 16 and taken[0] < taken[1]
    assert all(line in "\n".join(data.report.lines()) for line in data.report.corpora)


def test_new_weights_use_the_same_tokens(tmp_path, files):
    prepared(tmp_path, files)
    assert prepared(tmp_path, files, interleave_prob=[1, 9]).report.from_cache == {"train": True}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--interleave_prob", "0.5"], "1 weights, and --dataset 2 values"),
        (["--interleave_prob", "0.5", "-1"], "above 0"),
        (["--data_path", "0.3", "a", "0.7", "b"], "their weights to --interleave_prob"),
        (["--stopping_strategy", "never"], "stopping_strategy cannot be 'never'"),
    ],
)
def test_weights_that_make_no_sense(flags, words):
    argv = ["--model", "m", "--dataset", "a", "b", "--train_iters", "1", *flags]
    with pytest.raises(UserError) as caught:
        parse(MegatronPretrainArguments, argv, notify=lambda line: None)
    assert words in str(caught.value)
