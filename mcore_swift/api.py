"""The commands as Python calls.

from mcore_swift import TrainArguments, sft_main
result = sft_main(TrainArguments(model="./Qwen3-0.6B", train_type="lora", dataset=["train.jsonl#500"]))
result["last_model_checkpoint"]
"""

from collections.abc import Sequence
from typing import Any

from .config import SwiftPretrainArguments, SwiftSftArguments, parse


def train_arguments(**flags: Any) -> SwiftSftArguments:
    """The arguments of `swift sft`, by the names of its flags; names of ms-swift 3 are taken too.

    Raises UserError, or UserErrors with all that is wrong.
    """
    return parse(SwiftSftArguments, _as_words(flags))


def sft_main(args: SwiftSftArguments | Sequence[str]) -> dict[str, Any]:
    """Fine-tune as `swift sft` does, in this process or, under a launcher, as one of its processes.

    args: what `TrainArguments` gives, or the words of a command line.
    Returns last_model_checkpoint, best_model_checkpoint (None without evaluation), global_step and output_dir.
    Raises UserError(s).
    """
    return _train(args if isinstance(args, SwiftSftArguments) else parse(SwiftSftArguments, args))


def pt_main(args: SwiftPretrainArguments | Sequence[str]) -> dict[str, Any]:
    """Pre-train as `swift pt` does; see `sft_main`."""
    return _train(args if isinstance(args, SwiftSftArguments) else parse(SwiftPretrainArguments, args))


def _train(args: SwiftSftArguments) -> dict[str, Any]:
    from .cli.backend import loop_arguments
    from .training import run_training

    run = run_training(loop_arguments(args))
    folder, state = run.checkpoints.run_dir, run.state
    best = None if state.best_step is None else str(folder / f"checkpoint-{state.best_step}")
    return {
        "last_model_checkpoint": str(folder / f"checkpoint-{state.step}"),
        "best_model_checkpoint": best,
        "global_step": state.step,
        "output_dir": str(folder),
    }


def _as_words(flags: dict[str, Any]) -> list[str]:
    import json

    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        texts = [json.dumps(v) if isinstance(v, dict | list) else str(v) for v in values]
        words += [f"--{name}", *texts] if len(texts) != 1 else [f"--{name}={texts[0]}"]
    return words
