"""From the flags of a command to its work: help, all checks together, then the processes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import launch
from launch.run import call

from ..config import COMMANDS, SWIFT_COMMANDS, Arguments, parse, print_notice, read
from ..config.help import help_text
from ..errors import UserError, raise_together


def start(
    command: str,
    argv: Sequence[str],
    target: str,
    examples: str = "",
    instead: Callable[[Sequence[str]], int | None] | None = None,
) -> int:
    """Check the command line, then do the command's work in the processes the environment asks for.

    target: 'module:function' of argv, run in each of them. examples: for --help. instead: done before any process is
    started; an exit code that it returns ends the command. Returns the exit code.
    Raises UserError with all mistakes that show before anything heavy is imported or a process is started.
    """
    argv = list(argv)
    if wants_help(argv):
        cls = class_of(command)
        print(help_text(cls, f"{cls.PROGRAM} {cls.COMMAND}", examples), end="")
        return 0
    if launch.read_place().mode != "joined":
        check(command, argv)
        if instead is not None and (code := instead(argv)) is not None:
            return code
        return launch.run(command, argv, target)

    def check_and_work(argv: list[str]) -> int:
        check(command, argv)
        return call(target, argv)

    # every process stands here and finds the same mistakes: `run` tells them once
    return launch.run(command, argv, check_and_work)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for `--help` and nothing else counts."""
    return not argv or "--help" in argv or "-h" in argv or argv[0] == "help"


def class_of(command: str) -> type[Arguments]:
    """The arguments of a command: a name of `COMMANDS`, or of `SWIFT_COMMANDS` after 'swift-'."""
    name = command.removeprefix("swift-")
    return COMMANDS[name] if name == command else SWIFT_COMMANDS[name]


def arguments(command: str, argv: Sequence[str]) -> Arguments:
    """The arguments of a command whose line `start` has checked, without telling its notices again."""
    return parse(class_of(command), argv, notify=lambda notice: None)


def check(command: str, argv: Sequence[str]) -> None:
    """Print the notices of a command line.

    Raises UserError with everything that is wrong with it, with the files it names and with the layout.
    """
    from ..plan.preflight import preflight, preflight_notices, preflight_swift

    reading = read(class_of(command), argv)
    args = reading.args
    world_size = launch.world_size_from_env()  # now, since the file's ENV section may have a say in it
    reading.add(folder_problems(args))
    if args.PROGRAM != "swift":
        reading.add(preflight(args, world_size))
    elif args.COMMAND != "export":
        reading.add(preflight_swift(args, world_size))
    reading.add(family_problems(args))
    if getattr(args, "dataset", None):
        from ..data import check_sources

        reading.add(check_sources(args))
    for notice in reading.notices:
        print_notice(notice)
    raise_together(reading.errors)
    notices = [*preflight_notices(args), *memory_notices(args, world_size)] if args.PROGRAM != "swift" else []
    for notice in notices:
        print_notice(notice)


def memory_notices(args: Arguments, world_size: int) -> list[str]:
    """A warning where the GPUs of this machine are estimated to be too small for a training run."""
    if os.environ.get("RANK", "0") != "0" or not args.model or not getattr(args, "global_batch_size", None):
        return []
    from .machine import nvidia_smi

    gpus = nvidia_smi()
    if not gpus:  # the memory of a CPU is not given out by the process
        return []
    from ..plan.planner import memory_notice, of_driver
    from ..plan.preflight import model_folder, read_config, read_shape

    folder = model_folder(args.model)
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    notice = memory_notice(args, read_shape(folder), world_size, of_driver(gpus[0]), dtype)
    return [notice] if notice else []


def folder_problems(args: Arguments) -> list[UserError]:
    """Folders that the arguments name and that are missing, or are in the way."""
    problems = []
    for name in ("mcore_model", "mcore_adapter", "resume", "resume_from_checkpoint"):
        value = getattr(args, name, None)
        if value not in (None, "none", "auto") and not Path(value).is_dir():
            problems.append(UserError(f"--{name} {value}: no such folder", "give the folder of a checkpoint"))
    for folder in getattr(args, "adapters", ()):
        problems += adapter_problems(folder, args)
    if not args.output_dir:
        return problems
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        problems.append(UserError(f"--output_dir {output} is a file", "give a folder, or one to be made"))
    elif not getattr(args, "exist_ok", True) and output.is_dir() and any(output.iterdir()):
        problems.append(
            UserError(f"--output_dir {output} is not empty", "give another, or add --exist_ok true")
        )
    return problems


def adapter_problems(folder: str, args: Arguments) -> list[UserError]:
    """What shows of an adapter in its files: kind, whether they are whole, and whether it fits `--model`."""
    from ..plan.adapter import WEIGHTS
    from ..plan.adapter import folder_problems as problems_of

    if not Path(folder).is_dir():
        return [UserError(f"--adapters {folder}: no such folder", "give the folder of a PEFT adapter")]
    if (Path(folder) / "manifest.json").is_file() and not (Path(folder) / WEIGHTS).is_file():
        if args.COMMAND == "export":
            return []  # read from the checkpoint's own files
        remedy = "go on with --mcore_adapter, or make a PEFT folder of it with `swift export --to_peft_format true`"
        return [UserError(f"--adapters {folder}: is a checkpoint without a PEFT adapter in it", remedy)]
    base = Path(args.model).expanduser() if getattr(args, "model", None) else None
    only_lora = args.PROGRAM == "megatron"
    return problems_of(folder, base if base and base.is_dir() else None, only_lora=only_lora)


def family_problems(args: Arguments) -> list[UserError]:
    """Whether `--model_type` names a family, and the one that config.json is of."""
    from ..models.catalog import SUPPORTED_ARCHITECTURES
    from ..plan.preflight import model_folder, read_config

    if getattr(args, "model_type", None) is None or args.PROGRAM == "swift":
        return []
    families = sorted(set(SUPPORTED_ARCHITECTURES.values()))
    if args.model_type not in families:
        return [
            UserError(f"--model_type {args.model_type} is no family", f"choose from: {', '.join(families)}")
        ]
    if not args.model:
        return []
    try:
        architectures = read_config(model_folder(args.model)).get("architectures") or []
    except UserError:
        return []  # said by preflight
    found = {SUPPORTED_ARCHITECTURES.get(name) for name in architectures}
    if args.model_type in found:
        return []
    named = ", ".join(architectures) or "no architecture"
    return [
        UserError(
            f"--model_type {args.model_type}, but {args.model}/config.json says {named}",
            "drop --model_type, or give another --model",
        )
    ]
