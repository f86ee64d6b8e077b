"""The commands as Python calls.

from mcore_swift import TrainArguments, sft_main
result = sft_main(TrainArguments(model="./Qwen3-0.6B", train_type="lora", dataset=["train.jsonl#500"]))
result["last_model_checkpoint"]
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from .config import SwiftPretrainArguments, SwiftSftArguments, from_values, parse
from .errors import UserError, raise_together

T = TypeVar("T", bound=SwiftSftArguments)


def train_arguments(**flags: Any) -> SwiftSftArguments:
    """The arguments of `swift sft`, by the names of its flags; names of ms-swift 3 are taken too.

    Values are Python's (None, True, numbers, lists, dicts, paths) or what one would type.
    Raises UserError, or UserErrors with all that is wrong.
    """
    return from_values(SwiftSftArguments, flags)


def pretrain_arguments(**flags: Any) -> SwiftPretrainArguments:
    """The arguments of `swift pt`; see `train_arguments`."""
    return from_values(SwiftPretrainArguments, flags)


def sft_main(args: SwiftSftArguments | Sequence[str]) -> dict[str, Any]:
    """Fine-tune as `swift sft` does, in this process or, under torchrun or srun, as one of its processes.

    args: what `TrainArguments` gives, or the words of a command line. May be called again, with others.
    Returns the same in every process: last_model_checkpoint, best_model_checkpoint and best_metric (the lowest loss on
    the validation set among saved steps; None without evaluation), global_step, output_dir (the folder of this run)
    and log_history (a dict for each line of logging.jsonl).
    Raises UserError(s), before anything is written where it can be told; never SystemExit.
    """
    return _train(SwiftSftArguments, args)


def pt_main(args: SwiftPretrainArguments | Sequence[str]) -> dict[str, Any]:
    """Pre-train as `swift pt` does; see `sft_main`. args: what `PretrainArguments` gives, or words."""
    return _train(SwiftPretrainArguments, args)


def _train(cls: type[T], args: T | Sequence[str]) -> dict[str, Any]:
    import launch

    args = args if isinstance(args, SwiftSftArguments) else parse(cls, args)
    if type(args) is not cls:
        made = (
            "PretrainArguments, for pt_main" if cls is SwiftSftArguments else "TrainArguments, for sft_main"
        )
        raise UserError(
            f"these arguments are {made}", "make them with the other, which has defaults of its own"
        )
    with launch.in_this_process() as place:
        _check(args, place.world_size)
        from .cli.backend import loop_arguments
        from .training import run_training

        run = run_training(loop_arguments(args))
    return _result(run)


def _check(args: SwiftSftArguments, world_size: int) -> None:
    """What the command looks at before it starts. Raises UserError(s)."""
    from .cli.checks import notices_of, problems_of
    from .config import Reading, print_notice

    reading = Reading(args, args.problems(), [], set())
    for problems in problems_of(args, world_size):
        reading.add(problems)
    raise_together(reading.errors)
    for notice in notices_of(args, world_size):
        print_notice(notice)


def _result(run: Any) -> dict[str, Any]:
    from .observability.jsonl import FILE_NAME, read_rows

    folder, state = run.checkpoints.run_dir, run.state
    return {
        "last_model_checkpoint": str(folder / f"checkpoint-{state.step}"),
        "best_model_checkpoint": None
        if state.best_step is None
        else str(folder / f"checkpoint-{state.best_step}"),
        "best_metric": state.best_loss,
        "global_step": state.step,
        "output_dir": str(folder),
        "log_history": read_rows(folder / FILE_NAME),
    }
