"""The training loop, its schedule and its checkpoints."""

from typing import Any


def train_main(args: Any) -> int:
    """Train as the arguments say; called in every process of the run. Returns the exit code."""
    run_training(args)
    return 0


def run_training(args: Any) -> Any:
    """Train as the arguments say; called in every process of the run. Returns the `Run` that has ended.

    The device is made ready before megatron-core is imported: without CUDA that spares the import of a compiler,
    which takes seconds and compiles nothing there. Runs on transformers' model do without megatron-core.
    """
    from mcore_swift.accelerator import get_accelerator

    if getattr(args, "backend", "megatron") == "megatron":
        get_accelerator().install()
    else:
        get_accelerator().prepare()
    from mcore_swift.training.main import run_training

    return run_training(args)
