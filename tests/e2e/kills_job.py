"""Train, and be killed in a save, again and again; every life is a fork of this process, which has all imports.

python kills_job.py <folder>: reads `<folder>/job.json` {"argv", "undisturbed", "output", "kills", "seed"}, writes
`<folder>/lives.json`, what was there after each kill.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mcore_swift.accelerator import get_accelerator

torch.set_num_threads(1)  # a fork has no threads but the one that forked
get_accelerator().install()

import transformers.models.auto.tokenization_auto  # noqa: E402, F401

import mcore_swift.engines.megatron.backend  # noqa: E402, F401
import mcore_swift.training.main  # noqa: E402, F401
from mcore_swift.cli.main import main as command  # noqa: E402
from mcore_swift.training.checkpoint import checkpoints_in  # noqa: E402

LIMIT = 120  # seconds for a life


def start(argv: list[str], log: Path) -> int:
    """A new life: the command line in a fork. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 70
    try:
        code = command(["megatron", *argv]) or 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a life to end by itself; returns its exit code."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise TimeoutError(f"a life lasted longer than {LIMIT} s")


def kill_in_a_save(pid: int, output: Path, saves: int, delay: float) -> bool:
    """Kill a life `delay` seconds after it has begun its save number `saves`; False if it ended before."""
    seen: set[int] = set()  # inodes: a leftover of the life before may have the same name
    leftovers = {path.stat().st_ino for path in output.glob(".checkpoint-*.writing")}
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        for path in output.glob(".checkpoint-*.writing"):
            try:
                seen |= {path.stat().st_ino} - leftovers
            except FileNotFoundError:
                continue
        if len(seen) >= saves:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.0005)
    raise TimeoutError(f"no save began in {LIMIT} s")


def digests(output: Path) -> dict[str, str]:
    """Complete checkpoint -> digest of all its files."""
    found = {}
    for _, folder in checkpoints_in(output):
        digest = hashlib.sha256()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
        found[folder.name] = digest.hexdigest()
    return found


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    output = Path(job["output"])
    dice = random.Random(job["seed"])
    assert end_of(start(job["undisturbed"], folder / "undisturbed.txt")) == 0
    lives = []
    for number in range(job["kills"]):
        # at once, at any moment of a save that takes some 0.1 s, or a little after it
        delay = 0.0 if number == 0 else dice.uniform(0, job["longest_delay"])
        log = folder / f"life-{number}.txt"
        argv = [*job["argv"], "--async_save", "true" if number % 3 == 2 else "false"]
        killed = kill_in_a_save(start(argv, log), output, dice.randrange(1, 4), delay)
        link = output / "latest"
        lives.append(
            {
                "killed": killed,
                "delay": delay,
                "digests": digests(output),
                "hidden": sorted(path.name for path in output.glob(".checkpoint-*")),
                "latest": os.readlink(link) if link.is_symlink() else None,
                "log": log.read_text()[-3000:],
            }
        )
        (folder / "lives.json").write_text(json.dumps(lives))
    code = end_of(start(job["argv"], folder / "last.txt"))
    assert code == 0, (folder / "last.txt").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
