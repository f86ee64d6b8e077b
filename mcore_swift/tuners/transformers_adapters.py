"""peft's tuners on a transformers model, and adapters as PEFT files."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.pending import disk_errors
from mcore_swift.config.base import found_from_anywhere
from mcore_swift.errors import UserError
from mcore_swift.tuners.freezing import frozen_names
from mcore_swift.tuners.peft_tuners import peft_config
from mcore_swift.tuners.residuals import TakenStarts, settle_start
from mcore_swift.tuners.transformers_targets import check_other_names, peft_targets

ADAPTER = "default"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def needs_weights(config: Any) -> bool:
    """Whether adapters of this peft config are initialized from the weights, which must then be loaded first."""
    init = getattr(config, "init_lora_weights", True)
    return getattr(config, "use_dora", False) or init not in (True, False, "gaussian")


def config_of(args: Any, model: nn.Module) -> Any:
    """peft's config of the adapters to train: of `--adapters` if it is given, else from the arguments.

    Raises UserError for a name that the model does not have, and for `--adapters` that holds no adapter of its base.
    """
    if not args.adapters:
        return adapter_config(args, model)
    config = read_adapter_config(args.adapters[0])
    settle_start(config, args.adapters[0])
    return config


def choose_parameters(model: nn.Module, args: Any, config: Any = None) -> nn.Module:
    """Freeze parameters, or attach adapters to the model; returns the model to train.

    config: peft's, of the adapters. For adapters the model must be allocated (peft puts them on the device of its
    weights); their random values depend on `args.seed` and are the same on every rank. Raises UserError, with the
    nearest names, for a target that the model does not have.
    """
    if args.tuner_type == "full":
        _freeze(model, args)
        return model
    config.base_model_name_or_path = args.model  # the base may have moved since the adapter was saved
    from peft import get_peft_model

    linear = _linear_layers(model)
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        try:
            model = get_peft_model(model, config, adapter_name=ADAPTER)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if args.adapters:
                remedy = "is it an adapter of another model? give its base with --model"
                raise UserError(f"--adapters {args.adapters[0]}: {reason}", remedy) from None
            asked = (
                f"regex {args.target_regex}"
                if args.target_regex
                else f"modules {' '.join(args.target_modules)}"
            )
            others = ", ".join(sorted(name for name in linear if f"'{name}'" not in reason))
            raise UserError(f"--target_{asked}: {reason}", f"name other layers, of: {others}") from None
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.dtype is not torch.float32:
                module._parameters[name] = nn.Parameter(parameter.float())
    return model


def _linear_layers(model: nn.Module) -> set[str]:
    """The last parts of the names of linear layers."""
    return {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


def adapter_config(args: Any, model: nn.Module) -> Any:
    """peft's config of the adapters that the arguments describe for a model.

    Raises UserError for a name that the model does not have.
    """
    check_other_names(model, args)
    common = {
        "task_type": "CAUSAL_LM",
        "target_modules": peft_targets(model, args),
        "modules_to_save": args.modules_to_save or None,
    }
    return peft_config(args, **common)


def read_adapter_config(folder: str) -> Any:
    """adapter_config.json of a PEFT folder. Raises UserError if it is missing or invalid."""
    from peft import PeftConfig

    if not (Path(folder) / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}", "give the folder of a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}/{CONFIG_FILE}: {str(error).splitlines()[0]}", "copy the file again"
        ) from None
    config.inference_mode = False
    return config


def names_in_file(model: Any, names: list[str]) -> dict[str, str]:
    """Parameter of the model -> its name in adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    tensors = {name: torch.empty(1, device="meta") for name in (*names, *projections(model))}
    by_tensor = {id(tensors[name]): name for name in names}
    written = get_peft_model_state_dict(
        model, state_dict=tensors, adapter_name=ADAPTER, save_embedding_layers=False
    )
    return {by_tensor[id(tensor)]: key for key, tensor in written.items() if id(tensor) in by_tensor}


def projections(model: Any) -> dict[str, Tensor]:
    """The random matrices shared by all VeRA adapters of a model, by name: not trained, but in peft's files."""
    held = {name: getattr(model.base_model, name, {}) for name in ("vera_A", "vera_B")}
    return {f"base_model.{name}.{ADAPTER}": one[ADAPTER] for name, one in held.items() if ADAPTER in one}


def save_adapter(
    model: Any, folder: Path, tensors: Mapping[str, Tensor], starts: TakenStarts | None = None
) -> None:
    """Write a PEFT folder. tensors: every trained parameter, whole, by its name in the model.

    starts: the initial adapters, if these were subtracted from the weights.
    """
    from safetensors.torch import save_file

    tensors = {**tensors, **{name: tensor.cpu() for name, tensor in projections(model).items()}}
    if starts is not None:
        tensors = starts.beside_whole_weights(tensors)
    names = names_in_file(model, list(tensors))
    with disk_errors(folder):
        save_file(
            {names[name]: tensor.contiguous() for name, tensor in tensors.items() if name in names},
            folder / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
    config = model.peft_config[ADAPTER]
    save_config(config if starts is None else starts.config(config), folder)


def save_config(config: Any, folder: Path) -> None:
    """Write adapter_config.json. config: peft's."""
    config.base_model_name_or_path = found_from_anywhere(config.base_model_name_or_path)
    training, config.inference_mode = config.inference_mode, True
    with disk_errors(folder):
        config.save_pretrained(str(folder))
    config.inference_mode = training


def adapter_tensors(folder: str, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every trained parameter from a PEFT folder, by its name in the model. shapes: their expected shapes.

    Raises UserError if one is missing or has another shape.
    """
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS_FILE}", "give the folder of a PEFT adapter")
    stored, found = load_file(path), {}
    for name, key in names_in_file(model, list(shapes)).items():
        if key not in stored:
            raise UserError(f"{path} does not hold {key}", "is it an adapter of another model or kind?")
        if tuple(stored[key].shape) != tuple(shapes[name]):
            raise UserError(
                f"{path}: {key} is {list(stored[key].shape)}, the model needs {list(shapes[name])}",
                "is it an adapter of another model?",
            )
        found[name] = stored[key]
    shared = projections(model)
    for name, key in names_in_file(model, list(shared)).items():
        if key in stored:  # peft can leave them out, and draws them again
            shared[name].copy_(stored[key])
    return found


def base_names(base: Collection[str], model: nn.Module) -> dict[str, str]:
    """Tensor of a model with adapters -> its name in the base model. base: names of all tensors of the base model.

    peft's copies of modules that are trained in full are initialized from the original modules.
    """
    names = {}
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        plain = name.removeprefix("base_model.model.")
        for inserted in (".base_layer.", f".modules_to_save.{ADAPTER}.", ".original_module."):
            plain = plain.replace(inserted, ".")
        if plain in base:
            names[name] = plain
    return names


def learning_rate_factors(model: nn.Module, args: Any) -> dict[str, float]:
    """LoRA+ (arXiv:2402.12354): parameter name -> factor of its learning rate, for the B matrices."""
    if args.tuner_type != "lora" or not args.lorap_lr_ratio:
        return {}
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: args.lorap_lr_ratio for name in named if "lora_B" in name or "lora_embedding_B" in name}


def _freeze(model: nn.Module, args: Any) -> None:
    parameters = dict(model.named_parameters())
    for name in frozen_names({name: value.numel() for name, value in parameters.items()}, args):
        parameters[name].requires_grad_(False)
