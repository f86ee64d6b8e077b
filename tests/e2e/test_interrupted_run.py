"""kill -9 of one rank, in a step or in the middle of a save: the others end, and the run goes on as if never killed."""

import random
import signal
from pathlib import Path

from commands import Command, run, steps_logged
from tiny import curve, stored

STEPS = 14


def killed_and_resumed(argv: list[str], output: Path, folder: Path, *, in_save: bool) -> str:
    """Kill a rank of two in some step, or while it saves step 8, and go on by the same command; what was drawn."""
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    victim, step = dice.randrange(2), dice.randrange(5, 11)
    with Command(argv, folder / "killed", processes=2) as command:
        if in_save:
            command.wait_until((output / ".checkpoint-8.writing").exists, "the save of step 8")
        else:
            command.wait_until(lambda: steps_logged(output) >= step, f"step {step}")
        command.workers()[victim].send_signal(signal.SIGKILL)
        ended = command.wait()
    where = f"seed {seed}: rank {victim}, step {step}\n{ended.err}"
    assert ended.code == 128 + signal.SIGKILL, where
    assert ended.err.count(f"error: rank {victim} ") == 1, where
    assert "was killed by signal 9 (SIGKILL); the others were stopped" in ended.err, where
    assert "Traceback" not in ended.err, where
    assert steps_logged(output) < STEPS, where

    resumed = run(argv, folder / "resumed", processes=2).check()
    assert "resumed from" in resumed.err and f"done: step {STEPS}" in resumed.err, where
    assert sorted(curve(output)) == list(range(1, STEPS + 1)), where
    assert not list(output.glob(".checkpoint-*")), where
    return where


def test_kill_of_a_rank_and_resume(sft, tmp_path):
    output, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    layout = {"tensor_model_parallel_size": 2}
    # the same command starts the run and goes on with it
    argv = sft(output_dir=output, resume="auto", train_iters=STEPS, save_steps=4, **layout)
    where = killed_and_resumed(argv, output, tmp_path, in_save=False)
    plain = sft(output_dir=undisturbed, train_iters=STEPS, save_steps=100, **layout)
    run(plain, tmp_path / "plain", processes=2).check()
    assert curve(output) == curve(undisturbed), where
    first, second = (stored(folder / f"checkpoint-{STEPS}") for folder in (output, undisturbed))
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == [], where


def test_kill_of_a_rank_that_saves(sft, tmp_path):
    output = tmp_path / "run"
    argv = sft(output_dir=output, resume="auto", train_iters=STEPS, save_steps=4, torch_dtype="bfloat16")
    killed_and_resumed(argv, output, tmp_path, in_save=True)
