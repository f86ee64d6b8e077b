"""LoRA that takes its start out of the weights: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775).

Such adapters are trained beside W - s B0 A0. Files are to hold beside W itself, wherever they are read, and PiSSA by
a randomized decomposition could not be repeated: so they hold s (B A - B0 A0), which is one plain adapter
[B, -B0] [A; A0] of twice the rank. (peft converts in this way on request, `path_initial_model_for_weight_conversion`.)
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.errors import UserError

_NOT_REPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")


class TakenStarts:
    """A and B as they were taken out of the weights, in host memory."""

    def __init__(self, model: nn.Module) -> None:
        """model: with adapters that have not been trained yet."""
        self._began = {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (".lora_A." in name or ".lora_B." in name)
        }

    def beside_whole_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained tensors by their names in the model -> those of a plain adapter of twice the rank."""
        return {name: self._with_start(name, tensor) for name, tensor in tensors.items()}

    def _with_start(self, name: str, tensor: Tensor) -> Tensor:
        began = self._began.get(name)
        if began is None:
            return tensor
        began = began.to(tensor.dtype)
        return torch.cat([tensor, began]) if ".lora_A." in name else torch.cat([tensor, -began], dim=1)

    @staticmethod
    def config(config: Any) -> Any:
        """peft's config of the plain adapter: twice the rank, with the same s."""
        config = deepcopy(config)
        factor = 2**0.5 if config.use_rslora else 2
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= factor
        config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {name: alpha * factor for name, alpha in (config.alpha_pattern or {}).items()}
        return config


def takes_start(init: Any) -> bool:
    """Whether LoRA that begins so takes its start out of the weights. init: of peft's `init_lora_weights`."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def settle_start(config: Any, folder: str) -> None:
    """Make the config of a PEFT folder, to train on, one of an adapter that belongs to its base's own weights.

    Raises UserError if it does not.
    """
    if takes_start(_start(config)):
        raise _of_other_weights(config, folder)
    check_start(config, folder)
    if isinstance(_start(config), str):
        config.init_lora_weights = True  # its matrices are in the files, however they began


def check_start(config: Any, folder: str) -> None:
    """Raise UserError for an adapter beside weights that peft cannot make again from its base's."""
    if str(_start(config)).startswith(_NOT_REPEATABLE):
        raise _of_other_weights(config, folder)


def _start(config: Any) -> Any:
    return getattr(config, "init_lora_weights", None)


def _of_other_weights(config: Any, folder: str) -> UserError:
    return UserError(
        f"--adapters {folder}: an adapter that began as {_start(config)} belongs to other weights than its base's",
        "save it where it was trained: `swift sft` does with --save_safetensors true, peft with save_pretrained("
        "path_initial_model_for_weight_conversion=...)",
    )
