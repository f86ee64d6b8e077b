"""The files of a Hugging Face checkpoint besides its weights: configs, tokenizer, chat template, code."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from converters.pending import disk_errors

PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
)
"""Files of a checkpoint folder that do not describe its weight files."""


def copy_side_files(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Copy the side files of a checkpoint folder; returns their names.

    dtype: of the weights, to be entered in config.json; None leaves what is there. changes: other new entries.
    Raises UserError if the disk is full or not writable.
    """
    source, target = Path(source), Path(target)
    names = sorted(
        entry.name for entry in source.iterdir() if any(fnmatch(entry.name, pattern) for pattern in PATTERNS)
    )
    for name in names:
        with disk_errors(target / name):
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name, dirs_exist_ok=True)
            else:
                shutil.copyfile(source / name, target / name)
    if "config.json" in names:
        _describe_weights(target / "config.json", dtype, changes or {})
    return names


def _describe_weights(path: Path, dtype: torch.dtype | None, changes: Mapping[str, Any]) -> None:
    """Tell the dtype, and no quantization: what this project writes is never quantized."""
    config = json.loads(path.read_text(encoding="utf-8"))
    before = dict(config)
    config |= changes
    for name in ("quantization_config", "compression_config"):
        config.pop(name, None)
    if dtype is not None:
        # transformers 5 writes `dtype`, earlier versions wrote `torch_dtype`; all read the latter.
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    if config == before:
        return
    with disk_errors(path):
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
