"""What a folder holds, for messages to users who pass the wrong kind: what it is, and which flag takes it."""

import difflib
import json
import os
from pathlib import Path

from ..errors import UserError

_MODEL, _ADAPTER, _CHECKPOINT = "config.json", "adapter_config.json", "manifest.json"
_OF_A_TOKENIZER = ("*token*", "vocab*", "*.model", "merges.txt", "*.tiktoken", "tekken*")
_NOT_ENOUGH = {"special_tokens_map.json", "added_tokens.json"}


def missing_folder(flag: str, folder: str, remedy: str) -> UserError:
    """The error for a folder that does not exist; it suggests a sibling with a similar name, if there is one."""
    path = Path(folder).expanduser()
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return UserError(
        f"{flag} {folder}: no such folder", f"did you mean {path.parent / near[0]}?" if near else remedy
    )


def no_model(folder: Path) -> UserError:
    """The error for a `--model` folder without config.json."""
    message = f"--model {folder}: holds no {_MODEL}"
    if (folder / _ADAPTER).is_file():
        base = _base_of(folder)
        return UserError(
            f"--model {folder} is a PEFT adapter, not a model",
            f"give it to --adapters, and its base{f' {base}' if base else ''} to --model",
        )
    if (folder / _CHECKPOINT).is_file():
        return UserError(
            f"{message}; it is a checkpoint without Hugging Face files",
            "make them with `megatron export --mcore_model ... --to_hf true`",
        )
    if newest := newest_checkpoint(folder):
        return UserError(message, f"give a checkpoint in it, such as {newest}")
    inside = sorted(entry for entry in folder.iterdir() if (entry / _MODEL).is_file())
    if inside:
        return UserError(message, f"did you mean {inside[0]}?")
    return UserError(message, "--model takes the folder of a Hugging Face checkpoint")


def no_adapter(folder: Path) -> UserError:
    """The error for an `--adapters` folder without adapter_config.json."""
    message = f"--adapters {folder}: holds no {_ADAPTER}"
    if (folder / _MODEL).is_file():
        return UserError(f"{message}: it is a whole model", "give it to --model, without --adapters")
    if newest := newest_checkpoint(folder):
        return UserError(message, f"give a checkpoint in it, such as {newest}")
    return UserError(message, "give the folder of a PEFT adapter")


def no_checkpoint(flag: str, folder: Path) -> UserError | None:
    """The error for a folder to resume from that contains no checkpoint; None if it contains one."""
    if (folder / _CHECKPOINT).is_file() or newest_checkpoint(folder):
        return None
    message = f"{flag} {folder} holds no complete checkpoint"
    if (folder / "trainer_state.json").is_file():
        return UserError(
            f"{message} of this project: it is one of transformers' Trainer",
            "start from its weights: give it to --model, or an adapter to --adapters",
        )
    if (folder / _MODEL).is_file():
        return UserError(message, "start from its weights: give it to --model")
    return UserError(message, "give a checkpoint-N folder, or a run folder that has one")


def is_plain_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint and not also a checkpoint of a run."""
    return (
        (folder / _MODEL).is_file() and not (folder / _CHECKPOINT).is_file() and not newest_checkpoint(folder)
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint written to a run folder, or to the newest run of an output folder, as training finds it."""
    found = [
        (_version(manifest.parent.parent), _written(manifest), manifest.parent)
        for place in ("checkpoint-*", "v*-*/checkpoint-*")
        for manifest in folder.glob(f"{place}/{_CHECKPOINT}")
    ]
    return max(found)[2] if found else None


def tokenizer_problems(model: str | Path) -> list[UserError]:
    """Errors for a model folder without a tokenizer, for which transformers would silently make an empty one."""
    folder = Path(model).expanduser()
    files = (path.name for pattern in _OF_A_TOKENIZER for path in folder.glob(pattern))
    if not (folder / _MODEL).is_file() or any(name not in _NOT_ENOUGH for name in files):
        return []
    return [
        UserError(
            f"--model {model}: holds no tokenizer",
            "copy tokenizer.json, tokenizer_config.json and their kin into it from where the model is from",
        )
    ]


def output_problems(output: Path, *, may_exist: bool) -> list[UserError]:
    """Errors for an `--output_dir` that would be overwritten or cannot be written to. may_exist: it may have files."""
    if output.exists() and not output.is_dir():
        return [UserError(f"--output_dir {output} is a file", "give a folder, or one to be made")]
    if not may_exist and output.is_dir() and any(output.iterdir()):
        return [UserError(f"--output_dir {output} is not empty", "give another, or add --exist_ok true")]
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir():
        return [UserError(f"--output_dir {output}: {there} is a file", "give another folder")]
    if not os.access(there, os.W_OK | os.X_OK):
        return [UserError(f"--output_dir {output}: nothing may be written in {there}", "give another folder")]
    return []


def _base_of(adapter: Path) -> str:
    try:
        config = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path") or ""
    except (OSError, ValueError, AttributeError):
        return ""


def _version(run: Path) -> int:
    digits = run.name[1:].split("-")[0]
    return int(digits) if run.name.startswith("v") and digits.isdigit() else -1


def _written(manifest: Path) -> float:
    try:
        return float(json.loads(manifest.read_text(encoding="utf-8")).get("written", 0))
    except (OSError, ValueError, AttributeError):
        return 0.0  # broken: reported when the run reads it
