"""kill -9 at many moments of a save: what was complete stays as it was, and the newest complete one is resumed."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import LIMIT, REPOSITORY
from tiny import curve, stored

STEPS, KILLS, LIMIT_OF_CHECKPOINTS = 24, 9, 3


@pytest.fixture(scope="module")
def job(sft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    common = {
        "train_iters": STEPS,
        "save_steps": 1,
        "save_total_limit": LIMIT_OF_CHECKPOINTS,
        "resume": "auto",
    }
    small = {"global_batch_size": 2}
    settings = {
        "argv": sft(output_dir=folder / "run", save_safetensors=True, **small, **common),
        "undisturbed": sft(output_dir=folder / "undisturbed", **(common | small | {"save_steps": STEPS})),
        "output": str(folder / "run"),
        "kills": KILLS,
        "longest_delay": 0.15,
        "seed": random.randrange(10**6),
    }
    (folder / "job.json").write_text(json.dumps(settings))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kills_job.py")), str(folder)],
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
    )
    assert ended.returncode == 0, f"seed {settings['seed']}\n{ended.stderr[-5000:]}"
    return folder


@pytest.fixture(scope="module")
def lives(job):
    lives = json.loads((job / "lives.json").read_text())
    assert sum(life["killed"] for life in lives) >= KILLS - 1, lives
    return lives


def step_of(name):
    return int(name.rpartition("-")[2])


def test_no_kill_harms_a_complete_checkpoint(lives):
    before: dict[str, str] = {}
    for life in lives:
        now = life["digests"]
        newest = max(map(step_of, now), default=0)
        for name, digest in before.items():
            if name in now:
                assert now[name] == digest, f"{name} has changed: {life}"
            else:  # rotated away, which three newer ones have to be there for
                assert sum(step_of(other) > step_of(name) for other in now) >= LIMIT_OF_CHECKPOINTS, life
        assert newest >= max(map(step_of, before), default=0), life
        before = now


def test_the_kills_hit_saves(lives):
    """Some left a hidden folder behind; otherwise nothing was proved."""
    assert sum(bool(life["hidden"]) for life in lives) >= 2, lives


def test_the_link_always_points_to_a_complete_one(lives):
    for life in lives:
        assert life["latest"] is None or life["latest"] in life["digests"], life


def test_each_life_goes_on_from_the_newest_complete_one(job, lives):
    logs = [life["log"] for life in lives[1:]] + [(job / "last.txt").read_text()]
    for life, log in zip(lives, logs, strict=True):
        newest = max(life["digests"], key=step_of, default=None)
        found = re.search(r"resumed from \S*/(checkpoint-\d+):", log)
        assert (found and found[1]) == newest, log


def test_the_curve_is_that_of_a_run_never_killed(job):
    assert curve(job / "run") == curve(job / "undisturbed")
    assert sorted(curve(job / "run")) == list(range(1, STEPS + 1))
    first, second = (stored(job / run / f"checkpoint-{STEPS}") for run in ("run", "undisturbed"))
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == []


def test_leftovers_are_swept_up(job):
    names = sorted(path.name for path in (job / "run").iterdir() if "checkpoint" in path.name)
    assert names == [f"checkpoint-{step}" for step in range(STEPS - LIMIT_OF_CHECKPOINTS + 1, STEPS + 1)]
    assert not [path.name for path in (job / "run").iterdir() if path.name.startswith(".")]


def test_what_is_left_loads_in_transformers(job):
    from transformers import AutoModelForCausalLM

    checkpoint = job / "run" / f"checkpoint-{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weights = stored(checkpoint)["output_layer.weight"]
    assert model.lm_head.weight.equal(weights[: len(model.lm_head.weight)])
