"""Resolving --target_modules and related flags on a transformers model, where each name must match something."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from mcore_swift.errors import UserError
from mcore_swift.tuners.targets import ALL_EMBEDDING, ALL_LINEAR, ALL_ROUTER, choose


def peft_targets(model: nn.Module, args: Any) -> str | list[str]:
    """`--target_modules` or `--target_regex` in the form of peft's configs.

    peft ignores a name that matches nothing if another one matches; here this raises UserError with the nearest names.
    """
    if args.target_regex is None and args.target_modules == [ALL_LINEAR]:
        return ALL_LINEAR
    linear = _linear(model)
    routers = [name for name in linear if _last(name) in ("gate", "router")]
    kinds = {ALL_LINEAR: linear, ALL_EMBEDDING: _embeddings(model), ALL_ROUTER: routers}
    choose(_adaptable(model), args.target_modules, args.target_regex, kinds)
    if args.target_regex is not None:
        return args.target_regex
    targets: list[str] = []
    for target in args.target_modules:
        if target in kinds:
            targets += sorted({_last(name) for name in kinds[target]})
        else:
            targets.append(target)
    return list(dict.fromkeys(targets))


def check_other_names(model: nn.Module, args: Any) -> None:
    """Raise UserError, with the nearest names, if `--modules_to_save` or `--target_parameters` match nothing."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for flag, known in (("modules_to_save", modules), ("target_parameters", parameters)):
        for wanted in getattr(args, flag):
            # peft compares the end of module names, and of parameter names only after a dot
            end = wanted if flag == "modules_to_save" else f".{wanted}"
            if not any(name == wanted or name.endswith(end) for name in known):
                raise UserError(f"--{flag} {wanted}: the model has no such name", _nearest(wanted, known))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    depth = wanted.count(".") + 1
    ends = sorted({".".join(name.split(".")[-depth:]) for name in names})
    near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.4) or ends[:10]
    return f"nearest names: {', '.join(near)}"


def _adaptable(model: nn.Module) -> list[str]:
    """Modules that an adapter can be attached to: those with a matrix and without submodules."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.children(), None) is None
        and any(tensor.ndim > 1 for tensor in (*module.parameters(), *module.buffers()))
    ]


def _linear(model: nn.Module) -> list[str]:
    """The modules of peft's 'all-linear': every linear layer but the output layer."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]


def _embeddings(model: nn.Module) -> list[str]:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return [name for name, module in model.named_modules() if module is embedding]
