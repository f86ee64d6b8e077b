"""Steps: what a rank gets is a function of (seed, epoch, sample) alone, and every batch says the truth about itself."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mcore_swift.data.packing import pack, single
from mcore_swift.data.prefetch import Prefetcher
from mcore_swift.data.settings import DataSettings
from mcore_swift.data.steps import EvalSteps, Layout, Steps
from mcore_swift.errors import UserError

PAD = 99


class Store:
    """Samples whose tokens tell which sample they are of: 1000 * sample + position; even positions are targets."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def ids(self, sample):
        return (1000 * sample + np.arange(self.lengths[sample])).astype(np.int32)

    def weights(self, sample):
        return (np.arange(self.lengths[sample]) % 2 == 0).astype(np.uint8)


def make(cls=Steps, n=37, layout="free", multiple=1, capacity=40, uniform=True, segment=1, **settings):
    lengths = np.random.default_rng(0).integers(2, 30, n)
    settings = DataSettings(**({"global_batch_size": 8, "num_train_epochs": 3} | settings))
    units = pack(lengths, capacity, "binpack", None) if layout == "packed" else single(lengths)
    how = Layout(
        layout != "padded", capacity if layout == "packed" else None, multiple, PAD, uniform, segment
    )
    extra = {"fingerprint": "f"} if cls is Steps else {}
    return cls(Store(lengths), units, settings, how, **extra)


def samples_of(batch):
    """The samples in a batch, by their first tokens, checking that each is whole."""
    found = []
    for row in range(batch.input_ids.shape[0]):
        ids = batch.input_ids[row]
        starts = ((batch.position_ids[row] == 0) & (ids != PAD)).nonzero().flatten().tolist()
        found += [int(ids[start]) // 1000 for start in starts]
    assert len(found) == batch.num_samples
    return found


def of_step(steps, k, dp_size=1):
    return [s for rank in range(dp_size) for batch in steps.step(k, rank, dp_size) for s in samples_of(batch)]


@pytest.mark.parametrize("layout", ["free", "padded", "packed"])
def test_samples_of_a_step_do_not_depend_on_ranks_or_microbatches(layout):
    for k in (0, 3, 7):
        expected = sorted(of_step(make(layout=layout), k))
        for micro, dp in [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1), (1, 8)]:
            assert sorted(of_step(make(layout=layout, micro_batch_size=micro), k, dp)) == expected


@pytest.mark.parametrize("layout", ["free", "padded", "packed"])
@pytest.mark.parametrize("n", [37, 5])
def test_every_sample_once_an_epoch(layout, n):
    steps = make(layout=layout, n=n, micro_batch_size=2)
    epochs = 4
    total = epochs * len(steps.units)
    seen = [u for k in range(-(-total // 8)) for u in steps._units(k).tolist()][:total]
    for epoch in range(epochs):
        ours = seen[epoch * len(steps.units) : (epoch + 1) * len(steps.units)]
        assert sorted(ours) == list(range(len(steps.units)))
    assert n == 5 or seen[: len(steps.units)] != seen[len(steps.units) : 2 * len(steps.units)]


def test_order_of_the_files_without_shuffling():
    steps = make(train_dataloader_shuffle=False)
    assert [s for k in range(9) for s in of_step(steps, k)] == [i % 37 for i in range(72)]


def test_one_shape_a_step_on_all_ranks_rounded_up():
    for layout in ("free", "padded", "packed"):
        steps = make(layout=layout, micro_batch_size=2, multiple=8)
        for k in range(4):
            shapes = {tuple(b.input_ids.shape) for rank in range(4) for b in steps.step(k, rank, 4)}
            assert shapes == {steps.info(k).shape} and steps.info(k).shape[1] % 8 == 0
            if layout == "packed":
                assert shapes == {(1, 80)}  # two rows of 40 tokens, whatever is in them


@pytest.mark.parametrize("layout", ["free", "padded"])
def test_shapes_of_their_own_need_less_padding_and_hold_the_same(layout):
    uniform, own = (make(layout=layout, micro_batch_size=2, multiple=4, uniform=u) for u in (True, False))
    for k in range(4):
        assert own.info(k).padding_share < uniform.info(k).padding_share
        for one, other in zip(uniform.step(k, 1, 2), own.step(k, 1, 2), strict=True):
            assert samples_of(one) == samples_of(other) and other.input_ids.shape[1] % 4 == 0
            longest = max(other.num_tokens if layout == "free" else n for n in lengths_in(other))
            assert longest <= other.input_ids.shape[1] < longest + 4


def lengths_in(batch):
    return [int((row != PAD).sum()) for row in batch.input_ids]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("layout", ["free", "padded", "packed"])
def test_tensors_say_what_the_sample_is(layout, uniform):
    steps = make(layout=layout, micro_batch_size=4, multiple=4, uniform=uniform)
    for k in range(6):
        for batch in steps.step(k):
            assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
            assert batch.loss_mask.dtype == torch.float32
            b, s = batch.input_ids.shape
            real = 0
            for row in range(b):
                edges = [0, s] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
                assert (
                    edges[0] == 0
                    and edges[-1] == s
                    and all(x < y for x, y in zip(edges, edges[1:], strict=False))
                )
                for start, end in zip(edges, edges[1:], strict=False):
                    ids = batch.input_ids[row, start:end]
                    assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
                    length = int((ids != PAD).sum())
                    assert batch.cu_seqlens is None or length in (0, end - start)
                    real += length
                    mask = batch.loss_mask[row, start:end]
                    # position t is learnt if token t + 1 is a target: even places of the sample, and not past its end
                    expected = [float(t + 1 < length and (t + 1) % 2 == 0) for t in range(end - start)]
                    assert mask.tolist() == expected
                    labels = batch.labels[row, start:end]
                    assert (labels[mask == 0] == 0).all()
                    assert (labels[:-1][mask[:-1] == 1] == ids[1:][mask[:-1] == 1]).all()
            assert real == batch.num_tokens
            if batch.cu_seqlens is not None:
                assert b == 1 and batch.cu_seqlens.dtype == torch.int32
                assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


def test_info_counts_what_the_batches_hold():
    for layout in ("free", "padded", "packed"):
        steps = make(layout=layout, micro_batch_size=2)
        batches = steps.step(2)
        info = steps.info(2)
        assert info.num_samples == sum(b.num_samples for b in batches)
        assert info.num_tokens == sum(b.num_tokens for b in batches)
        lengths = [int(steps.store.lengths[s]) for b in batches for s in samples_of(b)]
        assert info.sum_of_squares == sum(n * n for n in lengths)
        assert info.padding_share == pytest.approx(
            1 - info.num_tokens / sum(b.input_ids.numel() for b in batches)
        )


def test_samples_of_like_length_are_spread_to_need_little_padding():
    balanced = make(n=400, micro_batch_size=4, global_batch_size=64)
    shares = [balanced.info(k).padding_share for k in range(5)]
    assert max(shares) < 0.1  # taken as they come, rows of four such samples are a quarter padding


def test_number_of_steps():
    assert make(num_train_epochs=3).total_steps == 3 * 37 // 8
    assert make(num_train_epochs=0.5).total_steps == 2
    assert make(num_train_epochs=1, train_iters=5).total_steps == 5
    assert make(n=3, num_train_epochs=1).total_steps == 1
    with pytest.raises(UserError, match="when to stop"):
        make(num_train_epochs=None)


def test_few_samples_for_a_batch_are_told():
    told = []
    lengths = np.array([3, 4, 5])
    settings = DataSettings(global_batch_size=8, num_train_epochs=1)
    Steps(Store(lengths), single(lengths), settings, Layout(True, None, 1, PAD), "f", told.append)
    assert len(told) == 1 and "only 3 samples" in told[0]


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match="3 data-parallel ranks") as error:
        make(micro_batch_size=2).step(0, 0, 3)
    assert "--global_batch_size 12" in error.value.remedy


def equal(one, other):
    for a, b in zip(one, other, strict=True):
        for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_resume_is_the_run_that_was_not_interrupted():
    whole = make()
    resumed = make()
    assert resumed.load_state_dict(whole.state_dict(6)) == []
    assert resumed.total_steps == whole.total_steps
    for k in range(6, 10):
        equal(resumed.step(k), whole.step(k))


def test_resume_with_another_batch_size_goes_on_after_the_samples_consumed():
    whole = make(train_dataloader_shuffle=True)
    flow = [u for k in range(20) for u in whole._units(k).tolist()]
    resumed = make(global_batch_size=5)
    (warning,) = resumed.load_state_dict(whole.state_dict(4))
    assert "takes 5 samples, and 8 when" in warning and "32 samples" in warning
    assert [u for k in (4, 5, 6) for u in resumed._units(k).tolist()] == flow[32:47]
    assert resumed.total_steps == 4 + (3 * 37 - 32) // 5
    again = make(global_batch_size=8)  # and back, in a second resume
    again.load_state_dict(resumed.state_dict(6))
    assert again._units(6).tolist() == flow[42:50]
    with pytest.raises(ValueError, match="before step 6"):
        again.step(5)


def test_resume_on_other_data_is_told():
    state = make().state_dict(2) | {"fingerprint": "other", "num_samples": 40}
    (warning,) = make().load_state_dict(state)
    assert "data" in warning and "37 samples now, 40 then" in warning


@pytest.mark.parametrize("layout", ["free", "padded", "packed"])
def test_evaluation_takes_every_sample_once(layout):
    for micro, dp in [(1, 1), (2, 2), (4, 2)]:
        steps = make(EvalSteps, layout=layout, micro_batch_size=micro)
        seen = [s for k in range(steps.total_steps) for s in of_step(steps, k, dp)]
        assert sorted(seen) == list(range(37))
        last = [steps.step(steps.total_steps - 1, rank, dp) for rank in range(dp)]
        assert {len(batches) for batches in last} == {
            8 // micro // dp
        }  # pipelines want the same number each step
        filling = [b for batches in last for b in batches if b.num_samples == 0]
        assert all(b.loss_mask.sum() == 0 and b.num_tokens == 0 for b in filling)
    with pytest.raises(IndexError):
        steps.step(steps.total_steps)


# --- prefetch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_gives_the_steps_in_order(workers):
    steps = make()
    with steps.prefetch(3, 9, workers=workers) as ahead:
        for expected, (k, batches) in zip(range(3, 9), ahead, strict=True):
            assert k == expected
            equal(batches, steps.step(k))


def test_prefetch_measures_the_wait_and_hides_work():
    def slow(k):
        time.sleep(0.1)
        return [k]

    with Prefetcher(slow, 0, 4, workers=1, ahead=2) as ahead:
        next(ahead)
        assert ahead.wait_seconds > 0.05  # nothing was ready yet
        time.sleep(0.35)
        next(ahead)
        assert ahead.wait_seconds < 0.05  # prepared while the loop did something else


def test_prefetch_raises_where_the_step_is_taken_and_leaves_no_thread():
    def make_step(k):
        if k == 2:
            raise OSError("disk gone")
        return [k]

    before = threading.active_count()
    with Prefetcher(make_step, 0, 10, workers=2) as ahead:
        assert [next(ahead)[0], next(ahead)[0]] == [0, 1]
        with pytest.raises(OSError, match="disk gone"):
            next(ahead)
    assert threading.active_count() == before


def test_prefetch_waits_no_longer_than_its_limit():
    release = threading.Event()
    ahead = Prefetcher(lambda k: release.wait(10), 0, 2, limit=0.05)
    with pytest.raises(TimeoutError, match="step 0 were not ready"):
        next(ahead)
    release.set()
    ahead.close()


def test_settings_read_a_namespace():
    settings = DataSettings.from_args(
        SimpleNamespace(dataset="a.jsonl", data_seed=None, seed=7, columns=None)
    )
    assert settings.dataset == ("a.jsonl",) and settings.data_seed == 7 and settings.columns == {}


@pytest.mark.parametrize("layout", ["free", "padded", "packed"])
def test_samples_padded_each_for_itself_stay_where_they_are_planned(layout):
    """As context parallelism needs it: chunks of every segment, and the same packs as without."""
    options = {"layout": layout, "micro_batch_size": 2, "uniform": False}
    plain, steps = make(**options), make(multiple=16, segment=8, **options)
    longer = 0
    for k in range(5):
        info = steps.info(k)
        places = 0
        for before, batch in zip(plain.step(k), steps.step(k), strict=True):
            assert samples_of(batch) == samples_of(before)
            assert batch.num_tokens == before.num_tokens == int((batch.input_ids != PAD).sum())
            assert int((batch.loss_mask != 0).sum()) == int((before.loss_mask != 0).sum())
            assert batch.input_ids.shape[1] % 16 == 0
            places += batch.input_ids.numel()
            if layout == "padded":
                continue
            assert not (batch.cu_seqlens % 8).any() and batch.cu_seqlens[-1] == batch.input_ids.shape[1]
            longer += batch.input_ids.shape[1] > 2 * 40
            for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
        assert info.padding_share == pytest.approx(1 - info.num_tokens / places)
    assert layout != "packed" or longer, "a full pack takes more than its 40 places a row"
