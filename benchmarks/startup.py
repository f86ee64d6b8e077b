"""Seconds from starting a command to its first training step, and to its help.

    python benchmarks/startup.py --repeats 5

The training run is `megatron sft` with a tiny model on one process, as a user would type it. The time is taken when the
line of the first step arrives on the terminal. The output has medians; the first run of each command, which fills the
page cache and the token cache, is listed separately. Aims: first step <= 10 s, help <= 0.5 s.

To see where the time goes, `--imports` prints the slowest imports of one run (python -X importtime).
"""

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

from measuring import flags, on_this_machine, program, spread, stamped_lines
from workload import Workload, make_workload

FIRST_STEP, TO_THE_END = "first step of megatron sft", "  until it has saved and ended"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--imports", action="store_true", help="print the slowest imports as well")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/startup"))
    parser.add_argument("--limit", type=float, default=300, help="seconds a command may take")
    options = parser.parse_args()
    with on_this_machine("torch", "megatron-core", "transformers", folder=options.folder):
        run(options)


def run(options: argparse.Namespace) -> None:
    workload = make_workload(options.folder, "tiny", rows=500)
    training = training_command(workload, options.folder)
    helps = {
        "megatron --help": program("megatron", "--help"),
        "megatron sft --help": program("megatron", "sft", "--help"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*helps, FIRST_STEP, TO_THE_END)}
    for _ in range(options.repeats + 1):
        for name, command in helps.items():
            seconds[name].append(run_command(command, options.limit)[1])
        first_step, end = run_command(training, options.limit)
        if first_step is None:
            raise RuntimeError(f"{' '.join(training)}\nprinted no line of its first step")
        seconds[FIRST_STEP].append(first_step)
        seconds[TO_THE_END].append(end)
    print(f"{'seconds':30}{'first run':>10}     median (runs)")
    for name, values in seconds.items():
        print(f"{name:30}{values[0]:10.2f}     {spread(values[1:], '.2f')}")
    if options.imports:
        for line in slowest_imports(training, options.limit):
            print(line)


def training_command(workload: Workload, folder: Path) -> list[str]:
    """The command for one step of a tiny model, with defaults for everything else."""
    return program(
        "megatron",
        "sft",
        *flags(
            model=workload.model,
            dataset=workload.train,
            output_dir=folder / "output",
            cache_dir=folder / "tokens",
            max_length=512,
            global_batch_size=4,
            train_iters=1,
        ),
    )


def run_command(command: list[str], limit_s: float) -> tuple[float | None, float]:
    """(seconds until the line of the first step, or None if there is none; seconds until the command ended)."""
    started = time.perf_counter()
    first_step = None
    for seconds, line in stamped_lines(command, limit_s=limit_s):
        if first_step is None and line.startswith("step 1/"):
            first_step = seconds
    return first_step, time.perf_counter() - started


def slowest_imports(command: list[str], limit_s: float, count: int = 25) -> Iterator[str]:
    """The slowest imports of a run, in milliseconds, without the time of nested imports."""
    own: dict[str, float] = {}
    for _, line in stamped_lines(command, limit_s=limit_s, PYTHONPROFILEIMPORTTIME="1"):
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
        if found:
            package = ".".join(found[2].split(".")[:2])
            own[package] = own.get(package, 0.0) + int(found[1]) / 1000
    yield f"\nimports of that run, ms ({sum(own.values()):,.0f} in all)"
    for name in sorted(own, key=own.__getitem__, reverse=True)[:count]:
        yield f"  {name:40}{own[name]:8.0f}"


if __name__ == "__main__":
    main()
