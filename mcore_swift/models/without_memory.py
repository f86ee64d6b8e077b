"""Modules whose parameters are declared and have no memory yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def _all(module: nn.Module, name: str) -> bool:
    return True


@contextmanager
def parameters_on_meta(which: Callable[[nn.Module, str], bool] = _all) -> Iterator[None]:
    """Parameters that modules register inside have no memory; buffers, which no checkpoint holds, are computed.

    which: asked of (module, name of the parameter), with the module as far as it is made by then.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and which(module, name):
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def emptied(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, type and marks, without memory."""
    return _with_marks(parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))


def given_memory(parameter: nn.Parameter, device: object) -> nn.Parameter:
    """A parameter like one on the meta device, whose memory holds nothing in particular."""
    data = parameter.detach().new_empty(parameter.shape, device=device)
    return _with_marks(parameter, nn.Parameter(data, parameter.requires_grad))


def _with_marks(parameter: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    new.__dict__.update(parameter.__dict__)  # what megatron-core writes on parameters
    return new
