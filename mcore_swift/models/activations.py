"""Activation functions by the name that a config.json gives them; names mean what they mean in transformers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mcore_swift.errors import UserError


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (arXiv:1606.08415)."""
    return functional.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv:2109.08668)."""
    return torch.square(functional.relu(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": functional.relu,
    "relu2": squared_relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that a config.json names. Raises UserError if it is not supported."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"the checkpoint's config.json asks for the activation {name!r}, which is not supported",
            remedy=f"supported: {', '.join(sorted(ACTIVATIONS))}",
        )
    return ACTIVATIONS[name]
