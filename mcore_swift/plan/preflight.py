"""Checks of a model folder and a layout before any process is started: in milliseconds, without torch."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError, UserErrors
from .axes import nearest_size
from .check import check_layout, notices
from .folders import missing_folder, no_model
from .layout import Layout
from .quantization import package_problems, problems_beside_adapters, quantization_problems
from .shape import ModelShape, family_of
from .weights import multi_token_names, tensor_names, weight_problems


def preflight(args: Any, world_size: int) -> list[UserError]:
    """Everything wrong with `args.model` and with the layout on `world_size` processes.

    Reads config.json, the safetensors index and the headers of the safetensors files, but no weights. The weight files
    are skipped if the run does not load them (it is resumed, or starts from a Megatron checkpoint) or if
    `args.check_model` is false. Without `args.model` there is nothing to check.
    """
    if not getattr(args, "model", None):
        return []
    try:
        folder = model_folder(args.model)
    except UserError as error:
        return [error]
    problems: list[UserError] = []
    try:
        shape = read_shape(folder)
        problems += check_layout(Layout.from_args(args, world_size), shape, args, world_size)
    except UserErrors as error:
        problems += error.errors
    except UserError as error:
        problems.append(error)
    if _reads_weights(args):
        problems += weight_problems(folder)
        problems += _quantization(folder) + package_problems(getattr(args, "quant_method", None))
    return problems


def preflight_swift(args: Any, world_size: int = 1) -> list[UserError]:
    """Everything wrong with `args.model` for a run on transformers' model.

    Any architecture is accepted; with `args.backend` megatron, only those that pass `preflight`.
    """
    if not args.model:
        return []
    try:
        folder = model_folder(args.model)
        config = read_config(folder)
        if args.backend == "megatron":
            read_shape(folder)
    except UserErrors as error:
        return list(error.errors)
    except UserError as error:
        return [error]
    shared = list(_shared_rows(args, config, world_size))
    if not args.check_model or args.perform_initialization or args.resume_from_checkpoint:
        return shared
    if args.backend == "megatron":
        return shared + weight_problems(folder) + _quantization(folder)
    return (
        shared
        + weight_problems(folder)
        + problems_beside_adapters(args, read_config(folder), str(folder / "config.json"))
    )


def _shared_rows(args: Any, config: dict[str, Any], world_size: int) -> Iterator[UserError]:
    """Errors if the number of processes does not fit --device_map or --sequence_parallel_size."""
    size = args.sequence_parallel_size
    if args.device_map and world_size > 1:
        yield UserError(
            f"--device_map {args.device_map} puts the layers of one process's model on several devices, and there are "
            f"{world_size} processes",
            "start one process, or drop --device_map: --backend fsdp spreads a model over processes",
        )
    heads = config.get("text_config", config).get("num_attention_heads", config.get("n_head"))
    if world_size % size:
        nearest = nearest_size(size, lambda n: world_size % n == 0, world_size)
        yield UserError(
            f"--sequence_parallel_size {size} does not divide the {world_size} processes",
            f"the nearest possible is --sequence_parallel_size {nearest}, or set NPROC_PER_NODE",
        )
    elif args.backend != "megatron" and heads and heads % size:
        nearest = nearest_size(size, lambda n: heads % n == 0 and world_size % n == 0, world_size)
        yield UserError(
            f"--sequence_parallel_size {size} does not divide the model's {heads} attention heads",
            f"the nearest possible is --sequence_parallel_size {nearest}",
        )


def _quantization(folder: Path) -> list[UserError]:
    try:
        config = read_config(folder)
    except UserError:
        return []  # reported already
    return quantization_problems(config, str(folder / "config.json"))


def preflight_notices(args: Any) -> list[str]:
    """What a user should know before a run that passed `preflight`, one line each."""
    if not getattr(args, "model", None):
        return []
    shape = read_shape(model_folder(args.model))
    return notices(shape, args)


def _reads_weights(args: Any) -> bool:
    elsewhere = getattr(args, "mcore_model", None) or getattr(args, "perform_initialization", False)
    elsewhere = elsewhere or not getattr(args, "needs_base", True)
    continued = getattr(args, "resume", "none") not in (None, "none", "auto")
    return getattr(args, "check_model", True) and not elsewhere and not continued


def model_folder(model: str) -> Path:
    """The folder of a Hugging Face checkpoint. Raises UserError if it is none."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"--model {model} is a file", f"give the folder it is in: {folder.parent}")
    remedy = "give the folder that holds config.json and the safetensors files"
    # one slash, and the part before it is no folder: looks like a name on the hub
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and not folder.parent.is_dir():
        remedy += f"; to fetch it from the hub: hf download {model} --local-dir {folder.name}"
    raise missing_folder("--model", model, remedy)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as a dict. Raises UserError if it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_model(folder) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: no valid JSON ({error.msg})", "copy the file from the checkpoint again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})", "check its permissions and content") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no JSON object", "copy the file from the checkpoint again")
    return config


def read_shape(folder: Path) -> ModelShape:
    """Sizes of the model in a checkpoint folder. Raises UserError if it cannot be read, or is one we cannot train."""
    config, source = read_config(folder), str(folder / "config.json")
    family_of(config, source)
    return as_held(ModelShape.from_config_dict(config, source), folder)


def as_held(shape: ModelShape, folder: Path) -> ModelShape:
    """`shape`, without multi-token layers if config.json lists them but the weights in `folder` lack them."""
    names = tensor_names(folder) if shape.num_mtp_layers else []
    if names and not multi_token_names(names, shape.num_layers, shape.num_mtp_layers):
        return replace(shape, num_mtp_layers=0)
    return shape
