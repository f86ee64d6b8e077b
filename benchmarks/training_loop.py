"""Our training loop compared with a bare megatron-core loop on the same model and the same batches.

    python benchmarks/training_loop.py --rounds 15

Ours is `mcore_swift.training.loop.train` with a complete Run: batches prefetched by threads, learning rate schedule,
checks, a log line every 5 steps to the terminal, logging.jsonl and tensorboard. The bare loop zeroes gradients, calls
megatron-core's forward-backward function and steps the optimizer, with prepared batches, no checks and no logging.

Both run in the same process on the same engine, in turns of a second or two, so that other load affects both alike.
The output has medians of real tokens/s over the rounds, and the ratio ours / bare as the median of each round's ratio.
Aim: >= 0.97. The final checkpoint of a run is not included.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from measuring import ROOT, flags, on_this_machine, run_ranks, spread
from workload import SIZES, make_workload

LENGTH = 512  # tokens of a packed row; two rows a step
STEPS = {"small": 2, "tiny": 10}  # per turn, which takes a second or two


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small", "tiny"], choices=SIZES)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="tensor-parallel size of a row"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns that count, after one to warm up")
    parser.add_argument(
        "--threads", type=int, help="of each process; by default the processes share the cores"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/training_loop"))
    parser.add_argument("--limit", type=float, default=900, help="seconds a row may take")
    options = parser.parse_args()
    with on_this_machine("torch", "megatron-core", folder=options.folder):
        print(f"{'tokens/s':16}{'ours':>10}{'bare':>10}     ours / bare (rounds)", flush=True)
        for size in options.sizes:
            workload = make_workload(options.folder, size)
            for processes in options.processes:
                result = measure(options, workload, processes, STEPS[size])
                report(f"{size}, TP={processes}", result)


def measure(options: argparse.Namespace, workload: Any, processes: int, steps: int) -> dict[str, list[float]]:
    arguments = flags(
        model=workload.model,
        dataset=workload.train,
        output_dir=options.folder / "output",
        cache_dir=options.folder / "tokens",
        tensor_model_parallel_size=processes,
        packing="true",
        max_length=LENGTH,
        micro_batch_size=1,
        global_batch_size=2,
        train_iters=steps * (options.rounds + 1),
        recompute_granularity="none",
        save_steps=10**9,
        save_safetensors="false",
    )
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(steps), *arguments]
    output = run_ranks(command, processes, threads=options.threads, limit_s=options.limit)
    return json.loads(output.splitlines()[-1])


def worker(steps: int, argv: list[str]) -> None:
    """One process of a row. Prints the tokens/s of each round except the first as JSON."""
    sys.path.insert(0, str(ROOT))
    from mcore_swift.accelerator import get_accelerator

    get_accelerator().install()
    from converters.ranks import Ranks
    from mcore_swift.config import MegatronSftArguments, parse
    from mcore_swift.engines.megatron import process_groups
    from mcore_swift.plan.layout import Layout
    from mcore_swift.training.main import build_run

    args = parse(MegatronSftArguments, argv, notify=lambda notice: None)
    layout = Layout.from_args(args, int(os.environ["WORLD_SIZE"]))
    process_groups.start(layout, seed=args.seed)
    ranks = Ranks()
    run = build_run(args, layout, ranks)
    run.log = OpenLog(run.log)
    run.checkpoints.save = lambda state: None
    rounds: dict[str, list[float]] = {"ours": [], "bare": []}
    for number, first in enumerate(range(0, args.train_iters, steps)):
        batches = [run.data.step(step) for step in range(first, first + steps)]
        tokens = sum(batch.num_tokens for microbatches in batches for batch in microbatches)
        turns = {
            "ours": partial(time_ours, run, first + steps, ranks),
            "bare": partial(time_bare, run.engine, batches, ranks),
        }
        for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
            rounds[name].append(tokens / turns[name]())
    process_groups.stop()
    print(json.dumps({name: values[1:] for name, values in rounds.items()}))


class OpenLog:
    """The run's own log, kept open at the end of a turn. Records the time of the last step's report."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self.is_due = log.is_due
        self.reported_at = 0.0

    def after_step(self, report: Any) -> None:
        self._log.after_step(report)
        self.reported_at = time.perf_counter()

    def __enter__(self) -> "OpenLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


def time_ours(run: Any, until: int, ranks: Any) -> float:
    """Seconds that the run takes up to step `until`."""
    from mcore_swift.training.loop import train

    run.data.total_steps = until
    ranks.gather(None)
    started = time.perf_counter()
    train(run)
    return run.log.reported_at - started


def time_bare(engine: Any, batches: list[list[Any]], ranks: Any) -> float:
    """Seconds of a bare training loop on the engine's own model and optimizer."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mcore_swift.engines.megatron.forward_backward import to_device

    device = next(engine.chunks[0].parameters()).device
    prepared = [[to_device(batch, device, thd=False) for batch in step] for step in batches]
    forward_backward = get_forward_backward_func()
    (model,) = engine.model
    ranks.gather(None)
    started = time.perf_counter()
    for microbatches in prepared:
        model.zero_grad_buffer()
        engine.optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=model,
            num_microbatches=len(microbatches),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        engine.optimizer.step()
    return time.perf_counter() - started


def forward_step(data: Any, model: Any) -> tuple[Any, Any]:
    item = next(data)
    batch = item.batch
    nll = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=batch.labels,
        packed_seq_params=item.packing,
        loss_mask=item.learnt,
    )
    return nll, partial(loss_sum, mask=batch.loss_mask)


def loss_sum(nll: Any, mask: Any) -> tuple[Any, Any, dict]:
    return (nll * mask).sum(), (mask > 0).sum().int(), {}


def report(label: str, rounds: dict[str, list[float]]) -> None:
    ours, bare = (statistics.median(rounds[name]) for name in ("ours", "bare"))
    ratios = [a / b for a, b in zip(rounds["ours"], rounds["bare"], strict=True)]
    print(f"{label:16}{ours:10,.0f}{bare:10,.0f}     {spread(ratios, '.3f')}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
