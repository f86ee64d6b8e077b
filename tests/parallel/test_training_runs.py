"""The same run gives the same numbers, however it is computed; other settings give what they promise."""

import math

import pytest
from tiny import curve, eval_losses, rows_of, stored
from training_plan import STEPS


def test_two_identical_runs_agree_in_every_bit(trained):
    """'one' and 'one-async' train alike and differ in how they save."""
    assert curve(trained["one"]) == curve(trained["one-async"])
    assert sorted(curve(trained["one"])) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("layout", ["tp2", "tp2-pp2", "pp2-vpp2", "dp2", "dp2-whole"])
def test_the_layout_does_not_change_the_curve(trained, layout):
    one, other = curve(trained["one"]), curve(trained[layout])
    assert one.keys() == other.keys()
    for step, (loss, norm) in one.items():
        # sums in another order, grown over six steps of Adam
        assert other[step][0] == pytest.approx(loss, rel=1e-5), step
        assert other[step][1] == pytest.approx(norm, rel=1e-4), step


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputing_activations_changes_nothing(trained, granularity):
    """Not a bit: the same operations run again on the same values."""
    assert curve(trained[granularity]) == curve(trained["one"])


def test_communication_behind_computation_changes_nothing(trained):
    """Nor what is saved, although a step leaves its weights to be gathered by the next forward pass."""
    assert curve(trained["dp2-overlap"]) == curve(trained["dp2-bf16"])
    last, other = (stored(trained[name] / f"checkpoint-{STEPS}") for name in ("dp2-bf16", "dp2-overlap"))
    assert last.keys() == other.keys()
    assert [key for key in last if not last[key].equal(other[key])] == []


def test_bf16_trains(trained):
    losses = [row["loss"] for row in rows_of(trained["bf16"])]
    assert len(losses) == 15
    assert losses[-1] < 0.85 * losses[0]
    bf16, fp32 = (curve(trained[name])[1][0] for name in ("bf16", "one"))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=1e-2)  # 8 bits of mantissa


def test_epochs_and_iterations_are_two_names_of_one_length(trained):
    epochs, iterations = rows_of(trained["epochs"]), rows_of(trained["iterations"])
    assert curve(trained["epochs"]) == curve(trained["iterations"])
    # 90 rows twice, 30 a step
    assert [row["step"] for row in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[2]["epoch"] == 1.0 and epochs[-1]["epoch"] == 2.0
    assert [row["loss"] for row in epochs] == [row["loss"] for row in iterations]
    saved = sorted(path.name for path in trained["epochs"].glob("checkpoint-*"))
    assert saved == ["checkpoint-3", "checkpoint-6"], "--save_strategy epoch"


def test_a_run_that_has_stalled_stops_early(trained):
    """Weights that do not move: no checkpoint is better than the first."""
    saved = sorted(path.name for path in trained["stalled"].glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3"], (
        "the best one and --early_stop_interval 2"
    )
    assert sorted(curve(trained["stalled"])) == [1, 2, 3]


def test_equal_samples_have_one_loss_however_they_are_laid_out(trained):
    packed, end_to_end, padded = (
        curve(trained[f"eight-{how}"])[1] for how in ("packed", "end-to-end", "padded")
    )
    rows = [rows_of(trained[f"eight-{how}"])[0] for how in ("packed", "end-to-end", "padded")]
    assert [row["consumed_samples"] for row in rows] == [1, 8, 8]
    assert rows[2]["padding_share"] > rows[1]["padding_share"], "lengths differ, so padding does"
    for loss, norm in (end_to_end, padded):
        # the same terms added in another order
        assert loss == pytest.approx(packed[0], rel=1e-6)
        assert norm == pytest.approx(packed[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["random-tp2", "random-pp2"])
def test_random_weights_are_the_same_in_every_layout(trained, layout):
    loss, norm = curve(trained["random"])[1]
    assert curve(trained[layout])[1] == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5))


def test_random_weights_follow_the_seed_and_know_nothing(trained):
    first, second = (curve(trained[name])[1][0] for name in ("random", "other-random"))
    assert first != second
    from arithmetic_demo import make_tokenizer

    # small random weights predict every token alike
    assert first == pytest.approx(math.log(len(make_tokenizer())), rel=0.1)


def test_evaluation_counts_each_row_once_and_no_filling(trained):
    """13 rows by fours leave three rows of filling, at once none."""
    by_four, at_once = (eval_losses(trained[name])[1] for name in ("eval-by-four", "eval-at-once"))
    assert by_four == pytest.approx(at_once, rel=1e-6)
