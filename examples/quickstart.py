"""Fine-tune the demo checkpoint with tensor parallelism on two CPU processes, and score it before and after.

    python examples/quickstart.py [--output quickstart_output]

Creates the demo (examples/arithmetic_demo.py), runs `megatron sft` as a user would, loads the exported Hugging Face
checkpoint with transformers, and prints the accuracy on held-out questions before and after, and the tokens/s of the
training. The exit code is 0 if the accuracy rose by MIN_GAIN, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from arithmetic_demo import Demo, Score, make_demo, score

ROOT = Path(__file__).resolve().parent.parent
STEPS = 210
# Accuracy rises from 0 % to 90 % or more; half of that cannot be chance on 300 questions.
MIN_GAIN = 0.5


class Failed(Exception):
    """The quick start could not be completed; the text says why."""


def command(demo: Demo, output: Path) -> list[str]:
    """The fine-tuning command. A step is two packed rows of 1024 tokens, about fifty samples."""
    flags = {
        "model": demo.model,
        "dataset": demo.train,
        "val_dataset": demo.val,
        "output_dir": output,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": "true",
        "torch_dtype": "float32",
        "recompute_granularity": "none",
        "packing": "true",
        "max_length": 1024,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "train_iters": STEPS,
        "lr": "4e-3",
        "lr_warmup_fraction": 0.05,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "save_safetensors": "true",
        "no_save_optim": "true",
        "logging_steps": 10,
    }
    return ["megatron", "sft", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def run(arguments: list[str], *, processes: int, limit_s: float) -> None:
    """Print the command and run it. Raises Failed if it fails or takes longer than `limit_s` seconds."""
    print(f"\n$ NPROC_PER_NODE={processes} {shlex.join(arguments)}\n", flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"NPROC_PER_NODE": str(processes), "PYTHONPATH": os.pathsep.join(paths)}
    # a session of its own, so that its workers can be stopped with it
    process = subprocess.Popen(installed(arguments), env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"the command had not finished after {limit_s:.0f} s (--limit)") from None
    finally:
        if process.poll() is None:
            stop(process)
    if code:
        raise Failed(f"the command ended with exit code {code}")


def stop(process: subprocess.Popen) -> None:
    """End a process and everything that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, sign)
        try:
            process.wait(timeout=10)
            return
        except subprocess.TimeoutExpired:
            continue


def installed(arguments: list[str]) -> list[str]:
    """The command with the script next to this interpreter, or with the module if that is not installed."""
    script = Path(sys.executable).with_name(arguments[0])
    if script.exists():
        return [str(script), *arguments[1:]]
    return [sys.executable, "-m", "mcore_swift.cli.main", *arguments]


def exported(output: Path) -> Path:
    """The newest Hugging Face checkpoint under `output`. Raises Failed if there is none."""
    folders = [file.parent for file in output.rglob("checkpoint-*/config.json")]
    folders = [folder for folder in folders if any(folder.glob("*.safetensors"))]
    if not folders:
        raise Failed(f"{output}: there is no checkpoint-N with config.json and safetensors")
    return max(folders, key=lambda folder: (folder.parent.stat().st_mtime, int(folder.name.split("-")[1])))


def tokens_per_s(log_file: Path) -> float:
    """Median of the logged tokens/s, without the first line, which includes the warm-up."""
    rows = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    rates = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    if not rates:
        raise Failed(f"{log_file}: no line has tokens_per_s")
    return statistics.median(rates[1:] or rates)


def quickstart(folder: Path, *, seed: int, limit_s: float) -> tuple[Score, Score]:
    """The whole demonstration in `folder`; returns the scores before and after."""
    demo = make_demo(folder / "demo", seed=seed)
    before = score(demo.model, demo.val)
    print(f"accuracy before: {before.accuracy:.1%} ({before.correct} of {before.total} held-out questions)")
    output = folder / "sft"
    run(command(demo, output), processes=2, limit_s=limit_s)
    checkpoint = exported(output)
    after = score(checkpoint, demo.val)
    print(f"\ncheckpoint:      {checkpoint}")
    print(f"accuracy before: {before.accuracy:.1%} ({before.correct} of {before.total})")
    print(f"accuracy after:  {after.accuracy:.1%} ({after.correct} of {after.total})")
    print(f"training speed:  {tokens_per_s(checkpoint.parent / 'logging.jsonl'):,.0f} tokens/s")
    return before, after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart_output"), help="where everything goes"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the demo: weights, and which questions are held out"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds the training command may take")
    options = parser.parse_args()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # files this small are loaded before a bar can be read
    begin = time.monotonic()
    try:
        before, after = quickstart(options.output.resolve(), seed=options.seed, limit_s=options.limit)
    except Failed as failure:
        print(f"quick start failed: {failure}", file=sys.stderr)
        return 1
    print(f"whole time:      {time.monotonic() - begin:.0f} s")
    if after.accuracy - before.accuracy < MIN_GAIN:
        print(f"quick start failed: the accuracy rose by less than {MIN_GAIN:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
