"""Which flags a command takes from the args.json of a checkpoint, and which must not contradict it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..plan.folders import newest_checkpoint
from .aliases import ALIASES
from .base import Arguments, find_args_file
from .fields import flags_of
from .trained_parameters import FREEZING, THAWING, TrainedParametersArguments
from .values import same_value

# flags that describe the model and its text: taken from a checkpoint's args.json unless given
_MODEL_AND_TEXT = (
    *("model", "model_type", "torch_dtype", "mtp_num_layers"),
    *("system", "max_length", "truncation_strategy", "loss_scale"),
)
_LORA = ("tuner_type", "lora_rank", "lora_alpha", "use_rslora", "target_modules", "target_regex")
_QUANTIZED = (
    *("quant_method", "quant_bits", "hqq_axis", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"),
    *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
)
_START = ("adapters", "mcore_adapter")
_OF_AN_ADAPTER: Mapping[str, tuple[str, Any]] = {
    "lora_rank": ("r", 8),
    "lora_alpha": ("lora_alpha", 8),
    "lora_dropout": ("lora_dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
    "lora_bias": ("bias", "none"),
    "modules_to_save": ("modules_to_save", []),
}
"""Flags that an adapter one starts from decides: name and default in adapter_config.json."""
_FREE = ("lora_dropout", "boft_dropout", "vera_dropout", "lorap_lr_ratio")
"""Settings of training that a resumed run keeps, unless the command gives them."""
_MAY_CHANGE = (*_FREE, "merge_lora")


def checkpoint_of(cls: type[Arguments], typed: Mapping[str, Any]) -> Path | None:
    """The args.json of the checkpoint that a command resumes, starts from or exports; None if there is none.

    typed: the values that the command line gives.
    """
    if not typed.get("load_args", True):
        return None
    folder = resumed_from(cls, typed) or next(iter(starts_of(typed)), None)
    return find_args_file(folder) if folder else None


def starts_of(typed: Mapping[str, Any]) -> list[str]:
    """Folders of checkpoints and adapters that a new run, or a conversion, starts from."""
    given = [typed.get("mcore_model"), typed.get("mcore_adapter"), *(typed.get("adapters") or [])]
    return [folder for folder in given if folder]


def resumed_from(cls: type[Arguments], typed: Mapping[str, Any]) -> str | Path | None:
    """The checkpoint or run folder that a command continues; for `auto` the newest checkpoint, if there is one."""
    resume = typed.get("resume") or typed.get("resume_from_checkpoint")
    if resume in (None, "none"):
        return None
    if str(resume).lower() not in ("auto", "true"):
        return resume
    output = cls(**typed).output_dir
    return newest_checkpoint(Path(output)) if output else None


def named_base(typed: Mapping[str, Any]) -> str | None:
    """The base model that a PEFT adapter names, if it is a folder and no flag names a model; else None."""
    if typed.get("model") or not typed.get("load_args", True):
        return None
    for folder in typed.get("adapters") or []:
        name = _adapter_config(folder).get("base_model_name_or_path")
        if isinstance(name, str) and Path(name).is_dir():
            return name
    return None


def overruled(typed: Mapping[str, Any]) -> list[str]:
    """A line for each flag that contradicts the adapter in `--adapters`, whose own settings apply."""
    notices = []
    for folder in typed.get("adapters") or []:
        config = _adapter_config(folder)
        for name, (key, default) in _OF_AN_ADAPTER.items():
            own = config.get(key) or default
            if config and name in typed and not same_value(typed[name], own):
                given, found = _words(typed[name]), _words(own)
                notices.append(f"--{name} {given} has no effect: the adapter in --adapters has {found}")
    return notices


def of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an args.json under today's names, even if ms-swift wrote it.

    ms-swift may use names of v3, keeps the model's folder in `model_dir` and the name that the user gave in `model`,
    and has its own names for types of models.
    """
    if "mcore_swift_version" in saved:
        return dict(saved)
    values = {ALIASES[name].name if _is_renamed(name) else name: value for name, value in saved.items()}
    folder = values.get("model_dir")
    if isinstance(folder, str) and Path(folder).is_dir() and not Path(str(values.get("model"))).is_dir():
        values["model"] = folder
    values.pop("model_type", None)
    return values


def _is_renamed(name: str) -> bool:
    return name in ALIASES and ALIASES[name].convert is None


def _adapter_config(folder: str) -> dict[str, Any]:
    """adapter_config.json; {} if it cannot be read, which is reported when the adapter itself is read."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def taken_over(cls: type[Arguments], given: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Names of the flags that the command line does not give and that are taken from `saved`, an args.json."""
    flags = flags_of(cls)
    silent = [name for name in (*_MODEL_AND_TEXT, *_LORA, *_QUANTIZED) if name in flags and name not in given]
    if cls.COMMAND == "export" and given.keys() & {"adapters", "mcore_adapter"}:
        silent.remove("torch_dtype")  # a merged model has the dtype of its base
    taken = [name for name in silent if saved.get(name) is not None]
    if issubclass(cls, TrainedParametersArguments):  # a run continues to train the same parameters
        taken += [
            name
            for name in (*_tuner_flags(cls), *_FREE)
            if name in flags
            and name not in given
            and name not in taken
            and saved.get(name, flags[name].default) != flags[name].default
        ]
    return taken


def contradictions(
    cls: type[Arguments], typed: Mapping[str, Any], saved: Mapping[str, Any], path: Path
) -> Iterator[UserError]:
    """Errors for flags with which a resumed run would train other parameters than its checkpoint contains.

    Which parameters are frozen may change if the optimizer state is not loaded.
    """
    starts_anew = typed.get("resume_only_model") or typed.get("no_load_optim")
    for name in _tuner_flags(cls):
        if name not in typed or name not in saved or (starts_anew and name in (*FREEZING, *THAWING)):
            continue
        ours, theirs = typed[name], saved[name]
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs and not same_value(ours, theirs):
            yield UserError(
                f"--{name} {_words(typed[name])}: the checkpoint that is resumed was trained with "
                f"{_words(saved[name])} ({path})",
                f"drop --{name}, which is taken from there, or start a new run without resuming",
            )


def _tuner_flags(cls: type[Arguments]) -> list[str]:
    names = [name for name, flag in flags_of(cls).items() if flag.group == TrainedParametersArguments.TITLE]
    return [name for name in names if name not in (*_START, *_MAY_CHANGE)]


def _words(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
