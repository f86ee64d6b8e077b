"""The cost of experts compared to a dense MLP with the same arithmetic, and of sending tokens to other processes.

    python benchmarks/dispatch.py --rounds 8

Two processes train small models with random weights on the same random tokens, taking turns of a few steps, so that
other load on the machine affects all models alike:

    dense           a Qwen3 whose MLP is as wide as the experts of one token together
    EP1             a Qwen3-MoE; every process has all experts and no tokens are sent, so this shows the cost of
                    routing, sorting and many small matrix products
    EP2 alltoall    each process has half of the experts; tokens are sent to the process that has theirs
    EP2 allgather   each process has half of the experts; all tokens are gathered on both

Attention, embeddings, tokens and data parallelism are the same in all four. Routers are random, so the experts' load is
uneven, as it is early in training; the imbalance is printed too. The results are medians of tokens/s, and of each
round's ratios to dense and to EP1. On CPU over gloo, this compares our layouts with each other; it says nothing about
NCCL.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, run_ranks, spread

# name -> (folder of the model, expert parallel size, dispatcher)
WAYS = {
    "dense": ("dense", 1, "alltoall"),
    "EP1": ("experts", 1, "alltoall"),
    "EP2 alltoall": ("experts", 2, "alltoall"),
    "EP2 allgather": ("experts", 2, "allgather"),
}
LENGTH, STEPS = 512, 3  # tokens per process and step; steps per turn
EXPERTS, ACTIVE, WIDTH = 8, 2, 256
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": ACTIVE * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MIXTURE = {
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": ACTIVE,
    "norm_topk_prob": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns that count, after one to warm up")
    parser.add_argument("--limit", type=float, default=300, help="seconds it may take")
    options = parser.parse_args()
    print(machine("torch", "megatron-core"))
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", folder, str(options.rounds)]
        result = json.loads(run_ranks(command, 2, limit_s=options.limit).splitlines()[-1])
    report(result["speeds"])
    print(f"largest load of an expert over an even share: {result['load']:.2f}")
    print(machine())


def report(speeds: dict[str, list[float]]) -> None:
    """speeds: tokens/s by model and round."""
    print(f"{'':16}{'tokens/s':>10}     of dense (rounds)                of EP1 (rounds)")
    for way, mine in speeds.items():
        columns = []
        for other in ("dense", "EP1"):
            ratios = [speed / base for speed, base in zip(mine, speeds[other], strict=True)]
            columns.append(f"{spread(ratios, '.2f'):32}")
        print(f"{way:16}{statistics.median(mine):10,.0f}     {' '.join(columns)}")


def write_configs(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3MoeConfig

    dense = Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"])
    mixture = Qwen3MoeConfig(**SIZES, **MIXTURE, architectures=["Qwen3MoeForCausalLM"])
    dense.save_pretrained(folder / "dense")
    mixture.save_pretrained(folder / "experts")


def worker(folder: Path, count: int) -> None:
    """One process. Prints the tokens/s of each round except the first as JSON."""
    sys.path.insert(0, str(ROOT))
    from mcore_swift.accelerator import get_accelerator

    get_accelerator().install()
    import torch
    import torch.distributed as dist

    from mcore_swift.data import Batch

    dist.init_process_group(get_accelerator().backend)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, SIZES["vocab_size"], (1, LENGTH), generator=generator)
    positions = torch.arange(LENGTH)[None]
    batch = Batch(ids, ids.roll(-1), torch.ones(1, LENGTH), positions, None, None, 1, LENGTH)
    turns = {name: Turn(folder / model, *layout) for name, (model, *layout) in WAYS.items()}
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(count + 1):
        for name in WAYS if number % 2 else reversed(WAYS):
            speeds[name].append(2 * STEPS * LENGTH / turns[name].seconds(batch))
    load = max(turn.load for turn in turns.values())
    dist.destroy_process_group()
    print(json.dumps({"speeds": {name: values[1:] for name, values in speeds.items()}, "load": load}))


class Turn:
    """A model with its own process groups, which are installed when it is its turn.

    load: tokens of the busiest expert relative to an even share, in the last step.
    """

    def __init__(self, folder: Path, expert_parallel: int, dispatcher: str) -> None:
        import torch
        from megatron.core import parallel_state

        from mcore_swift.config import MegatronSftArguments
        from mcore_swift.engines.megatron import process_groups
        from mcore_swift.engines.megatron.engine import MegatronEngine
        from mcore_swift.models.initialization import initialize
        from mcore_swift.models.reading import read_model
        from mcore_swift.plan.layout import Layout

        # megatron-core keeps its groups in one module: save those of this turn, to restore them when it runs
        parallel_state.destroy_model_parallel()
        layout = Layout(dp=2, ep=expert_parallel)
        process_groups.start(layout, seed=1)
        self.groups = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
        self.load = 1.0
        plan = read_model(str(folder))
        args = MegatronSftArguments(moe_token_dispatcher_type=dispatcher, recompute_granularity="none")
        self.engine = MegatronEngine(plan, layout, args, torch.float32)
        initialize(self.engine.chunks, plan.table, std=0.02, seed=1)
        self.engine.after_load(["weights"], optimizer_step=0)

    def seconds(self, batch: Any) -> float:
        """Seconds for STEPS steps on the slower process."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        from mcore_swift.objectives.sft import NextToken

        vars(parallel_state).update(self.groups)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(STEPS):
            result = self.engine.train_step([batch], NextToken(), lr=0.0, weight_decay=0.0)
        dist.barrier()
        self.load = result.metrics.get("expert_load_worst", 1.0)
        return time.perf_counter() - started


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
