"""The training loop, its schedule and its checkpoints."""

from typing import Any


def train_main(args: Any) -> int:
    """Train as the arguments say; called in every process of the run. Returns the exit code."""
    run_training(args)
    return 0


def run_training(args: Any) -> Any:
    """Train as the arguments say; called in every process of the run. Returns the finished `Run`.

    The accelerator is set up before megatron-core is imported: without CUDA this avoids importing a compiler that would
    take seconds and compile nothing. Runs on transformers models do not import megatron-core.
    """
    from mcore_swift.accelerator import get_accelerator

    if getattr(args, "backend", "megatron") == "megatron":
        get_accelerator().install()
    else:
        get_accelerator().prepare()
    from mcore_swift.training.main import run_training

    return run_training(args)
