"""The planner's memory estimate compared with the peak of a real training step, for tiny models on this CPU.

    python benchmarks/plan_memory.py

Each row is measured in its own process: the resident memory after imports and creation of the process groups, and the
peak (`memory_peak_bytes` of the accelerator) after two steps of the megatron engine on one full row of random tokens.
The estimate is `plan.memory` without its overhead, for layers that are not fused. "live" is the memory of all tensors
after the steps, to be compared with "states": weights, gradients, optimizer.

Freed blocks that the process keeps would inflate the peak, so it is measured with blocks returned to the system as soon
as they are freed (MALLOC_MMAP_THRESHOLD_). The last column is the peak of normal training, which keeps them for speed.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, run_ranks

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "tokens",
)
ROWS: dict[str, dict[str, Any]] = {
    "mostly activations": dict(zip(_SIZES, (512, 1536, 8, 8, 4096, 4096), strict=True)),
    "the same, full recomputation": dict(zip(_SIZES, (512, 1536, 8, 8, 4096, 4096), strict=True))
    | {"recompute_granularity": "full"},
    "the same in bf16": dict(zip(_SIZES, (512, 1536, 8, 8, 4096, 4096), strict=True))
    | {"torch_dtype": "bfloat16"},
    "mostly weights and optimizer": dict(zip(_SIZES, (768, 2304, 8, 12, 16384, 256), strict=True)),
    "mostly logits": dict(zip(_SIZES, (256, 768, 2, 4, 65536, 2048), strict=True)),
}


def main() -> None:
    print(machine("torch", "megatron-core"))
    print(
        "| model | states | live after a step | estimated peak | measured peak | ratio | as training runs |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in ROWS:
        given_back, kept = (measure(name, freed) for freed in ("given back", "kept"))
        total = given_back["states"] + given_back["activations"]
        print(
            f"| {name} | {mib(given_back['states'])} | {mib(given_back['live'])} | {mib(total)} | "
            f"{mib(given_back['measured'])} | {total / given_back['measured']:.2f} | {mib(kept['measured'])} |",
            flush=True,
        )


def measure(name: str, freed: str) -> dict[str, float]:
    """Measured bytes of a row, from its own process."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**18)} if freed == "given back" else {}
    command = [sys.executable, str(Path(__file__).resolve()), name, freed]
    try:
        return json.loads(run_ranks(command, 1, limit_s=240).splitlines()[-1])
    finally:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def worker(row: dict[str, Any], returns: bool) -> None:
    """Measure one model; prints JSON. returns: the C library gives large blocks back once they are freed."""
    sys.path.insert(0, str(ROOT))
    from mcore_swift.accelerator import get_accelerator, install_cpu_seam

    if returns:
        install_cpu_seam()  # everything that `install` does, except keeping freed blocks
    else:
        get_accelerator().install()
    import torch

    from mcore_swift.config import MegatronSftArguments
    from mcore_swift.data import Batch
    from mcore_swift.engines.megatron import process_groups
    from mcore_swift.engines.megatron.engine import MegatronEngine
    from mcore_swift.models.reading import read_model
    from mcore_swift.objectives.sft import NextToken
    from mcore_swift.plan import Layout, ModelShape

    options = {"recompute_granularity": "none", "torch_dtype": "float32"} | row
    args = MegatronSftArguments(
        recompute_granularity=options["recompute_granularity"], torch_dtype=options["torch_dtype"],
        micro_batch_size=1, global_batch_size=1,
    )  # fmt: skip
    tokens = options["tokens"]
    config = {name: options[name] for name in _SIZES[:-1]} | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": tokens,
    }  # fmt: skip
    process_groups.start(Layout(), seed=1)
    torch.ones(64, 64) @ torch.ones(64, 64)  # allocates the threads and buffers of the first product
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        plan = read_model(folder)
    before = resident_bytes()
    engine = MegatronEngine(plan, Layout(), args, getattr(torch, options["torch_dtype"]))
    ids = torch.randint(0, config["vocab_size"], (1, tokens))
    batch = Batch(ids, ids, torch.ones(1, tokens), torch.arange(tokens)[None], None, None, 1, tokens)
    for _ in range(2):
        engine.train_step([batch], NextToken(), lr=1e-4, weight_decay=0.1)
    measured = get_accelerator().memory_peak_bytes() - before
    states, activations = estimate(ModelShape.from_config_dict(config), args, tokens)
    found = {"states": states, "activations": activations, "live": live_bytes(), "measured": measured}
    process_groups.stop()
    print(json.dumps(found))


def estimate(shape: Any, args: Any, tokens: int) -> tuple[float, float]:
    """(bytes of weights, gradients and optimizer; bytes of activations and logits)."""
    import dataclasses

    from mcore_swift.plan import Layout
    from mcore_swift.plan.memory import peak_memory, stages_of
    from mcore_swift.plan.planner import recompute_of, run_of

    run = dataclasses.replace(
        run_of(args, tokens), recompute=recompute_of(args), overhead_bytes=0, fused=False
    )
    memory = peak_memory(shape, Layout(), run, stages_of(shape, Layout(), [shape.num_layers]))
    return memory.weights + memory.gradients + memory.optimizer, memory.activations + memory.logits


def live_bytes() -> int:
    """Bytes of all existing tensors."""
    import torch

    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident_bytes() -> int:
    """Current resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(ROWS[sys.argv[1]], returns=sys.argv[2] == "given back")
    else:
        main()
