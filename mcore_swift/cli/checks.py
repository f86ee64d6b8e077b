"""All checks of a command that need neither heavy imports nor other processes."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..config import Arguments
from ..errors import UserError
from ..models.catalog import SUPPORTED_ARCHITECTURES
from ..plan.folders import (
    is_plain_model,
    missing_folder,
    no_adapter,
    no_checkpoint,
    no_model,
    output_problems,
    tokenizer_problems,
)


def problems_of(args: Arguments, world_size: int) -> Iterator[list[UserError]]:
    """Mistakes in the files that the arguments name, and in the layout on `world_size` processes.

    They come in groups, so that mistakes of a later group that follow from an earlier one can be left out.
    """
    from ..plan.preflight import preflight, preflight_swift

    yield folder_problems(args)
    if args.PROGRAM != "swift":
        yield preflight(args, world_size)
    elif args.COMMAND != "export":
        yield preflight_swift(args, world_size)
    yield family_problems(args)
    if getattr(args, "dataset", None):
        from ..data import check_sources

        yield check_sources(args)


def notices_of(args: Arguments, world_size: int) -> list[str]:
    """Notices to print before a run without mistakes, one line each."""
    notices = family_notices(args)
    if args.PROGRAM == "swift":
        return notices
    from ..plan.preflight import preflight_notices

    return [*notices, *preflight_notices(args), *memory_notices(args, world_size)]


def memory_notices(args: Arguments, world_size: int) -> list[str]:
    """A warning if the GPUs of this machine are estimated to be too small for a training run."""
    if os.environ.get("RANK", "0") != "0" or not args.model or not getattr(args, "global_batch_size", None):
        return []
    from .machine import nvidia_smi

    gpus = nvidia_smi()
    if not gpus:  # on CPUs, processes share the memory of the host
        return []
    from ..plan.planner import memory_notice, of_driver
    from ..plan.preflight import model_folder, read_config, read_shape

    folder = model_folder(args.model)
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    notice = memory_notice(args, read_shape(folder), world_size, of_driver(gpus[0]), dtype)
    return [notice] if notice else []


def folder_problems(args: Arguments) -> list[UserError]:
    """Folders in the arguments that are missing, or that are in the way."""
    problems = []
    for name in ("mcore_model", "mcore_adapter", "resume", "resume_from_checkpoint"):
        value = getattr(args, name, None)
        if value in (None, "none", "auto"):
            continue
        if not Path(value).is_dir():
            problems.append(missing_folder(f"--{name}", value, "give the folder of a checkpoint"))
        elif "resume" in name and (problem := no_checkpoint(f"--{name}", Path(value))):
            problems.append(problem)
        elif name == "mcore_model" and is_plain_model(Path(value)):
            problems.append(UserError(f"--{name} {value} is a Hugging Face checkpoint", "give it to --model"))
    for folder in getattr(args, "adapters", ()):
        problems += adapter_problems(folder, args)
    if args.PROGRAM == "swift" and args.COMMAND == "export" and args.model:
        base = Path(args.model).expanduser()
        if not base.is_dir():
            problems.append(missing_folder("--model", args.model, "give the folder of the base model"))
        elif not (base / "config.json").is_file():
            problems.append(no_model(base))
    if args.output_dir:
        problems += output_problems(Path(args.output_dir), may_exist=getattr(args, "exist_ok", True))
    if getattr(args, "dataset", None) and args.model:
        problems += tokenizer_problems(args.model)
    return problems


def adapter_problems(folder: str, args: Arguments) -> list[UserError]:
    """Checks of an adapter's files: its kind, whether they are complete, and whether it fits `--model`."""
    from ..plan.adapter import CONFIG, WEIGHTS
    from ..plan.adapter import folder_problems as problems_in_files

    if not Path(folder).is_dir():
        return [missing_folder("--adapters", folder, "give the folder of a PEFT adapter")]
    if (Path(folder) / "manifest.json").is_file() and not (Path(folder) / WEIGHTS).is_file():
        if args.COMMAND == "export":
            return []  # read from the checkpoint's own files
        remedy = "make a PEFT folder of it with `swift export --to_peft_format true`"
        if args.PROGRAM == "megatron":
            remedy += ", or give it to --mcore_adapter"
        return [UserError(f"--adapters {folder}: is a checkpoint without a PEFT adapter in it", remedy)]
    if not (Path(folder) / CONFIG).is_file():
        return [no_adapter(Path(folder))]
    base = Path(args.model).expanduser() if getattr(args, "model", None) else None
    only_lora = args.PROGRAM == "megatron"
    return problems_in_files(folder, base if base and base.is_dir() else None, only_lora=only_lora)


def family_problems(args: Arguments) -> list[UserError]:
    """Whether the family in `--model_type` is that of config.json."""
    asked, types, families = _families(args)
    if asked not in SUPPORTED_ARCHITECTURES.values() or asked in types | families:
        return []
    named = ", ".join(sorted(types | families)) or "no architecture that is known"
    return [
        UserError(
            f"--model_type {asked}, but {args.model}/config.json says {named}",
            "drop --model_type, or give another --model",
        )
    ]


def family_notices(args: Arguments) -> list[str]:
    """A notice if `--model_type` is not our name; ms-swift has many names for models of one architecture."""
    asked, types, families = _families(args)
    if asked is None or asked in types | families or asked in SUPPORTED_ARCHITECTURES.values():
        return []
    named = ", ".join(sorted(types | families))
    return [
        f"--model_type {asked}: not a name of a family here; according to config.json the model is {named}"
    ]


def _families(args: Arguments) -> tuple[str | None, set[str], set[str]]:
    """(`--model_type` or None, what config.json calls the model, our families of its architectures)."""
    from ..plan.preflight import model_folder, read_config

    asked = getattr(args, "model_type", None)
    if asked is None or not args.model:
        return None, set(), set()
    try:
        config = read_config(model_folder(args.model))
    except UserError:
        return None, set(), set()  # said by preflight
    names = config.get("architectures") or []
    families = {SUPPORTED_ARCHITECTURES[name] for name in names if name in SUPPORTED_ARCHITECTURES}
    return asked, {str(config["model_type"])} if config.get("model_type") else set(), families
