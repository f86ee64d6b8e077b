"""A resumed run is the run that was not interrupted: bit for bit in its layout, to fp32 noise in any other."""

import json

import pytest
from tiny import curve, rows_of, stored
from training_plan import COPIED, SAVED, STEPS

SAME_LAYOUT = {
    "tp2-pp2-again": ("tp2-pp2", SAVED),
    "tp2-dp2-bf16-again": ("tp2-dp2-bf16", SAVED),
    "tp2-again": ("tp2", SAVED),
    "cp2-again": ("cp2", SAVED),
    "dp2-bf16-again": ("dp2-bf16", SAVED),
    "pp2-vpp2-again": ("pp2-vpp2", SAVED),
    "one-again": ("one", 4),
    "one-async-again": ("one", 4),
    "sgd-again": ("sgd", SAVED),
}
OTHER_LAYOUT = {
    "tp2-pp2-to-dp2": "tp2-pp2",
    "tp2-pp2-to-one": "tp2-pp2",
    "pp2-vpp2-to-tp2": "pp2-vpp2",
    "tp2-pp2-to-cp2": "tp2-pp2",
    "cp2-to-one": "cp2",
    "pp2-first-to-letters": "pp2-first",
    "spread-to-whole": "dp2",
    "whole-to-spread": "dp2-whole",
}


@pytest.mark.parametrize("again", SAME_LAYOUT)
def test_in_the_same_layout_bit_for_bit(trained, again):
    base, step = SAME_LAYOUT[again]
    whole, resumed = curve(trained[base]), curve(trained[again])
    assert sorted(resumed) == list(range(step + 1, STEPS + 1))
    assert resumed == {k: whole[k] for k in resumed}
    last, other = (stored(trained[name] / f"checkpoint-{STEPS}") for name in (base, again))
    assert last.keys() == other.keys()
    assert any(key.startswith("optimizer.") for key in last)
    assert [key for key in last if not last[key].equal(other[key])] == []


@pytest.mark.parametrize("resumed", OTHER_LAYOUT)
def test_in_another_layout_to_fp32_noise(trained, resumed):
    whole, other = curve(trained[OTHER_LAYOUT[resumed]]), curve(trained[resumed])
    assert sorted(other) == list(range(SAVED + 1, STEPS + 1))
    for step, (loss, norm) in other.items():
        # Sums in another order differ by some 1e-7 of a value; three steps of Adam, which divides by the root of
        # a second moment, let that grow a little.
        assert loss == pytest.approx(whole[step][0], rel=2e-6), step
        assert norm == pytest.approx(whole[step][1], rel=2e-5), step


def test_context_parallelism_changes_neither_the_packs_nor_the_curve(trained):
    whole, cut = curve(trained["tp2-pp2"]), curve(trained["cp2"])
    for step, (loss, norm) in whole.items():  # fp32 noise over six steps of Adam, as above
        assert cut[step] == (pytest.approx(loss, rel=2e-6), pytest.approx(norm, rel=2e-5)), step


def test_the_optimizer_matters(trained):
    """The two tests above would notice if its state were lost."""
    whole, without = curve(trained["tp2-pp2"]), curve(trained["without-optimizer"])
    assert without[SAVED + 1][0] == pytest.approx(whole[SAVED + 1][0], rel=2e-6)  # the weights are there
    assert abs(without[STEPS][0] / whole[STEPS][0] - 1) > 1e-3


@pytest.mark.parametrize("copy", COPIED)
def test_loading_and_saving_in_another_layout_changes_no_bit(trained, copy):
    """Weights, fp32 main weights and both moments, each tensor as a whole."""
    original = trained[COPIED[copy]] / f"checkpoint-{SAVED}"
    before, after = stored(original), stored(trained[copy] / f"checkpoint-{SAVED}")
    for name in ("exp_avg", "exp_avg_sq") + (("fp32_param",) if "bf16" in copy else ()):
        moments = [key for key in before if key.startswith(f"optimizer.{name}.")]
        assert len(moments) == sum(not key.startswith("optimizer.") for key in before)
        assert any(before[key].any() for key in moments)
    assert before.keys() == after.keys()
    # The vocabulary is padded to what its layout needs: rows beyond the tokenizer's are nobody's.
    for key, tensor in before.items():
        rows = min(len(tensor), len(after[key]))
        assert tensor[:rows].equal(after[key][:rows]), key
        assert not tensor[rows:].any() and not after[key][rows:].any(), key


def test_another_global_batch_size_goes_on_from_the_samples_consumed(trained):
    small, large = rows_of(trained["still"]), rows_of(trained["still-larger-batch"])
    # small: lines of two steps of 4 rows; large: steps of 8 rows from row 8 on
    assert [row["consumed_samples"] for row in small] == [4, 8, 16, 24]
    assert [row["consumed_samples"] for row in large] == [16, 24, 32, 40]
    assert [row["step"] for row in large] == [3, 4, 5, 6]
    # equal weights and equal rows: only the order of the sum differs
    assert [row["loss"] for row in large[:2]] == pytest.approx([row["loss"] for row in small[2:]], rel=1e-6)
    assert len({round(row["loss"], 4) for row in large}) == len(large), "other rows have another loss"


def test_a_checkpoint_without_an_optimizer_is_refused(trained):
    assert trained["refused-optimizer-not-saved"]
    manifest = json.loads((trained["dp2-no-optimizer"] / "checkpoint-1" / "manifest.json").read_text())
    assert manifest["holds"] == ["weights", "rng", "data"]
