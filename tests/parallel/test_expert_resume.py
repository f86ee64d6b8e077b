"""Training with experts spread in one way goes on with them spread in another, and starts the same in any."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from jobs import run_job  # noqa: E402
from tiny import EXPERTS, curve, make_tiny, rows_of, stored  # noqa: E402
from training_plan import SAVED, STEPS, argv, checkpoint  # noqa: E402

LOSSES = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3}
EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}
ETP2 = {"expert_tensor_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
BASE = TP2 | EP2
RANDOM = {"perform_initialization": "true", "train_iters": 1, "seed": 5}

RUNS: dict[int, dict[str, tuple[str, dict]]] = {
    4: {
        "base": ("train", BASE),
        "again": ("train", BASE | checkpoint("base")),
        "pp2-ep2": ("train", PP2 | EP2 | checkpoint("base")),
    },
    2: {
        "ep2": ("train", EP2 | checkpoint("base")),
        "tp2-etp2": ("train", TP2 | ETP2 | checkpoint("base")),
        "tp2-etp1": ("train", TP2 | checkpoint("base")),
        "bf16-ep2": ("train", EP2 | {"torch_dtype": "bfloat16", "train_iters": SAVED}),
        "megatron-reads": ("megatron-load", TP2 | ETP2 | checkpoint("base")),
        "random-ep2": ("train", EP2 | RANDOM),
    },
    1: {
        "one-from-the-start": ("train", {}),
        "one": ("train", checkpoint("base")),
        "copy-of-base": ("save", checkpoint("base")),
        "copy-of-bf16-ep2": ("save", {"torch_dtype": "bfloat16"} | checkpoint("bf16-ep2")),
        "random-one": ("train", RANDOM),
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert-runs")
    tiny = make_tiny(folder, **EXPERTS)
    places = {"train": str(tiny.train), "val": str(tiny.val), "runs": str(folder)}
    for world_size, cases in RUNS.items():
        job = folder / f"job-{world_size}"
        job.mkdir()
        plan = [
            {"name": name, "do": do, "argv": argv(name, LOSSES | flags, tiny, folder, places)}
            for name, (do, flags) in cases.items()
        ]
        (job / "plan.json").write_text(json.dumps(plan))
        results = run_job(Path(__file__).with_name("train_job.py"), world_size, job)
        failed = {name: error for name, error in results.items() if error}
        assert not failed, failed
    return folder


@pytest.mark.parametrize("resumed", ["pp2-ep2", "ep2", "tp2-etp2", "tp2-etp1", "one", "one-from-the-start"])
def test_the_curve_does_not_depend_on_where_experts_are(runs, resumed):
    whole, other = curve(runs / "base"), curve(runs / resumed)
    first = 1 if resumed == "one-from-the-start" else SAVED + 1
    assert sorted(other) == list(range(first, STEPS + 1))
    for step, (loss, norm) in other.items():
        # as in test_resume: sums in another order, through some steps of Adam
        assert loss == pytest.approx(whole[step][0], rel=2e-6), step
        assert norm == pytest.approx(whole[step][1], rel=2e-5), step
    for ours, theirs in zip(rows_of(runs / resumed), rows_of(runs / "base")[first - 1 :], strict=True):
        for name in ("load_balancing_loss", "router_z_loss", "expert_load_max", "expert_load_worst"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert all(row["expert_load_worst"] > row["expert_load_max"] > 1 for row in rows_of(runs / "base"))


def test_in_the_same_layout_bit_for_bit(runs):
    assert curve(runs / "again") == {step: curve(runs / "base")[step] for step in range(SAVED + 1, STEPS + 1)}


@pytest.mark.parametrize("name", ["base", "bf16-ep2"])
def test_loading_and_saving_in_another_layout_changes_no_bit(runs, name):
    before, after = (stored(runs / run / f"checkpoint-{SAVED}") for run in (name, f"copy-of-{name}"))
    assert before.keys() == after.keys()
    assert any(key.startswith("optimizer.exp_avg.") and ".experts." in key for key in before)
    for key, tensor in before.items():
        rows = min(len(tensor), len(after[key]))  # of the vocabulary, padded to what TP needs
        assert tensor[:rows].equal(after[key][:rows]), key


def test_random_weights_do_not_depend_on_the_layout(runs):
    first, second = curve(runs / "random-ep2"), curve(runs / "random-one")
    assert first[1] == pytest.approx(second[1], rel=2e-6)
